// A CUDA driver without a GPU: it notes what it is asked for, and runs kernels as tests/native/cuda_emulation does.
//
// FASTLOOP_LIBCUDA names it (csrc/cuda/driver.h). An image for it is "\177ELFfake", then the path of an emulation
// library, or nothing, for kernels that are only noted. Device memory is the process's own.
//
//   g++ -std=c++20 -shared -fPIC -Itests/native/cuda_emulation -Icsrc/cuda -Icsrc/common -Icsrc/include
//       tests/native/fake_libcuda.cpp -o libcuda_fake.so -ldl
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"
#include "tensor_map.h"

#define PUBLIC extern "C" __attribute__((visibility("default")))

using namespace fastloop::cuda;

namespace {

struct Parameter {  // as in cuda_emulation/runtime.h
    char code;
    size_t bytes;
};
struct Entry {
    const char* name;
    void (*call)(void**);
    const Parameter* parameters;
};
using Find = const Entry* (*)(const char*);
using Launch = const char* (*)(const char*, const unsigned*, const unsigned*, unsigned, size_t, void**, uint64_t, unsigned);

struct Image {
    Find find = nullptr;
    Launch launch = nullptr;
};
struct FakeKernel {
    Image* image;
    std::string name;
    std::map<int, int> attributes;
};
struct State {
    int devices = 2, major = 9, minor = 0, processors = 132, shared = 232448;
    uint64_t seed = 0;
    std::string log, failing;
    Result failure = SUCCESS;
    std::vector<std::unique_ptr<Image>> images;
    std::vector<std::unique_ptr<FakeKernel>> kernels;
    int retained = 0, loaded = 0;
} state;

thread_local std::vector<int> contexts;  // devices whose contexts are current, innermost last

Context context_of(int device) { return reinterpret_cast<Context>(static_cast<uintptr_t>(device + 1)); }

// The result of a call that may have been told to fail.
Result answer(const char* call) {
    if (state.failing != call) return SUCCESS;
    state.failing.clear();
    return state.failure;
}

void note(const std::string& line) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    state.log += line + "\n";
}

std::string hex(const void* at, size_t bytes) {
    static const char digits[] = "0123456789abcdef";
    std::string text;
    for (size_t i = 0; i < bytes; ++i) {
        const auto byte = static_cast<const unsigned char*>(at)[i];
        text += digits[byte >> 4];
        text += digits[byte & 15];
    }
    return text;
}

std::string list(const unsigned* values) {
    return "[" + std::to_string(values[0]) + ", " + std::to_string(values[1]) + ", " + std::to_string(values[2]) + "]";
}

}  // namespace

// ---- for tests -------------------------------------------------------------------------------------------------------

PUBLIC void fake_cuda_device(int major, int minor, int processors, int shared) {
    state.major = major;
    state.minor = minor;
    state.processors = processors;
    state.shared = shared;
}
PUBLIC void fake_cuda_seed(uint64_t seed) { state.seed = seed; }  // of the order in which threads run
PUBLIC void fake_cuda_fail(const char* call, int result) {        // the next time it is called
    state.failing = call;
    state.failure = result;
}
PUBLIC const char* fake_cuda_log() { return state.log.c_str(); }  // a JSON object a line
PUBLIC void fake_cuda_clear() { state.log.clear(); }
PUBLIC int fake_cuda_retained() { return state.retained; }
PUBLIC int fake_cuda_loaded() { return state.loaded; }
PUBLIC int fake_cuda_current() { return static_cast<int>(contexts.size()); }

// ---- the driver's entry points ---------------------------------------------------------------------------------------

PUBLIC Result cuInit(unsigned) { return answer("cuInit"); }
PUBLIC Result cuGetErrorName(Result result, const char** name) {
    *name = result == NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : result == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE"
            : result == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}
