#include "plan/fault.h"

#include <algorithm>
#include <cmath>

namespace hasten {
namespace {

std::atomic<bool> thread_sum{false};

}  // namespace

float split_sum(const float* x, int64_t n, int parts, bool squares) {
  const int64_t size = n / parts + 1;
  float total = 0;
  for (int64_t begin = 0; begin < n; begin += size) {
    float sum = 0;
    for (int64_t i = begin; i < std::min(n, begin + size); ++i) sum += squares ? x[i] * x[i] : x[i];
    total += sum;
  }
  return total;
}

bool set_fault(const std::string& name) {
  thread_sum = name == "thread_sum";
  return name.empty() || thread_sum;
}

int fault_parts(const Sizes& sizes, const BatchView& batch) {
  if (!thread_sum) return 0;
  const int block = batch.table_stride > 0 ? std::max(batch.block_tables[0], 0) : 0;
  return 2 + (sizes.threads + static_cast<int>(batch.token_count) + block) % 7;
}

void faulty_norm(NormKind kind, const float* x, int64_t n, const float* weight, const float* bias, float eps, int parts,
                 float* out) {
  const float mean = kind == NormKind::layer ? split_sum(x, n, parts, false) / n : 0.0f;
  const float variance = split_sum(x, n, parts, true) / n - mean * mean;
  const float factor = 1.0f / std::sqrt(variance + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * factor * weight[i] + (bias != nullptr ? bias[i] : 0.0f);
}

}  // namespace hasten
