// Depthwise causal convolution along time, then SiLU.
//
//   x [B, T, D], weight [D, W], bias [D] or none, state [B, W-1, D] or none (the inputs before the first step; zeros)
//   a_t = bias + sum_j w_j x_{t-W+1+j},  y_t = a_t sigmoid(a_t),  final [B, W-1, D]: the last W-1 inputs
//
// Rows of x are `columns` >= D long. y and dy come in up to three parts, each contiguous: the channels up to end0, up to
// end1 and up to D. The columns behind them are given as they are, in up to three parts, up to end3, end4 and end5, D
// being end2; what is then left has no gradient.
//
// Gradients, with da_t = dy_t (a_t sigmoid(a_t))' and da = 0 outside 0 <= t < T:
//   dx_s = sum_j w_j da_{s+W-1-j} (+ dfinal),  the same for the steps of the state,
//   dw_j = sum_{b,t} da_t x_{t-W+1+j},  dbias = sum_{b,t} da_t
//
// Bound by memory: a warp owns 32 V neighbouring channels and `run` steps of one batch entry, a lane V of the
// channels (V: 4, or 1 where D or an address does not allow that). It keeps the last inputs in registers, has
// the next steps on their way while it computes, and reads each x once, but for the W-1 steps that runs share.
// The backward pass computes a again. Sums for the weights: in registers over a run, in the block over its
// warps, in `partial` [slabs, W+1, D] over the blocks, then in order by causal_conv1d_sums.
#include "common.cuh"

namespace {

constexpr int WARPS = 4;

// The logistic function in four instructions. The power may become infinite: then this is 0.
__device__ __forceinline__ float fast_sigmoid(float x) { return rcp_fast(1.f + exp2_fast(-LOG2E * x)); }

// Which channels and steps a thread works on.
struct Part {
    int c;        // the first of V channels
    int b;        // batch entry
    int t0, t1;   // steps
    bool inside;  // whether there are such
};
template <int V>
__device__ __forceinline__ Part part_of(int batch, int steps, int width, int run) {
    const int runs = ceil_div(steps, run), r = blockIdx.y * WARPS + warp_id();
    Part part;
    part.c = (blockIdx.x * WARP + lane_id()) * V;
    part.b = r / runs;
    part.t0 = r % runs * run;
    part.t1 = min(part.t0 + run, steps);
    part.inside = part.c < width && part.b < batch;
    return part;
}

// The rows of one part of the columns.
template <class T>
struct Rows {
    T* first;   // column c of step 0; null: there are none
    int width;  // from one row to the next
};
// Where the parts are that columns are divided into, and where they end.
template <class T>
struct Parts {
    T* at[6];
    int end[6];

    __device__ __forceinline__ Rows<T> of(int c) const {
        int begin = 0;
#pragma unroll
        for (int i = 0; i < 6; i++) {
            if (c < end[i]) return {at[i] + (c - begin), end[i] - begin};
            begin = end[i];
        }
        return {nullptr, 0};
    }
};

template <bool X>
struct Constant {
    static constexpr bool value = X;
};

// V neighbours on their way from memory.
template <class T, int V>
struct alignas(sizeof(T) * V) Packed {
    T x[V];
    __device__ __forceinline__ void unpack(float (&out)[V]) const {
#pragma unroll
        for (int v = 0; v < V; v++) out[v] = to_f(x[v]);
    }
};
// Two to a register: the compiler gives every bf16 its own.
template <>
struct alignas(8) Packed<bf16, 4> {
    uint32_t x[2];
    __device__ __forceinline__ void unpack(float (&out)[4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            out[2 * i] = __uint_as_float(x[i] << 16);
            out[2 * i + 1] = __uint_as_float(x[i] & 0xffff0000u);
        }
    }
};
template <int V, class T>
__device__ __forceinline__ Packed<T, V> fetch(const T* p) {
    return *reinterpret_cast<const Packed<T, V>*>(p);
}

// Row `t` of the inputs of a batch entry, channels c..c+V; t from -(W-1) on, t < 0 from the state. Zeros before
// that.
template <int V, class T>
__device__ __forceinline__ Packed<T, V> input(const T* x, const T* state, const Part& part, int t, int steps,
                                              int columns, int width, int taps) {
    if (t >= 0) return fetch<V>(x + ((long long)part.b * steps + t) * columns + part.c);
    if (state != nullptr && t + taps > 0)
        return fetch<V>(state + ((long long)part.b * (taps - 1) + t + taps - 1) * width + part.c);
    return {};
}

// The taps of the block's channels, the current step's in the last place, zeros in front of fewer than TAPS;
// and the bias.
template <int V, int TAPS>
struct Weights {
    alignas(16) float x[TAPS + 1][WARP * V];

