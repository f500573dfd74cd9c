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
constexpr int HEADS = 2, AT_ONCE = 1; // loaded at a time, forward and backward

// The first and the second halves of a lane's pairs.
struct Pairs {
    float a[PAIRS], b[PAIRS];
};

template <class T>
__device__ __forceinline__ Pairs load_pairs(const T* row, int at, int half, bool vector) {
    Pairs x;
    if (vector && at < half) {
        load_vec<PAIRS>(row + at, x.a);
        load_vec<PAIRS>(row + half + at, x.b);
    } else {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            x.a[i] = at + i < half ? to_f(row[at + i]) : 0.f;
            x.b[i] = at + i < half ? to_f(row[half + at + i]) : 0.f;
        }
    }
    return x;
}
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

// base^(−2i/D) / 2π of every pair; `log2_base` are the bits of a double.
__device__ __forceinline__ void fill_turns(double* turns, int half, long long log2_base) {
    for (int i = threadIdx.x; i < half; i += blockDim.x)
        turns[i] = exp2(-(double)i / half * __longlong_as_double(log2_base)) * 0.15915494309189535;
    __syncthreads();
}

// In 32 bits, where that is enough: the remainder of a long division takes as long as a load.
__device__ __forceinline__ int step_of(long long token, int steps) {
    return token >> 32 ? (int)(token % steps) : (int)((unsigned)token % (unsigned)steps);
}

