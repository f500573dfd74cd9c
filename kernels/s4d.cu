// S4D (src/ops/s4d): complex states that turn and decay at fixed rates.
//
//   A = −exp(log_a_real) + i a_imag, Ā = exp(Δ A), R = 2 C (Ā − 1) / A
//   h ← Ā h + u,  y = Re Σ R h + D u
//
// Backward, with e the conjugate of the gradient of h:
//   e ← Ā e₊ + R dy,  du = Re Σ e + D dy             the recurrence from the end
//   s ← Ā s + h₋,  dR = Σ conj(h) dy,  dĀ = Σ conj(R s) dy + conj(s_T) d_state,  dD = Σ u dy
// so no state of the past is needed: a forward pass carries h and s = ∂h/∂Ā. Ā and R, and the way from their
// gradients to those of the parameters, are computed in f64. Rounded to f32 is not Ā but Ā − 1, what a state loses
// at a step: Ā is near 1 and raised to the power of the sequence's length.
//
// Source: Gu et al., "On the parameterization and initialization of diagonal state space models", 2022.
//
// LANES lanes share a channel of one sequence, each with P of its pairs of states in registers; a block of 128
// threads has 128 / LANES channels side by side, and TILE steps of them in shared memory at a time.
#include "common.cuh"

constexpr int BLOCK = 128, TILE = 32;

struct Complex {
    double re, im;
};
__device__ __forceinline__ Complex times(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ __forceinline__ Complex conj(Complex a) { return {a.re, -a.im}; }
__device__ __forceinline__ Complex scaled(Complex a, double by) { return {a.re * by, a.im * by}; }
__device__ __forceinline__ Complex inverse(Complex a) {
    return scaled(conj(a), 1. / (a.re * a.re + a.im * a.im));
}

// A, Δ, Ā, Ā − 1 and (Ā − 1) / A of one state.
struct Discrete {
    Complex a, kept, less, held;
    double step;

    __device__ __forceinline__ Discrete(float log_dt, float log_a_real, float a_imag) {
        a = {-exp((double)log_a_real), (double)a_imag};
        step = exp((double)log_dt);
        const Complex x = scaled(a, step);
        // e^x − 1 without cancellation.
        const double grown = exp(x.re), half = sin(0.5 * x.im);
        less = {expm1(x.re) - 2. * grown * half * half, grown * sin(x.im)};
        kept = {1. + less.re, less.im};
        held = times(less, inverse(a));
    }
};

// coef [D, N, 4]: Ā − 1 and R. Any one-dimensional grid.
extern "C" __global__ void __launch_bounds__(256)
s4d_discrete(const float* __restrict__ c, const float* __restrict__ log_dt,
             const float* __restrict__ log_a_real, const float* __restrict__ a_imag, float* __restrict__ coef,
             int width, int pairs) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (long long)width * pairs;
         i += (long long)gridDim.x * blockDim.x) {
        const Discrete at(log_dt[i / pairs], log_a_real[i], a_imag[i]);
        const Complex read = scaled(times({(double)c[2 * i], (double)c[2 * i + 1]}, at.held), 2.);
        const float values[4] = {(float)at.less.re, (float)at.less.im, (float)read.re, (float)read.im};
        store_vec<4>(coef + 4 * i, values);
    }
}

// The pairs of one thread: N of them in all, pair n = lane + p · LANES.
template <int LANES, int P>
struct Pairs {
    float re[P], im[P];

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int p = 0; p < P; p++) re[p] = im[p] = 0.f;
    }
    // From (re, im) at `from`, `stride` floats from pair to pair; zeros past the last, or if there is nothing.
    __device__ __forceinline__ void load(const float* from, int stride, int lane, int pairs, float sign = 1.f) {
        zero();
        if (!from) return;
#pragma unroll
        for (int p = 0; p < P; p++) {
            const int n = lane + p * LANES;
            if (n < pairs) re[p] = from[n * stride], im[p] = sign * from[n * stride + 1];
        }
    }
    __device__ __forceinline__ void store(float* to, int lane, int pairs, float sign = 1.f) const {
#pragma unroll
        for (int p = 0; p < P; p++) {
            const int n = lane + p * LANES;
            if (n < pairs) to[2 * n] = re[p], to[2 * n + 1] = sign * im[p];
        }
    }
    // This pair becomes (1 + less) · itself + (b_re, b_im).
    __device__ __forceinline__ void step(const Pairs& less, int p, float b_re, float b_im) {
        const float x = re[p], y = im[p];
        re[p] = x + fmaf(less.re[p], x, fmaf(-less.im[p], y, b_re));
        im[p] = y + fmaf(less.re[p], y, fmaf(less.im[p], x, b_im));
    }
};

// Where a thread stands.
template <int LANES>
struct Place {
    static constexpr int CHANNELS = BLOCK / LANES;
    int lane, own, first, channel, b;
    bool live;

