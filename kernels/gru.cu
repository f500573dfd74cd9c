// Gated recurrent unit (src/ops/gru): a launch for every step, since every unit's next state asks for all.
//
//   a = h Wᵀ + bias                                r = σ(x_r + a_r), z = σ(x_z + a_z), n = tanh(x_n + r a_n)
//   h ← (1 − z) n + z h
//
// Backward, with d = dy + z₊ d₊ + da₊ W of the step behind (₊):
//   dn = d (1 − z)(1 − n²), dz = d (h₋ − n) z (1 − z), dr = dn a_n r (1 − r)
//   dx = (dr, dz, dn), da = (dr, dz, r dn)
//   dW = Σ daᵀ h₋ and d bias = Σ da are taken over all steps at the end, by a matrix product and column sums.
//
// A block has UNITS units of ROWS sequences, a thread one unit of one sequence at every step: what only that
// unit needs (z d, the gates) it finds where it left it. States are carried in f32 whatever the activations
// are, and products are f32 multiplications and additions on every route.
//
// gru_forward_<f32|bf16>, gru_backward_<f32|bf16>: grid (ceil(D/UNITS), ceil(B/ROWS)), block UNITS · ROWS.
#include "common.cuh"

constexpr int UNITS = 16, ROWS = 8, BLOCK = UNITS * ROWS;
// Terms of the sums that are in shared memory at a time; rows are padded against bank conflicts.
constexpr int SPAN = 128, PADDED = SPAN + 4;

__device__ __forceinline__ float dot4(const float* a, const float* b, float sum) {
    float x[4], y[4];
    load_vec<4>(a, x);
    load_vec<4>(b, y);
#pragma unroll
    for (int i = 0; i < 4; i++) sum = fmaf(x[i], y[i], sum);
    return sum;
}

// Step t. h [B, D] before it, null for zeros; next [B, D] behind it; y [B, T, D]; saved [B, T, 4, D] or null:
// r, z, n and a_n for the backward pass.
template <class T>
__device__ __forceinline__ void forward(const T* __restrict__ x, const T* __restrict__ weight,
                                        const float* __restrict__ bias, const float* __restrict__ h,
                                        float* __restrict__ next, T* __restrict__ y, float* __restrict__ saved,
                                        int batch, int steps, int width, int t) {
    __shared__ __align__(16) float hs[ROWS][PADDED], ws[3 * UNITS][PADDED];
    const int unit0 = blockIdx.x * UNITS, row0 = blockIdx.y * ROWS;
    const int own = threadIdx.x % UNITS, row = threadIdx.x / UNITS;
    const int unit = unit0 + own, b = row0 + row;
    float a[3] = {0.f, 0.f, 0.f};
    for (int k0 = 0; h && k0 < width; k0 += SPAN) {
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * SPAN; i += BLOCK) {
            const int r = i / SPAN, k = i % SPAN;
            hs[r][k] = row0 + r < batch && k0 + k < width ? h[(long long)(row0 + r) * width + k0 + k] : 0.f;
        }
#pragma unroll 8
        for (int i = threadIdx.x; i < 3 * UNITS * SPAN; i += BLOCK) {
            const int r = i / SPAN, k = i % SPAN, u = unit0 + r % UNITS;
            const bool there = u < width && k0 + k < width;
            ws[r][k] = there ? to_f(weight[((long long)(r / UNITS) * width + u) * width + k0 + k]) : 0.f;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < SPAN; k += 4) {
#pragma unroll
            for (int g = 0; g < 3; g++) a[g] = dot4(hs[row] + k, ws[g * UNITS + own] + k, a[g]);
        }
    }
    if (b >= batch || unit >= width) return;
    const long long token = (long long)b * steps + t;
    const T* gates = x + token * 3 * width;
#pragma unroll
    for (int g = 0; g < 3; g++) a[g] += bias[g * width + unit];
    const float r = sigmoid(to_f(gates[unit]) + a[0]), z = sigmoid(to_f(gates[width + unit]) + a[1]);
    const float n = tanhf(fmaf(r, a[2], to_f(gates[2 * width + unit])));
    const float before = h ? h[(long long)b * width + unit] : 0.f;
    const float after = fmaf(z, before - n, n);
    next[(long long)b * width + unit] = after;
    y[token * width + unit] = from_f<T>(after);
    if (saved) {
        float* kept = saved + token * 4 * width + unit;
        kept[0] = r, kept[width] = z, kept[2 * width] = n, kept[3 * width] = a[2];
    }
}

