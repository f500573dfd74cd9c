// Encoder of symbols: y[r, :] = W[:, id_r] + b, and the gradients of W and b (src/ops/embedding).
//
//   ids [rows] u32, W [D, V] f32, b [D] f32, y and dy [rows, D] in the compute dtype, rows = B*T
//   an id of V or more is a blank step: its row is b
//
//   dW[d, v] = sum of dy[r, d] over the rows r with id v         db[d] = sum of dy[r, d] over all rows
//
// The forward pass writes, the backward pass reads, rows x D once; W is at most a few hundred KiB. No atomics:
// the rows fall into slabs by the launch's grid alone, and the slabs are summed in their order.
#include "common.cuh"

// Columns of a block. A tile of W, COLUMNS x V, is one piece of memory.
constexpr int COLUMNS = 64;

// ---- forward

// Grid (slabs of rows, D / COLUMNS), 256 threads. Shared memory: the table of the block's columns, a row for every
// symbol and one for blanks, if `tabled`; without it W is read where it lies.
template <class T>
__device__ __forceinline__ void forward(const uint32_t* __restrict__ ids, const float* __restrict__ w,
                                        const float* __restrict__ b, T* __restrict__ y, int rows, int width,
                                        int vocab, int tabled) {
    constexpr int V = 16 / sizeof(T);
    constexpr int STRIDE = COLUMNS + V;
    DYNAMIC_SHARED(memory);
    T* table = reinterpret_cast<T*>(memory);  // [vocab + 1, STRIDE]
    const int first = blockIdx.y * COLUMNS, columns = min(COLUMNS, width - first);
    const int slab = ceil_div(rows, (int)gridDim.x);
    const int begin = min(rows, (int)blockIdx.x * slab), end = min(rows, begin + slab);
    if (!tabled) {
        for (int i = threadIdx.x; i < COLUMNS * (end - begin); i += blockDim.x) {
            const int c = i % COLUMNS, r = begin + i / COLUMNS;
            if (c >= columns) continue;
            const uint32_t id = ids[r];
            const float x = id < (uint32_t)vocab ? w[(long long)(first + c) * vocab + id] : 0.f;
            y[(long long)r * width + first + c] = from_f<T>(x + b[first + c]);
        }
        return;
    }
    for (int i = threadIdx.x; i < columns * (vocab + 1); i += blockDim.x) {
        const int c = i / (vocab + 1), id = i % (vocab + 1);
        const float x = id < vocab ? w[(long long)(first + c) * vocab + id] : 0.f;
        table[id * STRIDE + c] = from_f<T>(x + b[first + c]);
    }
    __syncthreads();
    if (width % V == 0) {
        // `columns` is a multiple of V too.
        constexpr int PER_ROW = COLUMNS / V;
        const int c = threadIdx.x % PER_ROW * V, step = blockDim.x / PER_ROW;
        if (c >= columns) return;
        for (int r = begin + threadIdx.x / PER_ROW; r < end; r += step) {
            const int id = min(ids[r], (uint32_t)vocab);
            *reinterpret_cast<uint4*>(y + (long long)r * width + first + c) =
                *reinterpret_cast<const uint4*>(table + id * STRIDE + c);
        }
    } else {
        const int c = threadIdx.x % COLUMNS, step = blockDim.x / COLUMNS;
        if (c >= columns) return;
        for (int r = begin + threadIdx.x / COLUMNS; r < end; r += step) {
            const int id = min(ids[r], (uint32_t)vocab);
            y[(long long)r * width + first + c] = table[id * STRIDE + c];
        }
    }
}

// ---- backward

// Row stride of a warp's table: even for pairs, and off the banks' period so that columns of it are read well.
constexpr int TABLE_STRIDE = COLUMNS + 2;
// Rows that a warp loads before it adds them.
constexpr int AHEAD = 16;

