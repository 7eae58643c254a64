// The host side of linear on NVIDIA GPUs: which kernel of linear.cu, how many blocks, where the depth is split.
#include "linear.h"

#include <algorithm>
#include <climits>
#include <string>

#include "launch.h"

namespace fastloop::cuda {
namespace {

constexpr const char* WHERE = "cuda_linear";
constexpr size_t LEAST_STEPS = 2;  // of a split: stages of the ring
constexpr size_t MOST_WGMMA = 8;   // blocks of a cluster that every GPU of sm_90 takes
constexpr size_t MOST_MMA = 16;
constexpr size_t COUNTERS = 4096;  // in front of a workspace, however many are used: calls of all sizes share it

struct Plan {
    bool wgmma;
    unsigned row_block;   // rows a block computes
    unsigned tiles, row_blocks, splits;
    size_t workspace_bytes;
};

constexpr size_t up(size_t value, size_t by) { return (value + by - 1) / by; }
bool multiple(const void* address, size_t of) { return reinterpret_cast<uintptr_t>(address) % of == 0; }

// A block for every processor, so that all of them read; no range shorter than LEAST_STEPS. Out projection of 3B dims on
// 132 processors: 16 tiles, 32 steps: 8 ranges, 128 blocks; gate and up: 172 tiles, 1.
unsigned choose_splits(size_t tiles, size_t steps, size_t processors, size_t most) {
    size_t splits = 1;
    if (tiles > COUNTERS) return 1;
    while (2 * splits <= most && tiles * splits < processors && steps >= 2 * splits * LEAST_STEPS) splits *= 2;
    return static_cast<unsigned>(splits);
}

bool plain(const fastloop_cuda_linear_params& p) { return p.weight_format == FASTLOOP_CUDA_WEIGHTS_BFLOAT16; }

bool aligned(const fastloop_cuda_linear_params& p) {
    const bool weights = !plain(p) || (multiple(p.weight, 16) && p.weight_stride % 8 == 0);
    return weights && multiple(p.x, 16) && (p.rows <= 1 || p.x_stride % 8 == 0);
}

bool paired(const fastloop_cuda_linear_params& p, size_t width) {
    return width % 2 == 0 && multiple(p.out, 4) && multiple(p.bias, 4) && multiple(p.residual, 4) && p.out_stride % 2 == 0 &&
           p.residual_stride % 2 == 0;
}

size_t width_of(const fastloop_cuda_linear_params& p) { return p.gated ? p.out_rows / 2 : p.out_rows; }

// Weights that are widened on their way: whole pieces of 16 bytes, and their scales.
void check_quantised(const fastloop_cuda_linear_params& p) {
    const bool int4 = p.weight_format == FASTLOOP_CUDA_WEIGHTS_INT4;
    if (!int4 && p.weight_format != FASTLOOP_CUDA_WEIGHTS_FLOAT8)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: weight_format is %d", WHERE, p.weight_format);
    if (int4 && p.group != 32 && p.group != 64)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: groups of %zu; 32 and 64 are known", WHERE, p.group);
    const size_t by = int4 ? p.group : 16;
    if (p.in % by) fail(FASTLOOP_BAD_ARGUMENT, "%s: %zu inputs are no multiple of %zu", WHERE, p.in, by);
    need(WHERE, "weight", p.weight, 16);
    need(WHERE, "scale", p.scale, int4 ? 2 : 4);
    if (p.weight_stride % 16 || p.weight_stride < (int4 ? p.in / 2 : p.in))
        fail(FASTLOOP_BAD_ARGUMENT, "%s: rows of weight are %zu bytes apart; a multiple of 16 and no less than a row is "
             "needed", WHERE, p.weight_stride);
}

void check(const fastloop_cuda_linear_params& p) {
    const size_t width = width_of(p);
    if (p.rows == 0) return;
    if (p.in == 0 || p.out_rows == 0) fail(FASTLOOP_BAD_ARGUMENT, "%s: weights of [%zu, %zu]", WHERE, p.out_rows, p.in);
    for (const size_t size : {p.rows, p.in, p.out_rows})
        if (size > INT_MAX / 2) fail(FASTLOOP_BAD_ARGUMENT, "%s: a size of %zu", WHERE, size);
    if (p.gated != 0 && p.gated != 1) fail(FASTLOOP_BAD_ARGUMENT, "%s: gated is %d", WHERE, p.gated);
    if (p.gated && p.out_rows % 2) fail(FASTLOOP_BAD_ARGUMENT, "%s: %zu rows of [gate; up]", WHERE, p.out_rows);
    if (p.epilogue != FASTLOOP_NONE && (p.gated || p.epilogue != FASTLOOP_GELU))
        fail(FASTLOOP_BAD_ARGUMENT, "%s: epilogue %d%s", WHERE, p.epilogue, p.gated ? " of gated weights" : "");
    need(WHERE, "x", p.x, 2);
    if (plain(p)) {
        need(WHERE, "weight", p.weight, 2);
        apart(WHERE, "weight", p.out_rows, p.in, p.weight_stride);
    } else {
        check_quantised(p);
    }
    need(WHERE, "out", p.out, 2);
    if (p.bias != nullptr) need(WHERE, "bias", p.bias, 2);
    if (p.residual != nullptr) need(WHERE, "residual", p.residual, 2);
    apart(WHERE, "x", p.rows, p.in, p.x_stride);
    apart(WHERE, "out", p.rows, width, p.out_stride);
    if (p.residual != nullptr) apart(WHERE, "residual", p.rows, width, p.residual_stride);
    addressable(WHERE, "x", p.rows, p.x_stride, 2);
    addressable(WHERE, "weight", p.out_rows, p.weight_stride, 2);
    addressable(WHERE, "out", p.rows, p.out_stride, 2);
    addressable(WHERE, "residual", p.rows, p.residual_stride, 2);
}

Plan plan(const fastloop_cuda_linear_params& p, const Device& device) {
    Plan made{};
    made.wgmma = device.major == 9 && plain(p) && aligned(p);
    made.row_block = p.rows <= 8 ? 8 : p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : 64;
    made.tiles = static_cast<unsigned>(up(width_of(p), p.gated ? LINEAR_CHANNELS / 2 : LINEAR_CHANNELS));
    made.row_blocks = static_cast<unsigned>(up(p.rows, made.row_block));
    const size_t steps = up(p.in, static_cast<size_t>(linear_depth(p.weight_format)));
    const size_t most = made.wgmma ? MOST_WGMMA : MOST_MMA;
    const size_t blocks = static_cast<size_t>(made.tiles) * made.row_blocks;
    if (p.splits < 0 || static_cast<size_t>(p.splits) > most)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: splits is %d, at most %zu are", WHERE, p.splits, most);
    made.splits = p.splits ? static_cast<unsigned>(p.splits)
                           : choose_splits(blocks, steps, static_cast<size_t>(device.processors), most);
    if (!made.wgmma && made.splits > 1) {
        if (blocks > COUNTERS)
            fail(FASTLOOP_BAD_ARGUMENT, "%s: splits is %d for %zu blocks, more than %zu are not split", WHERE, p.splits,
                 blocks, COUNTERS);
        const size_t sums = static_cast<size_t>(made.row_block) * LINEAR_CHANNELS * sizeof(float);
        addressable(WHERE, "workspace", blocks * made.splits, sums, 1);
        made.workspace_bytes = COUNTERS * sizeof(unsigned) + blocks * made.splits * sums;
    }
    return made;
}

LinearParams kernel_params(const fastloop_cuda_linear_params& p, const Plan& plan) {
    LinearParams k{};
    k.x = p.x;
    k.weight = p.weight;
    k.scale = p.scale;
    k.bias = p.bias;
    k.residual = p.residual;
    k.out = p.out;
    if (plan.workspace_bytes) {
        k.arrived = static_cast<unsigned*>(p.workspace);
        k.partial = reinterpret_cast<float*>(k.arrived + COUNTERS);
    }
    k.x_stride = static_cast<long long>(p.x_stride);
    k.weight_stride = static_cast<long long>(p.weight_stride);
    k.residual_stride = static_cast<long long>(p.residual_stride);
    k.out_stride = static_cast<long long>(p.out_stride);
    k.rows = static_cast<int>(p.rows);
    k.depth = static_cast<int>(p.in);
    k.width = static_cast<int>(width_of(p));
    k.format = p.weight_format;
    k.group = static_cast<int>(p.group);
    k.epilogue = p.gated ? LINEAR_GATE : p.epilogue == FASTLOOP_GELU ? LINEAR_GELU : LINEAR_NONE;
    k.splits = static_cast<int>(plan.splits);
    k.aligned = aligned(p);
    k.scales_aligned = p.group == 32 && p.in % 256 == 0 && multiple(p.scale, 16);
    k.paired = paired(p, width_of(p));
    return k;
}

TensorMap map_of(const Module& module, const char* what, const void* address, size_t rows, size_t width, size_t stride,
                 unsigned box_rows) {
    return module.tensor_map((std::string(WHERE) + ": " + what).c_str(),
                             {TensorType::BFLOAT16, 2, address, rows, width, stride * 2, box_rows,
                              static_cast<unsigned>(linear_depth(LINEAR_BF16)), Swizzle::BYTES_128});
}

void launch(Module& module, const fastloop_cuda_linear_params& p, const Plan& plan) {
    const int rows = static_cast<int>(plan.row_block);
    const LinearParams k = kernel_params(p, plan);
    static const char* const NAMES[] = {"linear_mma_", "linear_e4m3_", "linear_int4_"};
    const std::string name = (plan.wgmma ? "linear_wgmma_" : NAMES[p.weight_format]) + std::to_string(rows);
    Shape shape{};
    shape.dependent = p.dependent != 0 && module.device().major >= 9;
    if (plan.wgmma) {
        // One row is no stride apart from anything; the map wants a multiple of 16 bytes even then.
        const size_t x_stride = p.rows > 1 ? p.x_stride : up(p.in, 8) * 8;
        const TensorMap weight =
            map_of(module, "weight", p.weight, p.out_rows, p.in, p.weight_stride, LINEAR_CHANNELS / 2);
        const TensorMap x = map_of(module, "x", p.x, p.rows, p.in, x_stride, plan.row_block);
        shape = {{plan.tiles * plan.splits, plan.row_blocks, 1}, LINEAR_WGMMA_THREADS,
                 static_cast<unsigned>(linear_wgmma_shared(rows)), plan.splits, shape.dependent};
        module.launch(name.c_str(), shape, p.stream, weight, x, k);
    } else {
        shape = {{plan.tiles, plan.row_blocks, plan.splits}, LINEAR_MMA_THREADS,
                 static_cast<unsigned>(linear_mma_shared(rows, p.weight_format)), 1, shape.dependent};
        module.launch(name.c_str(), shape, p.stream, k);
    }
}

}  // namespace
}  // namespace fastloop::cuda

