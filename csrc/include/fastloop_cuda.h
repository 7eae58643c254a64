/* fastloop's C ABI on NVIDIA GPUs: the same ops, on device memory and a stream. Versioned with fastloop.h, which it includes.
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

#include "fastloop.h"

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

/* linear: out = epilogue(x W^T + bias) + residual in bfloat16, sums in float32. A result is the same to the bit in every
 * run, whatever the other rows are. */
typedef struct fastloop_cuda_linear_params {
    size_t struct_size;
    fastloop_cuda_module* module; /* of linear */
    size_t rows, in, out_rows;    /* N (made for 1 to 64), D, O */
    const void* x;                /* device, bfloat16 [N, D] */
    size_t x_stride;
    const void* weight; /* device, bfloat16 [O, D] */
    size_t weight_stride;
    const void* bias;  /* device, bfloat16 [O] or NULL */
    int32_t epilogue;  /* fastloop_epilogue; FASTLOOP_NONE where gated */
    int32_t gated;     /* 1: weight rows are [gate; up], the result is silu(gate) * up, O / 2 wide */
    const void* residual; /* device, bfloat16 [N, O'] or NULL; may be `out` */
    size_t residual_stride;
    void* out; /* device, bfloat16 [N, O'], O' = O, or O / 2 where gated */
    size_t out_stride;
    void* workspace; /* device; zero before the first use, then left as the call leaves it; of one stream at a time */
    size_t workspace_bytes; /* at least what fastloop_cuda_linear_workspace says; 0 and NULL where that is 0 */
    int32_t splits;    /* ranges of the depth that are summed apart; 0: chosen by the size of the device */
    int32_t dependent; /* 1: start before the kernel in front has ended, and read what does not depend on it: the
                          weights. Ignored below sm_90. */
    void* stream;
} fastloop_cuda_linear_params;

FASTLOOP_API fastloop_status fastloop_cuda_linear(const fastloop_cuda_linear_params* params);
/* Bytes of workspace for a call with these sizes, strides and addresses; the workspace fields are not read. */
FASTLOOP_API fastloop_status fastloop_cuda_linear_workspace(const fastloop_cuda_linear_params* params, size_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
