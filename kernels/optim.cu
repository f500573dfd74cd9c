// The norm of a flat gradient, and clipping with Adam or AdamW in one pass over flat buffers (src/ops/optim).
//
// Sums are in f64 throughout and have one order, so that the norm is that of the CPU to the last digits; the update
// rounds as the CPU's does, operation by operation: from the same gradient and norm come the same bits.
#include "common.cuh"

// ---- sum of squares: `optim_squares_*`, then `optim_total_f64`

__device__ __forceinline__ double block_sum_f64(double x, double* scratch) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL, x, offset);
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    double total = 0.;
    for (int w = 0; w < (int)blockDim.x / WARP; w++) total += scratch[w];
    return total;
}

// Grid any, 256 threads: part [blocks], the sums of squares of what each block saw.
template <class T>
__device__ __forceinline__ void squares(const T* __restrict__ x, double* __restrict__ part, long long n) {
    __shared__ double scratch[WARP];
    constexpr int V = 16 / sizeof(T);
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    // A view may begin anywhere.
    const long long vectors = (reinterpret_cast<size_t>(x) & 15) == 0 ? n / V : 0;
    double sum = 0.;
#pragma unroll 4
    for (long long i = thread; i < vectors; i += threads) {
        float v[V];
        load_vec<V>(x + i * V, v);
#pragma unroll
        for (int j = 0; j < V; j++) sum += (double)v[j] * (double)v[j];
    }
    for (long long i = vectors * V + thread; i < n; i += threads) {
        const double v = to_f(x[i]);
        sum += v * v;
    }
    sum = block_sum_f64(sum, scratch);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
optim_squares_f32(const float* x, double* part, long long n) {
    squares(x, part, n);
}
extern "C" __global__ void __launch_bounds__(256)
optim_squares_bf16(const bf16* x, double* part, long long n) {
    squares(x, part, n);
}

// One block of 256 threads: total [1] of part [count].
extern "C" __global__ void __launch_bounds__(256)
optim_total_f64(const double* __restrict__ part, double* __restrict__ total, int count) {
    __shared__ double scratch[WARP];
    double sum = 0.;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += part[i];
    sum = block_sum_f64(sum, scratch);
    if (threadIdx.x == 0) *total = sum;
}

// ---- the update

// What an update needs beside the buffers.
struct Adam {
    float rate1;  // 1 - beta1
    float beta2;
    float rate2;  // 1 - beta2
    float eps;
    float l2;     // decay that is added to the gradient
    float scale;  // what gradients are multiplied with
    float size;   // lr / (1 - beta1^t)
    float root;   // sqrt(1 - beta2^t)
    float keep;   // what values are multiplied with: 1 - lr * decay, if decoupled

    // As AdamStep in src/ops/optim: nothing is fused.
    __device__ __forceinline__ void update(float& value, float grad, float& m, float& v) const {
        grad = __fadd_rn(__fmul_rn(grad, scale), __fmul_rn(l2, value));
        m = __fadd_rn(m, __fmul_rn(rate1, __fsub_rn(grad, m)));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(rate2, grad), grad));
        const float step = __fdiv_rn(m, __fadd_rn(__fdiv_rn(__fsqrt_rn(v), root), eps));
        value = __fsub_rn(__fmul_rn(value, keep), __fmul_rn(size, step));
    }
};

// Grid any, 256 threads. value, grad, m, v [n]; shadow [n] or null: the new values in bf16. step [4] f64, written by
// the host: lr / (1 - beta1^t), sqrt(1 - beta2^t), what values are multiplied with, the largest norm. Gradients are
// multiplied with min(1, largest / (sqrt(squares) + 1e-6)). If squares or the loss is not finite, or `halted` is not zero,
// nothing is written. Without squares (null), step[3] is what gradients are multiplied with; without a loss or
// `halted`, none is asked.
extern "C" __global__ void __launch_bounds__(256)
optim_adam_f32(float* __restrict__ value, const float* __restrict__ grad, float* __restrict__ m,
               float* __restrict__ v, bf16* __restrict__ shadow, const double* __restrict__ step,
               const double* __restrict__ squares, const float* __restrict__ loss,
               const double* __restrict__ halted, long long n, float rate1, float beta2, float rate2, float eps,
               float l2) {
    double scale = step[3];
    if (squares) {
        const double norm = sqrt(*squares);
        if (!isfinite(norm)) return;
        scale /= norm + 1e-6;
        if (scale > 1.) scale = 1.;
    }
    if ((loss && !isfinite(*loss)) || (halted && *halted != 0.)) return;
    Adam adam;
    adam.rate1 = rate1;
    adam.beta2 = beta2;
    adam.rate2 = rate2;
    adam.eps = eps;
    adam.l2 = l2;
    adam.scale = (float)scale;
    adam.size = (float)step[0];
    adam.root = (float)step[1];
    adam.keep = (float)step[2];

    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    const size_t addresses = reinterpret_cast<size_t>(value) | reinterpret_cast<size_t>(grad) |
                             reinterpret_cast<size_t>(m) | reinterpret_cast<size_t>(v) |
                             2 * reinterpret_cast<size_t>(shadow);
    const long long vectors = (addresses & 15) == 0 ? n / 4 : 0;
    for (long long i = thread; i < vectors; i += threads) {
        float x[4], g[4], m4[4], v4[4];
        load_vec<4>(value + 4 * i, x);
        load_vec<4>(grad + 4 * i, g);
        load_vec<4>(m + 4 * i, m4);
        load_vec<4>(v + 4 * i, v4);
#pragma unroll
        for (int j = 0; j < 4; j++) adam.update(x[j], g[j], m4[j], v4[j]);
        store_vec<4>(value + 4 * i, x);
        store_vec<4>(m + 4 * i, m4);
        store_vec<4>(v + 4 * i, v4);
        if (shadow) store_vec<4>(shadow + 4 * i, x);
    }
    for (long long i = 4 * vectors + thread; i < n; i += threads) {
        float x = value[i], mi = m[i], vi = v[i];
        adam.update(x, grad[i], mi, vi);
        value[i] = x;
        m[i] = mi;
        v[i] = vi;
        if (shadow) shadow[i] = from_f<bf16>(x);
    }
}
