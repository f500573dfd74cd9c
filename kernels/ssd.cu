// State space duality, the recurrence of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, sections 6 and 7), by chunks.
//
//   x [B,T,H,P]  dt [B,T,H]  b, c [B,T,G,N]  in the activations' type;  a_log, d, dt_bias [H]  f32
//   y [B,T,H,P]  in the activations' type;   states [B,H,P,N]  f32
//
// With step = softplus(dt + dt_bias), rate = -exp(a_log), and inside a chunk of C tokens l = the inclusive sum of
// rate step from the chunk's start, S0 the state before it, and row vectors:
//
//   M_ij = (C_i . B_j) exp(l_i - l_j) step_j  for j <= i
//   y_i  = sum_j M_ij x_j + exp(l_i) C_i S0^T + d x_i
//   S1   = exp(l_C) S0 + sum_j exp(l_C - l_j) step_j x_j^T B_j
//
// Gradients, with E = dS1 the gradient of the state after the chunk and Q_ij = (dy_i . x_j) (C_i . B_j) exp(l_i - l_j):
//
//   dx_j = sum_i M_ij dy_i + exp(l_C - l_j) step_j B_j E^T + d dy_j
//   dC_i = sum_j A_ij B_j + exp(l_i) dy_i S0             A_ij = (dy_i . x_j) exp(l_i - l_j) step_j
//   dB_j = sum_i A_ij C_i + exp(l_C - l_j) step_j x_j E
//   dS0  = exp(l_C) E + sum_i exp(l_i) dy_i^T C_i
//   dlog_t  (of rate step_t) = sum_{i >= t > j} Q_ij step_j + sum_{i >= t} exp(l_i) dy_i . (C_i S0^T)
//                              + sum_{j < t} step_j r_j + exp(l_C) <S0, E>,   r_j = exp(l_C - l_j) x_j . (B_j E^T)
//   dstep_t = sum_i Q_it + r_t + rate dlog_t
//
// Kernels:
//   ssd_forward   a block goes through the chunks of one (batch, head, 128 rows of P), or of several heads with few
//                 rows, the state in registers
//   ssd_states    the state alone: in reverse the gradient of the state at every chunk's end, forward the parts of a
//                 sequence that is cut into segments; ssd_scan joins the segments
//   ssd_grads     all other gradients: a block has one chunk and several heads, so that those of B and C are summed
//                 over heads in registers; ssd_sum adds what the blocks of a chunk have, columns_final the parameters'
// No atomics; every sum has one order.
#include "chunk.cuh"

// Numbers per token of a chunk, C of each, in shared memory.
enum { L, STEP, WEIGHT, DECAY, TAIL, KINDS };

// One warp: l to base 2, step, exp(l_C - l) step, exp(l) and exp(l_C - l) of a chunk's tokens. Lane i has tokens
// PER i ...; raw values beyond the sequence are not used. Returns the lane's steps in `raw`.
template <int C>
__device__ __forceinline__ void chunk_decays(float* s, float (&raw)[C / WARP], int tokens, float bias, float rate) {
    constexpr int PER = C / WARP;
    const int lane = lane_id();
    float l[PER], sum = 0.f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        raw[i] = PER * lane + i < tokens ? softplus(raw[i] + bias) : 0.f;
        sum += LOG2E * fmaxf(rate * raw[i], NEVER);
        l[i] = sum;
    }
    float before = sum;
#pragma unroll
    for (int o = 1; o < WARP; o *= 2) {
        const float other = __shfl_up_sync(FULL, before, o);
        if (lane >= o) before += other;
    }
    before = __shfl_up_sync(FULL, before, 1);
#pragma unroll
    for (int i = 0; i < PER; i++)
        if (lane > 0) l[i] += before;
    // That of the last token, so that its own exponent is 0.
    const float total = __shfl_sync(FULL, l[PER - 1], WARP - 1);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const float tail = exp2_neg(total - l[i]);
        float* at = s + PER * lane + i;
        at[L * C] = l[i];
        at[STEP * C] = raw[i];
        at[WEIGHT * C] = tail * raw[i];
        at[DECAY * C] = exp2_neg(l[i]);
        at[TAIL * C] = tail;
    }
}

// A lane's raw steps, read ahead of chunk_decays.
template <int C, class E>
__device__ __forceinline__ void read_steps(float (&raw)[C / WARP], const E* dt, int tokens, int heads) {
    constexpr int PER = C / WARP;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int t = PER * lane_id() + i;
        raw[i] = t < tokens ? to_f(dt[(long long)t * heads]) : 0.f;
    }
}

// s = decay s + sum_t weight_t u_t^T v_t for rows [16 x 8 NT] of a state, the accumulators of one warp; u [C x 16] and
// v [C x 8 NT] have rows of tokens.
template <class R, int NT>
__device__ __forceinline__ void update(float (&s)[NT][4], float decay, const float* weight, const typename R::elem* u,
                                       int ldu, const typename R::elem* v, int ldv) {
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] *= decay;
#pragma unroll 1
    for (int k = 0; k < CHUNK<R>; k += 16) {
        FragA<R> a = load_a<R, AlongMN>(u + k * ldu, ldu);
        scale_k(a, weight + k);
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            FragB<R> b[2];
            load_b<R, AlongMN>(b, v + k * ldv + 8 * j, ldv);
            mma<R>(s[j], a, b[0]);
            mma<R>(s[j + 1], a, b[1]);
        }
    }
}