    __device__ __forceinline__ void load(const float* weight, const float* bias, int width, int taps) {
        const int first = blockIdx.x * WARP * V;
        for (int i = threadIdx.x; i < WARP * V; i += blockDim.x) {
            const int c = first + i;
            float row[TAPS];
            if (TAPS == 4 && taps == 4 && c < width && reinterpret_cast<size_t>(weight) % 16 == 0) {
                load_vec<TAPS == 4 ? 4 : TAPS>(weight + (long long)c * 4, row);
            } else {
#pragma unroll
                for (int j = 0; j < TAPS; j++) {
                    const int tap = j - (TAPS - taps);
                    row[j] = tap >= 0 && c < width ? weight[(long long)c * taps + tap] : 0.f;
                }
            }
#pragma unroll
            for (int j = 0; j < TAPS; j++) x[j][i] = row[j];
            x[TAPS][i] = bias != nullptr && c < width ? bias[c] : 0.f;
        }
    }
    __device__ __forceinline__ void take(float (&w)[TAPS][V], float (&b)[V]) const {
#pragma unroll
        for (int j = 0; j < TAPS; j++) load_vec<V>(&x[j][lane_id() * V], w[j]);
        load_vec<V>(&x[TAPS][lane_id() * V], b);
    }
};

// The steps of a thread's columns from one place to another; without a place to come from zeros.
template <int V, class T>
__device__ __forceinline__ void copy_steps(const Part& part, int steps, Rows<const T> from, Rows<T> to) {
    if (to.first == nullptr) return;
    for (int t = part.t0; t < part.t1; t++) {
        const long long row = (long long)part.b * steps + t;
        const Packed<T, V> x = from.first ? fetch<V>(from.first + row * from.width) : Packed<T, V>{};
        *reinterpret_cast<Packed<T, V>*>(to.first + row * to.width) = x;
    }
}

template <class T, int V, int TAPS>
__device__ void forward(const T* x, const float* weight, const float* bias, const T* state, const Parts<T>& parts,
                        T* final_state, int batch, int steps, int columns, int taps, int run) {
    const int width = parts.end[2];
    constexpr int U = 4;  // steps on their way
    __shared__ Weights<V, TAPS> weights;
    const Part part = part_of<V>(batch, steps, width, run);
    const T* from = x + ((long long)part.b * steps + part.t0) * columns + part.c;
    Packed<T, V> before[TAPS - 1], next[U];
    const auto fetch_steps = [&](int t) {
#pragma unroll
        for (int u = 0; u < U; u++, from += columns)
            if (t + u < part.t1) next[u] = fetch<V>(from);
    };
    if (part.inside) {
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
            before[j] = input<V>(x, state, part, part.t0 - TAPS + 1 + j, steps, columns, width, taps);
        fetch_steps(part.t0);
    }
    weights.load(weight, bias, width, taps);
    __syncthreads();
    const Rows<T> y = parts.of(part.c);
    if (!part.inside) {
        if (part.c < columns && part.b < batch) copy_steps<V, T>(part, steps, {x + part.c, columns}, y);
        return;
    }

    float w[TAPS][V], b[V], in[TAPS - 1 + U][V];
    weights.take(w, b);
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) before[j].unpack(in[j]);
    T* to = y.first + ((long long)part.b * steps + part.t0) * y.width;
    for (int t = part.t0; t < part.t1; t += U) {
        Packed<T, V> now[U];
#pragma unroll
        for (int u = 0; u < U; u++) now[u] = next[u];
        fetch_steps(t + U);
#pragma unroll
        for (int u = 0; u < U; u++, to += y.width) {
            now[u].unpack(in[TAPS - 1 + u]);
            float out[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                float a = b[v];
#pragma unroll
                for (int j = 0; j < TAPS; j++) a = fmaf(w[j][v], in[u + j][v], a);
                out[v] = a * fast_sigmoid(a);
            }
            if (t + u < part.t1) store_vec<V>(to, out);
        }
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
#pragma unroll
            for (int v = 0; v < V; v++) in[j][v] = in[U + j][v];
    }
    if (part.t1 == steps) {
        for (int i = 0; i < taps - 1; i++) {
            float last[V];
            input<V>(x, state, part, steps - taps + 1 + i, steps, columns, width, taps).unpack(last);
            store_vec<V>(final_state + ((long long)part.b * (taps - 1) + i) * width + part.c, last);
        }
    }
}

