// The selective scan of Mamba: every channel has N states, each with a decay of its own.
//
//   u, delta, z [B, T, D], a_log [D, N], b, c [B, T, N], d, delta_bias [D], state [B, D, N]
//   dt = softplus(delta + delta_bias),  A = -exp(a_log)
//   h_n <- exp(dt A_n) h_n + dt u B_n,  y = (sum_n C_n h_n + d u) silu(z)
//
// Gu and Dao 2023, arXiv:2312.00752, algorithm 2. Gradients, with g_t the gradient of y before the gate,
// G_t = g_t C_t + exp(dt_{t+1} A) G_{t+1} that of h_t, and q_t = G_t exp(dt_t A) h_{t-1}:
//   du = d g + dt sum_n G B,  d dt = u sum_n G B + sum_n A q,  dB = sum_D G dt u,  dC = sum_D g h,
//   dA = sum_{B,T} dt q,  dd = sum g u,  ddelta = d dt sigmoid(delta + delta_bias),  da_log = A dA
//
// Bound by the exponentials, one a state and step and two backward (16 a clock and multiprocessor), and by the
// instructions around them: 5 a state and step forward, 22 backward. Work for a channel and step, such as the softplus,
// is done once, when a tile of steps is staged in shared memory, and not by every lane that has states of the channel.
//
// Kernels (f32, bf16: type of u, delta, b, c, z, y and their gradients; parameters, states and sums are f32):
//   selective_scan_forward   outputs, final state, and the states before every 64th step (checkpoints)
//   selective_scan_enter, selective_scan_leave, selective_scan_chain
//                            h and G at the ends of segments of time, which are then worked on side by side
//   selective_scan_backward  all gradients; sums over channels, batch and segments as partial sums
//   selective_scan_sum_maps, selective_scan_sum_parameters   add those up in order
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

// Starts copying the first `valid` numbers of a piece to shared memory; zeros for the others.
template <class T>
__device__ __forceinline__ void stage_piece(T* slot, const T* src, int valid, bool vector) {
    if (valid == PIECE && vector) {
        cp_async<PIECE * sizeof(T)>(slot, src);
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; i++) slot[i] = i < valid ? src[i] : from_f<T>(0.f);
    }
}

// A whole aligned piece, or zeros where there is none; no branch.
template <class T>
__device__ __forceinline__ void stage_whole(T* slot, const T* src, bool exists) {
    cp_async<PIECE * sizeof(T)>(slot, src, exists ? PIECE * sizeof(T) : 0);
}

// Row and column of piece `i` of an array with `per_row` pieces a row, a power of two.
struct Place {
    int row, column;
    __device__ __forceinline__ Place(int i, int per_row)
        : row(i >> (31 - __clz(per_row))), column((i & (per_row - 1)) * PIECE) {}
};

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

__device__ __forceinline__ void prefetch(const float* p, bool exists) {
#ifndef SB_EMULATE
    // No branch: the instructions around it may then mix.
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p prefetch.global.L2 [%0]; }" ::"l"(p), "r"((uint32_t)exists));
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

// ---- a walk over time

// FORWARD gives outputs. The others give what a segment of time adds to the state behind it (ENTER) or to the gradient
// of the state before it (LEAVE: time runs backward), so that segments can be worked on side by side. Both also give
// the segment's sum of dt: its decay is exp(A sum dt).
enum Pass { FORWARD, ENTER, LEAVE };

// What a walk reads and writes. ENTER has no c; LEAVE has the gradient of y for u, and c for b.
template <class T>
struct Walk {
    const T *u, *delta, *b, *c, *z;
    const float *a_log, *d, *delta_bias, *state;
    T *y, *plain;
    float *final_state, *checkpoints;
    float* carry;     // between segments: [B, segments - 1, D, N]
    float* dt_sums;   // [B, segments - 1, D]
    int batch, steps, width, states;
    int lanes;    // of a channel: a power of two, lanes S >= N
    int tile;     // steps staged at a time: 8, 16, 32 or 64
    int segment;  // steps of a segment, a multiple of 64
};

