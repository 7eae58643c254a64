// mel: samples -> log-mel frames of many streams, each stream's state in its slot.
//
//   power[k] = |DFT400(hann * x)[k]|^2,  y[c] = log10(max(sum_k filters[c][k] power[k], 1e-10)),
//   frame[c] = (max(y[c], top - 8) + 4) / 4
//
//   mel   grid (streams), 448 threads
//
// Who owns what: a block owns a stream's call, a warp one frame at a time. 14 warps take the 41 frames of a chunk of 0.4 s in
// three rounds. The real DFT of 400 is a complex one of 200 = 8 x 25 = 8 x 5 x 5 (csrc/cpu/dft200.h): 25 lanes each take a DFT
// of 8 from the samples, then 40 items of 5 points, twice; 8 and 25 have no common factor, so only the 5 x 5 needs twiddles.
// Bytes moved per stream: S + 2 x 360 samples, S / 160 x C results; in shared memory the samples lie once, padded so that
// the lanes' pairs, 8 apart, fall into different banks.
// Why this version: the clamp needs the loudest of all frames of a stream, so one block has them all: no second kernel, no
// scratch in memory, the same bits in any batch. One stream is bound by latency (one processor works); a thousand by the
// processors' shared memory.
#include "mel.h"

#include "intrinsics.cuh"

