// RMS norm of queries or keys per head, then rotation by position.
//
//   x [B, T, H, D] with D even and at most 128, w [D] f32, pos = offset + t
//   r = 1 / (√(mean x²) + 1e-8),  n = w ⊙ x · r,  θᵢ = pos · base^(−2i/D) for i < D/2
//   yᵢ = nᵢ cos θ + nᵢ₊ sin θ,  yᵢ₊ = nᵢ₊ cos θ − nᵢ sin θ        with i₊ = i + D/2
//
// Backward: g = dy turned back; dw = Σ g ⊙ x r; dx = r (g ⊙ w) − x · c · ((g ⊙ w)·x), c = r² / (D √(mean x²)), 0 at x = 0.
//
// Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021; the sign of the sine is
// that of the authors' released code, the opposite of the usual one.
//
// Lanes of a power of two, four pairs a lane, have one token and walk over its heads, so that an angle serves them all.
// Angles are in turns and in double until only their fraction is left: exact enough for any position.
//
// qk_norm_rope_forward_<f32|bf16>, qk_norm_rope_backward_<f32|bf16>: any grid, block 256, shared 0; the backward pass
// writes partial sums of dw [grid, D], which columns_final adds up.
// rope_<f32|bf16>: the rotation alone, with the usual sign of the sine; any grid, block 256.
#include "common.cuh"

#ifdef SB_EMULATE
inline void sincospif(float x, float* sin, float* cos) { sincosf((float)(x * 3.141592653589793), sin, cos); }
#endif

constexpr int PAIRS = 4;   // of a lane
constexpr int HALF = 64;   // most pairs of a head
constexpr int BLOCK = 256;
constexpr int HEADS = 2;   // copied at a time in the forward pass
constexpr int FORWARD_BLOCKS = 4, BACKWARD_BLOCKS = 3;  // of a multiprocessor

// The cosines or sines of a lane's pairs.
using Angles = float[PAIRS];

// The first and the second halves of a lane's pairs.
struct Pairs {
    float a[PAIRS], b[PAIRS];
};

template <class T>
__device__ __forceinline__ void store_pairs(T* row, int at, int half, bool vector, const Pairs& x) {
    if (vector && at < half) {
        store_vec<PAIRS>(row + at, x.a);
        store_vec<PAIRS>(row + half + at, x.b);
    } else {
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            if (at + i < half) row[at + i] = from_f<T>(x.a[i]), row[half + at + i] = from_f<T>(x.b[i]);
    }
}

// ROWS rows, copied to shared memory while those before are worked on: a thread asks for what it copied alone, so that
// no barrier is needed.
template <class T, int ROWS>
struct Ahead {
    struct alignas(16) Memory { T halves[2][ROWS][2][BLOCK][PAIRS]; };
    Memory& memory;
    int at, half, turn = 0;
    bool vector;

    __device__ __forceinline__ Ahead(Memory& memory, int at, int half, bool vector)
        : memory(memory), at(at), half(half), vector(vector) {}

    __device__ __forceinline__ T* slot(int row, int b) const { return memory.halves[turn][row][b][threadIdx.x]; }
    // Starts the copy of this lane's pairs of a row.
    __device__ __forceinline__ void start(int i, const T* row) const {
#pragma unroll
        for (int b = 0; b < 2; b++) {
            T* to = slot(i, b);
            const T* from = row + b * half + at;
            if (vector && at < half) {
                cp_async<PAIRS * sizeof(T)>(to, from);
            } else {
#pragma unroll
                for (int j = 0; j < PAIRS; j++) to[j] = at + j < half ? from[j] : from_f<T>(0.f);
            }
        }
    }
    // Ends a group of copies; `get` then gives the group before it.
    __device__ __forceinline__ void end() {
        cp_async_commit();
        turn ^= 1;
    }
    __device__ __forceinline__ Pairs get(int i) const {
        Pairs x;
        load_vec<PAIRS>(slot(i, 0), x.a);
        load_vec<PAIRS>(slot(i, 1), x.b);
        return x;
    }
};