    __device__ __forceinline__ explicit Place(int width) {
        lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
        first = blockIdx.x * CHANNELS, channel = first + own, b = blockIdx.y;
        live = channel < width;
    }
    // Steps t0.. of the block's channels of x [B, T, D]; zeros past the ends. Barriers begin and end it.
    template <class T>
    __device__ __forceinline__ void load(float (&tile)[TILE][CHANNELS], const T* x, int t0, int steps,
                                         int width) const {
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE * CHANNELS; i += BLOCK) {
            const int t = i / CHANNELS, c = i % CHANNELS;
            const bool there = t0 + t < steps && first + c < width;
            tile[t][c] = there ? to_f(x[((long long)b * steps + t0 + t) * width + first + c]) : 0.f;
        }
        __syncthreads();
    }
    template <class T>
    __device__ __forceinline__ void store(const float (&tile)[TILE][CHANNELS], T* x, int t0, int steps,
                                          int width) const {
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE * CHANNELS; i += BLOCK) {
            const int t = i / CHANNELS, c = i % CHANNELS;
            if (t0 + t < steps && first + c < width)
                x[((long long)b * steps + t0 + t) * width + first + c] = from_f<T>(tile[t][c]);
        }
    }
};

template <int LANES>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL, x, offset);
    return x;
}

// y and the final state from x = u and the initial state; in reverse du and the gradient of the initial state
// from x = dy and the gradient of the final one. start, end [B, D, N, 2]; start may be null.
template <class T, int LANES, int P>
__device__ __forceinline__ void scan(const float* __restrict__ coef, const T* __restrict__ x,
                                     const float* __restrict__ d, const float* __restrict__ start,
                                     T* __restrict__ y, float* __restrict__ end, int steps, int width,
                                     int pairs, bool reverse) {
    constexpr int CHANNELS = Place<LANES>::CHANNELS;
    __shared__ float in[TILE][CHANNELS], out[TILE][CHANNELS];
    const Place<LANES> at(width);
    const long long own = at.live ? at.channel : 0, state = ((long long)at.b * width + own) * 2 * pairs;
    const float sign = reverse ? -1.f : 1.f, skip = d[own];
    Pairs<LANES, P> less, read, h;
    less.load(coef + own * 4 * pairs, 4, at.lane, pairs);
    read.load(coef + own * 4 * pairs + 2, 4, at.lane, pairs);
    h.load(start ? start + state : nullptr, 2, at.lane, pairs, sign);
    const int tiles = ceil_div(steps, TILE);
    for (int i = 0; i < tiles; i++) {
        const int t0 = (reverse ? tiles - 1 - i : i) * TILE, count = min(TILE, steps - t0);
        at.load(in, x, t0, steps, width);
        for (int j = 0; j < count; j++) {
            const int t = reverse ? count - 1 - j : j;
            const float u = in[t][at.own];
            float sum = 0.f;
            if (reverse) {
#pragma unroll
                for (int p = 0; p < P; p++) {
                    h.re[p] = fmaf(read.re[p], u, h.re[p]);
                    h.im[p] = fmaf(read.im[p], u, h.im[p]);
                    sum += h.re[p];
                    h.step(less, p, 0.f, 0.f);
                }
            } else {
#pragma unroll
                for (int p = 0; p < P; p++) {
                    h.step(less, p, u, 0.f);
                    sum = fmaf(read.re[p], h.re[p], fmaf(-read.im[p], h.im[p], sum));
                }
            }
            sum = lanes_sum<LANES>(sum);
            if (at.lane == 0) out[t][at.own] = fmaf(skip, u, sum);
        }
        at.store(out, y, t0, steps, width);
    }
    if (at.live) h.store(end + state, at.lane, pairs, sign);
}

// What each sequence adds to the gradients of R and Ā, sums [B, D, N, 4], and of D, skips [B, D]. start,
// d_state [B, D, N, 2] may be null.
template <class T, int LANES, int P>
__device__ __forceinline__ void sums(const float* __restrict__ coef, const T* __restrict__ u,
                                     const T* __restrict__ dy, const float* __restrict__ start,
                                     const float* __restrict__ d_state, float* __restrict__ sums,
                                     float* __restrict__ skips, int steps, int width, int pairs) {
    constexpr int CHANNELS = Place<LANES>::CHANNELS;
    __shared__ float us[TILE][CHANNELS], ds[TILE][CHANNELS];
    const Place<LANES> at(width);
    const long long own = at.live ? at.channel : 0, row = (long long)at.b * width + own;
    Pairs<LANES, P> less, h, s, by_h, by_s;
    less.load(coef + own * 4 * pairs, 4, at.lane, pairs);
    h.load(start ? start + row * 2 * pairs : nullptr, 2, at.lane, pairs);
    s.zero(), by_h.zero(), by_s.zero();
    float skip = 0.f;
    for (int t0 = 0; t0 < steps; t0 += TILE) {
        at.load(us, u, t0, steps, width);
        at.load(ds, dy, t0, steps, width);
        const int count = min(TILE, steps - t0);
        for (int t = 0; t < count; t++) {
            const float x = us[t][at.own], d = ds[t][at.own];
            skip = fmaf(x, d, skip);
#pragma unroll
            for (int p = 0; p < P; p++) {
                s.step(less, p, h.re[p], h.im[p]);
                h.step(less, p, x, 0.f);
                by_h.re[p] = fmaf(h.re[p], d, by_h.re[p]);
                by_h.im[p] = fmaf(h.im[p], d, by_h.im[p]);
                by_s.re[p] = fmaf(s.re[p], d, by_s.re[p]);
                by_s.im[p] = fmaf(s.im[p], d, by_s.im[p]);
            }
        }
    }
    if (!at.live) return;
    if (at.lane == 0) skips[row] = skip;
    Pairs<LANES, P> read, grad;
    read.load(coef + own * 4 * pairs + 2, 4, at.lane, pairs);
    grad.load(d_state ? d_state + row * 2 * pairs : nullptr, 2, at.lane, pairs);
#pragma unroll
    for (int p = 0; p < P; p++) {
        const int n = at.lane + p * LANES;
        if (n >= pairs) break;
        // conj(R Σ s dy) + conj(s) d_state
        const float re = read.re[p] * by_s.re[p] - read.im[p] * by_s.im[p];
        const float im = -read.re[p] * by_s.im[p] - read.im[p] * by_s.re[p];
        const float end_re = s.re[p] * grad.re[p] + s.im[p] * grad.im[p];
        const float end_im = s.re[p] * grad.im[p] - s.im[p] * grad.re[p];
        const float values[4] = {by_h.re[p], -by_h.im[p], re + end_re, im + end_im};
        store_vec<4>(sums + (row * pairs + n) * 4, values);
    }
}