// Step t, from the last to −1: then only the gradient of the initial state is left to write, to `carry`. start
// [B, D] or null: the initial state; dy [B, T, D] or null; behind [B, 3D]: da of step t + 1, null at the last
// step, where carry [B, D] holds the gradient of the final state; else carry holds z₊ d₊ and becomes z d. now
// [B, 3D] becomes da, as does da [B, T, 3D] in the type of the activations; before [B, T, D] the states before
// the steps.
template <class T>
__device__ __forceinline__ void backward(const T* __restrict__ weight, const float* __restrict__ saved,
                                         const T* __restrict__ y, const float* __restrict__ start,
                                         const T* __restrict__ dy, const float* __restrict__ behind,
                                         float* __restrict__ carry, float* __restrict__ now, T* __restrict__ dx,
                                         T* __restrict__ da, T* __restrict__ before, int batch, int steps,
                                         int width, int t) {
    __shared__ __align__(16) float ds[ROWS][PADDED];
    __shared__ float ws[SPAN][UNITS];
    const int unit0 = blockIdx.x * UNITS, row0 = blockIdx.y * ROWS;
    const int own = threadIdx.x % UNITS, row = threadIdx.x / UNITS;
    const int unit = unit0 + own, b = row0 + row, wide = 3 * width;
    float sum = 0.f;
    for (int k0 = 0; behind && k0 < wide; k0 += SPAN) {
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * SPAN; i += BLOCK) {
            const int r = i / SPAN, k = i % SPAN;
            ds[r][k] = row0 + r < batch && k0 + k < wide ? behind[(long long)(row0 + r) * wide + k0 + k] : 0.f;
        }
#pragma unroll 8
        for (int i = threadIdx.x; i < SPAN * UNITS; i += BLOCK) {
            const int k = i / UNITS, u = unit0 + i % UNITS;
            const bool there = k0 + k < wide && u < width;
            ws[k][i % UNITS] = there ? to_f(weight[(long long)(k0 + k) * width + u]) : 0.f;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < SPAN; k += 4) {
            float d[4];
            load_vec<4>(ds[row] + k, d);
#pragma unroll
            for (int i = 0; i < 4; i++) sum = fmaf(d[i], ws[k + i][own], sum);
        }
    }
    if (b >= batch || unit >= width) return;
    const long long at = (long long)b * width + unit;
    float d = sum + carry[at];
    if (t < 0) {
        carry[at] = d;
        return;
    }
    const long long token = (long long)b * steps + t;
    if (dy) d += to_f(dy[token * width + unit]);
    const float* kept = saved + token * 4 * width + unit;
    const float r = kept[0], z = kept[width], n = kept[2 * width], a_n = kept[3 * width];
    float h = 0.f;
    if (t > 0) h = to_f(y[(token - 1) * width + unit]);
    else if (start) h = start[at];
    const float dn = d * (1.f - z) * (1.f - n * n);
    const float dz = d * (h - n) * z * (1.f - z), dr = dn * a_n * r * (1.f - r);
    carry[at] = d * z;
    before[token * width + unit] = from_f<T>(h);
    const float grads[4] = {dr, dz, dn, dn * r};
#pragma unroll
    for (int g = 0; g < 3; g++) {
        const float through = grads[g == 2 ? 3 : g];
        now[(long long)b * wide + g * width + unit] = through;
        dx[token * wide + g * width + unit] = from_f<T>(grads[g]);
        da[token * wide + g * width + unit] = from_f<T>(through);
    }
}

#define KERNELS(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK) gru_forward_##NAME(                                           \
        const T* x, const T* weight, const float* bias, const float* h, float* next, T* y, float* saved, int batch,   \
        int steps, int width, int t) {                                                                                \
        forward<T>(x, weight, bias, h, next, y, saved, batch, steps, width, t);                                       \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK) gru_backward_##NAME(                                          \
        const T* weight, const float* saved, const T* y, const float* start, const T* dy, const float* behind,        \
        float* carry, float* now, T* dx, T* da, T* before, int batch, int steps, int width, int t) {                  \
        backward<T>(weight, saved, y, start, dy, behind, carry, now, dx, da, before, batch, steps, width, t);         \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
