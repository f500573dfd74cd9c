// Kernels over the rows of a matrix and over plain arrays: loads, sums and parameter gradients.
//
// A row of n elements is held in the registers of a team of 2^k threads: part of a warp, a warp, or the whole
// block. A thread has NV vectors of VEC consecutive elements; vector v of lane l begins at column
// (v · lanes + l) · VEC. The launcher (src/ops/rows/cuda.rs) picks VEC, NV and the team from n:
//
//   small  16-byte vectors, one a thread; at most 256 threads a block
//   wide   16-byte vectors, 16 elements a thread; at most 512 threads a block
//   odd    single elements, 16 a thread, at most 256 threads: n or an address is no multiple of a vector
#pragma once
#include "common.cuh"

template <class T> constexpr int VECTOR = 16 / sizeof(T);
constexpr int THREADS = 256, THREADS_WIDE = 512;
// Elements of a thread in the kernels `wide` and `odd`.
constexpr int MANY = 16;

// N elements, in loads of at most 16 bytes.
template <int N, class T>
__device__ __forceinline__ void load_elements(const T* p, float (&x)[N]) {
    constexpr int W = N < VECTOR<T> ? N : VECTOR<T>;
#pragma unroll
    for (int j = 0; j < N; j += W) {
        float part[W];
        load_vec<W>(p + j, part);
#pragma unroll
        for (int i = 0; i < W; i++) x[j + i] = part[i];
    }
}
template <int N, class T>
__device__ __forceinline__ void store_elements(T* p, const float (&x)[N]) {
    constexpr int W = N < VECTOR<T> ? N : VECTOR<T>;
#pragma unroll
    for (int j = 0; j < N; j += W) {
        float part[W];
#pragma unroll
        for (int i = 0; i < W; i++) part[i] = x[j + i];
        store_vec<W>(p + j, part);
    }
}

__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<size_t>(p) & 15) == 0; }

// ---- teams

struct Team {
    int lanes, lane;
    // This team's number in the block, and how many there are.
    int index, count;
    // 2 floats a warp, for teams of several warps.
    float* scratch;

    __device__ __forceinline__ Team(int log_lanes, float* scratch)
        : lanes(1 << log_lanes), lane(threadIdx.x & (lanes - 1)), index(threadIdx.x >> log_lanes),
          count(blockDim.x >> log_lanes), scratch(scratch) {}

    template <int VEC>
    __device__ __forceinline__ int column(int v) const { return (v * lanes + lane) * VEC; }
};

