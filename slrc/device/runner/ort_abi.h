// ONNX Runtime's C interface is a table of functions to which releases only append, so that an entry keeps its place:
// the numbers below, declared in our own words as in `slrc/kernels/ort_abi.h`.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "texts.h"

typedef struct OrtStatus OrtStatus;
typedef struct OrtObject OrtObject;  // an environment, options, a session, a value, …

enum { kOrtVersion = 17, kError = 3, kArena = 1, kDefaultMemory = 0 };

#define ENTRIES(ENTRY)                                                                                                \
  ENTRY(2, const char*, GetErrorMessage, (const OrtStatus*))                                                          \
  ENTRY(3, OrtStatus*, CreateEnv, (int severity, const char* name, OrtObject** env))                                  \
  ENTRY(7, OrtStatus*, CreateSession, (OrtObject * env, const char* path, OrtObject* options, OrtObject** session))   \
  ENTRY(9, OrtStatus*, Run,                                                                                           \
        (OrtObject * session, OrtObject * options, const char* const* inputs, OrtObject* const* values, size_t count, \
         const char* const* outputs, size_t output_count, OrtObject** results))                                       \
  ENTRY(10, OrtStatus*, CreateSessionOptions, (OrtObject * *options))                                                 \
  ENTRY(24, OrtStatus*, SetIntraOpNumThreads, (OrtObject * options, int count))                                       \
  ENTRY(25, OrtStatus*, SetInterOpNumThreads, (OrtObject * options, int count))                                       \
  ENTRY(29, OrtStatus*, RegisterCustomOpsLibrary, (OrtObject * options, const char* path, void** handle))             \
  ENTRY(49, OrtStatus*, CreateTensorWithDataAsOrtValue,                                                               \
        (const OrtObject* info, void* data, size_t bytes, const int64_t* dims, size_t count, int type,                \
         OrtObject** value))                                                                                          \
  ENTRY(51, OrtStatus*, GetTensorMutableData, (OrtObject * value, void** data))                                       \
  ENTRY(60, OrtStatus*, GetTensorElementType, (const OrtObject* info, int* type))                                     \
  ENTRY(61, OrtStatus*, GetDimensionsCount, (const OrtObject* info, size_t* count))                                   \
  ENTRY(62, OrtStatus*, GetDimensions, (const OrtObject* info, int64_t* dims, size_t count))                          \
  ENTRY(65, OrtStatus*, GetTensorTypeAndShape, (const OrtObject* value, OrtObject** info))                            \
  ENTRY(69, OrtStatus*, CreateCpuMemoryInfo, (int allocator, int memory, OrtObject** info))                           \
  ENTRY(93, void, ReleaseStatus, (OrtStatus*))                                                                        \
  ENTRY(96, void, ReleaseValue, (OrtObject*))                                                                         \
  ENTRY(99, void, ReleaseTensorTypeAndShapeInfo, (OrtObject*))                                                        \
  ENTRY(130, OrtStatus*, AddSessionConfigEntry, (OrtObject * options, const char* key, const char* value))

static struct {
#define DECLARE(slot, result, name, arguments) result(*name) arguments;
  ENTRIES(DECLARE)
#undef DECLARE
} ort;
static OrtObject *env, *memory;

// The types of tensors: as numpy and as ONNX Runtime name them, and their sizes in bytes.
static const struct {
  const char* name;
  int type, size;
} kTypes[] = {{"float32", 1, 4}, {"uint8", 2, 1}, {"int8", 3, 1},     {"int16", 5, 2},   {"int32", 6, 4},
              {"int64", 7, 8},   {"bool", 9, 1},  {"float16", 10, 2}, {"float64", 11, 8}};

// Return what a call failed with, or null; the status is released.
static char* problem(OrtStatus* status) {
  if (!status) return NULL;
  char* text = format("%s", ort.GetErrorMessage(status));
  ort.ReleaseStatus(status);
  return text;
}
