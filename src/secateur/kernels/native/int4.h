// The C interface of the kernels for dense weights of 4 bits.
//
// A weight is scale * (nibble - 8 - zero). Row r has its nibbles in values[r * cols / 2 ...], the first of two in the lower
// half of a byte, and a scale and a zero for each `group` inputs.
#pragma once
#include "sparse.h"

extern "C" {

struct Int4 {
    int64_t rows, cols;         // cols a multiple of group
    int32_t group, activation;  // group 32, 64, 128 or 256
    const uint8_t* values;      // [rows, cols / 2]
    const float* scale;         // [rows, cols / group]
    const int8_t* zero;         // [rows, cols / group], or null where all are 0
    const float* bias;          // [rows], or null
};

// y[n, rows] = x[n, cols] W^T for one to four tokens. Scratch: see scratch_int4.
EXPORT void int4_vector(const Int4* w, const float* x, int64_t n, float* y, float* scratch, int32_t threads);
EXPORT int64_t scratch_int4(const Int4* w, int64_t n);

// Rows first to last - 1 as [last - first, cols] floats, or bfloat16 rounded to nearest.
EXPORT void int4_floats(const Int4* w, int64_t first, int64_t last, void* out, int32_t bfloat16, int32_t threads);
}
