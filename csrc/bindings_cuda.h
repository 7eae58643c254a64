// What the bindings of CUDA modules and ops share.
#pragma once

#include <string>

#include "bindings.h"
#include "fastloop_cuda.h"

using Address = std::uintptr_t;

struct CudaModule {
    struct Deleter {
        void operator()(fastloop_cuda_module* module) const { fastloop_cuda_module_destroy(module); }
    };
    std::unique_ptr<fastloop_cuda_module, Deleter> handle;

    CudaModule(int device, const py::bytes& image) {
        const std::string bytes = image;
        fastloop_cuda_module_params p{};
        p.struct_size = sizeof p;
        p.device = device;
        p.image = bytes.data();
        p.image_bytes = bytes.size();
        fastloop_cuda_module* made = nullptr;
        call(fastloop_cuda_module_create, &p, &made);
        handle.reset(made);
    }
};

// mel, paged_attention, decide and sample (csrc/bindings_cuda_ops.cpp).
void bind_cuda_ops(py::module_& cuda);
