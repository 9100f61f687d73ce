// Random layers, sound and broken, through the C entry points: a sound one must equal the plain sums below, a broken
// one must be refused or do no harm. Every array is allocated to its exact size, for the address sanitizer to guard.
//
//   fuzz FIRST COUNT    runs the cases FIRST ... FIRST + COUNT - 1; prints the worst difference
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "block_sparse.h"
#include "tile.h"

namespace {

struct Random {
  std::mt19937_64 engine;
  int64_t Int(int64_t low, int64_t high) { return low + static_cast<int64_t>(engine() % (high - low + 1)); }
  bool Chance(int percent) { return Int(1, 100) <= percent; }
  float Float() { return static_cast<float>(Int(-1000, 1000)) / 500.0f; }
  int64_t Odd() {  // a value that code may not expect
    const int64_t odd[] = {0, -1, 1, 3, 1 << 15, (1 << 15) + 1, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN};
    return odd[Int(0, 9)];
  }
  std::unique_ptr<float[]> Floats(int64_t count) {
    std::unique_ptr<float[]> made(new float[count]);
    std::generate_n(made.get(), count, [&] { return Float(); });
    return made;
  }
};

constexpr float kSlope = 0.1f;

}  // namespace

#include "fuzz_int8.h"

namespace {

double Activate(double v, int64_t activation) {
  switch (activation) {
    case slrc::kRelu:
      return std::max(v, 0.0);
    case slrc::kLeakyRelu:
      return v < 0 ? v * kSlope : v;
    case slrc::kRelu6:
      return std::min(std::max(v, 0.0), 6.0);
    case slrc::kSilu:
      return v / (1 + std::exp(-v));
    case slrc::kGelu:
      return v * 0.5 * (1 + std::erf(v / std::sqrt(2.0)));
    case slrc::kHardSwish:
      return v * std::min(std::max(v / 6 + 0.5, 0.0), 1.0);
    default:
      return v;
  }
}

struct Packed {
  Packed(Random& random, int64_t block_size, int64_t block_rows, int64_t width) : block(block_size) {
    const int percent = static_cast<int>(random.Int(0, 3)) * 34;
    const bool sorted = random.Chance(85);  // the packer's are
    std::vector<int32_t> found;
    pointers.reset(new int32_t[block_rows + 1]);
    pointers[0] = 0;
    for (int64_t r = 0; r < block_rows; ++r) {
      for (int64_t c = 0; c < width; ++c)
        if (random.Chance(percent)) found.push_back(static_cast<int32_t>(c));
      if (!sorted) std::shuffle(found.begin() + pointers[r], found.end(), random.engine);
      pointers[r + 1] = static_cast<int32_t>(found.size());
    }
    count = static_cast<int64_t>(found.size());
    columns.reset(new int32_t[count]);
    std::copy(found.begin(), found.end(), columns.get());
    values = random.Floats(count * block);
  }

