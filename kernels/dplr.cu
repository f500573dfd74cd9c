// The generalised delta rule: a state whose transition is diagonal plus low rank. One head and one step, with row
// vectors and w = exp(g):
//
//   u = a S            S <- diag(w) S + k' v - b' u            o = scale q S
//
// Kimi delta attention (Kimi Team, "Kimi Linear", 2025, eq. 1) and RWKV-7 (Peng et al., 2025, section 4.1) are special
// cases. Nothing is ever divided by a decay: gates may be as negative as they like.
//
// Columns of the state are independent. A thread holds KR rows of 4 columns in registers, L lanes next to each other
// share a column, and a block has `columns` = 4 threads / L columns of one head. Steps come in tiles of 8: copied to
// shared memory as they are while the tile before is worked on, then unpacked to f32. Row r of lane l is key
// ((r / 4) L + l) 4 + r % 4, so that the lanes of a column read 16 L bytes in a row.
//
//   forward   o, the final state, and u for the backward pass
//   reverse   from the last step to the first, with D the gradient of a step's state: dv = k D, du = -b D,
//             shares of dk = D v and db = -D u, the gradient of the initial state; keeps D at the ends of chunks
//   replay    from the first step to the last, with u known: shares of dq = scale do S and da = du S, and of the
//             sums of S D over the columns at the ends of chunks
//   gather    adds the shares of the blocks of a head, in their order, and makes dg of them: with G the sum of g from
//             the chunk's start on, states scaled by exp(-G) have q exp(G), k exp(-G), b exp(-G) and a_{t+1} exp(G)
//             for q, k, b, a, so that dG_t = q dq - k dk - b db + a_{t+1} da_{t+1}, and dg is its sum from t to the
//             chunk's end plus the chunk's sum of S D
//
// Estimates for a step and a thread with N = 4 KR numbers of the state: forward 5 N multiply-adds, 5 KR / 4 loads of
// 16 bytes from shared memory, 4 log2 L shuffles that the next step waits for and 3 that it does not; reverse 7 N and
// 8 log2 L + 2 (KR - KR L / 32) shuffles; replay 5 N and 2 (KR - KR L / 32). Registers: N and some 60, reverse N and
// some 90. The bound by instructions is therefore (forward 5, both passes 17) B T H K V / (128 M f) for M
// multiprocessors at f cycles a second.
//
// q, k, a, b [B, T, H, K] and v, o [B, T, H, V] in T; g [B, T, H, K], u, du [B, T, H, V] and states [B, H, K, V] in
// f32; shares [2, splits, B, T, H, K] in f32. States and sums in f32, no atomics: every sum has one order.
// Grid: B H splits (gather: B H by chunks). Block: 32 to 256 threads (gather: 128). Shared memory: see `Tiles`.
#include "common.cuh"

constexpr int TILE = 8, CHUNK = 64, COLS = 4;

// ---- tiles of steps in shared memory

// Where a block and a thread are.
template <int L>
struct Place {
    int heads, steps, key, value;
    int head, split, splits;
    // This thread's lane of its columns and the first of them within the block; the block's columns, their first in
    // the head, and how many there are of them.
    int lane, column, columns, first, live;
    // The first row of this head in arrays of `key` and of `value` columns, and from row to row.
    long long keys, values, key_stride, value_stride;

    __device__ __forceinline__ Place(int steps, int heads, int key, int value, int splits)
        : heads(heads), steps(steps), key(key), value(value), head(blockIdx.x / splits), split(blockIdx.x % splits),
          splits(splits), lane(threadIdx.x % L), column(threadIdx.x / L * COLS), columns(blockDim.x / L * COLS) {
        first = split * columns;
        live = min(columns, value - first);
        const long long row = (long long)(head / heads) * steps * heads + head % heads;
        keys = row * key;
        values = row * value + first;
        key_stride = (long long)heads * key;
        value_stride = (long long)heads * value;
    }
    __device__ __forceinline__ bool has(int c) const { return column + c < live; }
    // Row r of this lane.
    __device__ __forceinline__ int row(int r) const { return ((r >> 2) * L + lane) * 4 + (r & 3); }
};

