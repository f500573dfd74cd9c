// What RWKV-7's time mixing does around the recurrence (kernels/dplr.cu).
//
//   shift  y_j = x + (x_before - x) μ_j for n mixes       dx = Σ_j dy_j (1 - μ_j) + the next step's Σ_j dy_j μ_j,
//                                                         dμ_j = Σ dy_j (x_before - x)
//   keys   κ = k ⊙ k_k / |k ⊙ k_k|,  erase = η κ,  write = k (1 + (η - 1) k_a)
//   read   y = (w ⊙ ô + b + (Σ r k r_k) v) ⊙ gate, ô the layer norm of a head's o without weights
// Source: Peng et al., "RWKV-7 Goose", 2025, section 4.1.
//
// Activations in T, η and parameters in f32. shift: x, y_j [B, T, D], start [B, D] or null for zeros, μ [n, D]; n is at
// most 6, and the pointers behind those in use are null, as is that of a dy_j that is zero. keys, read: [B, T, H, K]
// and parameters [H, K], K at most 128. Grid: shift forward (any, tiles of 256 channels), backward (slabs, tiles); others (slabs, H).
// Block: 256 threads. partial_* [slabs, ..] take the sums of each slab of tokens, which columns_final adds.
#include "heads.cuh"

constexpr int MIXES = 6;

// y_j or dy_j by j.
template <class T>
struct Mixed {
    T* at[MIXES];
};
#define MIXED(T, x) T *x##0, T *x##1, T *x##2, T *x##3, T *x##4, T *x##5
#define EACH(x) {x##0, x##1, x##2, x##3, x##4, x##5}

template <class T>
__device__ __forceinline__ float earlier(const T* x, const T* start, int token, int steps, int width, int c) {
    if (token % steps) return to_f(x[(long long)(token - 1) * width + c]);
    return start ? to_f(start[(long long)(token / steps) * width + c]) : 0.f;
}

template <class T>
__device__ __forceinline__ void shift_forward(const T* x, const float* mix, const T* start, Mixed<T> y, T* last,
                                              int tokens, int steps, int width) {
    const int c = blockIdx.y * BLOCK + threadIdx.x;
    if (c >= width) return;
    float share[MIXES];
#pragma unroll
    for (int j = 0; j < MIXES; j++) share[j] = y.at[j] ? mix[j * width + c] : 0.f;
    for (int t = blockIdx.x; t < tokens; t += gridDim.x) {
        const long long at = (long long)t * width + c;
        const float now = to_f(x[at]), change = earlier(x, start, t, steps, width, c) - now;
#pragma unroll
        for (int j = 0; j < MIXES; j++)
            if (y.at[j]) y.at[j][at] = from_f<T>(now + change * share[j]);
        if (t % steps == steps - 1) last[(long long)(t / steps) * width + c] = x[at];
    }
}

// d_last [B, D] or null. A slab is a range of tokens that follow each other.
template <class T>
__device__ __forceinline__ void shift_backward(const T* x, const float* mix, const T* start,
                                               Mixed<const T> dy, const T* d_last, T* dx, T* d_start, float* partial, int tokens,
                                               int steps, int width, int mixes) {
    const int c = blockIdx.y * BLOCK + threadIdx.x;
    if (c >= width) return;
    float share[MIXES], sums[MIXES] = {};
#pragma unroll
    for (int j = 0; j < MIXES; j++) share[j] = j < mixes ? mix[j * width + c] : 0.f;
    const int first = (long long)tokens * blockIdx.x / gridDim.x;
    const int end = (long long)tokens * (blockIdx.x + 1) / gridDim.x;
    // What a token gives to the one before it.
    const auto given = [&](int t) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < MIXES; j++)
            if (dy.at[j]) sum += to_f(dy.at[j][(long long)t * width + c]) * share[j];
        return sum;
    };
    float after = end < tokens && first < end ? given(end) : 0.f;
    for (int t = end - 1; t >= first; t--) {
        const long long at = (long long)t * width + c, sequence = (long long)(t / steps) * width + c;
        const float now = to_f(x[at]), change = earlier(x, start, t, steps, width, c) - now;
        const bool is_last = t % steps == steps - 1;
        float sum = is_last ? (d_last ? to_f(d_last[sequence]) : 0.f) : after, back = 0.f;
#pragma unroll
        for (int j = 0; j < MIXES; j++)
            if (dy.at[j]) {
                const float d = to_f(dy.at[j][at]);
                sums[j] += d * change;
                sum += d - d * share[j];
                back += d * share[j];
            }
        dx[at] = from_f<T>(sum);
        after = back;
        if (t % steps == 0 && d_start) d_start[sequence] = from_f<T>(back);
    }
#pragma unroll
    for (int j = 0; j < MIXES; j++)
        if (j < mixes) partial[((long long)blockIdx.x * mixes + j) * width + c] = sums[j];
}

// ---- keys

