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
// And `ai.slrc::MaxPool2x2`, without attributes: x (n, c, h, w) -> (n, c, h / 2, w / 2).
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <new>

#include "conv.h"
#include "gemm.h"
#include "ort_abi.h"
#include "pool.h"

namespace slrc {
namespace {

enum Input { kX, kValues, kColumns, kRowPointers, kBias, kResidual, kInputs };
enum MlpInput { kDownValues = kResidual, kDownColumns, kDownRowPointers, kDownBias, kMlpResidual, kMlpInputs };

// Set by RegisterCustomOps before any kernel exists.
const Ort* ort;

void Check(OrtStatus* status, const char* attribute = nullptr) {
  if (!status) return;
  std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  if (attribute) message = std::string("attribute `") + attribute + "`: " + message;
  throw Error(message);
}

// Turns what `body` throws into a status: no exception may reach the runtime.
template <class Body>
OrtStatus* Guarded(const char* op, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Error& e) {
    return ort->CreateStatus(kOrtInvalidArgument, (std::string(op) + ": " + e.what()).c_str());
  } catch (const std::bad_alloc&) {
    return ort->CreateStatus(kOrtFail, "ai.slrc: out of memory");
  } catch (...) {
    return ort->CreateStatus(kOrtFail, "ai.slrc: unexpected error");
  }
}

struct Tensor {
  const void* data = nullptr;
  int type = 0;
  std::vector<int64_t> shape;
  int64_t count = 0;