// Sums of N <= 2 numbers over the team. All threads of the block call it.
template <int N>
__device__ __forceinline__ void team_sum(float (&x)[N], const Team& team) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        if (offset < team.lanes) {
#pragma unroll
            for (int i = 0; i < N; i++) x[i] += __shfl_xor_sync(FULL, x[i], offset);
        }
    }
    if (team.lanes > WARP) {
        __syncthreads();
        if (lane_id() == 0) {
#pragma unroll
            for (int i = 0; i < N; i++) team.scratch[N * warp_id() + i] = x[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = 0.f;
        for (int w = 0; w < team.lanes / WARP; w++) {
#pragma unroll
            for (int i = 0; i < N; i++) x[i] += team.scratch[N * w + i];
        }
    }
}

// This thread's elements of a row; zeros past its end, or everywhere if the row is not `live`.
template <int VEC, int NV, class T>
__device__ __forceinline__ void load_row(const T* row, int n, bool live, const Team& team, float (&x)[VEC * NV]) {
#pragma unroll
    for (int v = 0; v < NV; v++) {
        const int c = team.column<VEC>(v);
        float part[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) part[i] = 0.f;
        if (live && c < n) load_elements(row + c, part);
#pragma unroll
        for (int i = 0; i < VEC; i++) x[v * VEC + i] = part[i];
    }
}
template <int VEC, int NV, class T>
__device__ __forceinline__ void store_row(T* row, int n, bool live, const Team& team, const float (&x)[VEC * NV]) {
#pragma unroll
    for (int v = 0; v < NV; v++) {
        const int c = team.column<VEC>(v);
        float part[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) part[i] = x[v * VEC + i];
        if (live && c < n) store_elements(row + c, part);
    }
}

// A vector of n parameters, seen as a row: in registers where a thread has one vector of it, else in `shared`, n
// floats that are there after the next barrier.
template <int VEC, int NV>
struct RowParam {
    float own[NV == 1 ? VEC : 1];
    const float* shared;
    int n;

    __device__ __forceinline__ RowParam(const float* p, int n, const Team& team, float* shared) : shared(shared), n(n) {
        if constexpr (NV == 1) {
            load_row<VEC, 1>(p, n, true, team, own);
        } else {
            for (int c = threadIdx.x; c < n; c += blockDim.x) shared[c] = p[c];
        }
    }
    // Vector v of this thread; zeros past the end.
    __device__ __forceinline__ void get(int v, const Team& team, float (&x)[VEC]) const {
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = NV == 1 ? own[NV == 1 ? i : 0] : 0.f;
        if constexpr (NV > 1) {
            const int c = team.column<VEC>(v);
            if (c < n) load_elements(shared + c, x);
        }
    }
};

// Writes the block's sum over its teams of `x`, which every team holds as it holds a row, to out[n].
// `shared` has n floats, unless the block is one team; n for each warp where a thread has one vector. All threads call
// it; barriers begin and end it.
template <int VEC, int NV>
__device__ __forceinline__ void store_block_sum(float (&x)[VEC * NV], int n, const Team& team, float* shared,
                                                float* out) {
    if (team.count == 1) {
        store_row<VEC, NV>(out, n, true, team, x);
        return;
    }
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        if (offset >= team.lanes) {
#pragma unroll
            for (int i = 0; i < VEC * NV; i++) x[i] += __shfl_xor_sync(FULL, x[i], offset);
        }
    }
    const int warps = blockDim.x / WARP;
    __syncthreads();
    if constexpr (NV == 1) {
        const int c = team.column<VEC>(0);
        if (lane_id() < team.lanes && c < n) store_elements(shared + warp_id() * n + c, x);
        __syncthreads();
    } else {
        // The warps add one after the other: a fixed order, and room for one row only.
        for (int w = 0; w < warps; w++) {
            if (w == warp_id() && lane_id() < team.lanes) {
#pragma unroll
                for (int v = 0; v < NV; v++) {
#pragma unroll
                    for (int i = 0; i < VEC; i++) {
                        const int c = team.column<VEC>(v) + i;
                        if (c < n) shared[c] = (w == 0 ? 0.f : shared[c]) + x[v * VEC + i];
                    }
                }
            }
            __syncthreads();
        }
    }
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
        float sum = shared[c];
        for (int w = 1; NV == 1 && w < warps; w++) sum += shared[w * n + c];
        out[c] = sum;
    }
    __syncthreads();
}

// ---- rows on their way

// Rows of ARRAYS matrices [rows, n], copied to shared memory while the rows before them are worked on, where a thread
// has one vector of 16 bytes of each; else loaded when they are asked for. A thread asks for what it copied alone: no
// barrier. `memory`: 2 ARRAYS vectors for each thread of the block.
template <class T, int VEC, int NV, int ARRAYS>
struct Ahead {
    static constexpr bool COPIES = NV == 1 && VEC == VECTOR<T>;
    T* slots;
    int rows, n, turn = 0;

    __device__ __forceinline__ Ahead(void* memory, int rows, int n)
        : slots(reinterpret_cast<T*>(memory) + threadIdx.x * VEC), rows(rows), n(n) {}

    __device__ __forceinline__ T* slot(int array) const { return slots + (turn * ARRAYS + array) * blockDim.x * VEC; }
    // Starts the copies of a row of each matrix.
    __device__ __forceinline__ void start(const T* const (&matrices)[ARRAYS], int row, const Team& team) {
        if constexpr (COPIES) {
            const int c = team.column<VEC>(0);
            const bool exists = row < rows && c < n;
            const long long at = exists ? (long long)row * n + c : 0;
#pragma unroll
            for (int a = 0; a < ARRAYS; a++) cp_async16(slot(a), matrices[a] + at, exists ? 16 : 0);
            cp_async_commit();
            turn ^= 1;
        }
    }
    // This thread's elements of the row that was started before the last, which is row `row` of `matrix`; zeros past
    // its end or behind the last row.
    __device__ __forceinline__ void get(int array, const T* matrix, int row, const Team& team,
                                        float (&x)[VEC * NV]) const {
        if constexpr (COPIES) {
            cp_async_wait<1>();
            load_elements(slot(array), x);
        } else {
            load_row<VEC, NV>(matrix + (long long)row * n, n, row < rows, team, x);
        }
    }
};

