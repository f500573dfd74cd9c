// The delta rule of delta.cu for Hopper: the same results from tensor cores that read shared memory.
//
//   bf16; keys up to 64 or up to 128, padded to that in shared memory only. Tensors as in delta.cu, given as tensor maps
//   whose boxes have the rows of a chunk; also P [B·H, chunks, 16 or 64, 64] and rows [B·H, chunks, 5, 64] f32, see
//   below. What one kernel keeps for another lies as it is copied, vh [B·H, chunks, panels, 64, 64], s and ds
//   [B·H, chunks, panels, K, 64], each in panels of 64 value columns.
//
// The walks along the sequence are transposed: a warpgroup has 64 value columns as the rows of its products. What one
// product leaves in registers is then the left operand of the next, and the state never leaves registers at all; keys,
// queries, M and P lie in shared memory as copied. A block has two warpgroups that multiply, each on its own, and one
// that copies the next chunks, also of the next sequence: a block takes one after the other.
//
//   delta_prepare    M, s P and the rows; a block has one chunk
//   delta_forward    Rᵀ = Vᵀ diag(β) − S0ᵀ Kᵀ diag(β e^b)          Vhᵀ = Rᵀ Mᵀ
//                    Oᵀ = S0ᵀ Qᵀ diag(s e^b) + Vhᵀ (s P)ᵀ          S1ᵀ = e^(b_C) S0ᵀ + Vhᵀ diag(e^(b_C − b)) K
//   delta_reverse    dVhᵀ = dS1ᵀ Kᵀ diag(e^(b_C − b)) + dOᵀ (s P)  Zᵀ = dVhᵀ M
//                    dS0ᵀ = e^(b_C) dS1ᵀ + dOᵀ diag(s e^b) Q − Zᵀ diag(β e^b) K
//   delta_gradients  as in delta.cu, nothing transposed; a block takes one chunk after the other
//
// Entry points: delta_<prepare|forward|reverse>_<keys: 64|128>_<tokens: 16|64>_sm90a, for chunks of up to so many tokens,
// and delta_gradients_<keys>_sm90a; but for the first, at most one block a multiprocessor.
#include "delta.cuh"
#include "wgmma.cuh"

namespace {

constexpr int VS = 64;      // value columns of a warpgroup
constexpr int GROUPS = 2;   // warpgroups that multiply
constexpr int STAGES = 2;   // chunks under way
constexpr int THREADS = (1 + GROUPS) * WARPGROUP;
// The rows of a chunk, each of C floats: b, β, β e^b, e^(b_C − b), and by tokens s e^b.
enum { B, BETA, BETA_DECAY, TAIL, READ, ROWS };

struct Sizes {
    int batch, steps, heads, keys, values, sub;

    __device__ __forceinline__ int tokens() const { return C / sub; }
    __device__ __forceinline__ int chunks() const { return ceil_div(steps, tokens()); }
    __device__ __forceinline__ int slices() const { return ceil_div(values, GROUPS * VS); }
    __device__ __forceinline__ int panels() const { return ceil_div(values, VS); }
};

// Two neighbouring columns of accumulators: those of the `pair`-th element pair of 16 columns, `k` sixteens further on.
__device__ __forceinline__ int column(int k, int pair) { return 16 * k + pair / 2 * 8 + 2 * (lane_id() % 4); }

// A tile [16·K rows][64] as a left operand, its columns being the rows of the product.
template <int K>
__device__ __forceinline__ void fetch_operand(uint32_t (&a)[K][4], const bf16* tile) {
#pragma unroll
    for (int k = 0; k < K; k++) ldmatrix_x4_trans(a[k], tile + transposed(k));
}
__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// What of accumulators is an operand, its columns times `row`.
template <int N>
__device__ __forceinline__ void pack_scaled(uint32_t (&a)[N / 8][4], const float (&d)[N], const float* row,
                                            float sign = 1.f) {
#pragma unroll
    for (int k = 0; k < N / 8; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float w[2];
            load_vec<2>(row + column(k, i), w);
            a[k][i] = pack_bf16(d[8 * k + 2 * i] * (sign * w[0]), d[8 * k + 2 * i + 1] * (sign * w[1]));
        }
}

template <int N>
__device__ __forceinline__ void scale_columns(float (&d)[N], const float* row) {
#pragma unroll
    for (int k = 0; k < N / 8; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float w[2];
            load_vec<2>(row + column(k, i), w);
            d[8 * k + 2 * i] *= w[0];
            d[8 * k + 2 * i + 1] *= w[1];
        }
}

// A state [keys, values] in f32 from or to a warpgroup's accumulators, whose rows are the value columns from v0 on.
template <int N, class F>
__device__ __forceinline__ void each_element(float (&s)[N], int v0, const Sizes& n, F f) {
    const int v = v0 + threadIdx.x % WARPGROUP / WARP * 16 + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int k = 8 * (i / 4) + 2 * (lane_id() % 4) + i % 2, at = v + i / 2 % 2 * 8;
        if (k < n.keys && at < n.values) f(s[i], (long long)k * n.values + at);
    }
}
template <int N>
__device__ __forceinline__ void load_state(float (&s)[N], const float* from, long long group, int v0, const Sizes& n) {
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = 0.f;
    if (!from) return;
    from += group * n.keys * n.values;
    each_element(s, v0, n, [&](float& x, long long at) { x = from[at]; });
}
template <int N>
__device__ __forceinline__ void store_state(float* to, float (&s)[N], long long group, int v0, const Sizes& n) {
    to += group * n.keys * n.values;
    each_element(s, v0, n, [&](float x, long long at) { to[at] = x; });
}

