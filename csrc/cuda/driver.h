// The part of the CUDA driver that launches need, found at run time: no CUDA headers, no link against CUDA.
//
// libcuda.so.1 is opened with the first call, or what the environment variable FASTLOOP_LIBCUDA names (a recorder in
// tests). Types and numbers are those of cuda.h, whose ABI does not change; tests compare them with it where it is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace fastloop::cuda {

using Result = int;
using DeviceHandle = int;
using Context = struct ContextHandle*;
using Library = struct LibraryHandle*;
using Kernel = struct KernelHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;

enum : Result { SUCCESS = 0, NO_DEVICE = 100, INVALID_IMAGE = 200, NO_BINARY_FOR_GPU = 209, UNSUPPORTED_PTX = 222,
                NOT_FOUND = 500 };

enum class DeviceAttribute : int { PROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97 };
enum class KernelAttribute : int { REGISTERS = 4, MAX_DYNAMIC_SHARED = 8, NON_PORTABLE_CLUSTER = 14 };
enum class LaunchAttributeId : int { CLUSTER_DIMENSION = 4, PROGRAMMATIC_SERIALIZATION = 6 };

struct LaunchAttribute {
    LaunchAttributeId id;
    int padding;
    union {
        char bytes[64];
        unsigned cluster[3];
        int flag;
    };
};

struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};

struct alignas(128) TensorMap {
    uint64_t opaque[16];
};
enum class TensorType : int { UINT8 = 0, UINT16 = 1, FLOAT16 = 6, FLOAT32 = 7, BFLOAT16 = 9 };
enum class Swizzle : int { NONE = 0, BYTES_32 = 1, BYTES_64 = 2, BYTES_128 = 3 };
enum class Promotion : int { NONE = 0, BYTES_64 = 1, BYTES_128 = 2, BYTES_256 = 3 };

// Entry points, each named as the driver exports it.
struct Driver {
    Result (*cuInit)(unsigned flags);
    Result (*cuGetErrorName)(Result, const char**);
    Result (*cuGetErrorString)(Result, const char**);
    Result (*cuDriverGetVersion)(int*);
    Result (*cuDeviceGetCount)(int*);
    Result (*cuDeviceGet)(DeviceHandle*, int ordinal);
    Result (*cuDeviceGetName)(char*, int bytes, DeviceHandle);
    Result (*cuDeviceGetAttribute)(int*, DeviceAttribute, DeviceHandle);
    Result (*cuDevicePrimaryCtxRetain)(Context*, DeviceHandle);
    Result (*cuDevicePrimaryCtxRelease_v2)(DeviceHandle);
    Result (*cuCtxGetDevice)(DeviceHandle*);
    Result (*cuCtxGetCurrent)(Context*);
    Result (*cuCtxPushCurrent_v2)(Context);
    Result (*cuCtxPopCurrent_v2)(Context*);
    Result (*cuLibraryLoadData)(Library*, const void* image, int* jit, void** jit_values, unsigned jit_count, int* options,
                                void** option_values, unsigned option_count);
    Result (*cuLibraryUnload)(Library);
    Result (*cuLibraryGetKernel)(Kernel*, Library, const char* name);
    Result (*cuKernelGetFunction)(Function*, Kernel);
    Result (*cuKernelGetAttribute)(int*, KernelAttribute, Kernel, DeviceHandle);
    Result (*cuKernelSetAttribute)(KernelAttribute, int, Kernel, DeviceHandle);
    Result (*cuLaunchKernelEx)(const LaunchConfig*, Function, void** parameters, void** extra);
    Result (*cuTensorMapEncodeTiled)(TensorMap*, TensorType, uint32_t rank, void* address, const uint64_t* dims,
                                     const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                     int interleave, Swizzle, Promotion, int out_of_bounds_fill);
    // Of 12.4 and newer; nullptr in older ones.
    Result (*cuLibraryGetKernelCount)(unsigned*, Library);
    Result (*cuLibraryEnumerateKernels)(Kernel*, unsigned count, Library);
    Result (*cuFuncLoad)(Function);
};

// The driver, opened and initialised once; Error with FASTLOOP_UNSUPPORTED and the reason where there is none.
const Driver& driver();

// Error with what the driver says of a result that is no success.
void must(Result result, const char* what);

// In its scope a context of `device` is current in this thread: the one that is, if it belongs to it, else `primary`.
class Current {
  public:
    Current(DeviceHandle device, Context primary);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

  private:
    bool pushed_ = false;
};

}  // namespace fastloop::cuda
