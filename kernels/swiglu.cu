// Gated linear unit: y = a σ(β a) b with a, b the halves of a row of x [rows, 2 n], β [1] trained; y [rows, n].
//
//   da = dy b (σ + β a σ (1 − σ)),  db = dy a σ,  dβ = Σ dy b a² σ (1 − σ)
// Source: Shazeer, "GLU variants improve transformer", 2020.
//
// A block of 256 threads is 2^log_width vectors of columns by 256 / 2^log_width rows; grid (tiles of columns, any):
// the blocks take rows in turn, so no thread divides to find its place.
#include "rows.cuh"

struct Place {
    int column;
    long long row, stride;

    template <int VEC>
    static __device__ __forceinline__ Place of(int log_width) {
        const int width = 1 << log_width, height = THREADS >> log_width;
        Place place;
        place.column = (blockIdx.x * width + (threadIdx.x & (width - 1))) * VEC;
        place.row = (long long)blockIdx.y * height + (threadIdx.x >> log_width);
        place.stride = (long long)gridDim.y * height;
        return place;
    }
};

template <class T, int VEC>
__device__ __forceinline__ void swiglu_forward(const T* x, const float* beta, T* y, int rows, int n, int log_width) {
    const Place at = Place::of<VEC>(log_width);
    if (at.column >= n) return;
    const float slope = *beta;
    for (long long r = at.row; r < rows; r += at.stride) {
        float a[VEC], b[VEC];
        load_vec<VEC>(x + 2 * r * n + at.column, a);
        load_vec<VEC>(x + (2 * r + 1) * n + at.column, b);
#pragma unroll
        for (int i = 0; i < VEC; i++) a[i] *= sigmoid(slope * a[i]) * b[i];
        store_vec<VEC>(y + r * n + at.column, a);
    }
}

// partial [gridDim.y · gridDim.x] takes the sums for β, which columns_final adds.
template <class T, int VEC>
__device__ __forceinline__ void swiglu_backward(const T* x, const float* beta, const T* dy, T* dx, float* partial,
                                                int rows, int n, int log_width) {
    __shared__ float scratch[WARP];
    const Place at = Place::of<VEC>(log_width);
    const float slope = *beta;
    float dbeta = 0.f;
    if (at.column < n) {
        for (long long r = at.row; r < rows; r += at.stride) {
            float a[VEC], b[VEC], g[VEC];
            load_vec<VEC>(x + 2 * r * n + at.column, a);
            load_vec<VEC>(x + (2 * r + 1) * n + at.column, b);
            load_vec<VEC>(dy + r * n + at.column, g);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const float s = sigmoid(slope * a[i]), bend = a[i] * s * (1.f - s), gb = g[i] * b[i];
                dbeta += gb * a[i] * bend;
                b[i] = g[i] * a[i] * s;
                a[i] = gb * (s + slope * bend);
            }
            store_vec<VEC>(dx + 2 * r * n + at.column, a);
            store_vec<VEC>(dx + (2 * r + 1) * n + at.column, b);
        }
    }
    dbeta = block_sum(dbeta, scratch);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = dbeta;
}

#define KERNELS(NAME, T, VEC)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        swiglu_forward_##NAME(const T* x, const float* beta, T* y, int rows, int n, int log_width) {            \
        swiglu_forward<T, VEC>(x, beta, y, rows, n, log_width);                                                 \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        swiglu_backward_##NAME(const T* x, const float* beta, const T* dy, T* dx, float* partial, int rows,     \
                               int n, int log_width) {                                                          \
        swiglu_backward<T, VEC>(x, beta, dy, dx, partial, rows, n, log_width);                                  \
    }

KERNELS(f32, float, VECTOR<float>)
KERNELS(bf16, bf16, VECTOR<bf16>)
KERNELS(odd_f32, float, 1)
KERNELS(odd_bf16, bf16, 1)
