// Causal softmax attention of attention.cu for Hopper: the same results from tensor cores that read shared memory.
//
//   bf16; head dims up to 64 or up to 128, padded to that in shared memory only. Tensors as in attention.cu, given as
//   tensor maps; lse and delta [B, H, T64], T64 being T rounded up to a multiple of 64. Behind T, lse is infinite and
//   delta zero.
//
// Source: Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.
//
// One warp starts all copies into shared memory. Two or three other warpgroups multiply, each with 64 rows of the result
// in registers. They take turns at starting products, so that while one forms exponentials, the tensor cores work for
// another. A block stays on its multiprocessor and takes one tile after the other: copies run ahead into the next one.
//
// attention_forward  a warpgroup has 64 queries and walks over the keys that they see. The next scores are formed while
//                    the last weights are multiplied with their values.
// attention_dq       the same walk: p = 2^(s−lse), ds = p ⊙ (do vᵀ − delta), dq += ds k. Writes delta first.
// attention_dkdv     a warpgroup has 64 keys and walks over the queries that see them, with transposed scores:
//                    dv += pᵀ do, dk += dsᵀ q. Needs delta: runs after attention_dq.
//
// These two are 7 products of tiles, where 5 would do. For long sequences there is the same in one pass, between
// attention_delta, which writes delta, and attention_round, which rounds dq:
//
// attention_backward as attention_dkdv; what a tile of keys gives dq is added to a sum in global memory, in parts
//                    [B, H, T64/64, 2][64 queries x 64 columns] f32, elements as the threads hold them. turns, one a part,
//                    tells how many have added: the order is the same in every run.
//
// Entry points: attention_<forward|dq|dkdv>_<64|128>_sm90a, attention_<delta|round>_sm90a,
// attention_backward_128_sm90a; at most one block a multiprocessor, but for delta and round.
#include "wgmma.cuh"

namespace {

constexpr int STAGES = 2;  // tiles of keys and values under way

// Threads of a block with so many warpgroups that multiply, the rows that those own, and the registers of a thread.
template <int GROUPS>
struct Team {
    static constexpr int THREADS = WARPGROUP * (1 + GROUPS), OWN = 64 * GROUPS;
    static constexpr int COPY_REGISTERS = GROUPS == 2 ? 24 : 32, MULTIPLY_REGISTERS = GROUPS == 2 ? 240 : 160;
};

struct Sizes {
    int steps, keys, heads, batch, together;
    float scale;

    __device__ __forceinline__ int padded() const { return ceil_div(steps, 64) * 64; }
};

// Tiles given to blocks, and blocks that got no more; zero between two launches, which follow each other on one stream.
__device__ int given, ended;

// The tiles of a block. A block that is done with one is given the next, the longest first, so that all end at about
// the same time; no result depends on who computes it. `together` heads are worked on at a time, so that what they
// share stays in the L2 cache.
struct Queue {
    int items[2];
    Slot slots[2];

    // `others`: warps beside those that multiply.
    __device__ __forceinline__ void init(int groups, int others = 0) {
        for (Slot& slot : slots) slot.full.init(1), slot.empty.init(4 * groups + others);
    }
};
struct Work {
    Queue& queue;
    const Sizes& n;
    int tiles, round = 0, batch, head, tile;
    bool last;  // of the last heads that are worked on together

    __device__ __forceinline__ Work(Queue& queue, const Sizes& n, int tiles) : queue(queue), n(n), tiles(tiles) {}
    __device__ __forceinline__ bool decode(int i) {
        const int all = n.batch * n.heads;
        if (i >= all * tiles) return false;
        const int first = i / (n.together * tiles) * n.together, left = i - first * tiles;
        const int heads = min(n.together, all - first), bh = first + left % heads;
        tile = left / heads, batch = bh / n.heads, head = bh % n.heads, last = first + heads == all;
        return true;
    }
    // For the one that copies. A block that waits for others takes its first tile in the order of arrival too: those
    // that were given tiles before it run, or are done.
    template <bool WAITS = false>
    __device__ __forceinline__ bool take() {
        const int i = WAITS ? atomicAdd(&given, 1) : round == 0 ? blockIdx.x : gridDim.x + atomicAdd(&given, 1);
        Slot& slot = queue.slots[round % 2];
        slot.empty.wait(round / 2 - 1);
        queue.items[round % 2] = i;
        slot.full.arrive();
        round++;
        if (decode(i)) return true;
        if (atomicAdd(&ended, 1) == gridDim.x - 1) atomicExch(&given, 0), atomicExch(&ended, 0);
        return false;
    }
    // For those that multiply.
    __device__ __forceinline__ bool next() {
        Slot& slot = queue.slots[round % 2];
        slot.full.wait(round / 2);
        const int i = __shfl_sync(FULL, queue.items[round % 2], 0);
        slot.release();
        round++;
        return decode(i);
    }
};

// Whose turn it is to start products: the warpgroups alternate.
template <int GROUPS>
struct Turns {
    int group;

