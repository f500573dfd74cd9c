// The delta rule, gated delta rule and gated delta product, in chunks of up to 64 sub-steps (WY form).
//
//   q [B, T, H, K], k [B, T·n, H, K], v [B, T·n, H, V]    activations (f32 or bf16)
//   beta [B, T·n, H], g [B, T, H], states [B, H, K, V]     f32
//   o [B, T, H, V]                                         activations
//
//   S ← exp(g) S once per token, then n times S ← S + kᵀ β (v − k S), o = s·q S after the last.
//
// Yang et al. 2024 (arXiv:2406.06484), Yang et al. 2025 (arXiv:2412.06464), Siems et al. 2025 (arXiv:2502.10297).
// A chunk is as many whole tokens as fit into 64 sub-steps. With b the inclusive sum of log decays inside the
// chunk (g counts at a token's first sub-step), S0 and S1 the states before and after it:
//
//   G_ij = e^(b_i − b_j)     L = strictly lower part of diag(β) (K Kᵀ ∘ G)     M = (I + L)⁻¹
//   Vh = M diag(β) (V − diag(e^b) K S0)                                     what every sub-step writes
//   O  = s (diag(e^b) Q S0 + P Vh),  P = lower part of Q Kᵀ ∘ G             rows of Q are tokens
//   S1 = e^(b_C) S0 + (diag(e^(b_C − b)) K)ᵀ Vh
//
// Gradients, from dO and dS1, last chunk first:
//
//   dVh = s Pᵀ dO + diag(e^(b_C − b)) K dS1     Z = Mᵀ dVh     dV = β Z
//   dS0 = e^(b_C) dS1 + s Qᵀ diag(e^b) dO − Kᵀ diag(β e^b) Z
//   dP = s lower(dO Vhᵀ)     dL = −strictly lower(Z Vhᵀ)
//   dQ = s diag(e^b) dO S0ᵀ + (dP ∘ G) K
//   dK = (dP ∘ G)ᵀ Q + e^(b_C − b) Vh dS1ᵀ − β e^b Z S0ᵀ + β (dL ∘ G) K + (dL ∘ G)ᵀ (β K)
//   dβ = rows of Z ∘ V − e^b K ∘ Z S0ᵀ + dL ∘ K Kᵀ ∘ G
//   db = rows(dP ∘ P + s e^b Q ∘ dO S0ᵀ) at a token's last sub-step, − columns(dP ∘ P)
//        + rows(dL ∘ L − β e^b K ∘ Z S0ᵀ) − columns(dL ∘ L) − t,   t = e^(b_C − b) rows(K ∘ Vh dS1ᵀ)
//   db_C += sum of t + e^(b_C) ⟨S0, dS1⟩;  dg = sum of db from the token's first sub-step on
//
// dM never appears: Mᵀ (dVh Rᵀ) Mᵀ = Z Vhᵀ with R = β (V − e^b K S0).
//
// Kernels, with the blocks of each:
//   delta_prepare    B·H · chunks         M and the per-chunk rows b, β
//   delta_forward    B·H · slices of V    walks over the chunks with S in registers
//   delta_reverse    B·H · slices of V    walks back with dS in registers; leaves Z in dv and dS1 in a workspace
//   delta_gradients  B·H · chunks         everything else
// Between them: m [B·H, chunks, 64, 64], vh [B·H, chunks, 64, V], s and ds [B·H, chunks, K, V] in the operands'
// type, rows [B·H, chunks, 2, 64] f32 (b, β). For GPUs of compute capability 9.0 there is delta_sm90a.cu.
//
// Keys of a chunk can be nearly the same (gaps in the input), which makes I + L badly conditioned: the inverse
// is by forward substitution in f32, block by block, and is rounded once.
#include "delta.cuh"

constexpr int VS = 64; // value columns of a group of four warps

// Row strides of tiles in shared memory.
template <class R> constexpr int PAD = __is_same(R, Bf16) ? 8 : 4;
template <class R, int KM> constexpr int LK = KM + PAD<R>;    // keys and queries
template <class R> constexpr int LM = C + PAD<R>;             // M, P and the like
template <class R, int WV> constexpr int LV = VS * WV + 8;    // values and states

// Starts filling a tile, `rows_pad` x `cols_pad` with row stride `lds`, with `rows` x `cols` elements; zeros outside.
template <class T>
__device__ __forceinline__ void fetch(T* s, int lds, const T* g, long long ldg, int rows, int cols, int rows_pad,
                                      int cols_pad) {
    constexpr int N = 16 / sizeof(T);
    if (cols % N == 0 && ldg % N == 0 && (reinterpret_cast<size_t>(g) & 15) == 0) {
        const int per = cols_pad / N;
        for (int i = threadIdx.x; i < rows_pad * per; i += blockDim.x) {
            const int r = i / per, c = i % per * N;
            const bool in = r < rows && c < cols;
            cp_async16(s + r * lds + c, in ? g + r * ldg + c : g, in ? 16 : 0);
        }
    } else {
        // Four loads under way at a time.
        for (int i0 = threadIdx.x; i0 < rows_pad * cols_pad; i0 += 4 * blockDim.x) {
            T x[4];
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int i = i0 + u * blockDim.x, r = i / cols_pad, c = i % cols_pad;
                x[u] = r < rows && c < cols ? g[r * ldg + c] : from_f<T>(0.f);
            }
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int i = i0 + u * blockDim.x;
                if (i < rows_pad * cols_pad) s[i / cols_pad * lds + i % cols_pad] = x[u];
            }
        }
    }
}
template <int COLS, class T>
__device__ __forceinline__ void fetch(T* s, int lds, const T* g, long long ldg, int rows, int cols, int rows_pad) {
    fetch(s, lds, g, ldg, rows, cols, rows_pad, COLS);
}

// The same for b and β of a chunk.
__device__ __forceinline__ void fetch_rows(float* s, const float* rows, long long chunk) {
    const int i = 4 * threadIdx.x;
    if (i < 2 * C) cp_async16(s + i, rows + chunk * 2 * C + i);
}

