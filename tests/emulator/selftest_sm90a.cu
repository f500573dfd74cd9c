#include "wgmma.cuh"
struct Shared { bf16 a[64 * 128], b[128 * 128], out[64 * 128]; Barrier full; };
// out [64, 128] = (A Bᵀ) B with A [64, 128] and B [128, 128], one warpgroup
extern "C" __global__ void product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                                   const __grid_constant__ TensorMap out) {
  DYNAMIC_SHARED(raw);
  auto& s = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    s.full.init(1);
    fence_barrier_init();
    s.full.expect(load_bytes<64, 128>() + load_bytes<128, 128>());
    load_tile<64, 128>(s.a, a, 0, 0, 0, s.full);
    load_tile<128, 128>(s.b, b, 0, 0, 0, s.full);
  }
  __syncthreads();
  s.full.wait(0);
  float x[64], y[64];
  start_product<128, 128, 64, 128>(x, operand(s.a), operand(s.b));
  wait_product<0>(x);
  uint32_t p[8][4];
  pack(p, x);
  start_product<128, 128>(y, p, operand(s.b, 128), false);
  wait_product<0>(y);
  stage_tile(s.out, y, 1.f, 1.f);
  fence_copies();
  __syncthreads();
  if (threadIdx.x == 0) store_tile<128>(out, 0, 0, 0, s.out), wait_stores();
}
// out [8, 128, 4] = 2 A B with A [64, 128] and B [128, 64], as the threads of the warpgroup hold it
struct TwiceShared { bf16 a[64 * 128], b[128 * 64]; float x[64 * 64]; Barrier full; };
extern "C" __global__ void twice(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* out,
                                 int* turn) {
  DYNAMIC_SHARED(raw);
  auto& s = *reinterpret_cast<TwiceShared*>(raw);
  if (threadIdx.x == 0) {
    s.full.init(1);
    fence_barrier_init();
    s.full.expect(load_bytes<64, 128>() + load_bytes<128, 64>());
    load_tile<64, 128>(s.a, a, 0, 0, 0, s.full);
    load_tile<128, 64>(s.b, b, 0, 0, 0, s.full);
  }
  __syncthreads();
  s.full.wait(0);
  float x[32];
  start_product<64, 128, 64>(x, operand(s.a), operand(s.b, 128), false);
  wait_product<0>(x);
  for (int j = 0; j < 8; j++) {
    const float four[4] = {x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]};
    store_vec<4>(s.x + (j * WARPGROUP + threadIdx.x) * 4, four);
  }
  fence_copies();
  __syncthreads();
  if (threadIdx.x == 0) {
    store_floats<64 * 64>(out, s.x);
    commit_stores();
    wait_written();
    give_turn(turn, 1);
    wait_turn(turn, 1);
    add_floats<64 * 64>(out, s.x);
    commit_stores();
    wait_written();
  }
}
