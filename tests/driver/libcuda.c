/* What Triton calls of NVIDIA's driver library. Nothing runs: what would is told to two functions in Python. */
#include "cuda.h"
#include <stdlib.h>

typedef struct {
  const char *name;
  unsigned most_shared; /* bytes that a launch may ask for */
} Function;
typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                           const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                           CUtensorMapSwizzle, CUtensorMapFloatOOBfill);
typedef void (*Launch)(CUfunction, const char *, const unsigned *, CUstream, unsigned, unsigned, void **);

/* Of the runtime beside it, if there is one: `software_gpu/runtime.cpp`. */
__attribute__((weak)) CUcontext *software_context(void);
__attribute__((weak)) int software_spoils(void);
__attribute__((weak)) int cudaDeviceGetAttribute(int *, int, int); // whose names have the same numbers
__attribute__((weak)) int cudaStreamCreateWithPriority(CUstream *, unsigned, int);

static Encode encode;
static Launch launch;

void tell(Encode encoding, Launch launching) { encode = encoding, launch = launching; }

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (software_context && !*software_context())
    return CUDA_ERROR_INVALID_CONTEXT;
  return encode(map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, fill);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
  Function *function = (Function *)handle;
  unsigned dependent = 0, others = 0;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      dependent = config->attrs[i].value.programmaticStreamSerializationAllowed;
    else
      others++;
  if (config->sharedMemBytes > function->most_shared)
    return CUDA_ERROR_INVALID_VALUE;
  launch(handle, function->name, &config->gridDimX, config->hStream, dependent, others, parameters);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (software_spoils && software_spoils())
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return *module = (CUmodule)image, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module, const char *name) {
  Function *function = malloc(sizeof(Function));
  function->name = name, function->most_shared = 48 << 10;
  return *handle = (CUfunction)function, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction handle) {
  *value = name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

/* Triton 3.9 asks for a mode, too, that this driver is too old for. */
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute name, int value) {
  if (name >= CU_FUNC_ATTRIBUTE_MAX)
    return CUDA_ERROR_INVALID_VALUE;
  if (name == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    ((Function *)handle)->most_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
  if (software_context) // else it is NVIDIA's
    return cudaDeviceGetAttribute(value, name, device);
  *value = name == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 << 10
           : name == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR        ? 9
                                                                         : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute name, CUdeviceptr address) {
  return *(CUdeviceptr *)value = address, CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) { return *device = i, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) {
  return *context = software_context ? *software_context() : (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache preferred) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "refused", CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) {
  if (software_context)
    *software_context() = context;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  if (!software_context || !*software_context())
    return CUDA_ERROR_INVALID_CONTEXT;
  return cudaStreamCreateWithPriority(stream, flags, 0), CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
