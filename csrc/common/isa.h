// One binary for every machine of an architecture: kernels in csrc/cpu/isa/ are compiled once per instruction set, each
// into its own namespace, and the machine picks at run time. "base" needs nothing beyond the architecture itself.
#pragma once

#include "status.h"

namespace fastloop {

// avx512vnni: with the dot products of int8 (VNNI) and bfloat16; avxvnni: AVX2 with that of int8.
enum class Isa { base, avx2, avxvnni, avx512, avx512vnni };

// The one that `name` asks for; where it is NULL the one that the environment variable FASTLOOP_CPU_ISA names, or the
// best here. Throws Error where this machine lacks it.
Isa choose_isa(const char* where, const char* name);

}  // namespace fastloop

// FASTLOOP_DECLARE_KERNEL(void mel(int)): the declaration in every namespace the library has.
// FASTLOOP_KERNEL(isa, mel): the function in the namespace of `isa`.
#if defined(FASTLOOP_X86_ISAS)
#define FASTLOOP_DECLARE_KERNEL(declaration) \
    namespace base {                         \
    declaration;                             \
    }                                        \
    namespace avx2 {                         \
    declaration;                             \
    }                                        \
    namespace avxvnni {                      \
    declaration;                             \
    }                                        \
    namespace avx512 {                       \
    declaration;                             \
    }                                        \
    namespace avx512vnni {                   \
    declaration;                             \
    }
#define FASTLOOP_KERNEL(isa, name)                            \
    ((isa) == ::fastloop::Isa::avx512vnni ? avx512vnni::name  \
     : (isa) == ::fastloop::Isa::avx512   ? avx512::name      \
     : (isa) == ::fastloop::Isa::avxvnni  ? avxvnni::name     \
     : (isa) == ::fastloop::Isa::avx2     ? avx2::name        \
                                          : base::name)
#else
#define FASTLOOP_DECLARE_KERNEL(declaration) \
    namespace base {                         \
    declaration;                             \
    }
#define FASTLOOP_KERNEL(isa, name) ((void)(isa), base::name)
#endif
