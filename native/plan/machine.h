// What this machine can do at most, measured on the pool: the limits that speeds are shown as shares of.
#pragma once
#include "core.h"

namespace hasten {

// Gigabytes (1e9) a second that `threads` threads read together from `bytes` of memory: the best pass within `seconds`.
double read_gbs(const Kernels& kernels, int64_t bytes, double seconds, int threads);

// Billions of multiply-accumulates a second, all in registers, for `seconds`.
double int8_gmacs(const Kernels& kernels, double seconds, int threads);
double bf16_gmacs(const Kernels& kernels, double seconds, int threads);

}  // namespace hasten