// Which rows of the states a block and its warps carry: all of P of `heads` neighbouring heads of a group (P a
// multiple of 16), or up to 128 rows of one head. Heads lie side by side in x, so the block's tokens are one
// tile either way.
struct Rows {
    int first, h, p0;   // the block's first head; the warp's head and its first row of P
    int own;            // the warp's head, from the block's first
    int at, width;      // columns of x from the block's first head on, and how many
    int rows;           // the warp's rows from p0 on; may be negative
    long long batch, bh, segment;
};
__device__ __forceinline__ Rows block_rows(int H, int P, int heads) {
    const int warp = warp_id(), warps = blockDim.x / WARP, per_head = warps / heads, slices = ceil_div(P, 128);
    const int block = blockIdx.x / slices;
    Rows r;
    r.at = 128 * (blockIdx.x % slices);
    r.first = block % (H / heads) * heads;
    r.own = heads > 1 ? warp / per_head : 0;
    r.h = r.first + r.own;
    r.batch = block / (H / heads);
    r.bh = r.batch * H + r.h;
    r.segment = (long long)blockIdx.y * (gridDim.x / slices) * heads + r.bh;
    r.p0 = r.at + 16 * (warp - r.own * per_head);
    r.width = heads > 1 ? heads * P : min(P - r.at, 16 * warps);
    r.rows = P - r.p0;
    return r;
}

// Grid: (B H / heads slices of 128 rows of P, segments). Block: a warp for 16 rows of P, at most 8.
// Shared memory: see `carrying` in src/ops/ssd/cuda.rs; ldx = 16 warps + PAD, ldn = 8 NT + PAD:
//   x [2][C][ldx], b [2][C][ldn], c [C][ldn], M [heads][C][C + PAD], then f32 [heads][2][KINDS][C].
// SHARE: whether there are several heads, which costs registers.
// state0 [segments][B,H,P,N]: before every segment's first token, or none; state1: after the last token.
// saved [B,H,chunks,P,N] in the activations' type: the states before every chunk, or none.
template <class R, int NT, bool SHARE>
__device__ __forceinline__ void forward(const typename R::elem* x, const typename R::elem* dt, const float* a_log,
                                        const typename R::elem* b, const typename R::elem* c, const float* d,
                                        const float* dt_bias, const float* state0, typename R::elem* y, float* state1,
                                        typename R::elem* saved, int T, int H, int P, int G, int N, int per_segment,
                                        int heads) {
    using E = typename R::elem;
    constexpr int C = CHUNK<R>, LDN = 8 * NT + PAD, LDM = C + PAD, MT = C / 16;
    DYNAMIC_SHARED(memory);
    const int warp = warp_id(), warps = blockDim.x / WARP, ldx = 16 * warps + PAD;
    if constexpr (!SHARE) heads = 1;
    E* sx = reinterpret_cast<E*>(memory);
    E* sb = sx + 2 * C * ldx;
    E* sc = sb + 2 * C * LDN;
    E* sm = sc + C * LDN;
    float* decays = reinterpret_cast<float*>(sm + heads * C * LDM);

    const Rows at_rows = block_rows(H, P, heads);
    const int width = at_rows.width, rows = at_rows.rows, h = at_rows.h;
    const long long batch = at_rows.batch, bh = at_rows.bh;
    const E* const own_m = sm + at_rows.own * C * LDM;
    const float* const own_decays = decays + at_rows.own * 2 * KINDS * C;
    float* const made_decays = decays + warp * 2 * KINDS * C;
    const int chunks = ceil_div(T, C), first = blockIdx.y * per_segment, last = min(chunks, first + per_segment);
    const int n_pad = ceil_div(N, 16) * 16;
    const int row_x = H * P, row_b = G * N, size = P * N;
    const int group = h / (H / G);
    x += batch * T * row_x + (long long)at_rows.first * P + at_rows.at;
    y += batch * T * row_x + (long long)at_rows.first * P + at_rows.at;
    b += (batch * T * G + group) * N;
    c += (batch * T * G + group) * N;
    const float skip = d[h];
    const int warp_at = at_rows.p0 * N;
    // The first warps make the decays, of a head each.
    const int made = at_rows.first + min(warp, heads - 1);
    const float rate = -__expf(a_log[made]), bias = dt_bias[made];
    dt += batch * T * H + made;

    const auto fetch_xb = [&](int chunk) {
        const int t0 = chunk * C, tokens = min(C, T - t0), at = (chunk - first) % 2;
        fetch_tile(sx + at * C * ldx, ldx, x + (long long)t0 * row_x, row_x, tokens, width, C, 16 * warps);
        fetch_tile(sb + at * C * LDN, LDN, b + (long long)t0 * row_b, row_b, tokens, N, C, 8 * NT);
    };
    const auto fetch_c = [&](int chunk) {
        const int t0 = chunk * C;
        fetch_tile(sc, LDN, c + (long long)t0 * row_b, row_b, min(C, T - t0), N, C, 8 * NT);
    };

    fetch_xb(first);
    fetch_c(first);
    cp_async_commit();
    if (warp < heads) {
        float raw[C / WARP];
        read_steps<C>(raw, dt + (long long)first * C * H, T - first * C, H);
        chunk_decays<C>(made_decays, raw, T - first * C, bias, rate);
    }
    float s[NT][4];
    load_rows(s, state0 ? state0 + at_rows.segment * size + warp_at : nullptr, rows, N);
    if (saved) saved += (bh * chunks + first) * size + warp_at;
    const bool pair = can_pair(y, row_x, width);

    for (int chunk = first; chunk < last; chunk++) {
        const int at = (chunk - first) % 2, t0 = chunk * C, tokens = min(C, T - t0);
        const E* tx = sx + at * C * ldx + 16 * warp;
        const E* tb = sb + at * C * LDN;
        const float* w = own_decays + at * KINDS * C;
        float raw[C / WARP];
        cp_async_wait<0>();
        __syncthreads();
        if (chunk + 1 < last) {
            fetch_xb(chunk + 1);
            cp_async_commit();
            if (warp < heads) read_steps<C>(raw, dt + (t0 + (long long)C) * H, T - t0 - C, H);
        }
        if (saved) store_rows(s, saved, rows, N), saved += size;

        // M, by blocks of 16 x 16 on and below the diagonal; C B^T is that of all heads.
        for (int unit = warp; unit < MT * (MT + 1) / 2; unit += warps) {
            int i = 0, j = unit;
            while (j > i) j -= ++i;
            float acc[2][4] = {};
            for (int k = 0; k < n_pad; k += 16) {
                const FragA<R> fa = load_a<R, AlongK>(sc + 16 * i * LDN + k, LDN);
                FragB<R> fb[2];
                load_b<R, AlongK>(fb, tb + 16 * j * LDN + k, LDN);
                mma<R>(acc[0], fa, fb[0]);
                mma<R>(acc[1], fa, fb[1]);
            }
            for (int k = 0; k < heads; k++) {
                const float* const of = decays + (2 * k + at) * KINDS * C;
#pragma unroll
                for (int nt = 0; nt < 2; nt++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int r = 16 * i + acc_row(0, 2 * half), col = 16 * j + acc_col(nt, 0);
                        const float2 l = load2(of + L * C + col), step = load2(of + STEP * C + col);
                        const float l_r = of[L * C + r];
                        const float m0 = acc[nt][2 * half] * exp2_neg(l_r - l.x) * step.x;
                        const float m1 = acc[nt][2 * half + 1] * exp2_neg(l_r - l.y) * step.y;
                        store2(sm + (k * C + r) * LDM + col, col > r ? 0.f : m0, col + 1 > r ? 0.f : m1);
                    }
            }
        }
        if (warp < heads && chunk + 1 < last)
            chunk_decays<C>(made_decays + (1 - at) * KINDS * C, raw, T - t0 - C, bias, rate);

        // What the state before the chunk adds to its outputs: C S0^T.
        float out[MT][2][4] = {};
        if (chunk > 0 || state0) {
#pragma unroll
            for (int k = 0; k < NT; k += 2) {
                FragB<R> fb[2];
                acc_as_b<R>(fb, s[k], s[k + 1]);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    const FragA<R> fa = load_a<R, AlongK>(sc + 16 * i * LDN + 8 * k, LDN);
                    mma<R>(out[i][0], fa, fb[0]);
                    mma<R>(out[i][1], fa, fb[1]);
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float decay = w[DECAY * C + acc_row(i, e)];
                    out[i][0][e] *= decay;
                    out[i][1][e] *= decay;
                }
        }
        __syncthreads();
        if (chunk + 1 < last) {
            fetch_c(chunk + 1);
            cp_async_commit();
        }

#pragma unroll
        for (int k = 0; k < MT; k++) {
            FragB<R> fb[2];
            load_b<R, AlongMN>(fb, tx + 16 * k * ldx, ldx);
#pragma unroll
            for (int i = k; i < MT; i++) {
                const FragA<R> fa = load_a<R, AlongK>(own_m + 16 * i * LDM + 16 * k, LDM);
                mma<R>(out[i][0], fa, fb[0]);
                mma<R>(out[i][1], fa, fb[1]);
            }
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int nt = 0; nt < 2; nt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float2 v = load2(tx + acc_row(i, 2 * half) * ldx + acc_col(nt, 0));
                    out[i][nt][2 * half] += skip * v.x;
                    out[i][nt][2 * half + 1] += skip * v.y;
                }
            store_block(y + (long long)(t0 + 16 * i) * row_x + 16 * warp, row_x, tokens - 16 * i, rows, out[i][0],
                        out[i][1], pair);
        }
        update<R>(s, w[DECAY * C + C - 1], w + WEIGHT * C, tx, ldx, tb, LDN);
    }
    if (last == chunks) store_rows(s, state1 + bh * size + warp_at, rows, N);
}