// Starts the copy of `rows` rows of `n` elements to rows of `pitch` elements of shared memory.
template <class T>
__device__ __forceinline__ void stage(void* raw, int pitch, const T* src, long long stride, int n, int rows) {
    constexpr int V = 16 / sizeof(T);
    T* to = reinterpret_cast<T*>(raw);
    if (n % V == 0 && stride % V == 0 && (reinterpret_cast<size_t>(src) & 15) == 0) {
        const int per_row = n / V;
        for (int i = threadIdx.x; i < rows * per_row; i += blockDim.x) {
            const int r = i / per_row, c = i % per_row * V;
            cp_async16(to + r * pitch + c, src + r * stride + c);
        }
    } else {
        for (int i = threadIdx.x; i < rows * n; i += blockDim.x) {
            const int r = i / n, c = i % n;
            to[r * pitch + c] = src[r * stride + c];
        }
    }
}

// The rows as f32, with f applied; zeros behind `n` elements. `pitch` is PITCH, or a power of two where that is 0.
template <class T, int PITCH, class F>
__device__ __forceinline__ void unpack(float* to, const void* raw, int pitch, int n, int rows, F f) {
    const T* from = reinterpret_cast<const T*>(raw);
    const int p = PITCH ? PITCH : pitch;
    for (int i = threadIdx.x; i < rows * p; i += blockDim.x) {
        const int c = PITCH ? i % PITCH : i & (pitch - 1);
        to[i] = c < n ? f(to_f(from[i])) : 0.f;
    }
}

struct Same {
    __device__ __forceinline__ float operator()(float x) const { return x; }
};
struct Exp {
    __device__ __forceinline__ float operator()(float x) const { return exp2_fast(x * LOG2E); }
};
struct Times {
    float factor;
    __device__ __forceinline__ float operator()(float x) const { return factor * x; }
};

// `K_ARRAYS` arrays of KP and `V_ARRAYS` of `columns` floats a step, twice: as they came, with 4 bytes for each
// element of whatever type, and as f32. Behind them whatever else a kernel has.
template <int KP, int K_ARRAYS, int V_ARRAYS>
struct Tiles {
    unsigned char* memory;
    int columns;

    __device__ __forceinline__ Tiles(unsigned char* memory, int columns) : memory(memory), columns(columns) {}
    __device__ __forceinline__ int size() const { return TILE * (K_ARRAYS * KP + V_ARRAYS * columns); }
    __device__ __forceinline__ float* all() const { return reinterpret_cast<float*>(memory); }
    __device__ __forceinline__ float* keys(int i) const { return all() + i * TILE * KP; }
    __device__ __forceinline__ float* values(int i) const { return all() + TILE * (K_ARRAYS * KP + i * columns); }
    __device__ __forceinline__ void* raw_keys(int i) const { return keys(i) + size(); }
    __device__ __forceinline__ void* raw_values(int i) const { return values(i) + size(); }
    __device__ __forceinline__ float* rest() const { return all() + 2 * size(); }
};

// ---- sums over lanes

template <int L>
__device__ __forceinline__ void lanes_sum(float (&x)[COLS]) {
#pragma unroll
    for (int bit = 1; bit < L; bit *= 2)
#pragma unroll
        for (int c = 0; c < COLS; c++) x[c] += __shfl_xor_sync(FULL, x[c], bit);
}

// What a lane holds of sums that were scattered over lanes: those from `first` on; `mine`: no other has them.
struct Held {
    int first = 0;
    bool mine = true;
};

// Adds N numbers over the lanes that differ in the bits from BIT down to LOW, and leaves a part of the sums with each.
template <int BIT, int LOW, int N, int SIZE>
__device__ __forceinline__ void scatter_sum(float (&x)[SIZE], Held& held) {
    if constexpr (BIT >= LOW) {
        const bool upper = lane_id() & BIT;
        if constexpr (N > 1) {
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                const float send = upper ? x[i] : x[i + N / 2], keep = upper ? x[i + N / 2] : x[i];
                x[i] = keep + __shfl_xor_sync(FULL, send, BIT);
            }
            held.first += upper ? N / 2 : 0;
            scatter_sum<BIT / 2, LOW, N / 2>(x, held);
        } else {
            x[0] += __shfl_xor_sync(FULL, x[0], BIT);
            held.mine = held.mine && !upper;
            scatter_sum<BIT / 2, LOW, 1>(x, held);
        }
    }
}

