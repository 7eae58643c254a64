// Errors on the host side of the ABI: thrown as Error inside, turned into a status and a message at its edge.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

#include "fastloop.h"

namespace fastloop {

struct Error {
    fastloop_status status;
    std::string message;
};

// Stores the message for fastloop_last_error(); returns the status.
fastloop_status report(fastloop_status status, const char* message) noexcept;

template <class... Values>
[[noreturn]] void fail(fastloop_status status, const char* format, Values... values) {
    char text[512];
    std::snprintf(text, sizeof text, format, values...);
    throw Error{status, text};
}

// Runs the body of an ABI function: no exception leaves it.
template <class Body>
fastloop_status guarded(const char* where, Body&& body) noexcept {
    try {
        std::forward<Body>(body)();
        return FASTLOOP_OK;
    } catch (const Error& error) {
        return report(error.status, error.message.c_str());
    } catch (const std::exception& error) {
        return report(FASTLOOP_UNSUPPORTED, (std::string(where) + ": " + error.what()).c_str());
    }
}

// The caller's struct, widened with zeros to what this library knows.
template <class Params>
Params adopt(const char* where, const Params* params) {
    Params own;
    std::memset(&own, 0, sizeof own);
    if (params == nullptr) fail(FASTLOOP_BAD_ARGUMENT, "%s: params is NULL", where);
    if (params->struct_size < sizeof params->struct_size || params->struct_size > sizeof own)
        fail(FASTLOOP_UNSUPPORTED, "%s: struct_size is %zu, this library knows %zu; set it to sizeof(params) of the "
             "header that belongs to it", where, params->struct_size, sizeof own);
    std::memcpy(&own, params, params->struct_size);
    return own;
}

// A pointer must be there, and to numbers aligned as these must be.
inline void need(const char* where, const char* name, const void* pointer, size_t align = 1) {
    if (pointer == nullptr) fail(FASTLOOP_BAD_ARGUMENT, "%s: %s is NULL", where, name);
    if (reinterpret_cast<uintptr_t>(pointer) % align != 0)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: %s is not aligned to %zu bytes", where, name, align);
}
template <class T>
    requires std::is_arithmetic_v<T>
void need(const char* where, const char* name, const T* pointer) {
    need(where, name, pointer, alignof(T));
}
template <class T>
    requires std::is_arithmetic_v<T>
void aligned(const char* where, const char* name, const T* pointer) {
    if (pointer != nullptr) need(where, name, pointer);
}

// Rows of `width` elements, `stride` apart, do not lie in each other.
inline void apart(const char* where, const char* name, size_t rows, size_t width, size_t stride) {
    if (rows > 1 && stride < width)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: rows of %s are %zu apart and %zu wide", where, name, stride, width);
}

// rows x columns x itemsize bytes must be addressable.
inline void addressable(const char* where, const char* name, size_t rows, size_t columns, size_t itemsize) {
    size_t bytes = 0;
    if (__builtin_mul_overflow(rows, columns, &bytes) || __builtin_mul_overflow(bytes, itemsize, &bytes) ||
        bytes > PTRDIFF_MAX)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: %s of %zu x %zu elements is larger than memory", where, name, rows, columns);
}

}  // namespace fastloop