// All threads of one warpgroup.
__device__ __forceinline__ void group_barrier(int group) { named_barrier(1 + group, WARPGROUP); }

// ---- M, P and the rows

template <int KP, int NQ>
struct PrepareShared {
    alignas(1024) bf16 p[NQ * C];
    union {
        struct {
            bf16 k[C * KP], q[NQ * KP];
        };
        struct {
            float l[C * LF], m[C * LF];
        };
    };
    float b[C], beta[C];
    Barrier full;
};

template <int KP, int NQ>
__device__ __forceinline__ void prepare(const TensorMap& q, const TensorMap& k, const float* beta, const float* g,
                                        bf16* m, const TensorMap& p, float* rows, float scale, const Sizes& n) {
    DYNAMIC_SHARED(shared);
    auto& sh = *reinterpret_cast<PrepareShared<KP, NQ>*>(shared);
    const int chunks = n.chunks(), c = blockIdx.x % chunks, group = blockIdx.x / chunks;
    const int batch = group / n.heads, head = group % n.heads, tokens = n.tokens(), steps = tokens * n.sub;
    if (threadIdx.x == 0) {
        sh.full.init(1);
        fence_barrier_init();
        sh.full.expect(2 * KP * (steps + tokens));
        for (int panel = 0; panel < KP / PANEL; panel++) {
            load_box(sh.k + panel * C * PANEL, k, batch, c * steps, head, panel * PANEL, sh.full);
            load_box(sh.q + panel * NQ * PANEL, q, batch, c * tokens, head, panel * PANEL, sh.full);
        }
    }
    sum_decays(sh.b, beta, g, chunk_at(c, batch, n.steps, n.sub), n.heads, head, n.sub);
    __syncthreads();
    if (threadIdx.x < C) {
        const int j = threadIdx.x;
        const float b = sh.b[j], y = sh.beta[j], last = sh.b[min((j + 1) * n.sub, C) - 1];
        float* const to = rows + (long long)blockIdx.x * ROWS * C + j;
        to[B * C] = b;
        to[BETA * C] = y;
        to[BETA_DECAY * C] = y * decay(b);
        to[TAIL * C] = decay(sh.b[C - 1] - b);
        to[READ * C] = scale * decay(last);
    }
    sh.full.wait(0);
    // Rows that copies wrote nothing to have arbitrary numbers here.
    float kk[C / 2], qk[C / 2];
    start_product<C, KP, C, C>(kk, operand(sh.k), operand(sh.k));
    start_product<C, KP, NQ, C>(qk, operand(sh.q), operand(sh.k));
    const int warp = warp_id(), low = 16 * warp + lane_id() / 4;
    wait_product<0>(kk);
    compute_now(qk);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < C / 8; j++)
        if (j / 2 <= warp)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = low + 8 * half, col = 8 * j + lane_id() % 4 * 2;
                const bool in = i < steps;
                float b[2], x[2];
                load_vec<2>(sh.b + col, b);
#pragma unroll
                for (int e = 0; e < 2; e++)
                    x[e] = in && col + e < i ? sh.beta[i] * kk[4 * j + 2 * half + e] * decay(sh.b[i] - b[e]) : 0.f;
                store_vec<2>(sh.l + i * LF + col, x);
            }
    if (16 * warp < NQ) {
#pragma unroll
        for (int j = 0; j < C / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int t = low + 8 * half, end = t < tokens ? (t + 1) * n.sub : 0, col = 8 * j + lane_id() % 4 * 2;
                const float bt = sh.b[max(end, 1) - 1];
                float b[2];
                load_vec<2>(sh.b + col, b);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = qk[4 * j + 2 * half + e];
                    x = col + e < end ? x * (scale * decay(bt - b[e])) : 0.f;
                }
            }
        stage_tile(sh.p, qk, 1.f, 1.f);
        fence_copies();
    }
    invert(sh.l, sh.m);
    if (threadIdx.x == 0) store_box(p, blockIdx.x, 0, 0, 0, sh.p), commit_stores();
    put_m(m + (long long)blockIdx.x * C * C, sh.m);
    if (threadIdx.x == 0) wait_stores();
}

// ---- the chunks of a block

// Tiles of a chunk: keys, queries, M, P, and for each warpgroup its panel of the values or, by tokens, of dO.
template <int KP, int NQ, bool BY_TOKENS>
struct Stage {
    static constexpr int VALUES = BY_TOKENS ? NQ : C;
    alignas(1024) bf16 k[C * KP];
    bf16 q[NQ * KP], v[GROUPS][VALUES * VS], m[C * C], p[NQ * C];
    float rows[ROWS * C];
    Slot slot;