PUBLIC Result cuGetErrorString(Result, const char** text) {
    *text = "as the test wants it";
    return SUCCESS;
}
PUBLIC Result cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}
PUBLIC Result cuDeviceGetCount(int* count) {
    *count = state.devices;
    return answer("cuDeviceGetCount");
}
PUBLIC Result cuDeviceGet(DeviceHandle* device, int ordinal) {
    *device = ordinal;
    return answer("cuDeviceGet");
}
PUBLIC Result cuDeviceGetName(char* name, int bytes, DeviceHandle device) {
    std::snprintf(name, static_cast<size_t>(bytes), "fake GPU %d", device);
    return SUCCESS;
}
PUBLIC Result cuDeviceGetAttribute(int* value, DeviceAttribute which, DeviceHandle) {
    switch (which) {
        case DeviceAttribute::MAJOR: *value = state.major; return SUCCESS;
        case DeviceAttribute::MINOR: *value = state.minor; return SUCCESS;
        case DeviceAttribute::PROCESSORS: *value = state.processors; return SUCCESS;
        case DeviceAttribute::SHARED_OPTIN: *value = state.shared; return SUCCESS;
    }
    return 1;
}
PUBLIC Result cuDevicePrimaryCtxRetain(Context* context, DeviceHandle device) {
    *context = context_of(device);
    ++state.retained;
    return answer("cuDevicePrimaryCtxRetain");
}
PUBLIC Result cuDevicePrimaryCtxRelease_v2(DeviceHandle) {
    --state.retained;
    return SUCCESS;
}
PUBLIC Result cuCtxGetDevice(DeviceHandle* device) {
    if (contexts.empty()) return 201;
    *device = contexts.back();
    return SUCCESS;
}
PUBLIC Result cuCtxGetCurrent(Context* context) {
    *context = contexts.empty() ? nullptr : context_of(contexts.back());
    return SUCCESS;
}
PUBLIC Result cuCtxPushCurrent_v2(Context context) {
    contexts.push_back(static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1);
    return SUCCESS;
}
PUBLIC Result cuCtxPopCurrent_v2(Context* context) {
    if (contexts.empty()) return 201;
    *context = context_of(contexts.back());
    contexts.pop_back();
    return SUCCESS;
}
PUBLIC Result cuLibraryLoadData(Library* library, const void* data, int*, void**, unsigned, int*, void**, unsigned) {
    const Result told = answer("cuLibraryLoadData");
    if (told != SUCCESS) return told;
    static const char magic[] = "\177ELFfake";
    const char* text = static_cast<const char*>(data);
    if (std::memcmp(text, magic, sizeof magic - 1) != 0) return INVALID_IMAGE;
    auto image = std::make_unique<Image>();
    const char* path = text + sizeof magic - 1;
    if (path[0] != '\0') {
        void* kernels = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (kernels == nullptr) return INVALID_IMAGE;
        image->find = reinterpret_cast<Find>(dlsym(kernels, "cuda_emulation_find"));
        image->launch = reinterpret_cast<Launch>(dlsym(kernels, "cuda_emulation_launch"));
    }
    *library = reinterpret_cast<Library>(image.get());
    state.images.push_back(std::move(image));
    ++state.loaded;
    note("{\"load\": " + std::to_string(contexts.empty() ? -1 : contexts.back()) + "}");
    return SUCCESS;
}
PUBLIC Result cuLibraryUnload(Library) {
    --state.loaded;
    return SUCCESS;
}
PUBLIC Result cuLibraryGetKernel(Kernel* kernel, Library library, const char* name) {
    const Result told = answer("cuLibraryGetKernel");
    auto* image = reinterpret_cast<Image*>(library);
    if (told != SUCCESS || (image->find != nullptr && image->find(name) == nullptr)) return told != SUCCESS ? told : NOT_FOUND;
    state.kernels.push_back(std::make_unique<FakeKernel>(FakeKernel{image, name, {}}));
    *kernel = reinterpret_cast<Kernel>(state.kernels.back().get());
    note("{\"kernel\": \"" + std::string(name) + "\"}");
    return SUCCESS;
}
PUBLIC Result cuKernelGetFunction(Function* function, Kernel kernel) {
    *function = reinterpret_cast<Function>(kernel);
    return SUCCESS;
}
PUBLIC Result cuKernelGetAttribute(int* value, KernelAttribute which, Kernel kernel, DeviceHandle) {
    *value = reinterpret_cast<FakeKernel*>(kernel)->attributes[static_cast<int>(which)];
    return SUCCESS;
}
PUBLIC Result cuKernelSetAttribute(KernelAttribute which, int value, Kernel kernel, DeviceHandle) {
    reinterpret_cast<FakeKernel*>(kernel)->attributes[static_cast<int>(which)] = value;
    note("{\"attribute\": " + std::to_string(static_cast<int>(which)) + ", \"value\": " + std::to_string(value) + "}");
    return answer("cuKernelSetAttribute");
}

PUBLIC Result cuLibraryGetKernelCount(unsigned* count, Library library) {
    *count = reinterpret_cast<Image*>(library)->find != nullptr ? 0 : 2;
    return answer("cuLibraryGetKernelCount");
}
PUBLIC Result cuLibraryEnumerateKernels(Kernel* kernels, unsigned count, Library library) {
    for (unsigned i = 0; i < count; ++i) {
        auto made = std::make_unique<FakeKernel>(FakeKernel{reinterpret_cast<Image*>(library), "kernel", {}});
        kernels[i] = reinterpret_cast<Kernel>(made.get());
        state.kernels.push_back(std::move(made));
    }
    return answer("cuLibraryEnumerateKernels");
}
PUBLIC Result cuFuncLoad(Function) {
    note("{\"code\": " + std::to_string(contexts.empty() ? -1 : contexts.back()) + "}");
    return answer("cuFuncLoad");
}
PUBLIC Result cuMemAllocManaged(uint64_t* address, size_t bytes, unsigned) {
    if (contexts.empty()) return 201;
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    *address = reinterpret_cast<uintptr_t>(memory);
    return memory != nullptr ? SUCCESS : 2;
}
PUBLIC Result cuCtxSynchronize() { return contexts.empty() ? 201 : SUCCESS; }

