// Gated linear attention (Yang et al. 2024, arXiv:2312.06635, eq. 3): a matrix state whose rows decay on their own.
//
//   q, k [B,T,H,K]  v, o [B,T,H,V]  in the activations' type;  g [B,T,H,K] log decays, at most 0, and states [B,H,K,V] f32
//
// The sequence is cut into blocks of 16 tokens. With l = the inclusive sum of g from the block's start, its last row
// L, the state S0 before the block, S1 after it, and row vectors:
//
//   o_i = (q'_i S0 + sum_{j <= i} A_ij v_j)      A_ij = scale sum_k q_ik k_jk exp(l_ik - l_jk)
//   S1  = diag(exp L) S0 + sum_j k'_j^T v_j      q'_i = scale q_i exp(l_i),  k'_j = k_j exp(L - l_j)
//
// All exponents are at most 0. So short a block makes the chunked form as cheap as it gets: its work between tokens
// and state is the same for every length, and only the work inside a block grows. A is the product of q' exp(-L) and
// k', where the exponent of a block stays within LIMIT; a stronger decay would overflow, and is then summed channel by
// channel from differences.
//
// Gradients, with dS1 that of the state after the block and D_ij = do_i . v_j:
//
//   dv_j = k'_j dS1 + sum_{i >= j} A_ij do_i
//   dS0  = diag(exp L) dS1 + sum_i q'_i^T do_i
//   dq_i = scale (exp(l_i) (do_i S0^T) + sum_{j <= i} D_ij k_j exp(l_i - l_j))
//   dk_j = exp(L - l_j) (v_j dS1^T) + sum_{i >= j} D_ij scale q_i exp(l_i - l_j)
//   dg_t = <S1, dS1>_k + sum_{i >= t} (q_i dq_i - k_i dk_i)
//
// dg without the terms i = j, which cancel, and with <S1, dS1> computed anew every SPAN tokens: between them it is the
// dg of the block's first token. Its other terms cancel in part, too, so that both of its products are made of the very
// operands that the tensor cores multiplied, rounded as they were: what is then left is right but for f32's rounding.
//
// Value columns are independent of each other in o and dv, key rows in dq and dk. Hence two kernels, each forward and
// backward in time with exchanged roles, each with the state that it needs whole in registers:
//
//   gla_values  forward: o and the final state; in reverse: dv. A warp has 16 columns of V.
//   gla_keys    forward: dq, and for the next the states every SPAN tokens and q dq; in reverse: dk, dg and the
//               gradient of the initial state. A warp has 16 rows of K.
//
// Nothing is kept from the forward pass. No atomics; every sum has one order.
#include "chunk.cuh"

// Tokens that are in shared memory at a time, in blocks of 16; tokens between two states that are kept.
constexpr int STAGE = 32, BLOCKS = STAGE / 16, SPAN = 256;

// The largest -L for which exp(-L) is used as a factor: two factors of that size stay in range, and on the route
// for f32 their rounding stays below 1e-5.
template <class R> constexpr float LIMIT = 60.f;
template <> constexpr float LIMIT<F32> = 20.f;

// What a product on route R makes of an operand.
template <class R>
__device__ __forceinline__ float operand(float x) {
    if constexpr (__is_same(R, Bf16)) return to_f(from_f<bf16>(x));
    if constexpr (__is_same(R, Tf32)) return __uint_as_float(to_tf32(x));
    return x;
}

// Log decays below this count as this: what is left, 1e-14, is nothing, and the sums of a block keep their digits.
constexpr float NEVER = -32.f;

// Where a channel decays by more than this in a block, what passes through the whole block is nothing beside what the
// route rounds.
template <class R> constexpr float OPAQUE = -7.f;
template <> constexpr float OPAQUE<Tf32> = -9.f;
template <> constexpr float OPAQUE<F32> = -16.f;

// Buffers for stages: with two the next is on its way during the work on this one.
template <class R, int NT> constexpr int BUFFERS = sizeof(typename R::elem) == 4 && NT == 32 ? 1 : 2;