// Writes `rows` x `cols` elements of a tile to global memory.
template <int COLS, class T>
__device__ __forceinline__ void put(T* g, long long ldg, const T* s, int lds, int rows, int cols) {
    constexpr int N = 16 / sizeof(T), PER = COLS / N;
    if (cols % N == 0 && ldg % N == 0 && (reinterpret_cast<size_t>(g) & 15) == 0) {
        for (int i = threadIdx.x; i < rows * PER; i += blockDim.x) {
            const int r = i / PER, c = i % PER * N;
            if (c < cols) *reinterpret_cast<uint4*>(g + r * ldg + c) = *reinterpret_cast<const uint4*>(s + r * lds + c);
        }
    } else {
        for (int i = threadIdx.x; i < rows * COLS; i += blockDim.x) {
            const int r = i / COLS, c = i % COLS;
            if (c < cols) g[r * ldg + c] = s[r * lds + c];
        }
    }
}

// Two neighbouring elements of a row of `cols` elements in an array with row stride `ld`.
template <class T>
__device__ __forceinline__ void put_pair(T* row, int c, int cols, int ld, float x, float y) {
    if (c + 1 < cols && ld % 2 == 0) store_vec<2>(row + c, {x, y});
    else {
        if (c < cols) row[c] = from_f<T>(x);
        if (c + 1 < cols) row[c + 1] = from_f<T>(y);
    }
}
template <class T>
__device__ __forceinline__ void get_pair(const T* row, int c, int cols, int ld, float (&x)[2]) {
    if (c + 1 < cols && ld % 2 == 0) load_vec<2>(row + c, x);
    else {
        x[0] = c < cols ? to_f(row[c]) : 0.f;
        x[1] = c + 1 < cols ? to_f(row[c + 1]) : 0.f;
    }
}

// Writes row `e / 2` of two neighbouring 16 x 8 accumulator tiles, whose columns begin at `col`, times `scale`:
// neighbouring lanes swap pairs, so that each stores four elements side by side. The whole warp takes part.
template <class T>
__device__ __forceinline__ void put_tiles(T* row, bool in, int col, int cols, int ld, const float (&a)[4],
                                          const float (&b)[4], int e, float scale) {
    const bool odd = lane_id() % 2;
    const float x = __shfl_xor_sync(FULL, odd ? a[e] : b[e], 1);
    const float y = __shfl_xor_sync(FULL, odd ? a[e + 1] : b[e + 1], 1);
    const int c = col + lane_id() % 4 / 2 * 4 + (odd ? 8 : 0);
    const float v[4] = {scale * (odd ? x : a[e]), scale * (odd ? y : a[e + 1]), scale * (odd ? b[e] : x),
                        scale * (odd ? b[e + 1] : y)};
    if (!in) return;
    if (ld % 4 == 0) {
        if (c < cols) store_vec<4>(row + c, v);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (c + i < cols) row[c + i] = from_f<T>(v[i]);
    }
}

__device__ __forceinline__ uint32_t scale_pair(uint32_t bits, float x, float y) {
    return pack_bf16(__uint_as_float(bits << 16) * x, __uint_as_float(bits & 0xffff0000u) * y);
}

// acc += Aᵀ diag(w) B, with A [k x 16·MT] and B [k x 8·NT] row by row in shared memory.
template <class R, int MT, int NT>
__device__ __forceinline__ void gemm_weighted(float (&acc)[MT][NT][4], const typename R::elem* a, int lda,
                                              const float* w, const typename R::elem* b, int ldb, int k) {
    const int lane = lane_id();
    if constexpr (__is_same(R, Bf16)) {
        const int l8 = lane % 8, up = lane / 8 % 2 * 8, half = lane / 16 * 8;
#pragma unroll
        for (int k0 = 0; k0 < k; k0 += 16) {
            float lo[2], hi[2];
            load_vec<2>(w + k0 + 2 * (lane % 4), lo);
            load_vec<2>(w + k0 + 8 + 2 * (lane % 4), hi);
            uint32_t fa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                ldmatrix_x4_trans(fa[i], a + (k0 + l8 + half) * lda + 16 * i + up);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    fa[i][e] = scale_pair(fa[i][e], lo[0], lo[1]);
                    fa[i][e + 2] = scale_pair(fa[i][e + 2], hi[0], hi[1]);
                }
            }
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                uint32_t fb[4];
                ldmatrix_x4_trans(fb, b + (k0 + l8 + up) * ldb + 8 * j + half);
                const uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_bf16(acc[i][j], fa[i], b0);
                    mma_bf16(acc[i][j + 1], fa[i], b1);
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
                    const int kk = k0 + t + 4 * (e / 2);
                    fa[i][e] = a[kk * lda + 16 * i + g + 8 * (e % 2)] * w[kk];
                }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float fb[2] = {b[(k0 + t) * ldb + 8 * j + g], b[(k0 + t + 4) * ldb + 8 * j + g]};
#pragma unroll
                for (int i = 0; i < MT; i++) mma_float<R>(acc[i][j], fa[i], fb);
            }
        }
    }
}