// Goes through the chunks with nothing but the state. Forward: u = x, v = b, weights exp(l_C - l) step. In reverse:
// u = dy, v = c, weights exp(l).
// Grid and block as ssd_forward. Shared memory: u [2][C][ldx], v [2][C][ldn], then f32 [heads][2][KINDS][C].
// start [segments][B,H,P,N]: the state before every segment (its gradient after it), or none.
// states [B,H,chunks,P,N]: the state before every chunk (its gradient after it), or none.
// end: with `log_decay` [segments][B,H], the segment's sum of rate step to base 2, [segments][B,H,P,N] after every
// segment, without it [B,H,P,N] after the last segment.
template <class R, int NT, bool SHARE>
__device__ __forceinline__ void states(const typename R::elem* u, const typename R::elem* v, const typename R::elem* dt,
                                       const float* a_log, const float* dt_bias, const float* start,
                                       typename R::elem* states, float* end, float* log_decay, int T, int H, int P,
                                       int G, int N, int per_segment, int reverse, int heads) {
    using E = typename R::elem;
    constexpr int C = CHUNK<R>, LDN = 8 * NT + PAD;
    DYNAMIC_SHARED(memory);
    const int warp = warp_id(), warps = blockDim.x / WARP, ldx = 16 * warps + PAD;
    if constexpr (!SHARE) heads = 1;
    E* su = reinterpret_cast<E*>(memory);
    E* sv = su + 2 * C * ldx;
    float* decays = reinterpret_cast<float*>(sv + 2 * C * LDN);

    const Rows at_rows = block_rows(H, P, heads);
    const int width = at_rows.width, rows = at_rows.rows;
    const long long batch = at_rows.batch, bh = at_rows.bh, segment = at_rows.segment;
    const int chunks = ceil_div(T, C), first = blockIdx.y * per_segment, count = min(chunks - first, per_segment);
    const long long row_u = (long long)H * P, row_v = (long long)G * N, size = (long long)P * N;
    u += batch * T * row_u + (long long)at_rows.first * P + at_rows.at;
    v += (batch * T * G + at_rows.h / (H / G)) * N;
    const int warp_at = at_rows.p0 * N;
    // The first warps make the decays, of a head each.
    const int made = at_rows.first + min(warp, heads - 1);
    const float rate = -__expf(a_log[made]), bias = dt_bias[made];
    dt += batch * T * H + made;

    const auto chunk_of = [&](int i) { return reverse ? first + count - 1 - i : first + i; };
    const auto fetch = [&](int i) {
        const int t0 = chunk_of(i) * C, tokens = min(C, T - t0);
        fetch_tile(su + i % 2 * C * ldx, ldx, u + t0 * row_u, row_u, tokens, width, C, 16 * warps);
        fetch_tile(sv + i % 2 * C * LDN, LDN, v + t0 * row_v, row_v, tokens, N, C, 8 * NT);
        cp_async_commit();
    };
    const auto steps = [&](int i, float (&raw)[C / WARP]) {
        const int t0 = chunk_of(i) * C;
        read_steps<C>(raw, dt + (long long)t0 * H, T - t0, H);
    };
    const auto make_decays = [&](int i, float (&raw)[C / WARP]) {
        chunk_decays<C>(decays + (2 * warp + i % 2) * KINDS * C, raw, T - chunk_of(i) * C, bias, rate);
    };

    fetch(0);
    if (warp < heads) {
        float raw[C / WARP];
        steps(0, raw);
        make_decays(0, raw);
    }
    float s[NT][4];
    load_rows(s, start ? start + segment * size + warp_at : nullptr, rows, N);
    float total = 0.f;
    for (int i = 0; i < count; i++) {
        const float* w = decays + (2 * at_rows.own + i % 2) * KINDS * C;
        float raw[C / WARP];
        cp_async_wait<0>();
        __syncthreads();
        if (i + 1 < count) {
            fetch(i + 1);
            if (warp < heads) steps(i + 1, raw);
        }
        if (states) store_rows(s, states + (bh * chunks + chunk_of(i)) * size + warp_at, rows, N);
        total += w[L * C + C - 1];
        update<R>(s, w[DECAY * C + C - 1], w + (reverse ? DECAY : WEIGHT) * C, su + i % 2 * C * ldx + 16 * warp, ldx,
                 sv + i % 2 * C * LDN, LDN);
        if (warp < heads && i + 1 < count) make_decays(i + 1, raw);
    }
    if (log_decay) {
        if (end) store_rows(s, end + segment * size + warp_at, rows, N);
        if (lane_id() == 0 && at_rows.p0 == 0) log_decay[segment] = total;
    } else if (end && blockIdx.y == (reverse ? 0 : gridDim.y - 1)) {
        store_rows(s, end + bh * size + warp_at, rows, N);
    }
}

