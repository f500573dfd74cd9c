// Gated linear unit: y = a σ(β a) b with a, b the halves of a row of x [rows, 2 n] + bias [2 n], β [1] trained;
// y [rows, n]. There may be no bias.
//
//   da = dy b (σ + β a σ (1 − σ)),  db = dy a σ,  dβ = Σ dy b a² σ (1 − σ),  dbias = columns of (da, db)
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

// Both halves of a row, or of the bias, at this thread's columns.
template <int VEC> struct Halves {
    float a[VEC], b[VEC];

    template <class T> __device__ __forceinline__ void load(const T* row, int column, int n) {
        load_elements(row + column, a);
        load_elements(row + n + column, b);
    }
    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < VEC; i++) a[i] = b[i] = 0.f;
    }
    __device__ __forceinline__ void add(const Halves& other) {
#pragma unroll
        for (int i = 0; i < VEC; i++) a[i] += other.a[i], b[i] += other.b[i];
    }
};

template <class T, int VEC>
__device__ __forceinline__ void swiglu_forward(const T* x, const float* beta, const float* bias, T* y, int rows, int n,
                                               int log_width) {
    const Place at = Place::of<VEC>(log_width);
    if (at.column >= n) return;
    const float slope = *beta;
    Halves<VEC> shift;
    shift.zero();
    if (bias) shift.load(bias, at.column, n);
    for (long long r = at.row; r < rows; r += at.stride) {
        Halves<VEC> in;
        in.load(x + 2 * r * n, at.column, n);
        in.add(shift);
#pragma unroll
        for (int i = 0; i < VEC; i++) in.a[i] *= sigmoid(slope * in.a[i]) * in.b[i];
        store_vec<VEC>(y + r * n + at.column, in.a);
    }
}

// partial [gridDim.y · gridDim.x] takes the sums for β, and partial_bias [gridDim.y, 2 n] those for the bias, if there
// is one: columns_final adds both.
template <class T, int VEC>
__device__ __forceinline__ void swiglu_backward(const T* x, const float* beta, const float* bias, const T* dy, T* dx,
                                                float* partial, float* partial_bias, int rows, int n, int log_width) {
    __shared__ float scratch[WARP], columns[THREADS * VEC];
    const Place at = Place::of<VEC>(log_width);
    const float slope = *beta;
    float dbeta = 0.f;
    Halves<VEC> shift, sum;
    shift.zero(), sum.zero();
    if (at.column < n) {
        if (bias) shift.load(bias, at.column, n);
        for (long long r = at.row; r < rows; r += at.stride) {
            Halves<VEC> in;
            float g[VEC];
            in.load(x + 2 * r * n, at.column, n);
            in.add(shift);
            load_vec<VEC>(dy + r * n + at.column, g);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const float a = in.a[i], s = sigmoid(slope * a), bend = a * s * (1.f - s), gb = g[i] * in.b[i];
                dbeta += gb * a * bend;
                in.b[i] = g[i] * a * s;
                in.a[i] = gb * (s + slope * bend);
            }
            store_vec<VEC>(dx + 2 * r * n + at.column, in.a);
            store_vec<VEC>(dx + (2 * r + 1) * n + at.column, in.b);
            sum.add(in);
        }
    }
    dbeta = block_sum(dbeta, scratch);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = dbeta;
    if (!bias) return;
    // Over the block's rows of threads, one half after the other.
    const int width = VEC << log_width, first = blockIdx.x * width;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        __syncthreads();
        store_elements(columns + threadIdx.x * VEC, half ? sum.b : sum.a);
        __syncthreads();
        for (int c = threadIdx.x; c < width && first + c < n; c += THREADS) {
            float total = 0.f;
            for (int i = c; i < THREADS * VEC; i += width) total += columns[i];
            partial_bias[(2ll * blockIdx.y + half) * n + first + c] = total;
        }
    }
}

#define KERNELS(NAME, T, VEC)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        swiglu_forward_##NAME(const T* x, const float* beta, const float* bias, T* y, int rows, int n,          \
                              int log_width) {                                                                  \
        swiglu_forward<T, VEC>(x, beta, bias, y, rows, n, log_width);                                           \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        swiglu_backward_##NAME(const T* x, const float* beta, const float* bias, const T* dy, T* dx,            \
                               float* partial, float* partial_bias, int rows, int n, int log_width) {           \
        swiglu_backward<T, VEC>(x, beta, bias, dy, dx, partial, partial_bias, rows, n, log_width);              \
    }

KERNELS(f32, float, VECTOR<float>)
KERNELS(bf16, bf16, VECTOR<bf16>)
KERNELS(odd_f32, float, 1)
KERNELS(odd_bf16, bf16, 1)