    __device__ __forceinline__ explicit Turns(int group) : group(group) {
        if (group == GROUPS - 1) named_barrier_arrive(1, 2 * WARPGROUP);
    }
    __device__ __forceinline__ void begin() const { named_barrier(1 + group, 2 * WARPGROUP); }
    __device__ __forceinline__ void end() const { named_barrier_arrive(1 + (group + 1) % GROUPS, 2 * WARPGROUP); }
    // Takes the turn that nobody will.
    __device__ __forceinline__ void leave() const {
        if (group == 0) begin();
    }
};

// All threads of one warpgroup.
__device__ __forceinline__ void group_barrier(int group) { named_barrier(4 + group, WARPGROUP); }

// Makes scores of keys behind a query -infinite. `limit` is, for each of the two rows, the last key that it sees,
// counted from the first of the tile.
template <int N>
__device__ __forceinline__ void mask(float (&s)[N], const int (&limit)[2]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        if (8 * (i / 4) + i % 2 + lane_id() % 4 * 2 > limit[i / 2 % 2]) s[i] = -INFINITY;
}

// ---- forward

template <int DP, int GROUPS, int BN>
struct ForwardShared {
    static constexpr int OWN = Team<GROUPS>::OWN;
    bf16 q[OWN * DP], k[STAGES][BN * DP], v[STAGES][BN * DP], o[GROUPS][BOX * DP];
    Slot of_q, of_k[STAGES], of_v[STAGES];
    Queue queue;
};

template <int DP, int GROUPS, int BN>
__device__ __forceinline__ void forward(const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& o,
                                        float* lse, const Sizes& n) {
    constexpr int OWN = Team<GROUPS>::OWN;
    DYNAMIC_SHARED(shared);
    auto& s = *reinterpret_cast<ForwardShared<DP, GROUPS, BN>*>(shared);
    if (threadIdx.x == 0) {
        s.queue.init(GROUPS);
        s.of_q.init(GROUPS);
        for (int i = 0; i < STAGES; i++) s.of_k[i].init(GROUPS), s.of_v[i].init(GROUPS);
        fence_barrier_init();
    }
    __syncthreads();
    const int tiles = ceil_div(n.steps, OWN), past = n.keys - n.steps;
    Work work(s.queue, n, tiles);
    int use = 0, use_q = 0;
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<Team<GROUPS>::COPY_REGISTERS>();
        if (threadIdx.x == 0)
            for (; work.take(); use_q++) {
                const int q0 = OWN * (tiles - 1 - work.tile), blocks = ceil_div(min(past + q0 + OWN, n.keys), BN);
                s.of_q.take(use_q, load_bytes<OWN, DP>());
                load_tile<OWN, DP>(s.q, q, work.batch, q0, work.head, s.of_q.full);
                for (int block = 0; block < blocks; block++, use++) {
                    const int stage = use % STAGES;
                    s.of_k[stage].take(use / STAGES, load_bytes<BN, DP>());
                    load_tile<BN, DP>(s.k[stage], k, work.batch, block * BN, work.head, s.of_k[stage].full);
                    s.of_v[stage].take(use / STAGES, load_bytes<BN, DP>());
                    load_tile<BN, DP>(s.v[stage], v, work.batch, block * BN, work.head, s.of_v[stage].full);
                }
            }
        return;
    }
    more_registers<Team<GROUPS>::MULTIPLY_REGISTERS>();
    const int group = warpgroup() - 1, thread = threadIdx.x % WARPGROUP;
    const int row = thread / WARP * 16 + lane_id() / 4;
    const float c = n.scale * LOG2E;
    const Turns<GROUPS> turns(group);
    const uint32_t q_rows = operand(s.q + group * 64 * PANEL);
    for (; work.next(); use_q++) {
        const int q0 = OWN * (tiles - 1 - work.tile), blocks = ceil_div(min(past + q0 + OWN, n.keys), BN);
        const int w0 = q0 + 64 * group;
        // Blocks that the warpgroup's queries see.
        const int own = w0 < n.steps ? ceil_div(min(past + w0 + 64, n.keys), BN) : 0;
        float acc[DP / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < DP / 2; i++) acc[i] = 0.f;
        float x[BN / 2];
        uint32_t p[BN / 16][4];
        // From scores to weights; gives what the earlier weights are to be multiplied with.
        const auto soften = [&](int block, float (&old)[2]) {
            const int k0 = block * BN;
            if (k0 + BN > past + w0 + 1) {
                const int limit[2] = {past + w0 + row - k0, past + w0 + row + 8 - k0};
                mask(x, limit);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = top[half];
#pragma unroll
                for (int i = 2 * half; i < BN / 2; i += 4) most = fmaxf(most, fmaxf(x[i], x[i + 1]));
                most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
                most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
                old[half] = exp2_fast((top[half] - most) * c);
                top[half] = most;
                const float shift = most * c;
                float part = 0.f;
#pragma unroll
                for (int i = 2 * half; i < BN / 2; i += 4)
#pragma unroll
                    for (int e = i; e < i + 2; e++) {
                        x[e] = exp2_fast(fmaf(x[e], c, -shift));
                        part += x[e];
                    }
                sum[half] = fmaf(sum[half], old[half], part);
            }
        };
        if (own > 0) {
            s.of_q.full.wait(use_q);
            Slot& first = s.of_k[use % STAGES];
            first.full.wait(use / STAGES);
            start_product<BN, DP, OWN, BN>(x, q_rows, operand(s.k[use % STAGES]));
            wait_product<0>(x);
            first.release();
            float old[2];
            soften(0, old);
            pack(p, x);
            const auto wait_keys = [&](int block, int use) {
                if (block < own) s.of_k[use % STAGES].full.wait(use / STAGES);
            };
            wait_keys(1, use + 1);
            for (int block = 1; block < own; block++) {
                Slot& slot_v = s.of_v[use % STAGES];
                const uint32_t values = operand(s.v[use % STAGES], BN);
                const int use_v = use / STAGES;
                use++;
                Slot& slot_k = s.of_k[use % STAGES];
                turns.begin();
                start_product<BN, DP, OWN, BN>(x, q_rows, operand(s.k[use % STAGES]));
                slot_v.full.wait(use_v);
                start_product<DP, BN>(acc, p, values);
                turns.end();
                wait_product<1>(x);
                slot_k.release();
                soften(block, old);
                compute_now(x);
                wait_keys(block + 1, use + 1);
                wait_product<0>(acc);
                slot_v.release();
#pragma unroll
                for (int i = 0; i < DP / 2; i++) acc[i] *= old[i / 2 % 2];
                pack(p, x);
            }
            s.of_q.release();
            Slot& last = s.of_v[use % STAGES];
            last.full.wait(use / STAGES);
            start_product<DP, BN>(acc, p, operand(s.v[use % STAGES], BN));
            wait_product<0>(acc);
            last.release();
            use++;
        } else {
            s.of_q.full.wait(use_q);
            s.of_q.release();
        }
        // Blocks that only the other warpgroup sees; a slot is emptied after it was filled.
        for (int block = own; block < blocks; block++, use++) {
            const int stage = use % STAGES;
            s.of_k[stage].full.wait(use / STAGES);
            s.of_k[stage].release();
            if (block > 0) turns.begin(), turns.end();
            s.of_v[stage].full.wait(use / STAGES);
            s.of_v[stage].release();
        }

        float inverse[2];
        float* const of_lse = lse + (long long)(work.batch * n.heads + work.head) * n.padded();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[half];
            total += __shfl_xor_sync(FULL, total, 1);
            total += __shfl_xor_sync(FULL, total, 2);
            inverse[half] = 1.f / total;
            const int t = w0 + row + 8 * half;
            if (lse && lane_id() % 4 == 0 && t < n.padded())
                of_lse[t] = t < n.steps ? fmaf(top[half], c, log2f(total)) : INFINITY;
        }
        if (thread == 0) wait_stores();
        group_barrier(group);
        stage_tile(s.o[group], acc, inverse[0], inverse[1]);
        fence_copies();
        group_barrier(group);
        if (thread == 0 && own > 0) store_tile<DP>(o, work.batch, w0, work.head, s.o[group]);
    }
    turns.leave();
    if (thread == 0) wait_stores();
}

