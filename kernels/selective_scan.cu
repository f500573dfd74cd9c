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
// instructions around them: 5 a state and step forward, 25 backward. Work for a channel and step, such as the softplus,
// is done once, when a tile of steps is staged in shared memory, and not by every lane that has states of the channel.
//
// Kernels (f32, bf16: type of u, delta, b, c, z, y and their gradients; parameters, states and sums are f32):
//   selective_scan_forward   outputs, final state, and the states before every 64th step (checkpoints)
//   selective_scan_enter, selective_scan_leave, selective_scan_chain
//                            h and G at the ends of segments of time, which are then worked on side by side
//   selective_scan_backward  all gradients; sums over channels, batch and segments as partial sums (selective_scan.cuh;
//                            for 128 states and more on GPUs of compute capability 9.0 in selective_scan_sm90a.cu)
//   selective_scan_sum_maps, selective_scan_sum_parameters   add those up in order
#include "selective_scan.cuh"

namespace {

// ---- a walk over time

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

// Row and column of piece `i` of an array with `per_row` pieces a row, a power of two.
struct Place {
    int row, column;
    __device__ __forceinline__ Place(int i, int per_row)
        : row(i >> (31 - __clz(per_row))), column((i & (per_row - 1)) * PIECE) {}
};

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
    int rows, padded;  // of the checkpoints: channels and states as the backward pass has them
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
    // The states, to row `row` of an array [.., channels, pitch].
    auto store_all = [&](float* to, long long row, int channels, int pitch) {
#pragma unroll
        for (int ch = 0; ch < CH; ch++) {
            const int c = c0 + own + ch;
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                store_states<W>(to + (row * channels + c) * pitch, (g * lanes + lane) * W, w.states, c < w.width,
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
            store_all(w.checkpoints, (long long)batch * ceil_div(w.steps, CHUNK) + t0 / CHUNK, w.rows, w.padded);
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
        store_all(w.carry, row, w.width, w.states);
#pragma unroll
        for (int ch = 0; ch < CH; ch++)
            if (lane == 0 && c0 + own + ch < w.width) w.dt_sums[row * w.width + c0 + own + ch] = dt_sum[ch];
    } else if (segment == segments - 1) {
        store_all(w.final_state, batch, w.width, w.states);
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
// (y before the gate) and checkpoints [B, ceil(T / 64), rows, padded] may be null, rows >= D, padded >= N; what is behind D
// and N is not written; `carry`: the states between segments. Shared
// memory: tile x (2 (3 channels + 2 S lanes) sizeof(T) + 4 (3 channels + 4 + 2 S lanes)) bytes.
#define FORWARD_KERNEL(NAME, T, S, CH)                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME(                                                      \
        const T* __restrict__ u, const T* __restrict__ delta, const float* __restrict__ a_log,                      \
        const T* __restrict__ b, const T* __restrict__ c, const float* __restrict__ d,                              \
        const float* __restrict__ delta_bias, const T* __restrict__ z, const float* __restrict__ state,             \
        T* __restrict__ y, T* __restrict__ plain, float* __restrict__ final_state, float* __restrict__ checkpoints, \
        float* __restrict__ carry, int batch, int steps, int width, int states, int lanes, int tile, int segment,   \
        int rows, int padded) {                                                                                     \
        walk<T, S, CH, FORWARD>(Walk<T>{u, delta, b, c, z, a_log, d, delta_bias, state, y, plain, final_state,      \
                                        checkpoints, carry, nullptr, batch, steps, width, states, lanes, tile,      \
                                        segment, rows, padded});                                                    \
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
                                    segment, 0, 0});                                                                \
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

// Backward: at most ceil(D / GROUP) B segments blocks of 32 WARPS. Checkpoints [B, ceil(T / 64), GROUP ceil(D / GROUP),
// padded], finite numbers behind D and N; `maps` [2, ceil(D / GROUP), B, T, padded], `parameters` [B segments, D (N + 2)],
// `scratch` [blocks, 7, GROUP, padded], padded = 4 LANES TILES >= N. Shared memory: 4 (3 GROUP padded + 1280 WARPS + 4 +
// 108 GROUP + 36 padded) + 8 (5 GROUP + 2 padded) sizeof(T) bytes.
BACKWARD(selective_scan_backward_l4_f32, float, 256, 1, 4, 1, 8, 128)
BACKWARD(selective_scan_backward_l4_bf16, bf16, 128, 2, 4, 1, 4, 128)
BACKWARD(selective_scan_backward_l8_f32, float, 256, 1, 8, 1, 8, 128)
BACKWARD(selective_scan_backward_l8_bf16, bf16, 256, 1, 8, 1, 8, 128)
BACKWARD(selective_scan_backward_l16_f32, float, 256, 1, 16, 1, 8, 128)
BACKWARD(selective_scan_backward_l16_bf16, bf16, 128, 2, 16, 1, 4, 64)
BACKWARD(selective_scan_backward_l32_f32, float, 256, 1, 32, 1, 8, 64)
BACKWARD(selective_scan_backward_l32_bf16, bf16, 256, 1, 32, 1, 8, 64)
BACKWARD(selective_scan_backward_l64_f32, float, 256, 1, 32, 2, 8, 32)
BACKWARD(selective_scan_backward_l64_bf16, bf16, 256, 1, 32, 2, 8, 32)

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
