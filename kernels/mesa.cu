// The solves of the mesa layer (src/ops/mesa): x_t = (A_t + diag λ)⁻¹ r_t with A ← e^g A + β kᵀ k, λ = softplus
// + 1/4.
//
// The rest of the layer is linear attention: the outputs are gated linear attention of the queries x, the keys
// β k and the values v, and what the solves give back to k, β and g is that of the queries x, the keys β k and
// the values k, with −w for the gradient of the outputs, w = (A + diag λ)⁻¹ dx. kernels/gla.cu does both.
//
// Source: von Oswald et al., "MesaNet: sequence modeling by locally optimal test-time training", 2025, which
// solves by conjugate gradients; here A + diag λ = Σ_j c_j c_jᵀ / c_jj is factored by columns at every token.
#include "common.cuh"

constexpr int BLOCK = 256;
// Threads that have tiles: 16 rows of them and the right side.
constexpr int SOLVERS = 160;

// keys [B T H, K] = β k in the type of the activations, decay [B T H, K] = g, as kernels/gla.cu takes them.
template <class T>
__device__ __forceinline__ void prepare(const T* __restrict__ k, const float* __restrict__ beta,
                                        const float* __restrict__ g, T* __restrict__ keys,
                                        float* __restrict__ decay, long long n, int key) {
    for (long long i = blockIdx.x * (long long)BLOCK + threadIdx.x; i < n; i += gridDim.x * (long long)BLOCK) {
        const long long row = i / key;
        keys[i] = from_f<T>(beta[row] * to_f(k[i]));
        decay[i] = g[row];
    }
}

// ---- A in tiles of S x S in the registers of a block's threads

// The tile of a thread: row and column of tiles, row >= column, by columns; the last of a column, in row `rows`, has the right
// side. Threads behind the last tile have none.
struct Tile {
    int row, column, rows;

    __device__ __forceinline__ Tile(int thread, int rows) : row(thread), column(0), rows(rows) {
        for (; column < rows && row > rows; column++) row -= rows - column;
    }
    __device__ __forceinline__ bool exists() const { return column < rows; }
    __device__ __forceinline__ bool right_side() const { return row == rows; }
    __device__ __forceinline__ bool of_a() const { return exists() && !right_side(); }
};

// A ← decay A + weight k kᵀ. k has zeros behind its end.
template <int S>
__device__ __forceinline__ void add(float (&a)[S][S], const Tile& tile, const float* k, float decay, float weight) {
    float of_row[S], of_column[S];
    load_vec<S>(k + tile.row * S, of_row);
    load_vec<S>(k + tile.column * S, of_column);
#pragma unroll
    for (int r = 0; r < S; r++)
#pragma unroll
        for (int c = 0; c < S; c++) a[r][c] = fmaf(weight * of_row[r], of_column[c], decay * a[r][c]);
}

template <int S>
__device__ __forceinline__ void load_tile(float (&a)[S][S], const Tile& tile, const float* from, int key) {
#pragma unroll
    for (int r = 0; r < S; r++)
#pragma unroll
        for (int c = 0; c < S; c++) {
            const int row = tile.row * S + r, column = tile.column * S + c;
            a[r][c] = from && row < key && column < key ? from[row * key + column] : 0.f;
        }
}

// A, in all of its places or in those on and below the diagonal alone.
template <int S>
__device__ __forceinline__ void store_tile(const float (&a)[S][S], const Tile& tile, float* to, int key, bool all) {
#pragma unroll
    for (int r = 0; r < S; r++)
#pragma unroll
        for (int c = 0; c < S; c++) {
            const int row = tile.row * S + r, column = tile.column * S + c;
            if (row >= key || column > row) continue;
            to[row * key + column] = a[r][c];
            if (all) to[column * key + row] = a[r][c];
        }
}

// Where the solves of a head find A: its steps are shared out among `segments` blocks, `length` steps each.
struct Segments {
    int steps, heads, key, segments, length;
};

