// What the chunked recurrences (ssd.cu, gla.cu) share: operands of matrix products as fragments in registers, which
// can be scaled there or taken from accumulators, and tiles of shared memory that are filled in the background.
//
// A fragment is one warp's operand for a product over 16 values of k. With g = lane / 4 and t = lane % 4, on every
// route alike:
//
//   A, 16 x 16   element e of 8: row g + 8 (e / 2 % 2), k = 2 t + e % 2 + 8 (e / 4)
//   B, 16 x 8    element e of 4: k = 2 t + e % 2 + 8 (e / 2), column g
//
// An accumulator pair of 16 x 16 (two tiles of 16 x 8) has A's layout; its transpose has B's, twice.
#pragma once
#include "mma.cuh"

// Padding of rows in shared memory, in elements: keeps ldmatrix free of bank conflicts for rows of n + PAD elements,
// n a multiple of 16.
constexpr int PAD = 8;

// Tokens of a chunk.
template <class R> constexpr int CHUNK = 32;
template <> constexpr int CHUNK<Bf16> = 64;

template <class R> struct FragA { float x[8]; };
template <class R> struct FragB { float x[4]; };
template <> struct FragA<Bf16> { uint32_t x[4]; };
template <> struct FragB<Bf16> { uint32_t x[2]; };

template <class R>
__device__ __forceinline__ void mma(float (&c)[4], const FragA<R>& a, const FragB<R>& b) {
    if constexpr (__is_same(R, Bf16)) {
        mma_bf16(c, a.x, b.x);
    } else {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float fa[4] = {a.x[4 * h], a.x[4 * h + 2], a.x[4 * h + 1], a.x[4 * h + 3]};
            const float fb[2] = {b.x[2 * h], b.x[2 * h + 1]};
            mma_float<R>(c, fa, fb);
        }
    }
}

template <class R, Lies L>
__device__ __forceinline__ FragA<R> load_a(const typename R::elem* p, int ld) {
    FragA<R> f;
    const int lane = lane_id();
    if constexpr (__is_same(R, Bf16)) {
        const int l8 = lane % 8, up = lane / 8 % 2 * 8, half = lane / 16 * 8;
        if constexpr (L == AlongK) ldmatrix_x4(f.x, p + (l8 + up) * ld + half);
        else ldmatrix_x4_trans(f.x, p + (l8 + half) * ld + up);
    } else {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int m = g + 8 * (e / 2 % 2), k = 2 * t + e % 2 + 8 * (e / 4);
            f.x[e] = L == AlongK ? p[m * ld + k] : p[k * ld + m];
        }
    }
    return f;
}

// Two fragments: 16 values of k, 16 columns.
template <class R, Lies L>
__device__ __forceinline__ void load_b(FragB<R> (&f)[2], const typename R::elem* p, int ld) {
    const int lane = lane_id();
    if constexpr (__is_same(R, Bf16)) {
        const int l8 = lane % 8, up = lane / 8 % 2 * 8, half = lane / 16 * 8;
        uint32_t r[4];
        if constexpr (L == AlongK) ldmatrix_x4(r, p + (l8 + half) * ld + up);
        else ldmatrix_x4_trans(r, p + (l8 + up) * ld + half);
        f[0].x[0] = r[0], f[0].x[1] = r[1], f[1].x[0] = r[2], f[1].x[1] = r[3];
    } else {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int n = 8 * j + g, k = 2 * t + e % 2 + 8 * (e / 2);
                f[j].x[e] = L == AlongK ? p[n * ld + k] : p[k * ld + n];
            }
    }
}

