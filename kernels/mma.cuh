// Matrix products of one warp on tensor cores, from tiles in shared memory, for three numeric routes.
//
//   Bf16  operands bf16                                       relative error of a product about 2e-3
//   Tf32  operands f32, rounded to tf32                       about 3e-4
//   F32   operands f32, each split into two tf32 numbers and   about 1e-6
//         multiplied three times
//
// All accumulate in f32. Layout of an accumulator tile of 16 x 8: acc_row, acc_col.
#pragma once
#include "common.cuh"

struct Bf16 { using elem = bf16; };
struct Tf32 { using elem = float; };
struct F32 { using elem = float; };

// Padding that keeps the rows of a tile out of each other's banks, in elements: the row stride of a tile with
// n elements a row (n a multiple of 16) is n + PAD_K where k runs along the row, n + PAD_MN where m or n does.
template <class R> struct Pad { static constexpr int K = 4, MN = 8; };
template <> struct Pad<Bf16> { static constexpr int K = 8, MN = 8; };

// Row and column, inside a warp's 16·MT x 8·NT block, of element i of acc[mt][nt].
__device__ __forceinline__ int acc_row(int mt, int i) { return 16 * mt + lane_id() / 4 + 8 * (i / 2); }
__device__ __forceinline__ int acc_col(int nt, int i) { return 8 * nt + 2 * (lane_id() % 4) + i % 2; }

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef SB_EMULATE
    emu::mma_m16n8k16_bf16(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef SB_EMULATE
    emu::mma_m16n8k8_tf32(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
#ifdef SB_EMULATE
    emu::ldmatrix_x4(r, p);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(p)) : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
#ifdef SB_EMULATE
    emu::ldmatrix_x4_trans(r, p);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(p)) : "memory");
#endif
}

// The nearest tf32 number, as bits.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef SB_EMULATE
    return (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
#else
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
#endif
}

// c += a b for one 16 x 8 x 8 product of f32 operands on route R (Tf32 or F32).
template <class R>
__device__ __forceinline__ void mma_float(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t ah[4], bh[2];
#pragma unroll
    for (int i = 0; i < 4; i++) ah[i] = to_tf32(a[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) bh[i] = to_tf32(b[i]);
    if constexpr (__is_same(R, F32)) {
        uint32_t al[4], bl[2];
#pragma unroll
        for (int i = 0; i < 4; i++) al[i] = to_tf32(a[i] - __uint_as_float(ah[i]));
#pragma unroll
        for (int i = 0; i < 2; i++) bl[i] = to_tf32(b[i] - __uint_as_float(bh[i]));
        // Tensor cores round sums towards zero, which shows after thousands of steps: c is added to outside of them.
        float sum[4] = {};
        mma_tf32(sum, al, bh);
        mma_tf32(sum, ah, bl);
        mma_tf32(sum, ah, bh);
#pragma unroll
        for (int i = 0; i < 4; i++) c[i] += sum[i];
    } else {
        mma_tf32(c, ah, bh);
    }
}

// How an operand lies in shared memory: AlongK, element (mn, k) at p[mn·ld + k]; AlongMN, at p[k·ld + mn].
enum Lies { AlongK, AlongMN };

// acc += A B with A [16·MT x k], B [k x 8·NT], one warp; k a multiple of 16. Rows of bf16 tiles are aligned to 16
// bytes (ld a multiple of 8).
template <class R, Lies LA, Lies LB, int MT, int NT>
__device__ __forceinline__ void warp_gemm(float (&acc)[MT][NT][4], const typename R::elem* a, int lda,
                                          const typename R::elem* b, int ldb, int k) {
    const int lane = lane_id();
    if constexpr (__is_same(R, Bf16)) {
        const int l8 = lane % 8, up = lane / 8 % 2 * 8, half = lane / 16 * 8;
        for (int k0 = 0; k0 < k; k0 += 16) {
            uint32_t fa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                if constexpr (LA == AlongK) ldmatrix_x4(fa[i], a + (16 * i + l8 + up) * lda + k0 + half);
                else ldmatrix_x4_trans(fa[i], a + (k0 + l8 + half) * lda + 16 * i + up);
            }
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                // An odd last tile is loaded twice: its second half is thrown away.
                const bool pair = j + 1 < NT;
                const int far = pair ? half : 0;
                uint32_t fb[4];
                if constexpr (LB == AlongK) ldmatrix_x4(fb, b + (8 * j + l8 + far) * ldb + k0 + up);
                else ldmatrix_x4_trans(fb, b + (k0 + l8 + up) * ldb + 8 * j + far);
                const uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_bf16(acc[i][j], fa[i], b0);
                    if (pair) mma_bf16(acc[i][j + 1 < NT ? j + 1 : j], fa[i], b1);
                }
            }
        }
    } else {
        const int g = lane / 4, t = lane % 4;
        for (int k0 = 0; k0 < k; k0 += 8) {
            float fa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int m = 16 * i + g + 8 * (e % 2), kk = k0 + t + 4 * (e / 2);
                    fa[i][e] = LA == AlongK ? a[m * lda + kk] : a[kk * lda + m];
                }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                float fb[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int n = 8 * j + g, kk = k0 + t + 4 * e;
                    fb[e] = LB == AlongK ? b[n * ldb + kk] : b[kk * ldb + n];
                }
#pragma unroll
                for (int i = 0; i < MT; i++) mma_float<R>(acc[i][j], fa[i], fb);
            }
        }
    }
}

