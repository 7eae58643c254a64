#include "isa.h"

#include <string>

namespace fastloop {
namespace {

bool supported(Isa isa) {
#if defined(FASTLOOP_X86_ISAS)
    switch (isa) {
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::base:
            return true;
    }
#endif
    return isa == Isa::base;
}

struct Named {
    Isa isa;
    const char* name;
};
constexpr Named kBestFirst[] = {{Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::base, "base"}};

const std::string& isas() {
    static const std::string names = [] {
        std::string text;
        for (const Named& each : kBestFirst)
            if (supported(each.isa)) text += (text.empty() ? "" : " ") + std::string(each.name);
        return text;
    }();
    return names;
}

}  // namespace

Isa choose_isa(const char* where, const char* name) {
    for (const Named& each : kBestFirst)
        if (supported(each.isa) && (name == nullptr || std::strcmp(name, each.name) == 0)) return each.isa;
    fail(FASTLOOP_UNSUPPORTED, "%s: instruction set \"%s\" is not one of this machine's: %s", where, name,
         isas().c_str());
}

}  // namespace fastloop

extern "C" const char* fastloop_isas(void) { return fastloop::isas().c_str(); }
