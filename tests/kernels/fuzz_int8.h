// Random int8 layers for fuzz.cpp, sound and broken: a sound one must equal exact integers, rounded once an operation.
// Every array is allocated to its exact size.
#pragma once

#include <cmath>
#include <string>
#include <vector>

namespace {

struct Int8Case {
  explicit Int8Case(uint64_t seed) {
    random.engine.seed(seed);
    gemm = random.Chance(25);
    const bool pointwise = gemm || random.Chance(30), keeps_size = !pointwise && random.Chance(40);
    depthwise = !gemm && random.Chance(20);
    window.group = gemm ? 1 : random.Int(1, depthwise ? 20 : 3);
    for (int a = 0; a < 2; ++a) {
      window.kernel[a] = pointwise ? 1 : random.Int(1, depthwise && a ? 13 : 4);
      window.strides[a] = pointwise || keeps_size ? 1 : random.Int(1, depthwise && a ? 4 : 3);
      window.dilations[a] = pointwise || (depthwise && a) ? 1 : random.Int(1, 2);
      const int64_t span = (window.kernel[a] - 1) * window.dilations[a] + 1;
      window.pads[a] = pointwise ? 0 : keeps_size ? random.Int(0, span - 1) : random.Int(0, 3);
      window.pads[a + 2] = pointwise ? 0 : keeps_size ? span - 1 - window.pads[a] : random.Int(0, 3);
      const int64_t least = std::max<int64_t>(1, span - window.pads[a] - window.pads[a + 2]);
      x_shape[2 + a] = gemm ? 1 : random.Int(least, least + (random.Chance(30) ? 30 : 5));
      y_shape[2 + a] = (x_shape[2 + a] + window.pads[a] + window.pads[a + 2] - span) / window.strides[a] + 1;
    }
    x_shape[0] = y_shape[0] = gemm ? random.Int(1, random.Chance(30) ? 150 : 5) : random.Int(1, 2);
    x_shape[1] = window.group * (depthwise ? 1 : random.Chance(8) ? random.Int(400, 700) : random.Int(1, 20));
    y_shape[1] = window.group * random.Int(1, depthwise ? 3 : 40);
    block = depthwise ? 1 : 4 << random.Int(0, 2);
    const int64_t quads = (x_shape[1] / window.group + 3) / 4, width = quads * window.kernel[0] * window.kernel[1];
    rows_per_group = (y_shape[1] / window.group + block - 1) / block;
    MakePlaces(rows_per_group * window.group, width);
    values.reset(new int8_t[count * block * 4]);
    for (int64_t i = 0; i < count * block * 4; ++i) values[i] = static_cast<int8_t>(random.Int(-127, 127));
    x = Bytes(Size(x_shape));
    if (random.Chance(40)) residual = Bytes(Size(y_shape));
    bias.reset(new int32_t[y_shape[1]]);
    scale.reset(new float[y_shape[1]]);
    for (int64_t m = 0; m < y_shape[1]; ++m) {
      bias[m] = static_cast<int32_t>(random.Int(-100000, 100000));
      scale[m] = random.Float() / 1000;
    }
    const int64_t y_zero = random.Chance(30) ? -1 : random.Int(0, 255);
    blocks = {values.get(), count * block * 4, columns.get(), count, pointers.get(), rows_per_group * window.group + 1,
              bias.get(), y_shape[1], scale.get(), y_shape[1], block, y_shape[1], random.Int(0, 255), y_zero,
              random.Int(0, 255), random.Float(), random.Chance(70) ? 1.0f : random.Float()};
    if (y_zero < 0) y_float.reset(new float[Size(y_shape)]);
    else y.reset(new uint8_t[Size(y_shape)]);
  }

  static int64_t Size(const int64_t shape[4]) { return shape[0] * shape[1] * shape[2] * shape[3]; }

  std::unique_ptr<uint8_t[]> Bytes(int64_t size) {
    std::unique_ptr<uint8_t[]> made(new uint8_t[size]);
    std::generate_n(made.get(), size, [&] { return static_cast<uint8_t>(random.Int(0, 255)); });
    return made;
  }

