// What the kernels of the selective scan share (selective_scan.cu, selective_scan_sm90a.cu): its functions, pieces of
// rows, states, and the backward pass.
#pragma once
#include "common.cuh"

namespace {

constexpr int CHUNK = 64;  // steps between checkpoints

__device__ __forceinline__ float fast_sigmoid(float x) { return rcp_fast(1.f + exp2_fast(-LOG2E * x)); }

// max(x, 0) + log(1 + e), e = exp(-|x|): the logarithm as 2 artanh(e / (2 + e)), precise for small e as well.
__device__ __forceinline__ float fast_softplus(float x) {
    const float e = exp2_fast(-LOG2E * fabsf(x));
    const float s = e * rcp_fast(2.f + e), s2 = s * s;
    float p = 1.f / 15.f;
    p = fmaf(p, s2, 1.f / 13.f);
    p = fmaf(p, s2, 1.f / 11.f);
    p = fmaf(p, s2, 1.f / 9.f);
    p = fmaf(p, s2, 1.f / 7.f);
    p = fmaf(p, s2, 1.f / 5.f);
    p = fmaf(p, s2, 1.f / 3.f);
    p = fmaf(p, s2, 1.f);
    return fmaxf(x, 0.f) + 2.f * s * p;
}

// sigmoid(x) = 1 - exp(-softplus(x)) from y = softplus(x): a series where the difference would cancel.
__device__ __forceinline__ float sigmoid_of_softplus(float y) {
    float p = 1.f / 5040.f;
    p = fmaf(-p, y, 1.f / 720.f);
    p = fmaf(-p, y, 1.f / 120.f);
    p = fmaf(-p, y, 1.f / 24.f);
    p = fmaf(-p, y, 1.f / 6.f);
    p = fmaf(-p, y, 0.5f);
    p = fmaf(-p, y, 1.f);
    return y < 0.375f ? y * p : 1.f - exp2_fast(-LOG2E * y);
}

// ---- pieces: 4 neighbours in a row. A thread stages, converts and finishes the same pieces, so that what it staged
// needs no barrier.

constexpr int PIECE = 4;

template <class T>
__device__ __forceinline__ bool aligned(const T* p, int row) {
    return row % PIECE == 0 && reinterpret_cast<size_t>(p) % (PIECE * sizeof(T)) == 0;
}

// A whole aligned piece, or zeros where there is none; no branch.
template <class T>
__device__ __forceinline__ void stage_whole(T* slot, const T* src, bool exists) {
    cp_async<PIECE * sizeof(T)>(slot, src, exists ? PIECE * sizeof(T) : 0);
}

template <class T>
__device__ __forceinline__ void store_piece(T* dst, const float (&x)[PIECE], int valid, bool vector) {
    if (valid == PIECE && vector) {
        store_vec<PIECE>(dst, x);
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; i++)
            if (i < valid) dst[i] = from_f<T>(x[i]);
    }
}

// W neighbouring states, those from `states` on being zeros; of a channel that does not exist too.
template <int W>
__device__ __forceinline__ void load_states(const float* row, int n, int states, bool exists, float (&x)[W]) {
    if (exists && states % W == 0 && n < states) {
        load_vec<W>(row + n, x);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = exists && n + i < states ? row[n + i] : 0.f;
    }
}
template <int W>
__device__ __forceinline__ void store_states(float* row, int n, int states, bool exists, const float (&x)[W]) {
    if (!exists) return;
    if (states % W == 0) {
        if (n < states) store_vec<W>(row + n, x);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++)
            if (n + i < states) row[n + i] = x[i];
    }
}
// A log2 e, for powers of two; 0 where there is no state.
template <int W>
__device__ __forceinline__ void load_rates(const float* row, int n, int states, bool exists, float (&a)[W]) {
#pragma unroll
    for (int i = 0; i < W; i++) a[i] = exists && n + i < states ? -LOG2E * expf(row[n + i]) : 0.f;
}