// Sums g [STAGE][ldg] up inside its blocks, in place, and multiplies x [STAGE][ldx] by the exponentials: as q (`scale`
// exp(l)) or as k (exp(L - l)). exp(L) to `last` [BLOCKS][columns]. Returns whether a block decays by more than LIMIT.
template <class R>
__device__ __forceinline__ bool decay_tile(float* g, int ldg, typename R::elem* x, int ldx, typename R::elem* y, int ldy,
                                           float* last, int columns, float scale) {
    bool strong = false;
    for (int task = threadIdx.x; task < BLOCKS * columns / 2; task += blockDim.x) {
        const int block = task / (columns / 2), c = task % (columns / 2) * 2;
        float2 sum = make_float2(0.f, 0.f);
        float* l = g + 16 * block * ldg + c;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 v = load2(l + i * ldg);
            sum.x += fmaxf(v.x, NEVER), sum.y += fmaxf(v.y, NEVER);
            store2(l + i * ldg, sum.x, sum.y);
        }
        strong |= sum.x < -LIMIT<R> || sum.y < -LIMIT<R>;
        store2(last + block * columns + c, exp_neg(sum.x), exp_neg(sum.y));
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 v = load2(l + i * ldg);
            if (x) {
                typename R::elem* p = x + (16 * block + i) * ldx + c;
                const float2 q = load2(p);
                store2(p, scale * q.x * exp_neg(v.x), scale * q.y * exp_neg(v.y));
            }
            if (y) {
                typename R::elem* p = y + (16 * block + i) * ldy + c;
                const float2 k = load2(p);
                store2(p, k.x * exp_neg(sum.x - v.x), k.y * exp_neg(sum.y - v.y));
            }
        }
    }
    return strong;
}

// exp of a number up to LIMIT.
__device__ __forceinline__ float exp_up(float x) { return __expf(x); }