// Stage 1. Grid (slabs of rows, D / COLUMNS, ranges of `symbols` symbols); 32 x W threads. Every warp takes chunks
// of 32 rows, in turn with the block's others, and adds them row by row into a table of its own, [symbols,
// TABLE_STRIDE] floats of shared memory; the block's tables are then added in the order of the warps.
// Partial sums part [slabs, D, vocab + 1], the last column for blanks.
template <class T>
__device__ __forceinline__ void backward(const uint32_t* __restrict__ ids, const T* __restrict__ dy,
                                         float* __restrict__ part, int rows, int width, int vocab, int symbols) {
    DYNAMIC_SHARED(memory);
    float* tables = reinterpret_cast<float*>(memory);  // [warps, symbols, TABLE_STRIDE]
    const int warps = blockDim.x / WARP, lane = lane_id(), warp = warp_id();
    const int first = blockIdx.y * COLUMNS, columns = min(COLUMNS, width - first);
    const int low = blockIdx.z * symbols, count = min(symbols, vocab + 1 - low);
    const int slab = ceil_div(ceil_div(rows, (int)gridDim.x), WARP) * WARP;
    const int begin = min((long long)rows, (long long)blockIdx.x * slab), end = min(rows, begin + slab);
    float* table = tables + warp * symbols * TABLE_STRIDE;
    for (int i = lane; i < symbols * TABLE_STRIDE; i += WARP) table[i] = 0.f;
    __syncwarp();

    // Two neighbouring columns a lane where pairs are aligned, else two that are 32 apart.
    const bool pairs = width % 2 == 0 && (reinterpret_cast<size_t>(dy) & (2 * sizeof(T) - 1)) == 0;
    const int c0 = pairs ? 2 * lane : lane, c1 = pairs ? c0 + 1 : c0 + WARP;
    const bool in0 = c0 < columns, in1 = c1 < columns;
    for (int chunk = begin + warp * WARP; chunk < end; chunk += warps * WARP) {
        // Which row of the table; -1 for what is not in it.
        int own = -1;
        if (chunk + lane < end) {
            own = (int)min(ids[chunk + lane], (uint32_t)vocab) - low;
            if (own >= count) own = -1;
        }
        const T* from = dy + (long long)chunk * width + first;
#pragma unroll
        for (int half = 0; half < WARP; half += AHEAD) {
            float x[AHEAD][2];
            int id[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                id[i] = __shfl_sync(FULL, own, half + i);
                const T* row = from + (long long)(half + i) * width;
                x[i][0] = x[i][1] = 0.f;
                if (id[i] >= 0) {
                    if (pairs) {
                        if (in0) load_vec<2>(row + c0, x[i]);
                    } else {
                        if (in0) x[i][0] = to_f(row[c0]);
                        if (in1) x[i][1] = to_f(row[c1]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (id[i] < 0) continue;
                if (pairs) {
                    float2* sum = reinterpret_cast<float2*>(table + id[i] * TABLE_STRIDE + c0);
                    float2 s = *sum;
                    s.x += x[i][0];
                    s.y += x[i][1];
                    *sum = s;
                } else {
                    table[id[i] * TABLE_STRIDE + c0] += x[i][0];
                    table[id[i] * TABLE_STRIDE + c1] += x[i][1];
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < columns * count; i += blockDim.x) {
        const int c = i / count, s = i % count;
        float sum = 0.f;
        for (int w = 0; w < warps; w++) sum += tables[(w * symbols + s) * TABLE_STRIDE + c];
        part[((long long)blockIdx.x * width + first + c) * (vocab + 1) + low + s] = sum;
    }
}

// Stage 2: sums the slabs. Grid D, 128 threads: four warps share the slabs, a lane is a symbol. `add_w`, `add_b`:
// whether to add to what dw [D, vocab] and db [D] hold; either may be null.
extern "C" __global__ void __launch_bounds__(128)
embedding_sum_f32(const float* __restrict__ part, float* __restrict__ dw, float* __restrict__ db, int slabs,
                  int width, int vocab, int add_w, int add_b) {
    constexpr int GROUPS = 4;
    __shared__ float sums[GROUPS][WARP];
    const int d = blockIdx.x, lane = lane_id(), group = warp_id();
    float bias = 0.f;
    for (int v0 = 0; v0 <= vocab; v0 += WARP) {
        const int v = v0 + lane;
        float sum = 0.f;
        if (v <= vocab) {
#pragma unroll 8
            for (int s = group; s < slabs; s += GROUPS) sum += part[((long long)s * width + d) * (vocab + 1) + v];
        }
        sums[group][lane] = sum;
        __syncthreads();
        if (group == 0) {
#pragma unroll
            for (int g = 1; g < GROUPS; g++) sum += sums[g][lane];
            bias += sum;
            if (v < vocab && dw) {
                float* to = dw + (long long)d * vocab + v;
                *to = add_w ? *to + sum : sum;
            }
        }
        __syncthreads();
    }
    if (group == 0) {
        bias = warp_sum(bias);
        if (lane == 0 && db) db[d] = add_b ? db[d] + bias : bias;
    }
}

#define EMBEDDING(T, suffix)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                              \
    embedding_forward_##suffix(const uint32_t* ids, const float* w, const float* b, T* y, int rows, int width,     \
                               int vocab, int tabled) {                                                            \
        forward<T>(ids, w, b, y, rows, width, vocab, tabled);                                                      \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(512)                                                              \
    embedding_backward_##suffix(const uint32_t* ids, const T* dy, float* part, int rows, int width, int vocab,     \
                                int symbols) {                                                                     \
        backward<T>(ids, dy, part, rows, width, vocab, symbols);                                                   \
    }
EMBEDDING(float, f32)
EMBEDDING(bf16, bf16)