__device__ __forceinline__ void prefetch(const float* p) {
#ifndef SB_EMULATE
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Sums V numbers over the lanes that differ in the bits `mask`, 2 mask, ... below `end`. Each step halves the numbers:
// a lane keeps one half and gives the other away. Calls write(first, x) with the sums that end up in this lane.
template <int V, int MIN, class Write>
__device__ __forceinline__ void sum_over_lanes(float (&x)[V], int first, int mask, int end, Write write) {
    if (mask >= end) {
        write(first, x);
        return;
    }
    if constexpr (V > MIN) {
        const bool upper = lane_id() & mask;
        float half[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) {
            const float given = upper ? x[i] : x[i + V / 2], kept = upper ? x[i + V / 2] : x[i];
            half[i] = kept + __shfl_xor_sync(FULL, given, mask);
        }
        sum_over_lanes<V / 2, MIN>(half, first + (upper ? V / 2 : 0), mask * 2, end, write);
    } else {
        // Fewer numbers than lanes: the lanes with a zero bit have them.
        bool owner = true;
        for (; mask < end; mask *= 2) {
#pragma unroll
            for (int i = 0; i < V; i++) x[i] += __shfl_xor_sync(FULL, x[i], mask);
            owner = owner && !(lane_id() & mask);
        }
        if (owner) write(first, x);
    }
}

// ---- backward

constexpr int SUB = 8;   // steps whose decays and states a thread keeps in registers
constexpr int OWN = 4;   // states of a lane
constexpr int PAIR = 2;  // channels that a lane works on side by side
// Rows of B and C for four states, and of a channel: four numbers a step and, from OUT on, two that come out. A step is
// a constant offset, and lanes meet in few banks.
constexpr int MAP_ROW = SUB * 4 + 4, OUT = SUB * 4 + 4, ROW = OUT + 2 * SUB;

// `x`, of which the compiler knows no more than that it is below `LIMIT`: what follows from it is computed where it is
// needed, and not kept in registers all along.
template <int LIMIT>
__device__ __forceinline__ int anew(int x) {
    static_assert((LIMIT & (LIMIT - 1)) == 0, "a power of two");
#ifndef SB_EMULATE
    asm volatile("" : "+r"(x));
#endif
    return x & (LIMIT - 1);
}

// Calls f(i) for every i below N in the threads of a block.
template <int N, int THREADS, class F>
__device__ __forceinline__ void share_out(int thread, F f) {
#pragma unroll
    for (int i0 = 0; i0 < N; i0 += THREADS)
        if (i0 + THREADS <= N || i0 + thread < N) f(i0 + thread);
}

template <class T>
struct Backward {
    const T *u, *delta, *b, *c, *z, *plain, *dy;
    const float *a_log, *d, *delta_bias, *dfinal, *checkpoints, *carry;
    T *du, *ddelta, *dz;
    float *dstate, *maps, *parameters, *scratch;
    int batch, steps, width, states;
    int segments;     // of time
    int per_segment;  // chunks of a segment
};

// What a block does with SUB steps. Of a chunk, first the states are computed again (`reverse` false), which gives dC
// and, in the scratch buffer, the states before every SUB steps; then all else follows in reverse.
struct Job {
    int chunk, sub;
    bool reverse;
};

// Who prepares the inputs and finishes the outputs of the warps that walk over time: they themselves, or SERVERS further
// warps meanwhile (see selective_scan_sm90a.cu).
struct Alone {
    static constexpr int SERVERS = 0;
};
enum Role { BOTH, WALK, SERVE };
template <Role R, class Roles> struct As { static constexpr Role ROLE = R; using Team = Roles; };

// A block owns GROUP channels of one batch entry and segment, and works on SUB steps of all of them before it moves on.
// LANES lanes share a channel and step TILES times over its states. A warp takes its channels one after the other (PAIR
// x WARP / LANES at a time), so that the sums over channels, dB or dC, stay in its registers: SUB x OWN numbers a lane.
// Only then they are added over the warps, through shared memory. Gradients of states and rates live in shared memory
// meanwhile. Eight warps run on a multiprocessor, as one block or two. Blocks take several (channels, batch entry,
// segment)s one after the other: `scratch` is as large as the blocks that run, 7 x GROUP x PADDED floats each.
template <class T, int LANES, int TILES, int WARPS, int GROUP, class Roles = Alone>
__device__ __forceinline__ void backward(const Backward<T>& w) {
    DYNAMIC_SHARED(shared);
    constexpr int SIDE = WARP / LANES, COLUMNS = LANES * OWN, THREADS = WARPS * WARP;
    // Threads that serve.
    constexpr bool SERVED = Roles::SERVERS > 0;
    constexpr int STAFF = SERVED ? Roles::SERVERS * WARP : THREADS;
    const int staff = SERVED ? threadIdx.x - THREADS : threadIdx.x;
    constexpr int PADDED = COLUMNS * TILES, SIZE = GROUP * PADDED, MINE = GROUP / WARPS;
    const int tid = threadIdx.x, lane = lane_id() & (LANES - 1);
    const int first_own = warp_id() * MINE + lane_id() / LANES;
    const int chunks = ceil_div(w.steps, CHUNK), groups = ceil_div(w.width, GROUP);

    float* rates = reinterpret_cast<float*>(shared);
    float* dh_all = rates + SIZE;
    float* da_all = dh_all + SIZE;
    float* sums = da_all + SIZE;  // [SUB, WARPS, SIDE, COLUMNS]
    float* slots = sums + SUB * THREADS * OWN + tid * OWN;  // of this thread: the next states, [PAIR, THREADS, OWN]
    float* skips = sums + (SUB + PAIR) * THREADS * OWN;
    float* biases = skips + GROUP;
    float* channel_sums = biases + GROUP;  // of d and delta_bias: [2, GROUP]
    // Whether pieces can be copied as vectors, and stored.
    int* flags = reinterpret_cast<int*>(channel_sums + 2 * GROUP);
    // Two buffers: (dt, dt u, g, u) [SUB] and sum_n G B [SUB], sum_n A q [SUB] of every channel; B, C [padded / OWN, SUB,
    // OWN].
    constexpr int MAP_SIZE = PADDED / OWN * MAP_ROW, BUFFER_SIZE = GROUP * ROW + 2 * MAP_SIZE;
    float* buffers = channel_sums + 2 * GROUP + 4;
    T* raw = reinterpret_cast<T*>(buffers + 2 * BUFFER_SIZE);
    constexpr int B_AT = GROUP * ROW;

    // SUB neighbouring threads have a piece of SUB steps each, so that the lanes of a warp meet in few banks.
    constexpr int PIECES = SUB * GROUP / PIECE, MAPS = SUB * PADDED / PIECE;
    const long long slab = (long long)w.width * (w.states + 2);
    float* scratch = w.scratch + (long long)blockIdx.x * (CHUNK / SUB - 1) * SIZE;

    if (staff == 0) {
        flags[0] = aligned(w.u, w.width) && aligned(w.delta, w.width) && aligned(w.z, w.width) &&
                   aligned(w.dy, w.width) && aligned(w.b, w.states) && aligned(w.c, w.states);
        flags[1] = w.width % PIECE == 0;
    }
    const auto run = [&](auto as) {
        constexpr Role ROLE = decltype(as)::ROLE;
        using Team = typename decltype(as)::Team;
        for (int item = blockIdx.x; item < groups * w.batch * w.segments; item += gridDim.x) {
            const int part = item % groups, c0 = part * GROUP, row = item / groups;
            const int batch = row / w.segments, segment = row % w.segments;
            const int first_chunk = segment * w.per_segment, end_chunk = min(first_chunk + w.per_segment, chunks);
            float* slab_sums = w.parameters + row * slab;

            auto last_sub = [&](int chunk) { return ceil_div(min(CHUNK, w.steps - chunk * CHUNK), SUB) - 1; };
            auto next_job = [&](Job job) {
                if (job.reverse) return job.sub > 0 ? Job{job.chunk, job.sub - 1, true} : Job{job.chunk - 1, 0, false};
                return job.sub < last_sub(job.chunk) ? Job{job.chunk, job.sub + 1, false} : Job{job.chunk, job.sub, true};
            };
            auto stage = [&](Job job) {
                const int thread = anew<STAFF>(staff), t = job.chunk * CHUNK + job.sub * SUB + thread % SUB;
                const long long line = (long long)batch * w.steps + t;
                const bool gated = w.z != nullptr, plain = gated && job.reverse;
                T* maps_to = raw + 5 * PIECES * PIECE;
                // Aligned rows have whole pieces alone.
                auto stage_all = [&](auto stage_one) {
                    share_out<PIECES, STAFF>(thread, [&](int i) {
                        const int c = c0 + i / SUB * PIECE, valid = t < w.steps ? w.width - c : 0;
                        const long long at = line * w.width + c;
                        T* to = raw + i * PIECE;
                        stage_one(to, w.u + at, valid);
                        stage_one(to + PIECES * PIECE, w.delta + at, valid);
                        stage_one(to + 2 * PIECES * PIECE, w.dy + at, valid);
                        if (gated) stage_one(to + 3 * PIECES * PIECE, w.z + at, valid);
                        if (plain) stage_one(to + 4 * PIECES * PIECE, w.plain + at, valid);
                    });
                    share_out<MAPS, STAFF>(thread, [&](int i) {
                        const int n = i / SUB * PIECE, valid = t < w.steps ? w.states - n : 0;
                        const long long at = line * w.states + n;
                        stage_one(maps_to + i * PIECE, w.b + at, valid);
                        stage_one(maps_to + (MAPS + i) * PIECE, w.c + at, valid);
                    });
                };
                auto whole = [](T* to, const T* from, int valid) { stage_whole(to, from, valid > 0); };
                auto part = [](T* to, const T* from, int valid) {
#pragma unroll 1
                    for (int i = 0; i < PIECE; i++) to[i] = i < valid ? from[i] : from_f<T>(0.f);
                };
                if (flags[0]) stage_all(whole); else stage_all(part);
                cp_async_commit();
            };
            // Of what was staged: the scalars, B and C to a buffer; dz to its place.
            auto convert = [&](Job job, float* buffer) {
                const int thread = anew<STAFF>(staff), own_step = thread % SUB;
                const bool vector = flags[1];
                const int t = job.chunk * CHUNK + job.sub * SUB + own_step;
                cp_async_wait<0>();
                share_out<PIECES, STAFF>(thread, [&](int i) {
                    const int column = i / SUB * PIECE, c = c0 + column;
                    const int valid = t < w.steps ? min(max(w.width - c, 0), PIECE) : 0;
                    const T* from = raw + i * PIECE;
                    float u[PIECE], delta[PIECE], dy[PIECE], bias[PIECE];
                    load_vec<PIECE>(from, u);
                    load_vec<PIECE>(from + PIECES * PIECE, delta);
                    load_vec<PIECE>(from + 2 * PIECES * PIECE, dy);
                    load_vec<PIECE>(biases + column, bias);
                    if (w.z != nullptr) {
                        float z[PIECE], s[PIECE];
                        load_vec<PIECE>(from + 3 * PIECES * PIECE, z);
#pragma unroll
                        for (int j = 0; j < PIECE; j++) s[j] = fast_sigmoid(z[j]);
                        if (job.reverse) {
                            float plain[PIECE], dz[PIECE];
                            load_vec<PIECE>(from + 4 * PIECES * PIECE, plain);
#pragma unroll
                            for (int j = 0; j < PIECE; j++)
                                dz[j] = dy[j] * plain[j] * s[j] * fmaf(z[j], 1.f - s[j], 1.f);
                            store_piece(w.dz + ((long long)batch * w.steps + t) * w.width + c, dz, valid, vector);
                        }
#pragma unroll
                        for (int j = 0; j < PIECE; j++) dy[j] *= z[j] * s[j];
                    }
#pragma unroll
                    for (int j = 0; j < PIECE; j++) {
                        // Where there is no step or channel, nothing decays.
                        const float dt = fast_softplus(delta[j] + bias[j]) * (j < valid ? 1.f : 0.f);
                        const float scalars[4] = {dt, dt * u[j], dy[j], u[j]};
                        store_vec<4>(buffer + (column + j) * ROW + own_step * 4, scalars);
                    }
                });
                const T* maps_from = raw + 5 * PIECES * PIECE;
                share_out<MAPS, STAFF>(thread, [&](int i) {
                    float* to = buffer + B_AT + i / SUB * MAP_ROW + own_step * OWN;
                    float x[PIECE];
                    load_vec<PIECE>(maps_from + i * PIECE, x);
                    store_vec<PIECE>(to, x);
                    load_vec<PIECE>(maps_from + (MAPS + i) * PIECE, x);
                    store_vec<PIECE>(to + MAP_SIZE, x);
                });
            };
            // The states before the first step of a job, of the lane's first channel. Those of the next are PADDED on.
            auto states_before = [&](Job job, int n) {
                const long long chunk = (long long)batch * chunks + job.chunk;
                const float* from = job.sub == 0 ? w.checkpoints + (chunk * groups * GROUP + c0) * PADDED
                                                 : scratch + (job.sub - 1) * SIZE;
                return from + first_own * PADDED + n;
            };
            // Starts copying those of PAIR channels to the lane's slots.
            auto stage_h = [&](const float* from) {
#pragma unroll
                for (int s = 0; s < PAIR; s++) cp_async16(slots + s * THREADS * OWN, from + s * SIDE * PADDED);
                cp_async_commit();
            };

            auto prepare_channels = [&] {
                for (int i = staff; i < GROUP; i += STAFF) {
                    skips[i] = c0 + i < w.width ? w.d[c0 + i] : 0.f;
                    biases[i] = c0 + i < w.width ? w.delta_bias[c0 + i] : 0.f;
                    channel_sums[i] = channel_sums[GROUP + i] = 0.f;
                }
            };
            auto prepare_states = [&] {
                for (int tile = 0; tile < TILES; tile++) {
                    for (int k = 0; k < MINE; k += SIDE) {
                        const int c = first_own + k, n = tile * COLUMNS + lane * OWN, at = c * PADDED + n;
                        const bool exists = c0 + c < w.width;
                        float x[OWN], zeros[OWN] = {};
                        load_rates<OWN>(w.a_log + (long long)(c0 + c) * w.states, n, w.states, exists, x);
                        store_vec<OWN>(rates + at, x);
                        store_vec<OWN>(da_all + at, zeros);
                        const bool last = segment + 1 == w.segments;
                        const float* from = last ? w.dfinal : w.carry;
                        const long long state = last ? batch : (long long)batch * (w.segments - 1) + segment;
                        load_states<OWN>(from + (state * w.width + c0 + c) * w.states, n, w.states,
                                         exists && from != nullptr, x);
                        store_vec<OWN>(dh_all + at, x);
                    }
                }
            };
            // Walks over the steps of a job; dB or dC of the warp's channels are added to acc.
            auto walk_over = [&](Job job, int tile, float* buffer, float (&acc)[SUB][OWN]) {
                const int n = tile * COLUMNS + lane * OWN;
                const float *b_row = buffer + B_AT + n / OWN * MAP_ROW, *c_row = b_row + MAP_SIZE;
                const float* before = states_before(job, n);
                float* after = scratch + (long long)job.sub * SIZE + first_own * PADDED + n;
                float *own = rates + first_own * PADDED + n, *scalars = buffer + first_own * ROW;
                if (tile > 0) stage_h(before);
                if (job.reverse && job.sub == 0 && job.chunk > first_chunk)
                    for (int k = 0; k < MINE; k += SIDE) prefetch(before + (k - groups * GROUP) * PADDED);
#pragma unroll 1
                for (int k = 0; k < MINE; k += PAIR * SIDE) {
                    cp_async_wait<0>();
                    float a[PAIR][OWN], h[PAIR][OWN];
#pragma unroll
                    for (int s = 0; s < PAIR; s++) {
                        load_vec<OWN>(own + s * SIDE * PADDED, a[s]);
                        load_vec<OWN>(slots + s * THREADS * OWN, h[s]);
                    }
                    before += PAIR * SIDE * PADDED;
                    if (k + PAIR * SIDE < MINE) stage_h(before);
                    if (!job.reverse) {
#pragma unroll
                        for (int r = 0; r < SUB; r++) {
                            float b[OWN], cc[OWN];
                            load_vec<OWN>(b_row + r * OWN, b);
                            load_vec<OWN>(c_row + r * OWN, cc);
#pragma unroll
                            for (int s = 0; s < PAIR; s++) {
                                float scalar[4];
                                load_vec<4>(scalars + s * SIDE * ROW + r * 4, scalar);
#pragma unroll
                                for (int i = 0; i < OWN; i++) {
                                    h[s][i] = fmaf(scalar[1], b[i], exp2_fast(scalar[0] * a[s][i]) * h[s][i]);
                                    acc[r][i] = fmaf(scalar[2], h[s][i], acc[r][i]);
                                }
                            }
                        }
                        if (job.sub < last_sub(job.chunk)) {
#pragma unroll
                            for (int s = 0; s < PAIR; s++)
                                store_vec<OWN>(after + s * SIDE * PADDED, h[s]);
                        }
                        after += PAIR * SIDE * PADDED, own += PAIR * SIDE * PADDED, scalars += PAIR * SIDE * ROW;
                        continue;
                    }
                    // Of every step the decay and what it leaves of the state before.
                    float decay[PAIR][SUB][OWN], kept[PAIR][SUB][OWN];
                    float dh[PAIR][OWN], da[PAIR][OWN], out[PAIR * 2 * SUB];
#pragma unroll
                    for (int r = 0; r < SUB; r++) {
                        float b[OWN];
                        load_vec<OWN>(b_row + r * OWN, b);
#pragma unroll
                        for (int s = 0; s < PAIR; s++) {
                            float scalar[2];
                            load_vec<2>(scalars + s * SIDE * ROW + r * 4, scalar);
#pragma unroll
                            for (int i = 0; i < OWN; i++) {
                                decay[s][r][i] = exp2_fast(scalar[0] * a[s][i]);
                                kept[s][r][i] = decay[s][r][i] * h[s][i];
                                h[s][i] = fmaf(scalar[1], b[i], kept[s][r][i]);
                            }
                        }
                    }
#pragma unroll
                    for (int s = 0; s < PAIR; s++) {
                        load_vec<OWN>(own + SIZE + s * SIDE * PADDED, dh[s]);
                        load_vec<OWN>(own + 2 * SIZE + s * SIDE * PADDED, da[s]);
                    }
#pragma unroll
                    for (int r = SUB - 1; r >= 0; r--) {
                        float b[OWN], cc[OWN];
                        load_vec<OWN>(b_row + r * OWN, b);
                        load_vec<OWN>(c_row + r * OWN, cc);
#pragma unroll
                        for (int s = 0; s < PAIR; s++) {
                            float scalar[4];
                            load_vec<4>(scalars + s * SIDE * ROW + r * 4, scalar);
                            float by_b = 0.f, by_a = 0.f;
#pragma unroll
                            for (int i = 0; i < OWN; i++) {
                                const float g = fmaf(scalar[2], cc[i], dh[s][i]), q = g * kept[s][r][i];
                                acc[r][i] = fmaf(scalar[1], g, acc[r][i]);
                                dh[s][i] = decay[s][r][i] * g;
                                da[s][i] = fmaf(scalar[0], q, da[s][i]);
                                by_b = fmaf(g, b[i], by_b);
                                by_a = fmaf(a[s][i], q, by_a);
                            }
                            out[s * 2 * SUB + r] = by_b;
                            out[s * 2 * SUB + SUB + r] = by_a;
                        }
                    }
#pragma unroll
                    for (int s = 0; s < PAIR; s++) {
                        store_vec<OWN>(own + SIZE + s * SIDE * PADDED, dh[s]);
                        store_vec<OWN>(own + 2 * SIZE + s * SIDE * PADDED, da[s]);
                    }
                    sum_over_lanes<PAIR * 2 * SUB, 1>(out, 0, 1, LANES, [&](int first, const auto& x) {
                        constexpr int V = sizeof(x) / sizeof(float);
                        const int s = first / (2 * SUB);
                        float* to = scalars + s * SIDE * ROW + OUT + first % (2 * SUB);
#pragma unroll
                        for (int i = 0; i < V; i++) to[i] = tile == 0 ? x[i] : to[i] + x[i];
                    });
                    own += PAIR * SIDE * PADDED, scalars += PAIR * SIDE * ROW;
                }
            };
            auto store_sums = [&](const float (&acc)[SUB][OWN]) {
#pragma unroll
                for (int r = 0; r < SUB; r++) store_vec<OWN>(sums + (r * THREADS + tid) * OWN, acc[r]);
            };
            // dB or dC of a job from the sums of the warps.
            auto add_up = [&](Job job, int tile) {
                const int t0 = job.chunk * CHUNK + job.sub * SUB;
                // A piece of the sums is one thread's, or that of PARTS neighbours where there are few.
                constexpr int PARTS = STAFF > SUB * LANES ? STAFF / (SUB * LANES) : 1;
                const int thread = anew<STAFF>(staff);
                share_out<SUB * LANES, STAFF / PARTS>(thread / PARTS, [&](int i) {
                    const int r = i / LANES, column = i % LANES * OWN;
                    float total[OWN] = {};
#pragma unroll
                    for (int j = 0; j < WARPS * SIDE; j += PARTS) {
                        float x[OWN];
                        load_vec<OWN>(sums + (r * WARPS * SIDE + j + thread % PARTS) * COLUMNS + column, x);
#pragma unroll
                        for (int l = 0; l < OWN; l++) total[l] += x[l];
                    }
                    const long long map = (job.reverse ? 0 : groups) + part;
                    const long long line = (map * w.batch + batch) * w.steps + t0 + r;
                    float* to = w.maps + line * PADDED + tile * COLUMNS + column;
                    sum_over_lanes<OWN, 1>(total, 0, 1, PARTS, [&](int first, const auto& x) {
                        if (t0 + r < w.steps) store_vec<sizeof(x) / sizeof(float)>(to + first, x);
                    });
                });
            };
            // What the steps of a job, the second time, leave for every channel: du and ddelta.
            auto finish = [&](Job job, const float* buffer) {
                const int thread = anew<STAFF>(staff), own_step = thread % SUB;
                const bool vector = flags[1];
                const int t = job.chunk * CHUNK + job.sub * SUB + own_step;
                share_out<ceil_div(PIECES, WARP) * WARP, STAFF>(thread, [&](int i) {  // all lanes of a warp
                    const int column = min(i / SUB * PIECE, GROUP - PIECE), c = c0 + column;
                    const int valid = i < PIECES && t < w.steps ? min(max(w.width - c, 0), PIECE) : 0;
                    float du[PIECE], ddelta[PIECE], skip[PIECE], dd[2 * PIECE];  // of d, of delta_bias
                    load_vec<PIECE>(skips + column, skip);
#pragma unroll
                    for (int j = 0; j < PIECE; j++) {
                        float scalar[4];
                        load_vec<4>(buffer + (column + j) * ROW + own_step * 4, scalar);
                        const float dt = scalar[0], g = scalar[2], u = scalar[3];
                        const float* out = buffer + (column + j) * ROW + OUT + own_step;
                        const float by_b = out[0], by_a = LN2 * out[SUB];  // the rates are A log2 e
                        du[j] = fmaf(dt, by_b, skip[j] * g);
                        ddelta[j] = fmaf(u, by_b, by_a) * sigmoid_of_softplus(dt);
                        dd[j] = g * u;
                        dd[PIECE + j] = ddelta[j];
                    }
                    // The steps of a piece are those of neighbouring lanes.
                    sum_over_lanes<2 * PIECE, 1>(dd, 0, 1, SUB, [&](int first, const auto& x) {
                        if (i < PIECES) channel_sums[first / PIECE * GROUP + column + first % PIECE] += x[0];
                    });
                    const long long at = ((long long)batch * w.steps + t) * w.width + c;
                    store_piece(w.du + at, du, valid, vector);
                    store_piece(w.ddelta + at, ddelta, valid, vector);
                });
            };
            // Gradients of the rates and of the state before the segment.
            auto leave_states = [&] {
                for (int tile = 0; tile < TILES; tile++) {
                    for (int k = 0; k < MINE; k += SIDE) {
                        const int c = first_own + k, n = tile * COLUMNS + lane * OWN, at = c * PADDED + n;
                        const bool exists = c0 + c < w.width;
                        float x[OWN];
                        load_vec<OWN>(da_all + at, x);
                        for (int i = 0; i < OWN; i++)
                            if (exists && n + i < w.states) slab_sums[(long long)(c0 + c) * w.states + n + i] = x[i];
                        if (segment == 0 && w.dstate != nullptr) {
                            load_vec<OWN>(dh_all + at, x);
                            store_states<OWN>(w.dstate + ((long long)batch * w.width + c0 + c) * w.states, n, w.states, exists,
                                              x);
                        }
                    }
                }
            };
            // Those of d and delta_bias.
            auto leave_channels = [&] {
                for (int i = staff; i < 2 * GROUP; i += STAFF) {
                    const int c = c0 + i % GROUP;
                    if (c < w.width) slab_sums[(long long)w.width * (w.states + i / GROUP) + c] = channel_sums[i];
                }
            };

            const auto is_job = [&](Job job) { return job.chunk >= first_chunk; };
            const auto buffer_of = [&](int turn) { return buffers + (turn & 1) * BUFFER_SIZE; };
            const Job none = {first_chunk - 1, 0, false}, first = {end_chunk - 1, 0, false};
            const int n0 = lane * OWN;
            if constexpr (ROLE == BOTH) {
                __syncthreads();
                prepare_channels();
                prepare_states();
                __syncthreads();
                // At every turn a job is done, what was staged of the next is converted, and the one after is staged.
                Job job = none, next = none, after = first;
                for (int turn = 0; is_job(job) || is_job(next) || is_job(after); turn++) {
                    for (int tile = 0; tile < TILES; tile++) {
                        float acc[SUB][OWN] = {};
                        if (is_job(job)) walk_over(job, tile, buffer_of(turn), acc);
                        __syncthreads();
                        store_sums(acc);
                        if (tile + 1 == TILES) {
                            if (is_job(next)) {
                                convert(next, buffer_of(turn + 1));
                                stage_h(states_before(next, n0));
                            }
                            if (is_job(after)) stage(after);
                        }
                        __syncthreads();
                        if (is_job(job)) add_up(job, tile);
                    }
                    if (job.reverse) finish(job, buffer_of(turn));
                    job = next, next = after;
                    if (is_job(after)) after = next_job(after);
                }
                leave_states();
                __syncthreads();
                leave_channels();
            } else if constexpr (ROLE == SERVE) {
                Team::sync_staff();
                prepare_channels();
                Team::sync_staff();
                Job job = none, next = none, after = first;
                for (int turn = 0; is_job(job) || is_job(next) || is_job(after); turn++) {
                    if (is_job(next)) {
                        convert(next, buffer_of(turn + 1));
                        Team::give_inputs(turn);
                    }
                    if (is_job(after)) stage(after);
                    if (is_job(job)) {
                        for (int tile = 0; tile < TILES; tile++) {
                            Team::give_room();
                            Team::wait_for_sums();
                            add_up(job, tile);
                        }
                        if (job.reverse) finish(job, buffer_of(turn));
                    }
                    job = next, next = after;
                    if (is_job(after)) after = next_job(after);
                }
                Team::sync_staff();
                leave_channels();
            } else {
                prepare_states();
                stage_h(states_before(first, n0));
                Job job = first;
                for (int turn = 1; is_job(job); turn++) {
                    const Job next = next_job(job);
                    Team::wait_for_inputs(turn);
                    for (int tile = 0; tile < TILES; tile++) {
                        float acc[SUB][OWN] = {};
                        walk_over(job, tile, buffer_of(turn + 1), acc);
                        if (tile + 1 == TILES && is_job(next)) stage_h(states_before(next, n0));
                        Team::wait_for_room();
                        store_sums(acc);
                        Team::give_sums();
                    }
                    job = next;
                }
                leave_states();
            }
        }
    };
    if constexpr (!SERVED) {
        run(As<BOTH, Roles>{});
    } else if (staff >= 0) {
        Roles::begin_serving();
        run(As<SERVE, Roles>{});
    } else {
        Roles::begin_walking();
        run(As<WALK, Roles>{});
    }
}

#define BACKWARD(NAME, T, THREADS, BLOCKS, ...)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(                                             \
        const T* __restrict__ u, const T* __restrict__ delta, const float* __restrict__ a_log,                      \
        const T* __restrict__ b, const T* __restrict__ c, const float* __restrict__ d,                              \
        const float* __restrict__ delta_bias, const T* __restrict__ z, const T* __restrict__ plain,                 \
        const T* __restrict__ dy, const float* __restrict__ dfinal, const float* __restrict__ checkpoints,          \
        const float* __restrict__ carry, T* __restrict__ du, T* __restrict__ ddelta, T* __restrict__ dz,            \
        float* __restrict__ dstate, float* __restrict__ maps, float* __restrict__ parameters, float* scratch,       \
        int batch, int steps, int width, int states, int segments, int per_segment) {                               \
        backward<T, __VA_ARGS__>(                                                                                   \
            Backward<T>{u,           delta, b,      c,  z,      plain,  dy,   a_log,      d,       delta_bias,      \
                        dfinal,      checkpoints,   carry,      du,     ddelta,   dz,     dstate,  maps,            \
                        parameters,  scratch,       batch,      steps,  width,    states, segments, per_segment});  \
    }

}  // namespace