// ---- backward

template <int DP, int GROUPS, int BN>
struct QueryShared {
    static constexpr int OWN = Team<GROUPS>::OWN;
    bf16 q[OWN * DP], dout[OWN * DP], k[STAGES][BN * DP], v[STAGES][BN * DP], dq[GROUPS][BOX * DP];
    Slot of_q, of_k[STAGES], of_v[STAGES];
    Queue queue;
};

template <int DP, int GROUPS, int BN>
__device__ __forceinline__ void backward_q(const TensorMap& q, const TensorMap& k, const TensorMap& v, const bf16* o,
                                           const TensorMap& dout, const TensorMap& dq, const float* lse, float* delta,
                                           int values, const Sizes& n) {
    constexpr int OWN = Team<GROUPS>::OWN;
    DYNAMIC_SHARED(shared);
    auto& s = *reinterpret_cast<QueryShared<DP, GROUPS, BN>*>(shared);
    if (threadIdx.x == 0) {
        s.queue.init(GROUPS);
        s.of_q.init(GROUPS);
        for (int i = 0; i < STAGES; i++) s.of_k[i].init(GROUPS), s.of_v[i].init(GROUPS);
        fence_barrier_init();
    }
    __syncthreads();
    const int tiles = ceil_div(n.steps, OWN), past = n.keys - n.steps;
    Work work(s.queue, n, tiles);
    int use = 0, use_q = 0;
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<Team<GROUPS>::COPY_REGISTERS>();
        if (threadIdx.x == 0)
            for (; work.take(); use_q++) {
                const int q0 = OWN * (tiles - 1 - work.tile), blocks = ceil_div(min(past + q0 + OWN, n.keys), BN);
                s.of_q.take(use_q, 2 * load_bytes<OWN, DP>());
                load_tile<OWN, DP>(s.dout, dout, work.batch, q0, work.head, s.of_q.full);
                load_tile<OWN, DP>(s.q, q, work.batch, q0, work.head, s.of_q.full);
                for (int block = 0; block < blocks; block++, use++) {
                    const int stage = use % STAGES;
                    s.of_k[stage].take(use / STAGES, load_bytes<BN, DP>());
                    load_tile<BN, DP>(s.k[stage], k, work.batch, block * BN, work.head, s.of_k[stage].full);
                    s.of_v[stage].take(use / STAGES, load_bytes<BN, DP>());
                    load_tile<BN, DP>(s.v[stage], v, work.batch, block * BN, work.head, s.of_v[stage].full);
                }
            }
        return;
    }
    more_registers<Team<GROUPS>::MULTIPLY_REGISTERS>();
    const int group = warpgroup() - 1, thread = threadIdx.x % WARPGROUP, warp = thread / WARP;
    const int row = warp * 16 + lane_id() / 4;
    const float c = n.scale * LOG2E;
    const Turns<GROUPS> turns(group);
    const uint32_t q_rows = operand(s.q + group * 64 * PANEL), do_rows = operand(s.dout + group * 64 * PANEL);
    for (; work.next(); use_q++) {
        const int q0 = OWN * (tiles - 1 - work.tile), blocks = ceil_div(min(past + q0 + OWN, n.keys), BN);
        const int w0 = q0 + 64 * group;
        const int own = w0 < n.steps ? ceil_div(min(past + w0 + 64, n.keys), BN) : 0;
        const long long per_query = (long long)(work.batch * n.heads + work.head) * n.padded();

        // delta: eight lanes a row, four rows of the warp's sixteen at a time.
        uint4 out[4][DP / PANEL];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int panel = 0; panel < DP / PANEL; panel++) {
                const int t = w0 + warp * 16 + 4 * i + lane_id() / 8, column = panel * PANEL + lane_id() % 8 * 8;
                out[i][panel] = make_uint4(0, 0, 0, 0);
                if (t < n.steps && column < values)
                    out[i][panel] = *reinterpret_cast<const uint4*>(
                        o + (((long long)work.batch * n.steps + t) * n.heads + work.head) * values + column);
            }
        float of_lse[2], of_delta[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = w0 + row + 8 * half;
            of_lse[half] = t < n.padded() ? lse[per_query + t] : INFINITY;
        }
        s.of_q.full.wait(use_q);
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = 64 * group + warp * 16 + 4 * i + lane_id() / 8;
            sums[i] = 0.f;