// A block owns `threads / lanes` x CH channels of one batch entry and segment and walks over time; a thread has S
// states of CH channels in registers. State (g, i) of a lane is number (g lanes + lane) W + i: loads of B, C and states
// are contiguous over the lanes. The next tile is copied while one is computed. Of LEAVE the states are gradients:
// G <- exp(dt A) (G + g C).
template <class T, int S, int CH, Pass PASS>
__device__ void walk(const Walk<T>& w) {
    DYNAMIC_SHARED(shared);
    constexpr bool CARRY = PASS != FORWARD, BACK = PASS == LEAVE;
    constexpr int W = S < 4 ? S : 4, GROUPS = S / W;
    constexpr int UNROLL = S * CH > 16 ? 4 : 8;  // steps between sums over lanes
    const int tid = threadIdx.x, threads = blockDim.x;
    const int lanes = w.lanes, lane = tid & (lanes - 1), own = tid / lanes * CH;
    const int channels = threads / lanes * CH, padded = lanes * S, tile = w.tile;
    const int c0 = blockIdx.x * channels, batch = blockIdx.y, segment = blockIdx.z + BACK;
    const int segments = ceil_div(w.steps, w.segment), first = segment * w.segment;
    const int end = min(first + w.segment, w.steps);
    const int ys_row = channels + 4;

    // Shared memory: two raw tiles of u, delta, z, B, C; then in f32 (dt, dt u), B, C, y.
    const int raw_size = tile * (3 * channels + 2 * padded);
    T* raw = reinterpret_cast<T*>(shared);
    float* scalars = reinterpret_cast<float*>(raw + 2 * raw_size);
    float* b_tile = scalars + tile * channels * 2;
    float* c_tile = b_tile + tile * padded;
    float* ys = c_tile + tile * padded;

    const int per_row = channels / PIECE, pieces = tile * per_row;
    const int map_row = padded / PIECE, maps = tile * map_row;
    const bool vector = aligned(w.u, w.width) && aligned(w.delta, w.width) && aligned(w.z, w.width);
    const bool map_vector = aligned(w.b, w.states) && aligned(w.c, w.states);

    auto stage = [&](int t0, T* to) {
#pragma unroll 1
        for (int i = tid; i < pieces; i += threads) {
            const Place place(i, per_row);
            const int t = t0 + place.row, c = c0 + place.column;
            const int valid = t < w.steps ? min(max(w.width - c, 0), PIECE) : 0;
            const long long at = ((long long)batch * w.steps + t) * w.width + c;
            stage_piece(to + i * PIECE, w.u + at, valid, vector);
            stage_piece(to + (pieces + i) * PIECE, w.delta + at, valid, vector);
            if (w.z != nullptr) stage_piece(to + (2 * pieces + i) * PIECE, w.z + at, valid, vector);
        }
        T* maps_to = to + 3 * pieces * PIECE;
#pragma unroll 1
        for (int i = tid; i < maps; i += threads) {
            const Place place(i, map_row);
            const int t = t0 + place.row, n = place.column;
            const int valid = t < w.steps ? min(max(w.states - n, 0), PIECE) : 0;
            const long long at = ((long long)batch * w.steps + t) * w.states + n;
            stage_piece(maps_to + i * PIECE, w.b + at, valid, map_vector);
            if (!CARRY) stage_piece(maps_to + (maps + i) * PIECE, w.c + at, valid, map_vector);
        }
        cp_async_commit();
    };
    auto convert = [&](int t0, const T* from) {
#pragma unroll 1
        for (int i = tid; i < pieces; i += threads) {
            const Place place(i, per_row);
            const int t = t0 + place.row, c = c0 + place.column;
            float u[PIECE], delta[PIECE], z[PIECE];
            load_vec<PIECE>(from + i * PIECE, u);
            load_vec<PIECE>(from + (pieces + i) * PIECE, delta);
            if (BACK && w.z != nullptr) load_vec<PIECE>(from + (2 * pieces + i) * PIECE, z);
#pragma unroll
            for (int j = 0; j < PIECE; j++) {
                const bool exists = t < w.steps && c + j < w.width;
                const float dt = exists ? fast_softplus(delta[j] + w.delta_bias[c + j]) : 0.f;
                float x = BACK ? u[j] : dt * u[j];
                if (BACK && w.z != nullptr) x *= z[j] * fast_sigmoid(z[j]);
                reinterpret_cast<float2*>(scalars)[i * PIECE + j] = make_float2(dt, x);
            }
        }
        const T* maps_from = from + 3 * pieces * PIECE;
#pragma unroll 1
        for (int i = tid; i < maps; i += threads) {
            float x[PIECE];
            load_vec<PIECE>(maps_from + i * PIECE, x);
            store_vec<PIECE>(b_tile + i * PIECE, x);
            if (!CARRY) {
                load_vec<PIECE>(maps_from + (maps + i) * PIECE, x);
                store_vec<PIECE>(c_tile + i * PIECE, x);
            }
        }
    };
    auto finish = [&](int t0, const T* from) {
#pragma unroll 1
        for (int i = tid; i < pieces; i += threads) {
            const Place place(i, per_row);
            const int t = t0 + place.row, c = c0 + place.column;
            const int valid = t < w.steps ? min(max(w.width - c, 0), PIECE) : 0;
            if (valid == 0) continue;
            const long long at = ((long long)batch * w.steps + t) * w.width + c;
            float u[PIECE], z[PIECE], y[PIECE];
            load_vec<PIECE>(from + i * PIECE, u);
            load_vec<PIECE>(ys + place.row * ys_row + place.column, y);
#pragma unroll
            for (int j = 0; j < PIECE; j++)
                if (j < valid) y[j] = fmaf(w.d[c + j], u[j], y[j]);
            if (w.plain != nullptr) store_piece(w.plain + at, y, valid, w.width % PIECE == 0);
            if (w.z != nullptr) {
                load_vec<PIECE>(from + (2 * pieces + i) * PIECE, z);
#pragma unroll
                for (int j = 0; j < PIECE; j++) y[j] *= z[j] * fast_sigmoid(z[j]);
            }
            store_piece(w.y + at, y, valid, w.width % PIECE == 0);
        }
    };

    // The state at the edge of time, what the segment before leaves, or none.
    const bool edge = segment == (BACK ? segments - 1 : 0);
    const float* start = edge ? w.state : CARRY ? nullptr : w.carry;
    const long long start_row = edge ? batch : (long long)batch * (segments - 1) + segment - 1;
    float a[CH][GROUPS][W], h[CH][GROUPS][W], dt_sum[CH] = {};
#pragma unroll
    for (int ch = 0; ch < CH; ch++) {
        const int c = c0 + own + ch;
        const bool exists = c < w.width;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int n = (g * lanes + lane) * W;
            load_rates<W>(w.a_log + (long long)c * w.states, n, w.states, exists, a[ch][g]);
            load_states<W>(start + (start_row * w.width + c) * w.states, n, w.states, exists && start != nullptr,
                           h[ch][g]);
        }
    }
    // The states, to row `row` of an array [.., D, N].
    auto store_all = [&](float* to, long long row) {
#pragma unroll
        for (int ch = 0; ch < CH; ch++) {
            const int c = c0 + own + ch;
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                store_states<W>(to + (row * w.width + c) * w.states, (g * lanes + lane) * W, w.states, c < w.width,
                                h[ch][g]);
        }
    };

    const int tiles = ceil_div(end - first, tile);
    stage(first + (BACK ? tiles - 1 : 0) * tile, raw);
    for (int k = 0; k < tiles; k++) {
        const int t0 = first + (BACK ? tiles - 1 - k : k) * tile;
        T* now = raw + (k & 1) * raw_size;
        cp_async_wait<0>();
        convert(t0, now);
        if (k + 1 < tiles) stage(BACK ? t0 - tile : t0 + tile, raw + (~k & 1) * raw_size);
        if (!CARRY && w.checkpoints != nullptr && t0 % CHUNK == 0)
            store_all(w.checkpoints, (long long)batch * ceil_div(w.steps, CHUNK) + t0 / CHUNK);
        __syncthreads();
        const int count = min(tile, end - t0);
        for (int step = 0; step < count; step += UNROLL) {
            const int s0 = BACK ? (ceil_div(count, UNROLL) - 1) * UNROLL - step : step;
            float y[CH * UNROLL];
#pragma unroll
            for (int j = 0; j < UNROLL; j++) {
                const int r = s0 + (BACK ? UNROLL - 1 - j : j);
                float scalar[2 * CH], b[W], c[W];
                load_vec<2 * CH>(scalars + (r * channels + own) * 2, scalar);
#pragma unroll
                for (int ch = 0; ch < CH; ch++) {
                    y[ch * UNROLL + j] = 0.f;
                    if (CARRY) dt_sum[ch] += scalar[2 * ch];
                }
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    const int n = (g * lanes + lane) * W;
                    load_vec<W>(b_tile + r * padded + n, b);
                    if (!CARRY) load_vec<W>(c_tile + r * padded + n, c);
#pragma unroll
                    for (int ch = 0; ch < CH; ch++)
#pragma unroll
                        for (int i = 0; i < W; i++) {
                            const float dt = scalar[2 * ch], x = scalar[2 * ch + 1];
                            const float decay = exp2_fast(dt * a[ch][g][i]);
                            float& state = h[ch][g][i];
                            state = BACK ? decay * fmaf(x, b[i], state) : fmaf(decay, state, x * b[i]);
                            if (!CARRY) y[ch * UNROLL + j] = fmaf(c[i], state, y[ch * UNROLL + j]);
                        }
                }
            }
            if (!CARRY) {
                sum_over_lanes<CH * UNROLL, 1>(y, 0, 1, lanes, [&](int first, const auto& sums) {
                    constexpr int V = sizeof(sums) / sizeof(float);
#pragma unroll
                    for (int i = 0; i < V; i++) {
                        const int at = first + i;
                        ys[(s0 + at % UNROLL) * ys_row + own + at / UNROLL] = sums[i];
                    }
                });
            }
        }
        __syncthreads();
        if (!CARRY) finish(t0, now);
    }
    if (CARRY) {
        const long long row = (long long)batch * (segments - 1) + blockIdx.z;
        store_all(w.carry, row);
#pragma unroll
        for (int ch = 0; ch < CH; ch++)
            if (lane == 0 && c0 + own + ch < w.width) w.dt_sums[row * w.width + c0 + own + ch] = dt_sum[ch];
    } else if (segment == segments - 1) {
        store_all(w.final_state, batch);
    }
}

