// What only GPUs of compute capability 9.0 have: matrix products of a warpgroup (wgmma), tiles copied by the tensor
// memory accelerator (TMA), and barriers in shared memory that wait for such copies.
//
// A tile of `rows` rows lies in shared memory as panels of 64 columns, [columns / 64][rows][64] bf16: rows of 128
// bytes, whose chunks of 16 bytes are swapped by the swizzle that TMA writes and wgmma reads (chunk ^ row % 8). A copy
// moves rows of one panel; elements outside of the tensor are read as zero and not written.
#pragma once
#include "common.cuh"

constexpr int WARPGROUP = 4 * WARP, PANEL = 64, BOX = 64;

// The half of an operand's descriptor that is the same for all: groups of eight rows follow each other, and chunks are
// swizzled.
constexpr uint32_t OPERAND_HIGH = 1u << 30 | 8 * PANEL * 2 / 16;

// A tensor [batch, rows, heads, columns], as the driver describes it for TMA (CUtensorMap).
struct alignas(64) TensorMap { unsigned char bits[128]; };

// tests/emulator has all of this until "built on these".
#ifdef SB_EMULATE
#include "emulate_sm90a.h"
#else

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- barriers

// A barrier whose phases end when all arrivals and all announced bytes are there. `use` counts phases from 0.
struct Barrier {
    uint64_t state;

    __device__ __forceinline__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }
    // Arrives, and announces bytes.
    __device__ __forceinline__ void expect(int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }
    // Until phase `use` has ended; phase -1 has from the start.
    __device__ __forceinline__ void wait(int use) {
        int done;
        do {
            asm volatile(
                "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                : "=r"(done) : "r"(shared_address(this)), "r"(use & 1) : "memory");
        } while (!done);
    }
};

// Between the initialisation of barriers and their use by copies.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Waits for `threads` threads of the block at barrier `id`, or lets them go on without waiting.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- warpgroups

// The same number in all lanes, as the compiler sees too: what it leads to may live in uniform registers.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(FULL, threadIdx.x / WARPGROUP, 0); }

template <int COUNT>
__device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// ---- copies; one thread starts each

// Of a box, the map's rows of one panel. `full` is told the bytes before.
__device__ __forceinline__ void load_box(bf16* to, const TensorMap& map, int batch, int row, int head, int column,
                                         Barrier& full) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(head), "r"(row), "r"(batch), "r"(shared_address(&full))
        : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap& map, int batch, int row, int head, int column,
                                          const bf16* from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(column), "r"(head), "r"(row), "r"(batch), "r"(shared_address(from)) : "memory");
}
// After the last of some stores.
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Of N floats, at 16 bytes.
template <int N>
__device__ __forceinline__ void load_floats(float* to, const float* from, Barrier& full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)), "l"(from), "n"(N * 4), "r"(shared_address(&full))
                 : "memory");
}

// Of N floats to global memory, at 16 bytes, or added to what stands there.
template <int N>
__device__ __forceinline__ void store_floats(float* to, const float* from) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
                 "n"(N * 4) : "memory");
}
template <int N>
__device__ __forceinline__ void add_floats(float* to, const float* from) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "n"(N * 4) : "memory");
}