#pragma unroll
            for (int panel = 0; panel < DP / PANEL; panel++) {
                const uint4 mine = *reinterpret_cast<const uint4*>(s.dout + panel * OWN * PANEL + r * PANEL +
                                                                   (lane_id() % 8 ^ r % 8) * 8);
                const uint32_t a[4] = {mine.x, mine.y, mine.z, mine.w};
                const uint32_t b[4] = {out[i][panel].x, out[i][panel].y, out[i][panel].z, out[i][panel].w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    sums[i] = fmaf(__uint_as_float(a[e] << 16), __uint_as_float(b[e] << 16), sums[i]);
                    sums[i] = fmaf(__uint_as_float(a[e] & 0xffff0000u), __uint_as_float(b[e] & 0xffff0000u), sums[i]);
                }
            }
#pragma unroll
            for (int offset = 1; offset < 8; offset *= 2) sums[i] += __shfl_xor_sync(FULL, sums[i], offset);
            sums[i] = __shfl_sync(FULL, sums[i], lane_id() / 4 % 4 * 8);  // row 4·i + lane / 4 % 4
        }
        of_delta[0] = lane_id() < 16 ? sums[0] : sums[1], of_delta[1] = lane_id() < 16 ? sums[2] : sums[3];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = w0 + row + 8 * half;
            if (lane_id() % 4 == 0 && t < n.padded()) delta[per_query + t] = of_delta[half];
        }

        float acc[DP / 2];
#pragma unroll
        for (int i = 0; i < DP / 2; i++) acc[i] = 0.f;
        for (int block = 0; block < blocks; block++, use++) {
            const int stage = use % STAGES, k0 = block * BN;
            s.of_k[stage].full.wait(use / STAGES);
            s.of_v[stage].full.wait(use / STAGES);
            if (block >= own) {
                turns.begin(), turns.end();
                s.of_k[stage].release();
                s.of_v[stage].release();
                continue;
            }
            float p[BN / 2], ds[BN / 2];
            uint32_t packed[BN / 16][4];
            turns.begin();
            start_product<BN, DP, OWN, BN>(p, q_rows, operand(s.k[stage]));
            start_product<BN, DP, OWN, BN>(ds, do_rows, operand(s.v[stage]));
            turns.end();
            wait_product<1>(p);
            if (k0 + BN > past + w0 + 1) {
                const int limit[2] = {past + w0 + row - k0, past + w0 + row + 8 - k0};
                mask(p, limit);
            }
#pragma unroll
            for (int i = 0; i < BN / 2; i++) p[i] = exp2_fast(fmaf(p[i], c, -of_lse[i / 2 % 2]));
            compute_now(p);
            if (block + 1 < own) s.of_k[(use + 1) % STAGES].full.wait((use + 1) / STAGES);
            wait_product<0>(ds);
            s.of_v[stage].release();
#pragma unroll
            for (int i = 0; i < BN / 2; i++) ds[i] = p[i] * (ds[i] - of_delta[i / 2 % 2]);
            pack(packed, ds);
            start_product<DP, BN>(acc, packed, operand(s.k[stage], BN));
            wait_product<0>(acc);
            s.of_k[stage].release();
        }
        s.of_q.release();
        if (thread == 0) wait_stores();
        group_barrier(group);
        stage_tile(s.dq[group], acc, n.scale, n.scale);
        fence_copies();
        group_barrier(group);
        if (thread == 0 && own > 0) store_tile<DP>(dq, work.batch, w0, work.head, s.dq[group]);
    }
    turns.leave();
    if (thread == 0) wait_stores();
}

