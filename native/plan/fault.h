// Deliberate faults, for tests that must be seen to fail.
#pragma once
#include "plan/program.h"

namespace hasten {

// "thread_sum": norms and matmuls add up in a number of parts that comes from the threads, the tokens in the step and the
// first block's number, so that results depend on threads, company and cache. "" ends it. False where the name is unknown.
bool set_fault(const std::string& name);

// Parts to split sums in; 0: no fault is set.
int fault_parts(const Sizes& sizes, const BatchView& batch);

// The sum of x[i], or of their squares, in parts that are added up at the end.
float split_sum(const float* x, int64_t n, int parts, bool squares);

// An rms or layer norm whose sums are split in `parts`.
void faulty_norm(NormKind kind, const float* x, int64_t n, const float* weight, const float* bias, float eps, int parts,
                 float* out);

}  // namespace hasten