// Element pairs 2i, 2i+1 of a fragment times (x, y).
__device__ __forceinline__ void scale_pair(FragA<Bf16>& f, int i, float x, float y) {
    __nv_bfloat162 v;
    memcpy(&v, &f.x[i], 4);
    f.x[i] = pack_bf16(to_f(v.x) * x, to_f(v.y) * y);
}
template <class R>
__device__ __forceinline__ void scale_pair(FragA<R>& f, int i, float x, float y) {
    f.x[2 * i] *= x;
    f.x[2 * i + 1] *= y;
}
// Column k times w[k]; w aligned to 8 bytes.
template <class R>
__device__ __forceinline__ void scale_k(FragA<R>& f, const float* w) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float s[2];
        load_vec<2>(w + 2 * t + 8 * h, s);
        scale_pair(f, 2 * h, s[0], s[1]);
        scale_pair(f, 2 * h + 1, s[0], s[1]);
    }
}
// Row m times w[m].
template <class R>
__device__ __forceinline__ void scale_m(FragA<R>& f, const float* w) {
    const int g = lane_id() / 4;
    const float low = w[g], high = w[g + 8];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        scale_pair(f, 2 * h, low, low);
        scale_pair(f, 2 * h + 1, high, high);
    }
}

// The accumulators of a block [16 x 16] as the transposed operand B: k along its columns; rows 0-7, rows 8-15.
template <class R>
__device__ __forceinline__ void acc_as_b(FragB<R> (&f)[2], const float (&a)[4], const float (&b)[4]) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if constexpr (__is_same(R, Bf16)) {
            f[j].x[0] = pack_bf16(a[2 * j], a[2 * j + 1]);
            f[j].x[1] = pack_bf16(b[2 * j], b[2 * j + 1]);
        } else {
            f[j].x[0] = a[2 * j], f[j].x[1] = a[2 * j + 1], f[j].x[2] = b[2 * j], f[j].x[3] = b[2 * j + 1];
        }
    }
}

// Two neighbours of a row; the first has an even index.
__device__ __forceinline__ float2 load2(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float2 load2(const bf16* p) {
    const __nv_bfloat162 v = *reinterpret_cast<const __nv_bfloat162*>(p);
    return make_float2(to_f(v.x), to_f(v.y));
}
__device__ __forceinline__ void store2(float* p, float x, float y) { *reinterpret_cast<float2*>(p) = make_float2(x, y); }
__device__ __forceinline__ void store2(bf16* p, float x, float y) {
    *reinterpret_cast<uint32_t*>(p) = pack_bf16(x, y);
}

// Sum over the lanes of a row of an accumulator tile, and over those of a column.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}
__device__ __forceinline__ float col_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 4);
    x += __shfl_xor_sync(FULL, x, 8);
    return x + __shfl_xor_sync(FULL, x, 16);
}

// Log decays below this count as this: what is left, 1e-14, is nothing, and sums of several keep their digits.
constexpr float NEVER = -32.f;

// 2^x of what is at most 0 but for rounding. Logarithms of decays are to base 2 throughout.
__device__ __forceinline__ float exp2_neg(float x) { return exp2_fast(fminf(x, 0.f)); }

// Whether rows of `cols` elements at p, ld apart, can be written four (bf16) or two (f32) elements at a time.
template <class E>
__device__ __forceinline__ bool can_pair(const E* p, long long ld, int cols) {
    return reinterpret_cast<size_t>(p) % 8 == 0 && ld % 4 == 0 && cols % 4 == 0;
}

