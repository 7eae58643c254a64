#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

namespace fastloop::cuda {
namespace {

struct Opened {
    Driver driver{};
    std::string problem;  // why there is no driver, or ""
};

// One entry point; the name is remembered if it is missing.
template <class Function>
void find(void* library, const char* name, Function& function, std::string& missing) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(name);
}

std::string find_all(void* library, Driver& d) {
    std::string missing;
#define FIND(name) find(library, #name, d.name, missing)
    FIND(cuInit);
    FIND(cuGetErrorName);
    FIND(cuGetErrorString);
    FIND(cuDriverGetVersion);
    FIND(cuDeviceGetCount);
    FIND(cuDeviceGet);
    FIND(cuDeviceGetName);
    FIND(cuDeviceGetAttribute);
    FIND(cuDevicePrimaryCtxRetain);
    FIND(cuDevicePrimaryCtxRelease_v2);
    FIND(cuCtxGetDevice);
    FIND(cuCtxGetCurrent);
    FIND(cuCtxPushCurrent_v2);
    FIND(cuCtxPopCurrent_v2);
    FIND(cuLibraryLoadData);
    FIND(cuLibraryUnload);
    FIND(cuLibraryGetKernel);
    FIND(cuKernelGetFunction);
    FIND(cuKernelGetAttribute);
    FIND(cuKernelSetAttribute);
    FIND(cuLaunchKernelEx);
    FIND(cuTensorMapEncodeTiled);
    std::string newer;
#define FIND_NEWER(name) find(library, #name, d.name, newer)
    FIND_NEWER(cuLibraryGetKernelCount);
    FIND_NEWER(cuLibraryEnumerateKernels);
    FIND_NEWER(cuFuncLoad);
#undef FIND_NEWER
#undef FIND
    return missing;
}

std::string told(const Driver& d, Result result) {
    const char *name = nullptr, *text = nullptr;
    d.cuGetErrorName(result, &name);
    d.cuGetErrorString(result, &text);
    return std::string(name != nullptr ? name : "unknown error") + " (" + std::to_string(result) + ")" +
           (text != nullptr ? std::string(": ") + text : "");
}

// The library stays open as long as the process: handles of it are everywhere.
Opened open() {
    Opened opened;
    const char* chosen = std::getenv("FASTLOOP_LIBCUDA");
    const bool forced = chosen != nullptr && chosen[0] != '\0';
    const char* path = forced ? chosen : "libcuda.so.1";
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* why = dlerror();
        opened.problem = std::string("no CUDA driver: ") + (why != nullptr ? why : path);
        return opened;
    }
    const std::string missing = find_all(library, opened.driver);
    if (!missing.empty()) {
        opened.problem = std::string("the CUDA driver ") + path + " is older than 12.0, it lacks " + missing;
        return opened;
    }
    const Result result = opened.driver.cuInit(0);
    if (result != SUCCESS) opened.problem = "the CUDA driver does not start: " + told(opened.driver, result);
    return opened;
}

}  // namespace

const Driver& driver() {
    static const Opened opened = open();
    if (!opened.problem.empty()) throw Error{FASTLOOP_UNSUPPORTED, opened.problem};
    return opened.driver;
}

void must(Result result, const char* what) {
    if (result == SUCCESS) return;
    std::string message = std::string(what) + ": " + told(driver(), result);
    if (result == NO_BINARY_FOR_GPU || result == UNSUPPORTED_PTX || result == INVALID_IMAGE)
        throw Error{FASTLOOP_UNSUPPORTED, message + "; the image holds no code for this GPU and driver"};
    throw Error{FASTLOOP_DEVICE_ERROR, message};
}

Current::Current(DeviceHandle device, Context primary) {
    const Driver& d = driver();
    Context current = nullptr;
    must(d.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    if (current != nullptr) {
        DeviceHandle its = -1;
        must(d.cuCtxGetDevice(&its), "cuCtxGetDevice");
        if (its == device) return;
    }
    must(d.cuCtxPushCurrent_v2(primary), "cuCtxPushCurrent");
    pushed_ = true;
}

Current::~Current() {
    Context popped = nullptr;
    if (pushed_) driver().cuCtxPopCurrent_v2(&popped);
}

}  // namespace fastloop::cuda