// From every segment's own end, as if it had started from zeros, the state before it (in reverse: after it), in place.
// ends [segments][count][size], log_decay [segments][count], start [count][size] or none. Grid: (count, size / 256).
extern "C" __global__ void __launch_bounds__(256)
    ssd_scan(float* ends, const float* log_decay, const float* start, int segments, int size, int reverse) {
    const int i = blockIdx.y * 256 + threadIdx.x;
    if (i >= size) return;
    float s = start ? start[(long long)blockIdx.x * size + i] : 0.f;
    for (int k = 0; k < segments; k++) {
        const long long at = (long long)(reverse ? segments - 1 - k : k) * gridDim.x + blockIdx.x;
        const float end = ends[at * size + i];
        ends[at * size + i] = s;
        s = exp2_neg(log_decay[at]) * s + end;
    }
}

// Parts of the columns of whatever ssd_grads computes; its warps, each with 16 tokens of a chunk and such a part;
// rows of P that it takes at a time.
template <class R> constexpr int SIDES = 2;
template <> constexpr int SIDES<Bf16> = 4;
template <class R> constexpr int GRAD_WARPS = CHUNK<R> / 16 * SIDES<R>;
template <class R> constexpr int GRAD_SLICE = CHUNK<R>;

// Gradients of all but the states. Grid: (chunks, G blocks_per_group, B). Block: GRAD_WARPS warps.
// Shared memory, ldn = 8 NT + PAD, PS = GRAD_SLICE:
//   b, c [C][ldn], S0, E [STAGES][PS][ldn], x, dy [STAGES][C][PS + PAD], M, C B^T [C][C + PAD], then f32
//   2 KINDS [C] and 24 [C].
// With two STAGES the next slice of the operands is on its way while one is computed with.
// states, d_states [B,H,chunks,P,N]: S0 and E.
// With one block per group db and dc [B,T,G,N] are written, else partial sums [2][blocks_per_group][B,T,G,N] f32.
// params [B chunks][3][H] f32: shares of the gradients of a_log, d, dt_bias.
template <class R, int NT, int STAGES>
__device__ __forceinline__ void grads(const typename R::elem* x, const typename R::elem* dt, const float* a_log,
                                      const typename R::elem* b, const typename R::elem* c, const float* d,
                                      const float* dt_bias, const typename R::elem* dy, const typename R::elem* states,
                                      const typename R::elem* d_states, typename R::elem* dx, typename R::elem* d_dt,
                                      typename R::elem* db, typename R::elem* dc, float* partial, float* params, int T,
                                      int H, int P, int G, int N) {
    using E = typename R::elem;
    constexpr int C = CHUNK<R>, PS = GRAD_SLICE<R>, LDN = 8 * NT + PAD, LDP = PS + PAD, LDM = C + PAD, MT = C / 16;
    constexpr int PARTS = SIDES<R>, LAST = GRAD_WARPS<R> - 1, MAKER = LAST - PARTS;
    constexpr bool AHEAD = STAGES == 2;
    // Tiles of 8 columns of a warp: of M, of dx, of dB and dC.
    constexpr int UT = C / 8 / PARTS, XT = PS / 8 / PARTS, WT = NT / PARTS;
    DYNAMIC_SHARED(memory);
    E* sb = reinterpret_cast<E*>(memory);
    E* sc = sb + C * LDN;
    E* states_at = sc + C * LDN;
    E* tokens_at = states_at + STAGES * 2 * PS * LDN;
    E* sm = tokens_at + STAGES * 2 * C * LDP;
    E* scb = sm + C * LDM;
    float* decays = reinterpret_cast<float*>(scb + C * LDM);
    float* q_rows = decays + 2 * KINDS * C;  // [PARTS][C] sum over j < i of Q step, of each part of the columns
    float* q_cols = q_rows + PARTS * C;      // [MT][C] sum over i > j of Q
    float* q_diag = q_cols + MT * C;         // [C]
    float* yx = q_diag + C;                  // [C] dy . x
    float* inter = yx + C;                   // [PARTS][C] exp(l) dy . (C S0^T)
    float* rest = inter + PARTS * C;         // [PARTS][C] r
    float* dots = rest + PARTS * C;          // [GRAD_WARPS] <S0, E>
    float* sums = dots + C;                  // [3][C] of the head: the last warp's sums over the slices of P
    float* raws = sums + 3 * C;              // [2][C] dt

    const int warp = warp_id(), lane = lane_id(), mi = warp / PARTS, side = warp % PARTS;
    const int chunk = blockIdx.x, chunks = gridDim.x, t0 = chunk * C, tokens = min(C, T - t0);
    const int per_group = H / G, blocks = gridDim.y / G, group = blockIdx.y / blocks, part = blockIdx.y % blocks;
    const int first = group * per_group + per_group * part / blocks;
    const int last = group * per_group + per_group * (part + 1) / blocks;
    const long long batch = blockIdx.z, row_x = (long long)H * P, row_b = (long long)G * N, size = (long long)P * N;
    const int n_pad = ceil_div(N, 16) * 16;
    const long long bc_at = ((batch * T + t0) * G + group) * N, x_at = (batch * T + t0) * row_x;

    fetch_tile(sb, LDN, b + bc_at, row_b, tokens, N, C, 8 * NT);
    fetch_tile(sc, LDN, c + bc_at, row_b, tokens, N, C, 8 * NT);
    for (int i = threadIdx.x; i < (PARTS + MT) * C; i += blockDim.x) q_rows[i] = 0.f;

    const int r0 = 16 * mi, u0 = 8 * UT * side, n0 = 8 * WT * side, v0 = 8 * XT * side;
    // Whether the warp's part of M has entries on or below the diagonal.
    const bool active = u0 <= r0 + 15;
    float a_sum[UT][4] = {}, db_acc[WT][4] = {}, dc_acc[WT][4] = {};
    float skip_sum = 0.f, dot = 0.f;

    const int slices = ceil_div(P, PS), count = (last - first) * slices;
    // Slice i % slices of head first + i / slices.
    const auto fetch = [&](int i) {
        const int h = first + i / slices, p0 = i % slices * PS;
        const int width = min(PS, P - p0);
        const long long at = x_at + (long long)h * P + p0;
        const long long state_at = ((batch * H + h) * chunks + chunk) * size + (long long)p0 * N;
        E* const to = tokens_at + i % STAGES * 2 * C * LDP;
        E* const states_to = states_at + i % STAGES * 2 * PS * LDN;
        fetch_tile(to, LDP, x + at, row_x, tokens, width, C, PS);
        fetch_tile(to + C * LDP, LDP, dy + at, row_x, tokens, width, C, PS);
        fetch_tile(states_to, LDN, states + state_at, N, width, N, PS, 8 * NT);
        fetch_tile(states_to + PS * LDN, LDN, d_states + state_at, N, width, N, PS, 8 * NT);
        cp_async_commit();
    };
    constexpr int PER = C / WARP;
    float raw[PER];
    const auto read = [&](int h) {
        if (warp == MAKER && h < last) read_steps<C>(raw, dt + (batch * T + t0) * H + h, tokens, H);
    };
    const auto make_decays = [&](int h) {
        if (warp != MAKER || h >= last) return;
        const int at = (h - first) % 2;
#pragma unroll
        for (int i = 0; i < PER; i++) raws[at * C + PER * lane + i] = raw[i];
        chunk_decays<C>(decays + at * KINDS * C, raw, tokens, dt_bias[h], -__expf(a_log[h]));
    };
    fetch(0);
    read(first);
    make_decays(first);

    for (int h = first; h < last; h++) {
        const float rate = -__expf(a_log[h]), bias = dt_bias[h], skip = d[h];
        const float* const w = decays + (h - first) % 2 * KINDS * C;
        for (int p0 = 0; p0 < P; p0 += PS) {
            const int i = (h - first) * slices + p0 / PS;
            const int width = min(PS, P - p0), width_pad = ceil_div(width, 16) * 16;
            const long long at = x_at + (long long)h * P + p0;
            const E* const sx = tokens_at + i % STAGES * 2 * C * LDP;
            const E* const sdy = sx + C * LDP;
            const E* const s0 = states_at + i % STAGES * 2 * PS * LDN;
            const E* const se = s0 + PS * LDN;
            if (!AHEAD && i > 0) {
                __syncthreads();
                fetch(i);
            }
            cp_async_wait<0>();
            __syncthreads();
            if (AHEAD && i + 1 < count) fetch(i + 1);
            if (p0 == 0) read(h + 1);

            if (active) {
                if (h == first && p0 == 0) {
                    float cb[UT][4] = {};
#pragma unroll 1
                    for (int k = 0; k < n_pad; k += 16) {
                        const FragA<R> fa = load_a<R, AlongK>(sc + r0 * LDN + k, LDN);
#pragma unroll
                        for (int j = 0; j < UT; j += 2) {
                            FragB<R> fb[2];
                            load_b<R, AlongK>(fb, sb + (u0 + 8 * j) * LDN + k, LDN);
                            mma<R>(cb[j], fa, fb[0]);
                            mma<R>(cb[j + 1], fa, fb[1]);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < UT; j++)
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            store2(scb + (r0 + acc_row(0, 2 * half)) * LDM + u0 + acc_col(j, 0), cb[j][2 * half],
                                   cb[j][2 * half + 1]);
                }
                float dm[UT][4] = {};
#pragma unroll 1
                for (int k = 0; k < width_pad; k += 16) {
                    const FragA<R> fa = load_a<R, AlongK>(sdy + r0 * LDP + k, LDP);
#pragma unroll
                    for (int j = 0; j < UT; j += 2) {
                        FragB<R> fb[2];
                        load_b<R, AlongK>(fb, sx + (u0 + 8 * j) * LDP + k, LDP);
                        mma<R>(dm[j], fa, fb[0]);
                        mma<R>(dm[j + 1], fa, fb[1]);
                    }
                }
                float by_row[2] = {};
                const float l_r[2] = {w[L * C + r0 + acc_row(0, 0)], w[L * C + r0 + acc_row(0, 2)]};
#pragma unroll
                for (int j = 0; j < UT; j++) {
                    float by_col[2] = {}, m[4], cb[4];
                    const float2 ls = load2(w + L * C + u0 + acc_col(j, 0));
                    const float2 steps = load2(w + STEP * C + u0 + acc_col(j, 0));
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float2 v = load2(scb + (r0 + acc_row(0, 2 * half)) * LDM + u0 + acc_col(j, 0));
                        cb[2 * half] = v.x, cb[2 * half + 1] = v.y;
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int r = r0 + acc_row(0, e), col = u0 + acc_col(j, e);
                        const float step = e % 2 ? steps.y : steps.x;
                        const float decay = col > r ? 0.f : exp2_neg(l_r[e / 2] - (e % 2 ? ls.y : ls.x));
                        const float decayed = dm[j][e] * decay, q = decayed * cb[e];
                        m[e] = cb[e] * decay * step;
                        a_sum[j][e] += decayed * step;
                        if (col == r) {
                            q_diag[r] = q;
                            yx[r] = dm[j][e];
                        } else {
                            by_row[e / 2] += q * step;
                            by_col[e % 2] += q;
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        store2(sm + (r0 + acc_row(0, 2 * half)) * LDM + u0 + acc_col(j, 0), m[2 * half],
                               m[2 * half + 1]);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float sum = col_sum(by_col[e]);
                        if (lane < 4) q_cols[mi * C + u0 + acc_col(j, e)] = sum;
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float sum = row_sum(by_row[half]);
                    if (lane % 4 == 0) q_rows[side * C + r0 + acc_row(0, 2 * half)] = sum;
                }
            }

            // <S0, E>
            float product = 0.f;
            constexpr int VEC = 16 / sizeof(E), PER_ROW = 8 * NT / VEC;
            for (int i = threadIdx.x; i < width * PER_ROW; i += blockDim.x) {
                const int at = i / PER_ROW * LDN + i % PER_ROW * VEC;
                float p[VEC], q[VEC];
                load_vec<VEC>(s0 + at, p);
                load_vec<VEC>(se + at, q);
#pragma unroll
                for (int j = 0; j < VEC; j++) product += p[j] * q[j];
            }
            product = warp_sum(product);
            if (lane == 0) dots[warp] = product;

            // dC from the state before the chunk, and its product with C; row i times exp(l_i).
            {
                FragA<R> fa[PS / 16];
#pragma unroll
                for (int k = 0; k < PS / 16; k++) fa[k] = load_a<R, AlongK>(sdy + r0 * LDP + 16 * k, LDP);
                const float decay[2] = {w[DECAY * C + r0 + acc_row(0, 0)], w[DECAY * C + r0 + acc_row(0, 2)]};
                float by_row[2] = {};
#pragma unroll
                for (int j = 0; j < WT; j += 2) {
                    float z[2][4] = {};
#pragma unroll
                    for (int k = 0; k < PS / 16; k++)
                        if (16 * k < width_pad) {
                            FragB<R> fb[2];
                            load_b<R, AlongMN>(fb, s0 + 16 * k * LDN + n0 + 8 * j, LDN);
                            mma<R>(z[0], fa[k], fb[0]);
                            mma<R>(z[1], fa[k], fb[1]);
                        }
#pragma unroll
                    for (int nt = 0; nt < 2; nt++)
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const float2 v = load2(sc + (r0 + acc_row(0, 2 * half)) * LDN + n0 + acc_col(j + nt, 0));
                            const float a = z[nt][2 * half], b = z[nt][2 * half + 1];
                            by_row[half] += a * v.x + b * v.y;
                            dc_acc[j + nt][2 * half] += decay[half] * a;
                            dc_acc[j + nt][2 * half + 1] += decay[half] * b;
                        }
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float sum = decay[half] * row_sum(by_row[half]);
                    if (lane % 4 == 0) inter[side * C + r0 + acc_row(0, 2 * half)] = sum;
                }
            }
            // dB through the state after the chunk; row j times exp(l_C - l_j) step_j.
            {
                float z[WT][4] = {};
#pragma unroll 1
                for (int k = 0; k < width_pad; k += 16) {
                    const FragA<R> fa = load_a<R, AlongK>(sx + r0 * LDP + k, LDP);
#pragma unroll
                    for (int j = 0; j < WT; j += 2) {
                        FragB<R> fb[2];
                        load_b<R, AlongMN>(fb, se + k * LDN + n0 + 8 * j, LDN);
                        mma<R>(z[j], fa, fb[0]);
                        mma<R>(z[j + 1], fa, fb[1]);
                    }
                }
                const float weight[2] = {w[WEIGHT * C + r0 + acc_row(0, 0)], w[WEIGHT * C + r0 + acc_row(0, 2)]};
#pragma unroll
                for (int j = 0; j < WT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) db_acc[j][e] += weight[e / 2] * z[j][e];
            }
            // dx through the state after the chunk; columns beyond the slice hold rubbish and are not used.
            float out[XT][4] = {};
            if (v0 < width_pad) {
#pragma unroll 1
                for (int k = 0; k < n_pad; k += 16) {
                    const FragA<R> fa = load_a<R, AlongK>(sb + r0 * LDN + k, LDN);
#pragma unroll
                    for (int j = 0; j < XT; j += 2)
                        if (v0 + 8 * j < width_pad) {
                            FragB<R> fb[2];
                            load_b<R, AlongK>(fb, se + (v0 + 8 * j) * LDN + k, LDN);
                            mma<R>(out[j], fa, fb[0]);
                            mma<R>(out[j + 1], fa, fb[1]);
                        }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = r0 + acc_row(0, 2 * half);
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < XT; j++)
                    if (v0 + 8 * j < width_pad) {
                        const float2 v = load2(sx + r * LDP + v0 + acc_col(j, 0));
                        sum += out[j][2 * half] * v.x + out[j][2 * half + 1] * v.y;
                        out[j][2 * half] *= w[WEIGHT * C + r];
                        out[j][2 * half + 1] *= w[WEIGHT * C + r];
                    }
                sum = row_sum(sum);
                if (lane % 4 == 0) rest[side * C + r] = w[TAIL * C + r] * sum;
            }
            __syncthreads();

            if (v0 < width_pad) {
#pragma unroll 1
                for (int k = mi; k < MT; k++) {
                    const FragA<R> fa = load_a<R, AlongMN>(sm + 16 * k * LDM + r0, LDM);
#pragma unroll
                    for (int j = 0; j < XT; j += 2)
                        if (v0 + 8 * j < width_pad) {
                            FragB<R> fb[2];
                            load_b<R, AlongMN>(fb, sdy + 16 * k * LDP + v0 + 8 * j, LDP);
                            mma<R>(out[j], fa, fb[0]);
                            mma<R>(out[j + 1], fa, fb[1]);
                        }
                }
                const bool pair = can_pair(dx + at, row_x, width);
#pragma unroll
                for (int j = 0; j < XT; j += 2)
                    if (v0 + 8 * j < width_pad) {
#pragma unroll
                        for (int nt = 0; nt < 2; nt++)
#pragma unroll
                            for (int half = 0; half < 2; half++) {
                                const int r = r0 + acc_row(0, 2 * half);
                                const float2 v = load2(sdy + r * LDP + v0 + acc_col(j + nt, 0));
                                out[j + nt][2 * half] += skip * v.x;
                                out[j + nt][2 * half + 1] += skip * v.y;
                            }
                        store_block(dx + at + r0 * row_x + v0 + 8 * j, row_x, tokens - r0, width - v0 - 8 * j, out[j],
                                    out[j + 1], pair);
                    }
            }

            if (p0 + PS >= P) make_decays(h + 1);
            if (warp == LAST) {
                // Gradients of the steps and log decays; lane i has tokens PER i ...
                if (p0 == 0) skip_sum = dot = 0.f;
#pragma unroll
                for (int i = 0; i < PER; i++) {
                    const int t = PER * lane + i;
                    const bool more = p0 > 0;
                    float cols = 0.f;
#pragma unroll
                    for (int k = 0; k < MT; k++) cols += q_cols[k * C + t];
                    float r = 0.f, log = 0.f;
#pragma unroll
                    for (int k = 0; k < PARTS; k++) {
                        r += rest[k * C + t];
                        log += q_rows[k * C + t] + inter[k * C + t];
                    }
                    const float step = w[STEP * C + t];
                    log -= cols * step;
                    sums[t] = (more ? sums[t] : 0.f) + cols + q_diag[t] + r;
                    sums[C + t] = (more ? sums[C + t] : 0.f) + log;
                    sums[2 * C + t] = (more ? sums[2 * C + t] : 0.f) + step * r;
                    skip_sum += yx[t];
                }
#pragma unroll
                for (int k = 0; k < GRAD_WARPS<R>; k++) dot += dots[k];
            }
        }
        if (warp == LAST) {
            float d_log[PER], before[PER];
#pragma unroll
            for (int i = 0; i < PER; i++) {
                d_log[i] = sums[C + PER * lane + i];
                before[i] = sums[2 * C + PER * lane + i];
            }
            // Sums over what comes after (d_log) and before, from a lane's own to those of other lanes.
#pragma unroll
            for (int i = PER - 2; i >= 0; i--) d_log[i] += d_log[i + 1];
            float after = d_log[0], sum = 0.f;
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const float own = before[i];
                before[i] = sum;
                sum += own;
            }
            float upto = sum;
#pragma unroll
            for (int o = 1; o < WARP; o *= 2) {
                const float right = __shfl_down_sync(FULL, after, o), left = __shfl_up_sync(FULL, upto, o);
                if (lane + o < WARP) after += right;
                if (lane >= o) upto += left;
            }
            const float right = __shfl_down_sync(FULL, after, 1), left = __shfl_up_sync(FULL, upto, 1);
            float log_sum = 0.f, bias_sum = 0.f;
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const int t = PER * lane + i;
                float g = d_log[i] + before[i] + w[DECAY * C + C - 1] * dot;
                if (lane + 1 < WARP) g += right;
                if (lane > 0) g += left;
                if (t < tokens) {
                    const float own = (sums[t] + rate * g) * sigmoid(raws[(h - first) % 2 * C + t] + bias);
                    log_sum += g * rate * w[STEP * C + t];
                    bias_sum += own;
                    d_dt[(batch * T + t0 + t) * H + h] = from_f<E>(own);
                }
            }
            log_sum = warp_sum(log_sum), bias_sum = warp_sum(bias_sum), skip_sum = warp_sum(skip_sum);
            if (lane == 0) {
                const long long row = batch * chunks + chunk;
                params[3 * row * H + h] = log_sum;
                params[(3 * row + 1) * H + h] = skip_sum;
                params[(3 * row + 2) * H + h] = bias_sum;
            }
        }
    }

    // The products of the summed A with B and C.
    __syncthreads();
    if (active) {
#pragma unroll
        for (int j = 0; j < UT; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store2(sm + (r0 + acc_row(0, 2 * half)) * LDM + u0 + acc_col(j, 0), a_sum[j][2 * half],
                       a_sum[j][2 * half + 1]);
    }
    __syncthreads();
    const auto multiply = [&](auto& acc, const FragA<R>& fa, const E* v) {
#pragma unroll
        for (int j = 0; j < WT; j += 2) {
            FragB<R> fb[2];
            load_b<R, AlongMN>(fb, v + n0 + 8 * j, LDN);
            mma<R>(acc[j], fa, fb[0]);
            mma<R>(acc[j + 1], fa, fb[1]);
        }
    };
#pragma unroll 1
    for (int k = 0; k <= mi; k++)
        multiply(dc_acc, load_a<R, AlongK>(sm + r0 * LDM + 16 * k, LDM), sb + 16 * k * LDN);
#pragma unroll 1
    for (int k = mi; k < MT; k++)
        multiply(db_acc, load_a<R, AlongMN>(sm + 16 * k * LDM + r0, LDM), sc + 16 * k * LDN);

    const auto write = [&](auto* p, const auto& acc) {
        p += bc_at + r0 * row_b;
        const bool pair = can_pair(p, row_b, N);
#pragma unroll
        for (int j = 0; j < WT; j += 2)
            if (n0 + 8 * j < N)
                store_block(p + n0 + 8 * j, row_b, tokens - r0, N - n0 - 8 * j, acc[j], acc[j + 1], pair);
    };
    if (blocks == 1) {
        write(db, db_acc);
        write(dc, dc_acc);
    } else {
        const long long all = (long long)gridDim.z * T * row_b;
        write(partial + part * all, db_acc);
        write(partial + (blocks + part) * all, dc_acc);
    }
}

