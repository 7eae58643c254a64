/* fastloop's C ABI: kernels on raw pointers, sizes and nothing else. No torch, no exceptions, no allocation.
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

#define FASTLOOP_ABI_VERSION 1

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
    FASTLOOP_UNSUPPORTED = 3   /* not on this machine, or a newer ABI than this library's */
} fastloop_status;

/* FASTLOOP_ABI_VERSION of the library that is loaded; refuse to call one that differs. */
FASTLOOP_API int fastloop_abi_version(void);

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

#ifdef __cplusplus
}
#endif
#endif