// The sum over the columns of a warp of each of the rows of its lanes, to sums [KP].
template <int KR, int L>
__device__ __forceinline__ void rows_sum(float (&x)[KR], float* sums, const Place<L>& at) {
    constexpr int GROUPS = WARP / L, LEFT = KR > GROUPS ? KR / GROUPS : 1;
    Held held;
    scatter_sum<WARP / 2, L, KR>(x, held);
    if (held.mine) {
#pragma unroll
        for (int i = 0; i < LEFT; i++) sums[at.row(held.first + i)] = x[i];
    }
}

// ---- a thread's part of a state

template <int KR, int L>
__device__ __forceinline__ void load_state(float (&s)[KR][COLS], const float* state, const Place<L>& at) {
#pragma unroll
    for (int r = 0; r < KR; r++)
#pragma unroll
        for (int c = 0; c < COLS; c++) {
            const int row = at.row(r);
            const bool there = state && row < at.key && at.has(c);
            s[r][c] = there ? state[((long long)at.head * at.key + row) * at.value + at.first + at.column + c] : 0.f;
        }
}
template <int KR, int L>
__device__ __forceinline__ void store_state(const float (&s)[KR][COLS], float* state, const Place<L>& at) {
    if (!state) return;
#pragma unroll
    for (int r = 0; r < KR; r++)
#pragma unroll
        for (int c = 0; c < COLS; c++) {
            const int row = at.row(r);
            if (row < at.key && at.has(c))
                state[((long long)at.head * at.key + row) * at.value + at.first + at.column + c] = s[r][c];
        }
}

// The block's place of the gradients that it keeps at the end of a chunk, as its threads hold them.
template <int KR, int L>
__device__ __forceinline__ float* kept_at(float* kept, int chunk, const Place<L>& at) {
    const long long chunks = ceil_div(at.steps, CHUNK);
    return kept + ((blockIdx.x * chunks + chunk) * KR * COLS) * blockDim.x + threadIdx.x;
}

// Adds the sums of the block's warps, sums [ROWS, warps, KP] for `rows` rows, to the block's share at `to`.
template <int KP>
__device__ __forceinline__ void store_share(const float* sums, float* to, long long stride, int rows, int key) {
    const int warps = blockDim.x / WARP;
    for (int i = threadIdx.x; i < rows * KP; i += blockDim.x) {
        const int r = i / KP, c = i % KP;
        if (c >= key) continue;
        float sum = 0.f;
        for (int w = 0; w < warps; w++) sum += sums[(r * warps + w) * KP + c];
        to[r * stride + c] = sum;
    }
}

// ---- forward

template <class T, int KR, int L>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, const float* g, const T* a, const T* b,
                                        const float* start, T* o, float* u, float* last, float scale, int steps,
                                        int heads, int key, int value, int splits) {
    constexpr int KP = KR * L;
    enum { Q, KEY, A, B, W, K_ARRAYS };
    DYNAMIC_SHARED(memory);
    const Place<L> at(steps, heads, key, value, splits);
    const Tiles<KP, K_ARRAYS, 1> tiles(memory, at.columns);
    const auto begin = [&](int t) {
        const int rows = min(TILE, steps - t);
        const long long row = at.keys + t * at.key_stride;
        stage(tiles.raw_keys(Q), KP, q + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(KEY), KP, k + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(A), KP, a + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(B), KP, b + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(W), KP, g + row, at.key_stride, key, rows);
        stage(tiles.raw_values(0), at.columns, v + at.values + t * at.value_stride, at.value_stride, at.live, rows);
        cp_async_commit();
    };
    float s[KR][COLS];
    load_state(s, start, at);
    begin(0);
#pragma unroll 1
    for (int t = 0; t < steps; t += TILE) {
        const int rows = min(TILE, steps - t);
        cp_async_wait<0>();
        __syncthreads();
        unpack<T, KP>(tiles.keys(Q), tiles.raw_keys(Q), KP, key, rows, Times{scale});
        unpack<T, KP>(tiles.keys(KEY), tiles.raw_keys(KEY), KP, key, rows, Same());
        unpack<T, KP>(tiles.keys(A), tiles.raw_keys(A), KP, key, rows, Same());
        unpack<T, KP>(tiles.keys(B), tiles.raw_keys(B), KP, key, rows, Same());
        unpack<float, KP>(tiles.keys(W), tiles.raw_keys(W), KP, key, rows, Exp());
        unpack<T, 0>(tiles.values(0), tiles.raw_values(0), at.columns, at.live, rows, Same());
        __syncthreads();
        if (t + TILE < steps) begin(t + TILE);
#pragma unroll 1
        for (int r = 0; r < rows; r++) {
            const float* row = tiles.keys(0) + r * KP + 4 * at.lane;
            const auto load = [&](int array, int j, float (&x)[4]) {
                load_vec<4>(row + array * TILE * KP + j * 4 * L, x);
            };
            float read[COLS] = {}, out[COLS] = {}, x[COLS];
#pragma unroll
            for (int j = 0; j < KR / 4; j++) {
                float a4[4];
                load(A, j, a4);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int c = 0; c < COLS; c++) read[c] += a4[i] * s[4 * j + i][c];
            }
            lanes_sum<L>(read);
            load_vec<4>(tiles.values(0) + r * at.columns + at.column, x);
#pragma unroll
            for (int j = 0; j < KR / 4; j++) {
                float w4[4], k4[4], b4[4], q4[4];
                load(W, j, w4);
                load(KEY, j, k4);
                load(B, j, b4);
                load(Q, j, q4);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int c = 0; c < COLS; c++) {
                        float& y = s[4 * j + i][c];
                        y = k4[i] * x[c] + w4[i] * y;
                        y -= b4[i] * read[c];
                        out[c] += q4[i] * y;
                    }
            }
            Held held;
            scatter_sum<L / 2, 1, COLS>(out, held);
            if (held.mine && at.has(held.first)) {
                const long long to = at.values + (t + r) * at.value_stride + at.column + held.first;
                o[to] = from_f<T>(out[0]);
                if (u) {
                    const float low = held.first & 1 ? read[1] : read[0], high = held.first & 1 ? read[3] : read[2];
                    u[to] = held.first & 2 ? high : low;
                }
            }
        }
    }
    store_state(s, last, at);
}