// Accumulators kept as the operand of a later product, in the operands' type.
template <class R, int KT> struct Kept {
    float x[1][KT][4];
};
template <int KT> struct Kept<Bf16, KT> {
    uint32_t x[KT / 2][4];
};
template <class R, int KT>
__device__ __forceinline__ void keep(Kept<R, KT>& to, const float (&acc)[1][KT][4]) {
#pragma unroll
    for (int kt = 0; kt < KT; kt++)
        if constexpr (__is_same(R, Bf16)) {
            to.x[kt / 2][kt % 2 * 2] = pack_bf16(acc[0][kt][0], acc[0][kt][1]);
            to.x[kt / 2][kt % 2 * 2 + 1] = pack_bf16(acc[0][kt][2], acc[0][kt][3]);
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++) to.x[0][kt][e] = acc[0][kt][e];
        }
}
// acc += kept B, with B [8·KT x 8·NT] row by row in shared memory.
template <class R, int KT, int NT>
__device__ __forceinline__ void gemm_kept(float (&acc)[1][NT][4], const Kept<R, KT>& a, const typename R::elem* b,
                                          int ldb) {
    if constexpr (__is_same(R, Bf16)) {
        const int lane = lane_id();
#pragma unroll
        for (int kt = 0; kt < KT / 2; kt++)
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                uint32_t fb[4];
                ldmatrix_x4_trans(fb, b + (16 * kt + lane % 16) * ldb + 8 * j + lane / 16 * 8);
                const uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
                mma_bf16(acc[0][j], a.x[kt], b0);
                mma_bf16(acc[0][j + 1], a.x[kt], b1);
            }
    } else warp_gemm_acc<R, AlongMN, 1, KT, NT>(acc, a.x, b, ldb);
}

// ---- M and the rows b, β

template <class R>
__device__ void prepare(const typename R::elem* k, const float* beta, const float* g, typename R::elem* m, float* rows,
                        int steps, int heads, int keys, int n) {
    using T = typename R::elem;
    DYNAMIC_SHARED(raw);
    float* sb = reinterpret_cast<float*>(raw); // b, β
    float* sl = sb + 2 * C;                    // L
    float* sm = sl + C * LF;                   // M
    T* sk = reinterpret_cast<T*>(sm + C * LF);
    const int kp = ceil_div(keys, 16) * 16, lk = kp + PAD<R>;
    const int chunks = ceil_div(steps, C / n), c = blockIdx.x % chunks;
    const int batch = blockIdx.x / chunks / heads, head = blockIdx.x / chunks % heads;
    const Chunk at = chunk_at(c, batch, steps, n);
    const int warp = warp_id();

    fetch(sk, lk, k + (at.row * heads + head) * keys, (long long)heads * keys, at.rows, keys, C, kp);
    cp_async_commit();
    sum_decays(sb, beta, g, at, heads, head, n);
    cp_async_wait<0>();
    __syncthreads();
    const long long index = blockIdx.x;
    if (threadIdx.x < 2 * C) rows[index * 2 * C + threadIdx.x] = sb[threadIdx.x];

    {
        float acc[1][8][4];
        zero(acc);
        warp_gemm<R, AlongK, AlongK, 1, 8>(acc, sk + 16 * warp * lk, lk, sk, lk, kp);
#pragma unroll
        for (int nt = 0; nt < 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = 16 * warp + acc_row(0, e), j = acc_col(nt, e);
                sl[i * LF + j] = j < i ? sb[C + i] * acc[0][nt][e] * decay(sb[i] - sb[j]) : 0.f;
            }
    }
    invert(sl, sm);
    put_m(m + index * C * C, sm);
}

// ---- forward

