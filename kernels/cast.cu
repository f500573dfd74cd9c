// Copies n elements into another number format, rounding to nearest. Any one-dimensional grid.
#include "rows.cuh"

template <class D, class S>
__device__ __forceinline__ void cast(const S* src, D* dst, long long n) {
    for_elements<VECTOR<bf16>>(n, aligned16(src) && aligned16(dst), [&](auto width, long long i) {
        float x[width.value];
        load_elements(src + i, x);
        store_elements(dst + i, x);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) cast_f32_bf16(const float* src, bf16* dst, long long n) {
    cast(src, dst, n);
}
extern "C" __global__ void __launch_bounds__(THREADS) cast_bf16_f32(const bf16* src, float* dst, long long n) {
    cast(src, dst, n);
}
