// Dropout whose mask is a function of position: y = x ⊙ mask over x [B, T, n] as rows of n (rows.cuh, Mask); the
// gradient is the same product.
//
// A block of 256 threads is 2^log_width vectors of columns by 256 / 2^log_width rows; grid (tiles of columns, any):
// the blocks take rows in turn.
// Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.
#include "rows.cuh"

template <class T, int VEC>
__device__ __forceinline__ void dropout_apply(const T* x, T* y, int rows, int n, int log_width, const Mask& mask) {
    const int width = 1 << log_width, height = THREADS >> log_width;
    const int c = (blockIdx.x * width + (threadIdx.x & (width - 1))) * VEC;
    if (c >= n) return;
    const int first = blockIdx.y * height + (threadIdx.x >> log_width), stride = gridDim.y * height;
    Step step(first, stride, mask.steps);
    for (long long r = first; r < rows; r += stride, step.next()) {
        float u[VEC];
        load_vec<VEC>(x + r * n + c, u);
        const uint32_t bits = mask.bits<VEC>(step, c);
#pragma unroll
        for (int i = 0; i < VEC; i++) u[i] *= mask.factor(bits, i);
        store_vec<VEC>(y + r * n + c, u);
    }
}

// `tied`: the timesteps of a sample share one mask.
#define KERNELS(NAME, T, VEC)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                         \
        dropout_apply_##NAME(const T* x, T* y, int rows, int n, int log_width, const uint32_t* key, float p,      \
                             float keep, uint32_t first, uint32_t site, int steps, int tied) {                    \
        Mask mask(key, p, keep, first, site, steps);                                                              \
        mask.tied = tied != 0;                                                                                    \
        dropout_apply<T, VEC>(x, y, rows, n, log_width, mask);                                                    \
    }

KERNELS(f32, float, VECTOR<float>)
KERNELS(bf16, bf16, VECTOR<bf16>)
KERNELS(odd_f32, float, 1)
KERNELS(odd_bf16, bf16, 1)
