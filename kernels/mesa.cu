// The solves of the mesa layer (src/ops/mesa): x_t = (A_t + diag λ)⁻¹ r_t with A ← e^g A + β kᵀ k, λ = softplus
// + 1/4.
//
// The rest of the layer is linear attention: the outputs are gated linear attention of the queries x, the keys
// β k and the values v, and what the solves give back to k, β and g is that of the queries x, the keys β k and
// the values k, with −w for the gradient of the outputs, w = (A + diag λ)⁻¹ dx. kernels/gla.cu does both.
//
// Source: von Oswald et al., "MesaNet: sequence modeling by locally optimal test-time training", 2025, which
// solves by conjugate gradients; here A + diag λ = Σ_j c_j c_jᵀ / c_jj is factored by columns at every token.
#include "common.cuh"

constexpr int BLOCK = 256;

// keys [B T H, K] = β k in the type of the activations, decay [B T H, K] = g, as kernels/gla.cu takes them.
template <class T>
__device__ __forceinline__ void prepare(const T* __restrict__ k, const float* __restrict__ beta,
                                        const float* __restrict__ g, T* __restrict__ keys,
                                        float* __restrict__ decay, long long n, int key) {
    for (long long i = blockIdx.x * (long long)BLOCK + threadIdx.x; i < n; i += gridDim.x * (long long)BLOCK) {
        const long long row = i / key;
        keys[i] = from_f<T>(beta[row] * to_f(k[i]));
        decay[i] = g[row];
    }
}

// One head of one sequence, token by token. rhs, x [B, T, H, K]; start, end [B, H, K, K], start may be null. In
// the backward pass also minus = −x, and with `other` the sums Σ_t x ⊙ other to shares [B, H, K].
//
// Shared memory, f32: K rows of K + 3. A(i, j) with j <= i lies at [i][j]; of the column c_j of the factor, c_j[i]
// with i >= j at [j][i + 1]. The right side is a row K below: c_j[K] lies at [j][K + 1]. Then k, λ, x, each K.
template <class T>
__device__ __forceinline__ void solve(const T* __restrict__ k, const float* __restrict__ beta,
                                      const float* __restrict__ g, const float* __restrict__ lambda,
                                      const T* __restrict__ rhs, const float* __restrict__ start,
                                      float* __restrict__ end, T* __restrict__ x, T* __restrict__ minus,
                                      const T* __restrict__ other, float* __restrict__ shares, int steps,
                                      int heads, int key) {
    DYNAMIC_SHARED(shared);
    const int ld = key + 3, tid = threadIdx.x;
    float* const m = reinterpret_cast<float*>(shared);
    float* const ks = m + key * ld;
    float* const lambdas = ks + key;
    float* const xs = lambdas + key;
    const int b = blockIdx.x / heads, h = blockIdx.x % heads;
    const long long state = (long long)blockIdx.x * key * key;
    for (int i = tid; i < key; i += BLOCK) lambdas[i] = softplus(lambda[h * key + i]) + 0.25f;
    for (int i = tid; i < key * key; i += BLOCK) {
        const int r = i / key, c = i % key;
        if (c <= r) m[r * ld + c] = start ? start[state + i] : 0.f;
    }
    float share = 0.f;
    for (int t = 0; t < steps; t++) {
        const long long token = ((long long)b * steps + t) * heads + h;
        const float decay = __expf(g[token]), weight = beta[token];
        for (int i = tid; i < key; i += BLOCK) ks[i] = to_f(k[token * key + i]);
        __syncthreads();
        // The new A, and its copy to be factored.
        for (int i = tid; i < key * key; i += BLOCK) {
            const int r = i / key, c = i % key;
            if (c > r) continue;
            const float a = fmaf(weight * ks[r], ks[c], decay * m[r * ld + c]);
            m[r * ld + c] = a;
            m[c * ld + r + 1] = r == c ? a + lambdas[r] : a;
        }
        for (int i = tid; i < key; i += BLOCK) m[i * ld + key + 1] = to_f(rhs[token * key + i]);
        for (int j = 0; j < key; j++) {
            __syncthreads();
            const float* const column = m + j * ld + 1;
            const float inverse = 1.f / column[j];
            // The columns c behind j, of each the rows from c on and the right side.
            const int left = key - j - 1;
            for (int i = tid; i < left * (left + 1); i += BLOCK) {
                const int c = j + 1 + i / (left + 1), r = j + 1 + i % (left + 1);
                if (r >= c) m[c * ld + r + 1] = fmaf(-column[r] * inverse, column[c], m[c * ld + r + 1]);
            }
        }
        __syncthreads();
        // Backwards in one warp: x_j = z_j / c_jj, then z_i −= c_i[j] x_j for i < j.
        if (tid < WARP) {
            for (int i = tid; i < key; i += WARP) xs[i] = m[i * ld + key + 1];
            __syncwarp();
            for (int j = key - 1; j >= 0; j--) {
                const float value = xs[j] / m[j * ld + j + 1];
                __syncwarp();
                for (int i = tid; i < j; i += WARP) xs[i] = fmaf(-m[i * ld + j + 1], value, xs[i]);
                if (tid == 0) xs[j] = value;
                __syncwarp();
            }
        }
        __syncthreads();
        for (int i = tid; i < key; i += BLOCK) {
            x[token * key + i] = from_f<T>(xs[i]);
            if (minus) minus[token * key + i] = from_f<T>(-xs[i]);
            // K is at most a block: a thread stays with its channel.
            if (other) share = fmaf(xs[i], to_f(other[token * key + i]), share);
        }
    }
    if (other && tid < key) shares[(long long)blockIdx.x * key + tid] = share;
    if (end)
        for (int i = tid; i < key * key; i += BLOCK) {
            const int r = i / key, c = i % key;
            end[state + i] = c <= r ? m[r * ld + c] : m[c * ld + r];
        }
}