    __device__ __forceinline__ void init(const Sizes& n) {
        if (threadIdx.x == 0) slot.init(GROUPS);
        // Zeros where copies write nothing: chunks of fewer than C sub-steps, or than NQ tokens.
        if (n.tokens() * n.sub == C && n.tokens() == NQ) return;
        constexpr int WORDS = (C * KP + NQ * KP + GROUPS * VALUES * VS) / 2;
        for (int i = threadIdx.x; i < WORDS; i += THREADS) reinterpret_cast<uint32_t*>(k)[i] = 0;
        fence_copies();
    }
    // Starts the copies of a chunk.
    __device__ void load(const TensorMap& k_map, const TensorMap& q_map, const TensorMap& v_map,
                         const TensorMap& m_map, const TensorMap& p_map, const float* all_rows, int use, int group,
                         int c, int v0, const Sizes& n) {
        const int batch = group / n.heads, head = group % n.heads, tokens = n.tokens(), steps = tokens * n.sub;
        const int values = BY_TOKENS ? tokens : steps;
        const int index = group * n.chunks() + c;
        slot.take(use, 2 * (steps * KP + tokens * KP + GROUPS * values * VS + C * C + NQ * C) + 4 * ROWS * C);
        for (int panel = 0; panel < KP / PANEL; panel++) {
            load_box(k + panel * C * PANEL, k_map, batch, c * steps, head, panel * PANEL, slot.full);
            load_box(q + panel * NQ * PANEL, q_map, batch, c * tokens, head, panel * PANEL, slot.full);
        }
        for (int w = 0; w < GROUPS; w++) load_box(v[w], v_map, batch, c * values, head, v0 + w * VS, slot.full);
        load_box(m, m_map, index, 0, 0, 0, slot.full);
        load_box(p, p_map, index, 0, 0, 0, slot.full);
        load_floats<ROWS * C>(rows, all_rows + (long long)index * ROWS * C, slot.full);
    }
};

// The walk of a block: `copy` starts the copies of chunk c of a sequence from value column v0 on, use by use, and
// `multiply` walks over all chunks of a sequence. Every kernel goes over the sequences in the order opposite to the one
// before: it begins with those that the L2 cache may still have.
template <bool BACKWARDS, class Stages, class Copy, class Multiply>
__device__ __forceinline__ void walk(Stages& stages, const Sizes& n, Copy copy, Multiply multiply) {
    for (auto& stage : stages) stage.init(n);
    if (threadIdx.x == 0) fence_barrier_init();
    __syncthreads();
    const int chunks = n.chunks(), slices = n.slices(), items = n.batch * n.heads * slices, wg = warpgroup() - 1;
    const auto item = [&](int i) { return BACKWARDS ? i : items - 1 - i; };
    if (wg < 0) {
        fewer_registers<24>();
        if (threadIdx.x == 0)
            for (int i = blockIdx.x, use = 0; i < items; i += gridDim.x)
                for (int c = 0; c < chunks; c++, use++)
                    copy(item(i) / slices, BACKWARDS ? chunks - 1 - c : c, item(i) % slices * (GROUPS * VS), use);
    } else {
        more_registers<240>();
        for (int i = blockIdx.x, use = 0; i < items; i += gridDim.x, use += chunks)
            multiply(wg, item(i) / slices, (item(i) % slices * GROUPS + wg) * VS, use);
        if (threadIdx.x % WARPGROUP == 0) wait_stores();
    }
}

// Starts writing a panel of what is kept of a chunk, HEIGHT rows.
template <int HEIGHT>
__device__ __forceinline__ void store_panel(const TensorMap& map, int index, int v0, const bf16* staged,
                                            const Sizes& n) {
    if (v0 >= n.values) return;
#pragma unroll
    for (int r = 0; r < HEIGHT; r += BOX) store_box(map, index * n.panels() + v0 / VS, r, 0, 0, staged + r * PANEL);
}

// ---- forward

template <int KP, int NQ>
struct ForwardShared {
    Stage<KP, NQ, false> stages[STAGES];
    bf16 s[GROUPS][KP * VS], vh[GROUPS][C * VS], o[GROUPS][NQ * VS];
};