// Until the stores that this thread started have read what they write, or have written it.
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Blocks that add to the same numbers one after the other: one waits until `turn` has come to `count`, the one before
// has brought it there. What the one before has had written until then is seen.
__device__ __forceinline__ void wait_turn(const int* turn, int count) {
    int seen;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(turn) : "memory");
    } while (seen != count);
    asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void give_turn(int* turn, int count) {
    asm volatile("fence.proxy.async; st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(count) : "memory");
}

// Between this thread's stores to shared memory and a copy that reads them.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- matrix products

#define SB_8(d, i)                                                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define SB_32(d) SB_8(d, 0), SB_8(d, 8), SB_8(d, 16), SB_8(d, 24)
#define SB_64(d) SB_32(d), SB_8(d, 32), SB_8(d, 40), SB_8(d, 48), SB_8(d, 56)

#define SB_LIST_8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define SB_LIST_32                                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
    "%30,%31}"
#define SB_LIST_64                                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
    "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
    "%58,%59,%60,%61,%62,%63}"

// d[64 x N] (+)= a b for 16 of k; `add` tells whether to add to d. Element i of d is row 16·warp + lane/4 + 8·(i/2%2),
// column 8·(i/4) + 2·(lane%4) + i%2.
// With both operands in shared memory, k runs along the rows of a, and along the rows of b, or along its columns.
template <int N, bool ALONG_ROWS = true>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint32_t a, uint32_t b, bool add) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64)
        asm volatile("{ .reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %34, 0; mov.b64 a, {%32, %35}; "
                     "mov.b64 b, {%33, %35}; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SB_LIST_32
                     ", a, b, p, 1, 1, 0, %36; }"
                     : SB_32(d)
                     : "r"(a), "r"(b), "r"((int)add), "n"(OPERAND_HIGH), "n"(!ALONG_ROWS));
    else
        asm volatile("{ .reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %66, 0; mov.b64 a, {%64, %67}; "
                     "mov.b64 b, {%65, %67}; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SB_LIST_64
                     ", a, b, p, 1, 1, 0, %68; }"
                     : SB_64(d)
                     : "r"(a), "r"(b), "r"((int)add), "n"(OPERAND_HIGH), "n"(!ALONG_ROWS));
}
// With a in registers, k runs along the rows of b, or along its columns.
template <int N, bool ALONG_ROWS>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b, bool add) {
    static_assert(N == 16 || N == 64 || N == 128);
    if constexpr (N == 16)
        asm volatile("{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, %13, 0; mov.b64 b, {%12, %14}; "
                     "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " SB_LIST_8
                     ", {%8,%9,%10,%11}, b, p, 1, 1, %15; }"
                     : SB_8(d, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"((int)add), "n"(OPERAND_HIGH),
                       "n"(!ALONG_ROWS));
    else if constexpr (N == 64)
        asm volatile("{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, %37, 0; mov.b64 b, {%36, %38}; "
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SB_LIST_32
                     ", {%32,%33,%34,%35}, b, p, 1, 1, %39; }"
                     : SB_32(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"((int)add), "n"(OPERAND_HIGH),
                       "n"(!ALONG_ROWS));
    else
        asm volatile("{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, %69, 0; mov.b64 b, {%68, %70}; "
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SB_LIST_64
                     ", {%64,%65,%66,%67}, b, p, 1, 1, %71; }"
                     : SB_64(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"((int)add), "n"(OPERAND_HIGH),
                       "n"(!ALONG_ROWS));
}

// Before the first of some products, after the last of them, and until all but LEFT of such groups are done.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices, transposed, to the rows whose addresses lanes 8 i to 8 i + 7 give for matrix i.
__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
#endif

// ---- built on these

// All lanes of a warp are done with something.
__device__ __forceinline__ void arrive_as_warp(Barrier& barrier) {
    __syncwarp();
    if (lane_id() == 0) barrier.arrive();
}

// A tile's barriers: filled by a copy, emptied by every warp that multiplies.
struct Slot {
    Barrier full, empty;

    __device__ __forceinline__ void init(int groups) { full.init(1), empty.init(4 * groups); }
    // For the one that copies: waits for the slot and announces the copy.
    __device__ __forceinline__ void take(int use, int bytes) {
        empty.wait(use - 1);
        full.expect(bytes);
    }
    __device__ __forceinline__ void release() { arrive_as_warp(empty); }
};

// Starts the copy of ROWS rows from `row` on of one head; `full` is told the bytes by load_bytes.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void load_tile(bf16* to, const TensorMap& map, int batch, int row, int head, Barrier& full) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c += PANEL)
#pragma unroll
        for (int r = 0; r < ROWS; r += BOX) load_box(to + c * ROWS + r * PANEL, map, batch, row + r, head, c, full);
}
template <int ROWS, int COLUMNS>
__device__ constexpr int load_bytes() { return ROWS * COLUMNS * (int)sizeof(bf16); }

// Of a tile of BOX rows to global memory.
template <int COLUMNS>
__device__ __forceinline__ void store_tile(const TensorMap& map, int batch, int row, int head, const bf16* from) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c += PANEL) store_box(map, batch, row, head, c, from + c * BOX);
    commit_stores();
}

// A tile as an operand: `k` runs along its rows, or along its columns in panels of `rows` rows.
__device__ __forceinline__ uint32_t operand(const bf16* tile, int rows = 0) {
    return (uint32_t)(rows * PANEL * 2 / 16) << 16 | (shared_address(tile) & 0x3ffff) / 16;
}