// acc += A B where A [16·MT x 8·KT] is what another product left in accumulators (KT even): softmax weights times
// values without a way through shared memory.
template <class R, Lies LB, int MT, int KT, int NT>
__device__ __forceinline__ void warp_gemm_acc(float (&acc)[MT][NT][4], const float (&a)[MT][KT][4],
                                              const typename R::elem* b, int ldb) {
    const int lane = lane_id();
    if constexpr (__is_same(R, Bf16)) {
        const int l8 = lane % 8, up = lane / 8 % 2 * 8, half = lane / 16 * 8;
#pragma unroll
        for (int kt = 0; kt < KT; kt += 2) {
            uint32_t fa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                fa[i][0] = pack_bf16(a[i][kt][0], a[i][kt][1]);
                fa[i][1] = pack_bf16(a[i][kt][2], a[i][kt][3]);
                fa[i][2] = pack_bf16(a[i][kt + 1][0], a[i][kt + 1][1]);
                fa[i][3] = pack_bf16(a[i][kt + 1][2], a[i][kt + 1][3]);
            }
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                const bool pair = j + 1 < NT;
                const int far = pair ? half : 0;
                uint32_t fb[4];
                if constexpr (LB == AlongK) ldmatrix_x4(fb, b + (8 * j + l8 + far) * ldb + 8 * kt + up);
                else ldmatrix_x4_trans(fb, b + (8 * kt + l8 + up) * ldb + 8 * j + far);
                const uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_bf16(acc[i][j], fa[i], b0);
                    if (pair) mma_bf16(acc[i][j + 1 < NT ? j + 1 : j], fa[i], b1);
                }
            }
        }
    } else {
        const int g = lane / 4, t = lane % 4;
        // An accumulator holds columns 2t and 2t+1, an operand k = t and t+4: k is renumbered on both sides.
#pragma unroll
        for (int kt = 0; kt < KT; kt++) {
#pragma unroll
            for (int j = 0; j < NT; j++) {
                float fb[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int n = 8 * j + g, kk = 8 * kt + 2 * t + e;
                    fb[e] = LB == AlongK ? b[n * ldb + kk] : b[kk * ldb + n];
                }
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    const float fa[4] = {a[i][kt][0], a[i][kt][2], a[i][kt][1], a[i][kt][3]};
                    mma_float<R>(acc[i][j], fa, fb);
                }
            }
        }
    }
}

template <int MT, int NT>
__device__ __forceinline__ void zero(float (&acc)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;
}
