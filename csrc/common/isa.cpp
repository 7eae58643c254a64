#include "isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastloop {
namespace {

// Whether the library was compiled with it.
constexpr bool compiled(Isa isa) {
    switch (isa) {
#if defined(FASTLOOP_HAS_avx512vnni)
        case Isa::avx512vnni: return true;
#endif
#if defined(FASTLOOP_HAS_avx512)
        case Isa::avx512: return true;
#endif
#if defined(FASTLOOP_HAS_avxvnni)
        case Isa::avxvnni: return true;
#endif
#if defined(FASTLOOP_HAS_avx2)
        case Isa::avx2: return true;
#endif
        default: return isa == Isa::base;
    }
}

#if defined(__x86_64__)
// CPUID leaf 7, subleaf 1: EAX bit 4. gcc 12 has no name for it in __builtin_cpu_supports.
bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

// Whether this machine has it.
bool runs(Isa isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    switch (isa) {
        case Isa::avx512vnni:
            return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
        case Isa::avx512:
            return avx512;
        case Isa::avxvnni:
            return avx2 && has_avxvnni();
        case Isa::avx2:
            return avx2;
        case Isa::base:
            return true;
    }
#endif
    return isa == Isa::base;
}

bool supported(Isa isa) { return compiled(isa) && runs(isa); }

struct Named {
    Isa isa;
    const char* name;
};
constexpr Named kBestFirst[] = {{Isa::avx512vnni, "avx512vnni"},
                                {Isa::avx512, "avx512"},
                                {Isa::avxvnni, "avxvnni"},
                                {Isa::avx2, "avx2"},
                                {Isa::base, "base"}};

const std::string& isas() {
    static const std::string names = [] {
        std::string text;
        for (const Named& each : kBestFirst)
            if (supported(each.isa)) {
                if (!text.empty()) text += ' ';
                text += each.name;
            }
        return text;
    }();
    return names;
}

}  // namespace

Isa choose_isa(const char* where, const char* name) {
    if (name == nullptr) {
        static const char* const forced = std::getenv("FASTLOOP_CPU_ISA");
        name = forced != nullptr && *forced != '\0' ? forced : nullptr;
    }
    for (const Named& each : kBestFirst)
        if (supported(each.isa) && (name == nullptr || std::strcmp(name, each.name) == 0)) return each.isa;
    fail(FASTLOOP_UNSUPPORTED, "%s: instruction set \"%s\" is not one of this machine's: %s", where, name,
         isas().c_str());
}

}  // namespace fastloop

extern "C" const char* fastloop_isas(void) { return fastloop::isas().c_str(); }