  int64_t block, count;
  std::unique_ptr<int32_t[]> columns, pointers;
  std::unique_ptr<float[]> values;
};

struct Case {
  explicit Case(uint64_t seed) {
    random.engine.seed(seed);
    gemm = random.Chance(25);
    const bool pointwise = gemm || random.Chance(30);  // read in place: drawn apart, chance alone would hardly make one
    const bool depthwise = !gemm && random.Chance(25);
    const bool keeps_size = !pointwise && random.Chance(40);  // read in place, too
    window.group = gemm ? 1 : depthwise ? random.Int(1, 40) : random.Int(1, 3);
    for (int a = 0; a < 2; ++a) {
      window.kernel[a] = pointwise ? 1 : random.Int(1, 5);
      window.strides[a] = pointwise ? 1 : random.Int(1, 3);
      window.dilations[a] = pointwise ? 1 : random.Int(1, 3);
      window.pads[a] = pointwise ? 0 : random.Int(0, 3);
      window.pads[a + 2] = pointwise ? 0 : random.Int(0, 3);
      const int64_t span = (window.kernel[a] - 1) * window.dilations[a] + 1;
      if (keeps_size) {
        window.strides[a] = 1;
        window.pads[a] = random.Chance(70) ? span / 2 : random.Int(0, span - 1);
        window.pads[a + 2] = span - 1 - window.pads[a];
      }
      const int64_t least = std::max<int64_t>(1, span - window.pads[a] - window.pads[a + 2]);
      x_shape[2 + a] = gemm ? 1 : random.Int(least, least + (random.Chance(30) ? 30 : 5));
      y_shape[2 + a] = (x_shape[2 + a] + window.pads[a] + window.pads[a + 2] - span) / window.strides[a] + 1;
    }
    x_shape[0] = y_shape[0] = gemm ? random.Int(1, random.Chance(30) ? 150 : 5) : random.Int(1, 2);
    x_shape[1] = random.Chance(8) ? random.Int(100, 260) : random.Int(1, 9);  // many are cut or copied
    if (depthwise) x_shape[1] = random.Int(1, random.Chance(30) ? 3 : 1);
    x_shape[1] *= window.group;
    y_shape[1] = window.group * random.Int(1, depthwise ? 3 : 40);
    const int64_t kBlocks[] = {1, 4, 8, 16};
    block = kBlocks[depthwise && random.Chance(80) ? 0 : random.Int(0, 3)];
    width = x_shape[1] / window.group * window.kernel[0] * window.kernel[1];
    rows_per_group = (y_shape[1] / window.group + block - 1) / block;
    packed.reset(new Packed(random, block, rows_per_group * window.group, width));
    x = random.Floats(Size(x_shape));
    if (random.Chance(50)) bias = random.Floats(y_shape[1]);
    if (random.Chance(40)) residual = random.Floats(Size(y_shape));
    activation = random.Int(0, slrc::kActivations - 1);
    y.reset(new float[Size(y_shape)]);
    blocks = {packed->values.get(), packed->count * block,   packed->columns.get(),
              packed->count,        packed->pointers.get(),  rows_per_group * window.group + 1,
              bias.get(),           bias ? y_shape[1] : 0,   block,
              y_shape[1],           slrc_activation(activation), kSlope};
  }

  static int64_t Size(const int64_t shape[4]) { return shape[0] * shape[1] * shape[2] * shape[3]; }

  // Changes one thing, or some; never a count to more than there is, which no caller of a C function may do.
  void Break() {
    int64_t* const fields[] = {&blocks.block,     &blocks.out_channels, &window.group,       window.kernel,
                               window.kernel + 1, window.strides,       window.strides + 1,  window.pads,
                               window.pads + 3,   window.dilations,     window.dilations + 1};
    for (int64_t left = random.Int(1, 2); left > 0; --left) switch (random.Int(0, 4)) {
        case 0:  // (the size of a matrix's y follows from out_channels, so that one stays)
          *fields[gemm ? 0 : random.Int(0, 10)] = random.Chance(70) ? random.Odd() : random.Int(-2, 20);
          break;
        case 1:
          if (packed->count) packed->columns[random.Int(0, packed->count - 1)] = static_cast<int32_t>(random.Odd());
          break;
        case 2:
          packed->pointers[random.Int(0, blocks.row_pointer_count - 1)] = static_cast<int32_t>(random.Odd());
          break;
        case 3: {
          int64_t* const counts[] = {&blocks.value_count, &blocks.column_count, &blocks.bias_count};
          int64_t& count = *counts[random.Int(0, 2)];
          count = random.Int(-1, count);
          break;
        }
        default:
          blocks.activation = slrc_activation(random.Int(0, slrc::kActivations));  // the last is null
          if (random.Chance(10)) blocks.activation = "what";
      }
  }

  int Run(char* error, size_t size) {
    return gemm ? slrc_block_sparse_gemm(&blocks, x.get(), x_shape[0], x_shape[1], residual.get(), y.get(), error, size)
                : slrc_block_sparse_conv(&blocks, &window, x.get(), x_shape, residual.get(), y.get(), y_shape, error,
                                         size);
  }

