#include "status.h"

namespace {
thread_local char last_error[1024] = "";
}

namespace fastloop {
fastloop_status report(fastloop_status status, const char* message) noexcept {
    std::snprintf(last_error, sizeof last_error, "%s", message);
    return status;
}
}  // namespace fastloop

extern "C" int fastloop_abi_version(void) { return FASTLOOP_ABI_VERSION; }
extern "C" int fastloop_abi_minor(void) { return FASTLOOP_ABI_MINOR; }
extern "C" const char* fastloop_last_error(void) { return last_error; }
