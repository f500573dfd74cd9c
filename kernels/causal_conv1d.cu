// Depthwise causal convolution along time, then SiLU.
//
//   x [B, T, D], weight [D, W], bias [D] or none, state [B, W-1, D] or none (the inputs before the first step; zeros)
//   a_t = bias + sum_j w_j x_{t-W+1+j},  y_t = a_t sigmoid(a_t),  final [B, W-1, D]: the last W-1 inputs
//
// Gradients, with da_t = dy_t (a_t sigmoid(a_t))' and da = 0 outside 0 <= t < T:
//   dx_s = sum_j w_j da_{s+W-1-j} (+ dfinal),  the same for the steps of the state,
//   dw_j = sum_{b,t} da_t x_{t-W+1+j},  dbias = sum_{b,t} da_t
//
// Bound by memory: a thread owns V neighbouring channels (16 bytes of x where D allows) and `run` steps of one batch
// entry, keeps the last inputs in registers and reads each x once, but for the W-1 steps that runs share. The backward
// pass computes a again. Sums for the weights: in registers over a run, in the block over its warps, in `partial`
// [slabs, W+1, D] over the blocks, then in order by causal_conv1d_sums.
#include "common.cuh"

namespace {

// The logistic function without the slow exact division. exp(-x) may become infinite: then this is 0.
__device__ __forceinline__ float fast_sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// Which channels and steps a thread works on.
struct Part {
    int c;       // the first of V channels
    int b;       // batch entry
    int t0, t1;  // steps
};

// Row `t` of the inputs of a batch entry, channels c..c+V; t from -(W-1) on, t < 0 from the state. Zeros before that.
template <int V, class T>
__device__ __forceinline__ void load_input(const T* x, const T* state, const Part& part, int t, int steps, int width,
                                           int taps, float (&out)[V]) {
    if (t >= 0) {
        load_vec<V>(x + ((long long)part.b * steps + t) * width + part.c, out);
    } else if (state != nullptr && t + taps > 0) {
        load_vec<V>(state + ((long long)part.b * (taps - 1) + t + taps - 1) * width + part.c, out);
    } else {
#pragma unroll
        for (int v = 0; v < V; v++) out[v] = 0.f;
    }
}

// The taps of V channels, the current step's in the last place, zeros in front of fewer than TAPS; and the bias.
template <int V, int TAPS>
__device__ __forceinline__ void load_weights(const float* weight, const float* bias, int c, int taps,
                                             float (&w)[TAPS][V], float (&b)[V]) {
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            const int tap = j - (TAPS - taps);
            w[j][v] = tap >= 0 ? weight[(long long)(c + v) * taps + tap] : 0.f;
        }
        b[v] = bias != nullptr ? bias[c + v] : 0.f;
    }
}

// One thread for every V channels and `run` steps.
template <class T, int V, int TAPS>
__device__ void forward(const T* x, const float* weight, const float* bias, const T* state, T* y, T* final_state,
                        int batch, int steps, int width, int taps, int run) {
    constexpr int U = 4;  // steps loaded at a time
    const int vectors = width / V, runs = ceil_div(steps, run);
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)batch * runs * vectors) return;
    const int r = (int)(index / vectors);
    Part part;
    part.c = (int)(index % vectors) * V;
    part.b = r / runs;
    part.t0 = r % runs * run;
    part.t1 = min(part.t0 + run, steps);

    float w[TAPS][V], b[V], in[TAPS - 1 + U][V];
    load_weights<V, TAPS>(weight, bias, part.c, taps, w, b);
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) load_input<V>(x, state, part, part.t0 - TAPS + 1 + j, steps, width, taps, in[j]);
    for (int t = part.t0; t < part.t1; t += U) {
#pragma unroll
        for (int u = 0; u < U; u++)
            load_input<V>(x, state, part, min(t + u, part.t1 - 1), steps, width, taps, in[TAPS - 1 + u]);
#pragma unroll
        for (int u = 0; u < U; u++) {
            float out[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                float a = b[v];
#pragma unroll
                for (int j = 0; j < TAPS; j++) a = fmaf(w[j][v], in[u + j][v], a);
                out[v] = a * fast_sigmoid(a);
            }
            if (t + u < part.t1) store_vec<V>(y + ((long long)part.b * steps + t + u) * width + part.c, out);
        }
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
#pragma unroll
            for (int v = 0; v < V; v++) in[j][v] = in[U + j][v];
    }
    if (part.t1 == steps) {
        for (int i = 0; i < taps - 1; i++) {
            float last[V];
            load_input<V>(x, state, part, steps - taps + 1 + i, steps, width, taps, last);
            store_vec<V>(final_state + ((long long)part.b * (taps - 1) + i) * width + part.c, last);
        }
    }
}

