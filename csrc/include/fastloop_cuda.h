/* fastloop's C ABI on NVIDIA GPUs: the same ops, on device memory and a stream. Part of fastloop.h, which includes it.
 *
 * The library links no CUDA: the driver (libcuda.so.1, 12.0 or newer) is opened with the first call here, and where there
 * is none every call returns FASTLOOP_UNSUPPORTED and says so. Kernels come as an image, one for each op: a fat binary
 * that the build made (fastloop/cuda_kernels/<op>-<key>.fatbin of the Python package), or a cubin that nvcc or NVRTC made
 * of csrc/cuda/<op>.cu; `python -m fastloop.ops.cuda <op>` writes one.
 *
 * `stream` is a CUstream (a cudaStream_t is the same), NULL the default one. Pointers marked "device" are of the module's
 * device. Calls start work and return: they do not wait, do not allocate, and may be captured into a graph once
 * each op was called before. A context of the device is used if one is current, else its primary context, as the
 * CUDA runtime does.
 */
#ifndef FASTLOOP_CUDA_H
#define FASTLOOP_CUDA_H

#ifndef FASTLOOP_H
#error "include fastloop.h"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* GPUs the driver knows. */
FASTLOOP_API fastloop_status fastloop_cuda_device_count(int32_t* count);

typedef struct fastloop_cuda_device {
    size_t struct_size;
    int32_t major, minor;   /* compute capability: 9, 0 of an H100 */
    int32_t processors;     /* streaming multiprocessors */
    uint32_t shared_bytes;  /* shared memory that one block may have */
    char name[128];
} fastloop_cuda_device;

/* Fills `description`, whose struct_size is set before. */
FASTLOOP_API fastloop_status fastloop_cuda_describe(int32_t device, fastloop_cuda_device* description);

/* The kernels of one op on one device. Any number of threads may launch from it. */
typedef struct fastloop_cuda_module fastloop_cuda_module;

typedef struct fastloop_cuda_module_params {
    size_t struct_size;
    int32_t device;     /* its number: 0 <= device < fastloop_cuda_device_count */
    const void* image;  /* a cubin or a fat binary; may be freed afterwards */
    size_t image_bytes;
} fastloop_cuda_module_params;

FASTLOOP_API fastloop_status fastloop_cuda_module_create(const fastloop_cuda_module_params* params,
                                                         fastloop_cuda_module** module);
/* No launch from it may be pending. */
FASTLOOP_API void fastloop_cuda_module_destroy(fastloop_cuda_module* module);

#ifdef __cplusplus
}
#endif
#endif
