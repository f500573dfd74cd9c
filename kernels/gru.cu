// Gated recurrent unit (src/ops/gru): one launch walks over all steps, its blocks side by side on the GPU.
//
//   a = h Wᵀ + bias                                r = σ(x_r + a_r), z = σ(x_z + a_z), n = tanh(x_n + r a_n)
//   h ← (1 − z) n + z h
//
// Backward, with d = dy + z₊ d₊ + da₊ W of the step behind (₊):
//   dn = d (1 − z)(1 − n²), dz = d (h₋ − n) z (1 − z), dr = dn a_n r (1 − r)
//   dx = (dr, dz, dn), da = (dr, dz, r dn)
//   dW = Σ daᵀ h₋ and d bias = Σ da are taken over all steps at the end, by a matrix product and column sums.
//
// Every unit's next state asks for the states of all units, which blocks give each other through global memory. A word
// holds a number and the step it belongs to, so that who finds the step has the number: no flags, no fences, and a word
// takes one way through the L2 cache. Two buffers take turns: who writes step t + 2 has seen all of step t + 1, whose
// writers had all read step t.
//
// A block has tiles of UNITS units and 8 NT sequences. The terms of a product are shared out among its warps, which find
// them in their registers as tensor cores want them; partial sums are added in the order of the warps. Weights lie in
// that order too (gru_arrange), in shared memory where they fit. States are carried in f32; products take them in the type
// of the activations.
//
// gru_<forward|backward>_<f32|tf32|bf16>_<NT>: launched together (all blocks must run at the same time), block THREADS;
// any number of blocks does. gru_arrange_<f32|bf16>: a thread for 16 bytes of weights.
#include "mma.cuh"

namespace {

constexpr int UNITS = 16, WARPS = 8, THREADS = WARPS * WARP;

// What the type of the activations decides: words of a number and its step, and the terms of a tensor core's product.
template <class T> struct Words;
template <> struct Words<bf16> {
    using Word = uint32_t;
    static constexpr int TERMS = 16, STEPS = 1 << 16;
    static __device__ __forceinline__ Word of(float x, uint32_t step) { return pack_bf16(x, 0.f) | step << 16; }
    // Whether one of them is of another step.
    static __device__ __forceinline__ uint32_t late(const Word (&words)[4], uint32_t step) {
        const uint32_t of = step << 16;
        return ((words[0] ^ of) | (words[1] ^ of) | (words[2] ^ of) | (words[3] ^ of)) >> 16;
    }
};
template <> struct Words<float> {
    using Word = unsigned long long;
    static constexpr int TERMS = 8, STEPS = 1 << 30;
    static __device__ __forceinline__ Word of(float x, uint32_t step) { return __float_as_uint(x) | (Word)step << 32; }
    static __device__ __forceinline__ uint32_t late(const Word (&words)[2], uint32_t step) {
        return ((uint32_t)(words[0] >> 32) ^ step) | ((uint32_t)(words[1] >> 32) ^ step);
    }
};

// Words are read and written whole, past the caches of the multiprocessors.
#ifdef SB_EMULATE
template <class Word>
__device__ __forceinline__ void give(Word* p, Word word) { *p = word; }
template <class Word, int N>
__device__ __forceinline__ void look(const Word* p, Word (&words)[N]) {
    for (int i = 0; i < N; i++) words[i] = p[i];
}
__device__ __forceinline__ void look_again() { __threadfence(); }
#else
__device__ __forceinline__ void give(uint32_t* p, uint32_t word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory");
}
__device__ __forceinline__ void give(unsigned long long* p, unsigned long long word) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
}
__device__ __forceinline__ void look(const uint32_t* p, uint32_t (&words)[4]) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(p)
                 : "memory");
}
__device__ __forceinline__ void look(const unsigned long long* p, unsigned long long (&words)[2]) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(words[0]), "=l"(words[1]) : "l"(p) : "memory");
}
__device__ __forceinline__ void look_again() {}
#endif

