// The primitives of kernels/wgmma.cuh on the CPU; included by it. Copies and products are done when they are started.
// A warp of a warpgroup has its own 16 rows of a product: products are emulated warp by warp.
#pragma once

namespace emu {
// What emu.Map packs into a TensorMap: sizes and boxes as columns, heads, rows, batch.
struct Map { bf16* at; long long size[4]; int box_rows, box_columns; };

template <class F> static void each_of_box(const TensorMap& map, const int (&from)[4], F f) {
  const Map& m = reinterpret_cast<const Map&>(map);
  for (int r = 0; r < m.box_rows; r++)
    for (int c = 0; c < m.box_columns; c++) {
      const long long x[4] = {from[0] + c, from[1], from[2] + r, from[3]};
      bool in = true;
      for (int i = 0; i < 4; i++) in = in && x[i] >= 0 && x[i] < m.size[i];
      bf16* at = in ? m.at + ((x[3] * m.size[2] + x[2]) * m.size[1] + x[1]) * m.size[0] + x[0] : nullptr;
      f(r * 64 + (c / 8 ^ r % 8) * 8 + c % 8, at);
    }
}
static inline bf16 at_shared(uint32_t address) {
  bf16 x; memcpy(&x, dynamic_shared() + (address ^ (address >> 7 & 7) << 4), 2); return x;
}
// The pair (k, k + 1) of column n of a right operand.
template <bool ALONG_ROWS> static uint32_t pair_of(uint32_t b, int k, int n) {
  uint32_t x[2];
  for (int i = 0; i < 2; i++, k++) {
    const uint32_t start = (b & 0x3fff) * 16, panels = (b >> 16) * 16;
    const bf16 e = at_shared(ALONG_ROWS ? start + n * 128 + k * 2 : start + n / 64 * panels + k * 128 + n % 64 * 2);
    x[i] = e.bits;
  }
  return x[1] << 16 | x[0];
}
}  // namespace emu

static inline uint32_t shared_address(const void* p) { return (uint32_t)((const unsigned char*)p - emu::dynamic_shared()); }

struct Barrier {
  uint16_t arrivals, left; int bytes : 31; unsigned phase : 1;
  void init(int n) { arrivals = left = n; bytes = 0; phase = 0; }
  void end() { if (left == 0 && bytes == 0) left = arrivals, phase ^= 1; }
  void arrive() { if (left == 0) emu::fail("mbarrier: more arrivals than %d", arrivals); left--; end(); }
  void expect(int n) { bytes += n; arrive(); }
  void filled(int n) { bytes -= n; end(); }
  void wait(int use) { while (phase == (unsigned)(use & 1)) emu::yield(); }
};
static inline void fence_barrier_init() {}
static inline void named_barrier(int id, int threads) { emu::named_barrier(id, threads); }
static inline void named_barrier_arrive(int id, int threads) { emu::named_barrier_arrive(id, threads); }
static inline int warpgroup() { return threadIdx.x / WARPGROUP; }
template <int> static inline void fewer_registers() {}
template <int> static inline void more_registers() {}

static inline void load_box(bf16* to, const TensorMap& map, int batch, int row, int head, int column, Barrier& full) {
  if (shared_address(to) % 1024) emu::fail("load_box: a tile at %u, not at a multiple of 1024", shared_address(to));
  emu::each_of_box(map, {column, head, row, batch}, [&](int i, const bf16* at) { to[i] = at ? *at : bf16(0.f); });
  const emu::Map& m = reinterpret_cast<const emu::Map&>(map);
  full.filled(2 * m.box_rows * m.box_columns);
}
static inline void store_box(const TensorMap& map, int batch, int row, int head, int column, const bf16* from) {
  if (shared_address(from) % 1024) emu::fail("store_box: a tile at %u, not at a multiple of 1024", shared_address(from));
  emu::each_of_box(map, {column, head, row, batch}, [&](int i, bf16* at) { if (at) *at = from[i]; });
}
static inline void check_floats(const float* to, const float* from) {
  if ((size_t)to % 16 || (size_t)from % 16) emu::fail("copy of floats: not at a multiple of 16");
}
template <int N> static void load_floats(float* to, const float* from, Barrier& full) {
  check_floats(to, from); memcpy(to, from, 4 * N); full.filled(4 * N);
}
static inline void commit_stores() {}
static inline void wait_stores() {}
static inline void wait_written() {}
template <int N> static void store_floats(float* to, const float* from) { check_floats(to, from); memcpy(to, from, 4 * N); }
template <int N> static void add_floats(float* to, const float* from) {
  check_floats(to, from);
  for (int i = 0; i < N; i++) to[i] += from[i];
}
// Of blocks that run one after the other: only warps of the same block may be waited for.
static inline void wait_turn(const int* turn, int count) { while (*turn != count) emu::yield(); }
static inline void give_turn(int* turn, int count) { *turn = count; }
static inline void fence_copies() {}

template <int N, bool ALONG_ROWS>
static void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b, bool add) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int j = 0; j < N / 8; j++) {
    const uint32_t fb[2] = {emu::pair_of<ALONG_ROWS>(b, 2 * t, 8 * j + g), emu::pair_of<ALONG_ROWS>(b, 2 * t + 8, 8 * j + g)};
    float c[4];
    for (int i = 0; i < 4; i++) c[i] = add ? d[4 * j + i] : 0.f;
    emu::mma_m16n8k16_bf16(c, a, fb);
    for (int i = 0; i < 4; i++) d[4 * j + i] = c[i];
  }
}
template <int N, bool ALONG_ROWS = true>
static void wgmma(float (&d)[N / 2], uint32_t a, uint32_t b, bool add) {
  const int row = threadIdx.x % WARPGROUP / WARP * 16 + lane_id() / 4, k = 2 * (lane_id() % 4);
  const uint32_t fa[4] = {emu::pair_of<true>(a, k, row), emu::pair_of<true>(a, k, row + 8), emu::pair_of<true>(a, k + 8, row),
                          emu::pair_of<true>(a, k + 8, row + 8)};
  wgmma<N, ALONG_ROWS>(d, fa, b, add);
}
static inline void wgmma_fence() {}
static inline void wgmma_commit() {}
template <int> static inline void wgmma_wait() {}
static inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) { emu::stmatrix_x4_trans(row, r); }