  std::string Describe() const {
    std::string text = gemm ? "matrix" : "convolution";
    const auto add = [&](const char* name, const int64_t* numbers, int count) {
      text += std::string(", ") + name;
      for (int i = 0; i < count; ++i) text += " " + std::to_string(numbers[i]);
    };
    add("x", x_shape, 4);
    add("y", y_shape, 4);
    add("kernel", window.kernel, 2);
    add("strides", window.strides, 2);
    add("pads", window.pads, 4);
    add("dilations", window.dilations, 2);
    add("group", &window.group, 1);
    add("block", &block, 1);
    add("blocks", &packed->count, 1);
    return text + ", " + blocks.activation + (residual ? ", residual" : "");
  }

  // The greatest difference from sums taken one by one, over a thousandth of what they sum if that is more than 1.
  double Difference() const {
    double worst = 0;
    int64_t at = 0;
    for (int64_t n = 0; n < y_shape[0]; ++n)
      for (int64_t m = 0; m < y_shape[1]; ++m)
        for (int64_t i = 0; i < y_shape[2]; ++i)
          for (int64_t j = 0; j < y_shape[3]; ++j, ++at) {
            double magnitude = 0;
            const double expected = Expected(n, m, i, j, at, &magnitude);
            const double difference = std::fabs(expected - y[at]) / std::max(1.0, magnitude / 1000);
            worst = difference <= worst ? worst : difference;  // a NaN counts as worse
          }
    return worst;
  }

  double Expected(int64_t n, int64_t m, int64_t i, int64_t j, int64_t at, double* magnitude) const {
    const int64_t per_group = y_shape[1] / window.group, group = m / per_group;
    const int64_t row = group * rows_per_group + m % per_group / block, lane = m % per_group % block;
    double sum = (bias ? bias[m] : 0.0) + (residual ? residual[at] : 0.0);
    for (int32_t t = packed->pointers[row]; t < packed->pointers[row + 1]; ++t) {
      const int64_t taps = window.kernel[0] * window.kernel[1], column = packed->columns[t], tap = column % taps;
      const int64_t h = i * window.strides[0] + tap / window.kernel[1] * window.dilations[0] - window.pads[0];
      const int64_t w = j * window.strides[1] + tap % window.kernel[1] * window.dilations[1] - window.pads[1];
      const int64_t c = group * (x_shape[1] / window.group) + column / taps;
      if (h < 0 || h >= x_shape[2] || w < 0 || w >= x_shape[3]) continue;
      const double term = static_cast<double>(packed->values[t * block + lane]) *
                          x[((n * x_shape[1] + c) * x_shape[2] + h) * x_shape[3] + w];
      sum += term;
      *magnitude += std::fabs(term);
    }
    return Activate(sum, activation);
  }

  Random random;
  bool gemm;
  int64_t x_shape[4], y_shape[4], block, width, rows_per_group, activation;
  SlrcWindow window;
  SlrcBlocks blocks;
  std::unique_ptr<Packed> packed;
  std::unique_ptr<float[]> x, bias, residual, y;
};

}  // namespace

// Whether the pool of a random image equals the plain maxima.
bool PoolAgrees(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  const int64_t shape[4] = {random.Int(1, 2), random.Int(1, 3), random.Int(2, 60), random.Int(2, 80)};
  const int64_t rows = shape[2] / 2, columns = shape[3] / 2;
  const auto x = random.Floats(Case::Size(shape));
  const std::unique_ptr<float[]> y(new float[shape[0] * shape[1] * rows * columns]);
  slrc_max_pool_2x2(x.get(), shape, y.get());
  for (int64_t c = 0; c < shape[0] * shape[1]; ++c)
    for (int64_t h = 0; h < rows; ++h)
      for (int64_t w = 0; w < columns; ++w) {
        const float* window = x.get() + (c * shape[2] + 2 * h) * shape[3] + 2 * w;
        const float most = std::max({window[0], window[1], window[shape[3]], window[shape[3] + 1]});
        if (y[(c * rows + h) * columns + w] != most) return false;
      }
  return true;
}