// c += a b with 16 bytes of weights and of words.
template <class R>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, const uint32_t (&b)[4]) {
    const uint32_t fa[4] = {a.x, a.y, a.z, a.w};
    const uint32_t fb[2] = {__byte_perm(b[0], b[1], 0x5410), __byte_perm(b[2], b[3], 0x5410)};
    mma_bf16(c, fa, fb);
}
template <class R>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, const unsigned long long (&b)[2]) {
    const float fa[4] = {__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w)};
    const float fb[2] = {__uint_as_float((uint32_t)b[0]), __uint_as_float((uint32_t)b[1])};
    mma_float<R>(c, fa, fb);
}

struct Sizes {
    int batch, steps, width;
    int across;  // blocks side by side over the units; the others have other sequences
    int cached;  // whether the weights of a block lie in shared memory
};

// What a unit of a sequence does at a step: `fetch` reads what does not depend on the step before (as it is: who converts
// it waits for it), `first` gives what the first step finds, `give` takes the products and gives what the next step will
// find, and `keep` writes the rest, when others go on already.
template <class T>
struct Forward {
    static constexpr int PRODUCTS = 3, GIVEN = 1;
    const T* x;
    const float* bias;
    float* state;  // [B, D], before the first step and at the end behind the last one
    T* y;
    float* saved;  // [B, T, 4, D] or null: r, z, n and a_n for the backward pass
    struct Fetched { T x[3]; float bias[3], h; };
    struct Kept { float r, z, n, a_n; };

    __device__ __forceinline__ void first(const Sizes& n, int b, int unit, float (&given)[1]) const {
        given[0] = state[(long long)b * n.width + unit];
    }
    __device__ __forceinline__ Fetched fetch(const Sizes& n, int b, int step, int unit) const {
        Fetched f;
        const T* gates = x + ((long long)b * n.steps + step) * 3 * n.width + unit;
#pragma unroll
        for (int g = 0; g < 3; g++) f.x[g] = gates[g * n.width], f.bias[g] = bias[g * n.width + unit];
        f.h = state[(long long)b * n.width + unit];
        return f;
    }
    __device__ __forceinline__ Kept give(const Sizes&, int, const Fetched& f, const float (&sum)[3],
                                         float (&given)[1]) const {
        Kept kept;
        kept.a_n = sum[2] + f.bias[2];
        kept.r = sigmoid(to_f(f.x[0]) + sum[0] + f.bias[0]), kept.z = sigmoid(to_f(f.x[1]) + sum[1] + f.bias[1]);
        kept.n = tanhf(fmaf(kept.r, kept.a_n, to_f(f.x[2])));
        given[0] = fmaf(kept.z, f.h - kept.n, kept.n);
        return kept;
    }
    __device__ __forceinline__ void keep(const Sizes& n, int b, int step, int unit, const Fetched&, const Kept& kept,
                                         const float (&given)[1]) const {
        const long long token = (long long)b * n.steps + step;
        state[(long long)b * n.width + unit] = given[0];
        y[token * n.width + unit] = from_f<T>(given[0]);
        if (saved) {
            float* to = saved + token * 4 * n.width + unit;
            to[0] = kept.r, to[n.width] = kept.z, to[2 * n.width] = kept.n, to[3 * n.width] = kept.a_n;
        }
    }
};

// Steps count from the last one backwards. One more than there are ends with the gradient of the initial state.
template <class T>
struct Backward {
    static constexpr int PRODUCTS = 1, GIVEN = 3;
    const float* saved;
    const T* y;
    const float* start;  // [B, D] or null: the initial state
    const T* dy;         // or null
    float* carry;        // [B, D]: z₊ d₊, at first the gradient of the final state, at the end that of the initial one
    T *dx, *da;          // [B, T, 3D]
    T* before;           // [B, T, D]: the states before the steps
    struct Fetched { T dy, y; float r, z, n, a_n, start, carry; };
    struct Kept { float d, dn, h; };

