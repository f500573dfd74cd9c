// Sums of two arrays of n elements: out = a + b, and dst += src. Any one-dimensional grid.
#include "rows.cuh"

template <class T>
__device__ __forceinline__ void add_sum(const T* a, const T* b, T* out, long long n) {
    for_elements<VECTOR<T>>(n, aligned16(a) && aligned16(b) && aligned16(out), [&](auto width, long long i) {
        float x[width.value], y[width.value];
        load_elements(a + i, x);
        load_elements(b + i, y);
#pragma unroll
        for (int j = 0; j < width.value; j++) x[j] += y[j];
        store_elements(out + i, x);
    });
}

template <class T, class S>
__device__ __forceinline__ void add_assign(T* dst, const S* src, long long n) {
    constexpr int VEC = VECTOR<S>;
    for_elements<VEC>(n, aligned16(dst) && aligned16(src), [&](auto width, long long i) {
        float x[width.value], y[width.value];
        load_elements(dst + i, x);
        load_elements(src + i, y);
#pragma unroll
        for (int j = 0; j < width.value; j++) x[j] += y[j];
        store_elements(dst + i, x);
    });
}

#define SUM(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
        add_sum_##SUFFIX(const T* a, const T* b, T* out, long long n) {                                             \
        add_sum(a, b, out, n);                                                                                      \
    }
#define ASSIGN(SUFFIX, T, S)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) add_assign_##SUFFIX(T* dst, const S* src, long long n) { \
        add_assign(dst, src, n);                                                                                    \
    }

SUM(f32, float)
SUM(bf16, bf16)
ASSIGN(f32, float, float)
ASSIGN(bf16, bf16, bf16)
ASSIGN(f32_bf16, float, bf16)
ASSIGN(bf16_f32, bf16, float)
