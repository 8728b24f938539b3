// What is read off a program's output after a step, [rows, vocabulary] logits as a rule. Rows are shared out to the team.
#pragma once
#include "ops/sample.h"
#include "plan/program.h"

namespace hasten {

// A value's rows without the padding between them: out [rows, width].
void copy_rows(const Program& program, const Value& value, float* out);

// log softmax(logits)[target] of each row, from a sum in double. Targets out of range: BatchError.
void score(const Program& program, const int32_t* targets, float* out);

// Lowest index among equals.
void argmax(const Program& program, int32_t* out);

// KL(reference || program) of each row in nats. Both have the same rows and vocabulary, else BatchError.
void divergence(const Program& program, const Program& reference, double* out);

// Draws a token for every row; `rows` say how, and get their logits here. What names no token: BatchError.
void sample(const Program& program, std::vector<SampleRow>& rows, SampleScratch& scratch, const Drawn& out);

}  // namespace hasten
