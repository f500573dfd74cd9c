// Vectors of length one: y = r x, r = 1/√(Σ x² + 1e-6), over rows of n elements; dx = r (dy − y (dy · y)).
//
// x, y [rows, n]. Sums in f32. Source: `l2norm` of flash-linear-attention.
// Grid: any; the blocks take rows in turn. Block: 256 threads, or one team where it is wider than a warp.
#include "rows.cuh"

constexpr float EPS = 1e-6f;

template <class T, int VEC, int NV>
__device__ __forceinline__ void l2norm_forward(const T* x, T* y, int rows, int n, int log_lanes) {
    __shared__ float scratch[2 * THREADS_WIDE / WARP];
    const Team team(log_lanes, scratch);
    for (int first = blockIdx.x * team.count; first < rows; first += gridDim.x * team.count) {
        const int row = first + team.index;
        const bool live = row < rows;
        float u[VEC * NV], sum[1] = {0.f};
        load_row<VEC, NV>(x + (long long)row * n, n, live, team, u);
#pragma unroll
        for (int i = 0; i < VEC * NV; i++) sum[0] += u[i] * u[i];
        team_sum(sum, team);
        const float r = 1.f / sqrtf(sum[0] + EPS);
#pragma unroll
        for (int i = 0; i < VEC * NV; i++) u[i] *= r;
        store_row<VEC, NV>(y + (long long)row * n, n, live, team, u);
    }
}

template <class T, int VEC, int NV>
__device__ __forceinline__ void l2norm_backward(const T* x, const T* dy, T* dx, int rows, int n, int log_lanes) {
    __shared__ float scratch[2 * THREADS_WIDE / WARP];
    const Team team(log_lanes, scratch);
    for (int first = blockIdx.x * team.count; first < rows; first += gridDim.x * team.count) {
        const int row = first + team.index;
        const bool live = row < rows;
        float u[VEC * NV], g[VEC * NV], sums[2] = {0.f, 0.f};
        load_row<VEC, NV>(x + (long long)row * n, n, live, team, u);
        load_row<VEC, NV>(dy + (long long)row * n, n, live, team, g);
#pragma unroll
        for (int i = 0; i < VEC * NV; i++) {
            sums[0] += u[i] * u[i];
            sums[1] += g[i] * u[i];
        }
        team_sum(sums, team);
        const float r = 1.f / sqrtf(sums[0] + EPS);
        const float along = sums[1] * r * r;
#pragma unroll
        for (int i = 0; i < VEC * NV; i++) u[i] = r * (g[i] - u[i] * along);
        store_row<VEC, NV>(dx + (long long)row * n, n, live, team, u);
    }
}

#define KERNELS(NAME, SUFFIX, T, VEC, NV, THREADS)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        l2norm_forward_##NAME##_##SUFFIX(const T* x, T* y, int rows, int n, int log_lanes) {                       \
        l2norm_forward<T, VEC, NV>(x, y, rows, n, log_lanes);                                                      \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        l2norm_backward_##NAME##_##SUFFIX(const T* x, const T* dy, T* dx, int rows, int n, int log_lanes) {        \
        l2norm_backward<T, VEC, NV>(x, dy, dx, rows, n, log_lanes);                                                \
    }

KERNELS(small, f32, float, VECTOR<float>, 1, THREADS)
KERNELS(wide, f32, float, VECTOR<float>, MANY / VECTOR<float>, THREADS_WIDE)
KERNELS(odd, f32, float, 1, MANY, THREADS)
KERNELS(small, bf16, bf16, VECTOR<bf16>, 1, THREADS)
KERNELS(wide, bf16, bf16, VECTOR<bf16>, MANY / VECTOR<bf16>, THREADS_WIDE)
KERNELS(odd, bf16, bf16, 1, MANY, THREADS)