  template <class T>
  const T* As(OrtElement expected, const char* name) const {
    if (type != expected) throw Error(std::string(name) + " has the wrong element type");
    return static_cast<const T*>(data);
  }
};

Tensor View(const OrtValue* value) {
  Tensor tensor;
  OrtShapeInfo* info;
  Check(ort->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtShapeInfo, void (*)(OrtShapeInfo*)> owner(info, ort->ReleaseTensorTypeAndShapeInfo);
  size_t rank;
  Check(ort->GetTensorElementType(info, &tensor.type));
  Check(ort->GetDimensionsCount(info, &rank));
  tensor.shape.resize(rank);
  Check(ort->GetDimensions(info, tensor.shape.data(), rank));
  tensor.count = 1;
  for (int64_t dim : tensor.shape) tensor.count *= dim;
  void* data;
  Check(ort->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

// What a node says of a packed weight when its kernel is made.
class Node {
 public:
  Node(const OrtKernelInfo* info, size_t weight_rank) : Node(info, weight_rank, kValues, "") {
    activation_ = Text("activation");
    if (activation_ == "leakyrelu") Check(ort->KernelInfoGetAttribute_float(info, "slope", &slope_), "slope");
  }
  // The weight whose inputs begin with `first`, and whose attributes' names with `prefix`.
  Node(const OrtKernelInfo* info, size_t weight_rank, size_t first, const char* prefix) : info_(info), prefix_(prefix) {
    ReadInput(first, "values", &values_);
    ReadInput(first + 1, "columns", &columns_);
    ReadInput(first + 2, "row_pointers", &row_pointers_);
    size_t inputs;
    Check(ort->KernelInfo_GetInputCount(info, &inputs));
    if (inputs > first + 3) has_bias_ = ReadConstant(first + 3, &bias_);
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

  SlrcWindow Window() const {
    SlrcWindow window;
    std::copy_n(weight_shape_ + 2, 2, window.kernel);
    Integers("strides", window.strides, 2);
    Integers("pads", window.pads, 4);
    Integers("dilations", window.dilations, 2);
    window.group = Integer("group");
    return window;
  }

 private:
  bool ReadConstant(size_t index, Tensor* tensor) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    Check(ort->KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
    if (is_constant && value) *tensor = View(value);
    return is_constant && value;
  }

  void ReadInput(size_t index, const char* name, Tensor* tensor) const {
    if (!ReadConstant(index, tensor)) throw Error(prefix_ + name + " must be a constant initializer");
  }

  int64_t Integer(const char* of) const {
    const std::string named = prefix_ + of;
    const char* name = named.c_str();
    int64_t value;
    Check(ort->KernelInfoGetAttribute_int64(info_, name, &value), name);
    return value;
  }

  void Integers(const char* of, int64_t* values, size_t expected) const {
    const std::string named = prefix_ + of;
    const char* name = named.c_str();
    size_t count = 0;
    Check(ort->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &count), name);
    if (count != expected)
      throw Error(named + " must have " + std::to_string(expected) + " values, got " +
                  std::to_string(count));
    Check(ort->KernelInfoGetAttributeArray_int64(info_, name, values, &count), name);
  }

  std::string Text(const char* name) const {
    size_t size = 0;
    Check(ort->KernelInfoGetAttribute_string(info_, name, nullptr, &size), name);
    std::string text(size, '\0');
    Check(ort->KernelInfoGetAttribute_string(info_, name, &text[0], &size), name);
    return text.c_str();  // up to the terminator, which `size` counts
  }

  const OrtKernelInfo* info_;
  Tensor values_, columns_, row_pointers_, bias_;
  bool has_bias_ = false;
  int64_t weight_shape_[4];
  std::string prefix_, activation_ = "none";
  float slope_ = 0;
};

// What a node gets when it runs.
class Call {
 public:
  explicit Call(OrtKernelContext* context) : context_(context) {
    Check(ort->KernelContext_GetInputCount(context, &inputs_));
    x = View(Find(kX));
  }
  Call(OrtKernelContext* context, bool has_bias) : Call(context) {
    if (!has_bias && Find(kBias)) throw Error("bias must be a constant initializer");
  }

  // Returns the residual, checked to be of y's shape, or null.
  const float* Residual(const std::vector<int64_t>& y_shape, size_t index = kResidual) const {
    const OrtValue* value = Find(index);
    if (!value) return nullptr;
    const Tensor residual = View(value);
    if (residual.shape != y_shape) throw Error("residual must have the output's shape");
    return residual.As<float>(kOrtFloat, "residual");
  }

  float* Output(const std::vector<int64_t>& shape) const {
    OrtValue* value;
    void* data;
    Check(ort->KernelContext_GetOutput(context_, 0, shape.data(), shape.size(), &value));
    Check(ort->GetTensorMutableData(value, &data));
    return static_cast<float*>(data);
  }

  Parallel Threads() const {
    auto run = [](void* context, size_t count, void (*task)(void*, size_t), void* data) {
      Check(ort->KernelContext_ParallelFor(static_cast<OrtKernelContext*>(context), task, count, 0, data));
    };
    return {run, context_};
  }

  Tensor x;

 private:
  const OrtValue* Find(size_t index) const {
    const OrtValue* value = nullptr;
    if (index < inputs_) Check(ort->KernelContext_GetInput(context_, index, &value));
    return value;
  }

  OrtKernelContext* context_;
  size_t inputs_;
};

struct ConvKernel {
  static constexpr const char* kName = "BlockSparseConv";
  static constexpr size_t kInputCount = kInputs, kOptional = 2;
  explicit ConvKernel(const OrtKernelInfo* info) : ConvKernel(Node(info, 4)) {}
  explicit ConvKernel(const Node& node) : blocks(node.Blocks()), conv(blocks, node.Window()) {}

  void Compute(OrtKernelContext* context) const {
    const Call call(context, blocks.bias);
    if (call.x.shape.size() != 4) throw Error("x must have 4 dimensions");
    std::vector<int64_t> y_shape(4);
    conv.OutputShape(call.x.shape.data(), y_shape.data());
    const float* residual = call.Residual(y_shape);
    float* y = call.Output(y_shape);
    const float* x = call.x.As<float>(kOrtFloat, "x");
    if (call.x.shape[0]) conv.Run(x, call.x.shape.data(), residual, y, call.Threads());
  }

  SlrcBlocks blocks;  // only whether it has a bias is asked after the constructor
  Conv conv;
};

// Runs a matrix multiplication, or two, on x (..., inputs).
template <class Product>
void RunOnTokens(const Call& call, const Product& product, size_t residual_index) {
  if (call.x.shape.empty()) throw Error("x must have at least 1 dimension");
  std::vector<int64_t> y_shape = call.x.shape;
  const int64_t inputs = y_shape.back();
  y_shape.back() = product.out_channels();
  const float* residual = call.Residual(y_shape, residual_index);
  float* y = call.Output(y_shape);
  const float* x = call.x.As<float>(kOrtFloat, "x");
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < y_shape.size(); ++d) rows *= y_shape[d];
  if (rows) product.Run(x, rows, inputs, residual, y, call.Threads());
}

struct GemmKernel {
  static constexpr const char* kName = "BlockSparseGemm";
  static constexpr size_t kInputCount = kInputs, kOptional = 2;
  explicit GemmKernel(const OrtKernelInfo* info) : GemmKernel(Node(info, 2)) {}
  explicit GemmKernel(const Node& node) : blocks(node.Blocks()), gemm(blocks) {}

  void Compute(OrtKernelContext* context) const {
    RunOnTokens(Call(context, blocks.bias), gemm, kResidual);
  }

  SlrcBlocks blocks;  // as above
  Gemm gemm;
};

struct MlpKernel {
  static constexpr const char* kName = "BlockSparseMlp";
  static constexpr size_t kInputCount = kMlpInputs, kOptional = 1;
  explicit MlpKernel(const OrtKernelInfo* info) : MlpKernel(Node(info, 2), Node(info, 2, kDownValues, "down_")) {}
  MlpKernel(const Node& up, const Node& down) : mlp(WithBias(up), WithBias(down)) {}

  void Compute(OrtKernelContext* context) const {
    RunOnTokens(Call(context), mlp, kMlpResidual);
  }
  static SlrcBlocks WithBias(const Node& node) {
    const SlrcBlocks blocks = node.Blocks();
    if (!blocks.bias) throw Error("bias and down_bias must be constant initializers");
    return blocks;
  }

  Mlp mlp;
};

struct PoolKernel {
  static constexpr const char* kName = "MaxPool2x2";
  static constexpr size_t kInputCount = 1, kOptional = 0;
  explicit PoolKernel(const OrtKernelInfo*) {}

  void Compute(OrtKernelContext* context) const {
    const Call call(context);
    std::vector<int64_t> y_shape = call.x.shape;
    if (y_shape.size() != 4) throw Error("x must have 4 dimensions");
    for (int axis = 2; axis < 4; ++axis)
      if ((y_shape[axis] /= 2) < 1) throw Error("x must have at least 2 rows and 2 columns");
    float* y = call.Output(y_shape);
    MaxPool2x2(call.x.As<float>(kOrtFloat, "x"), call.x.shape.data(), y, call.Threads());
  }
};

struct NamedOp {
  OrtCustomOp op;
  std::string name;
};

template <class Kernel>
OrtCustomOp MakeOp() {
  OrtCustomOp op = {};
  op.version = kOrtVersion;
  op.GetName = [](const OrtCustomOp* self) { return reinterpret_cast<const NamedOp*>(self)->name.c_str(); };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::kInputCount; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) -> int {
    const bool index = i == kColumns || i == kRowPointers || i == kDownColumns || i == kDownRowPointers;
    return index ? kOrtInt32 : kOrtFloat;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int {
    return i < Kernel::kInputCount - Kernel::kOptional ? kOrtRequired : kOrtOptional;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return kOrtFloat; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kOrtRequired; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return Guarded(Kernel::kName, [&] { *kernel = new Kernel(info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return Guarded(Kernel::kName, [&] { static_cast<const Kernel*>(kernel)->Compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

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
