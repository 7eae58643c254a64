/* fastloop's C ABI: kernels on raw pointers, sizes and nothing else. No torch, no exceptions.
 *
 * Every function takes one parameter struct by reference. Fill it with zeros, set `struct_size` to its sizeof, then the
 * fields; a library that knows more fields treats the missing ones as zero. Pointers are host pointers, sizes count
 * elements, strides are in elements. Functions may be called from any number of threads at once, as long as no two
 * calls share the state they change. Nothing is changed by a call that fails.
 */
#ifndef FASTLOOP_H
#define FASTLOOP_H

#include <stddef.h>
#include <stdint.h>

#define FASTLOOP_ABI_VERSION 2 /* changes when what is here changes its meaning */
#define FASTLOOP_ABI_MINOR 1   /* grows when something is added: 1 added CUDA (fastloop_cuda.h) */

#if defined(__GNUC__)
#define FASTLOOP_API __attribute__((visibility("default")))
#else
#define FASTLOOP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fastloop_status {
    FASTLOOP_OK = 0,
    FASTLOOP_BAD_ARGUMENT = 1, /* a null pointer, a size, a value; fastloop_last_error() names it */
    FASTLOOP_BAD_STATE = 2,    /* slots or state that cannot be continued in this way */
    FASTLOOP_UNSUPPORTED = 3,  /* not on this machine, or a newer ABI than this library's */
    FASTLOOP_DEVICE_ERROR = 4  /* the CUDA driver refused; what is queued on the device may be lost */
} fastloop_status;

/* FASTLOOP_ABI_VERSION of the library that is loaded; refuse to call one that differs. */
FASTLOOP_API int fastloop_abi_version(void);

/* FASTLOOP_ABI_MINOR of it; refuse one that is less than your header's. */
FASTLOOP_API int fastloop_abi_minor(void);

/* What the last failed call of this thread said; valid until its next failed call. Never NULL. */
FASTLOOP_API const char* fastloop_last_error(void);

/* The instruction sets this library can use on this machine, best first, e.g. "avx512 avx2 base". */
FASTLOOP_API const char* fastloop_isas(void);

typedef enum fastloop_mel_edge { FASTLOOP_EDGE_REFLECT = 0, FASTLOOP_EDGE_WAIT = 1 } fastloop_mel_edge;
typedef enum fastloop_mel_clamp { FASTLOOP_CLAMP_RUNNING = 0, FASTLOOP_CLAMP_GLOBAL = 1 } fastloop_mel_clamp;

/* Samples -> log-mel frames of B streams, each with its state in one of Z slots. fastloop/ops/mel.py defines it. */
typedef struct fastloop_mel_params {
    size_t struct_size;    /* sizeof(fastloop_mel_params) */
    size_t batch;          /* B: streams in this call */
    size_t samples;        /* S: new samples of each stream at 16 kHz, >= 160 */
    const float* pcm;      /* [B, S], full scale 1.0 */
    size_t pcm_stride;     /* from one stream's first sample to the next one's, >= S */
    const int64_t* slots;  /* [B]: the state row of each stream, distinct, 0 <= slot < Z */
    size_t slot_count;     /* Z */
    float* tail;           /* [Z, 360]: the last samples; changed */
    float* peak;           /* [Z]: loudest log10 mel power of the final frames, -inf at the start; changed */
    int64_t* seen;         /* [Z]: samples so far, 0 at the start; changed */
    size_t bins;           /* C */
    const float* filters;  /* [C, 201]: the filterbank */
    const int32_t* bands;  /* [C, 2]: filters[c, j] is zero outside bands[c, 0] <= j < bands[c, 1] */
    int32_t edge;          /* fastloop_mel_edge */
    int32_t clamp;         /* fastloop_mel_clamp */
    float* frames;         /* [B, S / 160, C]: the result, contiguous, overlaps nothing */
    const char* isa;       /* NULL: the best of fastloop_isas(); or one of them, for tests and measurements */
} fastloop_mel_params;

FASTLOOP_API fastloop_status fastloop_mel(const fastloop_mel_params* params);

/* ---- threads ----------------------------------------------------------------------------------------------------- */

