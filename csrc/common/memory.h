// Memory for weights: aligned to a page of 2 MB where that is worth it, so that huge pages can hold it; and scratch space.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastloop {

// Uninitialised bytes, aligned to 64; grows on demand, never shrinks, moves.
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t bytes) { reserve(bytes); }
    ~Buffer() { std::free(data_); }
    Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }

    // At least `bytes`; what was in it is lost if it has to grow.
    void reserve(size_t bytes) {
        if (bytes <= bytes_) return;
        constexpr size_t kHuge = size_t{2} << 20;
        const size_t align = bytes >= 2 * kHuge ? kHuge : 64;
        const size_t rounded = (bytes + align - 1) / align * align;
        void* const fresh = std::aligned_alloc(align, rounded);
        if (fresh == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        if (align == kHuge) madvise(fresh, rounded, MADV_HUGEPAGE);
#endif
        std::free(data_);
        data_ = fresh;
        bytes_ = rounded;
    }

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    size_t bytes() const { return bytes_; }

  private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

// Scratch of one call. Up to 16 MB of it stay with the thread from call to call: fresh pages cost more than many a call computes.
class Scratch {
  public:
    explicit Scratch(size_t bytes) {
        static thread_local Buffer kept;
        Buffer& from = bytes <= kKept ? kept : own_;
        from.reserve(bytes);
        data = from.as<unsigned char>();
    }
    unsigned char* data;

  private:
    static constexpr size_t kKept = size_t{16} << 20;
    Buffer own_;
};

}  // namespace fastloop