// d (+)= A Bᵀ, with A [64 x K] in panels of ROWS_A rows and B [N x K] in panels of ROWS_B rows.
template <int N, int K, int ROWS_A, int ROWS_B>
__device__ __forceinline__ void start_product(float (&d)[N / 2], uint32_t a, uint32_t b, bool add = false) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const int panel = k / PANEL, within = k % PANEL * 2 / 16;
        const int at_a = panel * (ROWS_A * PANEL * 2 / 16) + within, at_b = panel * (ROWS_B * PANEL * 2 / 16) + within;
        wgmma<N>(d, a + at_a, b + at_b, add || k > 0);
    }
    wgmma_commit();
}
// d (+)= A Bᵀ, with A [64 x K] in registers and B [N x K] in panels of ROWS_B rows.
template <int N, int K, int ROWS_B>
__device__ __forceinline__ void start_product(float (&d)[N / 2], const uint32_t (&a)[K / 16][4], uint32_t b, bool add) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const int at_b = k / PANEL * (ROWS_B * PANEL * 2 / 16) + k % PANEL * 2 / 16;
        wgmma<N, true>(d, a[k / 16], b + at_b, add || k > 0);
    }
    wgmma_commit();
}
// d (+)= A B, with A [64 x K] in registers and B [K x N] in panels.
template <int N, int K>
__device__ __forceinline__ void start_product(float (&d)[N / 2], const uint32_t (&a)[K / 16][4], uint32_t b,
                                              bool add = true) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K / 16; k++) wgmma<N, false>(d, a[k], b + k * (16 * PANEL * 2 / 16), add || k > 0);
    wgmma_commit();
}
// d (+)= A B, with A [64 x K] in panels of ROWS_A rows and B [K x N] in panels.
template <int N, int K, int ROWS_A>
__device__ __forceinline__ void start_product(float (&d)[N / 2], uint32_t a, uint32_t b, bool add) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const int at_a = k / PANEL * (ROWS_A * PANEL * 2 / 16) + k % PANEL * 2 / 16;
        wgmma<N, false>(d, a + at_a, b + k * PANEL * 2 / 16, add || k > 0);
    }
    wgmma_commit();
}
// Has values computed here: the compiler would put that off until they are needed, behind a wait.
template <int N>
__device__ __forceinline__ void compute_now(float (&d)[N]) {
#ifndef SB_EMULATE
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// Until all but LEFT of the products started are done; those of `d` are among them.
template <int LEFT, int N>
__device__ __forceinline__ void wait_product(float (&d)[N]) {
    wgmma_wait<LEFT>();
    compute_now(d);
}

// The left operand of the next product from what the last one left.
template <int N>
__device__ __forceinline__ void pack(uint32_t (&a)[N / 8][4], const float (&d)[N]) {
#pragma unroll
    for (int k = 0; k < N / 8; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[k][i] = pack_bf16(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
}

// Writes a warpgroup's rows as a tile of 64 rows; of each 16, the first eight times `low`, the others times `high`.
template <int N>
__device__ __forceinline__ void stage_tile(bf16* tile, const float (&d)[N], float low, float high) {
    const int g = lane_id() / 4, row = threadIdx.x % WARPGROUP / WARP * 16 + g;
#pragma unroll
    for (int j = 0; j < N / 4; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = (row + 8 * half) * PANEL + (j % 8 ^ g) * 8 + lane_id() % 4 * 2;
            const float scale = half ? high : low;
            *reinterpret_cast<uint32_t*>(tile + j / 8 * BOX * PANEL + at) =
                pack_bf16(d[4 * j + 2 * half] * scale, d[4 * j + 2 * half + 1] * scale);
        }
}

// Where a lane's row of the four 8 x 8 matrices begins that are 16 columns of a warpgroup's accumulators, transposed, in
// a panel: rows are the columns from 16 k on.
__device__ __forceinline__ int transposed(int k) {
    const int lane = lane_id(), warp = threadIdx.x % WARPGROUP / WARP;
    return (16 * k + lane / 16 * 8 + lane % 8) * PANEL + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 8;
}
// Writes a left operand transposed: a panel [16·K rows][64], whose columns are the rows of the product.
template <int K>
__device__ __forceinline__ void stage_operand(bf16* panel, const uint32_t (&a)[K][4]) {
#pragma unroll
    for (int k = 0; k < K; k++) stmatrix_x4_trans(panel + transposed(k), a[k]);
}