// ---- dropout

// The sample and the timestep of rows that are `stride` apart, without a division for each.
struct Step {
    uint32_t b, t, stride_b, stride_t, steps;
    __device__ __forceinline__ Step(uint32_t row, uint32_t stride, uint32_t steps)
        : b(row / steps), t(row % steps), stride_b(stride / steps), stride_t(stride % steps), steps(steps) {}
    __device__ __forceinline__ void next() {
        b += stride_b, t += stride_t;
        if (t >= steps) t -= steps, b++;
    }
};

// The arguments of a dropout mask over [B, T, D]; see src/ops/dropout. A null key: nothing is dropped.
struct Mask {
    uint2 key;
    bool on;
    uint32_t threshold, first, site;
    int steps;
    float keep;
    // All timesteps of a sample share the mask of the first.
    bool tied = false;

    __device__ __forceinline__ Mask() : Mask(nullptr, 0.f, 1.f, 0, 0, 1) {}
    __device__ __forceinline__ Mask(const uint32_t* key, float p, float keep, uint32_t first, uint32_t site, int steps)
        : key(key ? make_uint2(key[0], key[1]) : make_uint2(0, 0)), on(key != nullptr),
          // unit_f32(bits) >= p, as a comparison of integers: both are multiples of 2^-24 or p lies between two.
          threshold((uint32_t)ceilf(p * 16777216.f)), first(first), site(site), steps(steps), keep(key ? keep : 1.f) {}

    __device__ __forceinline__ uint4 draw(const Step& at, uint32_t block) const {
        return philox4x32(make_uint4(block, tied ? 0 : at.t, first + at.b, site), key);
    }
    __device__ __forceinline__ bool kept(uint32_t bits) const { return bits >> 8 >= threshold; }

    // Which of N consecutive elements are kept, as bits; N is 1 or a multiple of 4, as is then `column`.
    template <int N>
    __device__ __forceinline__ uint32_t bits(const Step& at, int column) const {
        uint32_t bits = 0;
        if constexpr (N == 1) {
            const uint4 x = draw(at, column / 4);
            const int l = column % 4;
            bits = kept(l == 0 ? x.x : l == 1 ? x.y : l == 2 ? x.z : x.w);
        } else {
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                const uint4 x = draw(at, (column + j) / 4);
                bits |= kept(x.x) << j | kept(x.y) << (j + 1) | kept(x.z) << (j + 2) | kept(x.w) << (j + 3);
            }
        }
        return bits;
    }

    // Which of this thread's elements of the row of a timestep are kept.
    template <int VEC, int NV>
    __device__ __forceinline__ uint32_t row_bits(const Step& at, int n, const Team& team) const {
        static_assert(VEC * NV <= 32, "one bit an element");
        if (!on) return 0xffffffffu;
        uint32_t all = 0;
#pragma unroll(VEC == 1 ? 1 : NV)
        for (int v = 0; v < NV; v++) {
            const int c = team.column<VEC>(v);
            if (c < n) all |= bits<VEC>(at, c) << (v * VEC);
        }
        return all;
    }

    __device__ __forceinline__ float factor(uint32_t bits, int i) const { return bits >> i & 1 ? keep : 0.f; }
};

// ---- plain arrays

template <int N> struct Width { static constexpr int value = N; };

// f(Width<N>, i) for vectors of N elements at i, then f(Width<1>, i) for the rest; only single elements
// unless `aligned`. Any one-dimensional grid.
template <int N, class F>
__device__ __forceinline__ void for_elements(long long n, bool aligned, F f) {
    const long long thread = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long threads = gridDim.x * (long long)blockDim.x;
    const long long vectors = aligned ? n / N : 0;
    for (long long i = thread; i < vectors; i += threads) f(Width<N>(), i * N);
    for (long long i = vectors * N + thread; i < n; i += threads) f(Width<1>(), i);
}