  void MakePlaces(int64_t block_rows, int64_t width) {
    const int percent = static_cast<int>(random.Int(0, 3)) * 34;
    std::vector<int32_t> found;
    pointers.reset(new int32_t[block_rows + 1]);
    pointers[0] = 0;
    for (int64_t r = 0; r < block_rows; ++r) {
      for (int64_t c = 0; c < width; ++c)
        if (random.Chance(percent)) found.push_back(static_cast<int32_t>(c));
      pointers[r + 1] = static_cast<int32_t>(found.size());
    }
    count = static_cast<int64_t>(found.size());
    columns.reset(new int32_t[count]);
    std::copy(found.begin(), found.end(), columns.get());
  }

  void Break() {
    int64_t* const fields[] = {&blocks.x_zero_point, &blocks.residual_zero_point, &blocks.block, &window.group,
                               window.kernel,        window.strides,              window.pads,   window.dilations};
    int64_t* const counts[] = {&blocks.value_count, &blocks.column_count, &blocks.bias_count, &blocks.scale_count};
    switch (random.Int(0, 5)) {
      case 0:
        *fields[random.Int(0, gemm ? 2 : 7)] = random.Chance(70) ? random.Odd() : random.Int(-2, 20);
        break;
      case 1:
        if (count) columns[random.Int(0, count - 1)] = static_cast<int32_t>(random.Odd());
        break;
      case 2:
        pointers[random.Int(0, blocks.row_pointer_count - 1)] = static_cast<int32_t>(random.Odd());
        break;
      case 3: {
        int64_t& number = *counts[random.Int(0, 3)];
        number = random.Int(-1, number);
        break;
      }
      case 4:
        if (count) values[random.Int(0, count * block * 4 - 1)] = -128;
        break;
      default:
        scale[random.Int(0, y_shape[1] - 1)] = random.Chance(50) ? NAN : INFINITY;
    }
  }

  int Run(char* error, size_t size) {
    void* const to = y ? static_cast<void*>(y.get()) : y_float.get();
    return gemm ? slrc_int8_gemm(&blocks, x.get(), x_shape[0], x_shape[1], residual.get(), to, error, size)
                : slrc_int8_conv(&blocks, &window, x.get(), x_shape, residual.get(), to, y_shape, error, size);
  }

  bool Agrees() const {
    int64_t at = 0;
    for (int64_t n = 0; n < y_shape[0]; ++n)
      for (int64_t m = 0; m < y_shape[1]; ++m)
        for (int64_t i = 0; i < y_shape[2]; ++i)
          for (int64_t j = 0; j < y_shape[3]; ++j, ++at) {
            // (Volatile: the compiler must round every operation.)
            volatile float real = static_cast<float>(Sum(n, m, i, j)) * scale[m];
            if (residual) {
              volatile float shifted = residual[at] - static_cast<float>(blocks.residual_zero_point);
              volatile float added = shifted * blocks.residual_scale;
              real = real + added;
            }
            if (real < 0) real = real * blocks.slope;
            if (y_float && y_float[at] != real) return false;
            const double rounded = std::nearbyint(real) + static_cast<double>(blocks.y_zero_point);
            if (y && y[at] != std::min(255.0, std::max(0.0, rounded))) return false;
          }
    return true;
  }