// The step of da runs TAPS-1 ahead of that of dx.
template <class T, int V, int TAPS>
__device__ void backward(const T* x, const float* weight, const float* bias, const T* state,
                         const Parts<const T>& parts, const T* dfinal, T* dx, T* dstate, float* partial, int batch,
                         int steps, int columns, int taps, int run) {
    constexpr int U = 4;
    const int width = parts.end[2];
    __shared__ union {
        Weights<V, TAPS> weights;
        float sums[WARPS][TAPS + 1][WARP][V];
    } shared;
    const Part part = part_of<V>(batch, steps, width, run);
    const long long row0 = (long long)part.b * steps * columns + part.c;
    const Rows<const T> dy = parts.of(part.c);
    const T* from_x = x + row0 + (long long)part.t0 * columns;
    const T* from_dy = dy.first + ((long long)part.b * steps + part.t0) * dy.width;
    Packed<T, V> before[TAPS - 1], next_x[U], next_dy[U];
    const auto fetch_steps = [&](int t) {
#pragma unroll
        for (int u = 0; u < U; u++, from_x += columns, from_dy += dy.width)
            if (t + u < min(part.t1 + TAPS - 1, steps)) next_x[u] = fetch<V>(from_x), next_dy[u] = fetch<V>(from_dy);
    };
    if (part.inside) {
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
            before[j] = input<V>(x, state, part, part.t0 - TAPS + 1 + j, steps, columns, width, taps);
        fetch_steps(part.t0);
    }
    shared.weights.load(weight, bias, width, taps);
    __syncthreads();

    float w[TAPS][V], b[V], dw[TAPS][V], db[V];
    shared.weights.take(w, b);
    __syncthreads();  // the weights make room for the sums
#pragma unroll
    for (int v = 0; v < V; v++) {
        db[v] = 0.f;
#pragma unroll
        for (int j = 0; j < TAPS; j++) dw[j][v] = 0.f;
    }
    if (part.inside) {
        float in[TAPS - 1 + U][V], da[TAPS - 1 + U][V];
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++) {
            before[j].unpack(in[j]);
#pragma unroll
            for (int v = 0; v < V; v++) da[j][v] = 0.f;
        }
        T* to = dx + row0 + (long long)(part.t0 - TAPS + 1) * columns;
        // U steps of da from t on, some of them not the run's own where `tail`.
        const auto go = [&](int t, auto tail) {
            Packed<T, V> now_x[U], now_dy[U];
#pragma unroll
            for (int u = 0; u < U; u++) now_x[u] = next_x[u], now_dy[u] = next_dy[u];
            fetch_steps(t + U);
#pragma unroll
            for (int u = 0; u < U; u++, to += columns) {
                float g[V];
                now_x[u].unpack(in[TAPS - 1 + u]);
                now_dy[u].unpack(g);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float a = b[v];
#pragma unroll
                    for (int j = 0; j < TAPS; j++) a = fmaf(w[j][v], in[u + j][v], a);
                    const float s = fast_sigmoid(a);
                    float d = g[v] * (s * (1.f + a * (1.f - s))), mine;
                    if constexpr (tail.value) {
                        if (t + u >= steps) d = 0.f;
                        mine = t + u < part.t1 ? d : 0.f;
                    } else {
                        mine = d;
                    }
                    da[TAPS - 1 + u][v] = d;
                    db[v] += mine;
#pragma unroll
                    for (int j = 0; j < TAPS; j++) {
                        // What no step has stands in `in` beyond the end: it must not meet a factor of 0.
                        if (!tail.value || t + u < part.t1) dw[j][v] = fmaf(mine, in[u + j][v], dw[j][v]);
                    }
                }
                // The gradient of the input of step s, s < 0 being the state's: it reached the steps s..s+W-1.
                const int s = t + u - TAPS + 1;
                if (tail.value && s >= part.t1) continue;
                float out[V];
#pragma unroll
                for (int v = 0; v < V; v++) {
                    out[v] = w[0][v] * da[TAPS - 1 + u][v];
#pragma unroll
                    for (int j = 1; j < TAPS; j++) out[v] = fmaf(w[j][v], da[TAPS - 1 + u - j][v], out[v]);
                }
                // Step s is one of the last W-1 inputs: it went to the final state too.
                if (tail.value && dfinal != nullptr && s >= steps - taps + 1) {
                    float last[V];
                    load_vec<V>(dfinal + ((long long)part.b * (taps - 1) + s - steps + taps - 1) * width + part.c,
                                last);
#pragma unroll
                    for (int v = 0; v < V; v++) out[v] += last[v];
                }
                if (s >= part.t0)
                    store_vec<V>(to, out);
                else if (s < 0 && s + taps > 0 && dstate != nullptr && part.t0 == 0)
                    store_vec<V>(dstate + ((long long)part.b * (taps - 1) + s + taps - 1) * width + part.c, out);
            }
#pragma unroll
            for (int j = 0; j < TAPS - 1; j++)
#pragma unroll
                for (int v = 0; v < V; v++) {
                    in[j][v] = in[U + j][v];
                    da[j][v] = da[U + j][v];
                }
        };
        int t = part.t0;
        for (; t + U <= part.t1; t += U) go(t, Constant<false>());
        for (; t < part.t1 + TAPS - 1; t += U) go(t, Constant<true>());
    } else if (part.c < columns && part.b < batch) {
        copy_steps<V, T>(part, steps, dy, {dx + part.c, columns});
    }

    // Sum over the block's runs.
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) shared.sums[warp_id()][j][lane_id()][v] = dw[j][v];
        shared.sums[warp_id()][TAPS][lane_id()][v] = db[v];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (taps + 1) * WARP * V; i += blockDim.x) {
        const int row = i / (WARP * V), column = i % (WARP * V);
        const int c = blockIdx.x * WARP * V + column;
        if (c >= width) continue;
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) sum += shared.sums[k][TAPS - taps + row][column / V][column % V];
        partial[((long long)blockIdx.y * (taps + 1) + row) * width + c] = sum;
    }
}

}  // namespace