// Whether random pixels of channels become planes, and pixels again.
bool LayoutsAgree(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  const int64_t shape[4] = {random.Int(1, 2), random.Int(1, 30), random.Int(1, 30), random.Int(1, 150)};
  const int64_t pixels = shape[1] * shape[2], channels = shape[3], back[4] = {shape[0], channels, shape[1], shape[2]};
  const auto x = random.Floats(Case::Size(shape));
  const std::unique_ptr<float[]> planes(new float[Case::Size(shape)]), again(new float[Case::Size(shape)]);
  slrc_channels_first(x.get(), shape, planes.get());
  slrc_channels_last(planes.get(), back, again.get());
  for (int64_t n = 0; n < shape[0]; ++n)
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; ++c)
        if (planes[(n * channels + c) * pixels + p] != x[(n * pixels + p) * channels + c]) return false;
  return std::equal(x.get(), x.get() + Case::Size(shape), again.get());
}

// Whether the phases of a random image stand between each other.
bool ShufflesAgree(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  const int64_t block = random.Int(1, 5), channels = random.Int(1, 4);
  const int64_t shape[4] = {random.Int(1, 2), block * block * channels, random.Int(1, 9), random.Int(1, 40)};
  const auto x = random.Floats(Case::Size(shape));
  const std::unique_ptr<float[]> y(new float[Case::Size(shape)]);
  slrc_depth_to_space(x.get(), shape, block, y.get());
  const int64_t rows = shape[2] * block, columns = shape[3] * block;
  for (int64_t n = 0; n < shape[0]; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t h = 0; h < rows; ++h)
        for (int64_t w = 0; w < columns; ++w) {
          const int64_t channel = (h % block * block + w % block) * channels + c;
          const float expected = x[((n * shape[1] + channel) * shape[2] + h / block) * shape[3] + w / block];
          if (y[((n * channels + c) * rows + h) * columns + w] != expected) return false;
        }
  return true;
}

// Whether a random image at twice the size has what lies between four pixels, one of them nearest.
bool UpsamplingAgrees(uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  const int64_t shape[4] = {random.Int(1, 2), random.Int(1, 3), random.Int(1, 40), random.Int(1, 60)};
  const auto x = random.Floats(Case::Size(shape));
  const std::unique_ptr<float[]> y(new float[4 * Case::Size(shape)]);
  slrc_upsample_bilinear_2x(x.get(), shape, y.get());
  auto other = [](int64_t o, int64_t size) {
    return std::clamp(o / 2 + (o % 2 ? 1 : -1), int64_t{0}, size - 1);
  };
  for (int64_t c = 0; c < shape[0] * shape[1]; ++c)
    for (int64_t h = 0; h < 2 * shape[2]; ++h)
      for (int64_t w = 0; w < 2 * shape[3]; ++w) {
        auto at = [&](int64_t row, int64_t column) { return double(x[(c * shape[2] + row) * shape[3] + column]); };
        const int64_t row = other(h, shape[2]), column = other(w, shape[3]);
        const double near = 0.75 * at(h / 2, w / 2) + 0.25 * at(row, w / 2);
        const double far = 0.75 * at(h / 2, column) + 0.25 * at(row, column);
        if (!(std::abs(y[(2 * c * shape[2] + h) * 2 * shape[3] + w] - (0.75 * near + 0.25 * far)) < 1e-5)) return false;
      }
  return true;
}

