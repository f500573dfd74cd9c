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
template <class T, int VEC, int NV, bool RESIDUAL, int ARRAYS>
__device__ __forceinline__ uint32_t load_sum(const Ahead<T, VEC, NV, ARRAYS>& ahead, const T* branch, const T* input,
                                             int row, int n, const Step& step, const Mask& mask, const Team& team,
                                             float (&x)[VEC * NV]) {
    if constexpr (!RESIDUAL) {
        ahead.get(0, input, row, team, x);
        return 0;
    }
    // While the row is on its way: copies were started before, loads are started here.
    constexpr bool COPIES = Ahead<T, VEC, NV, ARRAYS>::COPIES;
    uint32_t bits;
    float y[VEC * NV];
    if constexpr (COPIES) bits = mask.row_bits<VEC, NV>(step, n, team);
    ahead.get(0, input, row, team, x);
    ahead.get(1, branch, row, team, y);
    if constexpr (!COPIES) bits = mask.row_bits<VEC, NV>(step, n, team);
#pragma unroll
    for (int i = 0; i < VEC * NV; i++) x[i] += mask.factor(bits, i) * y[i];
    return bits;
}

// Matrices that a row's input is the sum of.
template <bool RESIDUAL> constexpr int PARTS = RESIDUAL ? 2 : 1;

// Shared memory: 2 n floats, then what is copied ahead of PARTS matrices.
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
    Ahead<T, VEC, NV, PARTS<RESIDUAL>> ahead(shared + 2 * n, rows, n);
    const int stride = gridDim.x * team.count;
    int row = blockIdx.x * team.count + team.index;
    const auto start = [&](int row) {
        if constexpr (RESIDUAL) ahead.start({input, branch}, row, team);
        else ahead.start({input}, row, team);
    };
    start(row);
    Step step(row, stride, mask.steps);
    for (int first = row - team.index; first < rows; first += stride, row += stride, step.next()) {
        start(row + stride);
        float x[VEC * NV];
        load_sum<T, VEC, NV, RESIDUAL>(ahead, branch, input, row, n, step, mask, team, x);
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
        store_row<VEC, NV>(y + (long long)row * n, n, row < rows, team, x);
    }
    cp_async_wait<0>();
}

// Gradients of branch (null: not wanted), input, and, as partial[blocks][2][n], of w and b.
// Shared memory: n floats, or n for each warp where a thread has one vector, then what is copied ahead of PARTS + 1
// matrices.
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
    constexpr int DY = PARTS<RESIDUAL>;
    Ahead<T, VEC, NV, DY + 1> ahead(shared + (NV == 1 ? blockDim.x / WARP : 1) * n, rows, n);
    const int stride = gridDim.x * team.count;
    int row = blockIdx.x * team.count + team.index;
    const auto start = [&](int row) {
        if constexpr (RESIDUAL) ahead.start({input, branch, dy}, row, team);
        else ahead.start({input, dy}, row, team);
    };
    start(row);
    Step step(row, stride, mask.steps);
    for (int first = row - team.index; first < rows; first += stride, row += stride, step.next()) {
        start(row + stride);
        const bool live = row < rows;
        float x[VEC * NV], g[VEC * NV];
        const uint32_t bits = load_sum<T, VEC, NV, RESIDUAL>(ahead, branch, input, row, n, step, mask, team, x);
        ahead.get(DY, dy, row, team, g);
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
    cp_async_wait<0>();
    float* out = partial + 2LL * n * blockIdx.x;
    store_block_sum<VEC, NV>(dw, n, team, shared, out);
    store_block_sum<VEC, NV>(db, n, team, shared, out + n);
}