// Sums of `parts` partial results, [2][parts][size] to [size] each. Grid: (any, 2).
template <class E>
__device__ __forceinline__ void sum_parts(const float* partial, E* db, E* dc, long long size, int parts) {
    partial += blockIdx.y * parts * size;
    E* out = blockIdx.y ? dc : db;
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {
        float sum = 0.f;
        for (int k = 0; k < parts; k++) sum += partial[k * size + i];
        out[i] = from_f<E>(sum);
    }
}

// The kernels that carry states; those of blocks that share heads are ssd_forward_heads and ssd_states_heads.
#define CARRY(FORWARD, STATES, SHARE, N_MAX, BLOCKS, SUFFIX, R)                                                \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) FORWARD##_n##N_MAX##_##SUFFIX(                   \
        const R::elem* x, const R::elem* dt, const float* a_log, const R::elem* b, const R::elem* c,           \
        const float* d, const float* dt_bias, const float* state0, R::elem* y, float* state1, R::elem* saved,  \
        int T, int H, int P, int G, int N, int per_segment, int heads) {                                       \
        forward<R, N_MAX / 8, SHARE>(x, dt, a_log, b, c, d, dt_bias, state0, y, state1, saved, T, H, P, G, N,  \
                                     per_segment, heads);                                                      \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) STATES##_n##N_MAX##_##SUFFIX(                    \
        const R::elem* u, const R::elem* v, const R::elem* dt, const float* a_log, const float* dt_bias,       \
        const float* start, R::elem* all, float* end, float* log_decay, int T, int H, int P, int G, int N,     \
        int per_segment, int reverse, int heads) {                                                             \
        states<R, N_MAX / 8, SHARE>(u, v, dt, a_log, dt_bias, start, all, end, log_decay, T, H, P, G, N,       \
                                    per_segment, reverse, heads);                                              \
    }