  int32_t Sum(int64_t n, int64_t m, int64_t i, int64_t j) const {
    const int64_t per_group = y_shape[1] / window.group, group = m / per_group, taps = window.kernel[0] * window.kernel[1];
    const int64_t row = group * rows_per_group + m % per_group / block, lane = m % per_group % block;
    const int64_t inputs = x_shape[1] / window.group;
    int32_t sum = bias[m];
    for (int32_t t = pointers[row]; t < pointers[row + 1]; ++t) {
      const int64_t tap = columns[t] % taps;
      const int64_t h = i * window.strides[0] + tap / window.kernel[1] * window.dilations[0] - window.pads[0];
      const int64_t w = j * window.strides[1] + tap % window.kernel[1] * window.dilations[1] - window.pads[1];
      if (h < 0 || h >= x_shape[2] || w < 0 || w >= x_shape[3]) continue;
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t c = columns[t] / taps * 4 + k;
        if (c >= inputs) continue;  // the weight multiplies what fills up its quad
        const int32_t input = x[((n * x_shape[1] + group * inputs + c) * x_shape[2] + h) * x_shape[3] + w];
        sum += values[(t * block + lane) * 4 + k] * (input - static_cast<int32_t>(blocks.x_zero_point));
      }
    }
    return sum;
  }

  Random random;
  bool gemm, depthwise;
  int64_t x_shape[4], y_shape[4], block, rows_per_group, count;
  SlrcWindow window;
  SlrcInt8Blocks blocks;
  std::unique_ptr<int8_t[]> values;
  std::unique_ptr<int32_t[]> columns, pointers, bias;
  std::unique_ptr<float[]> scale, y_float;
  std::unique_ptr<uint8_t[]> x, residual, y;
};

// Whether a pool of bytes gives the maxima.
bool BytePoolAgrees(uint64_t seed) {
  Random random;
  random.engine.seed(seed);
  SlrcWindow window = {{}, {}, {}, {1, 1}, 1};
  int64_t shape[4] = {random.Int(1, 2), random.Int(1, 3)}, out[2];
  for (int a = 0; a < 2; ++a) {
    window.kernel[a] = random.Int(1, 5);
    window.strides[a] = random.Int(1, 4);
    window.pads[a] = random.Int(0, window.kernel[a] - 1);
    window.pads[a + 2] = random.Int(0, window.kernel[a] - 1);
    const int64_t least = std::max<int64_t>(1, window.kernel[a] - window.pads[a] - window.pads[a + 2]);
    shape[2 + a] = random.Int(least, least + (random.Chance(30) ? 150 : 5));
    out[a] = (shape[2 + a] + window.pads[a] + window.pads[a + 2] - window.kernel[a]) / window.strides[a] + 1;
  }
  const int64_t planes = shape[0] * shape[1], pixels = shape[2] * shape[3];
  std::unique_ptr<uint8_t[]> x(new uint8_t[planes * pixels]), y(new uint8_t[planes * out[0] * out[1]]);
  std::generate_n(x.get(), planes * pixels, [&] { return static_cast<uint8_t>(random.Int(0, 255)); });
  char error[256] = "";
  if (slrc_max_pool_bytes(&window, x.get(), shape, y.get(), error, sizeof error)) return printf("%s\n", error), false;
  for (int64_t p = 0, at = 0; p < planes; ++p)
    for (int64_t i = 0; i < out[0]; ++i)
      for (int64_t j = 0; j < out[1]; ++j, ++at) {
        uint8_t most = 0;
        for (int64_t tap = 0; tap < window.kernel[0] * window.kernel[1]; ++tap) {
          const int64_t h = i * window.strides[0] - window.pads[0] + tap / window.kernel[1];
          const int64_t w = j * window.strides[1] - window.pads[1] + tap % window.kernel[1];
          const bool inside = h >= 0 && h < shape[2] && w >= 0 && w < shape[3];
          if (inside) most = std::max(most, x[p * pixels + h * shape[3] + w]);
        }
        if (y[at] != most) return false;
      }
  return true;
}

// Whether a sound layer gives the exact bits; runs a broken one too, and a pool.
bool Int8Agrees(uint64_t seed, long* refused) {
  if (!BytePoolAgrees(seed)) return false;
  char error[256] = "";
  Int8Case sound(seed);
  if (sound.Run(error, sizeof error)) return printf("%s\n", error), false;
  Int8Case broken(seed);
  broken.Break();
  *refused += broken.Run(error, sizeof error);
  return sound.Agrees();
}

}  // namespace
