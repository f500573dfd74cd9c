// Gated linear attention (Yang et al. 2024, arXiv:2312.06635, eq. 3): a matrix state whose rows decay on their
// own.
//
//   q, k [B,T,H,K]  v, o [B,T,H,V]  in the activations' type
//   g [B,T,H,K]  log decays, at most 0, and states [B,H,K,V]  f32
//
// The sequence is cut into blocks of 16 tokens. With l = the inclusive sum of g from the block's start, its
// last row L, the state S0 before the block, S1 after it, and row vectors:
//
//   o_i = (q'_i S0 + sum_{j <= i} A_ij v_j)      A_ij = scale sum_k q_ik k_jk exp(l_ik - l_jk)
//   S1  = diag(exp L) S0 + sum_j k'_j^T v_j      q'_i = scale q_i exp(l_i),  k'_j = k_j exp(L - l_j)
//
// So short a block makes the chunked form as cheap as it gets: its work between tokens and state is the same
// for every length, and only the work inside a block grows. The exponents of q' and k' are at most 0. A is a
// product of two factors that meet at an anchor m, the l of a token in the middle of eight: for j < 8 of scale
// q_i exp(l_i - m) and k_j exp(m - l_j) with m = l_3, for j >= 8 with m = l_11. Four steps at most lie between
// j and its anchor, and as many between the anchor and an i that comes before it: however strong the decay,
// exponents end at -4 CLOSED, and what underflows is nothing beside the rest of its sum.
//
// Gradients, with dS1 that of the state after the block and D_ij = do_i . v_j:
//
//   dv_j = k'_j dS1 + sum_{i >= j} A_ij do_i
//   dS0  = diag(exp L) dS1 + sum_i q'_i^T do_i
//   dq_i = scale (exp(l_i) (do_i S0^T) + sum_{j <= i} D_ij k_j exp(l_i - l_j))
//   dk_j = exp(L - l_j) (v_j dS1^T) + sum_{i >= j} D_ij scale q_i exp(l_i - l_j)
//   dg_t = <S1, dS1>_k + sum_{i >= t} (q_i dq_i - k_i dk_i)
//
// dg without the terms i = j, which cancel, and with <S1, dS1> computed anew every SPAN tokens: between them it
// is the dg of the block's first token. Its other terms cancel in part, too, so that both of its products are
// made of the very operands that the tensor cores multiplied, rounded as they were: what is then left is right
// but for f32's rounding.
//
// Value columns are independent of each other in o and dv, key rows in dq and dk. Hence two kinds of kernels,
// with the state that they need whole in registers, forward or backward in time:
//
//   gla_values  forward: o and the final state; in reverse: dv. A warp has 16 columns of V.
//   gla_states  the state alone, forward or in reverse: the parts of a sequence that is cut into segments, so
//               that few sequences fill a GPU; gla_scan joins the segments
//   gla_dq      forward: dq, and for the next the states every SPAN tokens and q dq. A warp has 16 rows of K.
//   gla_dk      in reverse: dk, dg and the gradient of the initial state. Likewise.
//
// Nothing is kept from the forward pass. No atomics; every sum has one order.
#include "chunk.cuh"

// Tokens that are in shared memory at a time, in blocks of 16; tokens between two states that are kept.
constexpr int STAGE = 32, BLOCKS = STAGE / 16, SPAN = 256;

// Log decays below this count as this: what is left of the past, 1e-7, is what f32 rounds away.
constexpr float CLOSED = -16.f;

// Where l of a block is an anchor, and rows that the queries of a block take: 8 to 15 are there for both
// anchors.
constexpr int ANCHORS[2] = {3, 11}, QUERY_ROWS = 24;

// What a product on route R makes of an operand.
template <class R>
__device__ __forceinline__ float operand(float x) {
    if constexpr (__is_same(R, Bf16)) return to_f(from_f<bf16>(x));
    if constexpr (__is_same(R, Tf32)) return __uint_as_float(to_tf32(x));
    return x;
}

// Where a channel decays by more than this in a block, what passes through the whole block is nothing beside
// what the route rounds.
template <class R> constexpr float OPAQUE = -7.f;
template <> constexpr float OPAQUE<Tf32> = -9.f;
template <> constexpr float OPAQUE<F32> = -16.f;

// Buffers for stages: with two the next is on its way during the work on this one. Where they are as large as in
// f32, two blocks of gla_dq and gla_dk on a multiprocessor are worth more.
template <class R, int NT> constexpr int BUFFERS = sizeof(typename R::elem) == 4 && NT == 32 ? 1 : 2;
template <class R, int NT> constexpr int KEY_BUFFERS = sizeof(typename R::elem) == 4 && NT >= 16 ? 1 : 2;

// The stages of a segment.
struct Segment {
    int first, last;

    __device__ __forceinline__ Segment(int T, int per_segment)
        : first(blockIdx.y * per_segment), last(min(ceil_div(T, STAGE), first + per_segment)) {}
    __device__ __forceinline__ int stage(int i, bool reverse) const {
        return reverse ? last - 1 - i : first + i;
    }
};