// Two matrix multiplications at once, sound or broken in one place of the second.
bool MlpAgrees(uint64_t seed, bool broken, long* refused) {
  Random random{std::mt19937_64(seed)};
  const int64_t tokens = random.Int(1, random.Chance(30) ? 250 : 6), inputs = random.Int(1, 60);
  const int64_t hidden = random.Chance(10) ? random.Int(500, 1400) : random.Int(1, 90), outputs = random.Int(1, 60);
  const int64_t kBlocks[] = {1, 4, 8, 16};
  const int64_t sizes[] = {inputs, hidden, outputs}, activation = random.Int(0, slrc::kActivations - 1);
  std::unique_ptr<Packed> packed[2];
  std::unique_ptr<float[]> bias[2], residual;
  SlrcBlocks blocks[2];
  for (int k = 0; k < 2; ++k) {
    const int64_t block = kBlocks[random.Int(0, 3)], rows = (sizes[k + 1] + block - 1) / block;
    packed[k].reset(new Packed(random, block, rows, sizes[k]));
    if (random.Chance(70)) bias[k] = random.Floats(sizes[k + 1]);
    const char* const name = slrc_activation(k ? slrc::kNone : activation);
    const int64_t bias_count = bias[k] ? sizes[k + 1] : 0;
    blocks[k] = {packed[k]->values.get(), packed[k]->count * block, packed[k]->columns.get(), packed[k]->count,
                 packed[k]->pointers.get(), rows + 1, bias[k].get(), bias_count, block, sizes[k + 1], name, kSlope};
  }
  const auto x = random.Floats(tokens * inputs);
  if (random.Chance(40)) residual = random.Floats(tokens * outputs);
  const std::unique_ptr<float[]> between(new float[tokens * hidden]), expected(new float[tokens * outputs]),
      y(new float[tokens * outputs]);
  char error[256];
  if (broken) {
    if (packed[1]->count && random.Chance(50))
      packed[1]->columns[random.Int(0, packed[1]->count - 1)] = static_cast<int32_t>(random.Odd());
    else
      blocks[random.Int(0, 1)].block = random.Odd();
    *refused += slrc_block_sparse_mlp(blocks, blocks + 1, x.get(), tokens, inputs, residual.get(), y.get(), error, 256);
    return true;
  }
  if (slrc_block_sparse_mlp(blocks, blocks + 1, x.get(), tokens, inputs, residual.get(), y.get(), error, 256) ||
      slrc_block_sparse_gemm(blocks, x.get(), tokens, inputs, nullptr, between.get(), error, 256) ||
      slrc_block_sparse_gemm(blocks + 1, between.get(), tokens, hidden, residual.get(), expected.get(), error, 256))
    return false;
  for (int64_t i = 0; i < tokens * outputs; ++i)
    if (!(std::fabs(y[i] - expected[i]) < 1e-5 * (100 + hidden) * (1 + std::fabs(expected[i])))) return false;
  return true;
}

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? strtoull(argv[1], nullptr, 10) : 0,
                 count = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1000;
  double worst = 0;
  long refused = 0;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    char error[256] = "";
    Case sound(seed);
    if (sound.Run(error, sizeof error)) return printf("case %llu refused: %s\n", (unsigned long long)seed, error), 1;
    const double difference = sound.Difference();
    if (!(difference < 1e-3)) {
      printf("case %llu differs by %g: %s\n", (unsigned long long)seed, difference, sound.Describe().c_str());
      return 1;
    }
    worst = std::max(worst, difference);
    if (!PoolAgrees(seed)) return printf("pool %llu differs\n", (unsigned long long)seed), 1;
    if (!ShufflesAgree(seed)) return printf("shuffle %llu differs\n", (unsigned long long)seed), 1;
    if (!LayoutsAgree(seed)) return printf("layout %llu differs\n", (unsigned long long)seed), 1;
    if (!UpsamplingAgrees(seed)) return printf("upsampling %llu differs\n", (unsigned long long)seed), 1;
    for (bool broken : {false, true})
      if (!MlpAgrees(seed, broken, &refused)) return printf("mlp %llu differs\n", (unsigned long long)seed), 1;
    if (!Int8Agrees(seed, &refused)) return printf("int8 %llu differs\n", (unsigned long long)seed), 1;
    Case broken(seed);
    broken.Break();
    refused += broken.Run(error, sizeof error);
  }
  printf("%s: worst difference %g, %ld of %llu broken cases refused\n", slrc_int8_instruction_set(), worst, refused,
         (unsigned long long)(3 * count));
  return 0;
}