// A before every segment but the first, [B H, segments - 1, K, K], on and below the diagonal. Shared memory: 2 SPAN (rows
// S + 2) floats.
constexpr int SPAN = 8;  // steps between barriers
template <class T, int S>
__device__ __forceinline__ void carry(const T* __restrict__ k, const float* __restrict__ beta,
                                      const float* __restrict__ g, const float* __restrict__ start,
                                      float* __restrict__ edges, const Segments& n) {
    DYNAMIC_SHARED(shared);
    const int rows = ceil_div(n.key, S), width = rows * S, tid = threadIdx.x, threads = blockDim.x;
    float* const ks = reinterpret_cast<float*>(shared);     // [2, SPAN, width]
    float* const scalars = ks + 2 * SPAN * width;           // [2, SPAN, 2]: decay, β
    const Tile tile(tid, rows);
    const int b = blockIdx.x / n.heads, h = blockIdx.x % n.heads;
    const long long size = (long long)n.key * n.key;
    const int end = (n.segments - 1) * n.length;
    float a[S][S];
    load_tile(a, tile, start ? start + blockIdx.x * size : nullptr, n.key);
    for (int t0 = 0; t0 < end; t0 += SPAN) {
        float* const own = ks + t0 / SPAN % 2 * SPAN * width;
        float* const own_scalars = scalars + t0 / SPAN % 2 * SPAN * 2;
        for (int i = tid; i < SPAN * width; i += threads) {
            const int t = t0 + i / width, channel = i % width;
            const long long token = ((long long)b * n.steps + t) * n.heads + h;
            own[i] = t < end && channel < n.key ? to_f(k[token * n.key + channel]) : 0.f;
            if (channel == 0 && t < end)
                own_scalars[i / width * 2] = __expf(g[token]), own_scalars[i / width * 2 + 1] = beta[token];
        }
        __syncthreads();
        if (!tile.of_a()) continue;
        for (int step = 0; step < SPAN && t0 + step < end; step++) {
            add(a, tile, own + step * width, own_scalars[step * 2], own_scalars[step * 2 + 1]);
            const int next = t0 + step + 1;
            if (next % n.length == 0)
                store_tile(a, tile, edges + (blockIdx.x * (long long)(n.segments - 1) + next / n.length - 1) * size,
                           n.key, false);
        }
    }
}