// N matrices of the same shape, of whose rows STAGE at a time go to tiles [STAGE][padded] with row stride lds.
// Threads keep their column. A block has at least padded / V threads.
template <class E, int N>
struct Rows {
    static constexpr int V = 16 / sizeof(E);
    const E* from[N];
    E* to[N];
    long long ld;
    int cols, padded, lds, row, col, down;
    bool vector;

    __device__ __forceinline__ Rows(const E* const (&matrices)[N], long long ld, int cols, E* const (&tiles)[N],
                                    int padded, int lds)
        : ld(ld), cols(cols), padded(padded), lds(lds) {
        vector = cols % V == 0 && ld % V == 0;
#pragma unroll
        for (int n = 0; n < N; n++) {
            from[n] = matrices[n], to[n] = tiles[n];
            vector = vector && reinterpret_cast<size_t>(from[n]) % 16 == 0;
        }
        down = blockDim.x / (padded / V);
        row = threadIdx.x / (padded / V), col = threadIdx.x % (padded / V) * V;
        if (row >= down) row = STAGE;
    }
    // Starts filling tile `at` with rows t0 ... of which there are `rows`; zeros outside.
    __device__ __forceinline__ void fetch(int at, int t0, int rows) const {
        if (vector) {
            long long source = (t0 + row) * ld + col;
            int target = (at * STAGE + row) * lds + col;
            for (int r = row; r < STAGE; r += down, source += down * ld, target += down * lds) {
                const bool inside = r < rows && col < cols;
#pragma unroll
                for (int n = 0; n < N; n++)
                    cp_async16(to[n] + target, inside ? from[n] + source : from[n], inside ? 16 : 0);
            }
        } else {
            for (int i = threadIdx.x; i < STAGE * padded; i += blockDim.x) {
                const int r = i / padded, c = i % padded;
#pragma unroll
                for (int n = 0; n < N; n++)
                    to[n][(at * STAGE + r) * lds + c] =
                        r < rows && c < cols ? from[n][(t0 + r) * ld + c] : from_f<E>(0.f);
            }
        }
    }
};

// One warp: the decays of a block of 16 tokens and 16 channels. A lane has tokens row, row + 1, row + 2, row +
// 3 and channels col, col + 1.
struct Decays {
    int row, col;
    float2 l[4];          // inclusive sums, to base 2
    float2 first, second; // l at the anchors
    float2 last;          // l of the last token

    __device__ __forceinline__ Decays(const float* g, int ld) {
        const int lane = lane_id();
        row = lane / 8 * 4, col = lane % 8 * 2;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 v = load2(g + (row + i) * ld + col);
            sum.x += LOG2E * fminf(fmaxf(v.x, CLOSED), 0.f);
            sum.y += LOG2E * fminf(fmaxf(v.y, CLOSED), 0.f);
            l[i] = sum;
        }
#pragma unroll
        for (int o = 8; o < WARP; o *= 2) {
            const float x = __shfl_up_sync(FULL, sum.x, o), y = __shfl_up_sync(FULL, sum.y, o);
            if (lane >= o) sum.x += x, sum.y += y;
        }
        const float x = __shfl_up_sync(FULL, sum.x, 8), y = __shfl_up_sync(FULL, sum.y, 8);
        if (lane >= 8)
#pragma unroll
            for (int i = 0; i < 4; i++) l[i].x += x, l[i].y += y;
        first = at(0), second = at(2), last = at(3);
    }
    // l of the last token of a lane's four.
    __device__ __forceinline__ float2 at(int quarter) const {
        const int from = 8 * quarter + lane_id() % 8;
        return make_float2(__shfl_sync(FULL, l[3].x, from), __shfl_sync(FULL, l[3].y, from));
    }
    __device__ __forceinline__ bool upper() const { return row >= 8; }
    __device__ __forceinline__ float2 anchor() const { return upper() ? second : first; }

    // From the rows q of a block: scale q exp(l) to `read`, scale q exp(l - anchor) to `inner` [QUERY_ROWS]:
    // rows 0 to 15 for the first anchor, then rows 8 to 15 for the second.
    template <class E>
    __device__ __forceinline__ void queries(const E* q, E* read, E* inner, int ld, float scale) const {
        const float2 m = anchor(), start = exp2_of(m.x, m.y);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = (row + i) * ld + col;
            const float2 f = exp2_of(l[i].x - m.x, l[i].y - m.y);
            float2 x = load2(q + at);
            x.x *= scale, x.y *= scale;
            store2(read + at, x.x * (f.x * start.x), x.y * (f.y * start.y));
            store2(inner + at + (upper() ? 8 * ld : 0), x.x * f.x, x.y * f.y);
            if (upper()) {
                const float2 f = exp2_of(l[i].x - first.x, l[i].y - first.y);
                store2(inner + at, x.x * f.x, x.y * f.y);
            }
        }
    }
    // From the rows k: k exp(L - l) to `write`, k exp(anchor - l) to `inner`, rows 0 to 7 for the first anchor,
    // 8 to 15 for the second.
    template <class E>
    __device__ __forceinline__ void keys(const E* k, E* write, E* inner, int ld) const {
        const float2 m = anchor(), tail = exp2_of(last.x - m.x, last.y - m.y);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = (row + i) * ld + col;
            const float2 f = exp2_of(m.x - l[i].x, m.y - l[i].y), x = load2(k + at);
            store2(write + at, x.x * (f.x * tail.x), x.y * (f.y * tail.y));
            store2(inner + at, x.x * f.x, x.y * f.y);
        }
    }
    // exp(L) of channels col and col + 1, by the lanes that have the first tokens.
    __device__ __forceinline__ void total(float* to) const {
        if (row > 0) return;
        const float2 x = exp2_of(last.x, last.y);
        store2(to + col, x.x, x.y);
    }
    static __device__ __forceinline__ float2 exp2_of(float x, float y) {
        return make_float2(exp2_fast(x), exp2_fast(y));
    }
};