    __device__ __forceinline__ void first(const Sizes&, int, int, float (&given)[3]) const {
        given[0] = given[1] = given[2] = 0.f;
    }
    __device__ __forceinline__ Fetched fetch(const Sizes& n, int b, int step, int unit) const {
        Fetched f = {};
        const int t = n.steps - 1 - step;
        const long long at = (long long)b * n.width + unit, token = (long long)b * n.steps + t;
        f.carry = carry[at];
        if (t < 0) return f;
        if (dy) f.dy = dy[token * n.width + unit];
        const float* kept = saved + token * 4 * n.width + unit;
        f.r = kept[0], f.z = kept[n.width], f.n = kept[2 * n.width], f.a_n = kept[3 * n.width];
        if (t > 0) f.y = y[(token - 1) * n.width + unit];
        else if (start) f.start = start[at];
        return f;
    }
    __device__ __forceinline__ Kept give(const Sizes& n, int step, const Fetched& f, const float (&sum)[1],
                                         float (&given)[3]) const {
        Kept kept;
        kept.d = sum[0] + f.carry + to_f(f.dy);
        kept.h = step + 1 < n.steps ? to_f(f.y) : f.start;
        kept.dn = kept.d * (1.f - f.z) * (1.f - f.n * f.n);
        given[0] = kept.dn * f.a_n * f.r * (1.f - f.r), given[1] = kept.d * (kept.h - f.n) * f.z * (1.f - f.z);
        given[2] = kept.dn * f.r;
        return kept;
    }
    __device__ __forceinline__ void keep(const Sizes& n, int b, int step, int unit, const Fetched& f, const Kept& kept,
                                         const float (&given)[3]) const {
        const int t = n.steps - 1 - step;
        const long long at = (long long)b * n.width + unit, token = (long long)b * n.steps + t;
        carry[at] = t < 0 ? kept.d : kept.d * f.z;
        if (t < 0) return;
        before[token * n.width + unit] = from_f<T>(kept.h);
        const float grads[3] = {given[0], given[1], kept.dn};
#pragma unroll
        for (int g = 0; g < 3; g++) {
            const long long to = (token * 3 + g) * n.width + unit;
            dx[to] = from_f<T>(grads[g]), da[to] = from_f<T>(given[g]);
        }
    }
};