// ---- backward

constexpr int SUB = 8;   // steps whose decays and states a thread keeps in registers
constexpr int OWN = 4;   // states of a lane
constexpr int PAIR = 2;  // channels that a lane works on side by side
constexpr int ROW = SUB * 4 + 4, OUT_ROW = 2 * SUB + 1;

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

// States of a channel; those of the next are `pitch` further on. How many channels there are from here on, and states.
struct Before {
    const float* from;
    int pitch, channels, states;
};

// A block owns GROUP channels of one batch entry and segment, and works on SUB steps of all of them before it moves on.
// LANES lanes share a channel and step TILES times over its states. A warp takes its channels one after the other (PAIR
// x WARP / LANES at a time), so that the sums over channels, dB or dC, stay in its registers: SUB x OWN numbers a lane.
// Only then they are added over the warps, through shared memory. Gradients of states and rates live in shared memory
// meanwhile. Eight warps run on a multiprocessor, as one block or two. Blocks take several (channels, batch entry,
// segment)s one after the other: `scratch` is as large as the blocks that run, 7 x GROUP x PADDED floats each.
template <class T, int LANES, int TILES, int WARPS, int GROUP>
__device__ void backward(const Backward<T>& w) {
    DYNAMIC_SHARED(shared);
    constexpr int SIDE = WARP / LANES, COLUMNS = LANES * OWN, THREADS = WARPS * WARP;
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
    // Two buffers: (dt, dt u, g, u) [GROUP, SUB], B, C [padded / OWN, SUB, OWN], (sum_n G B [SUB], sum_n A q [SUB])
    // [GROUP]. Rows are ROW and OUT_ROW numbers, so that a step is a constant offset and lanes meet in no bank.
    constexpr int MAP_SIZE = PADDED / OWN * ROW, BUFFER_SIZE = GROUP * (ROW + OUT_ROW) + 2 * MAP_SIZE;
    float* buffers = channel_sums + 2 * GROUP + 4;
    T* raw = reinterpret_cast<T*>(buffers + 2 * BUFFER_SIZE);
    constexpr int B_AT = GROUP * ROW, OUT_AT = B_AT + 2 * MAP_SIZE;

    // SUB neighbouring threads have a piece of SUB steps each, so that the lanes of a warp meet in few banks.
    constexpr int PIECES = SUB * GROUP / PIECE, MAPS = SUB * PADDED / PIECE;
    const long long slab = (long long)w.width * (w.states + 2);
    float* scratch = w.scratch + (long long)blockIdx.x * (CHUNK / SUB - 1) * SIZE;

    if (tid == 0) {
        flags[0] = aligned(w.u, w.width) && aligned(w.delta, w.width) && aligned(w.z, w.width) &&
                   aligned(w.dy, w.width) && aligned(w.b, w.states) && aligned(w.c, w.states);
        flags[1] = w.width % PIECE == 0;
    }
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
            const int thread = anew<THREADS>(tid), t = job.chunk * CHUNK + job.sub * SUB + thread % SUB;
            const long long line = (long long)batch * w.steps + t;
            const bool gated = w.z != nullptr, plain = gated && job.reverse;
            T* maps_to = raw + 5 * PIECES * PIECE;
            // Aligned rows have whole pieces alone.
            auto stage_all = [&](auto stage_one) {
                share_out<PIECES, THREADS>(thread, [&](int i) {
                    const int c = c0 + i / SUB * PIECE, valid = t < w.steps ? w.width - c : 0;
                    const long long at = line * w.width + c;
                    T* to = raw + i * PIECE;
                    stage_one(to, w.u + at, valid);
                    stage_one(to + PIECES * PIECE, w.delta + at, valid);
                    stage_one(to + 2 * PIECES * PIECE, w.dy + at, valid);
                    if (gated) stage_one(to + 3 * PIECES * PIECE, w.z + at, valid);
                    if (plain) stage_one(to + 4 * PIECES * PIECE, w.plain + at, valid);
                });
                share_out<MAPS, THREADS>(thread, [&](int i) {
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
            const int thread = anew<THREADS>(tid), own_step = thread % SUB;
            const bool vector = flags[1];
            const int t = job.chunk * CHUNK + job.sub * SUB + own_step;
            cp_async_wait<0>();
            share_out<PIECES, THREADS>(thread, [&](int i) {
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
            share_out<MAPS, THREADS>(thread, [&](int i) {
                float* to = buffer + B_AT + i / SUB * ROW + own_step * OWN;
                float x[PIECE];
                load_vec<PIECE>(maps_from + i * PIECE, x);
                store_vec<PIECE>(to, x);
                load_vec<PIECE>(maps_from + (MAPS + i) * PIECE, x);
                store_vec<PIECE>(to + MAP_SIZE, x);
            });
        };
        // The states before the first step of a job: where those of the lane's first channel are.
        auto states_before = [&](Job job, int n) {
            const bool first = job.sub == 0;
            const long long chunk = (long long)batch * chunks + job.chunk;
            const float* from =
                first ? w.checkpoints + (chunk * w.width + c0) * w.states : scratch + (job.sub - 1) * SIZE;
            const int pitch = first ? w.states : PADDED;
            return Before{from + (long long)first_own * pitch + n, pitch, (first ? w.width - c0 : GROUP) - first_own,
                          pitch - n};
        };
        // Starts copying those of the lane's channels from the kth on to its slots.
        auto stage_h = [&](const Before& before, int k) {
#pragma unroll
            for (int s = 0; s < PAIR; s++) {
                const int own = k + s * SIDE, valid = own < before.channels ? before.states : 0;
                float* to = slots + s * THREADS * OWN;
                const float* from = before.from + own * before.pitch;
                if (before.pitch % OWN == 0) {
                    stage_whole(to, from, valid > 0);
                } else {
#pragma unroll 1
                    for (int i = 0; i < OWN; i++) to[i] = i < valid ? from[i] : 0.f;
                }
            }
            cp_async_commit();
        };

        __syncthreads();
        for (int i = tid; i < GROUP; i += THREADS) {
            skips[i] = c0 + i < w.width ? w.d[c0 + i] : 0.f;
            biases[i] = c0 + i < w.width ? w.delta_bias[c0 + i] : 0.f;
            channel_sums[i] = channel_sums[GROUP + i] = 0.f;
        }
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
        __syncthreads();

        // At every turn a job is done, what was staged of the next is converted, and the one after is staged.
        Job job = {first_chunk - 1, 0, false}, next = job, after = {end_chunk - 1, 0, false};
        const auto is_job = [&](Job job) { return job.chunk >= first_chunk; };
        for (int turn = 0; is_job(job) || is_job(next) || is_job(after); turn++) {
            float* buffer = buffers + (turn & 1) * BUFFER_SIZE;
            for (int tile = 0; tile < TILES; tile++) {
                float acc[SUB][OWN] = {};  // dB or dC
                const int n = tile * COLUMNS + lane * OWN;
                const float *b_row = buffer + B_AT + n / OWN * ROW, *c_row = b_row + MAP_SIZE;
                const Before before = states_before(job, n);
                float* const states = scratch + (long long)job.sub * SIZE + first_own * PADDED + n;
                if (tile > 0 && is_job(job)) stage_h(before, 0);
                if (job.reverse && job.sub == 0 && job.chunk > first_chunk) {
                    const float* earlier = before.from - (long long)w.width * w.states;
                    for (int k = 0; k < MINE; k += SIDE)
                        prefetch(earlier + k * w.states, k < before.channels && n < w.states);
                }
#pragma unroll 1
                for (int k = 0; k < MINE && is_job(job); k += PAIR * SIDE) {
                    const int c = first_own + k, at = c * PADDED + n;
                    cp_async_wait<0>();
                    const float* scalars = buffer + c * ROW;
                    float a[PAIR][OWN], h[PAIR][OWN];
#pragma unroll
                    for (int s = 0; s < PAIR; s++) {
                        load_vec<OWN>(rates + at + s * SIDE * PADDED, a[s]);
                        load_vec<OWN>(slots + s * THREADS * OWN, h[s]);
                    }
                    if (k + PAIR * SIDE < MINE) stage_h(before, k + PAIR * SIDE);
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
                                store_vec<OWN>(states + (k + s * SIDE) * PADDED, h[s]);
                        }
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
                        load_vec<OWN>(dh_all + at + s * SIDE * PADDED, dh[s]);
                        load_vec<OWN>(da_all + at + s * SIDE * PADDED, da[s]);
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
                        store_vec<OWN>(dh_all + at + s * SIDE * PADDED, dh[s]);
                        store_vec<OWN>(da_all + at + s * SIDE * PADDED, da[s]);
                    }
                    sum_over_lanes<PAIR * 2 * SUB, 1>(out, 0, 1, LANES, [&](int first, const auto& x) {
                        constexpr int V = sizeof(x) / sizeof(float);
                        const int s = first / (2 * SUB);
                        float* to = buffer + OUT_AT + (c + s * SIDE) * OUT_ROW + first % (2 * SUB);
#pragma unroll
                        for (int i = 0; i < V; i++) to[i] = tile == 0 ? x[i] : to[i] + x[i];
                    });
                }
                __syncthreads();
#pragma unroll
                for (int r = 0; r < SUB; r++)
                    store_vec<OWN>(sums + (r * WARPS * WARP + tid) * OWN, acc[r]);
                if (tile + 1 == TILES) {
                    if (is_job(next)) {
                        convert(next, buffers + (~turn & 1) * BUFFER_SIZE);
                        stage_h(states_before(next, lane * OWN), 0);
                    }
                    if (is_job(after)) stage(after);
                }
                __syncthreads();
                if (!is_job(job)) continue;
                const int t0 = job.chunk * CHUNK + job.sub * SUB;
                // A piece of the sums is one thread's, or that of PARTS neighbours where there are few.
                constexpr int PARTS = THREADS > SUB * LANES ? THREADS / (SUB * LANES) : 1;
                const int thread = anew<THREADS>(tid);
                share_out<SUB * LANES, THREADS / PARTS>(thread / PARTS, [&](int i) {
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
            }
            if (job.reverse) {
                const int thread = anew<THREADS>(tid), own_step = thread % SUB;
                const bool vector = flags[1];
                const int t = job.chunk * CHUNK + job.sub * SUB + own_step;
                share_out<ceil_div(PIECES, WARP) * WARP, THREADS>(thread, [&](int i) {  // all lanes of a warp
                    const int column = min(i / SUB * PIECE, GROUP - PIECE), c = c0 + column;
                    const int valid = i < PIECES && t < w.steps ? min(max(w.width - c, 0), PIECE) : 0;
                    float du[PIECE], ddelta[PIECE], skip[PIECE], dd[2 * PIECE];  // of d, of delta_bias
                    load_vec<PIECE>(skips + column, skip);
#pragma unroll
                    for (int j = 0; j < PIECE; j++) {
                        float scalar[4];
                        load_vec<4>(buffer + (column + j) * ROW + own_step * 4, scalar);
                        const float dt = scalar[0], g = scalar[2], u = scalar[3];
                        const float* out = buffer + OUT_AT + (column + j) * OUT_ROW + own_step;
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
            }
            job = next, next = after;
            if (is_job(after)) after = next_job(after);
        }

        // Gradients of the rates and of the state before the segment; those of d and delta_bias over the threads.
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
        __syncthreads();
        for (int i = tid; i < 2 * GROUP; i += THREADS) {
            const int c = c0 + i % GROUP;
            if (c < w.width) slab_sums[(long long)w.width * (w.states + i / GROUP) + c] = channel_sums[i];
        }
    }
}

// dB and dC from the sums of the groups of channels, [2, groups, rows, padded]: a thread has a piece.
template <class T>
__device__ void sum_maps(const float* maps, T* db, T* dc, int groups, int rows, int states, int padded) {
    const int per_row = padded / PIECE;
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= 2LL * rows * per_row) return;
    const int map = (int)(index / ((long long)rows * per_row));
    const long long place = index % ((long long)rows * per_row);
    const int n = (int)(place % per_row) * PIECE;
    float total[PIECE] = {};
    for (int group = 0; group < groups; group++) {
        float x[PIECE];
        load_vec<PIECE>(maps + ((long long)(map * groups + group) * rows * per_row + place) * PIECE, x);
#pragma unroll
        for (int j = 0; j < PIECE; j++) total[j] += x[j];
    }
    T* out = map == 0 ? db : dc;
    store_piece(out + place / per_row * states + n, total, min(max(states - n, 0), PIECE), states % PIECE == 0);
}

}  // namespace

// Forward: grid (ceil(D / channels), B, ceil(T / segment)), block `threads`, channels = threads / lanes x CH; `plain`
// (y before the gate) and checkpoints [B, ceil(T / 64), D, N] may be null; `carry`: the states between segments. Shared
// memory: tile x (2 (3 channels + 2 S lanes) sizeof(T) + 4 (3 channels + 4 + 2 S lanes)) bytes.
#define FORWARD_KERNEL(NAME, T, S, CH)                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME(                                                      \
        const T* __restrict__ u, const T* __restrict__ delta, const float* __restrict__ a_log,                      \
        const T* __restrict__ b, const T* __restrict__ c, const float* __restrict__ d,                              \
        const float* __restrict__ delta_bias, const T* __restrict__ z, const float* __restrict__ state,             \
        T* __restrict__ y, T* __restrict__ plain, float* __restrict__ final_state, float* __restrict__ checkpoints, \
        float* __restrict__ carry, int batch, int steps, int width, int states, int lanes, int tile, int segment) { \
        walk<T, S, CH, FORWARD>(Walk<T>{u, delta, b, c, z, a_log, d, delta_bias, state, y, plain, final_state,      \
                                        checkpoints, carry, nullptr, batch, steps, width, states, lanes, tile,      \
                                        segment});                                                                  \
    }
FORWARD_KERNEL(selective_scan_forward_s16x2_f32, float, 16, 2)
FORWARD_KERNEL(selective_scan_forward_s16x2_bf16, bf16, 16, 2)
FORWARD_KERNEL(selective_scan_forward_s4x2_f32, float, 4, 2)
FORWARD_KERNEL(selective_scan_forward_s4x2_bf16, bf16, 4, 2)
FORWARD_KERNEL(selective_scan_forward_s2x1_f32, float, 2, 1)
FORWARD_KERNEL(selective_scan_forward_s2x1_bf16, bf16, 2, 1)

// What every segment but the last (enter) or the first (leave) adds to `carry` [B, segments - 1, D, N], and its sum of
// dt [B, segments - 1, D]. Launched as the forward kernels, with a segment less.
#define CARRY_KERNEL(NAME, T, PASS)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME(                                                      \
        const T* __restrict__ u, const T* __restrict__ delta, const float* __restrict__ a_log,                      \
        const T* __restrict__ b, const float* __restrict__ delta_bias, const T* __restrict__ z,                     \
        const float* __restrict__ state, float* __restrict__ carry, float* __restrict__ dt_sums, int batch,         \
        int steps, int width, int states, int lanes, int tile, int segment) {                                       \
        walk<T, 8, 1, PASS>(Walk<T>{u, delta, b, nullptr, z, a_log, nullptr, delta_bias, state, nullptr, nullptr,   \
                                    nullptr, nullptr, carry, dt_sums, batch, steps, width, states, lanes, tile,     \
                                    segment});                                                                      \
    }
CARRY_KERNEL(selective_scan_enter_f32, float, ENTER)
CARRY_KERNEL(selective_scan_enter_bf16, bf16, ENTER)
CARRY_KERNEL(selective_scan_leave_f32, float, LEAVE)
CARRY_KERNEL(selective_scan_leave_bf16, bf16, LEAVE)

// Turns what every segment adds into the states (gradients, where `back` is set) between segments, in place. A thread
// has a state. Grid ceil(B D N / 256), block 256.
extern "C" __global__ void __launch_bounds__(256)
    selective_scan_chain(float* carry, const float* __restrict__ dt_sums, const float* __restrict__ a_log, int batch,
                         int edges, int width, int states, int back) {
    const long long rates = (long long)width * states;
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= batch * rates) return;
    const long long entry = index / rates * edges, at = index % rates;
    const float rate = -LOG2E * expf(a_log[at]);
    float state = 0.f;
#pragma unroll 8
    for (int k = 0; k < edges; k++) {
        const long long row = entry + (back ? edges - 1 - k : k);
        state = fmaf(exp2_fast(rate * dt_sums[row * width + at / states]), state, carry[row * rates + at]);
        carry[row * rates + at] = state;
    }
}

// Backward: at most ceil(D / GROUP) B segments blocks of 32 WARPS. `maps` [2, ceil(D / GROUP), B, T, padded],
// `parameters` [B segments, D (N + 2)], `scratch` [blocks, 7, GROUP, padded], padded = 4 LANES TILES >= N. Shared
// memory: 4 (3 GROUP padded + 1280 WARPS + 4 + 110 GROUP + 36 padded) + 8 (5 GROUP + 2 padded) sizeof(T) bytes.
#define BACKWARD(NAME, T, LANES, TILES, WARPS, GROUP)                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP, 8 / WARPS) NAME(                                     \
        const T* __restrict__ u, const T* __restrict__ delta, const float* __restrict__ a_log,                      \
        const T* __restrict__ b, const T* __restrict__ c, const float* __restrict__ d,                              \
        const float* __restrict__ delta_bias, const T* __restrict__ z, const T* __restrict__ plain,                 \
        const T* __restrict__ dy, const float* __restrict__ dfinal, const float* __restrict__ checkpoints,          \
        const float* __restrict__ carry, T* __restrict__ du, T* __restrict__ ddelta, T* __restrict__ dz,            \
        float* __restrict__ dstate, float* __restrict__ maps, float* __restrict__ parameters, float* scratch,       \
        int batch, int steps, int width, int states, int segments, int per_segment) {                               \
        backward<T, LANES, TILES, WARPS, GROUP>(                                                                    \
            Backward<T>{u,           delta, b,      c,  z,      plain,  dy,   a_log,      d,       delta_bias,      \
                        dfinal,      checkpoints,   carry,      du,     ddelta,   dz,     dstate,  maps,            \
                        parameters,  scratch,       batch,      steps,  width,    states, segments, per_segment});  \
    }
