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

// Which ones a library has beside "base" is up to CMake, which defines FASTLOOP_HAS_<name> for each.
//
// FASTLOOP_DECLARE_KERNEL(void mel(int)): the declaration in every namespace the library has.
// FASTLOOP_KERNEL(isa, mel): the function in the namespace of `isa`.
#define FASTLOOP_IN(name, declaration) \
    namespace name {                   \
    declaration;                       \
    }
#define FASTLOOP_IF(name, isa, kernel) (isa) == ::fastloop::Isa::name ? name::kernel:

#if defined(FASTLOOP_HAS_avx2)
#define FASTLOOP_IN_AVX2(declaration) FASTLOOP_IN(avx2, declaration)
#define FASTLOOP_IF_AVX2(isa, kernel) FASTLOOP_IF(avx2, isa, kernel)
#else
#define FASTLOOP_IN_AVX2(declaration)
#define FASTLOOP_IF_AVX2(isa, kernel)
#endif
#if defined(FASTLOOP_HAS_avxvnni)
#define FASTLOOP_IN_AVXVNNI(declaration) FASTLOOP_IN(avxvnni, declaration)
#define FASTLOOP_IF_AVXVNNI(isa, kernel) FASTLOOP_IF(avxvnni, isa, kernel)
#else
#define FASTLOOP_IN_AVXVNNI(declaration)
#define FASTLOOP_IF_AVXVNNI(isa, kernel)
#endif
#if defined(FASTLOOP_HAS_avx512)
#define FASTLOOP_IN_AVX512(declaration) FASTLOOP_IN(avx512, declaration)
#define FASTLOOP_IF_AVX512(isa, kernel) FASTLOOP_IF(avx512, isa, kernel)
#else
#define FASTLOOP_IN_AVX512(declaration)
#define FASTLOOP_IF_AVX512(isa, kernel)
#endif
#if defined(FASTLOOP_HAS_avx512vnni)
#define FASTLOOP_IN_AVX512VNNI(declaration) FASTLOOP_IN(avx512vnni, declaration)
#define FASTLOOP_IF_AVX512VNNI(isa, kernel) FASTLOOP_IF(avx512vnni, isa, kernel)
#else
#define FASTLOOP_IN_AVX512VNNI(declaration)
#define FASTLOOP_IF_AVX512VNNI(isa, kernel)
#endif

#define FASTLOOP_DECLARE_KERNEL(...)  \
    FASTLOOP_IN(base, __VA_ARGS__)    \
    FASTLOOP_IN_AVX2(__VA_ARGS__)     \
    FASTLOOP_IN_AVXVNNI(__VA_ARGS__)  \
    FASTLOOP_IN_AVX512(__VA_ARGS__)   \
    FASTLOOP_IN_AVX512VNNI(__VA_ARGS__)
#define FASTLOOP_KERNEL(isa, kernel)                                                                                \
    ((void)(isa), FASTLOOP_IF_AVX512VNNI(isa, kernel) FASTLOOP_IF_AVX512(isa, kernel) FASTLOOP_IF_AVXVNNI(isa, kernel) \
                      FASTLOOP_IF_AVX2(isa, kernel) base::kernel)