namespace fastloop {
namespace {

constexpr int kFft = 400, kHop = 160, kColumns = 201, kTail = 360;
constexpr int kLookahead = kFft / 2 - kHop;  // edge "wait": the stream is so far ahead
constexpr int kThreads = MEL_THREADS, kWarps = kThreads / 32;
constexpr int kFrames = 3 * kWarps;                       // transformed between two loads of samples
constexpr int kSpan = (kFrames - 1) * kHop + kFft;        // samples they reach over
constexpr int kHeldBins = 128, kWeights = 2048;            // of frames, and weights of filters, in shared memory
constexpr int kFar = 1024;                                // so many samples before are as good as any more
constexpr int kHalf = 100;                                // columns k and 200 - k are made together

struct Complex {
    float re, im;
};
__device__ __forceinline__ Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ __forceinline__ Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
__device__ __forceinline__ Complex minus_i(Complex a) { return {a.im, -a.re}; }
__device__ __forceinline__ Complex times(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ __forceinline__ float square(Complex a) { return a.re * a.re + a.im * a.im; }
// e^(-2 pi i n / d)
__device__ __forceinline__ Complex turn(int n, int d) {
    const float x = 2.0f * static_cast<float>(n) / static_cast<float>(d);
    return {cospif(x), -sinpif(x)};
}

struct Shared {
    alignas(8) float samples[kSpan + kSpan / 8 + 16];
    alignas(8) Complex z[kWarps][200];  // [k1][n2], then [k1][c][d] for column 25 k1 + 176 (c + 5 d) modulo 200
    float power[kWarps][208];
    float y[kFrames * kHeldBins];
    float weights[kWeights];  // of the filters, where they are not zero
    int starts[MEL_BINS];        // where a filter's begin
    int weight_count;
    Complex twiddle[25];      // e^(-2 pi i b c / 25) at [5 c + b]
    float loud[2][kWarps];
};
static_assert(sizeof(Shared) <= MEL_SHARED_BYTES, "two blocks share a processor of sm_90");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTLOOP_MEL_BLOCKS 1
#else
#define FASTLOOP_MEL_BLOCKS 2
#endif

__device__ __forceinline__ int padded(int sample) { return sample + sample / 16 * 2; }

// NaN wins, as in torch.maximum.
__device__ __forceinline__ float louder(float a, float b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// Where a call stands in a stream. Sample r is pcm[r], or tail[360 + r] in front of it; mirrored at both ends, as often as needed.
struct Stream {
    const float* pcm;
    const float* tail;
    int samples, before;
    __device__ float at(int r) const {
        if (r < -before) r = -r - 2 * before;
        if (r >= samples) r = 2 * samples - 2 - r;
        if (r < -before) r = -r - 2 * before;
        return r >= 0 ? pcm[r] : tail[kTail + r];
    }
};

__device__ __forceinline__ void dft8(Complex (&x)[8]) {
    constexpr float kHalfRoot = 0.707106781f;
    const Complex a = x[0] + x[4], b = x[0] - x[4], c = x[2] + x[6], d = minus_i(x[2] - x[6]);
    const Complex e = x[1] + x[5], f = x[1] - x[5], g = x[3] + x[7], h = minus_i(x[3] - x[7]);
    const Complex even[4] = {a + c, b + d, a - c, b - d};
    const Complex odd1 = f + h, odd3 = f - h;
    const Complex turned[4] = {e + g,
                               {kHalfRoot * (odd1.re + odd1.im), kHalfRoot * (odd1.im - odd1.re)},
                               minus_i(e - g),
                               {kHalfRoot * (odd3.im - odd3.re), -kHalfRoot * (odd3.re + odd3.im)}};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        x[k] = even[k] + turned[k];
        x[k + 4] = even[k] - turned[k];
    }
}

__device__ __forceinline__ void dft5(Complex (&x)[5]) {
    constexpr float kCos1 = 0.309016994f, kCos2 = -0.809016994f;  // cos(2 pi / 5), cos(4 pi / 5)
    constexpr float kSin1 = 0.951056516f, kSin2 = 0.587785252f;
    const Complex p = x[1] + x[4], q = x[2] + x[3], r = x[1] - x[4], s = x[2] - x[3];
    const Complex a = {x[0].re + kCos1 * p.re + kCos2 * q.re, x[0].im + kCos1 * p.im + kCos2 * q.im};
    const Complex b = {x[0].re + kCos2 * p.re + kCos1 * q.re, x[0].im + kCos2 * p.im + kCos1 * q.im};
    const Complex u = {kSin1 * r.re + kSin2 * s.re, kSin1 * r.im + kSin2 * s.im};
    const Complex v = {kSin2 * r.re - kSin1 * s.re, kSin2 * r.im - kSin1 * s.im};
    x[0] = x[0] + (p + q);
    x[1] = {a.re + u.im, a.im - u.re};
    x[2] = {b.re + v.im, b.im - v.re};
    x[3] = {b.re - v.im, b.im + v.re};
    x[4] = {a.re - u.im, a.im + u.re};
}

// What a lane needs of the tables, kept in registers from frame to frame.
struct Lane {
    float window[16];   // halved, of its 8 pairs of samples
    Complex half_turn[4];  // e^(-2 pi i k / 400) of its columns k = lane + 32 j
    unsigned pair[4];   // places of its pairs in a frame, padded, two in a register
};

// Pair m = 25 n1 + 8 n2 modulo 200 is element n1 of lane n2's DFT of 8.
__device__ __forceinline__ void prepare(Lane& own, int lane) {
#pragma unroll
    for (int n1 = 0; n1 < 8; ++n1) {
        const int m = (25 * n1 + 8 * lane) % 200;
        const float even = sinpif(static_cast<float>(2 * m) / kFft), odd = sinpif(static_cast<float>(2 * m + 1) / kFft);
        own.window[2 * n1] = 0.5f * even * even;
        own.window[2 * n1 + 1] = 0.5f * odd * odd;
        own.pair[n1 / 2] = (n1 % 2 ? own.pair[n1 / 2] : 0) | static_cast<unsigned>(padded(2 * m)) << n1 % 2 * 16;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) own.half_turn[j] = turn(lane + 32 * j, kFft);
}

// The power spectrum of the frame that begins at `frame` (in shared memory), by one warp.
__device__ __forceinline__ void transform(const float* frame, const Lane& own, const Complex* twiddle, Complex* z, float* power,
                                          int lane) {
    if (lane < 25) {
        Complex x[8];
#pragma unroll
        for (int n1 = 0; n1 < 8; ++n1) {
            const float2 both = *reinterpret_cast<const float2*>(frame + (own.pair[n1 / 2] >> n1 % 2 * 16 & 0xffff));
            x[n1] = {both.x * own.window[2 * n1], both.y * own.window[2 * n1 + 1]};
        }
        dft8(x);
#pragma unroll
        for (int k1 = 0; k1 < 8; ++k1) z[25 * k1 + lane] = x[k1];
    }
    __syncwarp();
    for (int item = lane; item < 40; item += 32) {  // k1 and b, of n2 = 5 a + b: over a
        const int b = item % 5;
        Complex* const at = z + item / 5 * 25 + b;
        Complex x[5] = {at[0], at[5], at[10], at[15], at[20]};
        dft5(x);
        at[0] = x[0];
#pragma unroll
        for (int c = 1; c < 5; ++c) at[5 * c] = times(x[c], twiddle[5 * c + b]);
    }
    __syncwarp();
    for (int item = lane; item < 40; item += 32) {  // k1 and c, of k2 = c + 5 d: over b
        Complex* const at = z + 5 * item;
        Complex x[5] = {at[0], at[1], at[2], at[3], at[4]};
        dft5(x);
#pragma unroll
        for (int d = 0; d < 5; ++d) at[d] = x[d];
    }
    __syncwarp();
    // Z[k] of the pairs -> X[k] = E + W^k O and X[200 - k] = conj(E - W^k O) of the samples.
    const auto place = [](int k) { return k % 8 * 25 + k % 5 * 5 + k % 25 / 5; };
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int k = lane + 32 * j;
        if (k >= kHalf) continue;
        const Complex a = z[place(k)], b = z[place(k ? 200 - k : 0)];
        const Complex even = {a.re + b.re, a.im - b.im}, odd = {a.im + b.im, b.re - a.re};
        const Complex turned = times(odd, own.half_turn[j]);
        power[k] = square(even + turned);
        power[200 - k] = square(even - turned);
    }
    if (lane == 0) power[kHalf] = 4.0f * square(z[place(kHalf)]);
    __syncwarp();
}

// The filters' weights into shared memory, one filter behind the other; where there are too many they stay where they are.
__device__ void gather_filters(Shared& s, const float* filters, const int* bands, int bins) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        int before = 0;
        for (int first = 0; first < bins; first += 32) {
            const int c = first + lane, count = c < bins ? bands[2 * c + 1] - bands[2 * c] : 0;
            int until = count;
            for (int near = 1; near < 32; near *= 2) {
                const int other = __shfl_up_sync(~0u, until, near);
                if (lane >= near) until += other;
            }
            if (c < bins) s.starts[c] = before + until - count;
            before += __shfl_sync(~0u, until, 31);
        }
        if (lane == 0) s.weight_count = before;
    }
    __syncthreads();
    if (s.weight_count <= kWeights)
        for (int c = threadIdx.x; c < bins; c += kThreads)
            for (int k = bands[2 * c]; k < bands[2 * c + 1]; ++k)
                s.weights[s.starts[c] + k - bands[2 * c]] = filters[c * kColumns + k];
}