// One warp: a product [16 x 8] over n values, from tiles that hold a multiple of 32. Two sums hide each other's
// latency.
template <class R>
__device__ __forceinline__ void narrow_product(float (&c)[4], const typename R::elem* rows,
                                               const typename R::elem* cols, int ld, int n) {
    const int lane = lane_id();
    float sums[2][4] = {};
    for (int x = 0; x < n; x += 32) {
        FragB<R> fb[2];
        if constexpr (__is_same(R, Bf16)) {
            uint32_t r[4];
            ldmatrix_x4(r, cols + lane % 8 * ld + x + lane / 8 * 8);
            fb[0].x[0] = r[0], fb[0].x[1] = r[1], fb[1].x[0] = r[2], fb[1].x[1] = r[3];
        } else {
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    fb[h].x[e] = cols[lane / 4 * ld + x + 16 * h + 2 * (lane % 4) + e % 2 + 8 * (e / 2)];
        }
#pragma unroll
        for (int h = 0; h < 2; h++) mma<R>(sums[h], load_a<R, AlongK>(rows + x + 16 * h, ld), fb[h]);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) c[e] = sums[0][e] + sums[1][e];
}

// A fragment without the elements whose row and k are not in the wanted half of 8; -1: both halves are wanted.
template <class R>
__device__ __forceinline__ FragA<R> part(FragA<R> f, int rows, int k) {
    constexpr int N = __is_same(R, Bf16) ? 4 : 8;
#pragma unroll
    for (int e = 0; e < N; e++) {
        const int row_half = (N == 4 ? e : e / 2) % 2, k_half = e / (N / 2);
        if ((rows >= 0 && row_half != rows) || (k >= 0 && k_half != k)) f.x[e] = 0;
    }
    return f;
}

// z: v (in reverse do). out: o (in reverse dv). state0 and state1 [B,H,K,V]: the state before the first and
// after the last token, in reverse its gradient after the last token and none.
// With several segments state0 is [segments][B,H,K,V]. STATES: no out, and for every segment state1
// [segments][B,H,K,V], what becomes of a state of zeros, and `decays` [segments][B,H,K], what is left of any.
// Grid: (B H slices, segments). Block: a warp for 16 columns of V, 2 to 16 (8 for NT = 32); a slice has as many
// as the block's warps.
// Shared memory, BUFFERS times: q, k [STAGE][8 NT + PAD], z [STAGE][16 warps + PAD], g f32 [STAGE][8 NT + PAD];
// then inner factors of k [STAGE][8 NT + PAD] and q [BLOCKS QUERY_ROWS][8 NT + PAD], A [STAGE][16 + PAD], f32
// exp(L) [BLOCKS][8 NT].
template <class R, int NT, bool STATES>
__device__ __forceinline__ void values(const typename R::elem* q, const typename R::elem* k, const float* g,
                                       const typename R::elem* z, const float* state0, typename R::elem* out,
                                       float* state1, float* decays, int T, int H, int K, int V, int slices,
                                       int per_segment, float scale, int reverse) {
    using E = typename R::elem;
    constexpr int COLS = 8 * NT, LD = COLS + PAD, LDA = 16 + PAD, N = BUFFERS<R, NT>;
    DYNAMIC_SHARED(memory);
    const int warp = warp_id(), lane = lane_id(), warps = blockDim.x / WARP, ldz = 16 * warps + PAD;
    float* sg = reinterpret_cast<float*>(memory);
    E* sq = reinterpret_cast<E*>(sg + N * STAGE * LD);
    E* sk = sq + N * STAGE * LD;
    E* sz = sk + N * STAGE * LD;
    E* inner_k = sz + N * STAGE * ldz;
    E* inner_q = inner_k + STAGE * LD;
    E* sa = inner_q + BLOCKS * QUERY_ROWS * LD;
    float* last = reinterpret_cast<float*>(sa + STAGE * LDA);

    const long long bh = blockIdx.x / slices, batch = bh / H, h = bh % H;
    const int v0 = blockIdx.x % slices * 16 * warps, width = min(V - v0, 16 * warps), mine = width - 16 * warp;
    const long long row_k = (long long)H * K, row_v = (long long)H * V;
    const Segment segment(T, per_segment);
    const int stages = segment.last - segment.first;
    const long long heads = gridDim.x / slices, own = blockIdx.y * heads + bh;
    q += batch * T * row_k + h * K;
    k += batch * T * row_k + h * K;
    g += batch * T * row_k + h * K;
    z += batch * T * row_v + h * V + v0;
    if (!STATES) out += batch * T * row_v + h * V + v0;

    const Rows<float, 1> rows_g({g}, row_k, K, {sg}, COLS, LD);
    const Rows<E, 2> rows_qk({q, k}, row_k, K, {sq, sk}, COLS, LD);
    const Rows<E, 1> rows_z({z}, row_v, width, {sz}, 16 * warps, ldz);
    const auto fetch = [&](int i) {
        const int t0 = segment.stage(i, reverse) * STAGE, tokens = min(STAGE, T - t0);
        rows_g.fetch(i % N, t0, tokens);
        rows_qk.fetch(i % N, t0, tokens);
        rows_z.fetch(i % N, t0, tokens);
        cp_async_commit();
    };
    if (N == 2) fetch(0);
    // The state, transposed: rows are columns of V.
    float s[NT][4];
    const float* start = state0 ? state0 + own * K * V + v0 + 16 * warp : nullptr;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int r = acc_row(0, e), c = acc_col(j, e);
            s[j][e] = start && r < mine && c < K ? start[(long long)c * V + r] : 0.f;
        }
    const bool pair = can_pair(out, row_v, width);
    // What is left of a state: of columns threadIdx.x ... of K.
    float left[STATES ? COLS / (2 * WARP) : 1];
