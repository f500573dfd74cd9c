// The sum rule of src/ops/delta around gated linear attention (kernels/gla.cu): n writes of keys β k a token, one after
// the other, with the token's decay before the first and its query behind the last.
//
//   k [B, T n, H, K], beta [B, T n, H] f32, g [B, T, H] f32 or null: no decay.
//   keys = β k in the type of the activations and decay f32, both of the shape of k, are what kernels/gla.cu takes.
//
// Entry points, all of 256 threads and any grid, for f32 and bf16:
//   sum_rule_prepare  keys, decay
//   sum_rule_spread   rows of tokens [B T, width] to those of their last writes [B T n, width], zeros elsewhere
//   sum_rule_pick     and back: the rows of the last writes
//   sum_rule_gather   from the gradients of keys and decay: dk = β dkeys, dβ = Σ_K dkeys k, dg = Σ_K ddecay. A warp has
//                     one head of one write.
#include "common.cuh"

constexpr int BLOCK = 256;

template <class T>
__device__ __forceinline__ void prepare(const T* __restrict__ k, const float* __restrict__ beta,
                                        const float* __restrict__ g, T* __restrict__ keys, float* __restrict__ decay,
                                        long long n, int key, int heads, int sub) {
    for (long long i = blockIdx.x * (long long)BLOCK + threadIdx.x; i < n; i += gridDim.x * (long long)BLOCK) {
        const long long row = i / key, write = row / heads;
        keys[i] = from_f<T>(beta[row] * to_f(k[i]));
        decay[i] = g && write % sub == 0 ? g[write / sub * heads + row % heads] : 0.f;
    }
}

template <class T>
__device__ __forceinline__ void spread(const T* __restrict__ x, T* __restrict__ y, long long n, int width, int sub) {
    for (long long i = blockIdx.x * (long long)BLOCK + threadIdx.x; i < n; i += gridDim.x * (long long)BLOCK) {
        const long long write = i / width;
        y[i] = write % sub == sub - 1 ? x[write / sub * width + i % width] : from_f<T>(0.f);
    }
}

template <class T>
__device__ __forceinline__ void pick(const T* __restrict__ x, T* __restrict__ y, long long n, int width, int sub) {
    for (long long i = blockIdx.x * (long long)BLOCK + threadIdx.x; i < n; i += gridDim.x * (long long)BLOCK)
        y[i] = x[(i / width * sub + sub - 1) * width + i % width];
}

template <class T>
__device__ __forceinline__ void gather(const T* __restrict__ k, const float* __restrict__ beta,
                                       const T* __restrict__ d_keys, const float* __restrict__ d_decay,
                                       T* __restrict__ dk, float* __restrict__ d_beta, float* __restrict__ dg, int rows,
                                       int key, int heads, int sub) {
    for (int row = blockIdx.x * (BLOCK / WARP) + warp_id(); row < rows; row += gridDim.x * (BLOCK / WARP)) {
        const long long at = (long long)row * key;
        float of_beta = 0.f, of_g = 0.f;
        for (int i = lane_id(); i < key; i += WARP) {
            const float d = to_f(d_keys[at + i]);
            of_beta = fmaf(d, to_f(k[at + i]), of_beta);
            of_g += d_decay[at + i];
            dk[at + i] = from_f<T>(beta[row] * d);
        }
        of_beta = warp_sum(of_beta), of_g = warp_sum(of_g);
        if (lane_id() == 0) {
            d_beta[row] = of_beta;
            const int write = row / heads;
            if (dg && write % sub == 0) dg[write / sub * heads + row % heads] = of_g;
        }
    }
}

#define KERNELS(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK) sum_rule_prepare_##NAME(                                     \
        const T* k, const float* beta, const float* g, T* keys, float* decay, long long n, int key, int heads,       \
        int sub) {                                                                                                   \
        prepare<T>(k, beta, g, keys, decay, n, key, heads, sub);                                                     \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                              \
        sum_rule_spread_##NAME(const T* x, T* y, long long n, int width, int sub) {                                  \
        spread<T>(x, y, n, width, sub);                                                                              \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                              \
        sum_rule_pick_##NAME(const T* x, T* y, long long n, int width, int sub) {                                    \
        pick<T>(x, y, n, width, sub);                                                                                \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) sum_rule_gather_##NAME(                                      \
        const T* k, const float* beta, const T* d_keys, const float* d_decay, T* dk, float* d_beta, float* dg,       \
        int rows, int key, int heads, int sub) {                                                                     \
        gather<T>(k, beta, d_keys, d_decay, dk, d_beta, dg, rows, key, heads, sub);                                  \
    }
KERNELS(f32, float)
KERNELS(bf16, bf16)