// ---- backward

template <class T, int KR, int L>
__device__ __forceinline__ void reverse(const T* q, const T* k, const T* v, const float* g, const T* a, const T* b,
                                        const float* u, const T* d_o, const float* d_last, T* dv, float* du,
                                        float* shares, float* kept, float* d_start, float scale, int steps, int heads,
                                        int key, int value, int splits) {
    constexpr int KP = KR * L;
    enum { Q, KEY, A, B, W, K_ARRAYS };
    enum { V, U, DO, V_ARRAYS };
    DYNAMIC_SHARED(memory);
    const Place<L> at(steps, heads, key, value, splits);
    const Tiles<KP, K_ARRAYS, V_ARRAYS> tiles(memory, at.columns);
    // [2, TILE, warps, KP]
    const int warps = blockDim.x / WARP;
    float* sums = tiles.rest();
    const long long share = (long long)gridDim.x / splits * steps * key;
    float* dk = shares + at.split * share + at.keys;
    float* db = dk + splits * share;
    const auto begin = [&](int t) {
        const int rows = min(TILE, steps - t);
        const long long row = at.keys + t * at.key_stride, column = at.values + t * at.value_stride;
        stage(tiles.raw_keys(Q), KP, q + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(KEY), KP, k + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(A), KP, a + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(B), KP, b + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(W), KP, g + row, at.key_stride, key, rows);
        stage(tiles.raw_values(V), at.columns, v + column, at.value_stride, at.live, rows);
        stage(tiles.raw_values(U), at.columns, u + column, at.value_stride, at.live, rows);
        stage(tiles.raw_values(DO), at.columns, d_o + column, at.value_stride, at.live, rows);
        cp_async_commit();
    };
    float d[KR][COLS];
    load_state(d, d_last, at);
    const int end = (steps - 1) / TILE * TILE;
    begin(end);
#pragma unroll 1
    for (int t = end; t >= 0; t -= TILE) {
        const int rows = min(TILE, steps - t);
        cp_async_wait<0>();
        __syncthreads();
        unpack<T, KP>(tiles.keys(Q), tiles.raw_keys(Q), KP, key, rows, Times{scale});
        unpack<T, KP>(tiles.keys(KEY), tiles.raw_keys(KEY), KP, key, rows, Same());
        unpack<T, KP>(tiles.keys(A), tiles.raw_keys(A), KP, key, rows, Same());
        unpack<T, KP>(tiles.keys(B), tiles.raw_keys(B), KP, key, rows, Same());
        unpack<float, KP>(tiles.keys(W), tiles.raw_keys(W), KP, key, rows, Exp());
        unpack<T, 0>(tiles.values(V), tiles.raw_values(V), at.columns, at.live, rows, Same());
        unpack<float, 0>(tiles.values(U), tiles.raw_values(U), at.columns, at.live, rows, Same());
        unpack<T, 0>(tiles.values(DO), tiles.raw_values(DO), at.columns, at.live, rows, Same());
        __syncthreads();
        if (t > 0) begin(t - TILE);
        if (t == end || (t + TILE) % CHUNK == 0) {
            float* to = kept_at<KR>(kept, t / CHUNK, at);
#pragma unroll
            for (int i = 0; i < KR * COLS; i++) to[(long long)i * blockDim.x] = d[i / COLS][i % COLS];
        }
#pragma unroll 1
        for (int r = rows - 1; r >= 0; r--) {
            const float* row = tiles.keys(0) + r * KP + 4 * at.lane;
            const auto load = [&](int array, int j, float (&x)[4]) {
                load_vec<4>(row + array * TILE * KP + j * 4 * L, x);
            };
            const float* columns = tiles.values(0) + r * at.columns + at.column;
            float x[COLS], read[COLS], grad[COLS], d_value[COLS] = {}, d_read[COLS] = {};
            load_vec<4>(columns + V * TILE * at.columns, x);
            load_vec<4>(columns + U * TILE * at.columns, read);
            load_vec<4>(columns + DO * TILE * at.columns, grad);
            float row_k[KR], row_b[KR];
#pragma unroll
            for (int j = 0; j < KR / 4; j++) {
                float q4[4], k4[4], b4[4];
                load(Q, j, q4);
                load(KEY, j, k4);
                load(B, j, b4);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float with_v = 0.f, with_u = 0.f;
#pragma unroll
                    for (int c = 0; c < COLS; c++) {
                        float& y = d[4 * j + i][c];
                        y += q4[i] * grad[c];
                        d_value[c] += k4[i] * y;
                        d_read[c] -= b4[i] * y;
                        with_v += y * x[c];
                        with_u -= y * read[c];
                    }
                    row_k[4 * j + i] = with_v;
                    row_b[4 * j + i] = with_u;
                }
            }
            lanes_sum<L>(d_read);
#pragma unroll
            for (int j = 0; j < KR / 4; j++) {
                float w4[4], a4[4];
                load(W, j, w4);
                load(A, j, a4);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int c = 0; c < COLS; c++) {
                        float& y = d[4 * j + i][c];
                        y = a4[i] * d_read[c] + w4[i] * y;
                    }
            }
            Held held;
            scatter_sum<L / 2, 1, COLS>(d_value, held);
            if (held.mine && at.has(held.first)) {
                const long long to = at.values + (t + r) * at.value_stride + at.column + held.first;
                dv[to] = from_f<T>(d_value[0]);
                const float low = held.first & 1 ? d_read[1] : d_read[0], high = held.first & 1 ? d_read[3] : d_read[2];
                du[to] = held.first & 2 ? high : low;
            }
            float* to = sums + (r * warps + warp_id()) * KP;
            rows_sum(row_k, to, at);
            rows_sum(row_b, to + TILE * warps * KP, at);
        }
        __syncthreads();
        store_share<KP>(sums, dk + t * at.key_stride, at.key_stride, rows, key);
        store_share<KP>(sums + TILE * warps * KP, db + t * at.key_stride, at.key_stride, rows, key);
    }
    store_state(d, d_start, at);
}

