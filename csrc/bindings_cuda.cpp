// fastloop._native.cuda: csrc/include/fastloop_cuda.h, call by call; device addresses and streams are integers.
#include <string>

#include "bindings_cuda.h"

namespace {

// One call of linear, described, so that its workspace can be asked for before it is launched.
struct Linear {
    fastloop_cuda_linear_params p{};

    Linear(const CudaModule& module, std::size_t rows, std::size_t in, std::size_t out_rows, Address x, std::size_t x_stride,
           Address weight, std::size_t weight_stride, Address bias, int epilogue, bool gated, Address residual,
           std::size_t residual_stride, Address out, std::size_t out_stride, int splits, int weight_format, Address scale,
           std::size_t group) {
        p.struct_size = sizeof p;
        p.module = module.handle.get();
        p.rows = rows;
        p.in = in;
        p.out_rows = out_rows;
        p.x = pointer<const void>(x);
        p.x_stride = x_stride;
        p.weight = pointer<const void>(weight);
        p.weight_stride = weight_stride;
        p.bias = pointer<const void>(bias);
        p.epilogue = epilogue;
        p.gated = gated;
        p.residual = pointer<const void>(residual);
        p.residual_stride = residual_stride;
        p.out = pointer<void>(out);
        p.out_stride = out_stride;
        p.splits = splits;
        p.weight_format = weight_format;
        p.scale = pointer<const void>(scale);
        p.group = group;
    }

    std::size_t workspace() const {
        std::size_t bytes = 0;
        call(fastloop_cuda_linear_workspace, &p, &bytes);
        return bytes;
    }
    void launch(Address workspace, std::size_t workspace_bytes, bool dependent, Address stream) const {
        fastloop_cuda_linear_params own = p;
        own.workspace = pointer<void>(workspace);
        own.workspace_bytes = workspace_bytes;
        own.dependent = dependent;
        own.stream = pointer<void>(stream);
        call(fastloop_cuda_linear, &own);
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
    py::class_<Linear>(cuda, "Linear", "fastloop_cuda_linear_params: one call of linear; its module must outlive it.")
        .def(py::init<const CudaModule&, std::size_t, std::size_t, std::size_t, Address, std::size_t, Address, std::size_t,
                      Address, int, bool, Address, std::size_t, Address, std::size_t, int, int, Address, std::size_t>(),
             py::keep_alive<1, 2>(), py::arg("module"), py::arg("rows"), py::arg("in_"), py::arg("out_rows"), py::arg("x"),
             py::arg("x_stride"), py::arg("weight"), py::arg("weight_stride"), py::arg("bias"), py::arg("epilogue"),
             py::arg("gated"), py::arg("residual"), py::arg("residual_stride"), py::arg("out"), py::arg("out_stride"),
             py::arg("splits") = 0, py::arg("weight_format") = 0, py::arg("scale") = 0, py::arg("group") = 0)
        .def_property_readonly("workspace_bytes", &Linear::workspace)
        .def("launch", &Linear::launch, py::arg("workspace"), py::arg("workspace_bytes"), py::arg("dependent"),
             py::arg("stream"), "Start it on a stream.");
    bind_cuda_ops(cuda);
}
