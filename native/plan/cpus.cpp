#include "plan/cpus.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace hasten {
namespace {

// "max 100000" or "150000 100000" (version 2); 0 where absent or unlimited.
double read_cpu_max(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  return std::strtod(quota.c_str(), nullptr) / period;
}

// cpu.cfs_quota_us (-1: none) and cpu.cfs_period_us (version 1).
double read_cfs(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) return 0;
  return quota / period;
}

template <typename Read>
double smallest_upwards(const std::string& root, std::string path, Read read) {
  double smallest = 0;
  for (;;) {
    const double quota = read(root + path);
    if (quota > 0) smallest = smallest > 0 ? std::min(smallest, quota) : quota;
    if (path.empty()) return smallest;
    path.erase(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  }
}

}  // namespace

double cpu_quota(const std::string& membership, const std::string& root) {
  double smallest = 0;
  const auto keep = [&](double quota) {
    if (quota > 0) smallest = smallest > 0 ? std::min(smallest, quota) : quota;
  };
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {  // hierarchy:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers.empty()) keep(smallest_upwards(root, path, read_cpu_max));
    std::istringstream list(controllers);
    for (std::string name; std::getline(list, name, ',');) {
      if (name != "cpu") continue;
      for (const std::string& mount : {std::string("cpu"), controllers})
        keep(smallest_upwards(root + "/" + mount, path, read_cfs));
    }
  }
  return smallest;
}

int granted_threads() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  // Masks wider than cpu_set_t exist; grow until the kernel is content.
  for (int words = 16; words <= 1024; words *= 2) {
    std::vector<unsigned long> mask(words);
    const size_t bytes = words * sizeof(unsigned long);
    if (sched_getaffinity(0, bytes, reinterpret_cast<cpu_set_t*>(mask.data())) != 0) continue;
    cores = CPU_COUNT_S(bytes, reinterpret_cast<cpu_set_t*>(mask.data()));
    break;
  }
  const double quota = cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
  if (quota > 0) cores = std::min(cores, static_cast<int>(quota));
#endif
  return std::max(cores, 1);
}

}  // namespace hasten
