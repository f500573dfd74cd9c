// What all kernels share: types, conversions, reductions in fixed order, activation functions, random numbers.
//
// Kernels are `extern "C" __global__ void <op>_<what>_<suffix>`, one file per op of src/ops; the suffix is the
// type of the activations (f32, bf16) or, for kernels that multiply matrices, the numeric route (f32, tf32,
// bf16; see mma.cuh). Sums are accumulated in f32. No atomics: every sum has one order.
#pragma once

// tests/emulator runs the kernels on a CPU.
#ifdef SB_EMULATE
#include "emulate.h"
#define DYNAMIC_SHARED(name) unsigned char* name = emu::dynamic_shared()
#else
#include <cuda_bf16.h>
#include <cstdint>
// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

using bf16 = __nv_bfloat16;

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ int lane_id() { return threadIdx.x & (WARP - 1); }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

// ---- conversions

__device__ __forceinline__ float to_f(float x) { return x; }
__device__ __forceinline__ float to_f(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_f(float x);
template <> __device__ __forceinline__ float from_f<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f<bf16>(float x) { return __float2bfloat16_rn(x); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// N consecutive elements as floats, 16 bytes at a time; the address is aligned to all N.
template <int N, class T>
__device__ __forceinline__ void load_vec(const T* p, float (&x)[N]) {
    struct alignas(sizeof(T) * N) Vec { T v[N]; };
    const Vec vec = *reinterpret_cast<const Vec*>(p);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_f(vec.v[i]);
}
template <int N, class T>
__device__ __forceinline__ void store_vec(T* p, const float (&x)[N]) {
    struct alignas(sizeof(T) * N) Vec { T v[N]; };
    Vec vec;
#pragma unroll
    for (int i = 0; i < N; i++) vec.v[i] = from_f<T>(x[i]);
    *reinterpret_cast<Vec*>(p) = vec;
}

// ---- sums and maxima; all lanes or threads get the result

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, offset));
    return x;
}
// `scratch`: 32 floats of shared memory. The block is a whole number of warps.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    float total = 0.f;
    for (int w = 0; w < (int)blockDim.x / WARP; w++) total += scratch[w];
    return total;
}

// ---- functions, as in src/ops/real.rs

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float silu_grad(float x) {
    const float s = sigmoid(x);
    return s * (1.f + x * (1.f - s));
}
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(__expf(x)); }
// 2^x; tiny results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef SB_EMULATE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
// 1 / x within 1 ulp; 0 for infinity.
__device__ __forceinline__ float rcp_fast(float x) {
#ifdef SB_EMULATE
    return 1.f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// ---- Philox 4x32-10, the same numbers as src/ops/philox.rs

__device__ __forceinline__ uint4 philox4x32(uint4 c, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        if (round > 0) { key.x += 0x9E3779B9u; key.y += 0xBB67AE85u; }
        const uint32_t h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x;
        const uint32_t h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
        c = make_uint4(h1 ^ c.y ^ key.x, l1, h0 ^ c.w ^ key.y, l0);
    }
    return c;
}
__device__ __forceinline__ float unit_f32(uint32_t bits) { return (bits >> 8) * (1.f / 16777216.f); }

// ---- asynchronous copies to shared memory

// Copies N bytes, 8 or 16, of which the first `bytes` come from `src` and the rest are zero; both aligned to N.
template <int N>
__device__ __forceinline__ void cp_async(void* dst, const void* src, int bytes = N) {
    static_assert(N == 8 || N == 16, "what cp.async copies");
#ifdef SB_EMULATE
    if constexpr (N == 16) emu::cp_async16(dst, src, bytes);
    else emu::cp_async8(dst, src, bytes);
#else
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(dst);
    if constexpr (N == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(src), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(src), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void cp_async16(void* dst, const void* src, int bytes = 16) {
    cp_async<16>(dst, src, bytes);
}
__device__ __forceinline__ void cp_async_commit() {
#ifdef SB_EMULATE
    emu::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `LEFT` of this thread's groups are under way.
template <int LEFT>
__device__ __forceinline__ void cp_async_wait() {
#ifdef SB_EMULATE
    emu::cp_async_wait(LEFT);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Fills a tile of shared memory, `rows_pad` x `cols_pad` with row stride `lds`, from `rows` x `cols` elements of
// global memory with row stride `ldg`; zeros outside. All threads of the block take part; no barrier inside.
template <class Dst, class Src>
__device__ __forceinline__ void load_tile(Dst* s, int lds, const Src* g, long long ldg, int rows, int cols,
                                          int rows_pad, int cols_pad) {
    constexpr int V = 16 / sizeof(Src);
    const bool vector = cols_pad % V == 0 && cols % V == 0 && ldg % V == 0 && lds % V == 0 &&
                        (reinterpret_cast<size_t>(g) & 15) == 0;
    if (vector) {
        const int per_row = cols_pad / V;
        for (int i = threadIdx.x; i < rows_pad * per_row; i += blockDim.x) {
            const int r = i / per_row, c = i % per_row * V;
            float x[V];
            if (r < rows && c < cols) {
                load_vec<V>(g + r * ldg + c, x);
            } else {
#pragma unroll
                for (int j = 0; j < V; j++) x[j] = 0.f;
            }
            // Dst may be wider than Src: stores of at most 16 bytes.
            constexpr int W = V * sizeof(Dst) > 16 ? 16 / sizeof(Dst) : V;
#pragma unroll
            for (int j = 0; j < V; j += W) {
                float y[W];
#pragma unroll
                for (int l = 0; l < W; l++) y[l] = x[j + l];
                store_vec<W>(s + r * lds + c + j, y);
            }
        }
    } else {
        for (int i = threadIdx.x; i < rows_pad * cols_pad; i += blockDim.x) {
            const int r = i / cols_pad, c = i % cols_pad;
            s[r * lds + c] = from_f<Dst>(r < rows && c < cols ? to_f(g[r * ldg + c]) : 0.f);
        }
    }
}