/* A fixed team of threads for the calls below: the caller and threads - 1 workers. Calls with the same team follow each
 * other; those too small to be shared run on the caller alone. Results do not depend on the number of threads. */
typedef struct fastloop_team fastloop_team;

/* pin: workers stay on one CPU each. */
FASTLOOP_API fastloop_status fastloop_team_create(size_t threads, int pin, fastloop_team** team);
FASTLOOP_API void fastloop_team_destroy(fastloop_team* team);

/* ---- linear: y = epilogue(x W^T + bias) + residual ------------------------------------------------------------------ */

typedef enum fastloop_format {
    FASTLOOP_FLOAT32 = 0,
    FASTLOOP_BFLOAT16 = 1,
    FASTLOOP_INT8 = 2, /* per-channel scale; rows of x are rounded to int8 with a scale of their own */
    FASTLOOP_INT4 = 3  /* scale per channel and group of 32 or 64 inputs; rows of x as for int8 */
} fastloop_format;

typedef enum fastloop_epilogue { FASTLOOP_NONE = 0, FASTLOOP_GELU = 1 } fastloop_epilogue;

/* Weights [O, D], packed once for the kernels; the source may be freed afterwards. */
typedef struct fastloop_weight fastloop_weight;

typedef struct fastloop_weight_params {
    size_t struct_size;
    int32_t format;     /* fastloop_format: of the packed weights */
    int32_t source;     /* fastloop_format of `data`: float32 or bfloat16 for both of these, else the same as `format` */
    size_t out, in;     /* O, D */
    int32_t gated;      /* 1: rows are [gate; up], the result is silu(gate) * up, O / 2 wide */
    const void* data;   /* [O, D], contiguous; int4: [O, D / 2], input 2 i in the low nibble, weight + 8 */
    const void* scale;  /* int8: float32 [O]; int4: bfloat16 [O, D / group]; else NULL */
    size_t group;       /* int4: 32 or 64; D is a multiple of it */
    const char* isa;
} fastloop_weight_params;

FASTLOOP_API fastloop_status fastloop_weight_create(const fastloop_weight_params* params, fastloop_weight** weight);
FASTLOOP_API void fastloop_weight_destroy(fastloop_weight* weight);
FASTLOOP_API size_t fastloop_weight_bytes(const fastloop_weight* weight);

typedef struct fastloop_linear_params {
    size_t struct_size;
    const fastloop_weight* weight;
    fastloop_team* team; /* NULL: this thread alone */
    size_t rows;         /* N, any number */
    const float* x;      /* [N, D] */
    size_t x_stride;
    const float* bias; /* [O] or NULL */
    int32_t epilogue;  /* fastloop_epilogue; FASTLOOP_NONE for gated weights */
    const float* residual; /* [N, O'] or NULL; may be `out` */
    size_t residual_stride;
    float* out; /* [N, O'], O' = O, or O / 2 for gated weights */
    size_t out_stride;
    const char* isa;
} fastloop_linear_params;

FASTLOOP_API fastloop_status fastloop_linear(const fastloop_linear_params* params);

/* ---- the other ops on rows: fastloop/ops/<name>.py defines each --------------------------------------------------------
 *
 * A row's result (a block's, a sequence's) is the same to the bit whatever is beside it. */

/* y = x / sqrt(mean(x^2) + eps) * weight; with a residual, residual += x first and y is the norm of that sum. */
typedef struct fastloop_rms_norm_params {
    size_t struct_size;
    size_t rows, width; /* N, D */
    const float* x;     /* [N, D] */
    size_t x_stride;
    const float* weight; /* [D] */
    float eps;
    float* residual; /* [N, D] or NULL; changed */
    size_t residual_stride;
    float* out; /* [N, D] */
    size_t out_stride;
    const char* isa;
} fastloop_rms_norm_params;
FASTLOOP_API fastloop_status fastloop_rms_norm(const fastloop_rms_norm_params* params);

/* y = (x - mean) / sqrt(var + eps) * weight + bias */
typedef struct fastloop_layer_norm_params {
    size_t struct_size;
    size_t rows, width; /* N, E */
    const float* x;     /* [N, E] */
    size_t x_stride;
    const float *weight, *bias; /* [E] */
    float eps;
    float* out; /* [N, E] */
    size_t out_stride;
    const char* isa;
} fastloop_layer_norm_params;
FASTLOOP_API fastloop_status fastloop_layer_norm(const fastloop_layer_norm_params* params);

