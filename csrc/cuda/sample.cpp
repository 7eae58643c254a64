// The host side of sample on NVIDIA GPUs: how many blocks share a row.
#include "sample.h"

#include <climits>
#include <string>

#include "dtypes.h"
#include "launch.h"

namespace fastloop::cuda {
namespace {

constexpr const char* WHERE = "cuda_sample";
using Params = fastloop_cuda_sample_params;

void check(const Params& p) {
    check_wide(WHERE, p.dtype);
    if (p.vocab < 1 || p.vocab > 1 << 30)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: vocab is %zu; there must be from 1 to 2^30 tokens", WHERE, p.vocab);
    if (p.rows > INT_MAX / 8) fail(FASTLOOP_BAD_ARGUMENT, "%s: %zu rows", WHERE, p.rows);
    const size_t itemsize = bytes_of(WHERE, p.dtype);
    need(WHERE, "logits", p.logits, itemsize);
    need(WHERE, "banned", p.banned);
    need(WHERE, "phase", p.phase);
    need(WHERE, "temperature", p.temperature);
    need(WHERE, "top_k", p.top_k);
    need(WHERE, "top_p", p.top_p);
    need(WHERE, "seed", p.seed);
    need(WHERE, "counter", p.counter);
    need(WHERE, "tokens", p.tokens);
    apart(WHERE, "logits", p.rows, p.vocab, p.logits_stride);
    addressable(WHERE, "logits", p.rows, p.rows > 1 ? p.logits_stride : p.vocab, itemsize);
}

// Blocks that share a row: 4,096 logits each are a microsecond's reading for a processor; no more than a cluster.
unsigned team(size_t vocab, const Device& device) {
    unsigned blocks = 1;
    while (device.major >= 9 && blocks < 8 && blocks * 4096 < vocab) blocks *= 2;
    return blocks;
}

// Whether a thread may read eight logits, and their bans, at once.
bool aligned(const Params& p) {
    const size_t itemsize = bytes_of(WHERE, p.dtype);
    return reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && (p.rows < 2 || p.logits_stride * itemsize % 16 == 0) &&
           reinterpret_cast<uintptr_t>(p.banned) % 8 == 0 && p.vocab % 8 == 0;
}

const long long* wide(const int64_t* values) { return reinterpret_cast<const long long*>(values); }

}  // namespace
}  // namespace fastloop::cuda

extern "C" fastloop_status fastloop_cuda_sample(const fastloop_cuda_sample_params* params) {
    using namespace fastloop;
    using cuda::wide;
    return guarded(cuda::WHERE, [&] {
        const auto p = adopt(cuda::WHERE, params);
        cuda::Module& module = cuda::module_of(cuda::WHERE, p.module);
        if (p.rows == 0) return;
        cuda::check(p);
        const cuda::Device& device = module.device();
        const unsigned blocks = cuda::team(p.vocab, device);
        const size_t slice = ((p.vocab + blocks - 1) / blocks + 7) / 8 * 8;
        const bool held = SAMPLE_FIXED_BYTES + 4 * slice + 1024 <= device.shared_bytes;
        const SampleParams k{p.logits,
                             p.banned,
                             wide(p.phase),
                             p.temperature,
                             wide(p.top_k),
                             p.top_p,
                             wide(p.seed),
                             wide(p.counter),
                             reinterpret_cast<long long*>(p.tokens),
                             static_cast<long long>(p.logits_stride),
                             static_cast<int>(p.vocab),
                             static_cast<int>(slice),
                             held,
                             cuda::aligned(p)};
        const cuda::Shape shape{{static_cast<unsigned>(p.rows) * blocks, 1, 1}, SAMPLE_THREADS,
                                static_cast<unsigned>(SAMPLE_FIXED_BYTES + (held ? 4 * slice : 0)), blocks,
                                p.dependent != 0 && device.major >= 9};
        module.launch((std::string("sample_") + cuda::name_of(cuda::WHERE, p.dtype)).c_str(), shape, p.stream, k);
    });
}
