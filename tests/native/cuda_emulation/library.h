// A library of kernels: a table of their names and parameters, and the C functions that find and launch them.
#pragma once

#include <type_traits>
#include <utility>

#include "runtime.h"

namespace cuda_emulation {

// How a kernel's arguments are told apart: one letter a parameter, and its size.
template <class T> constexpr char code() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else if constexpr (std::is_same_v<T, double>) return 'd';
    else if constexpr (std::is_integral_v<T>) return std::is_signed_v<T> ? 'i' : 'u';
    else return 's';
}

struct Parameter {
    char code;
    size_t bytes;
};

template <auto kernel> struct Kernel;
template <class... A, void (*kernel)(A...)> struct Kernel<kernel> {
    static void call(void** arguments) {
        [&]<size_t... I>(std::index_sequence<I...>) {
            kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
        }(std::index_sequence_for<A...>{});
    }
    static constexpr Parameter parameters[] = {Parameter{code<std::remove_const_t<A>>(), sizeof(A)}..., Parameter{0, 0}};
};

struct Entry {
    const char* name;
    void (*call)(void**);
    const Parameter* parameters;
};

#define CUDA_EMULATION_ENTRY(name) \
    ::cuda_emulation::Entry { #name, &::cuda_emulation::Kernel<&name>::call, ::cuda_emulation::Kernel<&name>::parameters }

}  // namespace cuda_emulation

// The C entry points of a library of kernels; its one file defines the table.
extern const cuda_emulation::Entry cuda_emulation_entries[];

#define CUDA_EMULATION_PUBLIC __attribute__((visibility("default")))

#define CUDA_EMULATION_LIBRARY(...)                                                                                       \
    const cuda_emulation::Entry cuda_emulation_entries[] = {__VA_ARGS__, {nullptr, nullptr, nullptr}};                    \
    extern "C" CUDA_EMULATION_PUBLIC const cuda_emulation::Entry* cuda_emulation_find(const char* name) {                                       \
        for (const auto* e = cuda_emulation_entries; e->name; ++e)                                                        \
            if (!strcmp(e->name, name)) return e;                                                                         \
        return nullptr;                                                                                                   \
    }                                                                                                                     \
    /* As cuLaunchKernel: arguments[i] points to the i-th one. "" or what went wrong; valid until the next call. */       \
    extern "C" CUDA_EMULATION_PUBLIC const char* cuda_emulation_launch(const char* name, const unsigned* grid, const unsigned* block,           \
                                                 unsigned cluster, size_t shared, void** arguments, uint64_t seed,        \
                                                 unsigned resident) {                                                     \
        static std::string problem;                                                                                       \
        const auto* entry = cuda_emulation_find(name);                                                                    \
        if (!entry) return (problem = std::string("no kernel ") + name).c_str();                                          \
        const cuda_emulation::Configuration c{                                                                            \
            {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, cluster, shared, seed, resident};                \
        cuda_emulation::Machine machine(c, entry->call, arguments);                                                       \
        return (problem = machine.run()).c_str();                                                                         \
    }