__device__ __forceinline__ float loudest_of_block(const float* loud) {
    float most = minus_infinity();
    for (int w = 0; w < kWarps; ++w) most = louder(loud[w], most);
    return most;
}

}  // namespace
}  // namespace fastloop

extern "C" __global__ void __launch_bounds__(448, FASTLOOP_MEL_BLOCKS) mel(const __grid_constant__ fastloop::MelParams p) {
    using namespace fastloop;
    FASTLOOP_SHARED(Shared, shared);
    Shared& s = *shared;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    Lane own;
    prepare(own, lane);
    if (thread < 25) s.twiddle[thread] = turn(thread / 5 * (thread % 5), 25);
    let_next_kernel_start();
    wait_for_previous_kernel();
    gather_filters(s, p.filters, p.bands, p.bins);

    const long long slot = p.slots[blockIdx.x], start = p.seen[slot];
    float* const own_tail = p.tail + slot * kTail;
    const int before = static_cast<int>(min(start, static_cast<long long>(kFar)));
    const Stream stream{p.pcm + blockIdx.x * p.pcm_stride, own_tail, p.samples, before};
    const int bins = p.bins, fresh = p.samples / kHop;
    const int extra = p.wait ? 0 : 1, columns = fresh + extra;  // the previous call's last frame comes first
    const int lead = p.wait ? kTail - kHop + kLookahead : kTail;  // how far in front of the call's samples a frame begins
    float* const out = p.frames + static_cast<long long>(blockIdx.x) * fresh * bins;
    float* const y = fresh <= kFrames && bins <= kHeldBins ? s.y : out;
    const bool gathered = s.weight_count <= kWeights;

    float loud = minus_infinity(), provisional = minus_infinity();  // of frames that stay; of the one whose end is mirrored
    for (int first = 0; first < columns; first += kFrames) {
        const int count = min(columns - first, kFrames);
        __syncthreads();  // the samples before have been used
        for (int i = thread; i < (count - 1) * kHop + kFft; i += kThreads)
            s.samples[padded(i)] = stream.at(first * kHop - lead + i);
        __syncthreads();
        for (int f = warp; f < count; f += kWarps) {
            const int column = first + f;
            if (!p.wait && column == 0 && start == 0) continue;  // there was no previous call
            float* const power = s.power[warp];
            transform(s.samples + padded(f * kHop), own, s.twiddle, s.z[warp], power, lane);
            const bool last = !p.wait && column == columns - 1;
            for (int c = lane; c < bins; c += 32) {
                const int low = p.bands[2 * c], high = p.bands[2 * c + 1];
                const float* const weights = gathered ? s.weights + s.starts[c] : p.filters + c * kColumns + low;
                float sum = 0;
                for (int k = low; k < high; ++k) sum += weights[k - low] * power[k];
                const float value = log10f(sum < 1e-10f ? 1e-10f : sum);
                if (last) provisional = louder(value, provisional);
                else loud = louder(value, loud);
                if (column >= extra) y[(column - extra) * bins + c] = value;
            }
        }
    }
    for (int near = 16; near > 0; near /= 2) {
        loud = louder(__shfl_xor_sync(~0u, loud, near), loud);
        provisional = louder(__shfl_xor_sync(~0u, provisional, near), provisional);
    }
    if (lane == 0) {
        s.loud[0][warp] = loud;
        s.loud[1][warp] = provisional;
    }
    const int kept = p.samples + thread;  // in the tail and this call's samples, one behind the other
    const float sample = thread >= kTail ? 0.0f : kept < kTail ? own_tail[kept] : stream.pcm[kept - kTail];
    float top = p.peak[slot];
    __syncthreads();  // all of the state is read, and all logarithms are there
    if (p.running) {
        const float final_peak = louder(loudest_of_block(s.loud[0]), top);
        if (thread == 0) p.peak[slot] = final_peak;
        top = louder(loudest_of_block(s.loud[1]), final_peak);
    }
    if (thread < kTail) own_tail[thread] = sample;
    if (thread == 0) p.seen[slot] = start + p.samples;
    for (int i = thread; i < fresh * bins; i += kThreads) out[i] = (louder(y[i], top - 8.0f) + 4.0f) * 0.25f;
}
