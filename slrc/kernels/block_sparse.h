// Convolution and matrix multiplication with block-sparse weights, float32 or int8, NCHW.
//
// A weight is seen as a matrix (out channels, columns), a column being one (input channel, kernel row, kernel column)
// of the output's group. Blocks of `block` consecutive out channels x 1 column survive or vanish as one. Packed:
//   values        (surviving blocks, block)  the rows of a block stand together
//   columns       (surviving blocks)         which column, flattened (c, kh, kw), c within the group
//   row_pointers  (block rows + 1)           block row r holds the surviving blocks row_pointers[r] ... [r + 1] - 1
// Block rows: for each group, its out channels / block, rounded up; the rows that stand out over the last are ignored.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define SLRC_EXPORT __attribute__((visibility("default")))

#if defined(__cplusplus)
extern "C" {
#endif

typedef struct SlrcBlocks {
  const float* values;
  int64_t value_count;
  const int32_t* columns;
  int64_t column_count;
  const int32_t* row_pointers;
  int64_t row_pointer_count;
  const float* bias;  // null, or one for each out channel
  int64_t bias_count;
  int64_t block;  // 1, 4, 8 or 16
  int64_t out_channels;
  const char* activation;  // as slrc_activation names it; "gelu" is the one with erf
  float slope;             // of "leakyrelu" below zero
} SlrcBlocks;

// A weight of int8, whose columns are of four consecutive input channels of a group (a quad; the last one may stand out
// over them): column quad x taps + tap. x is uint8, y is uint8 or float32:
//   y = saturate(round(leaky(sum x scale + (residual - residual_zero_point) x residual_scale)) + y_zero_point)
// rounding halves to even; a float32 y is what is rounded. sum is an int32, of bias and weight x (x - x_zero_point).
// leaky multiplies what is below zero by the slope.
typedef struct SlrcInt8Blocks {
  const int8_t* values;  // (surviving blocks, block, 4), -127 ... 127
  int64_t value_count;
  const int32_t* columns;
  int64_t column_count;
  const int32_t* row_pointers;
  int64_t row_pointer_count;
  const int32_t* bias;  // one for each out channel
  int64_t bias_count;
  const float* scale;  // one for each out channel
  int64_t scale_count;
  int64_t block;  // 4, 8 or 16; of depthwise layers 1
  int64_t out_channels;
  int64_t x_zero_point;
  int64_t y_zero_point;  // -1: y is float32
  int64_t residual_zero_point;
  float residual_scale;
  float slope;  // 1 if there is no activation
} SlrcInt8Blocks;

typedef struct SlrcWindow {
  int64_t kernel[2];
  int64_t strides[2];
  int64_t pads[4];  // top, left, bottom, right
  int64_t dilations[2];
  int64_t group;
} SlrcWindow;

// y = activation(conv(x) + bias + residual). x is (n, c, h, w), y and residual (null if there is none) as y_shape.
// Returns 0, or 1 with the reason in error.
SLRC_EXPORT int slrc_block_sparse_conv(const SlrcBlocks* blocks, const SlrcWindow* window, const float* x,
                                       const int64_t x_shape[4], const float* residual, float* y,
                                       const int64_t y_shape[4], char* error, size_t error_size);

// y = activation(x weight^T + bias + residual). x is (rows, inputs), y and residual (rows, out channels).
SLRC_EXPORT int slrc_block_sparse_gemm(const SlrcBlocks* blocks, const float* x, int64_t rows, int64_t inputs,
                                       const float* residual, float* y, char* error, size_t error_size);

// y = down(up(x)), both as above; the residual is added in `down`.
SLRC_EXPORT int slrc_block_sparse_mlp(const SlrcBlocks* up, const SlrcBlocks* down, const float* x, int64_t rows,
                                      int64_t inputs, const float* residual, float* y, char* error, size_t error_size);

// The same with a weight of int8; y is uint8 or float32.
SLRC_EXPORT int slrc_int8_conv(const SlrcInt8Blocks* blocks, const SlrcWindow* window, const uint8_t* x,
                               const int64_t x_shape[4], const uint8_t* residual, void* y, const int64_t y_shape[4],
                               char* error, size_t error_size);
SLRC_EXPORT int slrc_int8_gemm(const SlrcInt8Blocks* blocks, const uint8_t* x, int64_t rows, int64_t inputs,
                               const uint8_t* residual, void* y, char* error, size_t error_size);

// y (n, c, h', w') = the maxima of windows of bytes; the window's dilations and group are one. Returns as above.
SLRC_EXPORT int slrc_max_pool_bytes(const SlrcWindow* window, const uint8_t* x, const int64_t x_shape[4], uint8_t* y,
                                    char* error, size_t error_size);

// y (n, c, h / 2, w / 2) = the maxima of 2 x 2 windows of x (n, c, h, w), side by side.
SLRC_EXPORT void slrc_max_pool_2x2(const float* x, const int64_t x_shape[4], float* y);
// y (n, c, 2 h, 2 w) = x (n, c, h, w) at twice the size, bilinear between the centers of pixels.
SLRC_EXPORT void slrc_upsample_bilinear_2x(const float* x, const int64_t x_shape[4], float* y);
// y (n, c, h, w) = x (n, h, w, c), and back.
SLRC_EXPORT void slrc_channels_first(const float* x, const int64_t x_shape[4], float* y);
SLRC_EXPORT void slrc_channels_last(const float* x, const int64_t x_shape[4], float* y);
// y (n, c, block h, block w) = x (n, block block c, h, w), whose phases go between each other.
SLRC_EXPORT void slrc_depth_to_space(const float* x, const int64_t x_shape[4], int64_t block, float* y);

// Returns 0 if the kernels take a layer of these sizes, or 1 with the reason in error. Reads no array of the weight.
// window is null for a matrix multiplication, whose x_shape is (rows, inputs).
SLRC_EXPORT int slrc_check_sizes(const SlrcBlocks* blocks, const SlrcWindow* window, const int64_t* x_shape,
                                 char* error, size_t error_size);

// The index-th activation's name; null from the last one's index on.
SLRC_EXPORT const char* slrc_activation(int64_t index);

// The instruction set in use: "avx512", "avx2", "neon" or "portable"; "none" if SLRC_KERNEL_ISA names none that there
// is.
SLRC_EXPORT const char* slrc_instruction_set(void);

// The same of int8 layers, where there are "avx512amx", "avx512vnni", "avx2vnni", "neoni8mm" and "neondot"
// as well. SLRC_KERNEL_ISA may name those; float32 layers then take the set whose name theirs begins with.
SLRC_EXPORT const char* slrc_int8_instruction_set(void);

// The index-th feature that a processor needs for a set, as compilers' flags name it; null from the last one's index
// on.
SLRC_EXPORT const char* slrc_needed_feature(const char* instruction_set, int64_t index);

// Whether a processor whose CPUID says so (leaf 1, ECX; leaf 7, EBX, ECX and EDX; leaf 7.1, EAX) runs a set, `saved`
// (XCR0) being what its operating system saves.
SLRC_EXPORT int slrc_would_run(const char* instruction_set, uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx,
                               uint32_t leaf7_edx, uint32_t leaf71_eax, uint32_t saved);

// The greatest rate of float32 multiply-adds that this core reaches, in GFLOP/s, measured for about `seconds`.
SLRC_EXPORT double slrc_peak_gflops(double seconds);

// The same of int8 ones by vectors, in 10^9 a second, a multiply-add being two. Matrix registers exceed it.
SLRC_EXPORT double slrc_int8_peak_gops(double seconds);

#if defined(__cplusplus)
}  // extern "C"
#endif
