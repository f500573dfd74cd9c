// What stands around the matrix products of a linear layer.
//
//   linear_bias   y[row, :] += bias        y [rows, n] f32 or bf16, bias [n] f32
//   linear_scale  x *= factor              x f32 or bf16, factor [1] f32; mostly 1: then x is not touched
#include "common.cuh"

template <class T>
__device__ void add_bias(T* y, const float* bias, long long elements, int n) {
    constexpr int V = 16 / sizeof(T);
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    // Rows that are no multiple of a vector are walked through one by one.
    if (n % V == 0) {
        for (long long i = first * V; i < elements; i += stride * V) {
            float x[V];
            load_vec<V>(y + i, x);
            const int c = i % n;
#pragma unroll
            for (int j = 0; j < V; j++) x[j] += bias[c + j];
            store_vec<V>(y + i, x);
        }
    } else {
        for (long long i = first; i < elements; i += stride) y[i] = from_f<T>(to_f(y[i]) + bias[i % n]);
    }
}

extern "C" __global__ void linear_bias_f32(float* y, const float* bias, long long elements, int n) {
    add_bias(y, bias, elements, n);
}
extern "C" __global__ void linear_bias_bf16(bf16* y, const float* bias, long long elements, int n) {
    add_bias(y, bias, elements, n);
}

template <class T>
__device__ void scale(T* x, const float* factor, long long elements) {
    const float f = *factor;
    if (f == 1.f) return;
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += stride)
        x[i] = from_f<T>(to_f(x[i]) * f);
}

extern "C" __global__ void linear_scale_f32(float* x, const float* factor, long long elements) {
    scale(x, factor, elements);
}
extern "C" __global__ void linear_scale_bf16(bf16* x, const float* factor, long long elements) {
    scale(x, factor, elements);
}
