// The host side of mel on NVIDIA GPUs.
#include "mel.h"

#include <climits>

#include "launch.h"

namespace fastloop::cuda {
namespace {

constexpr const char* WHERE = "cuda_mel";
constexpr size_t HOP = 160, TAIL = 360, COLUMNS = 201;

void check(const fastloop_cuda_mel_params& p) {
    if (p.samples < HOP || p.samples > INT_MAX / 4)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: samples is %zu; a frame needs %zu, and %d are the most", WHERE, p.samples, HOP,
             INT_MAX / 4);
    if (p.bins > static_cast<size_t>(MEL_BINS))
        fail(FASTLOOP_UNSUPPORTED, "%s: %zu bins; at most %d are", WHERE, p.bins, MEL_BINS);
    if (p.batch > INT_MAX) fail(FASTLOOP_BAD_ARGUMENT, "%s: a batch of %zu", WHERE, p.batch);
    if (p.edge != FASTLOOP_EDGE_REFLECT && p.edge != FASTLOOP_EDGE_WAIT)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: edge is %d; choose from fastloop_mel_edge", WHERE, p.edge);
    if (p.clamp != FASTLOOP_CLAMP_RUNNING && p.clamp != FASTLOOP_CLAMP_GLOBAL)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: clamp is %d; choose from fastloop_mel_clamp", WHERE, p.clamp);
    need(WHERE, "pcm", p.pcm);
    need(WHERE, "slots", p.slots);
    need(WHERE, "tail", p.tail);
    need(WHERE, "peak", p.peak);
    need(WHERE, "seen", p.seen);
    if (p.bins > 0) {
        need(WHERE, "filters", p.filters);
        need(WHERE, "bands", p.bands);
        need(WHERE, "frames", p.frames);
    }
    apart(WHERE, "pcm", p.batch, p.samples, p.pcm_stride);
    addressable(WHERE, "pcm", p.batch, p.batch > 1 ? p.pcm_stride : p.samples, sizeof(float));
    addressable(WHERE, "tail", p.slot_count, TAIL, sizeof(float));
    addressable(WHERE, "filters", p.bins, COLUMNS, sizeof(float));
    if (p.samples / HOP * p.bins > INT_MAX / 2)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: %zu frames of %zu bins", WHERE, p.samples / HOP, p.bins);
    addressable(WHERE, "frames", p.batch, p.samples / HOP * p.bins, sizeof(float));
}

}  // namespace
}  // namespace fastloop::cuda

extern "C" fastloop_status fastloop_cuda_mel(const fastloop_cuda_mel_params* params) {
    using namespace fastloop;
    return guarded(cuda::WHERE, [&] {
        const auto p = adopt(cuda::WHERE, params);
        cuda::Module& module = cuda::module_of(cuda::WHERE, p.module);
        if (p.batch == 0) return;
        cuda::check(p);
        const MelParams k{p.pcm,    reinterpret_cast<const long long*>(p.slots), p.tail, p.peak,
                          reinterpret_cast<long long*>(p.seen), p.filters, p.bands, p.frames,
                          static_cast<long long>(p.pcm_stride), static_cast<int>(p.samples), static_cast<int>(p.bins),
                          p.edge == FASTLOOP_EDGE_WAIT, p.clamp == FASTLOOP_CLAMP_RUNNING};
        const cuda::Shape shape{{static_cast<unsigned>(p.batch), 1, 1}, MEL_THREADS, MEL_SHARED_BYTES, 1,
                                p.dependent != 0 && module.device().major >= 9};
        module.launch("mel", shape, p.stream, k);
    });
}