__device__ __forceinline__ float normalise(const float (&x)[OWN]) { return 1.f / fmaxf(sqrtf(dot(x, x)), 1e-12f); }

template <class T>
__device__ __forceinline__ void keys_forward(const T* k, const float* eta, const float* k_k, const float* k_a,
                                             T* kappa, T* erase, T* write, int tokens, int key) {
    const HeadRows rows(key);
    float scale[OWN], bend[OWN];
    rows.load_param(k_k, scale);
    rows.load_param(k_a, bend);
    rows.for_each(tokens, [&](long long, long long at) {
        float x[OWN], rate[OWN], unit[OWN];
        rows.load(k + at, x);
        rows.load(eta + at, rate);
#pragma unroll
        for (int i = 0; i < OWN; i++) unit[i] = x[i] * scale[i];
        const float r = normalise(unit);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            unit[i] *= r;
            x[i] *= 1.f + (rate[i] - 1.f) * bend[i];
            rate[i] *= unit[i];
        }
        rows.store(kappa + at, unit);
        rows.store(erase + at, rate);
        rows.store(write + at, x);
    });
}

// partial [slabs, 2, H K]: the sums for k_k and k_a.
template <class T>
__device__ __forceinline__ void keys_backward(const T* k, const float* eta, const float* k_k, const float* k_a,
                                              const T* d_kappa, const T* d_erase, const T* d_write, T* dk,
                                              float* d_eta, float* partial, int tokens, int key) {
    const HeadRows rows(key);
    float scale[OWN], bend[OWN], d_scale[OWN] = {}, d_bend[OWN] = {};
    rows.load_param(k_k, scale);
    rows.load_param(k_a, bend);
    rows.for_each(tokens, [&](long long, long long at) {
        float x[OWN], rate[OWN], unit[OWN], of_unit[OWN], of_erase[OWN], of_write[OWN];
        rows.load(k + at, x);
        rows.load(eta + at, rate);
        rows.load(d_kappa + at, of_unit);
        rows.load(d_erase + at, of_erase);
        rows.load(d_write + at, of_write);
#pragma unroll
        for (int i = 0; i < OWN; i++) unit[i] = x[i] * scale[i];
        const float r = normalise(unit);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            unit[i] *= r;
            of_unit[i] += rate[i] * of_erase[i];
        }
        const float along = dot(unit, of_unit);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float d = r * (of_unit[i] - unit[i] * along);
            d_scale[i] += d * x[i];
            d_bend[i] += of_write[i] * x[i] * (rate[i] - 1.f);
            of_erase[i] = of_erase[i] * unit[i] + of_write[i] * x[i] * bend[i];
            x[i] = d * scale[i] + of_write[i] * (1.f + (rate[i] - 1.f) * bend[i]);
        }
        rows.store(dk + at, x);
        rows.store(d_eta + at, of_erase);
    });
    float* out = partial + 2LL * blockIdx.x * rows.heads * key;
    rows.store_sum(d_scale, out);
    rows.store_sum(d_bend, out + rows.heads * key);
}

// ---- read

// ô of a row, in place; gives 1 / the deviation.
__device__ __forceinline__ float standardise(float (&x)[OWN], const HeadRows& rows, float eps) {
    float ones[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) ones[i] = rows.has(i) ? 1.f : 0.f;
    const float mean = dot(x, ones) / rows.width;
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = rows.has(i) ? x[i] - mean : 0.f;
    const float r = 1.f / sqrtf(dot(x, x) / rows.width + eps);
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] *= r;
    return r;
}

// gate: null for none.
template <class T>
__device__ __forceinline__ void read_forward(const T* o, const T* r, const T* k, const T* v, const T* gate,
                                             const float* w, const float* b, const float* r_k, T* y, float eps,
                                             int tokens, int key) {
    const HeadRows rows(key);
    float scale[OWN], shift[OWN], bonus[OWN];
    rows.load_param(w, scale);
    rows.load_param(b, shift);
    rows.load_param(r_k, bonus);
    rows.for_each(tokens, [&](long long, long long at) {
        float x[OWN], query[OWN], weight[OWN];
        rows.load(o + at, x);
        standardise(x, rows, eps);
        rows.load(r + at, query);
        rows.load(k + at, weight);
#pragma unroll
        for (int i = 0; i < OWN; i++) weight[i] *= bonus[i];
        const float own = dot(query, weight);
        rows.load(v + at, weight);
        if (gate) rows.load(gate + at, query);
#pragma unroll
        for (int i = 0; i < OWN; i++)
            x[i] = (x[i] * scale[i] + shift[i] + own * weight[i]) * (gate ? query[i] : 1.f);
        rows.store(y + at, x);
    });
}