// With transposed scores, of 64 keys and some queries. Weights p = 2^(c s − lse) in place of scores; `key` is the first of
// the thread's two keys, eight apart, `first` the place of the first query among the keys.
template <int N>
__device__ __forceinline__ void weights(float (&x)[N], const float* lse, float c, int key, int first) {
    const int column = lane_id() % 4 * 2;
    if (first < key / 64 * 64 + 63) {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (key + i / 2 % 2 * 8 > first + i / 4 * 8 + column + i % 2) x[i] = -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        float of_lse[2];
        load_vec<2>(lse + 8 * j + column, of_lse);
#pragma unroll
        for (int e = 0; e < 4; e++) x[4 * j + e] = exp2_fast(fmaf(x[4 * j + e], c, -of_lse[e % 2]));
    }
}
// Gradients ds = p ⊙ (dp − delta) of scores in place of those of weights.
template <int N>
__device__ __forceinline__ void score_gradients(float (&y)[N], const float (&p)[N], const float* delta) {
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        float of_delta[2];
        load_vec<2>(delta + 8 * j + lane_id() % 4 * 2, of_delta);
#pragma unroll
        for (int e = 0; e < 4; e++) y[4 * j + e] = p[4 * j + e] * (y[4 * j + e] - of_delta[e % 2]);
    }
}

template <int DP, int GROUPS, int BM, int DEPTH>
struct KeyShared {
    static constexpr int OWN = Team<GROUPS>::OWN;
    bf16 k[OWN * DP], v[OWN * DP], q[DEPTH][BM * DP], dout[DEPTH][BM * DP], dk[GROUPS][BOX * DP], dv[GROUPS][BOX * DP];
    float lse[DEPTH][BM], delta[DEPTH][BM];
    Slot of_keys, of_queries[DEPTH];
    Queue queue;
};

template <int DP, int GROUPS, int BM, int DEPTH>
__device__ __forceinline__ void backward_kv(const TensorMap& q, const TensorMap& k, const TensorMap& v,
                                            const TensorMap& dout, const TensorMap& dk, const TensorMap& dv,
                                            const float* lse, const float* delta, const Sizes& n) {
    constexpr int OWN = Team<GROUPS>::OWN;
    DYNAMIC_SHARED(shared);
    auto& s = *reinterpret_cast<KeyShared<DP, GROUPS, BM, DEPTH>*>(shared);
    if (threadIdx.x == 0) {
        s.queue.init(GROUPS);
        s.of_keys.init(GROUPS);
        for (int i = 0; i < DEPTH; i++) s.of_queries[i].init(GROUPS);
        fence_barrier_init();
    }
    __syncthreads();
    const int tiles = ceil_div(n.keys, OWN), past = n.keys - n.steps, blocks = ceil_div(n.steps, BM);
    Work work(s.queue, n, tiles);
    int use = 0, use_keys = 0;
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<Team<GROUPS>::COPY_REGISTERS>();
        if (threadIdx.x == 0)
            for (; work.take(); use_keys++) {
                const int k0 = OWN * work.tile;
                const long long per_query = (long long)(work.batch * n.heads + work.head) * n.padded();
                s.of_keys.take(use_keys, 2 * load_bytes<OWN, DP>());
                load_tile<OWN, DP>(s.k, k, work.batch, k0, work.head, s.of_keys.full);
                load_tile<OWN, DP>(s.v, v, work.batch, k0, work.head, s.of_keys.full);
                // From the tile of the first query that sees the first key.
                for (int block = (k0 > past ? k0 - past : 0) / BM; block < blocks; block++, use++) {
                    const int stage = use % DEPTH;
                    Slot& slot = s.of_queries[stage];
                    slot.take(use / DEPTH, 2 * load_bytes<BM, DP>() + 2 * BM * (int)sizeof(float));
                    load_tile<BM, DP>(s.q[stage], q, work.batch, block * BM, work.head, slot.full);
                    load_floats<BM>(s.lse[stage], lse + per_query + block * BM, slot.full);
                    load_tile<BM, DP>(s.dout[stage], dout, work.batch, block * BM, work.head, slot.full);
                    load_floats<BM>(s.delta[stage], delta + per_query + block * BM, slot.full);
                }
            }
        return;
    }
    more_registers<Team<GROUPS>::MULTIPLY_REGISTERS>();
    const int group = warpgroup() - 1, thread = threadIdx.x % WARPGROUP;
    const int row = thread / WARP * 16 + lane_id() / 4;
    const float c = n.scale * LOG2E;
    // The next scores are started before the last products are done, where registers are left for it.
    const Turns<GROUPS> turns(group);
    constexpr bool AHEAD = DP <= 64;
    const uint32_t k_rows = operand(s.k + group * 64 * PANEL), v_rows = operand(s.v + group * 64 * PANEL);
    for (; work.next(); use_keys++) {
        const int k0 = OWN * work.tile, w0 = k0 + 64 * group;
        float acc_k[DP / 2], acc_v[DP / 2];
#pragma unroll
        for (int i = 0; i < DP / 2; i++) acc_k[i] = acc_v[i] = 0.f;
        uint32_t p[BM / 16][4], ds[BM / 16][4];
        s.of_keys.full.wait(use_keys);
        Slot* last = nullptr;  // what products under way read
        for (int block = (k0 > past ? k0 - past : 0) / BM; block < blocks; block++, use++) {
            const int stage = use % DEPTH, first = past + block * BM;
            Slot& slot = s.of_queries[stage];
            slot.full.wait(use / DEPTH);
            // No query of the tile sees a key of this warpgroup.
            if (first + BM <= w0 || w0 >= n.keys) {
                turns.begin(), turns.end();
                slot.release();
                continue;
            }
            float x[BM / 2], y[BM / 2];
            turns.begin();
            start_product<BM, DP, OWN, BM>(x, k_rows, operand(s.q[stage]));
            start_product<BM, DP, OWN, BM>(y, v_rows, operand(s.dout[stage]));
            turns.end();
            if (AHEAD && last) {
                wait_product<2>(acc_v);
                wait_product<2>(acc_k);
                last->release();
            }
            wait_product<1>(x);
            weights(x, s.lse[stage], c, w0 + row, first);
            pack(p, x);
            start_product<DP, BM>(acc_v, p, operand(s.dout[stage], BM));
            wait_product<1>(y);
            score_gradients(y, x, s.delta[stage]);
            pack(ds, y);
            start_product<DP, BM>(acc_k, ds, operand(s.q[stage], BM));
            last = &slot;
            if (!AHEAD) {
                wait_product<0>(acc_v);
                wait_product<0>(acc_k);
                slot.release();
            }
        }
        wait_product<0>(acc_v);
        wait_product<0>(acc_k);
        if (AHEAD && last) last->release();
        s.of_keys.release();
        if (thread == 0) wait_stores();
        group_barrier(group);
        stage_tile(s.dk[group], acc_k, n.scale, n.scale);
        stage_tile(s.dv[group], acc_v, 1.f, 1.f);
        fence_copies();
        group_barrier(group);
        if (thread == 0 && w0 < n.keys) {
            store_tile<DP>(dk, work.batch, w0, work.head, s.dk[group]);
            store_tile<DP>(dv, work.batch, w0, work.head, s.dv[group]);
        }
    }
    turns.leave();
    if (thread == 0) wait_stores();
}