#pragma unroll
    for (float& x : left) x = 1.f;

    for (int i = 0; i < stages; i++) {
        const int t0 = segment.stage(i, reverse) * STAGE, at = i % N;
        if (N == 1) {
            __syncthreads();
            fetch(i);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (N == 2 && i + 1 < stages) fetch(i + 1);
        const float* tg = sg + at * STAGE * LD;
        E* tq = sq + at * STAGE * LD;
        E* tk = sk + at * STAGE * LD;
        const E* tz = sz + at * STAGE * ldz + 16 * warp;

        for (int unit = warp; unit < BLOCKS * NT / 2; unit += warps) {
            const int block = unit / (NT / 2), c = unit % (NT / 2) * 16, at = 16 * block * LD + c;
            const Decays decays(tg + at, LD);
            if (!STATES || reverse)
                decays.queries(tq + at, tq + at, inner_q + QUERY_ROWS * block * LD + c, LD, scale);
            if (!STATES || !reverse) decays.keys(tk + at, tk + at, inner_k + at, LD);
            decays.total(last + block * COLS + c);
        }
        __syncthreads();
        if constexpr (STATES) {
            int c = threadIdx.x;
            for (float& x : left) {
                if (c >= COLS) break;
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) x *= last[block * COLS + c];
                c += blockDim.x;
            }
        }
        for (int unit = warps - 1 - warp; unit < (STATES ? 0 : 2 * BLOCKS); unit += warps) {
            const int block = unit / 2, half = unit % 2, c = acc_col(half, 0);
            float a[4];
            narrow_product<R>(a, inner_q + (QUERY_ROWS * block + 8 * half) * LD,
                              inner_k + (16 * block + 8 * half) * LD, LD, K);
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int r = acc_row(0, e);
                store2(sa + (16 * block + r) * LDA + c, c > r ? 0.f : a[e], c + 1 > r ? 0.f : a[e + 1]);
            }
        }

#pragma unroll 1
        for (int n = 0; n < BLOCKS; n++) {
            const int block = reverse ? BLOCKS - 1 - n : n, r0 = 16 * block;
            const E* write = (reverse ? tq : tk) + r0 * LD;
            if (!STATES) {
                const E* a = sa + r0 * LDA;
                const E* read = (reverse ? tk : tq) + r0 * LD;
                float o[2][4] = {};
#pragma unroll
                for (int x = 0; x < NT; x += 2) {
                    FragB<R> fb[2];
                    acc_as_b<R>(fb, s[x], s[x + 1]);
                    const FragA<R> fa = load_a<R, AlongK>(read + 8 * x, LD);
                    mma<R>(o[0], fa, fb[0]);
                    mma<R>(o[1], fa, fb[1]);
                }
                // A is there from here on.
                if (n == 0) __syncthreads();
                FragB<R> fz[2];
                load_b<R, AlongMN>(fz, tz + r0 * ldz, ldz);
                const FragA<R> fa = reverse ? load_a<R, AlongMN>(a, LDA) : load_a<R, AlongK>(a, LDA);
                mma<R>(o[0], fa, fz[0]);
                mma<R>(o[1], fa, fz[1]);
                store_block(out + (t0 + r0) * row_v + 16 * warp, row_v, T - t0 - r0, mine, o[0], o[1], pair);
            }
            const float* decay = last + block * COLS + acc_col(0, 0);
            const FragA<R> fu = load_a<R, AlongMN>(tz + r0 * ldz, ldz);
#pragma unroll
            for (int x = 0; x < NT; x += 2) {
                FragB<R> fb[2];
                load_b<R, AlongMN>(fb, write + 8 * x, LD);
#pragma unroll
                for (int y = 0; y < 2; y++) {
                    const float2 v = load2(decay + 8 * (x + y));
                    s[x + y][0] *= v.x, s[x + y][1] *= v.y, s[x + y][2] *= v.x, s[x + y][3] *= v.y;
                    mma<R>(s[x + y], fu, fb[y]);
                }
            }
        }
    }
    if (STATES || (state1 && segment.last == ceil_div(T, STAGE))) {
        float* end = state1 + (STATES ? own : bh) * K * V + v0 + 16 * warp;
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = acc_row(0, e), c = acc_col(j, e);
                if (r < mine && c < K) end[(long long)c * V + r] = s[j][e];
            }
    }
    if (STATES && v0 == 0) {
        int c = threadIdx.x;
        for (const float x : left) {
            if (c < K) decays[own * K + c] = x;
            c += blockDim.x;
        }
    }
}

