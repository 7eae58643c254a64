// fastloop_cuda_dtype on the host: sizes, and the names that kernels have.
#pragma once

#include "status.h"  // fastloop.h comes first

#include "fastloop_cuda.h"

namespace fastloop::cuda {

inline const char* name_of(const char* where, int32_t dtype) {
    switch (dtype) {
        case FASTLOOP_CUDA_FLOAT32: return "f32";
        case FASTLOOP_CUDA_BFLOAT16: return "bf16";
        case FASTLOOP_CUDA_FLOAT16: return "f16";
        case FASTLOOP_CUDA_FLOAT8_E4M3: return "e4m3";
        default: fail(FASTLOOP_BAD_ARGUMENT, "%s: dtype %d; choose from fastloop_cuda_dtype", where, dtype);
    }
}

inline size_t bytes_of(const char* where, int32_t dtype) {
    name_of(where, dtype);
    return dtype == FASTLOOP_CUDA_FLOAT32 ? 4 : dtype == FASTLOOP_CUDA_FLOAT8_E4M3 ? 1 : 2;
}

// float32 or a float of 16 bits.
inline void check_wide(const char* where, int32_t dtype) {
    if (bytes_of(where, dtype) == 1) fail(FASTLOOP_UNSUPPORTED, "%s: no kernel for %s", where, name_of(where, dtype));
}

}  // namespace fastloop::cuda