// ---- backward, all gradients in one pass

// The head dim, queries of a tile, warps that add up dq, and the floats that they add at a time: 64 queries' 64 columns.
constexpr int LONG_DIM = 128, LONG_TILE = 64, ADDERS = 3, PART = 64 * 64;

struct LongShared {
    static constexpr int OWN = Team<2>::OWN;
    bf16 k[OWN * LONG_DIM], v[OWN * LONG_DIM], q[STAGES][LONG_TILE * LONG_DIM], dout[STAGES][LONG_TILE * LONG_DIM];
    bf16 ds[2][LONG_TILE * OWN], grad[2][BOX * LONG_DIM];
    float dq[2][PART], lse[STAGES][LONG_TILE], delta[STAGES][LONG_TILE];
    Slot of_keys, of_queries[STAGES], of_ds[2], of_dq[2][ADDERS];
    Queue queue;
};

// How a block walks over the tiles of queries that see its tile of keys.
//
// All that add to a tile of queries do so in one order, from the last tile of keys to the first. Each begins with its
// own queries: the tile before, given out later, comes to them two tiles of queries later, and nobody waits. But then the
// longest tiles of keys are the last. The heads that are last take the longest first, add from the first to the last and
// walk back to their own queries, so that all blocks end at about the same time.
struct Walk {
    int tile, block, step, left;

    __device__ __forceinline__ Walk(const Work& work, const Sizes& n) {
        constexpr int OWN = LongShared::OWN;
        const int blocks = ceil_div(n.steps, LONG_TILE);
        tile = work.last ? work.tile : work.tiles - 1 - work.tile;
        const int first = max(OWN * tile - (n.keys - n.steps), 0) / LONG_TILE;
        left = blocks - first, block = work.last ? blocks - 1 : first, step = work.last ? -1 : 1;
    }
    __device__ __forceinline__ void next() { block += step, left--; }
    // Tiles of keys that add to the tile of queries before this one.
    __device__ __forceinline__ int before(const Work& work, const Sizes& n) const {
        const int last_key = n.keys - n.steps + block * LONG_TILE + LONG_TILE - 1;
        return work.last ? tile : min(last_key / LongShared::OWN, work.tiles - 1) - tile;
    }
};