// Brings what is soon read nearer.
__device__ __forceinline__ void prefetch(const void* p) {
#ifndef SB_EMULATE
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Eight numbers of every lane, for the same lane of the other call.
__device__ __forceinline__ void keep(float* p, const float (&a)[4], const float (&b)[4]) {
    store_vec<4>(p, a);
    store_vec<4>(p + 4, b);
}
__device__ __forceinline__ void recall(const float* p, float (&a)[4], float (&b)[4]) {
    load_vec<4>(p, a);
    load_vec<4>(p + 4, b);
}

// Forward: x = k, y = q, z = do, u = v, state0 the state before the first token; writes dx = dq, kept and
// products.
// In reverse: x = q, y = k, z = v, u = do, state0 the gradient of the state after the last token; writes dx =
// dk, dg and the gradient of the initial state, and reads what the forward call wrote.
// kept [B,H,ceil(T/SPAN),tiles,NT/2,32,8] and products [B,H,ceil(T/16),tiles,32,8] f32, as the lanes hold them;
// tiles = ceil(K/16). The last of `kept`, after the last token, is written only with `keep_end`: without a
// gradient of the final state, state0 none, nobody reads it.
// With several segments state0 is [segments][B,H,K,V].
// Grid: (B H slices of 128 rows of K, segments). Block: a warp for 16 rows of K, 2 to 8.
// Shared memory, KEY_BUFFERS times: g f32 [STAGE][ldx], z, u [STAGE][8 NT + PAD], x, y [STAGE][ldx] with ldx =
// 16 warps + PAD; then x' [STAGE][ldx], inner factors of x [BLOCKS QUERY_ROWS][ldx], D [STAGE][16 + PAD], f32
// exp(L) [BLOCKS][16 warps], D_ii [STAGE], <S, dS> [16 warps].
template <class R, int NT, bool REVERSE>
__device__ __forceinline__ void keys(const typename R::elem* x, const typename R::elem* y, const float* g,
                                     const typename R::elem* z, const typename R::elem* u, const float* state0,
                                     typename R::elem* dx, float* dg, float* d_state0, float* kept,
                                     float* products, int T, int H, int K, int V, int per_segment, float scale,
                                     int keep_end) {
    using E = typename R::elem;
    constexpr int LDV = 8 * NT + PAD, LDD = 16 + PAD, N = KEY_BUFFERS<R, NT>, ROWS = REVERSE ? QUERY_ROWS : 16;
    DYNAMIC_SHARED(memory);
    const int warp = warp_id(), lane = lane_id(), warps = blockDim.x / WARP;
    const int columns = 16 * warps, ldx = columns + PAD;
    float* sg = reinterpret_cast<float*>(memory);
    E* sz = reinterpret_cast<E*>(sg + N * STAGE * ldx);
    E* su = sz + N * STAGE * LDV;
    E* sx = su + N * STAGE * LDV;
    E* sy = sx + N * STAGE * ldx;
    E* outer_x = sy + N * STAGE * ldx;
    E* inner_x = outer_x + STAGE * ldx;
    E* sd = inner_x + BLOCKS * QUERY_ROWS * ldx;
    float* last = reinterpret_cast<float*>(sd + STAGE * LDD);
    float* diagonal = last + BLOCKS * columns;
    float* flow = diagonal + STAGE + 16 * warp;

    const int slices = ceil_div(K, 128), tiles = ceil_div(K, 16);
    const int spans = ceil_div(T, SPAN), all_stages = ceil_div(T, STAGE);
    const Segment segment(T, per_segment);
    const int stages = segment.last - segment.first;
    const long long bh = blockIdx.x / slices, batch = bh / H, h = bh % H;
    const int k0 = blockIdx.x % slices * 128, width = min(K - k0, columns), mine = width - 16 * warp;
    const int tile = k0 / 16 + warp, c0 = 16 * warp;
    // Warps beyond K only help with D.
    const bool useful = mine > 0;
    const long long row_k = (long long)H * K, row_v = (long long)H * V, at_k = batch * T * row_k + h * K + k0;
    x += at_k, y += at_k, g += at_k, dx += at_k;
    if (REVERSE) dg += at_k;
    z += batch * T * row_v + h * V;
    u += batch * T * row_v + h * V;
    const auto state_at = [&](int span) {
        return kept + (((bh * spans + span - 1) * tiles + tile) * (NT / 2) * WARP + lane) * 8;
    };

    const auto product_at = [&](int block) {
        return products + (((bh * ceil_div(T, 16) + block) * tiles + tile) * WARP + lane) * 8;
    };
    const Rows<float, 1> rows_g({g}, row_k, width, {sg}, columns, ldx);
    const Rows<E, 2> rows_xy({x, y}, row_k, width, {sx, sy}, columns, ldx);
    const Rows<E, 2> rows_zu({z, u}, row_v, V, {sz, su}, 8 * NT, LDV);
    const auto fetch = [&](int i) {
        const int t0 = segment.stage(i, REVERSE) * STAGE, tokens = min(STAGE, T - t0);
        rows_g.fetch(i % N, t0, tokens);
        rows_xy.fetch(i % N, t0, tokens);
        rows_zu.fetch(i % N, t0, tokens);
        cp_async_commit();
        if (REVERSE && useful)
#pragma unroll
            for (int block = 0; block < BLOCKS; block++)
                if (t0 + 16 * block < T) prefetch(product_at(t0 / 16 + block));
    };
    if (N == 2) fetch(0);
    float s[NT][4];
    const long long start = (blockIdx.y * (gridDim.x / slices) + bh) * K * V + (long long)(k0 + c0) * V;
    load_rows(s, state0 ? state0 + start : nullptr, mine, V);
    // In reverse, <S, dS> at the end of the block for the lane's four columns.
    float through[2][2] = {};
    const bool pair = can_pair(dx, row_k, width), pair_g = REVERSE && can_pair(dg, row_k, width);
    const auto keep_state = [&](int span) {
        if (!useful) return;
        float* p = state_at(span);
#pragma unroll
        for (int j = 0; j < NT; j += 2) keep(p + j / 2 * WARP * 8, s[j], s[j + 1]);
    };

    for (int i = 0; i < stages; i++) {
        const int stage = segment.stage(i, REVERSE), t0 = stage * STAGE, at = i % N;
        if (N == 1) {
            __syncthreads();
            fetch(i);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (N == 2 && i + 1 < stages) fetch(i + 1);
        float* tg = sg + at * STAGE * ldx + c0;
        const E* tx = sx + at * STAGE * ldx + c0;
        const E* ty = sy + at * STAGE * ldx + c0;
        const E* tz = sz + at * STAGE * LDV;
        const E* tu = su + at * STAGE * LDV;

        // D, of which z and u are the two sides: rows are those of do.
        for (int unit = warps - 1 - warp; unit < 2 * BLOCKS; unit += warps) {
            const int block = unit / 2, half = unit % 2, c = acc_col(half, 0);
            float d[4];
            narrow_product<R>(d, (REVERSE ? tu : tz) + 16 * block * LDV,
                              (REVERSE ? tz : tu) + (16 * block + 8 * half) * LDV, LDV, V);
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int r = acc_row(0, e);
                if (c == r) diagonal[16 * block + r] = d[e];
                if (c + 1 == r) diagonal[16 * block + r] = d[e + 1];
                store2(sd + (16 * block + r) * LDD + c, c >= r ? 0.f : d[e], c + 1 >= r ? 0.f : d[e + 1]);
            }
        }
        // A warp's own columns.
#pragma unroll 1
        for (int block = 0; block < BLOCKS; block++) {
            const int at = 16 * block * ldx;
            const Decays decays(tg + at, ldx);
            E* inner = inner_x + ROWS * block * ldx + c0;
            if (REVERSE) decays.queries(tx + at, outer_x + at + c0, inner, ldx, scale);
            else decays.keys(tx + at, outer_x + at + c0, inner, ldx);
            decays.total(last + block * columns + c0);
#pragma unroll
            for (int i = 0; i < 4; i++)
                store2(tg + at + (decays.row + i) * ldx + decays.col, decays.l[i].x, decays.l[i].y);
        }
        __syncthreads();

        if (!REVERSE && t0 > 0 && t0 % SPAN == 0) keep_state(t0 / SPAN);
        if (useful && REVERSE && (stage + 1 == all_stages ? state0 != nullptr : (t0 + STAGE) % SPAN == 0)) {
            const float* p = state_at(stage + 1 == all_stages ? spans : (t0 + STAGE) / SPAN);
            float sums[2] = {};
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                float a[2][4];
                recall(p + j / 2 * WARP * 8, a[0], a[1]);
#pragma unroll
                for (int nt = 0; nt < 2; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sums[e / 2] += a[nt][e] * operand<R>(s[j + nt][e]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = row_sum(sums[half]);
                if (lane % 4 == 0) flow[acc_row(0, 2 * half)] = sum;
            }
            __syncwarp();
#pragma unroll
            for (int nt = 0; nt < 2; nt++)
#pragma unroll
                for (int e = 0; e < 2; e++) through[nt][e] = flow[acc_col(nt, e)];
            __syncwarp();
        }

#pragma unroll 1
        for (int n = 0; n < (useful ? BLOCKS : 0); n++) {
            const int block = REVERSE ? BLOCKS - 1 - n : n, r0 = 16 * block, sub = t0 / 16 + block;
            if (t0 + r0 >= T) continue;
            // Through the state; inside the block, without its diagonal, forward for each anchor.
            float outer[2][4] = {}, inner[2][4] = {}, later[2][4] = {};
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                FragB<R> fb[2];
                acc_as_b<R>(fb, s[j], s[j + 1]);
                const FragA<R> fa = load_a<R, AlongK>(tz + r0 * LDV + 8 * j, LDV);
                mma<R>(outer[0], fa, fb[0]);
                mma<R>(outer[1], fa, fb[1]);
            }
            float qdq[2][4];
            if (REVERSE) recall(product_at(sub), qdq[0], qdq[1]);
            {
                const E* rows = inner_x + ROWS * block * ldx + c0;
                const FragA<R> d = load_a<R, REVERSE ? AlongMN : AlongK>(sd + r0 * LDD, LDD);
                FragB<R> fb[2];
                load_b<R, AlongMN>(fb, rows, ldx);
                const FragA<R> first = part<R>(d, REVERSE ? 0 : -1, REVERSE ? -1 : 0);
                const FragA<R> second = part<R>(d, 1, 1);
                mma<R>(inner[0], first, fb[0]);
                mma<R>(inner[1], first, fb[1]);
                if (REVERSE) load_b<R, AlongMN>(fb, rows + 8 * ldx, ldx);
                mma<R>(REVERSE ? inner[0] : later[0], second, fb[0]);
                mma<R>(REVERSE ? inner[1] : later[1], second, fb[1]);
            }
            float total[2][4], outer_product[2][4], inner_product[2][4];
            bool opaque[2][2];
#pragma unroll
            for (int nt = 0; nt < 2; nt++) {
                const int c = acc_col(nt, 0);
                const float* l = tg + r0 * ldx + c;
                const float2 m[2] = {load2(l + ANCHORS[0] * ldx), load2(l + ANCHORS[1] * ldx)};
                const float2 end = load2(l + 15 * ldx);
                opaque[nt][0] = end.x < LOG2E * OPAQUE<R>, opaque[nt][1] = end.y < LOG2E * OPAQUE<R>;
                // Factors and products as in Decays, so that they are rounded alike.
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int r = acc_row(0, 2 * half), at = (r0 + r) * ldx + c;
                    const float2 lr = load2(l + r * ldx), ys = load2(ty + at), xs = load2(tx + at), a = m[half];
                    const float2 from =
                        REVERSE ? Decays::exp2_of(end.x - a.x, end.y - a.y) : Decays::exp2_of(a.x, a.y);
                    const float2 f = REVERSE ? Decays::exp2_of(a.x - lr.x, a.y - lr.y)
                                             : Decays::exp2_of(lr.x - a.x, lr.y - a.y);
                    float2 g = f;
                    if (!REVERSE && half) g = Decays::exp2_of(lr.x - m[0].x, lr.y - m[0].y);
                    const float own = diagonal[r0 + r];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int i = 2 * half + e;
                        const float factor = e ? f.y : f.x, outer_factor = factor * (e ? from.y : from.x);
                        const float first_factor = e ? g.y : g.x, x = e ? xs.y : xs.x;
                        const float y = REVERSE ? (e ? ys.y : ys.x) : scale * (e ? ys.y : ys.x);
                        outer_product[nt][i] = operand<R>(y * outer_factor) * outer[nt][i];
                        const float nearer = !REVERSE && half ? later[nt][i] : inner[nt][i];
                        inner_product[nt][i] = operand<R>(y * factor) * nearer;
                        float sum = outer_factor * outer[nt][i] + factor * nearer;
                        if (!REVERSE && half) {
                            inner_product[nt][i] += operand<R>(y * first_factor) * inner[nt][i];
                            sum += first_factor * inner[nt][i];
                        }
                        total[nt][i] = REVERSE ? sum + scale * own * x : scale * (sum + own * x);
                    }
                }
            }
            store_block(dx + (t0 + r0) * row_k + c0, row_k, T - t0 - r0, mine, total[0], total[1], pair);
            if (!REVERSE) {
#pragma unroll
                for (int nt = 0; nt < 2; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) inner_product[nt][e] += outer_product[nt][e];
                keep(product_at(sub), inner_product[0], inner_product[1]);
            } else {
                const bool sparse =
                    __any_sync(FULL, opaque[0][0] || opaque[0][1] || opaque[1][0] || opaque[1][1]);
                // Rows g and g + 8 of a column; what is inside the block counts from each row on, what leaves
                // it through the state up to each row, or, where all else passes through as well, from each row
                // on.
#pragma unroll
                for (int nt = 0; nt < 2; nt++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float low = qdq[nt][e] - inner_product[nt][e];
                        float high = qdq[nt][2 + e] - inner_product[nt][2 + e];
                        float low_out = outer_product[nt][e], high_out = outer_product[nt][2 + e];
                        float passing = through[nt][e];
                        if (sparse) {
#pragma unroll
                            for (int o = 4; o < WARP; o *= 2) {
                                const float l = __shfl_up_sync(FULL, low_out, o);
                                const float r = __shfl_up_sync(FULL, high_out, o);
                                if (lane >= o) low_out += l, high_out += r;
                            }
                            const float half = __shfl_sync(FULL, low_out, WARP - 4 + lane % 4);
                            const float all = half + __shfl_sync(FULL, high_out, WARP - 4 + lane % 4);
                            // Without the row itself.
                            const float l = __shfl_up_sync(FULL, low_out, 4);
                            const float r = __shfl_up_sync(FULL, high_out, 4);
                            low_out = lane < 4 ? 0.f : l;
                            high_out = lane < 4 ? half : half + r;
                            passing = opaque[nt][e] ? 0.f : passing - all;
                        } else {
                            low -= low_out, high -= high_out;
                            low_out = high_out = 0.f;
                        }
#pragma unroll
                        for (int o = 4; o < WARP; o *= 2) {
                            const float l = __shfl_down_sync(FULL, low, o), r = __shfl_down_sync(FULL, high, o);
                            if (lane + o < WARP) low += l, high += r;
                        }
                        low += __shfl_sync(FULL, high, lane % 4) + low_out + passing;
                        high += high_out + passing;
                        qdq[nt][e] = low, qdq[nt][2 + e] = high;
                        through[nt][e] = __shfl_sync(FULL, low, lane % 4);
                    }
                }
                store_block(dg + (t0 + r0) * row_k + c0, row_k, T - t0 - r0, mine, qdq[0], qdq[1], pair_g);
            }

            const float low = last[block * columns + c0 + acc_row(0, 0)];
            const float high = last[block * columns + c0 + acc_row(0, 2)];
            const FragA<R> fu = load_a<R, AlongMN>(outer_x + r0 * ldx + c0, ldx);
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                FragB<R> fb[2];
                load_b<R, AlongMN>(fb, tu + r0 * LDV + 8 * j, LDV);
#pragma unroll
                for (int nt = 0; nt < 2; nt++) {
                    s[j + nt][0] *= low, s[j + nt][1] *= low, s[j + nt][2] *= high, s[j + nt][3] *= high;
                    mma<R>(s[j + nt], fu, fb[nt]);
                }
            }
        }
    }
    if (!REVERSE && keep_end && segment.last == all_stages) keep_state(spans);
    if (REVERSE && d_state0 && useful && segment.first == 0)
        store_rows(s, d_state0 + bh * K * V + (long long)(k0 + c0) * V, mine, V);
}

