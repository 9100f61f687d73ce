// The plain C functions of block_sparse.h.
#include <stdio.h>

#include <algorithm>
#include <chrono>

#include "byte_pool.h"
#include "conv.h"
#include "gemm.h"
#include "int8.h"
#include "planes.h"
#include "processor.h"
#include "window.h"

namespace slrc {

const Parallel kSerial = {[](void*, size_t count, void (*task)(void*, size_t), void* data) {
                            for (size_t i = 0; i < count; ++i) task(data, i);
                          },
                          nullptr};

namespace {

template <class Body>
int Guarded(char* error, size_t error_size, const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    if (error && error_size) snprintf(error, error_size, "%s", e.what());
    return 1;
  }
}

double Peak(const TileLoops& loops, double seconds) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto begin = Clock::now();
    const double operations = loops.spin(100000);
    best = std::max(best, operations / std::chrono::duration<double>(Clock::now() - begin).count() / 1e9);
  } while (Clock::now() < end);
  return best;
}

template <class AnyConv>
void CheckShape(const AnyConv& conv, const int64_t x_shape[4], const int64_t y_shape[4]) {
  int64_t expected[4];
  conv.OutputShape(x_shape, expected);
  for (int d = 0; d < 4; ++d)
    if (y_shape[d] != expected[d])
      throw Error("dimension " + std::to_string(d) + " of y must be " + std::to_string(expected[d]) + ", got " +
                  std::to_string(y_shape[d]));
}

}  // namespace
}  // namespace slrc

extern "C" {

int slrc_block_sparse_conv(const SlrcBlocks* blocks, const SlrcWindow* window, const float* x, const int64_t x_shape[4],
                           const float* residual, float* y, const int64_t y_shape[4], char* error, size_t error_size) {
  return slrc::Guarded(error, error_size, [&] {
    const slrc::FloatConv conv(*blocks, *window);
    slrc::CheckShape(conv.conv(), x_shape, y_shape);
    conv.Run(x, x_shape, residual, y, slrc::kSerial);
  });
}

int slrc_block_sparse_gemm(const SlrcBlocks* blocks, const float* x, int64_t rows, int64_t inputs,
                           const float* residual, float* y, char* error, size_t error_size) {
  return slrc::Guarded(error, error_size,
                       [&] { slrc::Gemm(*blocks).Run(x, rows, inputs, residual, y, slrc::kSerial); });
}

int slrc_block_sparse_mlp(const SlrcBlocks* up, const SlrcBlocks* down, const float* x, int64_t rows, int64_t inputs,
                          const float* residual, float* y, char* error, size_t error_size) {
  return slrc::Guarded(error, error_size,
                       [&] { slrc::Mlp(*up, *down).Run(x, rows, inputs, residual, y, slrc::kSerial); });
}

int slrc_int8_conv(const SlrcInt8Blocks* blocks, const SlrcWindow* window, const uint8_t* x, const int64_t x_shape[4],
                   const uint8_t* residual, void* y, const int64_t y_shape[4], char* error, size_t error_size) {
  return slrc::Guarded(error, error_size, [&] {
    const slrc::Int8Conv conv(*blocks, *window);
    slrc::CheckShape(conv, x_shape, y_shape);
    conv.Run(x, x_shape, residual, y, slrc::kSerial);
  });
}

int slrc_int8_gemm(const SlrcInt8Blocks* blocks, const uint8_t* x, int64_t rows, int64_t inputs,
                   const uint8_t* residual, void* y, char* error, size_t error_size) {
  return slrc::Guarded(error, error_size,
                       [&] { slrc::Int8Gemm(*blocks).Run(x, rows, inputs, residual, y, slrc::kSerial); });
}

int slrc_max_pool_bytes(const SlrcWindow* window, const uint8_t* x, const int64_t x_shape[4], uint8_t* y, char* error,
                        size_t error_size) {
  return slrc::Guarded(error, error_size, [&] {
    slrc::CheckPool(*window);
    slrc::MaxPoolBytes(x, x_shape, *window, y, slrc::kSerial);
  });
}

void slrc_max_pool_2x2(const float* x, const int64_t x_shape[4], float* y) {
  slrc::MaxPool2x2(x, x_shape, y, slrc::kSerial);
}

void slrc_upsample_bilinear_2x(const float* x, const int64_t x_shape[4], float* y) {
  slrc::UpsampleBilinear2x(x, x_shape, y, slrc::kSerial);
}

void slrc_channels_first(const float* x, const int64_t x_shape[4], float* y) {
  slrc::ChannelsFirst(x, x_shape, y, slrc::kSerial);
}

void slrc_channels_last(const float* x, const int64_t x_shape[4], float* y) {
  slrc::ChannelsLast(x, x_shape, y, slrc::kSerial);
}

void slrc_depth_to_space(const float* x, const int64_t x_shape[4], int64_t block, float* y) {
  slrc::DepthToSpace(x, x_shape, block, y, slrc::kSerial);
}

int slrc_check_sizes(const SlrcBlocks* blocks, const SlrcWindow* window, const int64_t* x_shape, char* error,
                     size_t error_size) {
  return slrc::Guarded(error, error_size, [&] {
    slrc::CheckSizes(*blocks, window ? window->group : 1);
    if (!window) return slrc::CheckColumns(x_shape[1]);
    slrc::CheckWindow(*window);
    slrc::CheckInput(*window, x_shape);
  });
}

const char* slrc_activation(int64_t index) {
  return index >= 0 && index < slrc::kActivations ? slrc::kActivationNames[index] : nullptr;
}

const char* slrc_needed_feature(const char* instruction_set, int64_t index) {
  const slrc::TileLoops* loops = slrc::FindSet(instruction_set);
#define SLRC_NAME(name, macro, word, bit) name,
  static const char* const names[] = {SLRC_FEATURES(SLRC_NAME)};
#undef SLRC_NAME
  for (int k = 0; loops && k < slrc::kFeatures; ++k)
    if ((loops->features >> k & 1) && index-- == 0) return names[k];
  return nullptr;
}

int slrc_would_run(const char* instruction_set, uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx,
                    uint32_t leaf7_edx, uint32_t leaf71_eax, uint32_t saved) {
  const slrc::TileLoops* loops = slrc::FindSet(instruction_set);
  return loops && slrc::Runs({leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf71_eax, saved, 0, 0}, *loops);
}

const char* slrc_instruction_set(void) {
  try {
    return slrc::Loops().name;
  } catch (const slrc::Error&) {
    return "none";
  }
}

const char* slrc_int8_instruction_set(void) {
  try {
    return slrc::Int8Loops().name;
  } catch (const slrc::Error&) {
    return "none";
  }
}

double slrc_peak_gflops(double seconds) { return slrc::Peak(slrc::Loops(), seconds); }

double slrc_int8_peak_gops(double seconds) { return slrc::Peak(slrc::Int8Loops(), seconds); }

}  // extern "C"