constexpr int BACKWARD_WARPS = 4;

// A block owns 32 V channels (x) and as many runs as it has warps (y). The step of da runs TAPS-1 ahead of that of dx.
template <class T, int V, int TAPS>
__device__ void backward(const T* x, const float* weight, const float* bias, const T* state, const T* dy,
                         const T* dfinal, T* dx, T* dstate, float* partial, int batch, int steps, int width, int taps,
                         int run) {
    constexpr int U = 4;
    __shared__ float sums[BACKWARD_WARPS][TAPS + 1][WARP][V];
    const int runs = ceil_div(steps, run);
    const int r = blockIdx.y * BACKWARD_WARPS + warp_id();
    Part part;
    part.c = (blockIdx.x * WARP + lane_id()) * V;
    part.b = r / runs;
    part.t0 = r % runs * run;
    part.t1 = min(part.t0 + run, steps);
    const bool inside = part.c < width;

    float dw[TAPS][V], db[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
        db[v] = 0.f;
#pragma unroll
        for (int j = 0; j < TAPS; j++) dw[j][v] = 0.f;
    }
    if (inside && part.b < batch) {
        float w[TAPS][V], b[V], in[TAPS - 1 + U][V], da[TAPS - 1 + U][V];
        load_weights<V, TAPS>(weight, bias, part.c, taps, w, b);
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++) {
            load_input<V>(x, state, part, part.t0 - TAPS + 1 + j, steps, width, taps, in[j]);
#pragma unroll
            for (int v = 0; v < V; v++) da[j][v] = 0.f;
        }
        const int end = part.t1 + TAPS - 1;
        for (int t = part.t0; t < end; t += U) {
            float g[U][V];
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int s = min(t + u, steps - 1);
                load_input<V>(x, state, part, s, steps, width, taps, in[TAPS - 1 + u]);
                load_vec<V>(dy + ((long long)part.b * steps + s) * width + part.c, g[u]);
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                const bool exists = t + u < steps, own = t + u < part.t1;
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float a = b[v];
#pragma unroll
                    for (int j = 0; j < TAPS; j++) a = fmaf(w[j][v], in[u + j][v], a);
                    const float s = fast_sigmoid(a);
                    const float d = exists ? g[u][v] * (s * (1.f + a * (1.f - s))) : 0.f;
                    da[TAPS - 1 + u][v] = d;
                    const float mine = own ? d : 0.f;
                    db[v] += mine;
#pragma unroll
                    for (int j = 0; j < TAPS; j++) dw[j][v] = fmaf(mine, in[u + j][v], dw[j][v]);
                }
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                // The gradient of the input of step s, s < 0 being the state's: it reached the steps s..s+W-1.
                const int s = t + u - TAPS + 1;
                const bool of_state = s < 0 && s + taps > 0 && dstate != nullptr && part.t0 == 0;
                if (t + u < end && (s >= part.t0 || of_state)) {
                    float out[V];
#pragma unroll
                    for (int v = 0; v < V; v++) out[v] = 0.f;
                    // Step s is one of the last W-1 inputs: it went to the final state too.
                    if (dfinal != nullptr && s >= steps - taps + 1)
                        load_vec<V>(dfinal + ((long long)part.b * (taps - 1) + s - steps + taps - 1) * width + part.c,
                                    out);
#pragma unroll
                    for (int v = 0; v < V; v++)
#pragma unroll
                        for (int j = 0; j < TAPS; j++) out[v] = fmaf(w[j][v], da[TAPS - 1 + u - j][v], out[v]);
                    if (of_state)
                        store_vec<V>(dstate + ((long long)part.b * (taps - 1) + s + taps - 1) * width + part.c, out);
                    else
                        store_vec<V>(dx + ((long long)part.b * steps + s) * width + part.c, out);
                }
            }