// z: v (in reverse do). out: o (in reverse dv). state0 and state1 [B,H,K,V]: the state before the first and after the
// last token, in reverse its gradient after the last token and none.
// Grid: B H slices. Block: a warp for 16 columns of V, at most 8; a slice has as many as the block's warps.
// Shared memory, BUFFERS times: q, k [STAGE][8 NT + PAD], z [STAGE][16 warps + PAD], g f32 [STAGE][8 NT + PAD]; then
// A [STAGE][16 + PAD], f32 exp(L) [BLOCKS][8 NT].
template <class R, int NT>
__device__ __forceinline__ void values(const typename R::elem* q, const typename R::elem* k, const float* g,
                                       const typename R::elem* z, const float* state0, typename R::elem* out,
                                       float* state1, int T, int H, int K, int V, int slices, float scale, int reverse) {
    using E = typename R::elem;
    constexpr int COLS = 8 * NT, LD = COLS + PAD, LDA = 16 + PAD, N = BUFFERS<R, NT>;
    DYNAMIC_SHARED(memory);
    const int warp = warp_id(), lane = lane_id(), warps = blockDim.x / WARP, ldz = 16 * warps + PAD;
    float* sg = reinterpret_cast<float*>(memory);
    E* sq = reinterpret_cast<E*>(sg + N * STAGE * LD);
    E* sk = sq + N * STAGE * LD;
    E* sz = sk + N * STAGE * LD;
    E* sa = sz + N * STAGE * ldz;
    float* last = reinterpret_cast<float*>(sa + STAGE * LDA);

    const long long bh = blockIdx.x / slices, batch = bh / H, h = bh % H;
    const int v0 = blockIdx.x % slices * 16 * warps, width = min(V - v0, 16 * warps), mine = width - 16 * warp;
    const long long row_k = (long long)H * K, row_v = (long long)H * V;
    const int stages = ceil_div(T, STAGE);
    q += batch * T * row_k + h * K;
    k += batch * T * row_k + h * K;
    g += batch * T * row_k + h * K;
    z += batch * T * row_v + h * V + v0;
    out += batch * T * row_v + h * V + v0;

    const auto fetch = [&](int i) {
        const int t0 = (reverse ? stages - 1 - i : i) * STAGE, tokens = min(STAGE, T - t0), at = i % N;
        fetch_tile(sg + at * STAGE * LD, LD, g + t0 * row_k, row_k, tokens, K, STAGE, COLS);
        fetch_tile(sq + at * STAGE * LD, LD, q + t0 * row_k, row_k, tokens, K, STAGE, COLS);
        fetch_tile(sk + at * STAGE * LD, LD, k + t0 * row_k, row_k, tokens, K, STAGE, COLS);
        fetch_tile(sz + at * STAGE * ldz, ldz, z + t0 * row_v, row_v, tokens, width, STAGE, 16 * warps);
        cp_async_commit();
    };
    // The state, transposed: rows are columns of V.
    float s[NT][4];
    const float* start = state0 ? state0 + bh * K * V + v0 + 16 * warp : nullptr;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int r = acc_row(0, e), c = acc_col(j, e);
            s[j][e] = start && r < mine && c < K ? start[(long long)c * V + r] : 0.f;
        }
    const bool pair = can_pair(out, row_v, width);
    const int k_pad = ceil_div(K, 16) * 16;

    if (N == 2) fetch(0);
    for (int i = 0; i < stages; i++) {
        const int t0 = (reverse ? stages - 1 - i : i) * STAGE, at = i % N;
        if (N == 1) {
            __syncthreads();
            fetch(i);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (N == 2 && i + 1 < stages) fetch(i + 1);
        float* tg = sg + at * STAGE * LD;
        E* tq = sq + at * STAGE * LD;
        E* tk = sk + at * STAGE * LD;
        const E* tz = sz + at * STAGE * ldz + 16 * warp;
        const bool strong = __syncthreads_or(decay_tile<R>(tg, LD, tq, LD, tk, LD, last, COLS, scale));

        if (strong) {
            // A warp for an element of A, its lanes along K.
            for (int n = warp; n < STAGE * 16; n += warps) {
                const int r = n / 16, c = r / 16 * 16 + n % 16;
                float sum = 0.f;
                if (c <= r && t0 + r < T)
                    for (int x = lane; x < K; x += WARP)
                        sum += to_f(q[(t0 + r) * row_k + x]) * to_f(k[(t0 + c) * row_k + x]) *
                               exp_neg(tg[r * LD + x] - tg[c * LD + x]);
                sum = warp_sum(sum);
                if (lane == 0) sa[r * LDA + n % 16] = from_f<E>(scale * sum);
            }
        } else {
            for (int block = 0; block < BLOCKS; block++) {
                if (warp != warps - 1 - block % warps) continue;
                float a[2][4] = {};
                const float* l = tg + (16 * block + 15) * LD;
                for (int x = 0; x < k_pad; x += 16) {
                    FragA<R> fa = load_a<R, AlongK>(tq + 16 * block * LD + x, LD);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float2 v = load2(l + x + 2 * (lane % 4) + 8 * half);
                        const float up = exp_up(-v.x), right = exp_up(-v.y);
                        scale_pair(fa, 2 * half, up, right);
                        scale_pair(fa, 2 * half + 1, up, right);
                    }
                    FragB<R> fb[2];
                    load_b<R, AlongK>(fb, tk + 16 * block * LD + x, LD);
                    mma<R>(a[0], fa, fb[0]);
                    mma<R>(a[1], fa, fb[1]);
                }
#pragma unroll
                for (int nt = 0; nt < 2; nt++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int r = acc_row(0, 2 * half), c = acc_col(nt, 0);
                        store2(sa + (16 * block + r) * LDA + c, c > r ? 0.f : a[nt][2 * half],
                               c + 1 > r ? 0.f : a[nt][2 * half + 1]);
                    }
            }
        }
        __syncthreads();

#pragma unroll 1
        for (int n = 0; n < BLOCKS; n++) {
            const int block = reverse ? BLOCKS - 1 - n : n, r0 = 16 * block;
            const E* a = sa + r0 * LDA;
            const E* read = (reverse ? tk : tq) + r0 * LD;
            const E* write = (reverse ? tq : tk) + r0 * LD;
            float o[2][4] = {};
#pragma unroll
            for (int x = 0; x < NT; x += 2) {
                FragB<R> fb[2];
                acc_as_b<R>(fb, s[x], s[x + 1]);
                const FragA<R> fa = load_a<R, AlongK>(read + 8 * x, LD);
                mma<R>(o[0], fa, fb[0]);
                mma<R>(o[1], fa, fb[1]);
            }
            FragB<R> fz[2];
            load_b<R, AlongMN>(fz, tz + r0 * ldz, ldz);
            const FragA<R> fa = reverse ? load_a<R, AlongMN>(a, LDA) : load_a<R, AlongK>(a, LDA);
            mma<R>(o[0], fa, fz[0]);
            mma<R>(o[1], fa, fz[1]);
            store_block(out + (t0 + r0) * row_v + 16 * warp, row_v, T - t0 - r0, mine, o[0], o[1], pair);

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
    if (state1) {
        float* end = state1 + bh * K * V + v0 + 16 * warp;
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = acc_row(0, e), c = acc_col(j, e);
                if (r < mine && c < K) end[(long long)c * V + r] = s[j][e];
            }
    }
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

// Forward: x = k, y = q, z = do, u = v, state0 the state before the first token; writes dx = dq, kept and products.
// In reverse: x = q, y = k, z = v, u = do, state0 the gradient of the state after the last token; writes dx = dk, dg
// and the gradient of the initial state, and reads what the forward call wrote.
// kept [B,H,ceil(T/SPAN),tiles,NT/2,32,8] and products [B,H,ceil(T/16),tiles,32,8] f32, as the lanes hold them;
// tiles = ceil(K/16). The last of `kept`, after the last token, is written only with `keep_end`: without a gradient of
// the final state, state0 none, nobody reads it.
// Grid: B H slices of 128 rows of K. Block: a warp for 16 rows of K, at most 8.
// Shared memory, BUFFERS times: g f32 [STAGE][ldx], z, u [STAGE][8 NT + PAD], x, y [STAGE][ldx] with
// ldx = 16 warps + PAD; then D [STAGE][16 + PAD], f32 exp(L) [BLOCKS][16 warps], D_ii [STAGE], <S, dS> [16 warps].
template <class R, int NT>
__device__ __forceinline__ void keys(const typename R::elem* x, const typename R::elem* y, const float* g,
                                     const typename R::elem* z, const typename R::elem* u, const float* state0,
                                     typename R::elem* dx, float* dg, float* d_state0, float* kept, float* products, int T,
                                     int H, int K, int V, float scale, int reverse, int keep_end) {
    using E = typename R::elem;
    constexpr int LDV = 8 * NT + PAD, LDD = 16 + PAD, N = BUFFERS<R, NT>;
    DYNAMIC_SHARED(memory);
    const int warp = warp_id(), lane = lane_id(), warps = blockDim.x / WARP, columns = 16 * warps, ldx = columns + PAD;
    float* sg = reinterpret_cast<float*>(memory);
    E* sz = reinterpret_cast<E*>(sg + N * STAGE * ldx);
    E* su = sz + N * STAGE * LDV;
    E* sx = su + N * STAGE * LDV;
    E* sy = sx + N * STAGE * ldx;
    E* sd = sy + N * STAGE * ldx;
    float* last = reinterpret_cast<float*>(sd + STAGE * LDD);
    float* diagonal = last + BLOCKS * columns;
    float* flow = diagonal + STAGE + 16 * warp;

    const int slices = ceil_div(K, 128), tiles = ceil_div(K, 16), spans = ceil_div(T, SPAN), stages = ceil_div(T, STAGE);
    const long long bh = blockIdx.x / slices, batch = bh / H, h = bh % H;
    const int k0 = blockIdx.x % slices * 128, width = min(K - k0, columns), mine = width - 16 * warp;
    const int tile = k0 / 16 + warp, v_pad = ceil_div(V, 16) * 16, c0 = 16 * warp;
    // Warps beyond K take part in barriers only.
    const bool useful = mine > 0;
    const long long row_k = (long long)H * K, row_v = (long long)H * V, at_k = batch * T * row_k + h * K + k0;
    x += at_k, y += at_k, g += at_k, dx += at_k;
    if (dg) dg += at_k;
    z += batch * T * row_v + h * V;
    u += batch * T * row_v + h * V;
    const auto state_at = [&](int span) {
        return kept + (((bh * spans + span - 1) * tiles + tile) * (NT / 2) * WARP + lane) * 8;
    };

    const auto fetch = [&](int i) {
        const int t0 = (reverse ? stages - 1 - i : i) * STAGE, tokens = min(STAGE, T - t0), at = i % N;
        fetch_tile(sg + at * STAGE * ldx, ldx, g + t0 * row_k, row_k, tokens, width, STAGE, columns);
        fetch_tile(sx + at * STAGE * ldx, ldx, x + t0 * row_k, row_k, tokens, width, STAGE, columns);
        fetch_tile(sy + at * STAGE * ldx, ldx, y + t0 * row_k, row_k, tokens, width, STAGE, columns);
        fetch_tile(sz + at * STAGE * LDV, LDV, z + t0 * row_v, row_v, tokens, V, STAGE, 8 * NT);
        fetch_tile(su + at * STAGE * LDV, LDV, u + t0 * row_v, row_v, tokens, V, STAGE, 8 * NT);
        cp_async_commit();
    };
    float s[NT][4];
    load_rows(s, state0 ? state0 + bh * K * V + (long long)(k0 + c0) * V : nullptr, mine, V);
    // In reverse, <S, dS> at the end of the block for the lane's four columns.
    float through[2][2] = {};
    const bool pair = can_pair(dx, row_k, width), pair_g = can_pair(dg, row_k, width);
    const auto keep_state = [&](int span) {
        if (!useful) return;
        float* p = state_at(span);
#pragma unroll
        for (int j = 0; j < NT; j += 2) keep(p + j / 2 * WARP * 8, s[j], s[j + 1]);
    };

    if (N == 2) fetch(0);
    for (int i = 0; i < stages; i++) {
        const int stage = reverse ? stages - 1 - i : i, t0 = stage * STAGE, at = i % N;
        if (N == 1) {
            __syncthreads();
            fetch(i);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (N == 2 && i + 1 < stages) fetch(i + 1);
        float* tg = sg + at * STAGE * ldx;
        E* tx = sx + at * STAGE * ldx;
        const E* ty = sy + at * STAGE * ldx;
        const E* tz = sz + at * STAGE * LDV;
        const E* tu = su + at * STAGE * LDV;

        // D, of which z and u are the two sides: rows are those of do.
        for (int block = 0; block < BLOCKS; block++) {
            if (warp != warps - 1 - block % warps) continue;
            float d[2][4] = {};
            const E* rows = (reverse ? tu : tz) + 16 * block * LDV;
            const E* cols = (reverse ? tz : tu) + 16 * block * LDV;
            for (int v = 0; v < v_pad; v += 16) {
                const FragA<R> fa = load_a<R, AlongK>(rows + v, LDV);
                FragB<R> fb[2];
                load_b<R, AlongK>(fb, cols + v, LDV);
                mma<R>(d[0], fa, fb[0]);
                mma<R>(d[1], fa, fb[1]);
            }
#pragma unroll
            for (int nt = 0; nt < 2; nt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int r = acc_row(0, 2 * half), c = acc_col(nt, 0);
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (c + e == r) diagonal[16 * block + r] = d[nt][2 * half + e];
                    store2(sd + (16 * block + r) * LDD + c, c >= r ? 0.f : d[nt][2 * half],
                           c + 1 >= r ? 0.f : d[nt][2 * half + 1]);
                }
        }
        bool strong = decay_tile<R>(tg, ldx, reverse ? tx : nullptr, ldx, reverse ? nullptr : tx, ldx, last, columns,
                                    scale);
        strong = __syncthreads_or(strong);

        if (!reverse && t0 > 0 && t0 % SPAN == 0) keep_state(t0 / SPAN);
        if (useful && reverse && (stage + 1 == stages ? state0 != nullptr : (t0 + STAGE) % SPAN == 0)) {
            const float* p = state_at(stage + 1 == stages ? spans : (t0 + STAGE) / SPAN);
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
            const int block = reverse ? BLOCKS - 1 - n : n, r0 = 16 * block, sub = t0 / 16 + block;
            if (t0 + r0 >= T) continue;
            float* product = products + (((bh * ceil_div(T, 16) + sub) * tiles + tile) * WARP + lane) * 8;
            // Through the state, and inside the block without its diagonal.
            float outer[2][4] = {}, inner[2][4] = {};
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                FragB<R> fb[2];
                acc_as_b<R>(fb, s[j], s[j + 1]);
                const FragA<R> fa = load_a<R, AlongK>(tz + r0 * LDV + 8 * j, LDV);
                mma<R>(outer[0], fa, fb[0]);
                mma<R>(outer[1], fa, fb[1]);
            }
            const E* d = sd + r0 * LDD;
            if (!strong) {
                FragB<R> fb[2];
                load_b<R, AlongMN>(fb, tx + r0 * ldx + c0, ldx);
                const FragA<R> fa = reverse ? load_a<R, AlongMN>(d, LDD) : load_a<R, AlongK>(d, LDD);
                mma<R>(inner[0], fa, fb[0]);
                mma<R>(inner[1], fa, fb[1]);
            }
            float total[2][4], outer_product[2][4], inner_product[2][4];
            bool opaque[2][2];
#pragma unroll
            for (int nt = 0; nt < 2; nt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int r = acc_row(0, 2 * half), c = c0 + acc_col(nt, 0);
                    const float2 l = load2(tg + (r0 + r) * ldx + c), end = load2(tg + (r0 + 15) * ldx + c);
                    const float2 xs = load2(tx + (r0 + r) * ldx + c), ys = load2(ty + (r0 + r) * ldx + c);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float le = e ? l.y : l.x, ende = e ? end.y : end.x, own = e ? ys.y : ys.x;
                        const float factor = reverse ? exp_neg(ende - le) : scale * exp_neg(le);
                        float& sum = total[nt][2 * half + e];
                        sum = outer[nt][2 * half + e];
                        opaque[nt][e] = ende < OPAQUE<R>;
                        // As the tile of the other call has it.
                        const float here = operand<R>(reverse ? own * exp_neg(ende - le) : scale * own * exp_neg(le));
                        outer_product[nt][2 * half + e] = here * sum;
                        if (strong) {
                            float in = 0.f, diag = 0.f;
                            const int col = c + e;
                            for (int m = 0; col < width && m < 16; m++) {
                                const int t = t0 + r0 + m;
                                if (t >= T || (reverse ? m < r : m > r)) continue;
                                const float xm = scale * to_f(x[t * row_k + col]), lm = tg[(r0 + m) * ldx + col];
                                if (m == r) diag = diagonal[r0 + r] * xm;
                                else in += to_f(reverse ? d[m * LDD + r] : d[r * LDD + m]) * xm *
                                           exp_neg(reverse ? lm - le : le - lm);
                            }
                            inner_product[nt][2 * half + e] = own * in;
                            sum = factor * sum + in + diag;
                        } else {
                            const float up = exp_up(-ende);
                            const float in = inner[nt][2 * half + e] * up;
                            inner_product[nt][2 * half + e] = here * in;
                            sum = factor * (sum + in + diagonal[r0 + r] * (e ? xs.y : xs.x) * up);
                        }
                    }
                }
            store_block(dx + (t0 + r0) * row_k + c0, row_k, T - t0 - r0, mine, total[0], total[1], pair);
            if (!reverse) {
#pragma unroll
                for (int nt = 0; nt < 2; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) inner_product[nt][e] += outer_product[nt][e];
                keep(product, inner_product[0], inner_product[1]);
            } else {
                float qdq[2][4];
                recall(product, qdq[0], qdq[1]);
                const bool sparse = __any_sync(FULL, opaque[0][0] || opaque[0][1] || opaque[1][0] || opaque[1][1]);
                // Rows g and g + 8 of a column; what is inside the block counts from each row on, what leaves it
                // through the state up to each row, or, where all else passes through as well, from each row on.
#pragma unroll
                for (int nt = 0; nt < 2; nt++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float low = qdq[nt][e] - inner_product[nt][e], high = qdq[nt][2 + e] - inner_product[nt][2 + e];
                        float low_out = outer_product[nt][e], high_out = outer_product[nt][2 + e], passing = through[nt][e];
                        if (sparse) {
#pragma unroll
                            for (int o = 4; o < WARP; o *= 2) {
                                const float l = __shfl_up_sync(FULL, low_out, o), r = __shfl_up_sync(FULL, high_out, o);
                                if (lane >= o) low_out += l, high_out += r;
                            }
                            const float half = __shfl_sync(FULL, low_out, WARP - 4 + lane % 4);
                            const float all = half + __shfl_sync(FULL, high_out, WARP - 4 + lane % 4);
                            // Without the row itself.
                            const float l = __shfl_up_sync(FULL, low_out, 4), r = __shfl_up_sync(FULL, high_out, 4);
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

            const float low = last[block * columns + c0 + acc_row(0, 0)], high = last[block * columns + c0 + acc_row(0, 2)];
            const FragA<R> fu = load_a<R, AlongMN>(tx + r0 * ldx + c0, ldx);
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
    if (keep_end) keep_state(spans);
    if (reverse && d_state0 && useful) store_rows(s, d_state0 + bh * K * V + (long long)(k0 + c0) * V, mine, V);
}

#define KERNELS(N_MAX, VALUE_BLOCKS, KEY_BLOCKS, SUFFIX, R)                                                             \
    extern "C" __global__ void __launch_bounds__(256, VALUE_BLOCKS) gla_values_n##N_MAX##_##SUFFIX(                        \
        const R::elem* q, const R::elem* k, const float* g, const R::elem* z, const float* state0, R::elem* out,       \
        float* state1, int T, int H, int K, int V, int slices, float scale, int reverse) {                             \
        values<R, N_MAX / 8>(q, k, g, z, state0, out, state1, T, H, K, V, slices, scale, reverse);                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, KEY_BLOCKS) gla_keys_n##N_MAX##_##SUFFIX(                        \
        const R::elem* x, const R::elem* y, const float* g, const R::elem* z, const R::elem* u, const float* state0,   \
        R::elem* dx, float* dg, float* d_state0, float* kept, float* products, int T, int H, int K, int V,             \
        float scale, int reverse, int keep_end) {                                                                      \
        keys<R, N_MAX / 8>(x, y, g, z, u, state0, dx, dg, d_state0, kept, products, T, H, K, V, scale, reverse,        \
                           keep_end);                                                                                  \
    }
#define ROUTE(SUFFIX, R)          \
    KERNELS(64, 2, 2, SUFFIX, R)  \
    KERNELS(128, 2, 1, SUFFIX, R) \
    KERNELS(256, 1, 1, SUFFIX, R)
ROUTE(bf16, Bf16)
ROUTE(tf32, Tf32)
ROUTE(f32, F32)
