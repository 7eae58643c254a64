/* The C ABI from plain C99: one chunk of sound to log-mel frames, then a matrix product on int8 weights.
 *
 *   cc -std=c99 -Icsrc/include tests/native/example.c <fastloop_core> -lstdc++ -lpthread -lm
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastloop.h"

enum { SAMPLES = 6400, HOP = 160, FRAMES = SAMPLES / HOP, BINS = 4, COLUMNS = 201, TAIL = 360, WIDTH = 8 };

static void must(fastloop_status status) {
    if (status == FASTLOOP_OK) return;
    fprintf(stderr, "%s\n", fastloop_last_error());
    exit(1);
}

/* 0.4 s of a 1 kHz tone through four filters of ten columns (400 Hz) each -> frames [40, 4]. */
static void hear(float* frames) {
    static float pcm[SAMPLES], filters[BINS * COLUMNS], tail[TAIL];
    int32_t bands[2 * BINS];
    int64_t slot = 0, seen = 0;
    float peak = -INFINITY;
    fastloop_mel_params p;
    for (int i = 0; i < SAMPLES; ++i) pcm[i] = 0.5f * (float)sin(6.283185307179586 * 1000.0 * i / 16000.0);
    for (int c = 0; c < BINS; ++c) {
        bands[2 * c] = 10 * c;
        bands[2 * c + 1] = 10 * c + 10;
        for (int j = 10 * c; j < 10 * c + 10; ++j) filters[c * COLUMNS + j] = 0.1f;
    }
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.batch = 1;
    p.samples = SAMPLES;
    p.pcm = pcm;
    p.pcm_stride = SAMPLES;
    p.slots = &slot;
    p.slot_count = 1;
    p.tail = tail;
    p.peak = &peak;
    p.seen = &seen;
    p.bins = BINS;
    p.filters = filters;
    p.bands = bands;
    p.edge = FASTLOOP_EDGE_REFLECT;
    p.clamp = FASTLOOP_CLAMP_RUNNING;
    p.frames = frames;
    must(fastloop_mel(&p));
}

/* Frames [40, 4] times weights [8, 4] of int8, on two threads -> out [40, 8]. */
static void multiply(const float* frames, const int8_t* values, const float* scales, float* out) {
    fastloop_team* team = NULL;
    fastloop_weight* weight = NULL;
    fastloop_weight_params w;
    fastloop_linear_params p;
    memset(&w, 0, sizeof w);
    w.struct_size = sizeof w;
    w.format = w.source = FASTLOOP_INT8;
    w.out = WIDTH;
    w.in = BINS;
    w.data = values;
    w.scale = scales;
    must(fastloop_weight_create(&w, &weight));
    must(fastloop_team_create(2, 0, &team));
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.weight = weight;
    p.team = team;
    p.rows = FRAMES;
    p.x = frames;
    p.x_stride = BINS;
    p.out = out;
    p.out_stride = WIDTH;
    must(fastloop_linear(&p));
    fastloop_team_destroy(team);
    fastloop_weight_destroy(weight);
}

int main(void) {
    float frames[FRAMES * BINS], out[FRAMES * WIDTH], scales[WIDTH];
    int8_t values[WIDTH * BINS];
    if (fastloop_abi_version() != FASTLOOP_ABI_VERSION) return 1;
    hear(frames);
    for (int i = 0; i < WIDTH * BINS; ++i) values[i] = (int8_t)(7 * i % 255 - 127);
    for (int o = 0; o < WIDTH; ++o) scales[o] = 0.01f;
    multiply(frames, values, scales, out);

    /* 1 kHz is column 25: the third filter is the loudest. */
    const float* frame = frames + 20 * BINS;
    for (int c = 0; c < BINS; ++c)
        if (c != 2 && frame[c] >= frame[2]) return 1;
    double most = 0;
    for (int t = 0; t < FRAMES; ++t)
        for (int o = 0; o < WIDTH; ++o) {
            double want = 0;
            for (int c = 0; c < BINS; ++c) want += frames[t * BINS + c] * (double)values[o * BINS + c] * scales[o];
            const double off = fabs(out[t * WIDTH + o] - want);
            if (off > most) most = off;
        }
    printf("isas: %s\nframe 20: %.3f %.3f %.3f %.3f\nlargest error of the product: %.4f\n", fastloop_isas(), frame[0],
           frame[1], frame[2], frame[3], most);
    return most < 0.05 ? 0 : 1; /* a row's bytes are 1/254 of its loudest apart, weights reach 1.3, four of them add up */
}
