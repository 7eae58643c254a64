// How a CUDA kernel is started. No other file here calls the driver's launch.
//
// A module is the image of one csrc/cuda/X.cu (a cubin or a fat binary) on one device. Its kernels are found by name,
// once; their attributes are set when a launch first needs them. A launch neither allocates on the device nor waits for
// it, so it may be captured into a graph. Code is loaded with the module (under a driver before 12.4 with the first launch
// of each kernel, which must come before a capture then).
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "driver.h"
#include "fastloop_cuda.h"

namespace fastloop::cuda {

// What plans ask of a device.
struct Device {
    DeviceHandle handle;
    int major, minor;
    int processors;           // streaming multiprocessors
    unsigned shared_bytes;    // the most that one block may have
};

// How many blocks of how many threads, and what they share.
struct Shape {
    unsigned grid[3];
    unsigned threads;         // of a block
    unsigned shared_bytes = 0;  // dynamic
    unsigned cluster = 1;     // blocks, along x; more than one: sm_90 and newer
    bool dependent = false;   // may start before the kernel in front of it has ended (programmatic dependent launch):
                              // sm_90 and newer, and for kernels that wait by griddepcontrol
};

struct TensorRows {
    TensorType type;
    unsigned itemsize;
    const void* address;      // 16-byte aligned
    uint64_t rows, width;     // elements; outside them, zeros are read
    uint64_t stride_bytes;    // a multiple of 16
    unsigned box_rows, box_width;
    Swizzle swizzle;
    Promotion promotion = Promotion::BYTES_256;
};

class Module {
  public:
    // Error if the device does not exist or the image holds no code for it.
    Module(int ordinal, const void* image);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    const Device& device() const { return device_; }

    // A [rows, width] matrix of this device for TMA loads of [box_rows, box_width].
    TensorMap tensor_map(const char* where, const TensorRows& rows) const;

    // Starts kernel `name` on `stream` with parameters exactly of the types of its signature. An empty grid starts
    // nothing.
    template <class... Parameters>
    void launch(const char* name, const Shape& shape, void* stream, const Parameters&... parameters) {
        void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))..., nullptr};
        start(name, shape, stream, addresses);
    }

  private:
    struct Entry {
        Kernel kernel = nullptr;
        unsigned shared_bytes = 48 * 1024;  // allowed without asking
        bool wide_cluster = false;          // more than 8 blocks allowed
    };

    void load_code() const;
    void start(const char* name, const Shape& shape, void* stream, void** parameters);
    Kernel prepared(const char* name, const Shape& shape);

    Device device_{};
    Context primary_ = nullptr;
    Library library_ = nullptr;
    std::mutex mutex_;
    std::map<std::string, Entry, std::less<>> entries_;
};

Device describe(int ordinal);

// The module of a caller's handle, which must be there.
Module& module_of(const char* where, fastloop_cuda_module* handle);

}  // namespace fastloop::cuda