// A segment of one head, token by token. rhs, x [B, T, H, K]; start, end [B, H, K, K], start may be null; edges as `carry`
// leaves them. In the backward pass also minus = −x, and with `other` the sums Σ_t x ⊙ other to shares [B, segments, H, K].
//
// Panels of S columns are factored from left to right: the tile on the diagonal by itself, then those below, then all to
// the right take what the panel adds to them. Of the column c_j of the factor, c_j[i] with i >= j is at [j][i] in shared
// memory, where a column has rows S + S numbers: the right side is a further row.
//
// Shared memory, f32: columns [width, width + S] with width = rows S; of width each the inverses of the diagonal, λ, x, and
// twice k and the right side.
template <class T, int S>
__device__ __forceinline__ void solve(const T* __restrict__ k, const float* __restrict__ beta,
                                      const float* __restrict__ g, const float* __restrict__ lambda,
                                      const T* __restrict__ rhs, const float* __restrict__ start,
                                      const float* __restrict__ edges, float* __restrict__ end, T* __restrict__ x,
                                      T* __restrict__ minus, const T* __restrict__ other, float* __restrict__ shares,
                                      const Segments& n) {
    DYNAMIC_SHARED(shared);
    const int rows = ceil_div(n.key, S), width = rows * S, pitch = width + S, tid = threadIdx.x;
    float* const columns = reinterpret_cast<float*>(shared);
    float *const inverses = columns + width * pitch, *const lambdas = inverses + width, *const xs = lambdas + width;
    float* const inputs = xs + width;  // [2, 2, width]: k, right side
    const Tile tile(tid, rows);
    const int head = blockIdx.x / n.segments, segment = blockIdx.x % n.segments, b = head / n.heads, h = head % n.heads;
    const int first = segment * n.length, last = min(first + n.length, n.steps);
    const long long size = (long long)n.key * n.key;
    const float* before = start ? start + head * size : nullptr;
    if (segment > 0) before = edges + (head * (long long)(n.segments - 1) + segment - 1) * size;
    float a[S][S], share = 0.f;
    load_tile(a, tile, before, n.key);
    // Every thread has a channel at most; those behind the last are zeros, and 1 on the diagonal.
    const bool channel = tid < n.key;
    if (tid < width) lambdas[tid] = channel ? softplus(lambda[h * n.key + tid]) + 0.25f : 1.f;
    const auto token_of = [&](int t) { return ((long long)b * n.steps + t) * n.heads + h; };
    for (int t = first; t < last; t++) {
        const long long token = token_of(t);
        float* const ks = inputs + t % 2 * 2 * width;
        if (tid < width) {
            ks[tid] = channel ? to_f(k[token * n.key + tid]) : 0.f;
            ks[width + tid] = channel ? to_f(rhs[token * n.key + tid]) : 0.f;
        }
        __syncthreads();
        float m[S][S];
        if (tile.of_a()) add(a, tile, ks, __expf(g[token]), beta[token]);
#pragma unroll
        for (int r = 0; r < S; r++)
#pragma unroll
            for (int c = 0; c < S; c++) {
                const float right = r == 0 && tile.exists() ? ks[width + tile.column * S + c] : 0.f;
                m[r][c] = tile.right_side() ? right : a[r][c];
                if (r == c && tile.row == tile.column) m[r][c] += lambdas[min(tile.row, rows - 1) * S + r];
            }
        for (int panel = 0; panel < rows; panel++) {
            float* const own = columns + panel * S * pitch;  // of column j: [j pitch]
            if (tile.column == panel && tile.row == panel) {
#pragma unroll
                for (int j = 0; j < S; j++) {
                    const float inverse = 1.f / m[j][j];
                    inverses[panel * S + j] = inverse;
#pragma unroll
                    for (int r = j; r < S; r++) own[j * pitch + panel * S + r] = m[r][j];
#pragma unroll
                    for (int r = j + 1; r < S; r++)
#pragma unroll
                        for (int c = j + 1; c <= r; c++) m[r][c] = fmaf(-m[r][j] * inverse, m[c][j], m[r][c]);
                }
            }
            __syncthreads();
            if (tile.column == panel && tile.row > panel) {
#pragma unroll
                for (int j = 0; j < S; j++) {
                    const float inverse = inverses[panel * S + j];
                    float of_row[S];
#pragma unroll
                    for (int r = 0; r < S; r++) of_row[r] = m[r][j];
                    store_vec<S>(own + j * pitch + tile.row * S, of_row);
#pragma unroll
                    for (int c = j + 1; c < S; c++) {
                        const float diagonal = own[j * pitch + panel * S + c];
#pragma unroll
                        for (int r = 0; r < S; r++) m[r][c] = fmaf(-m[r][j] * inverse, diagonal, m[r][c]);
                    }
                }
            }
            __syncthreads();
            if (tile.column > panel && tile.exists()) {
#pragma unroll
                for (int j = 0; j < S; j++) {
                    const float inverse = inverses[panel * S + j];
                    float of_row[S], of_column[S];
                    load_vec<S>(own + j * pitch + tile.row * S, of_row);
                    load_vec<S>(own + j * pitch + tile.column * S, of_column);
#pragma unroll
                    for (int r = 0; r < S; r++)
#pragma unroll
                        for (int c = 0; c < S; c++) m[r][c] = fmaf(-of_row[r] * inverse, of_column[c], m[r][c]);
                }
            }
        }
        // Backwards in one warp: x_j = z_j / c_jj, then z_i −= c_i[j] x_j for i < j.
        if (tid < WARP) {
            constexpr int MOST = 16 * S / WARP;  // channels of a lane
            float z[MOST];
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                const int own = i * WARP + tid;
                z[i] = own < width ? columns[own * pitch + width] : 0.f;
            }
#pragma unroll
            for (int part = MOST - 1; part >= 0; part--)
                for (int j = min(width, (part + 1) * WARP) - 1; j >= part * WARP; j--) {
                    const float value = __shfl_sync(FULL, z[part], j % WARP) * inverses[j];
#pragma unroll
                    for (int i = 0; i <= part; i++) {
                        const int own = i * WARP + tid;
                        if (own < j) z[i] = fmaf(-columns[own * pitch + j], value, z[i]);
                    }
                    if (tid == j % WARP) xs[j] = value;
                }
        }
        __syncthreads();
        if (channel) {
            x[token * n.key + tid] = from_f<T>(xs[tid]);
            if (minus) minus[token * n.key + tid] = from_f<T>(-xs[tid]);
            if (other) share = fmaf(xs[tid], to_f(other[token * n.key + tid]), share);
        }
    }
    if (other && channel) shares[((b * (long long)n.segments + segment) * n.heads + h) * n.key + tid] = share;
    if (end && segment + 1 == n.segments && tile.of_a())
        store_tile(a, tile, end + head * size, n.key, true);
}