// base^(−2i/D) / 2π of every pair; `log2_base` are the bits of a double. A barrier follows.
__device__ __forceinline__ void fill_turns(double* turns, int half, long long log2_base) {
    for (int i = threadIdx.x; i < half; i += blockDim.x)
        turns[i] = exp2(-(double)i / half * __longlong_as_double(log2_base)) * 0.15915494309189535;
    __syncthreads();
}

// The weights in shared memory, the halves HALF apart; zeros behind them. For a barrier to come.
__device__ __forceinline__ void fill_weights(float* weights, const float* w, int half) {
    for (int i = threadIdx.x; i < 2 * HALF; i += blockDim.x)
        weights[i] = i % HALF < half ? w[i / HALF * half + i % HALF] : 0.f;
}
__device__ __forceinline__ Pairs own_weights(const float* weights, int at) {
    Pairs w;
    load_vec<PAIRS>(weights + at, w.a);
    load_vec<PAIRS>(weights + HALF + at, w.b);
    return w;
}

// In 32 bits, where that is enough: the remainder of a long division takes as long as a load.
__device__ __forceinline__ int step_of(long long token, int steps) {
    return token >> 32 ? (int)(token % steps) : (int)((unsigned)token % (unsigned)steps);
}

// cos and sin of a lane's pairs at one position.
__device__ __forceinline__ void angles(const double* turns, int at, int half, int position, Angles& cos, Angles& sin) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const double turn = at + i < half ? position * turns[at + i] : 0.0;
        sincospif(2.f * (float)(turn - rint(turn)), &sin[i], &cos[i]);
    }
}

__device__ __forceinline__ float lanes_sum(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL, x, offset);
    return x;
}

// How lanes divide the work: `lanes` to a token; `tokens` of this group's are `stride` apart.
struct Work {
    int lanes, at;
    long long first, stride;
    __device__ __forceinline__ explicit Work(int half) {
        lanes = 1;
        while (lanes * PAIRS < half) lanes *= 2;
        const int groups = BLOCK / lanes;
        at = threadIdx.x % lanes * PAIRS;
        first = (long long)blockIdx.x * groups + threadIdx.x / lanes;
        stride = (long long)gridDim.x * groups;
    }
};

template <class T>
__device__ __forceinline__ bool vectors(const T* x, int half) {
    return half % PAIRS == 0 && reinterpret_cast<size_t>(x) % (PAIRS * sizeof(T)) == 0;
}

// f(head, its pairs in each of the arrays, cos, sin, past) for the heads, numbered through all tokens, of this group's
// tokens, N of which are copied at a time; `past`: behind the last token, where only the lanes' common work must be done.
// prepare() is called while the first copies are on their way and ends with a barrier that `turns` is there after.
template <int N, class T, int ARRAYS, class Prepare, class F>
__device__ __forceinline__ void for_heads(const T* const (&arrays)[ARRAYS], bool vector, const Work& work,
                                          const double* turns, long long tokens, int steps, int heads, int half,
                                          int offset, Prepare prepare, F f) {
    __shared__ typename Ahead<T, N * ARRAYS>::Memory memory;
    Ahead<T, N * ARRAYS> ahead(memory, work.at, half, vector);
    // The heads from h0 on of a token; behind the last token there are none.
    const auto start = [&](long long token, int h0) {
#pragma unroll
        for (int h = 0; h < N; h++) {
            if (token >= tokens || h0 + h >= heads) continue;
#pragma unroll
            for (int a = 0; a < ARRAYS; a++)
                ahead.start(h * ARRAYS + a, arrays[a] + (token * heads + h0 + h) * 2 * half);
        }
        ahead.end();
    };
    // All lanes of a warp go round equally often: a warp has tokens side by side, some behind the last.
    const int own = threadIdx.x % WARP / work.lanes;
    start(work.first, 0);
    prepare();
    for (long long base = work.first - own; base < tokens; base += work.stride) {
        const long long token = base + own;
        const bool past = token >= tokens;
        Angles cos, sin;
        angles(turns, work.at, half, offset + (past ? 0 : step_of(token, steps)), cos, sin);
        for (int h0 = 0; h0 < heads; h0 += N) {
            if (h0 + N < heads) start(token, h0 + N);
            else start(token + work.stride, 0);
            cp_async_wait<1>();
#pragma unroll
            for (int h = 0; h < N; h++) {
                if (h0 + h >= heads) break;
                Pairs in[ARRAYS];
#pragma unroll
                for (int a = 0; a < ARRAYS; a++) in[a] = ahead.get(h * ARRAYS + a);
                f(token * heads + h0 + h, in, cos, sin, past);
            }
        }
    }
    cp_async_wait<0>();
}

