// The host side of paged_attention on NVIDIA GPUs: which kernel of paged_attention.cu or paged_attention_wgmma.cuh, and how many
// blocks. Not how the work is shared: that is computed on the device, so that a captured launch serves every context.
#include "paged_attention.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <string>

#include "dtypes.h"
#include "launch.h"

namespace fastloop::cuda {
namespace {

constexpr const char* WHERE = "cuda_paged_attention";
constexpr size_t COUNTERS = 16384;  // at the front of a workspace, however many are used: so that calls of all sizes share it
using Params = fastloop_cuda_paged_attention_params;

constexpr size_t up(size_t value, size_t by) { return (value + by - 1) / by; }

// What the kernels are compiled for.
bool takes(int32_t q, int32_t pages) {
    switch (q) {
        case FASTLOOP_CUDA_FLOAT32: return pages == FASTLOOP_CUDA_FLOAT32 || pages == FASTLOOP_CUDA_BFLOAT16;
        case FASTLOOP_CUDA_BFLOAT16: return pages == FASTLOOP_CUDA_BFLOAT16 || pages == FASTLOOP_CUDA_FLOAT8_E4M3;
        case FASTLOOP_CUDA_FLOAT16: return pages == FASTLOOP_CUDA_FLOAT16;
        default: return false;
    }
}

void check_sizes(const Params& p) {
    if (!takes(p.dtype, p.page_dtype))
        fail(FASTLOOP_UNSUPPORTED, "%s: no kernel for queries of %s and pages of %s", WHERE, name_of(WHERE, p.dtype),
             name_of(WHERE, p.page_dtype));
    if (p.heads == 0 || p.kv_heads == 0 || p.heads % p.kv_heads != 0 || p.kv_heads > 65535)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: %zu heads of %zu KV heads", WHERE, p.heads, p.kv_heads);
    const size_t step = p.page_dtype == FASTLOOP_CUDA_FLOAT8_E4M3 ? 16 : 8;
    if (p.head_width == 0 || p.head_width > 128 || p.head_width % step != 0)
        fail(FASTLOOP_UNSUPPORTED, "%s: heads are %zu wide; multiples of %zu up to 128 are served", WHERE, p.head_width, step);
    if (p.page_tokens == 0) fail(FASTLOOP_BAD_ARGUMENT, "%s: pages of 0 tokens", WHERE);
    for (const size_t size : {p.rows, p.sequences, p.heads, p.page_tokens, p.table_stride})
        if (size > INT_MAX / 2) fail(FASTLOOP_BAD_ARGUMENT, "%s: a size of %zu", WHERE, size);
    // The device counts steps in 32 bits: every tile with the longest context must fit.
    size_t tiles = 0, steps = 0, slots = 0;
    if (__builtin_mul_overflow(p.rows, p.heads / p.kv_heads, &tiles) ||
        __builtin_mul_overflow(p.table_width, p.page_tokens, &slots) ||
        __builtin_mul_overflow(up(tiles, ATTENTION_FLAT_ROWS) + p.sequences, up(slots, ATTENTION_STEP), &steps) ||
        steps > INT_MAX / 2 || slots > INT_MAX / 2)
        fail(FASTLOOP_UNSUPPORTED, "%s: %zu rows of %zu heads with up to %zu x %zu slots are more than one launch takes", WHERE,
             p.rows, p.heads, p.table_width, p.page_tokens);
}

void check_pointers(const Params& p) {
    need(WHERE, "q", p.q, 4);
    need(WHERE, "k_pages", p.k_pages, 16);
    need(WHERE, "v_pages", p.v_pages, 16);
    need(WHERE, "block_table", p.block_table);
    need(WHERE, "row_starts", p.row_starts);
    need(WHERE, "kv_lens", p.kv_lens);
    need(WHERE, "gaps", p.gaps);
    need(WHERE, "out", p.out, 4);
    apart(WHERE, "block_table", p.sequences, p.table_width, p.table_stride);
    const size_t width = p.heads * p.head_width;
    addressable(WHERE, "q", p.rows, width, bytes_of(WHERE, p.dtype));
    addressable(WHERE, "block_table", p.sequences, p.table_stride, sizeof(int32_t));
}

// What the kernels by wgmma are compiled for. A box of their loads is up to 64 slots of one page, in tiles that begin at
// multiples of 8 rows; slots of the pool are counted in 32 bits, which are 275 GB at the least.
bool wgmma_takes(const Params& p, const Device& device) {
    const bool page = p.page_tokens % 64 == 0 || p.page_tokens == 8 || p.page_tokens == 16 || p.page_tokens == 32;
    return device.major == 9 && p.dtype == p.page_dtype && p.dtype != FASTLOOP_CUDA_FLOAT32 && page &&
           (p.head_width == 64 || p.head_width == 128);
}

// On an H100 the kernels by wgmma take 128 us for 64 sequences of 104 packed rows (new rows x query heads of a KV head) at 4k
// and mma.sync 229, 46 and 69 for 8 of them, 113 and 135 for 64 sequences of 8 (bench/results). They have tiles of 128 rows
// only: with few sequences a long context is cut into pieces of 53 KB for one processor to add up, and flat tiles are faster.
// How many sequences are real is not known here, for a captured step is padded to as many as it has rows.
bool is_batch(const Params& p) {
    constexpr size_t SEQUENCES = 8, PACKED_ROWS = 512;  // of all
    return p.sequences >= SEQUENCES && p.rows * (p.heads / p.kv_heads) >= PACKED_ROWS;
}

bool use_wgmma(const Params& p, const Device& device) {
    switch (p.kernel) {
        case FASTLOOP_CUDA_ATTENTION_BY_SHAPE: return is_batch(p) && wgmma_takes(p, device);
        case FASTLOOP_CUDA_ATTENTION_MMA: return false;
        case FASTLOOP_CUDA_ATTENTION_WGMMA:
            if (!wgmma_takes(p, device))
                fail(FASTLOOP_UNSUPPORTED, "%s: the kernels by wgmma are for sm_90 (this GPU is sm_%d%d), pages of q's 16 bits, "
                     "of 8, 16, 32 or a multiple of 64 tokens (got %zu), and heads 64 or 128 wide (got %zu)", WHERE, device.major,
                     device.minor, p.page_tokens, p.head_width);
            return true;
        default: fail(FASTLOOP_BAD_ARGUMENT, "%s: kernel is %d; choose from fastloop_cuda_attention", WHERE, p.kernel);
    }
}

struct Plan {
    unsigned blocks;  // of a KV head
    size_t scale_bytes, sum_bytes;
    size_t bytes() const { return COUNTERS * sizeof(unsigned) + scale_bytes + sum_bytes; }
};

// A block for every processor: its ring of keys and values fills the shared memory.
Plan plan(const Params& p, const Device& device) {
    Plan made{};
    if (p.blocks < 0 || p.blocks > ATTENTION_BLOCKS)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: blocks is %d, at most %d are", WHERE, p.blocks, ATTENTION_BLOCKS);
    const size_t all = static_cast<size_t>(std::max(device.processors, 1)) / p.kv_heads;
    made.blocks = p.blocks ? static_cast<unsigned>(p.blocks)
                           : static_cast<unsigned>(std::clamp<size_t>(all, 1, ATTENTION_BLOCKS));
    if (made.blocks * p.kv_heads > COUNTERS)
        fail(FASTLOOP_UNSUPPORTED, "%s: %u blocks of %zu KV heads; at most %zu are", WHERE, made.blocks, p.kv_heads, COUNTERS);
    const size_t parts = 2 * made.blocks * p.kv_heads * static_cast<size_t>(ATTENTION_TALL_ROWS);
    made.scale_bytes = parts * 2 * sizeof(float);
    made.sum_bytes = parts * p.head_width * sizeof(float);
    return made;
}

AttentionParams kernel_params(const Params& p, const Plan& plan) {
    AttentionParams k{};
    k.q = p.q;
    k.k_pages = p.k_pages;
    k.v_pages = p.v_pages;
    k.block_table = p.block_table;
    k.row_starts = p.row_starts;
    k.kv_lens = p.kv_lens;
    k.gaps = p.gaps;
    k.out = p.out;
    k.arrived = static_cast<unsigned*>(p.workspace);
    k.scales = reinterpret_cast<float*>(k.arrived + COUNTERS);
    k.sums = k.scales + plan.scale_bytes / sizeof(float);
    k.sequences = static_cast<int>(p.sequences);
    k.heads = static_cast<int>(p.heads);
    k.head = static_cast<int>(p.head_width);
    k.page = static_cast<int>(p.page_tokens);
    k.table_stride = static_cast<int>(p.table_stride);
    k.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p.head_width)));
    return k;
}