// One block: `WV` groups of four warps; warp r of a group has the sub-steps (tokens, keys) of the r-th quarter and
// the group's 64 value columns.
template <class R, int KM, int WV>
__device__ void forward(const typename R::elem* q, const typename R::elem* k, const typename R::elem* v,
                        const typename R::elem* m, const float* rows, const float* state, typename R::elem* o,
                        float* last, typename R::elem* s_kept, typename R::elem* vh_kept, float scale, int steps,
                        int heads, int keys, int values, int n) {
    using T = typename R::elem;
    constexpr int lk = LK<R, KM>, lm = LM<R>, lv = LV<R, WV>, MT = KM / 64;
    DYNAMIC_SHARED(raw);
    float* sb = reinterpret_cast<float*>(raw); // b and β, twice
    float* st = sb + 4 * C;                    // e^(b_C − b)
    T* sk = reinterpret_cast<T*>(st + C);      // twice
    T* sq = sk + 2 * C * lk;
    T* sm = sq + C * lk;
    T* sv = sm + C * lm;
    T* sh = sv + C * lv;
    T* ss = sh + C * lv;

    const int per = C / n, chunks = ceil_div(steps, per), slices = ceil_div(values, VS * WV);
    const int group = blockIdx.x / slices, batch = group / heads, head = group % heads;
    const int v0 = blockIdx.x % slices * VS * WV;
    const int cols = min(VS * WV, values - v0);
    const int warp = warp_id() % 4, col0 = warp_id() / 4 * VS, low = 16 * warp + lane_id() / 4;
    const int token_pad = ceil_div(per, 16) * 16;
    const bool few = per <= 16;
    const long long first = (long long)group * chunks;
    const long long ldk = (long long)heads * keys, ldv = (long long)heads * values;

    auto fetch_k = [&](int c) {
        const Chunk at = chunk_at(c, batch, steps, n);
        fetch<KM>(sk + c % 2 * C * lk, lk, k + at.row * ldk + head * keys, ldk, at.rows, keys, C);
        fetch_rows(sb + c % 2 * 2 * C, rows, first + c);
    };
    auto fetch_q = [&](int c) {
        const Chunk at = chunk_at(c, batch, steps, n);
        fetch<KM>(sq, lk, q + at.token * ldk + head * keys, ldk, at.tokens, keys, token_pad);
    };
    auto fetch_v = [&](int c) {
        const Chunk at = chunk_at(c, batch, steps, n);
        fetch<VS * WV>(sv, lv, v + at.row * ldv + (long long)head * values + v0, ldv, at.rows, cols, C);
        fetch<C>(sm, lm, m + (first + c) * C * C, C, C, C, C);
    };
    fetch_k(0);
    fetch_q(0);
    fetch_v(0);
    cp_async_commit();

    float s[MT][8][4];
    zero(s);
    if (state) {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    const int r = 16 * MT * warp + acc_row(i, e), c = col0 + acc_col(j, e);
                    float x[2] = {0.f, 0.f};
                    if (r < keys) get_pair(state + ((long long)group * keys + r) * values + v0, c, cols, values, x);
                    s[i][j][e] = x[0];
                    s[i][j][e + 1] = x[1];
                }
    }
    to_tile<T, MT, 8>(ss, lv, s, 16 * MT * warp, col0);

    for (int c = 0; c < chunks; c++) {
        const Chunk at = chunk_at(c, batch, steps, n);
        const T* kc = sk + c % 2 * C * lk;
        const float *b = sb + c % 2 * 2 * C, *beta = b + C;
        cp_async_wait<0>();
        __syncthreads();
        if (c + 1 < chunks) fetch_k(c + 1);
        cp_async_commit();
        if (s_kept) put<VS * WV>(s_kept + (first + c) * keys * values + v0, values, ss, lv, keys, cols);
        if (threadIdx.x < C) st[threadIdx.x] = decay(b[C - 1] - b[threadIdx.x]);

        // R = β (V − e^b K S0), in V's place.
        {
            float acc[1][8][4];
            zero(acc);
            warp_gemm<R, AlongK, AlongMN, 1, 8>(acc, kc + 16 * warp * lk, lk, ss + col0, lv, KM);
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int r = low + 4 * e;
                const float x = decay(b[r]), y = beta[r];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    T* to = sv + r * lv + col0 + acc_col(j, e);
                    float was[2];
                    load_vec<2>(to, was);
                    store_vec<2>(to, {y * (was[0] - x * acc[0][j][e]), y * (was[1] - x * acc[0][j][e + 1])});
                }
            }
        }
        // P and what the outputs read from S0. At most 16 tokens: every warp has all of them and 16 columns.
        const bool reads = few || 16 * warp < at.tokens;
        const int row_q = few ? 0 : 16 * warp, end_q = (row_q + lane_id() / 4 + 1) * n;
        Kept<R, 8> kept;
        float out[1][8][4];
        float(&narrow)[1][2][4] = reinterpret_cast<float(&)[1][2][4]>(out[0][0]);
        zero(out);
        if (reads) {
            float p[1][8][4];
            zero(p);
            warp_gemm<R, AlongK, AlongK, 1, 8>(p, sq + row_q * lk, lk, kc, lk, KM);
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int end = end_q + 4 * e * n;
                const float bt = b[min(end, C) - 1];
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int d = 0; d < 2; d++) {
                        const int col = acc_col(j, e + d);
                        p[0][j][e + d] *= col < end ? decay(bt - b[col]) : 0.f;
                    }
            }
            keep(kept, p);
            if (few) warp_gemm<R, AlongK, AlongMN, 1, 2>(narrow, sq, lk, ss + col0 + 16 * warp, lv, KM);
            else warp_gemm<R, AlongK, AlongMN, 1, 8>(out, sq + row_q * lk, lk, ss + col0, lv, KM);
            scale_rows<8>(out, decay(b[min(end_q, C) - 1]), decay(b[min(end_q + 8 * n, C) - 1]));
        }
        __syncthreads();
        if (c + 1 < chunks) fetch_q(c + 1);
        cp_async_commit();

        {
            float acc[1][8][4];
            zero(acc);
            // bf16 goes over the zeros of M as well: an unrolled loop hides its loads.
            const int end = __is_same(R, Bf16) ? C : 16 * warp + 16;
            warp_gemm<R, AlongK, AlongMN, 1, 8>(acc, sm + 16 * warp * lm, lm, sv + col0, lv, end);
            to_tile<T, 1, 8>(sh, lv, acc, 16 * warp, col0);
        }
        __syncthreads();
        if (c + 1 < chunks) fetch_v(c + 1);
        cp_async_commit();
        if (vh_kept) put<VS * WV>(vh_kept + (first + c) * C * values + v0, values, sh, lv, C, cols);

        if (reads) {
            if (few) gemm_kept<R, 8, 2>(narrow, kept, sh + col0 + 16 * warp, lv);
            else gemm_kept<R, 8, 8>(out, kept, sh + col0, lv);
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int r = row_q + lane_id() / 4 + 4 * e;
                T* to = o + (at.token + r) * ldv + (long long)head * values + v0;
#pragma unroll
                for (int j = 0; j < 8; j += 2)
                    if (j == 0 || !few)
                        put_tiles(to, r < at.tokens, col0 + (few ? 16 * warp : 8 * j), cols, values, out[0][j],
                                  out[0][j + 1], e, scale);
            }
        }
        const float all = decay(b[C - 1]);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[i][j][e] *= all;
        gemm_weighted<R, MT, 8>(s, kc + 16 * MT * warp, lk, st, sh + col0, lv, C);
        to_tile<T, MT, 8>(ss, lv, s, 16 * MT * warp, col0);
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int r = 16 * MT * warp + acc_row(i, e), c = col0 + acc_col(j, e);
                if (r < keys)
                    put_pair(last + ((long long)group * keys + r) * values + v0, c, cols, values, s[i][j][e],
                             s[i][j][e + 1]);
            }
}

// ---- backward, along the sequence