template <int KP, int NQ>
__device__ __forceinline__ void forward(const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& m,
                                        const TensorMap& p, const float* rows, const float* state, const TensorMap& o,
                                        float* last, bool keeps, const TensorMap& s_kept, const TensorMap& vh_kept,
                                        const Sizes& n) {
    DYNAMIC_SHARED(shared);
    auto& sh = *reinterpret_cast<ForwardShared<KP, NQ>*>(shared);
    const auto copy = [&](int group, int c, int v0, int use) {
        sh.stages[use % STAGES].load(k, q, v, m, p, rows, use / STAGES, group, c, v0, n);
    };
    walk<false>(sh.stages, n, copy, [&](int wg, int group, int v0, int use) {
        const int chunks = n.chunks(), first = group * chunks, thread = threadIdx.x % WARPGROUP;
        float s[KP / 2];
        load_state(s, state, group, v0, n);
        uint32_t a[KP / 16][4];
        pack(a, s);
        if (keeps) {
            if (thread == 0) wait_stores();
            group_barrier(wg);
            stage_operand(sh.s[wg], a);
            fence_copies();
            group_barrier(wg);
            if (thread == 0) store_panel<KP>(s_kept, first, v0, sh.s[wg], n), commit_stores();
        }
        for (int c = 0; c < chunks; c++, use++) {
            auto& stage = sh.stages[use % STAGES];
            stage.slot.full.wait(use / STAGES);
            float r[C / 2], out[NQ / 2];
            start_product<C, KP, C>(r, a, operand(stage.k), false);
            start_product<NQ, KP, NQ>(out, a, operand(stage.q), false);
            uint32_t x[C / 16][4];
            fetch_operand(x, stage.v[wg]);
            wait_product<1>(r);
#pragma unroll
            for (int j = 0; j < C / 16; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float beta[2], w[2];
                    load_vec<2>(stage.rows + BETA * C + column(j, i), beta);
                    load_vec<2>(stage.rows + BETA_DECAY * C + column(j, i), w);
                    const float *d = r + 8 * j + 2 * i;
                    x[j][i] = pack_bf16(beta[0] * low(x[j][i]) - w[0] * d[0], beta[1] * high(x[j][i]) - w[1] * d[1]);
                }
            start_product<C, C, C>(r, x, operand(stage.m), false);
            wait_product<1>(out);
            scale_columns(out, stage.rows + READ * C);
            compute_now(out);
            const float all = __expf(fminf(stage.rows[B * C + C - 1], 0.f));
#pragma unroll
            for (int i = 0; i < KP / 2; i++) s[i] *= all;
            compute_now(s);
            wait_product<0>(r);
            uint32_t written[C / 16][4], tail[C / 16][4];
            pack(written, r);
            pack_scaled(tail, r, stage.rows + TAIL * C);
            start_product<NQ, C, NQ>(out, written, operand(stage.p), true);
            start_product<KP, C>(s, tail, operand(stage.k, C));
            if (thread == 0) wait_stores();
            group_barrier(wg);
            if (keeps) stage_operand(sh.vh[wg], written);
            wait_product<1>(out);
            uint32_t packed[NQ / 16][4];
            pack(packed, out);
            stage_operand(sh.o[wg], packed);
            wait_product<0>(s);
            stage.slot.release();
            pack(a, s);
            if (keeps && c + 1 < chunks) stage_operand(sh.s[wg], a);
            fence_copies();
            group_barrier(wg);
            if (thread == 0) {
                store_box(o, group / n.heads, c * n.tokens(), group % n.heads, v0, sh.o[wg]);
                if (keeps) store_panel<C>(vh_kept, first + c, v0, sh.vh[wg], n);
                if (keeps && c + 1 < chunks) store_panel<KP>(s_kept, first + c + 1, v0, sh.s[wg], n);
                commit_stores();
            }
        }
        store_state(last, s, group, v0, n);
    });
}

// ---- backward, along the sequence

template <int KP, int NQ>
struct ReverseShared {
    Stage<KP, NQ, true> stages[STAGES];
    bf16 s[GROUPS][KP * VS], z[GROUPS][C * VS];
};

// `ds` gets dS1 of every chunk, `dv` Z, `d_state` (may be null) the initial state's gradient.
template <int KP, int NQ>
__device__ __forceinline__ void reverse(const TensorMap& q, const TensorMap& k, const TensorMap& m, const TensorMap& p,
                                        const float* rows, const TensorMap& d_o, const float* d_last,
                                        const TensorMap& dv, const TensorMap& ds, float* d_state, const Sizes& n) {
    DYNAMIC_SHARED(shared);
    auto& sh = *reinterpret_cast<ReverseShared<KP, NQ>*>(shared);
    const auto copy = [&](int group, int c, int v0, int use) {
        sh.stages[use % STAGES].load(k, q, d_o, m, p, rows, use / STAGES, group, c, v0, n);
    };
    walk<true>(sh.stages, n, copy, [&](int wg, int group, int v0, int use) {
        const int chunks = n.chunks(), first = group * chunks, thread = threadIdx.x % WARPGROUP;
        float s[KP / 2];
        load_state(s, d_last, group, v0, n);
        uint32_t a[KP / 16][4];
        pack(a, s);
        if (thread == 0) wait_stores();
        group_barrier(wg);
        stage_operand(sh.s[wg], a);
        fence_copies();
        group_barrier(wg);
        if (thread == 0) store_panel<KP>(ds, first + chunks - 1, v0, sh.s[wg], n), commit_stores();
        for (int c = chunks - 1; c >= 0; c--, use++) {
            auto& stage = sh.stages[use % STAGES];
            stage.slot.full.wait(use / STAGES);
            float x[C / 2], y[C / 2];
            start_product<C, KP, C>(x, a, operand(stage.k), false);
            uint32_t out[NQ / 16][4];
            fetch_operand(out, stage.v[wg]);
            start_product<C, NQ>(y, out, operand(stage.p, NQ), false);
            const float all = __expf(fminf(stage.rows[B * C + C - 1], 0.f));
#pragma unroll
            for (int i = 0; i < KP / 2; i++) s[i] *= all;
            compute_now(s);
            wait_product<1>(x);
            scale_columns(x, stage.rows + TAIL * C);
            compute_now(x);
            wait_product<0>(y);
            uint32_t of_vh[C / 16][4];
#pragma unroll
            for (int i = 0; i < C / 2; i++) x[i] += y[i];
            pack(of_vh, x);
            start_product<C, C>(x, of_vh, operand(stage.m, C), false);
#pragma unroll
            for (int j = 0; j < NQ / 16; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float w[2];
                    load_vec<2>(stage.rows + READ * C + column(j, i), w);
                    out[j][i] = pack_bf16(low(out[j][i]) * w[0], high(out[j][i]) * w[1]);
                }
            start_product<KP, NQ>(s, out, operand(stage.q, NQ));
            wait_product<1>(x);
            uint32_t z[C / 16][4], scaled[C / 16][4];
            pack(z, x);
            pack_scaled(scaled, x, stage.rows + BETA_DECAY * C, -1.f);
            start_product<KP, C>(s, scaled, operand(stage.k, C));
            if (thread == 0) wait_stores();
            group_barrier(wg);
            stage_operand(sh.z[wg], z);
            wait_product<0>(s);
            stage.slot.release();
            pack(a, s);
            if (c > 0) stage_operand(sh.s[wg], a);
            fence_copies();
            group_barrier(wg);
            if (thread == 0) {
                store_box(dv, group / n.heads, c * n.tokens() * n.sub, group % n.heads, v0, sh.z[wg]);
                if (c > 0) store_panel<KP>(ds, first + c - 1, v0, sh.s[wg], n);
                commit_stores();
            }
        }
        if (d_state) store_state(d_state, s, group, v0, n);
    });
}

