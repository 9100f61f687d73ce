// What the operators of ONNX Runtime share: tensors, what a node says when its kernel is made and gets when it runs, and
// the operator's table of functions.
#pragma once

#include <string.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <new>

#include "conv.h"
#include "ort_abi.h"

namespace slrc {

// Set by RegisterCustomOps before any kernel exists.
extern const Ort* ort;

inline void Check(OrtStatus* status, const char* attribute = nullptr) {
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

inline Tensor View(const OrtValue* value) {
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

// What a node says when its kernel is made. The names of its inputs and attributes begin with `prefix`.
class Node {
 public:
  explicit Node(const OrtKernelInfo* info, const char* prefix = "") : info_(info), prefix_(prefix) {}

  // `kernel` is that of the weight.
  SlrcWindow Window(const int64_t kernel[2]) const {
    SlrcWindow window;
    std::copy_n(kernel, 2, window.kernel);
    Integers("strides", window.strides, 2);
    Integers("pads", window.pads, 4);
    Integers("dilations", window.dilations, 2);
    window.group = Integer("group");
    return window;
  }

  size_t InputCount() const {
    size_t inputs;
    Check(ort->KernelInfo_GetInputCount(info_, &inputs));
    return inputs;
  }

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

  float Number(const char* name) const {
    float value;
    Check(ort->KernelInfoGetAttribute_float(info_, name, &value), name);
    return value;
  }

  std::string Text(const char* name) const {
    size_t size = 0;
    Check(ort->KernelInfoGetAttribute_string(info_, name, nullptr, &size), name);
    std::string text(size, '\0');
    Check(ort->KernelInfoGetAttribute_string(info_, name, &text[0], &size), name);
    return text.c_str();  // up to the terminator, which `size` counts
  }

 private:
  const OrtKernelInfo* info_;
  std::string prefix_;
};

// What a node gets when it runs.
class Call {
 public:
  explicit Call(OrtKernelContext* context) : context_(context) {
    Check(ort->KernelContext_GetInputCount(context, &inputs_));
    x = View(Find(0));
  }
  bool Has(size_t index) const { return Find(index); }

  // Returns the residual, checked to be of y's shape, or null.
  template <class T>
  const T* Residual(const std::vector<int64_t>& y_shape, size_t index, OrtElement type) const {
    const OrtValue* value = Find(index);
    if (!value) return nullptr;
    const Tensor residual = View(value);
    if (residual.shape != y_shape) throw Error("residual must have the output's shape");
    return residual.As<T>(type, "residual");
  }

  void* Output(const std::vector<int64_t>& shape) const {
    OrtValue* value;
    void* data;
    Check(ort->KernelContext_GetOutput(context_, 0, shape.data(), shape.size(), &value));
    Check(ort->GetTensorMutableData(value, &data));
    return data;
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

// Checks that x has tokens (..., inputs), and calls run(rows, inputs, the shape of y) for them.
template <class Run>
void RunOnTokens(const Call& call, int64_t out_channels, const Run& run) {
  if (call.x.shape.empty()) throw Error("x must have at least 1 dimension");
  std::vector<int64_t> y_shape = call.x.shape;
  const int64_t inputs = y_shape.back();
  y_shape.back() = out_channels;
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < y_shape.size(); ++d) rows *= y_shape[d];
  run(rows, inputs, y_shape);
}

// Checks that x is a batch of images, and returns the shape of y.
template <class AnyConv>
std::vector<int64_t> ConvShape(const Call& call, const AnyConv& conv) {
  if (call.x.shape.size() != 4) throw Error("x must have 4 dimensions");
  std::vector<int64_t> y_shape(4);
  conv.OutputShape(call.x.shape.data(), y_shape.data());
  return y_shape;
}

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
    return Kernel::InputType(i);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int {
    return i < Kernel::kInputCount - Kernel::kOptional ? kOrtRequired : kOrtOptional;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return Kernel::kOutputType; };
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

// ort_int8_ops.cpp
void AddInt8Ops(std::deque<NamedOp>* ops);

}  // namespace slrc
