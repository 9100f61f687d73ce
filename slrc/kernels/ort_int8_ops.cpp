// The ONNX Runtime operators `ai.slrc::BlockSparseQConv` and `ai.slrc::BlockSparseQGemm`, with `_leakyrelu`, `_residual`
// and `_float` after their names where they have that activation, a residual, and where y is float32, not uint8.
//
// Inputs: x, values, columns, row_pointers, bias, scale, and the residual. All but x and the residual must be constant.
// Attributes: block, weight_shape and x_zero_point (integers); y_zero_point (an integer) where y is uint8; residual_scale
// (a float) and residual_zero_point (an integer) where there is one; slope (a float) of the activation; of the
// convolution also strides, pads, dilations (lists) and group. SlrcInt8Blocks says what they mean.
// `ai.slrc::MaxPoolBytes`: x (uint8) and, as lists, kernel_shape, strides and pads.
#include "byte_pool.h"
#include "int8.h"
#include "ort_node.h"

namespace slrc {
namespace {

enum Input { kX, kValues, kColumns, kRowPointers, kBias, kScale, kResidual };
constexpr OrtElement kTypes[] = {kOrtUint8, kOrtInt8, kOrtInt32, kOrtInt32, kOrtInt32, kOrtFloat, kOrtUint8};

class Int8Node : public Node {
 public:
  Int8Node(const OrtKernelInfo* info, size_t weight_rank, bool leaky, bool residual, bool is_float) : Node(info) {
    static const char* const kNames[] = {"values", "columns", "row_pointers", "bias", "scale"};
    Tensor tensors[kResidual];
    for (size_t i = kValues; i < kResidual; ++i) ReadInput(i, kNames[i - 1], &tensors[i]);
    Integers("weight_shape", weight_shape_, weight_rank);
    blocks_.values = tensors[kValues].As<int8_t>(kOrtInt8, "values");
    blocks_.value_count = tensors[kValues].count;
    blocks_.columns = tensors[kColumns].As<int32_t>(kOrtInt32, "columns");
    blocks_.column_count = tensors[kColumns].count;
    blocks_.row_pointers = tensors[kRowPointers].As<int32_t>(kOrtInt32, "row_pointers");
    blocks_.row_pointer_count = tensors[kRowPointers].count;
    blocks_.bias = tensors[kBias].As<int32_t>(kOrtInt32, "bias");
    blocks_.bias_count = tensors[kBias].count;
    blocks_.scale = tensors[kScale].As<float>(kOrtFloat, "scale");
    blocks_.scale_count = tensors[kScale].count;
    blocks_.block = Integer("block");
    blocks_.out_channels = weight_shape_[0];
    blocks_.x_zero_point = Integer("x_zero_point");
    blocks_.y_zero_point = is_float ? -1 : Integer("y_zero_point");
    if (!is_float && blocks_.y_zero_point < 0) throw Error("y_zero_point must not be negative");
    blocks_.slope = leaky ? Number("slope") : 1.0f;
    if (residual) {
      blocks_.residual_scale = Number("residual_scale");
      blocks_.residual_zero_point = Integer("residual_zero_point");
    }
  }

  const SlrcInt8Blocks& Blocks() const { return blocks_; }
  SlrcWindow Window() const { return Node::Window(weight_shape_ + 2); }

