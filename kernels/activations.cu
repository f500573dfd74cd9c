// Activation functions that stand alone (src/ops/activations).
//
//   gelu  y = x Φ(x), Φ by the error function    dx = dy (Φ(x) + x φ(x))
//   glu   y = a σ(b) with a, b the halves of a row of x [rows, 2 n]; y [rows, n]
//         da = dy σ(b),  db = dy a σ(b) (1 − σ(b))
//   sigmoid_gate  the same of a and b that are tensors of their own
//   tanh, logistic  y = tanh(x), y = σ(x); dx = dy (1 - y²), dx = dy y (1 - y)
// Sources: Hendrycks and Gimpel, "Gaussian error linear units", 2016; Dauphin et al., "Language modeling with
// gated convolutional networks", 2016.
//
// gelu_*, tanh_*, logistic_*: any one-dimensional grid, 256 threads. The others: a block of 256 threads is 2^log_width vectors of
// columns by 256 / 2^log_width rows; grid (tiles of columns, any): the blocks take rows in turn.
#include "rows.cuh"

// Φ(x), as normal_cdf of src/ops/real.rs: erfc z = t exp(p(t) − z²) with t = 1 / (1 + z / 2), a Chebyshev fit for z ≥ 0
// (Press et al., Numerical Recipes, section 6.2). A third of the instructions of erfcf.
__device__ __forceinline__ float below(float x) {
    const float z = 0.70710678f * fabsf(x), t = rcp_fast(fmaf(0.5f, z, 1.f));
    float fit = 0.17087277f;
    fit = fmaf(fit, t, -0.82215223f);
    fit = fmaf(fit, t, 1.4885159f);
    fit = fmaf(fit, t, -1.135204f);
    fit = fmaf(fit, t, 0.27886807f);
    fit = fmaf(fit, t, -0.18628806f);
    fit = fmaf(fit, t, 0.09678418f);
    fit = fmaf(fit, t, 0.37409196f);
    fit = fmaf(fit, t, 1.0000237f);
    fit = fmaf(fit, t, -1.2655122f);
    const float tail = 0.5f * t * exp2_fast(LOG2E * fmaf(-z, z, fit));
    return x < 0.f ? tail : 1.f - tail;
}

template <class T>
__device__ __forceinline__ void gelu_forward(const T* x, T* y, long long n) {
    for_elements<VECTOR<T>>(n, aligned16(x) && aligned16(y), [&](auto width, long long i) {
        float u[width.value];
        load_elements(x + i, u);
#pragma unroll
        for (int j = 0; j < width.value; j++) u[j] *= below(u[j]);
        store_elements(y + i, u);
    });
}
template <class T>
__device__ __forceinline__ void gelu_backward(const T* x, const T* dy, T* dx, long long n) {
    for_elements<VECTOR<T>>(n, aligned16(x) && aligned16(dy) && aligned16(dx), [&](auto width, long long i) {
        float u[width.value], g[width.value];
        load_elements(x + i, u);
        load_elements(dy + i, g);
#pragma unroll
        for (int j = 0; j < width.value; j++)
            u[j] = g[j] * fmaf(u[j] * 0.39894228f, __expf(-0.5f * u[j] * u[j]), below(u[j]));
        store_elements(dx + i, u);
    });
}

struct Tanh {
    static __device__ __forceinline__ float value(float x) { return tanhf(x); }
    static __device__ __forceinline__ float slope(float y) { return 1.f - y * y; }
};
struct Logistic {
    static __device__ __forceinline__ float value(float x) { return sigmoid(x); }
    static __device__ __forceinline__ float slope(float y) { return y * (1.f - y); }
};

template <class T, class F>
__device__ __forceinline__ void squash_forward(const T* x, T* y, long long n) {
    for_elements<VECTOR<T>>(n, aligned16(x) && aligned16(y), [&](auto width, long long i) {
        float u[width.value];
        load_elements(x + i, u);
#pragma unroll
        for (int j = 0; j < width.value; j++) u[j] = F::value(u[j]);
        store_elements(y + i, u);
    });
}
// From x, not from y: rounded to bf16 that is too near 1.
template <class T, class F>
__device__ __forceinline__ void squash_backward(const T* x, const T* dy, T* dx, long long n) {
    for_elements<VECTOR<T>>(n, aligned16(x) && aligned16(dy) && aligned16(dx), [&](auto width, long long i) {
        float u[width.value], g[width.value];
        load_elements(x + i, u);
        load_elements(dy + i, g);
#pragma unroll
        for (int j = 0; j < width.value; j++) u[j] = g[j] * F::slope(F::value(u[j]));
        store_elements(dx + i, u);
    });
}