/* Mel frames -> encoder positions, T = (F + 1) / 2: conv k3 p1, GELU, conv k3 stride 2 p1, GELU, + positions. */
typedef struct fastloop_conv_stem_params {
    size_t struct_size;
    fastloop_team* team;           /* NULL: this thread alone */
    size_t blocks, frames;         /* B, F */
    size_t bins, width;            /* C, E */
    const float* mel;              /* [B, F, C] */
    const fastloop_weight* conv1;  /* [E, 3C], inputs in the order (tap, bin) */
    const float* conv1_bias;       /* [E] */
    const fastloop_weight* conv2;  /* [E, 3E], inputs in the order (tap, channel) */
    const float* conv2_bias;       /* [E] */
    const float* positions;        /* [T or more, E] */
    float* out;                    /* [B, T, E] */
    const char* isa;
} fastloop_conv_stem_params;
FASTLOOP_API fastloop_status fastloop_conv_stem(const fastloop_conv_stem_params* params);

/* qkv bias, rotary embedding of q and k, and the write of k and v into pages of float32 or bfloat16. */
typedef struct fastloop_rope_append_params {
    size_t struct_size;
    size_t rows, heads, kv_heads, head_width; /* N, H, G, K */
    const float* qkv;                         /* [N, (H + 2G) K] */
    size_t qkv_stride;
    const float* bias;         /* [(H + 2G) K] or NULL */
    const int64_t* positions;  /* [N] */
    const int64_t* slots;      /* [N], distinct: page * Q + offset; -1 stores nothing */
    const double* inv_freq;    /* [K / 2] */
    int32_t page_format;       /* FASTLOOP_FLOAT32 or FASTLOOP_BFLOAT16 */
    void *k_pages, *v_pages;   /* [P, Q, G, K]; changed */
    size_t pages, page_tokens; /* P, Q */
    float* q;                  /* [N, H, K] */
    const char* isa;
} fastloop_rope_append_params;
FASTLOOP_API fastloop_status fastloop_rope_append(const fastloop_rope_append_params* params);

/* Full attention inside each block of T positions. */
typedef struct fastloop_block_attention_params {
    size_t struct_size;
    fastloop_team* team;                         /* NULL: this thread alone */
    size_t blocks, positions, heads, head_width; /* B, T, H, K */
    const float* qkv;                            /* [B, T, 3 H K] as [q | k | v] */
    float* out;                                  /* [B, T, H K] */
    const char* isa;
} fastloop_block_attention_params;
FASTLOOP_API fastloop_status fastloop_block_attention(const fastloop_block_attention_params* params);

/* Causal grouped-query attention of the new rows of many sequences over paged keys; products in float32. */
typedef struct fastloop_paged_attention_params {
    size_t struct_size;
    fastloop_team* team;        /* NULL: this thread alone */
    size_t rows, sequences;     /* N, B */
    size_t heads;               /* H */
    const float* q;             /* [N, H, K] */
    int32_t page_format;        /* FASTLOOP_FLOAT32 or FASTLOOP_BFLOAT16 */
    void *k_pages, *v_pages;    /* [P, Q, G, K]; read */
    size_t pages, page_tokens;  /* P, Q */
    size_t kv_heads;            /* G */
    size_t head_width;          /* K */
    const int32_t* row_starts;  /* [B + 1] */
    const int32_t* block_table; /* [B, M] */
    size_t table_width;         /* M */
    const int32_t* kv_lens;     /* [B] */
    const int32_t* gaps;        /* [B, 2] */
    float* out;                 /* [N, H, K] */
    const char* isa;
} fastloop_paged_attention_params;
FASTLOOP_API fastloop_status fastloop_paged_attention(const fastloop_paged_attention_params* params);

typedef enum fastloop_decision {
    FASTLOOP_VOID = -2,      /* computed under an assumption that did not hold */
    FASTLOOP_NONFINITE = -1, /* the logits are not finite */
    FASTLOOP_SILENT = 0,
    FASTLOOP_RESPOND = 1
} fastloop_decision;