// The state before every segment, in reverse after it, from what becomes of zeros in a segment, in its place.
// ends [segments][B,H,K,V], decays [segments][B,H,K], start [B,H,K,V] or none. Grid: (B H, K V / 256).
extern "C" __global__ void __launch_bounds__(256)
    gla_scan(float* ends, const float* decays, const float* start, int segments, int K, int V, int reverse) {
    const int i = blockIdx.y * 256 + threadIdx.x, size = K * V;
    if (i >= size) return;
    float s = start ? start[(long long)blockIdx.x * size + i] : 0.f;
    for (int n = 0; n < segments; n++) {
        const long long at = (long long)(reverse ? segments - 1 - n : n) * gridDim.x + blockIdx.x;
        const float end = ends[at * size + i];
        ends[at * size + i] = s;
        s = decays[at * K + i / V] * s + end;
    }
}

#define VALUES(NAME, STATES, N_MAX, THREADS, SUFFIX, R)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME##_n##N_MAX##_##SUFFIX(                       \
        const R::elem* q, const R::elem* k, const float* g, const R::elem* z, const float* state0,             \
        R::elem* out, float* state1, float* decays, int T, int H, int K, int V, int slices, int per_segment,   \
        float scale, int reverse) {                                                                            \
        values<R, N_MAX / 8, STATES>(q, k, g, z, state0, out, state1, decays, T, H, K, V, slices, per_segment, \
                                     scale, reverse);                                                          \
    }