// ---- backward, chunk by chunk

// A slice of 64 value columns of a chunk.
template <int KP>
struct Slice {
    alignas(1024) bf16 vh[C * VS];
    bf16 z[C * VS], d_o[C * VS], v[C * VS], s[KP * VS], ds[KP * VS];
};
// Sums over rows (one of every sub-step or token) and over columns, by the warp that has their rows.
struct Sums {
    float row_q[C], column_p[4][C], row_l[C], column_l[4][C], row_t[C], row_u[C];
};
template <int KP>
struct GradientShared {
    Slice<KP> slices[STAGES];
    bf16 k[C * KP], q[C * KP], dq[C * KP], dk[C * KP], dv[C * VS];
    bf16 of_p[C * C], of_l[C * C];  // dP ∘ G and β dL ∘ G
    float rows[ROWS * C];
    Sums sums[2];
    float of_beta[C], of_b[C], overlap[4];
    Slot slots[STAGES], of_keys;
};

// Where the accumulators' pair at columns 8·j + 2·(lane % 4) of row lane / 4 (+ 8) of a warp's tile lies in panels.
__device__ __forceinline__ int pair_at(int j, int half) {
    const int g = lane_id() / 4, row = threadIdx.x % WARPGROUP / WARP * 16 + g + 8 * half;
    return j / 8 * (C * PANEL) + row * PANEL + (j % 8 ^ g) * 8 + lane_id() % 4 * 2;
}

// Over the four lanes that share a row of accumulators, and the eight that share a column.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}
__device__ __forceinline__ float column_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 4);
    x += __shfl_xor_sync(FULL, x, 8);
    return x + __shfl_xor_sync(FULL, x, 16);
}

// Multiplies the two rows of accumulators that a thread has by `scale`, and gives their products with a tile's rows.
template <int N>
__device__ __forceinline__ void scale_and_dot(float (&d)[N], const float (&scale)[2], const bf16* tile,
                                              float (&dot)[2]) {
    dot[0] = dot[1] = 0.f;
#pragma unroll
    for (int j = 0; j < N / 4; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x[2];
            load_vec<2>(tile + pair_at(j, half), x);
            float* const y = d + 4 * j + 2 * half;
            y[0] *= scale[half], y[1] *= scale[half];
            dot[half] += x[0] * y[0] + x[1] * y[1];
        }
    dot[0] = row_sum(dot[0]), dot[1] = row_sum(dot[1]);
}

// The gradient of a weighted product: d ← weight(row, column) d, for P or L, with the sums of d ∘ `product` over every
// row, and of these times `of_row` over every column.
template <class F>
__device__ __forceinline__ void weigh(float (&d)[C / 2], const float (&product)[C / 2], const float (&of_row)[2],
                                      float (&sum)[2], float* columns, F weight) {
    const int row = threadIdx.x % WARPGROUP / WARP * 16 + lane_id() / 4;
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int j = 0; j < C / 8; j++) {
        float column[2] = {0.f, 0.f};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            d[4 * j + e] *= weight(row + e / 2 * 8, 8 * j + lane_id() % 4 * 2 + e % 2);
            const float x = d[4 * j + e] * product[4 * j + e];
            sum[e / 2] += x;
            column[e % 2] += of_row[e / 2] * x;
            d[4 * j + e] *= of_row[e / 2];
        }
        column[0] = column_sum(column[0]), column[1] = column_sum(column[1]);
        if (lane_id() < 4) store_vec<2>(columns + 8 * j + 2 * lane_id(), column);
    }
    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);
}