/* Final norm, the two logits of (KEEP_SILENCE, TEXT_BEGIN), policy, next state. */
typedef struct fastloop_decide_params {
    size_t struct_size;
    size_t rows, width; /* R, D */
    const float* x;     /* [R, D]; the rows of one slot in time order */
    size_t x_stride;
    const float* norm_weight; /* [D] */
    float eps;
    const float* head;    /* [2, D] */
    const int64_t* slots; /* [R]: the session of each row, 0 <= slot < Z */
    size_t slot_count;    /* Z */
    const float* policy;  /* [Z, 3] = (threshold, rearm, min_gap) */
    int32_t* state;       /* [Z, 2] = (chunks since the last response, armed); changed */
    float* p_respond;     /* [R] */
    int32_t* decision;    /* [R], fastloop_decision */
    const char* isa;
} fastloop_decide_params;
FASTLOOP_API fastloop_status fastloop_decide(const fastloop_decide_params* params);

/* The next token of each row: greedy, or drawn by (seed, counter) from what temperature, top_k and top_p leave. */
typedef struct fastloop_sample_params {
    size_t struct_size;
    size_t rows, vocab;  /* R, V */
    const float* logits; /* [R, V] */
    size_t logits_stride;
    size_t phases;
    const uint8_t* banned;    /* [phases, V], 0 or 1 */
    const int64_t* phase;     /* [R]: the row of `banned` that holds */
    const float* temperature; /* [R]; 0 or less: greedy, the first of equals */
    const int64_t* top_k;     /* [R]; 0 or less: off */
    const float* top_p;       /* [R]; 1 or more: off */
    const int64_t *seed, *counter; /* [R] */
    int64_t* tokens; /* [R]; -1 where a logit that is not banned is NaN or +Inf, or none has a chance */
    const char* isa;
} fastloop_sample_params;
FASTLOOP_API fastloop_status fastloop_sample(const fastloop_sample_params* params);

/* ---- a model: one call for a pass of the encoder, one for a step of the decoder ---------------------------------------
 *
 * Weights and vectors are borrowed: they must live as long as the model. Vectors are float32. Calls of one model follow
 * each other. A row's result is the same to the bit whatever rows are beside it and however many threads there are. */
typedef struct fastloop_encoder_layer {
    const float *norm1_weight, *norm1_bias; /* [E] */
    const fastloop_weight* qkv;             /* [3E, E] */
    const float* qkv_bias;                  /* [3E] */
    const fastloop_weight* out;             /* [E, E] */
    const float* out_bias;                  /* [E] */
    const float *norm2_weight, *norm2_bias; /* [E] */
    const fastloop_weight* fc1;             /* [ffn, E] */
    const float* fc1_bias;                  /* [ffn] */
    const fastloop_weight* fc2;             /* [E, ffn] */
    const float* fc2_bias;                  /* [E] */
} fastloop_encoder_layer;

typedef struct fastloop_encoder_params {
    size_t struct_size;
    size_t bins, width, heads, layers;  /* C, E, H, L */
    const fastloop_weight* conv1;       /* [E, 3C], inputs in the order (tap, bin) */
    const float* conv1_bias;            /* [E] */
    const fastloop_weight* conv2;       /* [E, 3E], inputs in the order (tap, channel) */
    const float* conv2_bias;            /* [E] */
    const float* positions;             /* [most positions, E] */
    size_t most_positions;
    const fastloop_encoder_layer* layer; /* [L]; copied */
    const float *norm_weight, *norm_bias; /* [E] */
    const fastloop_weight* proj;          /* [D, E] */
    const float* proj_bias;               /* [D] */
    float norm_eps;
    const char* isa;
} fastloop_encoder_params;

typedef struct fastloop_encoder fastloop_encoder;
FASTLOOP_API fastloop_status fastloop_encoder_create(const fastloop_encoder_params* params, fastloop_encoder** encoder);
FASTLOOP_API void fastloop_encoder_destroy(fastloop_encoder* encoder);

typedef struct fastloop_encode_params {
    size_t struct_size;
    fastloop_team* team;
    size_t chunks, frames; /* B, F: F is a multiple of 4 */
    const float* mel;      /* [B, F, C] */
    float* tokens;         /* [B, F / 4, D] */
} fastloop_encode_params;
FASTLOOP_API fastloop_status fastloop_encode(fastloop_encoder* encoder, const fastloop_encode_params* params);