// From the gradients of both attentions, of keys β k (first, second) and of their decays, and of the values k
// of the second: dk = β (first + second) + values, dβ = Σ_K (first + second) k, dg = Σ_K of both. A warp has
// one head of one token.
template <class T>
__device__ __forceinline__ void gather(const T* __restrict__ k, const float* __restrict__ beta,
                                       const T* __restrict__ first, const T* __restrict__ second,
                                       const T* __restrict__ values, const float* __restrict__ decay1,
                                       const float* __restrict__ decay2, T* __restrict__ dk,
                                       float* __restrict__ d_beta, float* __restrict__ dg, int rows, int key) {
    for (int row = blockIdx.x * (BLOCK / WARP) + warp_id(); row < rows; row += gridDim.x * (BLOCK / WARP)) {
        const long long at = (long long)row * key;
        float of_beta = 0.f, of_g = 0.f;
        for (int i = lane_id(); i < key; i += WARP) {
            const float d = to_f(first[at + i]) + to_f(second[at + i]);
            of_beta = fmaf(d, to_f(k[at + i]), of_beta);
            of_g += decay1[at + i] + decay2[at + i];
            dk[at + i] = from_f<T>(fmaf(beta[row], d, to_f(values[at + i])));
        }
        of_beta = warp_sum(of_beta), of_g = warp_sum(of_g);
        if (lane_id() == 0) d_beta[row] = of_beta, dg[row] = of_g;
    }
}

// d_lambda [H K] = −σ(lambda) times the sum of `rows` rows of shares.
extern "C" __global__ void __launch_bounds__(BLOCK)
mesa_lambda(const float* __restrict__ lambda, const float* __restrict__ shares, float* __restrict__ d_lambda,
            int rows, int n) {
    const int i = blockIdx.x * BLOCK + threadIdx.x;
    if (i >= n) return;
    float sum = 0.f;
    for (int b = 0; b < rows; b++) sum += shares[(long long)b * n + i];
    d_lambda[i] = -sigmoid(lambda[i]) * sum;
}

#define SEGMENTS int steps, int heads, int key, int segments, int length
#define SOLVE(NAME, T, S, BLOCKS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(SOLVERS) mesa_carry##S##_##NAME(                                     \
        const T* k, const float* beta, const float* g, const float* start, float* edges, SEGMENTS) {                  \
        carry<T, S>(k, beta, g, start, edges, {steps, heads, key, segments, length});                                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(SOLVERS, BLOCKS) mesa_solve##S##_##NAME(                             \
        const T* k, const float* beta, const float* g, const float* lambda, const T* rhs, const float* start,         \
        const float* edges, float* end, T* x, T* minus, const T* other, float* shares, SEGMENTS) {                    \
        solve<T, S>(k, beta, g, lambda, rhs, start, edges, end, x, minus, other, shares,                              \
                    {steps, heads, key, segments, length});                                                           \
    }
// mesa_prepare_*, mesa_gather_*: any grid, 256 threads. mesa_carry4_* (K <= 64), mesa_carry8_* (K <= 128): grid B H,
// mesa_solve4_*, mesa_solve8_*: grid B H segments; as many threads as there are tiles, SOLVERS at most, in whole warps.
#define KERNELS(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK) mesa_prepare_##NAME(                                          \
        const T* k, const float* beta, const float* g, T* keys, float* decay, long long n, int key) {                 \
        prepare<T>(k, beta, g, keys, decay, n, key);                                                                  \
    }                                                                                                                 \
    SOLVE(NAME, T, 4, 5)                                                                                              \
    SOLVE(NAME, T, 8, 2)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK) mesa_gather_##NAME(                                           \
        const T* k, const float* beta, const T* first, const T* second, const T* values, const float* decay1,         \
        const float* decay2, T* dk, float* d_beta, float* dg, int rows, int key) {                                    \
        gather<T>(k, beta, first, second, values, decay1, decay2, dk, d_beta, dg, rows, key);                         \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)