// cos and sin of a lane's pairs at one position.
__device__ __forceinline__ void angles(const double* turns, int at, int half, int position, float (&cos)[PAIRS],
                                       float (&sin)[PAIRS]) {
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

template <class T>
__device__ __forceinline__ void forward(const T* __restrict__ x, const float* __restrict__ w, T* __restrict__ y,
                                        long long tokens, int steps, int heads, int half, int offset, long long log2_base) {
    __shared__ double turns[HALF];
    fill_turns(turns, half, log2_base);
    const Work work(half);
    const int at = work.at, dim = 2 * half;
    const bool vector = vectors(x, half) && vectors(y, half);
    const Pairs weight = load_pairs(w, at, half, vectors(w, half));
    // All lanes of a warp go round equally often: a warp has tokens side by side, `past` ones are computed for nothing.
    for (long long base = work.first - threadIdx.x % WARP / work.lanes; base < tokens; base += work.stride) {
        const long long token = base + threadIdx.x % WARP / work.lanes;
        const bool past = token >= tokens;
        const long long row = past ? 0 : token * heads * dim;
        float cos[PAIRS], sin[PAIRS];
        angles(turns, at, half, offset + (past ? 0 : step_of(token, steps)), cos, sin);
        for (int h0 = 0; h0 < heads; h0 += HEADS) {
            Pairs in[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                if (h0 + h < heads) in[h] = load_pairs(x + row + (h0 + h) * dim, at, half, vector);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h0 + h >= heads) break;
                float square = 0.f;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) square = fmaf(in[h].a[i], in[h].a[i], fmaf(in[h].b[i], in[h].b[i], square));
                const float r = 1.f / (sqrtf(lanes_sum(square, work.lanes) / dim) + 1e-8f);
                Pairs out;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    const float a = in[h].a[i] * r * weight.a[i], b = in[h].b[i] * r * weight.b[i];
                    out.a[i] = fmaf(a, cos[i], b * sin[i]);
                    out.b[i] = fmaf(b, cos[i], -a * sin[i]);
                }
                if (!past) store_pairs(y + row + (h0 + h) * dim, at, half, vector, out);
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void backward(const T* __restrict__ x, const float* __restrict__ w, const T* __restrict__ dy,
                                         T* __restrict__ dx, float* __restrict__ partial, long long tokens, int steps,
                                         int heads, int half, int offset, long long log2_base) {
    __shared__ double turns[HALF];
    __shared__ float sums[BLOCK / WARP][2 * HALF];
    fill_turns(turns, half, log2_base);
    const Work work(half);
    const int at = work.at, dim = 2 * half;
    const bool vector = vectors(x, half) && vectors(dy, half) && vectors(dx, half);
    const Pairs weight = load_pairs(w, at, half, vectors(w, half));
    Pairs dw = {};
    for (long long base = work.first - threadIdx.x % WARP / work.lanes; base < tokens; base += work.stride) {
        const long long token = base + threadIdx.x % WARP / work.lanes;
        const bool past = token >= tokens;
        const long long row = past ? 0 : token * heads * dim;
        float cos[PAIRS], sin[PAIRS];
        angles(turns, at, half, offset + (past ? 0 : step_of(token, steps)), cos, sin);
        for (int h0 = 0; h0 < heads; h0 += AT_ONCE) {
            Pairs in[AT_ONCE], grad[AT_ONCE];
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++)
                if (h0 + h < heads) {
                    in[h] = load_pairs(x + row + (h0 + h) * dim, at, half, vector);
                    grad[h] = load_pairs(dy + row + (h0 + h) * dim, at, half, vector);
                }
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                if (h0 + h >= heads) break;
                Pairs g;
                float square = 0.f, along = 0.f;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    // The transpose of a rotation turns back.
                    g.a[i] = fmaf(grad[h].a[i], cos[i], -grad[h].b[i] * sin[i]);
                    g.b[i] = fmaf(grad[h].b[i], cos[i], grad[h].a[i] * sin[i]);
                    square = fmaf(in[h].a[i], in[h].a[i], fmaf(in[h].b[i], in[h].b[i], square));
                    along = fmaf(g.a[i] * weight.a[i], in[h].a[i], fmaf(g.b[i] * weight.b[i], in[h].b[i], along));
                }
                square = lanes_sum(square, work.lanes), along = lanes_sum(along, work.lanes);
                const float root = sqrtf(square / dim), r = 1.f / (root + 1e-8f);
                const float back = root > 0.f ? r * (r / (dim * root)) * along : 0.f;
                Pairs out;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    out.a[i] = fmaf(r, g.a[i] * weight.a[i], -in[h].a[i] * back);
                    out.b[i] = fmaf(r, g.b[i] * weight.b[i], -in[h].b[i] * back);
                }
                if (past) continue;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    dw.a[i] = fmaf(g.a[i], in[h].a[i] * r, dw.a[i]);
                    dw.b[i] = fmaf(g.b[i], in[h].b[i] * r, dw.b[i]);
                }
                store_pairs(dx + row + (h0 + h) * dim, at, half, vector, out);
            }
        }
    }
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
    fill_turns(turns, half, log2_base);
    const Work work(half);
    const int at = work.at, dim = 2 * half;
    const bool vector = vectors(x, half) && vectors(y, half);
    for (long long token = work.first; token < tokens; token += work.stride) {
        const long long row = token * heads * dim;
        float cos[PAIRS], sin[PAIRS];
        angles(turns, at, half, offset + step_of(token, steps), cos, sin);
        for (int h = 0; h < heads; h++) {
            const Pairs in = load_pairs(x + row + h * dim, at, half, vector);
            Pairs out;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                out.a[i] = fmaf(in.a[i], cos[i], -sign * in.b[i] * sin[i]);
                out.b[i] = fmaf(in.b[i], cos[i], sign * in.a[i] * sin[i]);
            }
            store_pairs(y + row + h * dim, at, half, vector, out);
        }
    }
}

#define ENTRIES(T, NAME)                                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK) rope_##NAME(                                                   \
        const T* x, T* y, long long tokens, int steps, int heads, int half, int offset, long long log2_base,           \
        float sign) {                                                                                                  \
        rope<T>(x, y, tokens, steps, heads, half, offset, log2_base, sign);                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 3) qk_norm_rope_forward_##NAME(                                    \
        const T* x, const float* w, T* y, long long tokens, int steps, int heads, int half, int offset,                \
        long long log2_base) {                                                                                             \
        forward<T>(x, w, y, tokens, steps, heads, half, offset, log2_base);                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 3) qk_norm_rope_backward_##NAME(                                   \
        const T* x, const float* w, const T* dy, T* dx, float* partial, long long tokens, int steps, int heads,        \
        int half, int offset, long long log2_base) {                                                                       \
        backward<T>(x, w, dy, dx, partial, tokens, steps, heads, half, offset, log2_base);                             \
    }
ENTRIES(float, f32)
ENTRIES(bf16, bf16)