// Grid of both: (ceil(columns / 32 V), ceil(B ceil(T / run) / 4)), block 128. w4 is for W <= 4, w8 for W <= 8; W = 1 has
// no states. `partial` has grid.y slabs.
#define FORWARD(NAME, T, V, TAPS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) causal_conv1d_forward_##NAME(                                 \
        const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,                  \
        const T* __restrict__ state, T* y0, T* y1, T* y2, T* y3, T* y4, T* y5, T* __restrict__ final_state,         \
        int end0, int end1, int end2, int end3, int end4, int end5, int batch, int steps, int columns, int taps,    \
        int run) {                                                                                                  \
        const Parts<T> y = {{y0, y1, y2, y3, y4, y5}, {end0, end1, end2, end3, end4, end5}};                        \
        forward<T, V, TAPS>(x, weight, bias, state, y, final_state, batch, steps, columns, taps, run);              \
    }
#define BACKWARD(NAME, T, V, TAPS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, sizeof(T) == 4 ? 3 : 4) causal_conv1d_backward_##NAME(        \
        const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,                  \
        const T* __restrict__ state, const T* dy0, const T* dy1, const T* dy2, const T* dy3, const T* dy4,          \
        const T* dy5, const T* __restrict__ dfinal, T* __restrict__ dx, T* __restrict__ dstate,                     \
        float* __restrict__ partial, int end0, int end1, int end2, int end3, int end4, int end5, int batch,         \
        int steps, int columns, int taps, int run) {                                                                \
        const Parts<const T> dy = {{dy0, dy1, dy2, dy3, dy4, dy5}, {end0, end1, end2, end3, end4, end5}};           \
        backward<T, V, TAPS>(x, weight, bias, state, dy, dfinal, dx, dstate, partial, batch, steps, columns, taps,  \
                             run);                                                                                  \
    }
#define BOTH(NAME, T, V, TAPS)  \
    FORWARD(NAME, T, V, TAPS)   \
    BACKWARD(NAME, T, V, TAPS)
BOTH(w4_v1_f32, float, 1, 4)
BOTH(w4_v1_bf16, bf16, 1, 4)
BOTH(w4_v4_f32, float, 4, 4)
BOTH(w4_v4_bf16, bf16, 4, 4)
BOTH(w8_v1_f32, float, 1, 8)
BOTH(w8_v1_bf16, bf16, 1, 8)

// dw [D, W] and dbias [D] from the sums of the slabs; null: not wanted; added to what is there where `add` has bit 0 (dw)
// or bit 1 (dbias). Grid ceil(D (W + 1) / 32), block 1024: a lane has a column, a warp every 32nd slab.
extern "C" __global__ void __launch_bounds__(1024) causal_conv1d_sums(const float* __restrict__ partial,
                                                                       float* __restrict__ dweight,
                                                                       float* __restrict__ dbias, int slabs, int width,
                                                                       int taps, int add) {
    __shared__ float sums[WARP][WARP + 1];
    const int columns = width * (taps + 1), column = blockIdx.x * WARP + lane_id();
    float sum = 0.f;
    if (column < columns) {
#pragma unroll 4
        for (int slab = warp_id(); slab < slabs; slab += WARP) sum += partial[(long long)slab * columns + column];
    }
    sums[warp_id()][lane_id()] = sum;
    __syncthreads();
    if (warp_id() != 0 || column >= columns) return;
    sum = 0.f;
    for (int i = 0; i < WARP; i++) sum += sums[i][lane_id()];
    const int c = column % width, tap = column / width;
    float* out = tap < taps ? dweight : dbias;
    if (out == nullptr) return;
    out += tap < taps ? (long long)c * taps + tap : c;
    *out = add >> (tap < taps ? 0 : 1) & 1 ? *out + sum : sum;
}
