// fastloop._native: the C ABI for Python. Pointers are integers, so any array library of any version can call it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "fastloop.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check(fastloop_status status) {
    if (status != FASTLOOP_OK) throw py::value_error(fastloop_last_error());
}

void mel(std::size_t batch, std::size_t samples, std::uintptr_t pcm, std::size_t pcm_stride, std::uintptr_t slots,
         std::size_t slot_count, std::uintptr_t tail, std::uintptr_t peak, std::uintptr_t seen, std::size_t bins,
         std::uintptr_t filters, std::uintptr_t bands, int edge, int clamp, std::uintptr_t frames,
         const char* isa) {
    fastloop_mel_params p{};
    p.struct_size = sizeof p;
    p.batch = batch;
    p.samples = samples;
    p.pcm = pointer<const float>(pcm);
    p.pcm_stride = pcm_stride;
    p.slots = pointer<const std::int64_t>(slots);
    p.slot_count = slot_count;
    p.tail = pointer<float>(tail);
    p.peak = pointer<float>(peak);
    p.seen = pointer<std::int64_t>(seen);
    p.bins = bins;
    p.filters = pointer<const float>(filters);
    p.bands = pointer<const std::int32_t>(bands);
    p.edge = edge;
    p.clamp = clamp;
    p.frames = pointer<float>(frames);
    p.isa = isa;
    fastloop_status status;
    {
        py::gil_scoped_release release;
        status = fastloop_mel(&p);
    }
    check(status);  // same thread, so the message is this call's
}

// Handles that Python owns.
struct TeamDeleter {
    void operator()(fastloop_team* team) const { fastloop_team_destroy(team); }
};
struct Team {
    std::unique_ptr<fastloop_team, TeamDeleter> handle;
    Team(std::size_t threads, bool pin) {
        fastloop_team* made = nullptr;
        check(fastloop_team_create(threads, pin, &made));
        handle.reset(made);
    }
};

struct WeightDeleter {
    void operator()(fastloop_weight* weight) const { fastloop_weight_destroy(weight); }
};
struct Weight {
    std::unique_ptr<fastloop_weight, WeightDeleter> handle;
    Weight(int format, int source, std::size_t out, std::size_t in, bool gated, std::uintptr_t data,
           std::uintptr_t scale, std::size_t group) {
        fastloop_weight_params p{};
        p.struct_size = sizeof p;
        p.format = format;
        p.source = source;
        p.out = out;
        p.in = in;
        p.gated = gated;
        p.data = pointer<const void>(data);
        p.scale = pointer<const void>(scale);
        p.group = group;
        fastloop_weight* made = nullptr;
        fastloop_status status;
        {
            py::gil_scoped_release release;
            status = fastloop_weight_create(&p, &made);
        }
        check(status);
        handle.reset(made);
    }
};

void linear(const Weight& weight, Team* team, std::size_t rows, std::uintptr_t x, std::size_t x_stride,
            std::uintptr_t bias, int epilogue, std::uintptr_t residual, std::size_t residual_stride, std::uintptr_t out,
            std::size_t out_stride, const char* isa) {
    fastloop_linear_params p{};
    p.struct_size = sizeof p;
    p.weight = weight.handle.get();
    p.team = team == nullptr ? nullptr : team->handle.get();
    p.rows = rows;
    p.x = pointer<const float>(x);
    p.x_stride = x_stride;
    p.bias = pointer<const float>(bias);
    p.epilogue = epilogue;
    p.residual = pointer<const float>(residual);
    p.residual_stride = residual_stride;
    p.out = pointer<float>(out);
    p.out_stride = out_stride;
    p.isa = isa;
    fastloop_status status;
    {
        py::gil_scoped_release release;
        status = fastloop_linear(&p);
    }
    check(status);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "fastloop's compiled kernels: csrc/include/fastloop.h, call by call. ValueError where a call fails.";
    m.def("abi_version", &fastloop_abi_version);
    m.def("isas", &fastloop_isas, "Instruction sets usable on this machine, best first.");
    m.def("mel", &mel, py::arg("batch"), py::arg("samples"), py::arg("pcm"), py::arg("pcm_stride"), py::arg("slots"),
          py::arg("slot_count"), py::arg("tail"), py::arg("peak"), py::arg("seen"), py::arg("bins"), py::arg("filters"),
          py::arg("bands"), py::arg("edge"), py::arg("clamp"), py::arg("frames"), py::arg("isa") = py::none(),
          "fastloop_mel: every pointer is an integer address of host memory.");
    py::class_<Team>(m, "Team", "fastloop_team: the threads that native calls share.")
        .def(py::init<std::size_t, bool>(), py::arg("threads"), py::arg("pin") = false);
    py::class_<Weight>(m, "Weight", "fastloop_weight: a matrix packed for `linear`.")
        .def(py::init<int, int, std::size_t, std::size_t, bool, std::uintptr_t, std::uintptr_t, std::size_t>(),
             py::arg("format"), py::arg("source"), py::arg("out"), py::arg("in_"), py::arg("gated"), py::arg("data"),
             py::arg("scale") = 0, py::arg("group") = 0)
        .def_property_readonly("nbytes", [](const Weight& w) { return fastloop_weight_bytes(w.handle.get()); });
    m.def("linear", &linear, py::arg("weight"), py::arg("team").none(true), py::arg("rows"), py::arg("x"),
          py::arg("x_stride"), py::arg("bias"), py::arg("epilogue"), py::arg("residual"), py::arg("residual_stride"),
          py::arg("out"), py::arg("out_stride"), py::arg("isa") = py::none(), "fastloop_linear.");
}