BACKWARD(selective_scan_backward_l4_f32, float, 4, 1, 8, 128)
BACKWARD(selective_scan_backward_l4_bf16, bf16, 4, 1, 4, 128)
BACKWARD(selective_scan_backward_l8_f32, float, 8, 1, 8, 128)
BACKWARD(selective_scan_backward_l8_bf16, bf16, 8, 1, 8, 128)
BACKWARD(selective_scan_backward_l16_f32, float, 16, 1, 8, 128)
BACKWARD(selective_scan_backward_l16_bf16, bf16, 16, 1, 4, 64)
BACKWARD(selective_scan_backward_l32_f32, float, 32, 1, 8, 64)
BACKWARD(selective_scan_backward_l32_bf16, bf16, 32, 1, 8, 64)
BACKWARD(selective_scan_backward_l64_f32, float, 32, 2, 8, 32)
BACKWARD(selective_scan_backward_l64_bf16, bf16, 32, 2, 8, 32)

// Grid ceil(2 B T padded / 4 / 256), block 256.
#define SUM_MAPS(NAME, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) NAME(const float* __restrict__ maps, T* __restrict__ db,      \
                                                           T* __restrict__ dc, int groups, int rows, int states,    \
                                                           int padded) {                                            \
        sum_maps<T>(maps, db, dc, groups, rows, states, padded);                                                    \
    }
SUM_MAPS(selective_scan_sum_maps_f32, float)
SUM_MAPS(selective_scan_sum_maps_bf16, bf16)

// da_log [D, N], dd, ddelta_bias [D] from `slabs` slabs; null: not wanted; added to what is there where bit 0, 1, 2 of
// `add` is set. Grid ceil(D (N + 2) / 256), block 256.
extern "C" __global__ void __launch_bounds__(256)
    selective_scan_sum_parameters(const float* __restrict__ parameters, const float* __restrict__ a_log,
                                  float* __restrict__ da_log, float* __restrict__ dd, float* __restrict__ dbias,
                                  int slabs, int width, int states, int add) {
    const long long columns = (long long)width * (states + 2), rates = (long long)width * states;
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float total = 0.f;
#pragma unroll 8
    for (int slab = 0; slab < slabs; slab++) total += parameters[slab * columns + column];
    if (column < rates) total *= -expf(a_log[column]);
    const int which = column < rates ? 0 : column < rates + width ? 1 : 2;
    float* out = which == 0 ? da_log : which == 1 ? dd : dbias;
    if (out == nullptr) return;
    out += which == 0 ? column : which == 1 ? column - rates : column - rates - width;
    *out = add >> which & 1 ? *out + total : total;
}
