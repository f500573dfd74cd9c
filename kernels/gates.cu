// Gates of the recurrences: what turns a projection into a decay or a write strength. The results are f32: the
// recurrences exponentiate and multiply them over many steps.
//
//   sigmoid      y = scale σ(x)                            dx = dy scale σ(x) σ(−x)
//   log_sigmoid  y = scale log σ(x)                        dx = dy scale σ(−x)
//   decay        g = −exp(a_log) softplus(a + dt_bias)     da = −dg exp(a_log) σ(a + dt_bias),
//                                                          d dt_bias = Σ da, d a_log = Σ dg g
// Sources: Yang et al., "Gated delta networks", 2025; "Gated linear attention transformers", 2024.
#include "rows.cuh"

// The exponential is only ever of a negative number: no overflow, and small values stay exact.
__device__ __forceinline__ float logistic(float x) {
    const float e = __expf(-fabsf(x)), tail = __fdividef(1.f, 1.f + e);
    return x < 0.f ? e * tail : tail;
}
__device__ __forceinline__ float log_logistic(float x) { return fminf(x, 0.f) - log1pf(__expf(-fabsf(x))); }

struct Sigmoid {
    static __device__ __forceinline__ float value(float x) { return logistic(x); }
    static __device__ __forceinline__ float slope(float x) { return logistic(x) * logistic(-x); }
};
struct LogSigmoid {
    static __device__ __forceinline__ float value(float x) { return log_logistic(x); }
    static __device__ __forceinline__ float slope(float x) { return logistic(-x); }
};

// x, dx [n] in the compute type, y, dy [n] in f32. Any one-dimensional grid.
template <class T, class F>
__device__ __forceinline__ void gate_forward(const T* x, float* y, long long n, float scale) {
    constexpr int VEC = VECTOR<T>;
    for_elements<VEC>(n, aligned16(x) && aligned16(y), [&](auto width, long long i) {
        float u[width.value];
        load_elements(x + i, u);
#pragma unroll
        for (int j = 0; j < width.value; j++) u[j] = scale * F::value(u[j]);
        store_elements(y + i, u);
    });
}
template <class T, class F>
__device__ __forceinline__ void gate_backward(const T* x, const float* dy, T* dx, long long n, float scale) {
    constexpr int VEC = VECTOR<T>;
    for_elements<VEC>(n, aligned16(x) && aligned16(dy) && aligned16(dx), [&](auto width, long long i) {
        float u[width.value], g[width.value];
        load_elements(x + i, u);
        load_elements(dy + i, g);
#pragma unroll
        for (int j = 0; j < width.value; j++) u[j] = g[j] * scale * F::slope(u[j]);
        store_elements(dx + i, u);
    });
}

// a [rows, H] in the compute type, a_log, dt_bias [H], g [rows, H] in f32. A block has 256 / H rows of threads, at
// least one, and blockIdx.y the 256 heads from 256 blockIdx.y: a thread stays with its head.
struct Heads {
    int head, row, height;
    bool live;

    __device__ __forceinline__ Heads(int heads) {
        const int width = min(heads, THREADS);
        height = THREADS / width;
        row = threadIdx.x / width;
        head = blockIdx.y * THREADS + threadIdx.x % width;
        live = row < height && head < heads;
    }
};

template <class T>
__device__ __forceinline__ void decay_forward(const T* a, const float* a_log, const float* dt_bias, float* g,
                                              int rows, int heads) {
    const Heads at(heads);
    if (!at.live) return;
    const float rate = -expf(a_log[at.head]), bias = dt_bias[at.head];
    for (long long r = (long long)blockIdx.x * at.height + at.row; r < rows; r += (long long)gridDim.x * at.height) {
        const long long i = r * heads + at.head;
        g[i] = rate * softplus(to_f(a[i]) + bias);
    }
}

// partial [gridDim.x, 2, H] takes the sums for a_log and dt_bias, which columns_final adds.
template <class T>
__device__ __forceinline__ void decay_backward(const T* a, const float* a_log, const float* dt_bias, const float* dg,
                                               T* da, float* partial, int rows, int heads) {
    __shared__ float sums[2][THREADS];
    const Heads at(heads);
    float d_log = 0.f, d_bias = 0.f;
    if (at.live) {
        const float rate = -expf(a_log[at.head]), bias = dt_bias[at.head];
        for (long long r = (long long)blockIdx.x * at.height + at.row; r < rows;
             r += (long long)gridDim.x * at.height) {
            const long long i = r * heads + at.head;
            const float x = to_f(a[i]) + bias, d = dg[i] * rate, dx = d * logistic(x);
            da[i] = from_f<T>(dx);
            d_log += d * softplus(x);
            d_bias += dx;
        }
    }
    sums[0][threadIdx.x] = d_log;
    sums[1][threadIdx.x] = d_bias;
    __syncthreads();
    if (at.live && at.row == 0) {
        const int width = min(heads, THREADS);
        for (int y = 1; y < at.height; y++) {
            d_log += sums[0][y * width + threadIdx.x];
            d_bias += sums[1][y * width + threadIdx.x];
        }
        float* out = partial + 2LL * heads * blockIdx.x + at.head;
        out[0] = d_log;
        out[heads] = d_bias;
    }
}

#define KERNELS(SUFFIX, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        gates_sigmoid_forward_##SUFFIX(const T* x, float* y, long long n, float scale) {                           \
        gate_forward<T, Sigmoid>(x, y, n, scale);                                                                  \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        gates_sigmoid_backward_##SUFFIX(const T* x, const float* dy, T* dx, long long n, float scale) {            \
        gate_backward<T, Sigmoid>(x, dy, dx, n, scale);                                                            \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        gates_log_sigmoid_forward_##SUFFIX(const T* x, float* y, long long n, float scale) {                       \
        gate_forward<T, LogSigmoid>(x, y, n, scale);                                                               \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        gates_log_sigmoid_backward_##SUFFIX(const T* x, const float* dy, T* dx, long long n, float scale) {        \
        gate_backward<T, LogSigmoid>(x, dy, dx, n, scale);                                                         \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) gates_decay_forward_##SUFFIX(                            \
        const T* a, const float* a_log, const float* dt_bias, float* g, int rows, int heads) {                     \
        decay_forward(a, a_log, dt_bias, g, rows, heads);                                                          \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) gates_decay_backward_##SUFFIX(                           \
        const T* a, const float* a_log, const float* dt_bias, const float* dg, T* da, float* partial, int rows,    \
        int heads) {                                                                                               \
        decay_backward(a, a_log, dt_bias, dg, da, partial, rows, heads);                                           \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