// `weights` as gru_arrange left them, `words` zeros: [2, sequences / 8, GIVEN, D / TERMS, 8, TERMS], sequences and D
// rounded up to whole tiles, whose rest is given as zeros.
template <class R, int NT, class Cell>
__device__ __forceinline__ void walk(const Cell& cell, const uint4* weights, typename Words<typename R::elem>::Word* words,
                                     int rounds, const Sizes& n) {
    using W = Words<typename R::elem>;
    using Word = typename W::Word;
    constexpr int ROWS = 8 * NT, PITCH = ROWS + 1, PRODUCTS = Cell::PRODUCTS, GIVEN = Cell::GIVEN;
    constexpr int PER_LANE = 16 / sizeof(Word), TILE = 8 * W::TERMS, ITEMS = ceil_div(UNITS * ROWS, THREADS);
    // 16 bytes of words that a lane looks for at the same time.
    constexpr int AHEAD = NT == 4 && PRODUCTS == 3 ? 4 : 8;
    DYNAMIC_SHARED(shared);
    float* const parts = reinterpret_cast<float*>(shared);  // [2, WARPS, PRODUCTS, UNITS, PITCH]
    uint4* const cache = reinterpret_cast<uint4*>(parts + 2 * WARPS * PRODUCTS * UNITS * PITCH);
    const int tid = threadIdx.x, lane = lane_id(), warp = warp_id();
    const int unit_tiles = ceil_div(n.width, UNITS), row_tiles = ceil_div(n.batch, ROWS);
    const int per_gate = unit_tiles * UNITS / W::TERMS, terms = GIVEN * per_gate;  // in tiles of TERMS
    const int of_units = PRODUCTS * terms * WARP;                                // weights of a tile of units
    const long long buffer = (long long)row_tiles * NT * terms * TILE;
    const int teams = gridDim.x / n.across, team = blockIdx.x / n.across, first_tile = blockIdx.x % n.across;
    if (team >= teams) return;

    // Calls f(i, unit and sequence within the tiles, sequence, unit, whether there is such a one).
    const auto each_item = [&](int rows, int units, auto f) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int at = i * THREADS + tid, own = at % UNITS, row = at / UNITS;
            const int b = rows * ROWS + row, unit = units * UNITS + own;
            if (UNITS * ROWS % THREADS == 0 || row < ROWS) f(i, own, row, b, unit, b < n.batch && unit < n.width);
        }
    };
    const auto give_all = [&](int step, int b, int unit, const float (&given)[GIVEN]) {
        Word* to = words + step % 2 * buffer + (b / 8 * terms + unit / W::TERMS) * (long long)TILE + b % 8 * W::TERMS +
                   unit % W::TERMS;
#pragma unroll
        for (int g = 0; g < GIVEN; g++) give(to + g * per_gate * TILE, W::of(given[g], (step + 1) % W::STEPS));
    };
    for (int units = first_tile; units < unit_tiles; units += n.across)
        for (int rows = team; rows < row_tiles; rows += teams)
            each_item(rows, units, [&](int, int, int, int b, int unit, bool exists) {
                float given[GIVEN] = {};
                if (exists) cell.first(n, b, unit, given);
                give_all(0, b, unit, given);
            });
    if (n.cached) {
        for (int i = tid; i < of_units; i += THREADS) cache[i] = weights[(long long)first_tile * of_units + i];
        __syncthreads();
    }

    int turn = 0;
    for (int step = 0; step < rounds; step++) {
        for (int units = first_tile; units < unit_tiles; units += n.across) {
            const uint4* own_weights = n.cached ? cache : weights + (long long)units * of_units;
            for (int rows = team; rows < row_tiles; rows += teams, turn ^= 1) {
                typename Cell::Fetched fetched[ITEMS];
                each_item(rows, units, [&](int i, int, int, int b, int unit, bool exists) {
                    if (exists) fetched[i] = cell.fetch(n, b, step, unit);
                });
                float acc[PRODUCTS][NT][4] = {};
                const uint32_t expected = (step + 1) % W::STEPS;
                const Word* from = words + step % 2 * buffer + (rows * NT * terms + warp) * (long long)TILE + lane * PER_LANE;
                const uint4* weights_from = own_weights + warp * WARP + lane;
                for (int left = terms - warp; left > 0; left -= AHEAD * WARPS) {
                    uint4 weight[AHEAD][PRODUCTS];
                    Word found[AHEAD][NT][PER_LANE];
#pragma unroll
                    for (int a = 0; a < AHEAD && a * WARPS < left; a++)
#pragma unroll
                        for (int g = 0; g < PRODUCTS; g++)
                            weight[a][g] = weights_from[g * terms * WARP + a * WARPS * WARP];
                    for (uint32_t late = 1; late != 0;) {
#pragma unroll
                        for (int a = 0; a < AHEAD && a * WARPS < left; a++)
#pragma unroll
                            for (int j = 0; j < NT; j++) look(from + j * terms * TILE + a * WARPS * TILE, found[a][j]);
                        late = 0;
#pragma unroll
                        for (int a = 0; a < AHEAD && a * WARPS < left; a++)
#pragma unroll
                            for (int j = 0; j < NT; j++) late |= W::late(found[a][j], expected);
                        if (late != 0) look_again();
                    }
                    __syncwarp();
#pragma unroll
                    for (int a = 0; a < AHEAD && a * WARPS < left; a++)
#pragma unroll
                        for (int g = 0; g < PRODUCTS; g++)
#pragma unroll
                            for (int j = 0; j < NT; j++) multiply<R>(acc[g][j], weight[a][g], found[a][j]);
                    from += AHEAD * WARPS * TILE, weights_from += AHEAD * WARPS * WARP;
                }
                float* const sums = parts + turn * WARPS * PRODUCTS * UNITS * PITCH;
#pragma unroll
                for (int g = 0; g < PRODUCTS; g++)
#pragma unroll
                    for (int j = 0; j < NT; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const int own = lane / 4 + e / 2 * 8, row = 8 * j + lane % 4 * 2 + e % 2;
                            sums[((warp * PRODUCTS + g) * UNITS + own) * PITCH + row] = acc[g][j][e];
                        }
                __syncthreads();
                each_item(rows, units, [&](int i, int own, int row, int b, int unit, bool exists) {
                    float sum[PRODUCTS], given[GIVEN] = {};
#pragma unroll
                    for (int g = 0; g < PRODUCTS; g++) {
                        sum[g] = 0.f;
#pragma unroll
                        for (int w = 0; w < WARPS; w++)
                            sum[g] += sums[((w * PRODUCTS + g) * UNITS + own) * PITCH + row];
                    }
                    typename Cell::Kept kept;
                    if (exists) kept = cell.give(n, step, fetched[i], sum, given);
                    if (step + 1 < rounds) give_all(step + 1, b, unit, given);
                    if (exists) cell.keep(n, b, step, unit, fetched[i], kept, given);
                });
            }
        }
    }
}