#define KEYS(NAME, REVERSE, N_MAX, BLOCKS, SUFFIX, R)                                                          \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) NAME##_n##N_MAX##_##SUFFIX(                      \
        const R::elem* x, const R::elem* y, const float* g, const R::elem* z, const R::elem* u,                \
        const float* state0, R::elem* dx, float* dg, float* d_state0, float* kept, float* products, int T,     \
        int H, int K, int V, int per_segment, float scale, int keep_end) {                                     \
        keys<R, N_MAX / 8, REVERSE>(x, y, g, z, u, state0, dx, dg, d_state0, kept, products, T, H, K, V,       \
                                    per_segment, scale, keep_end);                                             \
    }
#define KERNELS(N_MAX, THREADS, KEY_BLOCKS, SUFFIX, R)      \
    VALUES(gla_values, false, N_MAX, THREADS, SUFFIX, R)    \
    VALUES(gla_states, true, N_MAX, THREADS, SUFFIX, R)     \
    KEYS(gla_dq, false, N_MAX, KEY_BLOCKS, SUFFIX, R)       \
    KEYS(gla_dk, true, N_MAX, KEY_BLOCKS, SUFFIX, R)
#define ROUTE(SUFFIX, R)            \
    KERNELS(64, 512, 2, SUFFIX, R)  \
    KERNELS(128, 512, 1, SUFFIX, R) \
    KERNELS(256, 256, 1, SUFFIX, R)
ROUTE(bf16, Bf16)
ROUTE(tf32, Tf32)
ROUTE(f32, F32)
