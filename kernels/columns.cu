// Sums over the rows of a matrix, in a fixed order: gradients of biases and norm weights.
//
// Two stages: columns_partial adds the rows of each slab, x [rows, columns] -> partial [slabs, columns] (norms write
// such partial sums themselves); columns_final adds the slabs. All sums in f32.
#include "rows.cuh"

// Slab blockIdx.y of rows, tile blockIdx.x of 2^log_width vectors of columns. The block's 256 threads are
// 256 / 2^log_width rows of threads; thread row r takes rows r, r + R, …, then the thread rows are added.
template <class T, int VEC>
__device__ __forceinline__ void columns_partial(const T* x, float* partial, long long rows, int columns,
                                                int log_width) {
    __shared__ float sums[THREADS * VEC];
    const int width = 1 << log_width, height = THREADS >> log_width;
    const int tx = threadIdx.x & (width - 1), ty = threadIdx.x >> log_width;
    const int c = (blockIdx.x * width + tx) * VEC;
    const long long begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
    float sum[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) sum[i] = 0.f;
    if (c < columns) {
        // Eight loads under way at a time.
        constexpr int AHEAD = 8;
        long long r = begin + ty;
        for (; r + (AHEAD - 1) * height < end; r += AHEAD * height) {
            float part[AHEAD][VEC];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) load_vec<VEC>(x + (r + a * height) * columns + c, part[a]);
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
#pragma unroll
                for (int i = 0; i < VEC; i++) sum[i] += part[a][i];
        }
        for (; r < end; r += height) {
            float part[VEC];
            load_vec<VEC>(x + r * columns + c, part);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[i] += part[i];
        }
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) sums[(ty * width + tx) * VEC + i] = sum[i];
    __syncthreads();
    float* out = partial + (long long)blockIdx.y * columns;
    for (int i = threadIdx.x; i < width * VEC; i += THREADS) {
        const int column = blockIdx.x * width * VEC + i;
        if (column >= columns) break;
        float total = 0.f;
        for (int y = 0; y < height; y++) total += sums[y * width * VEC + i];
        out[column] = total;
    }
}

#define PARTIAL(SUFFIX, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
        columns_partial_##SUFFIX(const T* x, float* partial, long long rows, int columns, int log_width) {     \
        columns_partial<T, VECTOR<T>>(x, partial, rows, columns, log_width);                                   \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
        columns_partial_odd_##SUFFIX(const T* x, float* partial, long long rows, int columns, int log_width) { \
        columns_partial<T, 1>(x, partial, rows, columns, log_width);                                           \
    }

PARTIAL(f32, float)
PARTIAL(bf16, bf16)

// Adds the slabs of partial [slabs, columns]: columns below n go to `first`, the next n to `second`, the rest to `third`;
// where the bit of `add` is set the sums are added to what is there. A null output is not wanted.
// Grid: columns / 32; block: 1,024 threads, 32 columns by 32 slabs.
extern "C" __global__ void __launch_bounds__(1024)
    columns_final(const float* partial, int slabs, int columns, int n, float* first, float* second, float* third,
                  int add) {
    __shared__ float sums[WARP][WARP + 1];
    const int tx = lane_id(), ty = warp_id(), c = blockIdx.x * WARP + tx;
    float sum = 0.f;
    if (c < columns) {
#pragma unroll 8
        for (int s = ty; s < slabs; s += WARP) sum += partial[(long long)s * columns + c];
    }
    sums[ty][tx] = sum;
    __syncthreads();
    // Warp y adds column y.
    const float total = warp_sum(sums[tx][ty]);
    const int column = blockIdx.x * WARP + ty;
    if (tx == 0 && column < columns) {
        const int which = column / n, i = column - which * n;
        float* out = which == 0 ? first : which == 1 ? second : third;
        if (out) out[i] = (add >> which & 1 ? out[i] : 0.f) + total;
    }
}
