// The ONNX Runtime operators `ai.slrc::BlockSparseConv` and `ai.slrc::BlockSparseGemm`.
//
// Inputs: x, values, columns, row_pointers, bias (optional), residual (optional); packed as block_sparse.h says. All
// but x and residual must be constant. Attributes of both: block (an integer), weight_shape (the dense weight's),
// activation (text), slope (a float, of leakyrelu alone); of the convolution also strides, pads, dilations (lists) and
// group.
// Conv: x (n, c, h, w) -> (n, out channels, h', w'). Gemm: x (..., k) -> (..., out channels).
//
// `ai.slrc::BlockSparseMlp` is two of the latter, the second without an activation. Inputs: x, the first one's four,
// the second one's four, residual (optional); every bias is there. Attributes of the second: down_block,
// down_weight_shape.
//
// And, without attributes, `ai.slrc::MaxPool2x2`: x (n, c, h, w) -> (n, c, h / 2, w / 2), `UpsampleBilinear2x`, ->
// (n, c, 2 h, 2 w), `ChannelsFirst`: x (n, h, w, c) -> (n, c, h, w), and `ChannelsLast`, which undoes it;
// with the attribute blocksize (an integer), `DepthToSpace`: x (n, blocksize² c, h, w) -> (n, c, blocksize h,
// blocksize w), as ONNX's in the mode DCR.
// The int8 ones are in ort_int8_ops.cpp.
#include <stdlib.h>
#include <string.h>

#include "gemm.h"
#include "ort_node.h"
#include "planes.h"

namespace slrc {

const Ort* ort;

namespace {

enum Input { kX, kValues, kColumns, kRowPointers, kBias, kResidual, kInputs };
enum MlpInput { kDownValues = kResidual, kDownColumns, kDownRowPointers, kDownBias, kMlpResidual, kMlpInputs };

// What a node says of a packed weight.
class FloatNode : public Node {
 public:
  FloatNode(const OrtKernelInfo* info, size_t weight_rank) : FloatNode(info, weight_rank, kValues, "") {
    activation_ = Text("activation");
    if (activation_ == "leakyrelu") slope_ = Number("slope");
  }
  // The weight whose inputs begin with `first`, and whose attributes' names with `prefix`.
  FloatNode(const OrtKernelInfo* info, size_t weight_rank, size_t first, const char* prefix) : Node(info, prefix) {
    ReadInput(first, "values", &values_);
    ReadInput(first + 1, "columns", &columns_);
    ReadInput(first + 2, "row_pointers", &row_pointers_);
    if (InputCount() > first + 3) has_bias_ = ReadConstant(first + 3, &bias_);
    Integers("weight_shape", weight_shape_, weight_rank);
  }

  SlrcBlocks Blocks() const {
    SlrcBlocks blocks = {};
    blocks.values = values_.As<float>(kOrtFloat, "values");
    blocks.value_count = values_.count;
    blocks.columns = columns_.As<int32_t>(kOrtInt32, "columns");
    blocks.column_count = columns_.count;
    blocks.row_pointers = row_pointers_.As<int32_t>(kOrtInt32, "row_pointers");
    blocks.row_pointer_count = row_pointers_.count;
    if (has_bias_) {
      blocks.bias = bias_.As<float>(kOrtFloat, "bias");
      blocks.bias_count = bias_.count;
    }
    blocks.block = Integer("block");
    blocks.out_channels = weight_shape_[0];
    blocks.activation = activation_.c_str();
    blocks.slope = slope_;
    return blocks;
  }

  SlrcWindow Window() const { return Node::Window(weight_shape_ + 2); }

 private:
  Tensor values_, columns_, row_pointers_, bias_;
  bool has_bias_ = false;
  int64_t weight_shape_[4];
  std::string activation_ = "none";
  float slope_ = 0;
};

// What all float32 kernels have in common.
struct FloatKernel {
  static constexpr int kOutputType = kOrtFloat;
  static int InputType(size_t i) {
    const bool index = i == kColumns || i == kRowPointers || i == kDownColumns || i == kDownRowPointers;
    return index ? kOrtInt32 : kOrtFloat;
  }
};

// A bias that is there but not constant is no bias.
void CheckBias(const Call& call, const SlrcBlocks& blocks) {
  if (!blocks.bias && call.Has(kBias)) throw Error("bias must be a constant initializer");
}

struct ConvKernel : FloatKernel {
  static constexpr const char* kName = "BlockSparseConv";
  static constexpr size_t kInputCount = kInputs, kOptional = 2;
  explicit ConvKernel(const OrtKernelInfo* info) : ConvKernel(FloatNode(info, 4)) {}
  explicit ConvKernel(const FloatNode& node) : blocks(node.Blocks()), conv(blocks, node.Window()) {}

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    CheckBias(call, blocks);
    const std::vector<int64_t> y_shape = ConvShape(call, conv.conv());
    const float* residual = call.Residual<float>(y_shape, kResidual, kOrtFloat);
    float* y = static_cast<float*>(call.Output(y_shape));
    const float* x = call.x.As<float>(kOrtFloat, "x");
    if (call.x.shape[0]) conv.Run(x, call.x.shape.data(), residual, y, call.Threads());
  }

