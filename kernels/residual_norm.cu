// The tail of every layer: y = LayerNorm(residual + dropout(branch)).
//
// branch, residual, y [rows, n] with rows = B · steps; w, b [n]. The dropout mask is a function of the position
// (rows.cuh, Mask): nothing is kept for the backward pass, which reads the inputs again.
// Source: Ba, Kiros, Hinton, "Layer normalization", 2016; equations in layer_norm.cuh.
//
// Grid: any; the blocks take rows in turn. Block: 256 threads, or one team where it is wider than a warp.
// Shared memory: see layer_norm.cuh. backward: partial [blocks, 2, n] takes the sums for w and b, which columns_final
// adds.
#include "layer_norm.cuh"

#define KERNELS(NAME, SUFFIX, T, VEC, NV, THREADS, FORWARD_BLOCKS, BACKWARD_BLOCKS)                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) residual_norm_forward_##NAME##_##SUFFIX(   \
        const T* branch, const T* residual, const float* w, const float* b, T* y, int rows, int n, int log_lanes,    \
        float eps, const uint32_t* key, float p, float keep, uint32_t first, uint32_t site, int steps) {             \
        layer_norm_forward<T, VEC, NV, true>(branch, residual, w, b, y, rows, n, log_lanes, eps,                     \
                                             Mask(key, p, keep, first, site, steps));                                \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS) residual_norm_backward_##NAME##_##SUFFIX( \
        const T* branch, const T* residual, const float* w, const T* dy, T* dbranch, T* dresidual, float* partial,   \
        int rows, int n, int log_lanes, float eps, const uint32_t* key, float p, float keep, uint32_t first,         \
        uint32_t site, int steps) {                                                                                  \
        layer_norm_backward<T, VEC, NV, true>(branch, residual, w, dy, dbranch, dresidual, partial, rows, n,         \
                                              log_lanes, eps, Mask(key, p, keep, first, site, steps));               \
    }

KERNELS(small, f32, float, VECTOR<float>, 1, THREADS, 4, 3)
KERNELS(wide, f32, float, VECTOR<float>, MANY / VECTOR<float>, THREADS_WIDE, 2, 1)
KERNELS(odd, f32, float, 1, MANY, THREADS, 3, 1)
KERNELS(small, bf16, bf16, VECTOR<bf16>, 1, THREADS, 4, 3)
KERNELS(wide, bf16, bf16, VECTOR<bf16>, MANY / VECTOR<bf16>, THREADS_WIDE, 2, 1)
KERNELS(odd, bf16, bf16, 1, MANY, THREADS, 3, 1)