typedef struct fastloop_decoder_layer {
    const float* norm1_weight;      /* [D] */
    const fastloop_weight* qkv;     /* [(H + 2G) K, D], rows [Q | K | V] */
    const float* qkv_bias;          /* [(H + 2G) K] */
    const fastloop_weight* out;     /* [D, H K] */
    const float* norm2_weight;      /* [D] */
    const fastloop_weight* gate_up; /* [2I, D], gated */
    const fastloop_weight* down;    /* [D, I] */
} fastloop_decoder_layer;

typedef struct fastloop_decoder_params {
    size_t struct_size;
    size_t width, heads, kv_heads, head_width, layers; /* D, H, G, K, L */
    const fastloop_decoder_layer* layer;               /* [L]; copied */
    const float* norm_weight;                          /* [D] */
    const fastloop_weight* head;                       /* [V, D] */
    const double* inv_freq;                            /* [K / 2]; copied */
    float norm_eps;
    const char* isa;
} fastloop_decoder_params;

typedef struct fastloop_decoder fastloop_decoder;
FASTLOOP_API fastloop_status fastloop_decoder_create(const fastloop_decoder_params* params, fastloop_decoder** decoder);
FASTLOOP_API void fastloop_decoder_destroy(fastloop_decoder* decoder);

/* How pages of the decoder hold keys and values. Tiles are what attention multiplies, so they need no work before it:
 * csrc/cpu/tiles.h describes them, fastloop/engine/kv_layout.py reads and writes them. */
typedef enum fastloop_page_layout {
    FASTLOOP_ROWS = 0, /* [P, Q, G, K] */
    FASTLOOP_TILES = 1 /* [P, G, Q / 64] tiles of 64 slots; Q is a multiple of 64, K of 32 */
} fastloop_page_layout;

/* One ragged step: N rows of B sequences over paged keys and values; see fastloop/ops/paged_attention.py. */
typedef struct fastloop_decode_params {
    size_t struct_size;
    fastloop_team* team;
    size_t rows, sequences;     /* N, B */
    float* x;                   /* [N, D]: embedded rows in, hidden rows (before the final norm) out */
    const int64_t* positions;   /* [N]: RoPE positions */
    const int64_t* slots;       /* [N]: page * Q + offset of each row's key and value; -1 stores nothing */
    const int32_t* row_starts;  /* [B + 1] */
    const int32_t* block_table; /* [B, M] */
    size_t table_width;         /* M */
    const int32_t* kv_lens;     /* [B] */
    const int32_t* gaps;        /* [B, 2] */
    int32_t page_format;        /* float32 or bfloat16; tiles int8 as well */
    void *k_pages, *v_pages;    /* [L] pools of P pages in page_layout */
    size_t pages, page_tokens;  /* P, Q */
    size_t logit_rows;          /* T */
    const int64_t* logit_row;   /* [T]: rows whose logits are wanted */
    float* logits;              /* [T, V] */
    int32_t page_layout;        /* fastloop_page_layout */
    const float* key_range;     /* int8: [L, G, K], powers of two that keys are divided by before they are rounded */
} fastloop_decode_params;
FASTLOOP_API fastloop_status fastloop_decode(fastloop_decoder* decoder, const fastloop_decode_params* params);

/* ---- measuring ---------------------------------------------------------------------------------------------------- */

typedef enum fastloop_ceiling_kind {
    FASTLOOP_CEILING_FLOAT32 = 0, /* products and sums a second, of the densest loop */
    FASTLOOP_CEILING_BFLOAT16 = 1,
    FASTLOOP_CEILING_INT8 = 2,
    FASTLOOP_CEILING_READ = 3 /* bytes a second from memory */
} fastloop_ceiling_kind;

/* The best of several tries on all threads of the team, together some 0.1 s; `read` allocates 256 MB meanwhile. */
FASTLOOP_API fastloop_status fastloop_ceiling(int32_t kind, fastloop_team* team, const char* isa, double* per_second);

#ifdef __cplusplus
}
#endif
#endif
