// How many cores this process may use: affinity, and the quotas of containers.
#pragma once
#include <string>

namespace hasten {

// Cores' worth of time that cgroups (version 1 or 2) grant: the smallest quota on the way up from the process's own group;
// 0 where there is no limit. `membership` is a file such as /proc/self/cgroup, `root` where cgroups are mounted.
double cpu_quota(const std::string& membership, const std::string& root);

// Threads worth starting: cores in the affinity mask, at most the whole cores of the quota, at least 1.
int granted_threads();

}  // namespace hasten