template <class T>
__device__ __forceinline__ void forward(const T* __restrict__ x, const float* __restrict__ w, T* __restrict__ y,
                                        long long tokens, int steps, int heads, int half, int offset, long long log2_base) {
    __shared__ double turns[HALF];
    __shared__ __align__(16) float weights[2 * HALF];
    const Work work(half);
    const int at = work.at, dim = 2 * half;
    const bool vector = vectors(x, half) && vectors(y, half);
    const auto prepare = [&] {
        fill_weights(weights, w, half);
        fill_turns(turns, half, log2_base);
    };
    for_heads<HEADS>({x}, vector, work, turns, tokens, steps, heads, half, offset, prepare,
                     [&](long long head, const Pairs(&row)[1], const Angles& cos, const Angles& sin, bool past) {
        const Pairs in = row[0], weight = own_weights(weights, at);
        float square = 0.f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) square = fmaf(in.a[i], in.a[i], fmaf(in.b[i], in.b[i], square));
        const float r = 1.f / (sqrtf(lanes_sum(square, work.lanes) / dim) + 1e-8f);
        Pairs out;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float a = in.a[i] * r * weight.a[i], b = in.b[i] * r * weight.b[i];
            out.a[i] = fmaf(a, cos[i], b * sin[i]);
            out.b[i] = fmaf(b, cos[i], -a * sin[i]);
        }
        if (!past) store_pairs(y + head * dim, at, half, vector, out);
    });
}