// partial_norm [slabs, 2, H K]: the sums for w and b; partial_bonus [slabs, H K]: those for r_k.
template <class T>
__device__ __forceinline__ void read_backward(const T* o, const T* r, const T* k, const T* v, const T* gate,
                                              const float* w, const float* b, const float* r_k, const T* dy, T* d_o,
                                              T* dr, T* dk, T* dv, T* d_gate, float* partial_norm,
                                              float* partial_bonus, float eps, int tokens, int key) {
    const HeadRows rows(key);
    float scale[OWN], shift[OWN], bonus[OWN], d_scale[OWN] = {}, d_shift[OWN] = {}, d_bonus[OWN] = {};
    rows.load_param(w, scale);
    rows.load_param(b, shift);
    rows.load_param(r_k, bonus);
    rows.for_each(tokens, [&](long long, long long at) {
        float x[OWN], query[OWN], weight[OWN], value[OWN], d[OWN];
        rows.load(o + at, x);
        const float deviation = standardise(x, rows, eps);
        rows.load(r + at, query);
        rows.load(k + at, weight);
        rows.load(v + at, value);
        rows.load(dy + at, d);
        float own = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; i++) own += query[i] * weight[i] * bonus[i];
        own = warp_sum(own);
        if (gate) {
            float open[OWN], of_gate[OWN];
            rows.load(gate + at, open);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                of_gate[i] = d[i] * (x[i] * scale[i] + shift[i] + own * value[i]);
                d[i] *= open[i];
            }
            rows.store(d_gate + at, of_gate);
        }
        const float of_own = dot(d, value);
        float of_o[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            d_scale[i] += d[i] * x[i];
            d_shift[i] += d[i];
            d_bonus[i] += of_own * query[i] * weight[i];
            value[i] = own * d[i];
            of_o[i] = d[i] * scale[i];
            const float of_query = of_own * weight[i] * bonus[i];
            weight[i] = of_own * query[i] * bonus[i];
            query[i] = of_query;
        }
        rows.store(dr + at, query);
        rows.store(dk + at, weight);
        rows.store(dv + at, value);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; i++) sum += of_o[i];
        const float mean = warp_sum(sum) / key, along = dot(of_o, x) / key;
#pragma unroll
        for (int i = 0; i < OWN; i++) of_o[i] = deviation * (of_o[i] - mean - x[i] * along);
        rows.store(d_o + at, of_o);
    });
    float* out = partial_norm + 2LL * blockIdx.x * rows.heads * key;
    rows.store_sum(d_scale, out);
    rows.store_sum(d_shift, out + rows.heads * key);
    rows.store_sum(d_bonus, partial_bonus + (long long)blockIdx.x * rows.heads * key);
}

#define KERNELS(SUFFIX, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(BLOCK) rwkv7_shift_forward_##SUFFIX(                                \
        const T* x, const float* mix, const T* start, MIXED(T, y), T* last, int tokens, int steps, int width) {      \
        shift_forward<T>(x, mix, start, EACH(y), last, tokens, steps, width);                                        \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) rwkv7_shift_backward_##SUFFIX(                               \
        const T* x, const float* mix, const T* start, MIXED(const T, dy), const T* d_last, T* dx, T* d_start,        \
        float* partial, int tokens, int steps, int width, int mixes) {                                               \
        shift_backward<T>(x, mix, start, EACH(dy), d_last, dx, d_start, partial, tokens, steps, width, mixes);             \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) rwkv7_keys_forward_##SUFFIX(                                 \
        const T* k, const float* eta, const float* k_k, const float* k_a, T* kappa, T* erase, T* write, int tokens,  \
        int key) {                                                                                                   \
        keys_forward<T>(k, eta, k_k, k_a, kappa, erase, write, tokens, key);                                         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) rwkv7_keys_backward_##SUFFIX(                                \
        const T* k, const float* eta, const float* k_k, const float* k_a, const T* d_kappa, const T* d_erase,        \
        const T* d_write, T* dk, float* d_eta, float* partial, int tokens, int key) {                                \
        keys_backward<T>(k, eta, k_k, k_a, d_kappa, d_erase, d_write, dk, d_eta, partial, tokens, key);              \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) rwkv7_read_forward_##SUFFIX(                                 \
        const T* o, const T* r, const T* k, const T* v, const T* gate, const float* w, const float* b,               \
        const float* r_k, T* y, float eps, int tokens, int key) {                                                    \
        read_forward<T>(o, r, k, v, gate, w, b, r_k, y, eps, tokens, key);                                           \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) rwkv7_read_backward_##SUFFIX(                                \
        const T* o, const T* r, const T* k, const T* v, const T* gate, const float* w, const float* b,               \
        const float* r_k, const T* dy, T* d_o, T* dr, T* dk, T* dv, T* d_gate, float* partial_norm,                  \
        float* partial_bonus, float eps, int tokens, int key) {                                                      \
        read_backward<T>(o, r, k, v, gate, w, b, r_k, dy, d_o, dr, dk, dv, d_gate, partial_norm, partial_bonus, eps, \
                         tokens, key);                                                                               \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