// From the gradients of both attentions, of keys β k (first, second) and of their decays, and of the values k
// of the second: dk = β (first + second) + values, dβ = Σ_K (first + second) k, dg = Σ_K of both. A warp has
// one head of one token.
template <class T>
__device__ __forceinline__ void gather(const T* __restrict__ k, const float* __restrict__ beta,
                                       const T* __restrict__ first, const T* __restrict__ second,
                                       const T* __restrict__ values, const float* __restrict__ decay1,
                                       const float* __restrict__ decay2, T* __restrict__ dk,
                                       float* __restrict__ d_beta, float* __restrict__ dg, int rows, int key) {
    for (int row = blockIdx.x * (BLOCK / WARP) + warp_id(); row < rows; row += gridDim.x * (BLOCK / WARP)) {
        const long long at = (long long)row * key;
        float of_beta = 0.f, of_g = 0.f;
        for (int i = lane_id(); i < key; i += WARP) {
            const float d = to_f(first[at + i]) + to_f(second[at + i]);
            of_beta = fmaf(d, to_f(k[at + i]), of_beta);
            of_g += decay1[at + i] + decay2[at + i];
            dk[at + i] = from_f<T>(fmaf(beta[row], d, to_f(values[at + i])));
        }
        of_beta = warp_sum(of_beta), of_g = warp_sum(of_g);
        if (lane_id() == 0) d_beta[row] = of_beta, dg[row] = of_g;
    }
}

// d_lambda [H K] = −σ(lambda) Σ_b shares.
extern "C" __global__ void __launch_bounds__(BLOCK)
mesa_lambda(const float* __restrict__ lambda, const float* __restrict__ shares, float* __restrict__ d_lambda,
            int batch, int n) {
    const int i = blockIdx.x * BLOCK + threadIdx.x;
    if (i >= n) return;
    float sum = 0.f;
    for (int b = 0; b < batch; b++) sum += shares[(long long)b * n + i];
    d_lambda[i] = -sigmoid(lambda[i]) * sum;
}

// mesa_prepare_*, mesa_gather_*: any grid. mesa_solve_*: grid B H, K at most 256. All of 256 threads.
#define KERNELS(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK) mesa_prepare_##NAME(                                          \
        const T* k, const float* beta, const float* g, T* keys, float* decay, long long n, int key) {                 \
        prepare<T>(k, beta, g, keys, decay, n, key);                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK) mesa_solve_##NAME(                                            \
        const T* k, const float* beta, const float* g, const float* lambda, const T* rhs, const float* start,         \
        float* end, T* x, T* minus, const T* other, float* shares, int steps, int heads, int key) {                   \
        solve<T>(k, beta, g, lambda, rhs, start, end, x, minus, other, shares, steps, heads, key);                    \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK) mesa_gather_##NAME(                                           \
        const T* k, const float* beta, const T* first, const T* second, const T* values, const float* decay1,         \
        const float* decay2, T* dk, float* d_beta, float* dg, int rows, int key) {                                    \
        gather<T>(k, beta, first, second, values, decay1, decay2, dk, d_beta, dg, rows, key);                         \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