template <class T>
__device__ __forceinline__ void backward(const T* __restrict__ x, const float* __restrict__ w, const T* __restrict__ dy,
                                         T* __restrict__ dx, float* __restrict__ partial, long long tokens, int steps,
                                         int heads, int half, int offset, long long log2_base) {
    __shared__ double turns[HALF];
    __shared__ __align__(16) float weights[2 * HALF];
    __shared__ float sums[BLOCK / WARP][2 * HALF];
    const Work work(half);
    const int at = work.at, dim = 2 * half;
    const bool vector = vectors(x, half) && vectors(dy, half) && vectors(dx, half);
    const auto prepare = [&] {
        fill_weights(weights, w, half);
        fill_turns(turns, half, log2_base);
    };
    Pairs dw = {};
    for_heads<1>({x, dy}, vector, work, turns, tokens, steps, heads, half, offset, prepare,
                 [&](long long head, const Pairs(&rows)[2], const Angles& cos, const Angles& sin, bool past) {
        const Pairs in = rows[0], grad = rows[1], weight = own_weights(weights, at);
        Pairs g;
        float square = 0.f, along = 0.f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            // The transpose of a rotation turns back.
            g.a[i] = fmaf(grad.a[i], cos[i], -grad.b[i] * sin[i]);
            g.b[i] = fmaf(grad.b[i], cos[i], grad.a[i] * sin[i]);
            square = fmaf(in.a[i], in.a[i], fmaf(in.b[i], in.b[i], square));
            along = fmaf(g.a[i] * weight.a[i], in.a[i], fmaf(g.b[i] * weight.b[i], in.b[i], along));
        }
        square = lanes_sum(square, work.lanes), along = lanes_sum(along, work.lanes);
        if (past) return;
        const float root = sqrtf(square / dim), r = 1.f / (root + 1e-8f);
        const float back = root > 0.f ? r * (r / (dim * root)) * along : 0.f;
        Pairs out;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            out.a[i] = fmaf(r, g.a[i] * weight.a[i], -in.a[i] * back);
            out.b[i] = fmaf(r, g.b[i] * weight.b[i], -in.b[i] * back);
            dw.a[i] = fmaf(g.a[i], in.a[i] * r, dw.a[i]);
            dw.b[i] = fmaf(g.b[i], in.b[i] * r, dw.b[i]);
        }
        store_pairs(dx + head * dim, at, half, vector, out);
    });
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        for (int offset = WARP / 2; offset >= work.lanes; offset /= 2) {
            dw.a[i] += __shfl_xor_sync(FULL, dw.a[i], offset);
            dw.b[i] += __shfl_xor_sync(FULL, dw.b[i], offset);
        }
        if (lane_id() < work.lanes && at + i < half) {
            sums[warp_id()][at + i] = dw.a[i];
            sums[warp_id()][half + at + i] = dw.b[i];
        }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += BLOCK) {
        float total = 0.f;
#pragma unroll
        for (int warp = 0; warp < BLOCK / WARP; warp++) total += sums[warp][d];
        partial[(long long)blockIdx.x * dim + d] = total;
    }
}

// The rotation alone, with the usual sign; `sign` −1 turns back.
template <class T>
__device__ __forceinline__ void rope(const T* __restrict__ x, T* __restrict__ y, long long tokens, int steps, int heads,
                                     int half, int offset, long long log2_base, float sign) {
    __shared__ double turns[HALF];
    const Work work(half);
    const bool vector = vectors(x, half) && vectors(y, half);
    const auto prepare = [&] { fill_turns(turns, half, log2_base); };
    for_heads<HEADS>({x}, vector, work, turns, tokens, steps, heads, half, offset, prepare,
                     [&](long long head, const Pairs(&row)[1], const Angles& cos, const Angles& sin, bool past) {
        const Pairs in = row[0];
        Pairs out;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            out.a[i] = fmaf(in.a[i], cos[i], -sign * in.b[i] * sin[i]);
            out.b[i] = fmaf(in.b[i], cos[i], sign * in.a[i] * sin[i]);
        }
        if (!past) store_pairs(y + head * 2 * half, work.at, half, vector, out);
    });
}

#define ENTRIES(T, NAME)                                                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK, FORWARD_BLOCKS) rope_##NAME(                            \
        const T* x, T* y, long long tokens, int steps, int heads, int half, int offset, long long log2_base,    \
        float sign) {                                                                                           \
        rope<T>(x, y, tokens, steps, heads, half, offset, log2_base, sign);                                     \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(BLOCK, FORWARD_BLOCKS) qk_norm_rope_forward_##NAME(            \
        const T* x, const float* w, T* y, long long tokens, int steps, int heads, int half, int offset,         \
        long long log2_base) {                                                                                  \
        forward<T>(x, w, y, tokens, steps, heads, half, offset, log2_base);                                     \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(BLOCK, BACKWARD_BLOCKS) qk_norm_rope_backward_##NAME(          \
        const T* x, const float* w, const T* dy, T* dx, float* partial, long long tokens, int steps, int heads, \
        int half, int offset, long long log2_base) {                                                            \
        backward<T>(x, w, dy, dx, partial, tokens, steps, heads, half, offset, log2_base);                      \
    }
ENTRIES(float, f32)
ENTRIES(bf16, bf16)
