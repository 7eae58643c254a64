// fastloop._native.cuda: csrc/include/fastloop_cuda.h, call by call; device addresses and streams are integers.
#include <string>

#include "bindings.h"

namespace {

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

py::dict describe(int device) {
    fastloop_cuda_device found{};
    found.struct_size = sizeof found;
    call(fastloop_cuda_describe, device, &found);
    py::dict said;
    said["name"] = std::string(found.name);
    said["major"] = found.major;
    said["minor"] = found.minor;
    said["processors"] = found.processors;
    said["shared_bytes"] = found.shared_bytes;
    return said;
}

}  // namespace

void bind_cuda(py::module_& m) {
    auto cuda = m.def_submodule("cuda", "csrc/include/fastloop_cuda.h. ValueError where a call is wrong or there is no "
                                        "driver, RuntimeError where the driver refuses.");
    cuda.def(
        "device_count",
        [] {
            std::int32_t count = 0;
            call(fastloop_cuda_device_count, &count);
            return count;
        },
        "GPUs the driver knows.");
    cuda.def("describe", &describe, py::arg("device"), "fastloop_cuda_describe: a dict.");
    py::class_<CudaModule>(cuda, "Module", "fastloop_cuda_module: the kernels of one op on one device.")
        .def(py::init<int, const py::bytes&>(), py::arg("device"), py::arg("image"));
}