// Threads as in `forward`. `ds` gets dS1 of every chunk, `dv` Z, `d_state` (may be null) the initial state's gradient.
template <class R, int KM, int WV>
__device__ void reverse(const typename R::elem* q, const typename R::elem* k, const typename R::elem* m,
                        const float* rows, const typename R::elem* d_o, const float* d_last, typename R::elem* dv,
                        typename R::elem* ds, float* d_state, float scale, int steps, int heads, int keys, int values,
                        int n) {
    using T = typename R::elem;
    constexpr int lk = LK<R, KM>, lm = LM<R>, lv = LV<R, WV>, MT = KM / 64;
    DYNAMIC_SHARED(raw);
    float* sb = reinterpret_cast<float*>(raw); // b and β, twice
    float* sw = sb + 4 * C;                    // s e^b of tokens, −β e^b of sub-steps
    T* sk = reinterpret_cast<T*>(sw + 2 * C);  // twice
    T* sq = sk + 2 * C * lk;
    T* sm = sq + C * lk;
    T* so = sm + C * lm;
    T* sh = so + C * lv; // dVh
    T* sz = sh + C * lv;
    T* ss = sz + C * lv;

    const int per = C / n, chunks = ceil_div(steps, per), slices = ceil_div(values, VS * WV);
    const int group = blockIdx.x / slices, batch = group / heads, head = group % heads;
    const int v0 = blockIdx.x % slices * VS * WV;
    const int cols = min(VS * WV, values - v0);
    const int warp = warp_id() % 4, col0 = warp_id() / 4 * VS, low = 16 * warp + lane_id() / 4;
    const int token_pad = ceil_div(per, 16) * 16;
    const long long first = (long long)group * chunks;
    const long long ldk = (long long)heads * keys, ldv = (long long)heads * values;

    auto fetch_k = [&](int c) {
        const Chunk at = chunk_at(c, batch, steps, n);
        fetch<KM>(sk + c % 2 * C * lk, lk, k + at.row * ldk + head * keys, ldk, at.rows, keys, C);
        fetch_rows(sb + c % 2 * 2 * C, rows, first + c);
    };
    auto fetch_q = [&](int c) {
        const Chunk at = chunk_at(c, batch, steps, n);
        fetch<KM>(sq, lk, q + at.token * ldk + head * keys, ldk, at.tokens, keys, token_pad);
        fetch<VS * WV>(so, lv, d_o + at.token * ldv + (long long)head * values + v0, ldv, at.tokens, cols, token_pad);
    };
    auto fetch_m = [&](int c) { fetch<C>(sm, lm, m + (first + c) * C * C, C, C, C, C); };
    fetch_k(chunks - 1);
    fetch_q(chunks - 1);
    fetch_m(chunks - 1);
    cp_async_commit();

    float s[MT][8][4];
    zero(s);
    if (d_last) {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    const int r = 16 * MT * warp + acc_row(i, e), c = col0 + acc_col(j, e);
                    float x[2] = {0.f, 0.f};
                    if (r < keys) get_pair(d_last + ((long long)group * keys + r) * values + v0, c, cols, values, x);
                    s[i][j][e] = x[0];
                    s[i][j][e + 1] = x[1];
                }
    }
    to_tile<T, MT, 8>(ss, lv, s, 16 * MT * warp, col0);

    for (int c = chunks - 1; c >= 0; c--) {
        const Chunk at = chunk_at(c, batch, steps, n);
        const T* kc = sk + c % 2 * C * lk;
        const float *b = sb + c % 2 * 2 * C, *beta = b + C;
        cp_async_wait<0>();
        __syncthreads();
        if (c > 0) fetch_k(c - 1);
        cp_async_commit();
        put<VS * WV>(ds + (first + c) * keys * values + v0, values, ss, lv, keys, cols);
        if (threadIdx.x < C) {
            const int t = threadIdx.x;
            sw[t] = scale * decay(b[min((t + 1) * n, C) - 1]);
            sw[C + t] = -beta[t] * decay(b[t]);
        }
        // dVh
        {
            float acc[1][8][4], p[1][8][4];
            zero(acc);
            zero(p);
            warp_gemm<R, AlongK, AlongMN, 1, 8>(acc, kc + 16 * warp * lk, lk, ss + col0, lv, KM);
            scale_rows<8>(acc, decay(b[C - 1] - b[low]), decay(b[C - 1] - b[low + 8]));
            // Pᵀ: this warp's sub-steps against all tokens.
#pragma unroll
            for (int part = 0; part < 4; part++) {
                if (16 * part < token_pad) {
                    float (&pp)[1][2][4] = reinterpret_cast<float (&)[1][2][4]>(p[0][2 * part]);
                    warp_gemm<R, AlongK, AlongK, 1, 2>(pp, kc + 16 * warp * lk, lk, sq + 16 * part * lk, lk, KM);
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const int row = low + e / 2 * 8, end = (16 * part + acc_col(j, e) + 1) * n;
                            pp[0][j][e] *= row < end ? scale * decay(b[min(end, C) - 1] - b[row]) : 0.f;
                        }
                    warp_gemm_acc<R, AlongMN, 1, 2, 8>(acc, pp, so + 16 * part * lv + col0, lv);
                }
            }
            to_tile<T, 1, 8>(sh, lv, acc, 16 * warp, col0);
        }
        __syncthreads();
        // The part of dS0 that needs no Z.
        const float all = decay(b[C - 1]);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[i][j][e] *= all;
        gemm_weighted<R, MT, 8>(s, sq + 16 * MT * warp, lk, sw, so + col0, lv, token_pad);
        // Z
        {
            float acc[1][8][4];
            zero(acc);
            const int from = __is_same(R, Bf16) ? 0 : 16 * warp; // as in `forward`
            warp_gemm<R, AlongMN, AlongMN, 1, 8>(acc, sm + from * lm + 16 * warp, lm, sh + from * lv + col0, lv,
                                                 C - from);
            to_tile<T, 1, 8>(sz, lv, acc, 16 * warp, col0);
        }
        __syncthreads();
        if (c > 0) {
            fetch_q(c - 1);
            fetch_m(c - 1);
        }
        cp_async_commit();
        put<VS * WV>(dv + at.row * ldv + (long long)head * values + v0, ldv, sz, lv, at.rows, cols);
        gemm_weighted<R, MT, 8>(s, kc + 16 * MT * warp, lk, sw + C, sz + col0, lv, C);
        to_tile<T, MT, 8>(ss, lv, s, 16 * MT * warp, col0);
    }
    if (d_state) {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    const int r = 16 * MT * warp + acc_row(i, e), c = col0 + acc_col(j, e);
                    if (r < keys)
                        put_pair(d_state + ((long long)group * keys + r) * values + v0, c, cols, values, s[i][j][e],
                                 s[i][j][e + 1]);
                }
    }
}

// ---- backward, chunk by chunk

