#ifdef SB_EMULATE
#include "emulate.h"
#endif
#define DYNAMIC_SHARED(name) unsigned char* name = emu::dynamic_shared()
extern "C" __global__ void __launch_bounds__(256) block_sum(const float* __restrict__ x, float* out, int n) {
  __shared__ float part[32];
  float s = 0;
  for (int i = blockIdx.x * n + threadIdx.x; i < (int)(blockIdx.x + 1) * n; i += blockDim.x) s += x[i];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
#ifndef NO_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) s += __shfl_down_sync(0xffffffffu, s, o);
    if (threadIdx.x == 0) out[blockIdx.x] = s;
  }
}
// C[16,8] = A[16,K] B[K,8], one warp, cp.async double buffering; A, B row-major bf16
extern "C" __global__ void mma_bf16(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int K) {
  DYNAMIC_SHARED(sm);
  auto As = (__nv_bfloat16(*)[16][16])sm; auto Bs = (__nv_bfloat16(*)[16][8])(sm + 2 * 512);
  int l = threadIdx.x;
  auto load = [&](int s, int k) {
    emu::cp_async16(&As[s][l / 2][l % 2 * 8], A + (l / 2) * K + k + l % 2 * 8, 16);
    if (l < 16) emu::cp_async16(&Bs[s][l][0], B + (k + l) * 8, 16);
    emu::cp_async_commit();
  };
  float c[4] = {};
  load(0, 0);
  for (int k = 0, s = 0; k < K; k += 16, s ^= 1) {
    if (k + 16 < K) { load(s ^ 1, k + 16); emu::cp_async_wait(1); } else emu::cp_async_wait(0);
    __syncwarp();
    uint32_t a[4], b[2];
    emu::ldmatrix_x4(a, &As[s][l % 16][l / 16 * 8]);
    emu::ldmatrix_x2_trans(b, &Bs[s][l % 16][0]);
    emu::mma_m16n8k16_bf16(c, a, b);
#ifndef NO_BARRIER
    __syncwarp();
#endif
  }
  int g = l >> 2, t = l & 3;
  *(float2*)&C[g * 8 + 2 * t] = make_float2(c[0], c[1]);
  *(float2*)&C[(g + 8) * 8 + 2 * t] = make_float2(c[2], c[3]);
}
extern "C" __global__ void mma_tf32(const float* A, const float* B, float* C, int K) {
  int l = threadIdx.x, g = l >> 2, t = l & 3;
  float c[4] = {};
  for (int k = 0; k < K; k += 8) {
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; r++) a[r] = __float_as_uint(A[(g + 8 * (r & 1)) * K + k + t + 4 * (r >> 1)]);
    for (int r = 0; r < 2; r++) b[r] = __float_as_uint(B[(k + t + 4 * r) * 8 + g]);
    emu::mma_m16n8k8_tf32(c, a, b);
  }
  C[g * 8 + 2 * t] = c[0]; C[g * 8 + 2 * t + 1] = c[1]; C[(g + 8) * 8 + 2 * t] = c[2]; C[(g + 8) * 8 + 2 * t + 1] = c[3];
}
#define DEADLOCK(NAME) extern "C" __global__ void NAME(int* x) { if (threadIdx.x < 40) { x[0]++; __syncthreads(); } else __syncwarp(); if (threadIdx.x > 5) return; emu::named_barrier(1, 64); }
DEADLOCK(deadlock)
extern "C" __global__ void oob(float* x, int i) { x[i + threadIdx.x] = 1.f; }
extern "C" __global__ void misaligned(float* x, float4* y, int i) { y[threadIdx.x] = *(const float4*)(x + i); }
extern "C" __global__ void smem_oob(int i) { DYNAMIC_SHARED(s); ((volatile float*)s)[i] = 1.f; }
extern "C" __global__ void speed(float* x, int n) {
  uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, 5}; float c[4] = {};
  for (int i = 0; i < n; i++) emu::mma_m16n8k16_bf16(c, a, b);
  x[threadIdx.x] = c[0];
}
