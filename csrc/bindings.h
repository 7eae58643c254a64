// What the bindings of the ops (csrc/bindings_ops.cpp) and of the models (csrc/bindings.cpp) share.
//
// Pointers are integers, so any array library of any version can call; the GIL is released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>

#include "fastloop.h"

namespace py = pybind11;

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// ValueError with what the library says of a call that failed, RuntimeError where a GPU did; in the thread that made it.
inline void check(fastloop_status status) {
    if (status == FASTLOOP_DEVICE_ERROR) throw std::runtime_error(fastloop_last_error());
    if (status != FASTLOOP_OK) throw py::value_error(fastloop_last_error());
}

// A call without the GIL.
template <class... Parameters, class... Arguments>
void call(fastloop_status (*function)(Parameters...), Arguments... arguments) {
    fastloop_status status;
    {
        py::gil_scoped_release release;
        status = function(arguments...);
    }
    check(status);
}

// Handles that Python owns.
struct TeamDeleter {
    void operator()(fastloop_team* team) const { fastloop_team_destroy(team); }
};
struct Team {
    std::unique_ptr<fastloop_team, TeamDeleter> handle;
    Team(std::size_t threads, bool pin) {
        fastloop_team* made = nullptr;
        call(fastloop_team_create, threads, static_cast<int>(pin), &made);
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
        call(fastloop_weight_create, &p, &made);
        handle.reset(made);
    }
};

// fastloop._native.<op> for every op.
void bind_ops(py::module_& m);

// fastloop._native.cuda: modules and ops of fastloop_cuda.h.
void bind_cuda(py::module_& m);