 private:
  SlrcInt8Blocks blocks_ = {};
  int64_t weight_shape_[4];
};

template <bool Leaky, bool Residual, bool Float>
struct Int8Kernel {
  static constexpr size_t kInputCount = Residual ? kResidual + 1 : kResidual, kOptional = 0;
  static constexpr int kOutputType = Float ? kOrtFloat : kOrtUint8;
  static int InputType(size_t i) { return kTypes[i]; }
  static const uint8_t* ResidualOf(const Call& call, const std::vector<int64_t>& y_shape) {
    return Residual ? call.Residual<uint8_t>(y_shape, kResidual, kOrtUint8) : nullptr;
  }
};

template <bool Leaky, bool Residual, bool Float>
struct Int8ConvKernel : Int8Kernel<Leaky, Residual, Float> {
  static constexpr const char* kName = "BlockSparseQConv";
  explicit Int8ConvKernel(const OrtKernelInfo* info) : Int8ConvKernel(Int8Node(info, 4, Leaky, Residual, Float)) {}
  explicit Int8ConvKernel(const Int8Node& node) : conv(node.Blocks(), node.Window()) {}

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    const std::vector<int64_t> y_shape = ConvShape(call, conv);
    const uint8_t* residual = this->ResidualOf(call, y_shape);
    void* y = call.Output(y_shape);
    const uint8_t* x = call.x.As<uint8_t>(kOrtUint8, "x");
    if (call.x.shape[0]) conv.Run(x, call.x.shape.data(), residual, y, call.Threads());
  }

  Int8Conv conv;
};

template <bool Leaky, bool Residual, bool Float>
struct Int8GemmKernel : Int8Kernel<Leaky, Residual, Float> {
  static constexpr const char* kName = "BlockSparseQGemm";
  explicit Int8GemmKernel(const OrtKernelInfo* info) : gemm(Int8Node(info, 2, Leaky, Residual, Float).Blocks()) {}

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    RunOnTokens(call, gemm.out_channels(), [&](int64_t rows, int64_t inputs, const std::vector<int64_t>& y_shape) {
      const uint8_t* residual = this->ResidualOf(call, y_shape);
      void* y = call.Output(y_shape);
      const uint8_t* x = call.x.As<uint8_t>(kOrtUint8, "x");
      if (rows) gemm.Run(x, rows, inputs, residual, y, call.Threads());
    });
  }

  Int8Gemm gemm;
};

// x (n, c, h, w) -> (n, c, h', w').
struct PoolKernel {
  static constexpr const char* kName = "MaxPoolBytes";
  static constexpr size_t kInputCount = 1, kOptional = 0;
  static constexpr int kOutputType = kOrtUint8;
  static int InputType(size_t) { return kOrtUint8; }
  explicit PoolKernel(const OrtKernelInfo* info) {
    const Node node(info);
    node.Integers("kernel_shape", window.kernel, 2);
    node.Integers("strides", window.strides, 2);
    node.Integers("pads", window.pads, 4);
    CheckPool(window);
  }
  void OutputShape(const int64_t x_shape[4], int64_t y_shape[4]) const {
    slrc::OutputShape(window, x_shape[1], x_shape, y_shape);
  }

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    uint8_t* y = static_cast<uint8_t*>(call.Output(ConvShape(call, *this)));
    MaxPoolBytes(call.x.As<uint8_t>(kOrtUint8, "x"), call.x.shape.data(), window, y, call.Threads());
  }

  SlrcWindow window = {{}, {}, {}, {1, 1}, 1};
};

template <template <bool, bool, bool> class Kernel, bool Leaky>
void AddNames(const std::string& name, std::deque<NamedOp>* ops) {
  ops->push_back({MakeOp<Kernel<Leaky, false, false>>(), name});
  ops->push_back({MakeOp<Kernel<Leaky, true, false>>(), name + "_residual"});
  ops->push_back({MakeOp<Kernel<Leaky, false, true>>(), name + "_float"});
  ops->push_back({MakeOp<Kernel<Leaky, true, true>>(), name + "_residual_float"});
}

template <template <bool, bool, bool> class Kernel>
void AddAllNames(std::deque<NamedOp>* ops) {
  const std::string name = Kernel<false, false, false>::kName;
  AddNames<Kernel, false>(name, ops);
  AddNames<Kernel, true>(name + "_leakyrelu", ops);
}

}  // namespace

void AddInt8Ops(std::deque<NamedOp>* ops) {
  AddAllNames<Int8ConvKernel>(ops);
  AddAllNames<Int8GemmKernel>(ops);
  ops->push_back({MakeOp<PoolKernel>(), PoolKernel::kName});
}

}  // namespace slrc