// Sum over the four lanes that share a row of an accumulator tile.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}
// Sum over the eight lanes that share a column.
__device__ __forceinline__ float col_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 4);
    x += __shfl_xor_sync(FULL, x, 8);
    return x + __shfl_xor_sync(FULL, x, 16);
}

// The dot products of a warp's 16 rows with the same columns of a tile.
template <int NT, class T>
__device__ __forceinline__ void dot_rows(const float (&acc)[1][NT][4], const T* tile, int lds, float& low,
                                         float& high) {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            float x[2];
            load_vec<2>(tile + acc_row(0, e) * lds + acc_col(j, e), x);
            sum[e / 2] += acc[0][j][e] * x[0] + acc[0][j][e + 1] * x[1];
        }
    low = row_sum(sum[0]);
    high = row_sum(sum[1]);
}

// Stages of `gradients` in shared memory: as many as two blocks of 64 keys or one of 128 leave room for.
template <class R, int KM> constexpr int gradient_stages = KM == 128 && __is_same(R, Bf16) ? 2 : 1;

// KM / 8 warps: warp r + 4 p has rows of the r-th quarter, and of the columns (sub-steps, or keys) the p-th part.
// With two stages the next slice of value columns is fetched while this one is worked on.
template <class R, int KM>
__device__ void gradients(const typename R::elem* q, const typename R::elem* k, const typename R::elem* v,
                          const float* rows, const typename R::elem* s_kept, const typename R::elem* vh_kept,
                          const typename R::elem* ds_kept, const typename R::elem* d_o, typename R::elem* dq,
                          typename R::elem* dk, typename R::elem* dv, float* d_beta, float* dg, float scale,
                          int steps, int heads, int keys, int values, int n) {
    using T = typename R::elem;
    constexpr int lk = LK<R, KM>, lm = LM<R>, lv = LV<R, 1>, PARTS = KM / 32, NS = 8 / PARTS, NK = 4;
    constexpr int STAGES = gradient_stages<R, KM>, STAGE = (4 * C + 2 * KM) * lv, SLOTS = 4 * PARTS + 8;
    DYNAMIC_SHARED(raw);
    float* sb = reinterpret_cast<float*>(raw); // b, β
    float* zv = sb + 2 * C;                    // rows of Z ∘ V
    float* slots = zv + C;                     // partial sums of every row or column
    float* scratch = slots + SLOTS * C;        // 64
    T* sk = reinterpret_cast<T*>(scratch + C);
    T* sq = sk + C * lk;
    T* stage = sq + C * lk; // Vh, Z, dO, V, S0, dS1
    // After the loop over slices, in the first stage's place: dP ∘ G and β dL ∘ G.
    T* sp = stage;
    T* sl = sp + C * lm;
    float *row_q = slots, *row_l = row_q + PARTS * C, *row_u = row_l + PARTS * C, *row_t = row_u + PARTS * C;
    float *col_p = row_t + PARTS * C, *col_l = col_p + 4 * C;

    const int per = C / n, chunks = ceil_div(steps, per), c = blockIdx.x % chunks;
    const int batch = blockIdx.x / chunks / heads, head = blockIdx.x / chunks % heads;
    const Chunk at = chunk_at(c, batch, steps, n);
    const int quarter = warp_id() % 4, part = warp_id() / 4;
    const int row0 = 16 * quarter, step0 = C / PARTS * part, key0 = 32 * part;
    const int low = row0 + lane_id() / 4, token_pad = ceil_div(per, 16) * 16;
    const long long index = blockIdx.x;
    const long long ldk = (long long)heads * keys, ldv = (long long)heads * values;

    fetch<KM>(sk, lk, k + at.row * ldk + head * keys, ldk, at.rows, keys, C);
    fetch<KM>(sq, lk, q + at.token * ldk + head * keys, ldk, at.tokens, keys, token_pad);
    fetch_rows(sb, rows, index);
    auto fetch_slice = [&](int v0) {
        const int cols = min(VS, values - v0);
        T* to = stage + v0 / VS % STAGES * STAGE;
        fetch<VS>(to, lv, vh_kept + index * C * values + v0, values, C, cols, C);
        const long long from = at.row * ldv + (long long)head * values + v0;
        fetch<VS>(to + C * lv, lv, dv + from, ldv, at.rows, cols, C);
        fetch<VS>(to + 2 * C * lv, lv, d_o + at.token * ldv + (long long)head * values + v0, ldv, at.tokens, cols,
                  token_pad);
        fetch<VS>(to + 3 * C * lv, lv, v + from, ldv, at.rows, cols, C);
        fetch<VS>(to + 4 * C * lv, lv, s_kept + index * keys * values + v0, values, keys, cols, KM);
        fetch<VS>(to + (4 * C + KM) * lv, lv, ds_kept + index * keys * values + v0, values, keys, cols, KM);
        cp_async_commit();
    };
    fetch_slice(0); // with q and k
    for (int i = threadIdx.x; i < (1 + SLOTS) * C; i += blockDim.x) zv[i] = 0.f; // and the slots
    const bool reads = row0 < at.tokens;
    // Blocks that lie wholly above the diagonal.
    const bool has_p = reads && (row0 + 16) * n > step0, has_l = row0 + 15 > step0;
    float dp[1][NS][4], dl[1][NS][4], gq[1][NK][4], gk[1][NK][4], gz[1][NK][4];
    zero(dp);
    zero(dl);
    zero(gq);
    zero(gk);
    zero(gz);
    float overlap = 0.f; // ⟨S0, dS1⟩
    for (int v0 = 0; v0 < values; v0 += VS) {
        const int cols = min(VS, values - v0);
        const T *sh = stage + v0 / VS % STAGES * STAGE, *sz = sh + C * lv, *so = sz + C * lv, *sv = so + C * lv;
        const T *ss = sv + C * lv, *sd = ss + KM * lv;
        cp_async_wait<0>();
        __syncthreads();
        if (STAGES > 1 && v0 + VS < values) fetch_slice(v0 + VS);
        // Z lies in dv and becomes dV there.
        for (int r = warp_id(); r < at.rows; r += KM / 8) {
            const long long row = (at.row + r) * ldv + (long long)head * values + v0;
            const int col = 2 * lane_id();
            float z[2], x[2];
            load_vec<2>(sz + r * lv + col, z);
            load_vec<2>(sv + r * lv + col, x);
            put_pair(dv + row, col, cols, values, sb[C + r] * z[0], sb[C + r] * z[1]);
            const float sum = warp_sum(z[0] * x[0] + z[1] * x[1]);
            if (lane_id() == 0) zv[r] += sum;
        }
        if (dg) {
            for (int i = threadIdx.x; i < KM * VS / 2; i += blockDim.x) {
                float x[2], y[2];
                load_vec<2>(ss + i / 32 * lv + i % 32 * 2, x);
                load_vec<2>(sd + i / 32 * lv + i % 32 * 2, y);
                overlap += x[0] * y[0] + x[1] * y[1];
            }
        }
        if (has_p) warp_gemm<R, AlongK, AlongK, 1, NS>(dp, so + row0 * lv, lv, sh + step0 * lv, lv, VS);
        if (has_l) warp_gemm<R, AlongK, AlongK, 1, NS>(dl, sz + row0 * lv, lv, sh + step0 * lv, lv, VS);
        if (reads) warp_gemm<R, AlongK, AlongK, 1, NK>(gq, so + row0 * lv, lv, ss + key0 * lv, lv, VS);
        warp_gemm<R, AlongK, AlongK, 1, NK>(gk, sh + row0 * lv, lv, sd + key0 * lv, lv, VS);
        warp_gemm<R, AlongK, AlongK, 1, NK>(gz, sz + row0 * lv, lv, ss + key0 * lv, lv, VS);
        if (STAGES == 1 && v0 + VS < values) {
            __syncthreads();
            fetch_slice(v0 + VS);
        }
    }
    const float *b = sb, *beta = sb + C;
    if (dg) overlap = block_sum(overlap, scratch); // has a barrier before it writes
    __syncthreads();

    // P, dP and L, dL element by element; row sums by part, column sums by quarter.
    {
        float acc[1][NS][4];
        zero(acc);
        if (has_p) warp_gemm<R, AlongK, AlongK, 1, NS>(acc, sq + row0 * lk, lk, sk + step0 * lk, lk, KM);
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int j = 0; j < NS; j++) {
            float columns[2] = {0.f, 0.f};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int end = (low + e / 2 * 8 + 1) * n, col = step0 + acc_col(j, e);
                const float w = col < end ? scale * decay(b[min(end, C) - 1] - b[col]) : 0.f;
                dp[0][j][e] *= w;
                const float x = dp[0][j][e] * acc[0][j][e];
                sum[e / 2] += x;
                columns[e % 2] += x;
            }
            columns[0] = col_sum(columns[0]);
            columns[1] = col_sum(columns[1]);
            if (lane_id() < 4) store_vec<2>(col_p + quarter * C + step0 + acc_col(j, 0), columns);
        }
        if (row0 < token_pad) to_tile<T, 1, NS>(sp, lm, dp, row0, step0);

        float at_q[2] = {0.f, 0.f};
        const float x = scale * decay(b[min((low + 1) * n, C) - 1]);
        const float y = scale * decay(b[min((low + 9) * n, C) - 1]);
        if (reads) {
            scale_rows<NK>(gq, x, y);
            dot_rows<NK>(gq, sq + row0 * lk + key0, lk, at_q[0], at_q[1]);
        }
        sum[0] = row_sum(sum[0]);
        sum[1] = row_sum(sum[1]);
        if (lane_id() % 4 == 0) {
            row_q[part * C + low] = sum[0] + at_q[0];
            row_q[part * C + low + 8] = sum[1] + at_q[1];
        }
    }
    {
        float acc[1][NS][4];
        zero(acc);
        if (has_l) warp_gemm<R, AlongK, AlongK, 1, NS>(acc, sk + row0 * lk, lk, sk + step0 * lk, lk, KM);
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int j = 0; j < NS; j++) {
            float columns[2] = {0.f, 0.f};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = low + e / 2 * 8, col = step0 + acc_col(j, e);
                const float w = col < row ? -decay(b[row] - b[col]) : 0.f;
                const float x = dl[0][j][e] * w * acc[0][j][e];
                sum[e / 2] += x;
                columns[e % 2] += beta[row] * x;
                dl[0][j][e] *= w * beta[row];
            }
            columns[0] = col_sum(columns[0]);
            columns[1] = col_sum(columns[1]);
            if (lane_id() < 4) store_vec<2>(col_l + quarter * C + step0 + acc_col(j, 0), columns);
        }
        to_tile<T, 1, NS>(sl, lm, dl, row0, step0);

        const float tail[2] = {decay(b[C - 1] - b[low]), decay(b[C - 1] - b[low + 8])};
        const float head_[2] = {decay(b[low]), decay(b[low + 8])};
        float t[2], u[2];
        scale_rows<NK>(gk, tail[0], tail[1]);
        scale_rows<NK>(gz, head_[0], head_[1]);
        dot_rows<NK>(gk, sk + row0 * lk + key0, lk, t[0], t[1]);
        dot_rows<NK>(gz, sk + row0 * lk + key0, lk, u[0], u[1]);
        if (lane_id() % 4 == 0)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int at_row = part * C + low + 8 * e;
                row_t[at_row] = t[e];
                row_u[at_row] = u[e];
            }
        sum[0] = row_sum(sum[0]);
        sum[1] = row_sum(sum[1]);
        if (lane_id() % 4 == 0) {
            row_l[part * C + low] = sum[0];
            row_l[part * C + low + 8] = sum[1];
        }
