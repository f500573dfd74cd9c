// What Kimi delta attention makes of its projections before the recurrence (kernels/dplr.cu):
//
//   gate   g = -exp(a_log) softplus(f + dt_bias)      df = -dg exp(a_log) σ(f + dt_bias), d dt_bias = Σ df,
//                                                     d a_log = Σ dg g
//   keys   read = exp(g) k,  write = β k              dk = exp(g) d_read + β d_write, dg = read d_read,
//                                                     dβ = Σ k d_write
// Source: Kimi Team, "Kimi Linear", 2025, equation 1 and section 4.
//
// f, k, read, write [B, T, H, K] in T; g [B, T, H, K], β [B, T, H], a_log [H], dt_bias [H K] in f32. K is at most 128.
// Grid: (slabs, H); block: 256 threads. partial_log [slabs, H] and partial_bias [slabs, H K] take the sums of each
// slab of tokens, which columns_final adds.
#include "heads.cuh"

__device__ __forceinline__ float logistic(float x) {
    const float e = __expf(-fabsf(x)), tail = __fdividef(1.f, 1.f + e);
    return x < 0.f ? e * tail : tail;
}

template <class T>
__device__ __forceinline__ void gate_forward(const T* f, const float* a_log, const float* dt_bias, float* g,
                                             int tokens, int key) {
    const HeadRows rows(key);
    const float rate = -expf(a_log[rows.head]);
    float bias[OWN];
    rows.load_param(dt_bias, bias);
    rows.for_each(tokens, [&](long long, long long at) {
        float x[OWN];
        rows.load(f + at, x);
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = rate * softplus(x[i] + bias[i]);
        rows.store(g + at, x);
    });
}

template <class T>
__device__ __forceinline__ void gate_backward(const T* f, const float* a_log, const float* dt_bias, const float* dg,
                                              T* df, float* partial_log, float* partial_bias, int tokens, int key) {
    __shared__ float scratch[WARP];
    const HeadRows rows(key);
    const float rate = -expf(a_log[rows.head]);
    float bias[OWN], d_bias[OWN] = {}, d_log = 0.f;
    rows.load_param(dt_bias, bias);
    rows.for_each(tokens, [&](long long, long long at) {
        float x[OWN], d[OWN];
        rows.load(f + at, x);
        rows.load(dg + at, d);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float y = x[i] + bias[i];
            d[i] *= rate;
            d_log += d[i] * softplus(y);
            d[i] *= logistic(y);
            d_bias[i] += d[i];
        }
        rows.store(df + at, d);
    });
    rows.store_sum(d_bias, partial_bias + (long long)blockIdx.x * rows.heads * key);
    d_log = block_sum(d_log, scratch);
    if (threadIdx.x == 0) partial_log[blockIdx.x * rows.heads + rows.head] = d_log;
}

template <class T>
__device__ __forceinline__ void keys_forward(const T* k, const float* g, const float* beta, T* read, T* write,
                                             int tokens, int key) {
    const HeadRows rows(key);
    rows.for_each(tokens, [&](long long row, long long at) {
        float x[OWN], d[OWN];
        const float strength = beta[row];
        rows.load(k + at, x);
        rows.load(g + at, d);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            d[i] = exp2_fast(d[i] * LOG2E) * x[i];
            x[i] *= strength;
        }
        rows.store(read + at, d);
        rows.store(write + at, x);
    });
}

template <class T>
__device__ __forceinline__ void keys_backward(const T* k, const float* g, const float* beta, const T* d_read,
                                              const T* d_write, T* dk, float* dg, float* d_beta, int tokens, int key) {
    const HeadRows rows(key);
    rows.for_each(tokens, [&](long long row, long long at) {
        float x[OWN], decay[OWN], of_read[OWN], of_write[OWN];
        const float strength = beta[row];
        rows.load(k + at, x);
        rows.load(g + at, decay);
        rows.load(d_read + at, of_read);
        rows.load(d_write + at, of_write);
        const float sum = dot(x, of_write);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            of_read[i] *= exp2_fast(decay[i] * LOG2E);
            of_write[i] = of_read[i] + strength * of_write[i];
            of_read[i] *= x[i];
        }
        rows.store(dk + at, of_write);
        rows.store(dg + at, of_read);
        if (rows.lane == 0) d_beta[row] = sum;
    });
}

#define KERNELS(SUFFIX, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(BLOCK) kda_gate_forward_##SUFFIX(                                   \
        const T* f, const float* a_log, const float* dt_bias, float* g, int tokens, int key) {                       \
        gate_forward<T>(f, a_log, dt_bias, g, tokens, key);                                                          \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) kda_gate_backward_##SUFFIX(                                  \
        const T* f, const float* a_log, const float* dt_bias, const float* dg, T* df, float* partial_log,            \
        float* partial_bias, int tokens, int key) {                                                                  \
        gate_backward<T>(f, a_log, dt_bias, dg, df, partial_log, partial_bias, tokens, key);                         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) kda_keys_forward_##SUFFIX(                                   \
        const T* k, const float* g, const float* beta, T* read, T* write, int tokens, int key) {                     \
        keys_forward<T>(k, g, beta, read, write, tokens, key);                                                       \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) kda_keys_backward_##SUFFIX(                                  \
        const T* k, const float* g, const float* beta, const T* d_read, const T* d_write, T* dk, float* dg,          \
        float* d_beta, int tokens, int key) {                                                                        \
        keys_backward<T>(k, g, beta, d_read, d_write, dk, dg, d_beta, tokens, key);                                  \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