// The pages as a matrix: slots of the pool are rows, of which nobody says how many there are.
TensorMap map_of(const Module& module, const Params& p, const char* what, const void* pages) {
    const size_t width = p.kv_heads * p.head_width;
    const TensorType type = p.dtype == FASTLOOP_CUDA_BFLOAT16 ? TensorType::BFLOAT16 : TensorType::FLOAT16;
    const auto box_rows = static_cast<unsigned>(std::min<size_t>(p.page_tokens, ATTENTION_STEP));
    return module.tensor_map((std::string(WHERE) + ": " + what).c_str(),
                             {type, 2, pages, INT_MAX, width, width * 2, box_rows, 64, Swizzle::BYTES_128});
}

void launch(Module& module, const Params& p, const Plan& plan) {
    const char* const head = p.head_width <= 64 ? "_64" : "_128";
    Shape shape{{plan.blocks, static_cast<unsigned>(p.kv_heads), 1}, ATTENTION_THREADS, ATTENTION_SHARED_BYTES, 1,
                p.dependent != 0 && module.device().major >= 9};
    if (use_wgmma(p, module.device())) {
        shape.threads = ATTENTION_WGMMA_THREADS;
        shape.shared_bytes = ATTENTION_WGMMA_SHARED_BYTES;
        const std::string name = std::string("paged_attention_wgmma_") + name_of(WHERE, p.dtype) + head;
        module.launch(name.c_str(), shape, p.stream, map_of(module, p, "k_pages", p.k_pages),
                      map_of(module, p, "v_pages", p.v_pages), kernel_params(p, plan));
    } else {
        const std::string name = std::string("paged_attention_") + name_of(WHERE, p.dtype) + "_" + name_of(WHERE, p.page_dtype);
        module.launch((name + head).c_str(), shape, p.stream, kernel_params(p, plan));
    }
}

}  // namespace
}  // namespace fastloop::cuda