template <class T, int KR, int L>
__device__ __forceinline__ void replay(const T* k, const T* v, const float* g, const T* b, const float* u,
                                       const T* d_o, const float* du, const float* start, float* kept, float* shares,
                                       float* ends, float scale, int steps, int heads, int key, int value,
                                       int splits) {
    constexpr int KP = KR * L;
    enum { KEY, B, W, K_ARRAYS };
    enum { V, U, DO, DU, V_ARRAYS };
    DYNAMIC_SHARED(memory);
    const Place<L> at(steps, heads, key, value, splits);
    const Tiles<KP, K_ARRAYS, V_ARRAYS> tiles(memory, at.columns);
    // [2, TILE, warps, KP]
    const int warps = blockDim.x / WARP;
    float* sums = tiles.rest();
    const long long share = (long long)gridDim.x / splits * steps * key;
    float* dq = shares + at.split * share + at.keys;
    float* da = dq + splits * share;
    const auto begin = [&](int t) {
        const int rows = min(TILE, steps - t);
        const long long row = at.keys + t * at.key_stride, column = at.values + t * at.value_stride;
        stage(tiles.raw_keys(KEY), KP, k + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(B), KP, b + row, at.key_stride, key, rows);
        stage(tiles.raw_keys(W), KP, g + row, at.key_stride, key, rows);
        stage(tiles.raw_values(V), at.columns, v + column, at.value_stride, at.live, rows);
        stage(tiles.raw_values(U), at.columns, u + column, at.value_stride, at.live, rows);
        stage(tiles.raw_values(DO), at.columns, d_o + column, at.value_stride, at.live, rows);
        stage(tiles.raw_values(DU), at.columns, du + column, at.value_stride, at.live, rows);
        cp_async_commit();
    };
    float s[KR][COLS];
    load_state(s, start, at);
    begin(0);
#pragma unroll 1
    for (int t = 0; t < steps; t += TILE) {
        const int rows = min(TILE, steps - t);
        cp_async_wait<0>();
        __syncthreads();
        unpack<T, KP>(tiles.keys(KEY), tiles.raw_keys(KEY), KP, key, rows, Same());
        unpack<T, KP>(tiles.keys(B), tiles.raw_keys(B), KP, key, rows, Same());
        unpack<float, KP>(tiles.keys(W), tiles.raw_keys(W), KP, key, rows, Exp());
        unpack<T, 0>(tiles.values(V), tiles.raw_values(V), at.columns, at.live, rows, Same());
        unpack<float, 0>(tiles.values(U), tiles.raw_values(U), at.columns, at.live, rows, Same());
        unpack<T, 0>(tiles.values(DO), tiles.raw_values(DO), at.columns, at.live, rows, Times{scale});
        unpack<float, 0>(tiles.values(DU), tiles.raw_values(DU), at.columns, at.live, rows, Same());
        __syncthreads();
        if (t + TILE < steps) begin(t + TILE);
#pragma unroll 1
        for (int r = 0; r < rows; r++) {
            const float* row = tiles.keys(0) + r * KP + 4 * at.lane;
            const auto load = [&](int array, int j, float (&x)[4]) {
                load_vec<4>(row + array * TILE * KP + j * 4 * L, x);
            };
            const float* columns = tiles.values(0) + r * at.columns + at.column;
            float x[COLS], read[COLS], grad[COLS], d_read[COLS];
            load_vec<4>(columns + V * TILE * at.columns, x);
            load_vec<4>(columns + U * TILE * at.columns, read);
            load_vec<4>(columns + DO * TILE * at.columns, grad);
            load_vec<4>(columns + DU * TILE * at.columns, d_read);
            float row_q[KR], row_a[KR];
#pragma unroll
            for (int j = 0; j < KR / 4; j++) {
                float w4[4], k4[4], b4[4];
                load(W, j, w4);
                load(KEY, j, k4);
                load(B, j, b4);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float before = 0.f, after = 0.f;
#pragma unroll
                    for (int c = 0; c < COLS; c++) {
                        float& y = s[4 * j + i][c];
                        before += y * d_read[c];
                        y = k4[i] * x[c] + w4[i] * y;
                        y -= b4[i] * read[c];
                        after += y * grad[c];
                    }
                    row_a[4 * j + i] = before;
                    row_q[4 * j + i] = after;
                }
            }
            float* to = sums + (r * warps + warp_id()) * KP;
            rows_sum(row_q, to, at);
            rows_sum(row_a, to + TILE * warps * KP, at);
        }
        __syncthreads();
        store_share<KP>(sums, dq + t * at.key_stride, at.key_stride, rows, key);
        store_share<KP>(sums + TILE * warps * KP, da + t * at.key_stride, at.key_stride, rows, key);
        if (t + TILE >= steps || (t + TILE) % CHUNK == 0) {
            const float* from = kept_at<KR>(kept, t / CHUNK, at);
            float row_s[KR];
#pragma unroll
            for (int i = 0; i < KR; i++) {
                row_s[i] = 0.f;
#pragma unroll
                for (int c = 0; c < COLS; c++)
                    row_s[i] += s[i][c] * from[(long long)(i * COLS + c) * blockDim.x];
            }
            __syncthreads();
            rows_sum(row_s, sums + warp_id() * KP, at);
            __syncthreads();
            const int chunks = ceil_div(steps, CHUNK);
            store_share<KP>(sums, ends + ((long long)blockIdx.x * chunks + t / CHUNK) * key, 0, 1, key);
        }
    }
}

