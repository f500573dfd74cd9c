// The gates of mLSTM, made so that its state is gated linear attention whose decays and writes are at most 1, and
// what is read of that state (src/ops/mlstm). Of one head, with m the running maximum that keeps the exponential
// input gate in range:
//
//   m_t = max(log f_t + m_{t-1}, i_t)
//   write = exp(i - m) k,  decay = log f + m_{t-1} - m_t,  floor = exp(-m)
//   h = num / max(|den|, floor)
//
// What is read does not depend on m, so m counts as a constant: d i = Σ write d_write, dk = exp(i - m) d_write,
// d log f = Σ d_decay; d num = dh / D, d den = -sign(den) Σ dh num / D² where |den| > floor, for the divisor D.
// Source: Beck et al., "xLSTM", 2024, equations 15, 19 to 27.
//
// k, i, write, num, den, h in T, everything else in f32; k, write, decay [B, T, H, K], i, log_f, m, floor, den
// [B, T, H], num, h [B, T, H, V]. ones [B, T, H], in T, is filled with ones: the values whose memory den is.
// scan: a warp for each sequence and head, 32 steps at a time; grid B H / 8. Others: a warp for each token and head, in
// turn; any one-dimensional grid. Block: 256 threads.
#include "common.cuh"

constexpr int BLOCK = 256, BLOCK_WARPS = BLOCK / WARP;

// f(row) for the rows of this warp.
template <class F>
__device__ __forceinline__ void for_rows(int rows, F f) {
    for (int row = blockIdx.x * BLOCK_WARPS + warp_id(); row < rows; row += gridDim.x * BLOCK_WARPS) f(row);
}

// m and the last of them; start [B, H] or null for zeros.
template <class T>
__device__ __forceinline__ void scan(const T* i, const float* log_f, const float* start, float* m, float* last,
                                     int sequences, int steps, int heads) {
    const int head = blockIdx.x * BLOCK_WARPS + warp_id(), lane = lane_id();
    if (head >= sequences) return;
    const long long base = (long long)(head / heads) * steps * heads + head % heads;
    float carry = start ? start[head] : 0.f;
    for (int t = 0; t < steps; t += WARP) {
        const long long at = base + (long long)(t + lane) * heads;
        const bool live = t + lane < steps;
        // The sum of log f up to each step, and the largest i, seen from the tile's start.
        float sum = live ? log_f[at] : 0.f;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const float before = __shfl_up_sync(FULL, sum, d);
            if (lane >= d) sum += before;
        }
        float most = live ? to_f(i[at]) - sum : -INFINITY;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const float before = __shfl_up_sync(FULL, most, d);
            if (lane >= d) most = fmaxf(most, before);
        }
        const float own = sum + fmaxf(carry, most);
        if (live) m[at] = own;
        carry = __shfl_sync(FULL, own, min(WARP, steps - t) - 1);
    }
    if (lane == 0) last[head] = carry;
}

// m of the step before a row's.
__device__ __forceinline__ float before(const float* m, const float* start, int row, int steps, int heads) {
    const int token = row / heads;
    if (token % steps) return m[row - heads];
    return start ? start[token / steps * heads + row % heads] : 0.f;
}

template <class T>
__device__ __forceinline__ void gates_forward(const T* k, const T* i, const float* log_f, const float* start,
                                              const float* m, T* write, float* decay, float* floor, T* ones, int rows,
                                              int steps, int heads, int key) {
    for_rows(rows, [&](int row) {
        const float own = m[row], strength = exp2_fast(fminf(to_f(i[row]) - own, 0.f) * LOG2E);
        // Rounding alone makes it positive.
        const float kept = fminf(log_f[row] + before(m, start, row, steps, heads) - own, 0.f);
        for (int c = lane_id(); c < key; c += WARP) {
            const long long at = (long long)row * key + c;
            write[at] = from_f<T>(strength * to_f(k[at]));
            decay[at] = kept;
        }
        if (lane_id() == 0) {
            floor[row] = expf(-own);
            ones[row] = from_f<T>(1.f);
        }
    });
}

template <class T>
__device__ __forceinline__ void gates_backward(const T* k, const T* i, const float* m, const T* d_write,
                                               const float* d_decay, T* dk, T* di, float* d_log, int rows, int key) {
    for_rows(rows, [&](int row) {
        const float strength = exp2_fast(fminf(to_f(i[row]) - m[row], 0.f) * LOG2E);
        float of_i = 0.f, of_log = 0.f;
        for (int c = lane_id(); c < key; c += WARP) {
            const long long at = (long long)row * key + c;
            const float d = strength * to_f(d_write[at]);
            dk[at] = from_f<T>(d);
            of_i += d * to_f(k[at]);
            of_log += d_decay[at];
        }
        of_i = warp_sum(of_i);
        of_log = warp_sum(of_log);
        if (lane_id() == 0) {
            di[row] = from_f<T>(of_i);
            d_log[row] = of_log;
        }
    });
}

template <class T>
__device__ __forceinline__ void read_forward(const T* num, const T* den, const float* floor, T* h, int rows,
                                             int value) {
    for_rows(rows, [&](int row) {
        const float share = 1.f / fmaxf(fabsf(to_f(den[row])), floor[row]);
        for (int c = lane_id(); c < value; c += WARP) {
            const long long at = (long long)row * value + c;
            h[at] = from_f<T>(share * to_f(num[at]));
        }
    });
}

template <class T>
__device__ __forceinline__ void read_backward(const T* num, const T* den, const float* floor, const T* dh, T* d_num,
                                              T* d_den, int rows, int value) {
    for_rows(rows, [&](int row) {
        const float of = to_f(den[row]), share = 1.f / fmaxf(fabsf(of), floor[row]);
        float sum = 0.f;
        for (int c = lane_id(); c < value; c += WARP) {
            const long long at = (long long)row * value + c;
            const float d = share * to_f(dh[at]);
            d_num[at] = from_f<T>(d);
            sum += d * to_f(num[at]);
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) d_den[row] = from_f<T>(fabsf(of) > floor[row] ? copysignf(share, -of) * sum : 0.f);
    });
}

#define KERNELS(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(BLOCK) mlstm_scan_##SUFFIX(                                          \
        const T* i, const float* log_f, const float* start, float* m, float* last, int sequences, int steps,          \
        int heads) {                                                                                                  \
        scan<T>(i, log_f, start, m, last, sequences, steps, heads);                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK) mlstm_gates_forward_##SUFFIX(                                 \
        const T* k, const T* i, const float* log_f, const float* start, const float* m, T* write, float* decay,       \
        float* floor, T* ones, int rows, int steps, int heads, int key) {                                             \
        gates_forward<T>(k, i, log_f, start, m, write, decay, floor, ones, rows, steps, heads, key);                  \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK) mlstm_gates_backward_##SUFFIX(                                \
        const T* k, const T* i, const float* m, const T* d_write, const float* d_decay, T* dk, T* di, float* d_log,   \
        int rows, int key) {                                                                                          \
        gates_backward<T>(k, i, m, d_write, d_decay, dk, di, d_log, rows, key);                                       \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                               \
        mlstm_read_forward_##SUFFIX(const T* num, const T* den, const float* floor, T* h, int rows, int value) {      \
        read_forward<T>(num, den, floor, h, rows, value);                                                             \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK) mlstm_read_backward_##SUFFIX(                                 \
        const T* num, const T* den, const float* floor, const T* dh, T* d_num, T* d_den, int rows, int value) {       \
        read_backward<T>(num, den, floor, dh, d_num, d_den, rows, value);                                             \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