  SlrcBlocks blocks;  // only whether it has a bias is asked after the constructor
  FloatConv conv;
};

// Runs a matrix multiplication, or two.
template <class Product>
void RunProduct(const Call& call, const Product& product, size_t residual_index) {
  RunOnTokens(call, product.out_channels(), [&](int64_t rows, int64_t inputs, const std::vector<int64_t>& y_shape) {
    const float* residual = call.Residual<float>(y_shape, residual_index, kOrtFloat);
    float* y = static_cast<float*>(call.Output(y_shape));
    const float* x = call.x.As<float>(kOrtFloat, "x");
    if (rows) product.Run(x, rows, inputs, residual, y, call.Threads());
  });
}

struct GemmKernel : FloatKernel {
  static constexpr const char* kName = "BlockSparseGemm";
  static constexpr size_t kInputCount = kInputs, kOptional = 2;
  explicit GemmKernel(const OrtKernelInfo* info) : GemmKernel(FloatNode(info, 2)) {}
  explicit GemmKernel(const FloatNode& node) : blocks(node.Blocks()), gemm(blocks) {}

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    CheckBias(call, blocks);
    RunProduct(call, gemm, kResidual);
  }

  SlrcBlocks blocks;  // as above
  Gemm gemm;
};

struct MlpKernel : FloatKernel {
  static constexpr const char* kName = "BlockSparseMlp";
  static constexpr size_t kInputCount = kMlpInputs, kOptional = 1;
  explicit MlpKernel(const OrtKernelInfo* info) : MlpKernel(FloatNode(info, 2), FloatNode(info, 2, kDownValues, "down_")) {}
  MlpKernel(const FloatNode& up, const FloatNode& down) : mlp(WithBias(up), WithBias(down)) {}

  void Compute(OrtKernelContext* context) const {
    RunProduct(Call(context), mlp, kMlpResidual);
  }
  static SlrcBlocks WithBias(const FloatNode& node) {
    const SlrcBlocks blocks = node.Blocks();
    if (!blocks.bias) throw Error("bias and down_bias must be constant initializers");
    return blocks;
  }

  Mlp mlp;
};

// What goes over planes; `Shape` says that of y.
template <class Own>
struct PlaneKernel : FloatKernel {
  static constexpr size_t kInputCount = 1, kOptional = 0;
  explicit PlaneKernel(const OrtKernelInfo*) {}

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    if (call.x.shape.size() != 4) throw Error("x must have 4 dimensions");
    float* y = static_cast<float*>(call.Output(Own::Shape(call.x.shape)));
    Own::Run(call.x.As<float>(kOrtFloat, "x"), call.x.shape.data(), y, call.Threads());
  }
};

// The shape of what has `up` / `down` times as many rows and columns.
std::vector<int64_t> Resized(std::vector<int64_t> shape, int64_t up, int64_t down) {
  for (int axis = 2; axis < 4; ++axis) {
    const std::string least = std::to_string(down);
    if (shape[axis] < down) throw Error("x must have at least " + least + " rows and " + least + " columns");
    shape[axis] = up * shape[axis] / down;
  }
  return shape;
}

struct PoolKernel : PlaneKernel<PoolKernel> {
  static constexpr const char* kName = "MaxPool2x2";
  static constexpr auto Run = MaxPool2x2;
  static std::vector<int64_t> Shape(const std::vector<int64_t>& x) { return Resized(x, 1, 2); }
  using PlaneKernel::PlaneKernel;
};