#pragma unroll
            for (int j = 0; j < TAPS - 1; j++)
#pragma unroll
                for (int v = 0; v < V; v++) {
                    in[j][v] = in[U + j][v];
                    da[j][v] = da[U + j][v];
                }
        }
    }

    // Sum over the block's runs.
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) sums[warp_id()][j][lane_id()][v] = dw[j][v];
        sums[warp_id()][TAPS][lane_id()][v] = db[v];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (taps + 1) * WARP * V; i += blockDim.x) {
        const int row = i / (WARP * V), column = i % (WARP * V);
        const int c = blockIdx.x * WARP * V + column;
        if (c >= width) continue;
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < BACKWARD_WARPS; k++) sum += sums[k][TAPS - taps + row][column / V][column % V];
        partial[((long long)blockIdx.y * (taps + 1) + row) * width + c] = sum;
    }
}

}  // namespace

// Forward: grid ceil(B ceil(T / run) D / V / 128), block 128. V: 1, or 16 bytes where D is a multiple of them.
// T4 is for W <= 4, T8 for W <= 8; W = 1 has no states.
#define FORWARD(NAME, T, V, TAPS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) NAME(                                                         \
        const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,                  \
        const T* __restrict__ state, T* __restrict__ y, T* __restrict__ final_state, int batch, int steps,          \
        int width, int taps, int run) {                                                                             \
        forward<T, V, TAPS>(x, weight, bias, state, y, final_state, batch, steps, width, taps, run);                \
    }
FORWARD(causal_conv1d_forward_w4_v1_f32, float, 1, 4)
FORWARD(causal_conv1d_forward_w4_v1_bf16, bf16, 1, 4)
FORWARD(causal_conv1d_forward_w4_v4_f32, float, 4, 4)
FORWARD(causal_conv1d_forward_w4_v8_bf16, bf16, 8, 4)
FORWARD(causal_conv1d_forward_w8_v1_f32, float, 1, 8)
FORWARD(causal_conv1d_forward_w8_v1_bf16, bf16, 1, 8)

// Backward: grid (ceil(D / 32 V), ceil(B ceil(T / run) / 4)), block 128. `partial` has grid.y slabs.
#define BACKWARD(NAME, T, V, TAPS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 4) NAME(                                                         \
        const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,                  \
        const T* __restrict__ state, const T* __restrict__ dy, const T* __restrict__ dfinal, T* __restrict__ dx,    \
        T* __restrict__ dstate, float* __restrict__ partial, int batch, int steps, int width, int taps, int run) {  \
        backward<T, V, TAPS>(x, weight, bias, state, dy, dfinal, dx, dstate, partial, batch, steps, width, taps,    \
                             run);                                                                                  \
    }
BACKWARD(causal_conv1d_backward_w4_v1_f32, float, 1, 4)
BACKWARD(causal_conv1d_backward_w4_v1_bf16, bf16, 1, 4)
BACKWARD(causal_conv1d_backward_w4_v4_f32, float, 4, 4)
BACKWARD(causal_conv1d_backward_w4_v4_bf16, bf16, 4, 4)
BACKWARD(causal_conv1d_backward_w8_v1_f32, float, 1, 8)
BACKWARD(causal_conv1d_backward_w8_v1_bf16, bf16, 1, 8)

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
