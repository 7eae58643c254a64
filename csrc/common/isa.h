// One binary for every machine of an architecture: kernels in csrc/cpu/isa/ are compiled once per instruction set, each
// into its own namespace, and the machine picks at run time. "base" needs nothing beyond the architecture itself.
#pragma once

#include "status.h"

namespace fastloop {

enum class Isa { base, avx2, avx512 };

// The one that `name` asks for, or the best here where it is NULL; throws Error where this machine lacks it.
Isa choose_isa(const char* where, const char* name);

}  // namespace fastloop

// FASTLOOP_DECLARE_KERNEL(void mel(int)): the declaration in every namespace the library has.
// FASTLOOP_RUN_KERNEL(isa, mel(1)): the call in the namespace of `isa`.
#if defined(FASTLOOP_X86_ISAS)
#define FASTLOOP_DECLARE_KERNEL(declaration) \
    namespace base {                         \
    declaration;                             \
    }                                        \
    namespace avx2 {                         \
    declaration;                             \
    }                                        \
    namespace avx512 {                       \
    declaration;                             \
    }
#define FASTLOOP_RUN_KERNEL(isa, call)                         \
    switch (isa) {                                             \
        case ::fastloop::Isa::avx512: avx512::call; break;     \
        case ::fastloop::Isa::avx2: avx2::call; break;         \
        case ::fastloop::Isa::base: base::call; break;         \
    }
#else
#define FASTLOOP_DECLARE_KERNEL(declaration) \
    namespace base {                         \
    declaration;                             \
    }
#define FASTLOOP_RUN_KERNEL(isa, call) ((void)(isa), base::call)
#endif