// A thread takes one key channel of a head from the end of chunk blockIdx.y to its start. in_qa and in_kb are the
// shares of dq and da, dk and db.
template <class T>
__device__ __forceinline__ void gather(const T* q, const T* k, const T* a, const T* b, const float* in_qa,
                                       const float* in_kb, const float* ends, T* dq, T* dk, T* da, T* db, float* dg,
                                       int steps, int heads, int key, int splits) {
    const int head = blockIdx.x, c = threadIdx.x, chunks = gridDim.y;
    if (c >= key) return;
    const long long share = (long long)gridDim.x * steps * key, stride = (long long)heads * key;
    const long long base = (long long)(head / heads) * steps * stride + head % heads * key + c;
    float sum = 0.f;
    for (int s = 0; s < splits; s++) sum += ends[(((long long)head * splits + s) * chunks + blockIdx.y) * key + c];
    const int first = blockIdx.y * CHUNK, last = min(steps, first + CHUNK) - 1;
#pragma unroll 4
    for (int t = last; t >= first; t--) {
        const long long i = base + t * stride;
        float of_q = 0.f, of_a = 0.f, of_k = 0.f, of_b = 0.f;
        for (int s = 0; s < splits; s++) {
            of_q += in_qa[s * share + i];
            of_a += in_qa[(splits + s) * share + i];
            of_k += in_kb[s * share + i];
            of_b += in_kb[(splits + s) * share + i];
        }
        sum += to_f(q[i]) * of_q - to_f(k[i]) * of_k - to_f(b[i]) * of_b;
        dg[i] = sum;
        sum += to_f(a[i]) * of_a;
        dq[i] = from_f<T>(of_q);
        dk[i] = from_f<T>(of_k);
        da[i] = from_f<T>(of_a);
        db[i] = from_f<T>(of_b);
    }
}