// Adds over the batch, in its order, and goes on to the parameters; all outputs f32. Grid D, block 128.
extern "C" __global__ void __launch_bounds__(BLOCK)
s4d_params(const float* __restrict__ c, const float* __restrict__ log_dt, const float* __restrict__ log_a_real,
           const float* __restrict__ a_imag, const float* __restrict__ sums, const float* __restrict__ skips,
           float* __restrict__ dc, float* __restrict__ d_log_dt, float* __restrict__ d_log_a_real,
           float* __restrict__ d_a_imag, float* __restrict__ dd, int batch, int width, int pairs) {
    __shared__ double steps[BLOCK];
    const int channel = blockIdx.x;
    double d_step = 0.;
    for (int n = threadIdx.x; n < pairs; n += BLOCK) {
        const long long i = (long long)channel * pairs + n;
        Complex d_read = {0., 0.}, d_kept = {0., 0.};
        for (int b = 0; b < batch; b++) {
            float values[4];
            load_vec<4>(sums + ((long long)b * width * pairs + i) * 4, values);
            d_read.re += values[0], d_read.im += values[1], d_kept.re += values[2], d_kept.im += values[3];
        }
        d_read = scaled(d_read, 2.);
        // The gradient of a complex number z is ∂/∂Re z + i ∂/∂Im z: conj(f′) carries it through f.
        const Discrete at(log_dt[channel], log_a_real[i], a_imag[i]);
        const Complex by_a = conj(inverse(at.a));
        const Complex d_c = times(conj(at.held), d_read);
        const Complex d_held = times(conj({(double)c[2 * i], (double)c[2 * i + 1]}), d_read);
        const Complex more = times(by_a, d_held);
        const Complex through = times(conj(at.kept), {d_kept.re + more.re, d_kept.im + more.im});
        const Complex less = times(conj(at.held), more);
        dc[2 * i] = (float)d_c.re, dc[2 * i + 1] = (float)d_c.im;
        d_log_a_real[i] = (float)(at.a.re * (at.step * through.re - less.re));
        d_a_imag[i] = (float)(at.step * through.im - less.im);
        d_step += at.step * times(conj(at.a), through).re;
    }
    steps[threadIdx.x] = d_step;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0., skip = 0.;
        for (int i = 0; i < BLOCK; i++) total += steps[i];
        for (int b = 0; b < batch; b++) skip += skips[(long long)b * width + channel];
        d_log_dt[channel] = (float)total;
        dd[channel] = (float)skip;
    }
}

// s4d_scan_<LANES>x<P>_<f32|bf16>, s4d_sums_…: grid (ceil(D · LANES / 128), B), block 128.
#define KERNELS(LANES, P, NAME, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(BLOCK) s4d_scan_##LANES##x##P##_##NAME(                              \
        const float* coef, const T* x, const float* d, const float* start, T* y, float* end, int steps, int width,    \
        int pairs, int reverse) {                                                                                     \
        scan<T, LANES, P>(coef, x, d, start, y, end, steps, width, pairs, reverse != 0);                              \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK) s4d_sums_##LANES##x##P##_##NAME(                              \
        const float* coef, const T* u, const T* dy, const float* start, const float* d_state, float* out,             \
        float* skips, int steps, int width, int pairs) {                                                              \
        sums<T, LANES, P>(coef, u, dy, start, d_state, out, skips, steps, width, pairs);                              \
    }
#define ROUTES(LANES, P)          \
    KERNELS(LANES, P, f32, float) \
    KERNELS(LANES, P, bf16, bf16)
ROUTES(8, 2)
ROUTES(8, 4)
ROUTES(8, 8)
ROUTES(16, 8)
