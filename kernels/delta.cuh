// What delta.cu and delta_sm90a.cu share: the chunks, and M = (I + L)⁻¹ in f32.
#pragma once
#include "mma.cuh"

constexpr int C = 64;      // sub-steps of a chunk, padded
constexpr int LF = C + 4;  // row stride of L and M in shared memory

__device__ __forceinline__ float decay(float x) { return __expf(fminf(x, 0.f)); }

// Where a chunk lies in the sequence.
struct Chunk {
    int tokens, rows;            // of this chunk
    long long token, row;        // first, counted over the batch
};
__device__ __forceinline__ Chunk chunk_at(int c, int batch, int steps, int n) {
    const int per = C / n, first = c * per;
    const int tokens = min(per, steps - first);
    return {tokens, tokens * n, (long long)batch * steps + first, ((long long)batch * steps + first) * n};
}

// A warp's accumulators to a tile; rows from `row`, columns from `col`.
template <class T, int MT, int NT>
__device__ __forceinline__ void to_tile(T* s, int lds, const float (&acc)[MT][NT][4], int row, int col) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                store_vec<2>(s + (row + acc_row(i, e)) * lds + col + acc_col(j, e), {acc[i][j][e], acc[i][j][e + 1]});
}

// Multiplies the rows of a warp's 16-row tile by `low` (rows lane / 4) and `high` (8 further down).
template <int NT>
__device__ __forceinline__ void scale_rows(float (&acc)[1][NT][4], float low, float high) {
#pragma unroll
    for (int j = 0; j < NT; j++) {
        acc[0][j][0] *= low;
        acc[0][j][1] *= low;
        acc[0][j][2] *= high;
        acc[0][j][3] *= high;
    }
}

// b and β of a chunk, by the first three warps.
__device__ __forceinline__ void sum_decays(float* sb, const float* beta, const float* g, const Chunk& at, int heads,
                                           int head, int n) {
    const int warp = warp_id(), lane = lane_id();
    if (warp == 0) {
        // Each lane sums two sub-steps, then the lanes before it.
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int j = 2 * lane + e;
            x[e] = g && j < at.rows && j % n == 0 ? g[(at.token + j / n) * heads + head] : 0.f;
        }
        float sum = x[0] + x[1];
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const float before = __shfl_up_sync(FULL, sum, d);
            if (lane >= d) sum += before;
        }
        sb[2 * lane] = sum - x[1];
        sb[2 * lane + 1] = sum;
    } else if (warp < 3) {
        const int j = threadIdx.x - WARP;
        sb[C + j] = j < at.rows ? beta[(at.row + j) * heads + head] : 0.f;
    }
}

// M from L, both [C, LF] f32; four warps, of which each has written its 16 rows of L. Above M's diagonal only blocks of
// 16 that are read here are written, with zeros. Ends with a barrier.
__device__ __forceinline__ void invert(const float* sl, float* sm) {
    const int warp = warp_id(), lane = lane_id();
    __syncwarp();
    // Diagonal blocks of 16: lane j solves for column j.
    {
        const float* l = sl + 16 * warp * LF + 16 * warp;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float sum = i == lane ? 1.f : 0.f;
#pragma unroll
            for (int j = 0; j < i; j += 4) {
                float y[4];
                load_vec<4>(l + i * LF + j, y);
#pragma unroll
                for (int d = 0; d < 4; d++)
                    if (j + d < i) sum -= y[d] * x[j + d];
            }
            x[i] = sum;
        }
        // The other lanes have zeros: the block to the right.
        if (lane < 16 || warp % 2 == 0)
#pragma unroll
            for (int i = 0; i < 16; i++) sm[(16 * warp + i) * LF + 16 * warp + lane] = x[i];
    }
    __syncthreads();
    // Below the diagonal: −M₂₂ L₂₁ M₁₁, first for blocks of 32, then of 64.
    if (warp < 2) {
        const int at1 = 32 * warp, at2 = at1 + 16;
        float y[1][2][4], x[1][2][4];
        zero(y);
        zero(x);
        warp_gemm<F32, AlongK, AlongMN, 1, 2>(y, sm + at2 * LF + at2, LF, sl + at2 * LF + at1, LF, 16);
        warp_gemm_acc<F32, AlongMN, 1, 2, 2>(x, y, sm + at1 * LF + at1, LF);
        scale_rows<2>(x, -1.f, -1.f);
        to_tile<float, 1, 2>(sm, LF, x, at2, at1);
    }
    __syncthreads();
    {
        const int row = 32 + warp % 2 * 16, col = warp / 2 * 16;
        float y[1][4][4], x[1][2][4];
        zero(y);
        zero(x);
        warp_gemm<F32, AlongK, AlongMN, 1, 4>(y, sm + row * LF + 32, LF, sl + 32 * LF, LF, 32);
        warp_gemm_acc<F32, AlongMN, 1, 4, 2>(x, y, sm + col, LF);
        scale_rows<2>(x, -1.f, -1.f);
        to_tile<float, 1, 2>(sm, LF, x, row, col);
    }
    __syncthreads();
}
// Writes M to global memory.
template <class T>
__device__ __forceinline__ void put_m(T* m, const float* sm) {
    for (int i = threadIdx.x; i < C * C / 4; i += blockDim.x) {
        const int r = i / 16, c = i % 16 * 4;
        float x[4] = {0.f, 0.f, 0.f, 0.f};
        if (c / 16 <= r / 16) load_vec<4>(sm + r * LF + c, x);
        store_vec<4>(m + 4 * i, x);
    }
}