// The first warpgroup that multiplies has dP and dQ, and all that is no product; the second dL and dK.
template <int KP>
__device__ __forceinline__ void gradients(const TensorMap& q, const TensorMap& k, const TensorMap& v, const float* rows,
                                          const TensorMap& s_kept, const TensorMap& vh_kept, const TensorMap& ds_kept,
                                          const TensorMap& d_o, const TensorMap& dq, const TensorMap& dk,
                                          const TensorMap& dv, float* d_beta, float* dg, float scale, const Sizes& n) {
    DYNAMIC_SHARED(shared);
    auto& sh = *reinterpret_cast<GradientShared<KP>*>(shared);
    const int tokens = n.tokens(), steps = tokens * n.sub, chunks = n.chunks();
    const int items = n.batch * n.heads * chunks, slices = n.panels();
    if (threadIdx.x == 0) {
        for (auto& slot : sh.slots) slot.init(GROUPS);
        sh.of_keys.init(GROUPS);
        fence_barrier_init();
    }
    // Zeros where copies write nothing.
    if (tokens < C) {
        for (int i = threadIdx.x; i < (int)sizeof(sh.slices) / 4; i += THREADS)
            reinterpret_cast<uint32_t*>(sh.slices)[i] = 0;
        for (int i = threadIdx.x; i < C * KP; i += THREADS) reinterpret_cast<uint32_t*>(sh.k)[i] = 0;
        fence_copies();
    }
    __syncthreads();
    const int wg = warpgroup() - 1;
    if (wg < 0) {
        fewer_registers<24>();
        if (threadIdx.x == 0)
            for (int item = items - 1 - blockIdx.x, use = 0, turn = 0; item >= 0; item -= gridDim.x, turn++) {
                const int group = item / chunks, c = item % chunks, batch = group / n.heads, head = group % n.heads;
                for (int i = 0; i < slices; i++, use++) {
                    auto& slice = sh.slices[use % STAGES];
                    Slot& slot = sh.slots[use % STAGES];
                    slot.take(use / STAGES, 2 * VS * (C + 2 * steps + tokens + 2 * KP));
                    load_box(slice.d_o, d_o, batch, c * tokens, head, i * VS, slot.full);
                    load_box(slice.z, dv, batch, c * steps, head, i * VS, slot.full);
                    load_box(slice.vh, vh_kept, item * slices + i, 0, 0, 0, slot.full);
                    for (int r = 0; r < KP; r += BOX) {
                        load_box(slice.s + r * PANEL, s_kept, item * slices + i, r, 0, 0, slot.full);
                        load_box(slice.ds + r * PANEL, ds_kept, item * slices + i, r, 0, 0, slot.full);
                    }
                    load_box(slice.v, v, batch, c * steps, head, i * VS, slot.full);
                    if (i > 0) continue;
                    sh.of_keys.take(turn, 2 * KP * (steps + tokens) + 4 * ROWS * C);
                    for (int panel = 0; panel < KP / PANEL; panel++) {
                        load_box(sh.k + panel * C * PANEL, k, batch, c * steps, head, panel * PANEL, sh.of_keys.full);
                        load_box(sh.q + panel * C * PANEL, q, batch, c * tokens, head, panel * PANEL, sh.of_keys.full);
                    }
                    load_floats<ROWS * C>(sh.rows, rows + (long long)item * ROWS * C, sh.of_keys.full);
                }
            }
        return;
    }
    const int thread = threadIdx.x % WARPGROUP, warp = thread / WARP, row = warp * 16 + lane_id() / 4;
    const float *const b = sh.rows + B * C, *const beta = sh.rows + BETA * C;
    const uint32_t k_rows = operand(sh.k), k_columns = operand(sh.k, C);
    constexpr int BOTH = 2 * WARPGROUP, P_READY = 3, SUMS_READY = 4;
    if (wg == 0) {
        more_registers<240>();
        for (int item = items - 1 - blockIdx.x, use = 0, turn = 0; item >= 0; item -= gridDim.x, turn++) {
            const int group = item / chunks, c = item % chunks, batch = group / n.heads, head = group % n.heads;
            Sums& sums = sh.sums[turn % 2];
            float dp[C / 2], gq[KP / 2], zv = 0.f, overlap = 0.f;
            for (int i = 0; i < slices; i++, use++) {
                auto& slice = sh.slices[use % STAGES];
                Slot& slot = sh.slots[use % STAGES];
                slot.full.wait(use / STAGES);
                start_product<C, VS, C, C>(dp, operand(slice.d_o), operand(slice.vh), i > 0);
                start_product<KP, VS, C, KP>(gq, operand(slice.d_o), operand(slice.s), i > 0);
                if (i == 0) sh.of_keys.full.wait(turn);
                // Z lies in dv and becomes dV there.
                if (thread == 0) wait_stores();
                group_barrier(wg);
                const int r = thread / 2;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int at = r * PANEL + ((thread % 2 * 4 + j) ^ r % 8) * 8;
                    float x[8], z[8];
                    load_vec<8>(slice.v + at, x);
                    load_vec<8>(slice.z + at, z);
#pragma unroll
                    for (int e = 0; e < 8; e++) zv += x[e] * z[e], z[e] *= beta[r];
                    store_vec<8>(sh.dv + at, z);
                }
                if (dg) {
#pragma unroll
                    for (int j = 0; j < KP * VS / 8 / WARPGROUP; j++) {
                        const int at = (j * WARPGROUP + thread) * 8;
                        float x[8], y[8];
                        load_vec<8>(slice.s + at, x);
                        load_vec<8>(slice.ds + at, y);
#pragma unroll
                        for (int e = 0; e < 8; e++) overlap += x[e] * y[e];
                    }
                }
                fence_copies();
                group_barrier(wg);
                if (thread == 0) store_box(dv, batch, c * steps, head, i * VS, sh.dv), commit_stores();
                wait_product<0>(dp);
                compute_now(gq);
                slot.release();
            }
            zv += __shfl_xor_sync(FULL, zv, 1);
            if (thread % 2 == 0) sh.of_beta[thread / 2] = zv;
            overlap = warp_sum(overlap);
            if (lane_id() == 0) sh.overlap[warp] = overlap;

            float qk[C / 2];
            start_product<C, KP, C, C>(qk, operand(sh.q), k_rows);
            const float reads[2] = {sh.rows[READ * C + row], sh.rows[READ * C + row + 8]}, one[2] = {1.f, 1.f};
            float at_q[2], sum[2];
            scale_and_dot(gq, reads, sh.q, at_q);
            wait_product<0>(qk);
            weigh(dp, qk, one, sum, sums.column_p[warp], [&](int t, int j) {
                const int end = (t + 1) * n.sub;
                return j < end ? scale * decay(b[min(end, C) - 1] - b[j]) : 0.f;
            });
            if (lane_id() % 4 == 0) {
                sums.row_q[row] = sum[0] + at_q[0];
                sums.row_q[row + 8] = sum[1] + at_q[1];
            }
            uint32_t of_p[C / 16][4];
            pack(of_p, dp);
            start_product<KP, C>(gq, of_p, k_columns);
            stage_tile(sh.of_p, dp, 1.f, 1.f);
            named_barrier_arrive(P_READY, BOTH);
            wait_product<0>(gq);
            if (thread == 0) wait_stores();
            group_barrier(wg);
            stage_tile(sh.dq, gq, 1.f, 1.f);
            fence_copies();
            named_barrier(SUMS_READY, BOTH);
            if (thread == 0) {
                for (int panel = 0; panel < KP / PANEL; panel++)
                    store_box(dq, batch, c * tokens, head, panel * PANEL, sh.dq + panel * C * PANEL);
                commit_stores();
            }
            if (thread < C) {
                const int j = thread;
                const bool ends = (j + 1) % n.sub == 0 && j / n.sub < tokens;
                const float l = sums.row_l[j], u = sums.row_u[j], t = sums.row_t[j];
                if (j < steps && c * steps + j < n.steps * n.sub)
                    d_beta[((long long)batch * n.steps * n.sub + c * steps + j) * n.heads + head] = sh.of_beta[j] - u + l;
                float x = beta[j] * (l - u) - t + (ends ? sums.row_q[j / n.sub] : 0.f);
#pragma unroll
                for (int w = 0; w < 4; w++) x -= sums.column_p[w][j] + sums.column_l[w][j];
                sh.of_b[j] = x;
            }
            group_barrier(wg);
            if (dg && warp == 0) {
                // From the end: every lane sums two sub-steps, then the lanes after it.
                const int lane = lane_id();
                const float x = sh.of_b[2 * lane], y = sh.of_b[2 * lane + 1];
                const float all = sh.overlap[0] + sh.overlap[1] + sh.overlap[2] + sh.overlap[3];
                const float end = warp_sum(sums.row_t[2 * lane] + sums.row_t[2 * lane + 1]) + decay(b[C - 1]) * all;
                float after = x + y;
#pragma unroll
                for (int d = 1; d < WARP; d *= 2) {
                    const float more = __shfl_down_sync(FULL, after, d);
                    if (lane + d < WARP) after += more;
                }
                __syncwarp();
                sh.of_b[2 * lane] = end + after;
                sh.of_b[2 * lane + 1] = end + after - x;
                __syncwarp();
                for (int t = lane; t < tokens && c * tokens + t < n.steps; t += WARP)
                    dg[((long long)batch * n.steps + c * tokens + t) * n.heads + head] = sh.of_b[t * n.sub];
            }
            sh.of_keys.release();
        }
    } else {
        more_registers<240>();
        for (int item = items - 1 - blockIdx.x, use = 0, turn = 0; item >= 0; item -= gridDim.x, turn++) {
            const int group = item / chunks, c = item % chunks, batch = group / n.heads, head = group % n.heads;
            Sums& sums = sh.sums[turn % 2];
            float dl[C / 2], gz[KP / 2], gk[KP / 2];
            for (int i = 0; i < slices; i++, use++) {
                auto& slice = sh.slices[use % STAGES];
                Slot& slot = sh.slots[use % STAGES];
                slot.full.wait(use / STAGES);
                start_product<C, VS, C, C>(dl, operand(slice.z), operand(slice.vh), i > 0);
                start_product<KP, VS, C, KP>(gz, operand(slice.z), operand(slice.s), i > 0);
                start_product<KP, VS, C, KP>(gk, operand(slice.vh), operand(slice.ds), i > 0);
                wait_product<0>(dl);
                compute_now(gz);
                compute_now(gk);
                slot.release();
            }
            sh.of_keys.full.wait(turn);
            const float tail[2] = {sh.rows[TAIL * C + row], sh.rows[TAIL * C + row + 8]};
            const float before[2] = {decay(b[row]), decay(b[row + 8])}, by_beta[2] = {beta[row], beta[row + 8]};
            float t[2], u[2], l[2];
            scale_and_dot(gk, tail, sh.k, t);
            scale_and_dot(gz, before, sh.k, u);
#pragma unroll
            for (int i = 0; i < KP / 2; i++) gk[i] -= by_beta[i / 2 % 2] * gz[i];
            compute_now(gk);
            float kk[C / 2];
            start_product<C, KP, C, C>(kk, k_rows, k_rows);
            wait_product<0>(kk);
            weigh(dl, kk, by_beta, l, sums.column_l[warp],
                  [&](int i, int j) { return j < i ? -decay(b[i] - b[j]) : 0.f; });
            if (lane_id() % 4 == 0)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    sums.row_t[row + 8 * half] = t[half];
                    sums.row_u[row + 8 * half] = u[half];
                    sums.row_l[row + 8 * half] = l[half];
                }
            uint32_t of_l[C / 16][4], across[C / 16][4], of_p[C / 16][4];
            pack(of_l, dl);
            start_product<KP, C>(gk, of_l, k_columns);
            group_barrier(wg);
            stage_tile(sh.of_l, dl, 1.f, 1.f);
            group_barrier(wg);
            fetch_operand(across, sh.of_l);
            start_product<KP, C>(gk, across, k_columns);
            named_barrier(P_READY, BOTH);
            fetch_operand(of_p, sh.of_p);
            start_product<KP, C>(gk, of_p, operand(sh.q, C));
            named_barrier_arrive(SUMS_READY, BOTH);
            wait_product<0>(gk);
            sh.of_keys.release();
            if (thread == 0) wait_stores();
            group_barrier(wg);
            stage_tile(sh.dk, gk, 1.f, 1.f);
            fence_copies();
            group_barrier(wg);
            if (thread == 0) {
                for (int panel = 0; panel < KP / PANEL; panel++)
                    store_box(dk, batch, c * steps, head, panel * PANEL, sh.dk + panel * C * PANEL);
                commit_stores();
            }
        }
    }
    if (thread == 0) wait_stores();
}

}  // namespace