// f(row, column) for the vectors of columns of this thread.
template <int VEC, class F>
__device__ __forceinline__ void for_rows(int rows, int n, int log_width, F f) {
    const int width = 1 << log_width, height = THREADS >> log_width;
    const int c = (blockIdx.x * width + (threadIdx.x & (width - 1))) * VEC;
    if (c >= n) return;
    for (long long r = (long long)blockIdx.y * height + (threadIdx.x >> log_width); r < rows;
         r += (long long)gridDim.y * height)
        f(r, c);
}

// y = a σ(b); a row of a and of b begins every `ld` elements, one of y every n.
template <class T, int VEC>
__device__ __forceinline__ void gate_forward(const T* a, const T* b, long long ld, T* y, int rows, int n,
                                             int log_width) {
    for_rows<VEC>(rows, n, log_width, [&](long long r, int c) {
        float u[VEC], g[VEC];
        load_vec<VEC>(a + r * ld + c, u);
        load_vec<VEC>(b + r * ld + c, g);
#pragma unroll
        for (int i = 0; i < VEC; i++) u[i] *= sigmoid(g[i]);
        store_vec<VEC>(y + r * n + c, u);
    });
}
template <class T, int VEC>
__device__ __forceinline__ void gate_backward(const T* a, const T* b, const T* dy, T* da, T* db, long long ld, int rows,
                                              int n, int log_width) {
    for_rows<VEC>(rows, n, log_width, [&](long long r, int c) {
        float u[VEC], z[VEC], g[VEC];
        load_vec<VEC>(a + r * ld + c, u);
        load_vec<VEC>(b + r * ld + c, z);
        load_vec<VEC>(dy + r * n + c, g);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float open = sigmoid(z[i]);
            g[i] *= open;
            z[i] = g[i] * u[i] * (1.f - open);
        }
        store_vec<VEC>(da + r * ld + c, g);
        store_vec<VEC>(db + r * ld + c, z);
    });
}

#define GELU(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) gelu_forward_##NAME(const T* x, T* y, long long n) {     \
        gelu_forward<T>(x, y, n);                                                                                  \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        gelu_backward_##NAME(const T* x, const T* dy, T* dx, long long n) {                                        \
        gelu_backward<T>(x, dy, dx, n);                                                                            \
    }
GELU(f32, float)
GELU(bf16, bf16)

#define SQUASH(FUNCTION, F, NAME, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        FUNCTION##_forward_##NAME(const T* x, T* y, long long n) {                                                 \
        squash_forward<T, F>(x, y, n);                                                                             \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        FUNCTION##_backward_##NAME(const T* x, const T* dy, T* dx, long long n) {                                  \
        squash_backward<T, F>(x, dy, dx, n);                                                                       \
    }
SQUASH(tanh, Tanh, f32, float)
SQUASH(tanh, Tanh, bf16, bf16)
SQUASH(logistic, Logistic, f32, float)
SQUASH(logistic, Logistic, bf16, bf16)

#define GLU(NAME, T, VEC)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        glu_forward_##NAME(const T* x, T* y, int rows, int n, int log_width) {                                     \
        gate_forward<T, VEC>(x, x + n, 2ll * n, y, rows, n, log_width);                                            \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        glu_backward_##NAME(const T* x, const T* dy, T* dx, int rows, int n, int log_width) {                      \
        gate_backward<T, VEC>(x, x + n, dy, dx, dx + n, 2ll * n, rows, n, log_width);                              \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        sigmoid_gate_forward_##NAME(const T* a, const T* b, T* y, int rows, int n, int log_width) {                \
        gate_forward<T, VEC>(a, b, n, y, rows, n, log_width);                                                      \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) sigmoid_gate_backward_##NAME(                            \
        const T* a, const T* b, const T* dy, T* da, T* db, int rows, int n, int log_width) {                       \
        gate_backward<T, VEC>(a, b, dy, da, db, n, rows, n, log_width);                                            \
    }
GLU(f32, float, VECTOR<float>)
GLU(bf16, bf16, VECTOR<bf16>)
GLU(odd_f32, float, 1)
GLU(odd_bf16, bf16, 1)