struct UpsampleKernel : PlaneKernel<UpsampleKernel> {
  static constexpr const char* kName = "UpsampleBilinear2x";
  static constexpr auto Run = UpsampleBilinear2x;
  static std::vector<int64_t> Shape(const std::vector<int64_t>& x) { return Resized(x, 2, 1); }
  using PlaneKernel::PlaneKernel;
};

struct FirstKernel : PlaneKernel<FirstKernel> {
  static constexpr const char* kName = "ChannelsFirst";
  static constexpr auto Run = ChannelsFirst;
  static std::vector<int64_t> Shape(const std::vector<int64_t>& x) { return {x[0], x[3], x[1], x[2]}; }
  using PlaneKernel::PlaneKernel;
};

struct LastKernel : PlaneKernel<LastKernel> {
  static constexpr const char* kName = "ChannelsLast";
  static constexpr auto Run = ChannelsLast;
  static std::vector<int64_t> Shape(const std::vector<int64_t>& x) { return {x[0], x[2], x[3], x[1]}; }
  using PlaneKernel::PlaneKernel;
};

struct ShuffleKernel : FloatKernel {
  static constexpr const char* kName = "DepthToSpace";
  static constexpr size_t kInputCount = 1, kOptional = 0;
  static constexpr int64_t kMostBlock = 256;
  explicit ShuffleKernel(const OrtKernelInfo* info) : block_(Node(info).Integer("blocksize")) {
    if (block_ < 1 || block_ > kMostBlock) throw Error("blocksize must be 1 to " + std::to_string(kMostBlock));
  }

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    const std::vector<int64_t>& x = call.x.shape;
    if (x.size() != 4) throw Error("x must have 4 dimensions");
    if (x[1] % (block_ * block_)) throw Error("x must have a multiple of blocksize² channels");
    float* y = static_cast<float*>(call.Output({x[0], x[1] / (block_ * block_), x[2] * block_, x[3] * block_}));
    DepthToSpace(call.x.As<float>(kOrtFloat, "x"), x.data(), block_, y, call.Threads());
  }

 private:
  int64_t block_;
};

// An operator has a name for each of the functions that mean the same: the activation, with or without a residual.
template <class Kernel>
void AddNames(std::deque<NamedOp>* ops) {
  ops->push_back({MakeOp<Kernel>(), Kernel::kName});
  for (const char* const* activation = kActivationNames; *activation; ++activation)
    for (const char* residual : {"", "_residual"})
      ops->push_back({MakeOp<Kernel>(), std::string(Kernel::kName) + "_" + *activation + residual});
}

OrtCustomOpDomain* MakeDomain() {
  static std::deque<NamedOp> ops;  // sessions keep pointers to them
  AddNames<ConvKernel>(&ops);
  AddNames<GemmKernel>(&ops);
  AddNames<MlpKernel>(&ops);
  ops.push_back({MakeOp<PoolKernel>(), PoolKernel::kName});
  ops.push_back({MakeOp<UpsampleKernel>(), UpsampleKernel::kName});
  ops.push_back({MakeOp<FirstKernel>(), FirstKernel::kName});
  ops.push_back({MakeOp<LastKernel>(), LastKernel::kName});
  ops.push_back({MakeOp<ShuffleKernel>(), ShuffleKernel::kName});
  AddInt8Ops(&ops);
  OrtCustomOpDomain* domain;
  Check(ort->CreateCustomOpDomain("ai.slrc", &domain));
  for (const NamedOp& op : ops) Check(ort->CustomOpDomain_Add(domain, &op.op));
  return domain;
}

}  // namespace
}  // namespace slrc

extern "C" SLRC_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace slrc;
  const char* version = base->GetVersionString();
  const char* dot = strchr(version, '.');
  const bool old = atoi(version) == 1 && dot && atoi(dot + 1) < static_cast<int>(kOrtVersion);
  const OrtApi* api = old ? nullptr : base->GetApi(kOrtVersion);
  if (!api) {
    const std::string message =
        "the kernels of ai.slrc need ONNX Runtime 1." + std::to_string(kOrtVersion) + " or newer, this is " + version;
    return OldestCreateStatus(base->GetApi(1))(kOrtFail, message.c_str());
  }
  static const Ort entries(api);
  ort = &entries;
  return Guarded("ai.slrc", [&] {
    Loops();                                                // an instruction set that cannot be had is said now
    static OrtCustomOpDomain* const domain = MakeDomain();  // sessions keep a pointer to it: it stays
    Check(ort->AddCustomOpDomain(options, domain));
  });
}