#define WALKS(NAME, SUFFIX, T, KR, L, THREADS)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) dplr_forward_##NAME##_##SUFFIX(                             \
        const T* q, const T* k, const T* v, const float* g, const T* a, const T* b, const float* start, T* o,         \
        float* u, float* last, float scale, int steps, int heads, int key, int value, int splits) {                   \
        forward<T, KR, L>(q, k, v, g, a, b, start, o, u, last, scale, steps, heads, key, value, splits);              \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) dplr_reverse_##NAME##_##SUFFIX(                             \
        const T* q, const T* k, const T* v, const float* g, const T* a, const T* b, const float* u, const T* d_o,     \
        const float* d_last, T* dv, float* du, float* shares, float* kept, float* d_start, float scale, int steps,    \
        int heads, int key, int value, int splits) {                                                                  \
        reverse<T, KR, L>(q, k, v, g, a, b, u, d_o, d_last, dv, du, shares, kept, d_start, scale, steps, heads, key,  \
                          value, splits);                                                                             \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) dplr_replay_##NAME##_##SUFFIX(                              \
        const T* k, const T* v, const float* g, const T* b, const float* u, const T* d_o, const float* du,            \
        const float* start, float* kept, float* shares, float* ends, float scale, int steps, int heads, int key,      \
        int value, int splits) {                                                                                      \
        replay<T, KR, L>(k, v, g, b, u, d_o, du, start, kept, shares, ends, scale, steps, heads, key, value, splits); \
    }

// By the keys that there is room for.
#define KERNELS(SUFFIX, T)                                                                                         \
    WALKS(k16, SUFFIX, T, 4, 4, 128)                                                                               \
    WALKS(k32, SUFFIX, T, 8, 4, 128)                                                                               \
    WALKS(k64, SUFFIX, T, 16, 4, 128)                                                                              \
    WALKS(k96, SUFFIX, T, 12, 8, 256)                                                                              \
    WALKS(k128, SUFFIX, T, 16, 8, 256)                                                                             \
    extern "C" __global__ void __launch_bounds__(128) dplr_gather_##SUFFIX(                                        \
        const T* q, const T* k, const T* a, const T* b, const float* in_qa, const float* in_kb, const float* ends, \
        T* dq, T* dk, T* da, T* db, float* dg, int steps, int heads, int key, int splits) {                        \
        gather<T>(q, k, a, b, in_qa, in_kb, ends, dq, dk, da, db, dg, steps, heads, key, splits);                  \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
