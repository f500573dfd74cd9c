// Layer norm over rows of n elements, of one input or of a residual sum with dropout.
//
//   x = residual + m ⊙ branch,   y = w ⊙ (x − mean) rstd + b,   rstd = 1/√(var + eps)
//   dx = rstd (g − mean(g) − x̂ mean(g x̂)),  g = w ⊙ dy,  x̂ = (x − mean) rstd
//   dw = Σ dy ⊙ x̂,  db = Σ dy over the rows
//
// The statistics of a row are found again going back: the row is in registers anyway. Sums in f32.
#pragma once
#include "rows.cuh"

// The input of one row: this thread's elements, and which of the branch are kept.
template <class T, int VEC, int NV, bool RESIDUAL>
__device__ __forceinline__ uint32_t load_sum(const T* branch, const T* input, int row, int n, bool live,
                                             const Mask& mask, const Team& team, float (&x)[VEC * NV]) {
    const long long at = (long long)row * n;
    load_row<VEC, NV>(input + at, n, live, team, x);
    if constexpr (!RESIDUAL) return 0;
    float y[VEC * NV];
    load_row<VEC, NV>(branch + at, n, live, team, y);
    const uint32_t bits = mask.row_bits<VEC, NV>(row, n, team);
#pragma unroll
    for (int i = 0; i < VEC * NV; i++) x[i] += mask.factor(bits, i) * y[i];
    return bits;
}

// Shared memory: 2 n floats, for the kernels with several vectors a thread.
template <class T, int VEC, int NV, bool RESIDUAL>
__device__ __forceinline__ void layer_norm_forward(const T* branch, const T* input, const float* w, const float* b,
                                                   T* y, int rows, int n, int log_lanes, float eps,
                                                   const Mask& mask) {
    __shared__ float scratch[2 * THREADS_WIDE / WARP];
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const Team team(log_lanes, scratch);
    const RowParam<VEC, NV> scale(w, n, team, shared), shift(b, n, team, shared + n);
    if (NV > 1) __syncthreads();
    for (int first = blockIdx.x * team.count; first < rows; first += gridDim.x * team.count) {
        const int row = first + team.index;
        const bool live = row < rows;
        float x[VEC * NV];
        load_sum<T, VEC, NV, RESIDUAL>(branch, input, row, n, live, mask, team, x);
        float sum[1] = {0.f};
#pragma unroll
        for (int i = 0; i < VEC * NV; i++) sum[0] += x[i];
        team_sum(sum, team);
        const float mean = sum[0] / n;
        sum[0] = 0.f;
#pragma unroll
        for (int v = 0; v < NV; v++) {
#pragma unroll
            for (int i = v * VEC; i < (v + 1) * VEC; i++) {
                x[i] = team.column<VEC>(v) < n ? x[i] - mean : 0.f;
                sum[0] += x[i] * x[i];
            }
        }
        team_sum(sum, team);
        const float rstd = 1.f / sqrtf(sum[0] / n + eps);
#pragma unroll
        for (int v = 0; v < NV; v++) {
            float w[VEC], b[VEC];
            scale.get(v, team, w);
            shift.get(v, team, b);
#pragma unroll
            for (int i = 0; i < VEC; i++) x[v * VEC + i] = x[v * VEC + i] * rstd * w[i] + b[i];
        }
        store_row<VEC, NV>(y + (long long)row * n, n, live, team, x);
    }
}

// Gradients of branch (null: not wanted), input, and, as partial[blocks][2][n], of w and b.
// Shared memory: n floats.
template <class T, int VEC, int NV, bool RESIDUAL>
__device__ __forceinline__ void layer_norm_backward(const T* branch, const T* input, const float* w, const T* dy,
                                                    T* dbranch, T* dinput, float* partial, int rows, int n,
                                                    int log_lanes, float eps, const Mask& mask) {
    __shared__ float scratch[2 * THREADS_WIDE / WARP];
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const Team team(log_lanes, scratch);
    const RowParam<VEC, NV> scale(w, n, team, shared);
    if (NV > 1) __syncthreads();
    float dw[VEC * NV], db[VEC * NV];
#pragma unroll
    for (int i = 0; i < VEC * NV; i++) dw[i] = db[i] = 0.f;
    for (int first = blockIdx.x * team.count; first < rows; first += gridDim.x * team.count) {
        const int row = first + team.index;
        const bool live = row < rows;
        float x[VEC * NV], g[VEC * NV];
        load_row<VEC, NV>(dy + (long long)row * n, n, live, team, g);
        const uint32_t bits = load_sum<T, VEC, NV, RESIDUAL>(branch, input, row, n, live, mask, team, x);
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int v = 0; v < NV; v++) {
            float w[VEC];
            scale.get(v, team, w);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                sums[0] += x[v * VEC + i];
                sums[1] += g[v * VEC + i] * w[i];
            }
        }
        team_sum(sums, team);
        const float mean = sums[0] / n, offset = sums[1] / n;
        sums[0] = sums[1] = 0.f;
#pragma unroll
        for (int v = 0; v < NV; v++) {
            float w[VEC];
            scale.get(v, team, w);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const int e = v * VEC + i;
                x[e] = team.column<VEC>(v) < n ? x[e] - mean : 0.f;
                sums[0] += x[e] * x[e];
                sums[1] += g[e] * w[i] * x[e];
            }
        }
        team_sum(sums, team);
        const float rstd = 1.f / sqrtf(sums[0] / n + eps);
        const float along = sums[1] * rstd / n;
#pragma unroll
        for (int v = 0; v < NV; v++) {
            float w[VEC];
            scale.get(v, team, w);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const int e = v * VEC + i;
                const float xhat = x[e] * rstd;
                dw[e] += g[e] * xhat;
                db[e] += g[e];
                x[e] = rstd * (g[e] * w[i] - offset - xhat * along);
            }
        }
        store_row<VEC, NV>(dinput + (long long)row * n, n, live, team, x);
        if (RESIDUAL && dbranch) {
#pragma unroll
            for (int i = 0; i < VEC * NV; i++) x[i] *= mask.factor(bits, i);
            store_row<VEC, NV>(dbranch + (long long)row * n, n, live, team, x);
        }
    }
    float* out = partial + 2LL * n * blockIdx.x;
    store_block_sum<VEC, NV>(dw, n, team, shared, out);
    store_block_sum<VEC, NV>(db, n, team, shared, out + n);
}