// Weights [3D, D] in the order in which lanes take them: 16 bytes are rows g and g + 8 (g = lane / 4) of a tile of UNITS
// units, and of TERMS terms those that the lane has of the words. For the forward pass [tiles, 3, D / TERMS, WARP], terms
// are states; for the backward pass [tiles, 3 D / TERMS, WARP], terms are the gradients of three gates.
template <class T>
__device__ __forceinline__ void arrange(const T* weight, uint4* out, int width, int back) {
    constexpr int TERMS = Words<T>::TERMS, HALF = TERMS / 8;  // neighbours of a register
    const int per_gate = ceil_div(width, UNITS) * UNITS / TERMS;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = i % WARP, k = i / WARP % per_gate, gate = i / WARP / per_gate % 3, tile = i / WARP / per_gate / 3;
    if (tile >= ceil_div(width, UNITS)) return;
    T values[16 / sizeof(T)];
#pragma unroll
    for (int e = 0; e < (int)(16 / sizeof(T)); e++) {
        const int reg = e / HALF, unit = tile * UNITS + lane / 4 + reg % 2 * 8;
        const int term = k * TERMS + lane % 4 * (2 * HALF) + reg / 2 * HALF + e % HALF;
        const int to = back ? term : unit, of = back ? unit : term;
        values[e] = unit < width && term < width ? weight[((long long)gate * width + to) * width + of] : from_f<T>(0.f);
    }
    memcpy(out + i, values, 16);
}

}  // namespace

#define SIZES int batch, int steps, int width, int across, int cached
#define FORWARD(T, R, NAME, NT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) gru_forward_##NAME##_##NT(                                \
        const uint4* weights, Words<T>::Word* words, const T* x, const float* bias, float* state, T* y, float* saved,  \
        int rounds, SIZES) {                                                                                           \
        walk<R, NT>(Forward<T>{x, bias, state, y, saved}, weights, words, rounds,                                      \
                    Sizes{batch, steps, width, across, cached});                                                       \
    }
#define BACKWARD(T, R, NAME, NT)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) gru_backward_##NAME##_##NT(                               \
        const uint4* weights, Words<T>::Word* words, const float* saved, const T* y, const float* start, const T* dy,  \
        float* carry, T* dx, T* da, T* before, int rounds, SIZES) {                                                    \
        walk<R, NT>(Backward<T>{saved, y, start, dy, carry, dx, da, before}, weights, words, rounds,                   \
                    Sizes{batch, steps, width, across, cached});                                                       \
    }
#define ROUTE(T, R, NAME)                                                                                             \
    FORWARD(T, R, NAME, 1)                                                                                            \
    FORWARD(T, R, NAME, 2)                                                                                            \
    FORWARD(T, R, NAME, 4)                                                                                            \
    BACKWARD(T, R, NAME, 1)                                                                                           \
    BACKWARD(T, R, NAME, 2)                                                                                           \
    BACKWARD(T, R, NAME, 4)

ROUTE(float, F32, f32)
ROUTE(float, Tf32, tf32)
ROUTE(bf16, Bf16, bf16)

extern "C" __global__ void __launch_bounds__(THREADS) gru_arrange_f32(const float* weight, uint4* out, int width,
                                                                      int back) {
    arrange(weight, out, width, back);
}
extern "C" __global__ void __launch_bounds__(THREADS) gru_arrange_bf16(const bf16* weight, uint4* out, int width,
                                                                       int back) {
    arrange(weight, out, width, back);
}
