// The host side of decide on NVIDIA GPUs.
#include "decide.h"

#include <algorithm>
#include <climits>
#include <string>

#include "dtypes.h"
#include "launch.h"

namespace fastloop::cuda {
namespace {

constexpr const char* WHERE = "cuda_decide";
using Params = fastloop_cuda_decide_params;

void check(const Params& p, const Device& device) {
    check_wide(WHERE, p.dtype);
    if (p.width == 0 || p.width > INT_MAX / 2) fail(FASTLOOP_BAD_ARGUMENT, "%s: width is %zu", WHERE, p.width);
    const size_t most = (device.shared_bytes - 1024) / DECIDE_ROW_BYTES;
    if (p.rows > most)
        fail(FASTLOOP_UNSUPPORTED, "%s: %zu rows, this GPU takes %zu in one call", WHERE, p.rows, most);
    const size_t itemsize = bytes_of(WHERE, p.dtype);
    need(WHERE, "x", p.x, itemsize);
    need(WHERE, "norm_weight", p.norm_weight, itemsize);
    need(WHERE, "head", p.head, itemsize);
    need(WHERE, "slots", p.slots);
    need(WHERE, "policy", p.policy);
    need(WHERE, "state", p.state);
    need(WHERE, "p_respond", p.p_respond);
    need(WHERE, "decision", p.decision);
    apart(WHERE, "x", p.rows, p.width, p.x_stride);
    addressable(WHERE, "x", p.rows, p.rows > 1 ? p.x_stride : p.width, itemsize);
    if (p.slot_count > INT_MAX) fail(FASTLOOP_BAD_ARGUMENT, "%s: %zu slots", WHERE, p.slot_count);
}

bool aligned(const Params& p) {
    const size_t itemsize = bytes_of(WHERE, p.dtype);
    const auto at_16 = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
    return p.width * itemsize % 16 == 0 && (p.rows < 2 || p.x_stride * itemsize % 16 == 0) && at_16(p.x) &&
           at_16(p.norm_weight) && at_16(p.head);
}

// One block for every warp's worth of rows, up to a cluster.
unsigned team(const Params& p, const Device& device) {
    const size_t warps = DECIDE_THREADS / 32;
    return device.major < 9 ? 1 : static_cast<unsigned>(std::clamp<size_t>((p.rows + warps - 1) / warps, 1, 8));
}

}  // namespace
}  // namespace fastloop::cuda

extern "C" fastloop_status fastloop_cuda_decide(const fastloop_cuda_decide_params* params) {
    using namespace fastloop;
    return guarded(cuda::WHERE, [&] {
        const auto p = adopt(cuda::WHERE, params);
        cuda::Module& module = cuda::module_of(cuda::WHERE, p.module);
        if (p.rows == 0) return;
        cuda::check(p, module.device());
        const DecideParams k{p.x,
                             p.norm_weight,
                             p.head,
                             reinterpret_cast<const long long*>(p.slots),
                             p.policy,
                             p.state,
                             p.p_respond,
                             p.decision,
                             static_cast<long long>(p.x_stride),
                             p.eps,
                             static_cast<int>(p.rows),
                             static_cast<int>(p.width),
                             cuda::aligned(p)};
        const unsigned blocks = cuda::team(p, module.device());
        const cuda::Shape shape{{blocks, 1, 1}, DECIDE_THREADS, static_cast<unsigned>(p.rows) * DECIDE_ROW_BYTES, blocks,
                                p.dependent != 0 && module.device().major >= 9};
        module.launch((std::string("decide_") + cuda::name_of(cuda::WHERE, p.dtype)).c_str(), shape, p.stream, k);
    });
}