using namespace fastloop;

extern "C" fastloop_status fastloop_cuda_linear(const fastloop_cuda_linear_params* params) {
    return guarded("cuda_linear", [&] {
        const auto p = adopt(cuda::WHERE, params);
        cuda::Module& module = cuda::module_of(cuda::WHERE, p.module);
        cuda::check(p);
        if (p.rows == 0) return;
        const cuda::Plan plan = cuda::plan(p, module.device());
        if (plan.workspace_bytes) {
            need(cuda::WHERE, "workspace", p.workspace, 256);
            if (p.workspace_bytes < plan.workspace_bytes)
                fail(FASTLOOP_BAD_ARGUMENT, "%s: workspace of %zu bytes, %zu are needed (fastloop_cuda_linear_workspace)",
                     cuda::WHERE, p.workspace_bytes, plan.workspace_bytes);
        }
        cuda::launch(module, p, plan);
    });
}

extern "C" fastloop_status fastloop_cuda_linear_workspace(const fastloop_cuda_linear_params* params, size_t* bytes) {
    return guarded("cuda_linear_workspace", [&] {
        const auto p = adopt(cuda::WHERE, params);
        need(cuda::WHERE, "bytes", bytes);
        cuda::check(p);
        *bytes = p.rows == 0 ? 0 : cuda::plan(p, cuda::module_of(cuda::WHERE, p.module).device()).workspace_bytes;
    });
}