__device__ __forceinline__ void backward_long(const TensorMap& q, const TensorMap& k, const TensorMap& v,
                                              const TensorMap& dout, const TensorMap& dk, const TensorMap& dv,
                                              const float* lse, const float* delta, float* parts, int* turns,
                                              const Sizes& n) {
    constexpr int DP = LONG_DIM, BM = LONG_TILE, GROUPS = 2, OWN = LongShared::OWN;
    DYNAMIC_SHARED(shared);
    auto& s = *reinterpret_cast<LongShared*>(shared);
    if (threadIdx.x == 0) {
        s.queue.init(GROUPS, ADDERS);
        s.of_keys.init(GROUPS);
        for (Slot& slot : s.of_queries) slot.init(GROUPS);
        for (Slot& slot : s.of_ds) slot.full.init(4 * GROUPS), slot.empty.init(4 * GROUPS);
        for (auto& slots : s.of_dq)
            for (Slot& slot : slots) slot.full.init(4), slot.empty.init(1);
        fence_barrier_init();
    }
    __syncthreads();
    Work work(s.queue, n, ceil_div(n.keys, OWN));
    int use = 0, use_keys = 0;
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<Team<GROUPS>::COPY_REGISTERS>();
        if (threadIdx.x == 0) {
            for (; work.take<true>(); use_keys++) {
                Walk at(work, n);
                const long long per_query = (long long)(work.batch * n.heads + work.head) * n.padded();
                s.of_keys.take(use_keys, 2 * load_bytes<OWN, DP>());
                load_tile<OWN, DP>(s.k, k, work.batch, OWN * at.tile, work.head, s.of_keys.full);
                load_tile<OWN, DP>(s.v, v, work.batch, OWN * at.tile, work.head, s.of_keys.full);
                for (; at.left > 0; at.next(), use++) {
                    const int stage = use % STAGES, t = at.block * BM;
                    Slot& slot = s.of_queries[stage];
                    slot.take(use / STAGES, 2 * load_bytes<BM, DP>() + 2 * BM * (int)sizeof(float));
                    load_tile<BM, DP>(s.q[stage], q, work.batch, t, work.head, slot.full);
                    load_floats<BM>(s.lse[stage], lse + per_query + t, slot.full);
                    load_tile<BM, DP>(s.dout[stage], dout, work.batch, t, work.head, slot.full);
                    load_floats<BM>(s.delta[stage], delta + per_query + t, slot.full);
                }
            }
        } else if (threadIdx.x >= WARP && threadIdx.x < (1 + ADDERS) * WARP) {
            // Adders take the parts in turn: to have one added and seen takes longer than to make the next.
            for (int due = threadIdx.x / WARP - 1; work.next();) {
                const int of_head = (work.batch * n.heads + work.head) * (n.padded() / BM);
                for (Walk at(work, n); at.left > 0; at.next(), use++) {
                    const int before = at.before(work, n);
#pragma unroll
                    for (int i = 0; i < GROUPS; i++) {
                        if (due-- > 0) continue;
                        due = ADDERS - 1;
                        if (lane_id() == 0) {
                            const long long part = (of_head + at.block) * GROUPS + i;
                            Slot& slot = s.of_dq[i][use % ADDERS];
                            if (before > 0) wait_turn(turns + part, before);
                            slot.full.wait(use / ADDERS);
                            if (before > 0) add_floats<PART>(parts + part * PART, s.dq[i]);
                            else store_floats<PART>(parts + part * PART, s.dq[i]);
                            commit_stores();
                            wait_stores();
                            slot.empty.arrive();
                            wait_written();
                            give_turn(turns + part, before + 1);
                        }
                        __syncwarp();
                    }
                }
            }
        }
        return;
    }
    more_registers<Team<GROUPS>::MULTIPLY_REGISTERS>();
    const int group = warpgroup() - 1, thread = threadIdx.x % WARPGROUP, past = n.keys - n.steps;
    const int row = thread / WARP * 16 + lane_id() / 4;
    const float c = n.scale * LOG2E;
    const uint32_t k_rows = operand(s.k + group * 64 * PANEL), v_rows = operand(s.v + group * 64 * PANEL);
    const uint32_t k_columns = operand(s.k + group * OWN * PANEL, OWN);
    for (; work.next(); use_keys++) {
        Walk at(work, n);
        const int w0 = OWN * at.tile + 64 * group;
        float acc_k[DP / 2], acc_v[DP / 2], part[32];
#pragma unroll
        for (int i = 0; i < DP / 2; i++) acc_k[i] = acc_v[i] = 0.f;
        uint32_t p[BM / 16][4], ds[BM / 16][4];
        // The warpgroup's columns of dq, from the ds of both warpgroups.
        const auto start_dq = [&](int use) {
            s.of_ds[use % 2].full.wait(use / 2);
            start_product<64, OWN, BM>(part, operand(s.ds[use % 2]), k_columns, false);
        };
        const auto give_dq = [&](int use) {
            s.of_ds[use % 2].release();
            if (use > 0) s.of_dq[group][(use - 1) % ADDERS].empty.wait((use - 1) / ADDERS);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float four[4] = {part[4 * j], part[4 * j + 1], part[4 * j + 2], part[4 * j + 3]};
                store_vec<4>(s.dq[group] + (j * WARPGROUP + thread) * 4, four);
            }
            fence_copies();
            arrive_as_warp(s.of_dq[group][use % ADDERS].full);
        };
        s.of_keys.full.wait(use_keys);
        for (bool first = true; at.left > 0; at.next(), use++, first = false) {
            const int stage = use % STAGES, q0 = past + at.block * BM;
            Slot& slot = s.of_queries[stage];
            slot.full.wait(use / STAGES);
            float x[BM / 2], y[BM / 2];
            start_product<BM, DP, OWN, BM>(x, k_rows, operand(s.q[stage]));
            start_product<BM, DP, OWN, BM>(y, v_rows, operand(s.dout[stage]));
            wait_product<1>(x);
            weights(x, s.lse[stage], c, w0 + row, q0);
            pack(p, x);
            start_product<DP, BM>(acc_v, p, operand(s.dout[stage], BM));
            wait_product<1>(y);
            score_gradients(y, x, s.delta[stage]);
            pack(ds, y);
            start_product<DP, BM>(acc_k, ds, operand(s.q[stage], BM));
            Slot& of_ds = s.of_ds[use % 2];
            of_ds.empty.wait(use / 2 - 1);
            stage_operand(s.ds[use % 2] + group * BM * PANEL, ds);
            fence_copies();
            arrive_as_warp(of_ds.full);
            // dq of the tile before: by now the other warpgroup has written its ds.
            if (!first) {
                start_dq(use - 1);
                wait_product<1>(acc_v);
                wait_product<1>(acc_k);
                slot.release();
                wait_product<0>(part);
                give_dq(use - 1);
            } else {
                wait_product<0>(acc_v);
                wait_product<0>(acc_k);
                slot.release();
            }
        }
        start_dq(use - 1);
        wait_product<0>(part);
        give_dq(use - 1);
        s.of_keys.release();
        const auto store = [&](const float (&grad)[DP / 2], float scale, const TensorMap& to) {
            if (thread == 0) wait_stores();
            group_barrier(group);
            stage_tile(s.grad[group], grad, scale, scale);
            fence_copies();
            group_barrier(group);
            if (thread == 0 && w0 < n.keys) store_tile<DP>(to, work.batch, w0, work.head, s.grad[group]);
        };
        store(acc_k, n.scale, dk);
        store(acc_v, 1.f, dv);
    }
    if (thread == 0) wait_stores();
}

}  // namespace

