// The part of ONNX Runtime's C interface that the operators use, in our own words: its wheel carries no headers.
//
// The interface is a table of function pointers to which releases only ever append, so an entry keeps its place: the
// number below. Everything here is in the interface's version 17 (ONNX Runtime 1.17), the first with
// KernelContext_ParallelFor; a newer runtime hands out the same table.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct OrtApi;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtShapeInfo;
struct OrtShapeInferContext;
struct OrtCustomOp;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

namespace slrc {

constexpr uint32_t kOrtVersion = 17;

enum OrtCode { kOrtFail = 1, kOrtInvalidArgument = 2 };
enum OrtElement { kOrtFloat = 1, kOrtUint8 = 2, kOrtInt8 = 3, kOrtInt32 = 6 };
enum OrtPresence { kOrtRequired = 0, kOrtOptional = 1 };

#define SLRC_ORT_ENTRIES(ENTRY)                                                                                    \
  ENTRY(0, OrtStatus*, CreateStatus, (int code, const char* message))                                              \
  ENTRY(26, OrtStatus*, CreateCustomOpDomain, (const char* name, OrtCustomOpDomain** domain))                      \
  ENTRY(27, OrtStatus*, CustomOpDomain_Add, (OrtCustomOpDomain * domain, const OrtCustomOp* op))                   \
  ENTRY(28, OrtStatus*, AddCustomOpDomain, (OrtSessionOptions * options, OrtCustomOpDomain * domain))              \
  ENTRY(51, OrtStatus*, GetTensorMutableData, (OrtValue * value, void** data))                                     \
  ENTRY(60, OrtStatus*, GetTensorElementType, (const OrtShapeInfo* info, int* type))                               \
  ENTRY(61, OrtStatus*, GetDimensionsCount, (const OrtShapeInfo* info, size_t* count))                             \
  ENTRY(62, OrtStatus*, GetDimensions, (const OrtShapeInfo* info, int64_t* dims, size_t count))                    \
  ENTRY(65, OrtStatus*, GetTensorTypeAndShape, (const OrtValue* value, OrtShapeInfo** info))                       \
  ENTRY(85, OrtStatus*, KernelInfoGetAttribute_float, (const OrtKernelInfo* info, const char* name, float* out))   \
  ENTRY(86, OrtStatus*, KernelInfoGetAttribute_int64, (const OrtKernelInfo* info, const char* name, int64_t* out)) \
  ENTRY(87, OrtStatus*, KernelInfoGetAttribute_string,                                                             \
        (const OrtKernelInfo* info, const char* name, char* out, size_t* size))                                    \
  ENTRY(88, OrtStatus*, KernelContext_GetInputCount, (const OrtKernelContext* context, size_t* count))             \
  ENTRY(90, OrtStatus*, KernelContext_GetInput,                                                                    \
        (const OrtKernelContext* context, size_t index, const OrtValue** value))                                   \
  ENTRY(91, OrtStatus*, KernelContext_GetOutput,                                                                   \
        (OrtKernelContext * context, size_t index, const int64_t* dims, size_t count, OrtValue** value))           \
  ENTRY(93, void, ReleaseStatus, (OrtStatus * status))                                                             \
  ENTRY(99, void, ReleaseTensorTypeAndShapeInfo, (OrtShapeInfo * info))                                            \
  ENTRY(2, const char*, GetErrorMessage, (const OrtStatus* status))                                                \
  ENTRY(163, OrtStatus*, KernelInfoGetAttributeArray_int64,                                                        \
        (const OrtKernelInfo* info, const char* name, int64_t* out, size_t* size))                                 \
  ENTRY(230, OrtStatus*, KernelInfo_GetInputCount, (const OrtKernelInfo* info, size_t* count))                     \
  ENTRY(249, OrtStatus*, KernelInfoGetConstantInput_tensor,                                                        \
        (const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** value))                       \
  ENTRY(274, OrtStatus*, KernelContext_ParallelFor,                                                                \
        (const OrtKernelContext* context, void (*task)(void*, size_t), size_t count, size_t batches, void* data))

// The table's entries by name.
struct Ort {
#define SLRC_DECLARE(slot, result, name, arguments) result(*name) arguments;
  SLRC_ORT_ENTRIES(SLRC_DECLARE)
#undef SLRC_DECLARE

  explicit Ort(const OrtApi* api) {
    void* const* table = reinterpret_cast<void* const*>(api);
#define SLRC_LOAD(slot, result, name, arguments) name = reinterpret_cast<result(*) arguments>(table[slot]);
    SLRC_ORT_ENTRIES(SLRC_LOAD)
#undef SLRC_LOAD
  }
};

// The one entry that a runtime of any age has and that is needed to refuse it.
inline auto OldestCreateStatus(const OrtApi* api) {
  return reinterpret_cast<OrtStatus* (*)(int code, const char* message)>(*reinterpret_cast<void* const*>(api));
}

}  // namespace slrc

// What the runtime asks of an operator. Entries that are null are not asked.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};