#define GRADS(NAME, STAGES, N_MAX, BLOCKS, SUFFIX, R)                                                          \
    extern "C" __global__ void __launch_bounds__(32 * GRAD_WARPS<R>, GRAD_WARPS<R> > 8 ? 1 : BLOCKS)           \
        NAME##_n##N_MAX##_##SUFFIX(                                                                            \
            const R::elem* x, const R::elem* dt, const float* a_log, const R::elem* b, const R::elem* c,       \
            const float* d, const float* dt_bias, const R::elem* dy, const R::elem* all, const R::elem* d_all, \
            R::elem* dx, R::elem* d_dt, R::elem* db, R::elem* dc, float* partial, float* params, int T, int H, \
            int P, int G, int N) {                                                                             \
        grads<R, N_MAX / 8, STAGES>(x, dt, a_log, b, c, d, dt_bias, dy, all, d_all, dx, d_dt, db, dc, partial, \
                                    params, T, H, P, G, N);                                                    \
    }
#define KERNELS(N_MAX, BLOCKS, SUFFIX, R)                                \
    CARRY(ssd_forward, ssd_states, false, N_MAX, BLOCKS, SUFFIX, R)      \
    GRADS(ssd_grads, 1, N_MAX, BLOCKS, SUFFIX, R)
#define SHARED_HEADS(N_MAX, BLOCKS) \
    CARRY(ssd_forward_heads, ssd_states_heads, true, N_MAX, BLOCKS, bf16, Bf16)
#define ROUTE(SUFFIX, R)        \
    KERNELS(64, 2, SUFFIX, R)   \
    KERNELS(128, 2, SUFFIX, R)  \
    KERNELS(256, 1, SUFFIX, R)
ROUTE(bf16, Bf16)
ROUTE(tf32, Tf32)
ROUTE(f32, F32)
SHARED_HEADS(64, 2)
SHARED_HEADS(128, 2)
SHARED_HEADS(256, 1)
GRADS(ssd_grads_ahead, 2, 64, 1, bf16, Bf16)
GRADS(ssd_grads_ahead, 2, 128, 1, bf16, Bf16)

#define SUM(SUFFIX, E)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                          \
        ssd_sum_##SUFFIX(const float* partial, E* db, E* dc, long long size, int parts) {                      \
        sum_parts<E>(partial, db, dc, size, parts);                                                            \
    }
SUM(bf16, bf16)
SUM(f32, float)