#pragma unroll
        for (int j = 0; j < NK; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) gk[0][j][e] -= beta[low + e / 2 * 8] * gz[0][j][e];
    }
    __syncthreads();

    if (reads) {
        warp_gemm<R, AlongK, AlongMN, 1, NK>(gq, sp + row0 * lm, lm, sk + key0, lk, C);
#pragma unroll
        for (int e = 0; e < 4; e += 2)
#pragma unroll
            for (int j = 0; j < NK; j += 2)
                put_tiles(dq + (at.token + low + 4 * e) * ldk + head * keys, low + 4 * e < at.tokens, key0 + 8 * j,
                          keys, keys, gq[0][j], gq[0][j + 1], e, 1.f);
    }
    warp_gemm<R, AlongK, AlongMN, 1, NK>(gk, sl + row0 * lm, lm, sk + key0, lk, row0 + 16);
    warp_gemm<R, AlongMN, AlongMN, 1, NK>(gk, sl + row0 * lm + row0, lm, sk + row0 * lk + key0, lk, C - row0);
    warp_gemm<R, AlongMN, AlongMN, 1, NK>(gk, sp + row0, lm, sq + key0, lk, token_pad);
#pragma unroll
    for (int e = 0; e < 4; e += 2)
#pragma unroll
        for (int j = 0; j < NK; j += 2)
            put_tiles(dk + (at.row + low + 4 * e) * ldk + head * keys, low + 4 * e < at.rows, key0 + 8 * j, keys, keys,
                      gk[0][j], gk[0][j + 1], e, 1.f);

    if (threadIdx.x < C) {
        const int j = threadIdx.x;
        float l = 0.f, u = 0.f, t = 0.f, reads_q = 0.f;
        const bool ends = (j + 1) % n == 0 && j / n < at.tokens;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            l += row_l[p * C + j];
            u += row_u[p * C + j];
            t += row_t[p * C + j];
            if (ends) reads_q += row_q[p * C + j / n];
        }
        if (j < at.rows) d_beta[(at.row + j) * heads + head] = zv[j] - u + l;
        float x = beta[j] * (l - u) - t + reads_q;
