// The C interface of secateur's sparse kernels, and the packed matrix that they read.
//
// A matrix [rows, cols] is cut into groups of `group` rows and panels of `panel` columns. A run is what one row keeps
// in one panel. Runs are stored group by group, in a group panel by panel, in a panel row by row, so that a panel of
// the activations stays in the first-level cache while a group of rows reads it. Run k keeps the values
// start[k] .. start[k + 1]; they lie in the order of their columns. Which columns they are is said by `col` (one byte
// each, within the panel) or by `bits` (panel / 8 bytes a run, lowest column in the lowest bit), or by both.
// `quad` holds int8 values once more, for integer arithmetic with many tokens: of every four neighboring columns of a
// panel of which a row keeps any, all four, as one word.
//
// No function allocates, throws or checks: the caller gives scratch memory and has checked shapes and contents.
#pragma once
#include <cstdint>

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// INT8_DYNAMIC: int8 values; of a few tokens read by bits, and of many tokens read by quads, the activations become int8
// too, with one scale a token.
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT8_DYNAMIC = 3 };
enum Activation : int32_t { NONE = 0, RELU = 1 };

struct Matrix {
    int64_t rows, cols;
    int32_t group, panel;  // group <= 64; panel a multiple of 64, at most 256
    int32_t kind, activation;
    const void* values;     // SLACK bytes may be read past their end
    const uint32_t* start;  // [runs + 1]
    const uint8_t* col;     // [values], or null
    const uint8_t* bits;    // [runs * panel / 8], or null; at any address
    const uint32_t* quad;   // or null, and then beside bits: the sum of each row's values [rows], where the quads of each
                            // run begin [runs + 1], the quads, and a byte for each: which one of its panel it is
    const float* scale;     // [rows], or null: what a row's sum is multiplied by
    const float* bias;      // [rows], or null
};

// Bytes that may be read past the end of values; nothing else is read past its end.
enum { SLACK = 256 };

// y[n, rows] = x[n, cols] W^T for many tokens; needs col or quad. Scratch: see scratch_linear.
EXPORT void sparse_linear(const Matrix* w, const float* x, int64_t n, float* y, float* scratch, int32_t threads);
EXPORT int64_t scratch_linear(const Matrix* w, int64_t n);

// The same for one to four tokens, each weight read once; needs bits, or col where bits is null.
EXPORT void sparse_vector(const Matrix* w, const float* x, int64_t n, float* y, float* scratch, int32_t threads);
EXPORT int64_t scratch_vector(const Matrix* w, int64_t n);

// y[rows, out_h, out_w] = sum over columns of W[row, column] x[line][shift + h * pitch + w], for `count` images.
// An image is `lines` lines of `length` floats; a line is a channel, or one phase of it where positions are strided.
// Where `laid` is set they are made here, of channels of in_h x in_w: line (channel, a, b), with a < phase_h and
// b < phase_w, holds at h * pitch + w the input at (h * stride_h + a - pad_h, w * stride_w + b - pad_w), and zero where
// that is outside. Otherwise x is lines.
// Column c finds the input of position 0 at offset[c] = line * length + shift. Where `copied` is set, the inputs of a
// panel's columns are copied together for each block of positions, so that vectors begin where cache lines do; without
// it the output has at least as many positions as a block.
struct Convolution {
    const uint32_t* offset;  // [cols]
    int64_t count, lines, length;
    int64_t out_h, out_w, pitch;
    int32_t copied, laid, in_h, in_w, stride_h, stride_w, phase_h, phase_w, pad_h, pad_w;
};
EXPORT void sparse_convolution(const Matrix* w, const Convolution* c, const float* x, float* y, float* scratch,
                               int32_t threads);
EXPORT int64_t scratch_convolution(const Convolution* c);
EXPORT int64_t block_convolution(const Convolution* c);  // positions in a block

// Run in the OpenMP pool that the process has already: the address of its GOMP_parallel, or null for own threads.
EXPORT void sparse_use_pool(void* gomp_parallel);

EXPORT int32_t sparse_lanes(void);      // floats in a vector
EXPORT const char* sparse_isa(void);    // what this library was compiled for
}
