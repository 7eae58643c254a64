#include "launch.h"

#include <cstring>
#include <vector>

struct fastloop_cuda_module {
    fastloop::cuda::Module module;
};

namespace fastloop::cuda {
namespace {

int attribute(DeviceAttribute which, DeviceHandle device) {
    int value = 0;
    must(driver().cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
}

void check_shape(const char* name, const Shape& shape, const Device& device) {
    const bool modern = device.major >= 9;
    if (shape.threads == 0 || shape.threads > 1024)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: blocks of %u threads", name, shape.threads);
    if (shape.grid[1] > 65535 || shape.grid[2] > 65535 || shape.grid[0] > 0x7fffffffu)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: a grid of %u x %u x %u blocks", name, shape.grid[0], shape.grid[1], shape.grid[2]);
    if (shape.shared_bytes > device.shared_bytes)
        fail(FASTLOOP_UNSUPPORTED, "%s: needs %u bytes of shared memory, this GPU has %u", name, shape.shared_bytes,
             device.shared_bytes);
    if (shape.cluster == 0 || shape.cluster > 16 || shape.grid[0] % shape.cluster != 0)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: clusters of %u in a grid %u wide", name, shape.cluster, shape.grid[0]);
    if ((shape.cluster > 1 || shape.dependent) && !modern)
        fail(FASTLOOP_UNSUPPORTED, "%s: clusters and dependent launches need sm_90, this GPU is sm_%d%d", name,
             device.major, device.minor);
}

}  // namespace

Device describe(int ordinal) {
    int count = 0;
    must(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
    if (ordinal < 0 || ordinal >= count)
        fail(FASTLOOP_BAD_ARGUMENT, "CUDA device %d: there are %d here", ordinal, count);
    Device device{};
    must(driver().cuDeviceGet(&device.handle, ordinal), "cuDeviceGet");
    device.major = attribute(DeviceAttribute::MAJOR, device.handle);
    device.minor = attribute(DeviceAttribute::MINOR, device.handle);
    device.processors = attribute(DeviceAttribute::PROCESSORS, device.handle);
    device.shared_bytes = static_cast<unsigned>(attribute(DeviceAttribute::SHARED_OPTIN, device.handle));
    return device;
}

// The driver looks the address up in the current context: a thread may have none.
TensorMap Module::tensor_map(const char* where, const TensorRows& r) const {
    if (reinterpret_cast<uintptr_t>(r.address) % 16 != 0 || r.stride_bytes % 16 != 0)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: a matrix must begin at a multiple of 16 bytes and its rows be such a multiple "
             "apart", where);
    const uint64_t dims[2] = {r.width, r.rows}, strides[1] = {r.stride_bytes};
    const uint32_t box[2] = {r.box_width, r.box_rows}, ones[2] = {1, 1};
    TensorMap map{};
    const Current current(device_.handle, primary_);
    const Result made = driver().cuTensorMapEncodeTiled(&map, r.type, 2, const_cast<void*>(r.address), dims, strides, box,
                                                        ones, 0, r.swizzle, r.promotion, 0);
    if (made != SUCCESS) must(made, (std::string(where) + ": cuTensorMapEncodeTiled").c_str());
    return map;
}

Module::Module(int ordinal, const void* image) : device_(describe(ordinal)) {
    const Driver& d = driver();
    must(d.cuDevicePrimaryCtxRetain(&primary_, device_.handle), "cuDevicePrimaryCtxRetain");
    try {
        const Current current(device_.handle, primary_);
        must(d.cuLibraryLoadData(&library_, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
        load_code();
    } catch (...) {
        if (library_ != nullptr) d.cuLibraryUnload(library_);
        d.cuDevicePrimaryCtxRelease_v2(device_.handle);
        throw;
    }
}

// All kernels at once. A driver would load each with its first launch, and that may fall into a capture, where it is an
// error: which kernel of an op runs depends on the number of rows.
void Module::load_code() const {
    const Driver& d = driver();
    if (d.cuLibraryGetKernelCount == nullptr || d.cuLibraryEnumerateKernels == nullptr || d.cuFuncLoad == nullptr) return;
    unsigned count = 0;
    must(d.cuLibraryGetKernelCount(&count, library_), "cuLibraryGetKernelCount");
    std::vector<Kernel> kernels(count);
    must(d.cuLibraryEnumerateKernels(kernels.data(), count, library_), "cuLibraryEnumerateKernels");
    for (const Kernel kernel : kernels) {
        Function function = nullptr;
        must(d.cuKernelGetFunction(&function, kernel), "cuKernelGetFunction");
        must(d.cuFuncLoad(function), "cuFuncLoad");
    }
}

// When the process ends, the driver may be gone first: what it then says is of no use to anybody.
Module::~Module() {
    const Driver& d = driver();
    d.cuLibraryUnload(library_);
    d.cuDevicePrimaryCtxRelease_v2(device_.handle);
}

Kernel Module::prepared(const char* name, const Shape& shape) {
    const Driver& d = driver();
    const std::lock_guard lock(mutex_);
    auto found = entries_.find(name);
    if (found == entries_.end()) {
        Entry entry;
        const Result result = d.cuLibraryGetKernel(&entry.kernel, library_, name);
        if (result == NOT_FOUND) fail(FASTLOOP_UNSUPPORTED, "the image has no kernel %s: it is of other sources", name);
        must(result, "cuLibraryGetKernel");
        found = entries_.emplace(name, entry).first;
    }
    Entry& entry = found->second;
    if (shape.shared_bytes > entry.shared_bytes) {
        must(d.cuKernelSetAttribute(KernelAttribute::MAX_DYNAMIC_SHARED, static_cast<int>(shape.shared_bytes),
                                    entry.kernel, device_.handle), "cuKernelSetAttribute (shared memory)");
        entry.shared_bytes = shape.shared_bytes;
    }
    if (shape.cluster > 8 && !entry.wide_cluster) {
        must(d.cuKernelSetAttribute(KernelAttribute::NON_PORTABLE_CLUSTER, 1, entry.kernel, device_.handle),
             "cuKernelSetAttribute (cluster)");
        entry.wide_cluster = true;
    }
    return entry.kernel;
}

void Module::start(const char* name, const Shape& shape, void* stream, void** parameters) {
    if (shape.grid[0] == 0 || shape.grid[1] == 0 || shape.grid[2] == 0) return;
    check_shape(name, shape, device_);
    const Current current(device_.handle, primary_);
    const Kernel kernel = prepared(name, shape);
    LaunchAttribute attributes[2];
    std::memset(attributes, 0, sizeof attributes);
    LaunchConfig config{{shape.grid[0], shape.grid[1], shape.grid[2]}, {shape.threads, 1, 1}, shape.shared_bytes,
                        static_cast<Stream>(stream), attributes, 0};
    if (shape.cluster > 1) {
        LaunchAttribute& a = attributes[config.attribute_count++];
        a.id = LaunchAttributeId::CLUSTER_DIMENSION;
        a.cluster[0] = shape.cluster;
        a.cluster[1] = a.cluster[2] = 1;
    }
    if (shape.dependent) {
        LaunchAttribute& a = attributes[config.attribute_count++];
        a.id = LaunchAttributeId::PROGRAMMATIC_SERIALIZATION;
        a.flag = 1;
    }
    // The driver takes a context-independent kernel in place of a function.
    const Result result =
        driver().cuLaunchKernelEx(&config, reinterpret_cast<Function>(kernel), parameters, nullptr);
    if (result != SUCCESS) must(result, (std::string(name) + ": cuLaunchKernelEx").c_str());
}

Module& module_of(const char* where, fastloop_cuda_module* handle) {
    if (handle == nullptr) fail(FASTLOOP_BAD_ARGUMENT, "%s: module is NULL", where);
    return handle->module;
}

}  // namespace fastloop::cuda

using namespace fastloop;

extern "C" fastloop_status fastloop_cuda_device_count(int32_t* count) {
    return guarded("cuda_device_count", [&] {
        need("cuda_device_count", "count", count);
        int found = 0;
        cuda::must(cuda::driver().cuDeviceGetCount(&found), "cuDeviceGetCount");
        *count = found;
    });
}

extern "C" fastloop_status fastloop_cuda_describe(int32_t device, fastloop_cuda_device* description) {
    return guarded("cuda_describe", [&] {
        fastloop_cuda_device own = adopt("cuda_describe", description);
        const cuda::Device found = cuda::describe(device);
        own.major = found.major;
        own.minor = found.minor;
        own.processors = found.processors;
        own.shared_bytes = found.shared_bytes;
        cuda::must(cuda::driver().cuDeviceGetName(own.name, sizeof own.name, found.handle), "cuDeviceGetName");
        std::memcpy(description, &own, own.struct_size);
    });
}

extern "C" fastloop_status fastloop_cuda_module_create(const fastloop_cuda_module_params* params,
                                                       fastloop_cuda_module** module) {
    return guarded("cuda_module_create", [&] {
        const auto p = adopt("cuda_module_create", params);
        need("cuda_module_create", "module", module);
        need("cuda_module_create", "image", p.image);
        if (p.image_bytes < 16) fail(FASTLOOP_BAD_ARGUMENT, "cuda_module_create: an image of %zu bytes", p.image_bytes);
        // ELF (a cubin) or a fat binary: the driver is not asked to guess at anything else, it has no size to stop at.
        const auto* bytes = static_cast<const unsigned char*>(p.image);
        const bool cubin = std::memcmp(bytes, "\177ELF", 4) == 0;
        const bool fat = bytes[0] == 0x50 && bytes[1] == 0xed && bytes[2] == 0x55 && bytes[3] == 0xba;
        if (!cubin && !fat)
            fail(FASTLOOP_BAD_ARGUMENT, "cuda_module_create: the image is neither a cubin nor a fat binary");
        *module = new fastloop_cuda_module{{p.device, p.image}};
    });
}

extern "C" void fastloop_cuda_module_destroy(fastloop_cuda_module* module) { delete module; }