#pragma unroll
        for (int r = 0; r < 4; r++) x -= col_p[r * C + j] + col_l[r * C + j];
        scratch[j] = x;
        zv[j] = t; // read above by this thread alone
    }
    if (!dg) return;
    __syncthreads();
    if (threadIdx.x < WARP) {
        // From the end: every lane sums two sub-steps, then the lanes after it.
        const int lane = threadIdx.x;
        const float end = warp_sum(zv[2 * lane] + zv[2 * lane + 1]) + decay(b[C - 1]) * overlap;
        const float x = scratch[2 * lane], y = scratch[2 * lane + 1];
        float sum = x + y;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const float after = __shfl_down_sync(FULL, sum, d);
            if (lane + d < WARP) sum += after;
        }
        scratch[2 * lane] = end + sum;
        scratch[2 * lane + 1] = end + sum - x;
        __syncwarp();
        for (int t = lane; t < at.tokens; t += WARP) dg[(at.token + t) * heads + head] = scratch[t * n];
    }
}

// ---- the kernels

#define PREPARE(R, route)                                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                                   \
        delta_prepare_##route(const R::elem* k, const float* beta, const float* g, R::elem* m, float* rows, int steps,  \
                              int heads, int keys, int n) {                                                             \
        prepare<R>(k, beta, g, m, rows, steps, heads, keys, n);                                                         \
    }
PREPARE(Bf16, bf16)
PREPARE(Tf32, tf32)
PREPARE(F32, f32)

#define WALK(R, route, KM, WV)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128 * WV, 2) delta_forward_##route##_##KM##_##WV(                      \
        const R::elem* q, const R::elem* k, const R::elem* v, const R::elem* m, const float* rows, const float* state,  \
        R::elem* o, float* last, R::elem* s_kept, R::elem* vh_kept, float scale, int steps, int heads, int keys,        \
        int values, int n) {                                                                                            \
        forward<R, KM, WV>(q, k, v, m, rows, state, o, last, s_kept, vh_kept, scale, steps, heads, keys, values, n);    \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(128 * WV, 2) delta_reverse_##route##_##KM##_##WV(                      \
        const R::elem* q, const R::elem* k, const R::elem* m, const float* rows, const R::elem* d_o,                    \
        const float* d_last, R::elem* dv, R::elem* ds, float* d_state, float scale, int steps, int heads, int keys,     \
        int values, int n) {                                                                                            \
        reverse<R, KM, WV>(q, k, m, rows, d_o, d_last, dv, ds, d_state, scale, steps, heads, keys, values, n);          \
    }
#define GRADIENTS(R, route, KM)                                                                                         \
    extern "C" __global__ void __launch_bounds__(4 * KM, KM == 64 && sizeof(R::elem) == 2 ? 2 : 1)                      \
        delta_gradients_##route##_##KM(                                                                                 \
        const R::elem* q, const R::elem* k, const R::elem* v, const float* rows, const R::elem* s_kept,                 \
        const R::elem* vh_kept, const R::elem* ds_kept, const R::elem* d_o, R::elem* dq, R::elem* dk, R::elem* dv,      \
        float* d_beta, float* dg, float scale, int steps, int heads, int keys, int values, int n) {                     \
        gradients<R, KM>(q, k, v, rows, s_kept, vh_kept, ds_kept, d_o, dq, dk, dv, d_beta, dg, scale, steps, heads,     \
                         keys, values, n);                                                                              \
    }
WALK(Bf16, bf16, 64, 1)
WALK(Bf16, bf16, 64, 2)
WALK(Bf16, bf16, 128, 1)
WALK(Tf32, tf32, 64, 1)
WALK(Tf32, tf32, 128, 1)
WALK(F32, f32, 64, 1)
WALK(F32, f32, 128, 1)
GRADIENTS(Bf16, bf16, 64)
GRADIENTS(Bf16, bf16, 128)
GRADIENTS(Tf32, tf32, 64)
GRADIENTS(Tf32, tf32, 128)
GRADIENTS(F32, f32, 64)
GRADIENTS(F32, f32, 128)
