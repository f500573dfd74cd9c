// What belongs to a token and a head, in the hands of a warp: rows of up to 128 channels, 4 to a lane.
#pragma once
#include "common.cuh"

constexpr int OWN = 4;
// Threads of a block.
constexpr int BLOCK = 256, BLOCK_WARPS = BLOCK / WARP;

// The warps of a grid of (slabs, heads) blocks take the tokens of the block's head in turn.
struct HeadRows {
    int head, heads, width, lane;

    __device__ __forceinline__ HeadRows(int width)
        : head(blockIdx.y), heads(gridDim.y), width(width), lane(lane_id()) {}
    __device__ __forceinline__ int channel(int i) const { return lane + WARP * i; }
    __device__ __forceinline__ bool has(int i) const { return channel(i) < width; }
    // f(number of the token's row, where the row begins in [tokens, heads, width])
    template <class F>
    __device__ __forceinline__ void for_each(int tokens, F f) const {
        for (int t = blockIdx.x * BLOCK_WARPS + warp_id(); t < tokens; t += gridDim.x * BLOCK_WARPS) {
            const long long row = (long long)t * heads + head;
            f(row, row * width);
        }
    }
    // Zeros behind the row's end.
    template <class T>
    __device__ __forceinline__ void load(const T* row, float (&x)[OWN]) const {
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = has(i) ? to_f(row[channel(i)]) : 0.f;
    }
    template <class T>
    __device__ __forceinline__ void store(T* row, const float (&x)[OWN]) const {
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (has(i)) row[channel(i)] = from_f<T>(x[i]);
    }
    // This head's part of a parameter [heads, width].
    __device__ __forceinline__ void load_param(const float* p, float (&x)[OWN]) const { load(p + head * width, x); }
    // The sum over the block's warps of a parameter's gradient, to this head's part of out [heads, width]. All threads
    // call it.
    __device__ __forceinline__ void store_sum(const float (&x)[OWN], float* out) const {
        __shared__ float sums[BLOCK_WARPS][WARP * OWN];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN; i++) sums[warp_id()][channel(i)] = x[i];
        __syncthreads();
        for (int c = threadIdx.x; c < width; c += BLOCK) {
            float sum = 0.f;
            for (int w = 0; w < BLOCK_WARPS; w++) sum += sums[w][c];
            out[head * width + c] = sum;
        }
    }
};

__device__ __forceinline__ float dot(const float (&x)[OWN], const float (&y)[OWN]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) sum += x[i] * y[i];
    return warp_sum(sum);
}