// delta = rowsum(do ⊙ o), eight lanes a query; and the turns at all parts of dq, which nobody has taken yet. Rows are in
// the order of o, [B, T64, H].
extern "C" __global__ void __launch_bounds__(256) attention_delta_sm90a(const bf16* o, const bf16* dout, float* delta,
                                                                       int* turns, int parts, int steps, int heads,
                                                                       int values, long long rows) {
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x, row = at / 8;
    if (at < parts) turns[at] = 0;
    const int padded = ceil_div(steps, 64) * 64, head = row % heads, t = row / heads % padded;
    const long long batch = row / heads / padded;
    float sum = 0.f;
    if (row < rows && t < steps) {
        const long long from = ((batch * steps + t) * heads + head) * values;
        for (int column = at % 8 * 8; column < values; column += 64) {
            float a[8], b[8];
            load_vec<8>(o + from + column, a);
            load_vec<8>(dout + from + column, b);
#pragma unroll
            for (int i = 0; i < 8; i++) sum = fmaf(a[i], b[i], sum);
        }
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) sum += __shfl_xor_sync(FULL, sum, offset);
    if (row < rows && at % 8 == 0) delta[(batch * heads + head) * padded + t] = sum;
}

// dq in bf16 from its parts, one a block.
extern "C" __global__ void __launch_bounds__(WARPGROUP) attention_round_sm90a(const float* parts,
                                                                             const __grid_constant__ TensorMap dq,
                                                                             int steps, int heads, float scale) {
    DYNAMIC_SHARED(shared);
    bf16* const tile = reinterpret_cast<bf16*>(shared);
    const int rows = ceil_div(steps, 64), panel = blockIdx.x % 2, row = blockIdx.x / 2 % rows;
    const int bh = blockIdx.x / 2 / rows;
    float x[32];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float four[4];
        load_vec<4>(parts + (long long)blockIdx.x * PART + (j * WARPGROUP + threadIdx.x) * 4, four);
#pragma unroll
        for (int e = 0; e < 4; e++) x[4 * j + e] = four[e];
    }
    stage_tile(tile, x, scale, scale);
    fence_copies();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_box(dq, bh / heads, row * 64, bh % heads, panel * PANEL, tile);
        commit_stores();
        wait_stores();
    }
}

#define MAP const __grid_constant__ TensorMap
#define SIZES int steps, int keys, int heads, int batch, int together, float scale
#define FORWARD(DP, GROUPS, BN)                                                                                        \
    extern "C" __global__ void __launch_bounds__(Team<GROUPS>::THREADS, 1) attention_forward_##DP##_sm90a(              \
        MAP q, MAP k, MAP v, MAP o, float* lse, SIZES) {                                                               \
        forward<DP, GROUPS, BN>(q, k, v, o, lse, {steps, keys, heads, batch, together, scale});                         \
    }
#define DQ(DP, GROUPS, BN)                                                                                             \
    extern "C" __global__ void __launch_bounds__(Team<GROUPS>::THREADS, 1) attention_dq_##DP##_sm90a(                   \
        MAP q, MAP k, MAP v, const bf16* o, MAP dout, MAP dq, const float* lse, float* delta, int values, SIZES) {      \
        backward_q<DP, GROUPS, BN>(q, k, v, o, dout, dq, lse, delta, values,                                            \
                                   {steps, keys, heads, batch, together, scale});                                       \
    }
#define DKDV(DP, GROUPS, BM, DEPTH)                                                                                    \
    extern "C" __global__ void __launch_bounds__(Team<GROUPS>::THREADS, 1) attention_dkdv_##DP##_sm90a(                 \
        MAP q, MAP k, MAP v, MAP dout, MAP dk, MAP dv, const float* lse, const float* delta, SIZES) {                   \
        backward_kv<DP, GROUPS, BM, DEPTH>(q, k, v, dout, dk, dv, lse, delta,                                           \
                                           {steps, keys, heads, batch, together, scale});                               \
    }

// The tiles of src/ops/attention/hopper.rs.
FORWARD(64, 3, 128)
FORWARD(128, 2, 128)
DQ(64, 2, 128)
DQ(128, 2, 128)
DKDV(64, 2, 64, 3)
DKDV(128, 2, 64, 3)
extern "C" __global__ void __launch_bounds__(Team<2>::THREADS, 1) attention_backward_128_sm90a(
    MAP q, MAP k, MAP v, MAP dout, MAP dk, MAP dv, const float* lse, const float* delta, float* parts, int* turns, SIZES) {
    backward_long(q, k, v, dout, dk, dv, lse, delta, parts, turns, {steps, keys, heads, batch, together, scale});
}