#define GRADIENTS(KP)                                                                                                  \
    static_assert(sizeof(GradientShared<KP>) <= 227 * 1024);                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_gradients_##KP##_sm90a(                             \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
        const float* rows, const __grid_constant__ TensorMap s_kept, const __grid_constant__ TensorMap vh_kept,        \
        const __grid_constant__ TensorMap ds_kept, const __grid_constant__ TensorMap d_o,                              \
        const __grid_constant__ TensorMap dq, const __grid_constant__ TensorMap dk,                                    \
        const __grid_constant__ TensorMap dv, float* d_beta, float* dg, float scale, int batch, int steps, int heads,  \
        int keys, int values, int sub) {                                                                               \
        gradients<KP>(q, k, v, rows, s_kept, vh_kept, ds_kept, d_o, dq, dk, dv, d_beta, dg, scale,                     \
                      {batch, steps, heads, keys, values, sub});                                                       \
    }
GRADIENTS(64)
GRADIENTS(128)

#define WALK(KP, NQ)                                                                                                   \
    static_assert(sizeof(ForwardShared<KP, NQ>) <= 227 * 1024);                                                        \
    extern "C" __global__ void __launch_bounds__(WARPGROUP, 5) delta_prepare_##KP##_##NQ##_sm90a(                      \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const float* beta, const float* g,   \
        bf16* m, const __grid_constant__ TensorMap p, float* rows, float scale, int batch, int steps, int heads,       \
        int keys, int values, int sub) {                                                                               \
        prepare<KP, NQ>(q, k, beta, g, m, p, rows, scale, {batch, steps, heads, keys, values, sub});                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_forward_##KP##_##NQ##_sm90a(                        \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
        const __grid_constant__ TensorMap m, const __grid_constant__ TensorMap p, const float* rows,                   \
        const float* state, const __grid_constant__ TensorMap o, float* last, int keeps,                               \
        const __grid_constant__ TensorMap s_kept, const __grid_constant__ TensorMap vh_kept, int batch, int steps,     \
        int heads, int keys, int values, int sub) {                                                                    \
        forward<KP, NQ>(q, k, v, m, p, rows, state, o, last, keeps, s_kept, vh_kept,                                   \
                        {batch, steps, heads, keys, values, sub});                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_reverse_##KP##_##NQ##_sm90a(                        \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap m, \
        const __grid_constant__ TensorMap p, const float* rows, const __grid_constant__ TensorMap d_o,                 \
        const float* d_last, const __grid_constant__ TensorMap dv, const __grid_constant__ TensorMap ds,               \
        float* d_state, int batch, int steps, int heads, int keys, int values, int sub) {                              \
        reverse<KP, NQ>(q, k, m, p, rows, d_o, d_last, dv, ds, d_state, {batch, steps, heads, keys, values, sub});     \
    }
WALK(64, 16)
WALK(64, 64)
WALK(128, 16)
WALK(128, 64)