// As a driver does: no context, more shared memory than was allowed, or a wide cluster that was not, is an error.
PUBLIC Result cuLaunchKernelEx(const LaunchConfig* config, Function function, void** parameters, void** extra) {
    const Result told = answer("cuLaunchKernelEx");
    if (told != SUCCESS) return told;
    if (contexts.empty()) return 201;
    auto& kernel = *reinterpret_cast<FakeKernel*>(function);
    const int allowed = kernel.attributes[static_cast<int>(KernelAttribute::MAX_DYNAMIC_SHARED)];
    if (extra != nullptr || config->shared_bytes > (allowed ? static_cast<unsigned>(allowed) : 48u * 1024)) return 1;
    unsigned cluster = 1;
    bool dependent = false;
    for (unsigned i = 0; i < config->attribute_count; ++i) {
        const LaunchAttribute& a = config->attributes[i];
        if (a.id == LaunchAttributeId::CLUSTER_DIMENSION) cluster = a.cluster[0];
        if (a.id == LaunchAttributeId::PROGRAMMATIC_SERIALIZATION) dependent = a.flag != 0;
    }
    if (cluster > 8 && !kernel.attributes[static_cast<int>(KernelAttribute::NON_PORTABLE_CLUSTER)]) return 1;
    std::string values;
    if (const Entry* entry = kernel.image->find != nullptr ? kernel.image->find(kernel.name.c_str()) : nullptr) {
        for (int i = 0; entry->parameters[i].code != '\0'; ++i)
            values += (i ? ", \"" : "\"") + hex(parameters[i], entry->parameters[i].bytes) + "\"";
    }
    note("{\"launch\": \"" + kernel.name + "\", \"device\": " + std::to_string(contexts.back()) + ", \"grid\": " +
         list(config->grid) + ", \"block\": " + list(config->block) + ", \"shared\": " +
         std::to_string(config->shared_bytes) + ", \"cluster\": " + std::to_string(cluster) + ", \"dependent\": " +
         (dependent ? "true" : "false") + ", \"stream\": " + std::to_string(reinterpret_cast<uintptr_t>(config->stream)) +
         ", \"parameters\": [" + values + "]}");
    if (kernel.image->launch == nullptr) return SUCCESS;
    const char* problem = kernel.image->launch(kernel.name.c_str(), config->grid, config->block, cluster,
                                               config->shared_bytes, parameters, state.seed, 2);
    if (problem[0] == '\0') return SUCCESS;
    std::fprintf(stderr, "%s: %s\n", kernel.name.c_str(), problem);
    note("{\"problem\": \"" + kernel.name + "\"}");
    return 719;  // launch failed
}

// The rules of cuTensorMapEncodeTiled that a call here can break: of its matrix, and that a context is current.
PUBLIC Result cuTensorMapEncodeTiled(TensorMap* map, TensorType type, uint32_t rank, void* address, const uint64_t* dims,
                                     const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                     int interleave, Swizzle swizzle, Promotion, int fill) {
    const unsigned itemsize = type == TensorType::UINT8 ? 1 : type == TensorType::FLOAT32 ? 4 : 2;
    const unsigned row_bytes = box[0] * itemsize;
    const bool right = rank == 2 && reinterpret_cast<uintptr_t>(address) % 16 == 0 && strides[0] % 16 == 0 && dims[0] > 0 &&
                       dims[1] > 0 && dims[0] <= 1ull << 32 && dims[1] <= 1ull << 32 && box[0] >= 1 && box[0] <= 256 &&
                       box[1] >= 1 && box[1] <= 256 && row_bytes % 16 == 0 && element_strides[0] == 1 &&
                       element_strides[1] == 1 && interleave == 0 && fill == 0 &&
                       reinterpret_cast<uintptr_t>(map) % 64 == 0 && (swizzle != Swizzle::BYTES_128 || row_bytes <= 128);
    if (!right) return 1;
    if (contexts.empty()) return 201;
    const cuda_emulation::MapFields fields{cuda_emulation::MapFields::kMagic, static_cast<const unsigned char*>(address),
                                           dims[0], dims[1], strides[0], box[0], box[1], itemsize,
                                           static_cast<uint32_t>(swizzle)};
    std::memset(map, 0, sizeof *map);
    std::memcpy(map, &fields, sizeof fields);
    return answer("cuTensorMapEncodeTiled");
}
