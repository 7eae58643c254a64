/* fastloop's C ABI on NVIDIA GPUs: the same ops, on device memory and a stream. Versioned with fastloop.h, which it includes.
 *
 * The library links no CUDA: the driver (libcuda.so.1, 12.0 or newer) is opened with the first call here, and where there
 * is none every call returns FASTLOOP_UNSUPPORTED and says so. Kernels come as an image, one for each op: a fat binary
 * that the build made (fastloop/cuda_kernels/<op>-<key>.fatbin of the Python package), or a cubin that nvcc or NVRTC made
 * of csrc/cuda/<op>.cu; `python -m fastloop.ops.cuda_images <op>` writes one.
 *
 * `stream` is a CUstream (a cudaStream_t is the same), NULL the default one. Pointers marked "device" are of the module's
 * device. Calls start work and return: they do not wait, do not allocate, and may be captured into a graph (under a
 * driver before 12.4 after a call of the same kind outside). A context of the device is used if one is current, else its
 * primary context, as the CUDA runtime does.
 */
#ifndef FASTLOOP_CUDA_H
#define FASTLOOP_CUDA_H

#include "fastloop.h"

#ifdef __cplusplus
extern "C" {
#endif

/* GPUs the driver knows. */
FASTLOOP_API fastloop_status fastloop_cuda_device_count(int32_t* count);

typedef struct fastloop_cuda_device {
    size_t struct_size;
    int32_t major, minor;   /* compute capability: 9, 0 of an H100 */
    int32_t processors;     /* streaming multiprocessors */
    uint32_t shared_bytes;  /* shared memory that one block may have */
    char name[128];
} fastloop_cuda_device;

/* Fills `description`, whose struct_size is set before. */
FASTLOOP_API fastloop_status fastloop_cuda_describe(int32_t device, fastloop_cuda_device* description);

/* The kernels of one op on one device. Any number of threads may launch from it. */
typedef struct fastloop_cuda_module fastloop_cuda_module;

typedef struct fastloop_cuda_module_params {
    size_t struct_size;
    int32_t device;     /* its number: 0 <= device < fastloop_cuda_device_count */
    const void* image;  /* a cubin or a fat binary; may be freed afterwards */
    size_t image_bytes;
} fastloop_cuda_module_params;

FASTLOOP_API fastloop_status fastloop_cuda_module_create(const fastloop_cuda_module_params* params,
                                                         fastloop_cuda_module** module);
/* No launch from it may be pending. */
FASTLOOP_API void fastloop_cuda_module_destroy(fastloop_cuda_module* module);

/* How the weights of linear are stored, in rows of D numbers. */
typedef enum fastloop_cuda_weights {
    FASTLOOP_CUDA_WEIGHTS_BFLOAT16 = 0,
    FASTLOOP_CUDA_WEIGHTS_FLOAT8 = 1, /* e4m3 without infinities, finite; a scale for each row. D is a multiple of 16 */
    FASTLOOP_CUDA_WEIGHTS_INT4 = 2 /* two in a byte, input 2 i in the low nibble, weight + 8; a scale for each group */
} fastloop_cuda_weights;

/* linear: out = epilogue(x W^T + bias) + residual in bfloat16, sums in float32. A row's result is the same to the bit in
 * every run, whatever the other rows hold; up to 64 rows, the depth is split in the same way for any number of them. */
typedef struct fastloop_cuda_linear_params {
    size_t struct_size;
    fastloop_cuda_module* module; /* of linear */
    size_t rows, in, out_rows;    /* N (made for 1 to 64), D, O */
    const void* x;                /* device, bfloat16 [N, D] */
    size_t x_stride;
    const void* weight;   /* device, [O, D] in weight_format */
    size_t weight_stride; /* in stored elements: bytes of float8 and int4, then a multiple of 16, as the address is */
    const void* bias;  /* device, bfloat16 [O] or NULL */
    int32_t epilogue;  /* fastloop_epilogue; FASTLOOP_NONE where gated */
    int32_t gated;     /* 1: weight rows are [gate; up], the result is silu(gate) * up, O / 2 wide */
    const void* residual; /* device, bfloat16 [N, O'] or NULL; may be `out` */
    size_t residual_stride;
    void* out; /* device, bfloat16 [N, O'], O' = O, or O / 2 where gated */
    size_t out_stride;
    void* workspace; /* device; zero before the first use, then as calls of linear of any size leave it; of one stream
                        at a time */
    size_t workspace_bytes; /* at least what fastloop_cuda_linear_workspace says; 0 and NULL where that is 0 */
    int32_t splits;    /* ranges of the depth that are summed apart; 0: chosen by the size of the device */
    int32_t dependent; /* 1: start before the kernel in front has ended, and read what does not depend on it: the
                          weights. Ignored below sm_90. */
    void* stream;
    int32_t weight_format; /* fastloop_cuda_weights */
    const void* scale; /* device; float8: float [O]; int4: bfloat16 [O, D / group], contiguous; else NULL */
    size_t group;      /* int4: 32 or 64, D is a multiple of it */
} fastloop_cuda_linear_params;

FASTLOOP_API fastloop_status fastloop_cuda_linear(const fastloop_cuda_linear_params* params);
/* Bytes of workspace for a call with these sizes, strides and addresses; the workspace fields are not read. */
FASTLOOP_API fastloop_status fastloop_cuda_linear_workspace(const fastloop_cuda_linear_params* params, size_t* bytes);

/* ---- mel, paged_attention, decide, sample: as fastloop.h and fastloop/ops define them ----------------------------------
 *
 * Values in device memory (slots, lengths, page numbers, phases) are not checked: reading them would wait. `dependent` is
 * as for linear: everything is read after the kernel in front has ended, only the start overlaps with it. */
typedef enum fastloop_cuda_dtype {
    FASTLOOP_CUDA_FLOAT32 = 0,
    FASTLOOP_CUDA_BFLOAT16 = 1,
    FASTLOOP_CUDA_FLOAT16 = 2,
    FASTLOOP_CUDA_FLOAT8_E4M3 = 3 /* without infinities, as torch.float8_e4m3fn */
} fastloop_cuda_dtype;

typedef struct fastloop_cuda_mel_params {
    size_t struct_size;
    fastloop_cuda_module* module; /* of mel */
    size_t batch, samples;        /* B, S >= 160 */
    const float* pcm;             /* device [B, S] */
    size_t pcm_stride;
    const int64_t* slots; /* device [B]: distinct, 0 <= slot < Z */
    size_t slot_count;    /* Z */
    float* tail;          /* device [Z, 360]; changed, as peak and seen are */
    float* peak;          /* device [Z] */
    int64_t* seen;        /* device [Z] */
    size_t bins;          /* C, at most 256 */
    const float* filters; /* device [C, 201] */
    const int32_t* bands; /* device [C, 2] */
    int32_t edge, clamp;  /* fastloop_mel_edge, fastloop_mel_clamp */
    float* frames;        /* device [B, S / 160, C] */
    int32_t dependent;
    void* stream;
} fastloop_cuda_mel_params;
FASTLOOP_API fastloop_status fastloop_cuda_mel(const fastloop_cuda_mel_params* params);

/* Which kernels of paged_attention take a call: those by wgmma are made for batches of listeners on sm_90. */
typedef enum fastloop_cuda_attention {
    FASTLOOP_CUDA_ATTENTION_BY_SHAPE = 0,
    FASTLOOP_CUDA_ATTENTION_MMA = 1, /* all that is served */
    FASTLOOP_CUDA_ATTENTION_WGMMA = 2 /* sm_90, pages of dtype, 16 bits, K of 64 or 128, Q of 8, 16, 32 or a multiple of 64 */
} fastloop_cuda_attention;

/* dtype and page_dtype: float32 with pages of float32 or bfloat16, bfloat16 with bfloat16 or float8, float16 with float16.
 * K is a multiple of 8 (16 where pages are float8) up to 128. A launch reads the lengths on the device: a captured one
 * serves every context that the block table has columns for. */
typedef struct fastloop_cuda_paged_attention_params {
    size_t struct_size;
    fastloop_cuda_module* module;   /* of paged_attention */
    int32_t dtype, page_dtype;      /* fastloop_cuda_dtype of q and out, and of the pages */
    size_t rows, sequences, heads;  /* N, B, H */
    const void* q;                  /* device [N, H, K] */
    const void *k_pages, *v_pages;  /* device [P, Q, G, K], 16-byte aligned */
    size_t page_tokens, kv_heads, head_width; /* Q, G, K */
    const int32_t* row_starts;      /* device [B + 1] */
    const int32_t* block_table;     /* device [B, M] */
    size_t table_width, table_stride; /* M, and from row to row */
    const int32_t* kv_lens;         /* device [B] */
    const int32_t* gaps;            /* device [B, 2] */
    void* out;                      /* device [N, H, K] */
    void* workspace;                /* device, 256-byte aligned; zero before the first use, as for linear */
    size_t workspace_bytes;
    int32_t blocks;                 /* that share the work of a KV head, at most 256; 0: by the size of the device */
    int32_t dependent;
    void* stream;
    int32_t kernel;                 /* fastloop_cuda_attention */
} fastloop_cuda_paged_attention_params;
FASTLOOP_API fastloop_status fastloop_cuda_paged_attention(const fastloop_cuda_paged_attention_params* params);
FASTLOOP_API fastloop_status fastloop_cuda_paged_attention_workspace(const fastloop_cuda_paged_attention_params* params,
                                                                     size_t* bytes);

typedef struct fastloop_cuda_decide_params {
    size_t struct_size;
    fastloop_cuda_module* module; /* of decide */
    int32_t dtype;                /* of x, norm_weight and head: float32, bfloat16 or float16 */
    size_t rows, width;           /* R, D */
    const void* x;                /* device [R, D] */
    size_t x_stride;
    const void* norm_weight; /* device [D] */
    double eps;
    const void* head;     /* device [2, D] */
    const int64_t* slots; /* device [R], 0 <= slot < Z */
    size_t slot_count;    /* Z */
    const float* policy;  /* device [Z, 3] */
    int32_t* state;       /* device [Z, 2]; changed */
    float* p_respond;     /* device [R] */
    int32_t* decision;    /* device [R], fastloop_decision */
    int32_t dependent;
    void* stream;
} fastloop_cuda_decide_params;
FASTLOOP_API fastloop_status fastloop_cuda_decide(const fastloop_cuda_decide_params* params);

typedef struct fastloop_cuda_sample_params {
    size_t struct_size;
    fastloop_cuda_module* module; /* of sample */
    int32_t dtype;                /* of the logits: float32, bfloat16 or float16 */
    size_t rows, vocab;           /* R, V */
    const void* logits;           /* device [R, V] */
    size_t logits_stride;
    const uint8_t* banned;         /* device [phases, V], 0 or 1 */
    const int64_t* phase;          /* device [R], and so all of these */
    const float* temperature;
    const int64_t* top_k;
    const float* top_p;
    const int64_t *seed, *counter;
    int64_t* tokens; /* device [R]; -1 where there is none */
    int32_t dependent;
    void* stream;
} fastloop_cuda_sample_params;
FASTLOOP_API fastloop_status fastloop_cuda_sample(const fastloop_cuda_sample_params* params);

#ifdef __cplusplus
}
#endif
#endif
