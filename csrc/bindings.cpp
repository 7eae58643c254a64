// fastloop._native: the C ABI for Python. Pointers are integers, so any array library of any version can call it.
#include <pybind11/pybind11.h>

#include <cstdint>

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

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "fastloop's compiled kernels: csrc/include/fastloop.h, call by call. ValueError where a call fails.";
    m.def("abi_version", &fastloop_abi_version);
    m.def("isas", &fastloop_isas, "Instruction sets usable on this machine, best first.");
    m.def("mel", &mel, py::arg("batch"), py::arg("samples"), py::arg("pcm"), py::arg("pcm_stride"), py::arg("slots"),
          py::arg("slot_count"), py::arg("tail"), py::arg("peak"), py::arg("seen"), py::arg("bins"), py::arg("filters"),
          py::arg("bands"), py::arg("edge"), py::arg("clamp"), py::arg("frames"), py::arg("isa") = py::none(),
          "fastloop_mel: every pointer is an integer address of host memory.");
}