// Writes an accumulator block of 16 x 16 to memory, as far as `rows` x `cols` go. Whole sectors of 32 bytes: in bf16
// neighbouring lanes first trade halves, so that each has four elements of one row.
template <class E>
__device__ __forceinline__ void store_block(E* p, long long ld, int rows, int cols, const float (&a)[4],
                                            const float (&b)[4], bool pair) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    uint2 four[2];
    int at = 0;
    if constexpr (sizeof(E) == 2) {
        const bool odd = t & 1;
        at = odd ? 2 * t + 6 : 2 * t;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t lo = pack_bf16(a[2 * h], a[2 * h + 1]), hi = pack_bf16(b[2 * h], b[2 * h + 1]);
            const uint32_t got = __shfl_xor_sync(FULL, odd ? lo : hi, 1);
            four[h] = odd ? make_uint2(got, hi) : make_uint2(lo, got);
        }
    }
    p += g * ld;
    if (pair) {
#pragma unroll
        for (int h = 0; h < 2; h++, p += 8 * ld) {
            if (g + 8 * h >= rows) continue;
            if constexpr (sizeof(E) == 2) {
                if (at < cols) *reinterpret_cast<uint2*>(p + at) = four[h];
            } else {
                if (2 * t < cols) store2(p + 2 * t, a[2 * h], a[2 * h + 1]);
                if (2 * t + 8 < cols) store2(p + 2 * t + 8, b[2 * h], b[2 * h + 1]);
            }
        }
    } else {
#pragma unroll
        for (int h = 0; h < 2; h++, p += 8 * ld) {
            if (g + 8 * h >= rows) continue;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (2 * t + e < cols) p[2 * t + e] = from_f<E>(a[2 * h + e]);
                if (2 * t + 8 + e < cols) p[2 * t + 8 + e] = from_f<E>(b[2 * h + e]);
            }
        }
    }
}

// Rows [16 x 8 NT] of a state, the accumulators of one warp, from memory [rows x n] with row stride n; zeros outside or
// for none.
template <int NT>
__device__ __forceinline__ void load_rows(float (&s)[NT][4], const float* p, int rows, int n) {
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int r = acc_row(0, e), c = acc_col(j, e);
            s[j][e] = p && r < rows && c < n ? p[r * n + c] : 0.f;
        }
}
template <int NT, class E>
__device__ __forceinline__ void store_rows(const float (&s)[NT][4], E* p, int rows, int n) {
    const bool pair = can_pair(p, n, n);
#pragma unroll
    for (int j = 0; j < NT; j += 2)
        if (8 * j < n) store_block(p + 8 * j, n, rows, n - 8 * j, s[j], s[j + 1], pair);
}

// As load_tile, in the background: the tile is there after cp_async_commit, cp_async_wait and a barrier.
template <class E>
__device__ __forceinline__ void fetch_tile(E* s, int lds, const E* g, long long ldg, int rows, int cols, int rows_pad,
                                           int cols_pad) {
    constexpr int V = 16 / sizeof(E);
    const bool vector = cols % V == 0 && ldg % V == 0 && reinterpret_cast<size_t>(g) % 16 == 0;
    unsigned thread = threadIdx.x;
#ifndef SB_EMULATE
    // Places are worked out anew at each call: kept from one tile to the next they would cost registers.
    asm volatile("" : "+r"(thread));
#endif
    // Row and column go on without divisions.
    const auto go = [&](int per_row, auto copy) {
        const int down = blockDim.x / per_row, right = blockDim.x % per_row;
        int r = thread / (unsigned)per_row, c = thread % (unsigned)per_row;
        while (r < rows_pad) {
            copy(r, c);
            c += right, r += down;
            if (c >= per_row) c -= per_row, r++;
        }
    };
    if (vector && blockDim.x % (unsigned)(cols_pad / V) == 0) {
        const unsigned per_row = cols_pad / V;
        const int down = blockDim.x / per_row, c = thread % per_row * V, here = c < cols ? rows : 0;
        int r = thread / per_row;
        const E* from = g + r * ldg + c;
        E* to = s + r * lds + c;
#pragma unroll 1
        for (; r < rows_pad; r += down, from += down * ldg, to += down * lds)
            cp_async16(to, r < here ? from : g, r < here ? 16 : 0);
    } else if (vector) {
        go(cols_pad / V, [&](int r, int c) {
            const bool inside = r < rows && c * V < cols;
            cp_async16(s + r * lds + c * V, inside ? g + r * ldg + c * V : g, inside ? 16 : 0);
        });
    } else {
        go(cols_pad, [&](int r, int c) { s[r * lds + c] = r < rows && c < cols ? g[r * ldg + c] : from_f<E>(0.f); });
    }
}