using namespace fastloop;

extern "C" fastloop_status fastloop_cuda_paged_attention(const fastloop_cuda_paged_attention_params* params) {
    return guarded(cuda::WHERE, [&] {
        const auto p = adopt(cuda::WHERE, params);
        cuda::Module& module = cuda::module_of(cuda::WHERE, p.module);
        if (p.rows == 0 || p.sequences == 0) return;
        cuda::check_sizes(p);
        cuda::check_pointers(p);
        const cuda::Plan plan = cuda::plan(p, module.device());
        need(cuda::WHERE, "workspace", p.workspace, 256);
        if (p.workspace_bytes < plan.bytes())
            fail(FASTLOOP_BAD_ARGUMENT, "%s: workspace of %zu bytes, %zu are needed (fastloop_cuda_paged_attention_workspace)",
                 cuda::WHERE, p.workspace_bytes, plan.bytes());
        cuda::launch(module, p, plan);
    });
}

extern "C" fastloop_status fastloop_cuda_paged_attention_workspace(const fastloop_cuda_paged_attention_params* params,
                                                                   size_t* bytes) {
    return guarded("cuda_paged_attention_workspace", [&] {
        const auto p = adopt(cuda::WHERE, params);
        need(cuda::WHERE, "bytes", bytes);
        *bytes = 0;
        if (p.rows == 0 || p.sequences == 0) return;
        cuda::check_sizes(p);
        *bytes = cuda::plan(p, cuda::module_of(cuda::WHERE, p.module).device()).bytes();
    });
}
