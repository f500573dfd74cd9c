// Causal softmax attention: o = softmax(scale · q kᵀ + mask) v per head, and its gradients.
//
//   q [B, T, H, D], k [B, S, H, D], v [B, S, H, V] with S >= T; o [B, T, H, V]. Query t sees the keys 0 ..= S−T+t, of
//   them the last `window`, which is S where none is left out.
//   A sequence of any of them has less than 2³¹ elements.
//   lse [B, H, T4]: log₂ of every query's sum of exponentials; delta [B, H, T4]: rowsum(do ⊙ o). T4 is T rounded up
//   to a multiple of 4, so that a tile of either starts at 16 bytes.
//
// Source: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
//
// With log forget gates g [B, S, H] a score also has what was forgotten since its key, the sum of g behind it. Source:
// Lin et al., "Forgetting transformer: softmax attention with a forget gate", 2025. With c the sums of log₂ f up to a
// timestep this is c_i − c_j. c reaches thousands where its differences must be right to 1e-6: it is summed in f64 and
// held as two floats, hi + lo, of which a warp takes the difference to its first row before it takes that of a pair.
// What is lost there is relative to the difference itself: it shows where the pair counts for nothing. Gradients:
// dc_i = Σ_j ds_ij − Σ_j ds_ji, and dg_t is the sum of dc from t on.
//   sums [B, H, 2, N4]: hi, then lo, of the N queries (T) or keys (S); rows [B, H, T4], columns [B, H, S4]: Σ_j ds of a
//   query, Σ_i ds of a key. S4 is S rounded up as T is.
//
// attention_forward  a block has one head of a tile of queries and walks over the tiles of keys that they see: scores,
//                    running maximum m and sum l, o ← o·2^(m−m') + p v. Exponentials are powers of two of scores
//                    times scale · log₂ e.
// attention_dq       the same walk: p = 2^(s−lse), ds = p ⊙ (do vᵀ − delta), dq += ds k. Writes delta first.
// attention_dkdv     a block has a tile of keys and walks over the queries that see them, with transposed scores:
//                    dv += pᵀ do, dk += dsᵀ q. Needs delta: runs after attention_dq. Wide heads in bf16 have two
//                    warps to the same keys (backward_kv_pairs).
//
// Every warp owns 16·MT rows of the result and has their scores in registers, where they are already laid out as the
// left operand of the next product: but for the pairs, only operands pass through shared memory. Gradients are sums of
// one warp in one order, at the price of forming the scores twice. Head dims are padded with zeros to DP, in shared
// memory only. Tiles of keys or queries stream through two buffers by cp.async.
//
// attention_forget_sums      c of the queries and of the keys, from g. A block has a head.
// attention_forget_gradient  dg from the sums of ds, in f64 too.
//
// attention_sm90a.cu has the same for bf16 on Hopper, where head dims are close to 64 or 128.
//
// Entry points: attention_<forward|dq|dkdv>_<DP>_<bf16|tf32|f32>; grid.x = tiles · B·H, block 32·warps. And with forget
// gates forgetting_<forward|dq|dkdv>_.. of the same grids.
#include "mma.cuh"

// Waits for the other warp of a pair.
__device__ __forceinline__ void pair_barrier(int pair) {
#ifdef SB_EMULATE
    emu::named_barrier(1 + pair, 2 * WARP);
#else
    asm volatile("bar.sync %0, 64;" ::"r"(1 + pair) : "memory");
#endif
}

// Tile sizes of a kernel: every one of WARPS warps owns 16·MT rows; OTHER rows of the walked-over tensors at a time.
template <int MT_, int WARPS_, int OTHER_>
struct Tile {
    static constexpr int MT = MT_, WARPS = WARPS_, OTHER = OTHER_, OWN = 16 * MT * WARPS, THREADS = WARP * WARPS;
};

// Copies tiles of ROWS rows of one head, one after the other, to tiles of shared memory with DP columns; rows outside
// 0..count and columns past `dim` as zeros. A thread always has the same columns, so that a tile costs it little more
// than the copies.
template <class T, int DP, int LD, int ROWS, int THREADS>
struct Copy {
    static constexpr int V = 16 / sizeof(T), PER_ROW = DP / V, STEP = THREADS / PER_ROW;
    const T* g;
    int ldg, row, at, count, dim;
    bool vector;  // rows begin at 16 bytes

    __device__ __forceinline__ static int r() { return threadIdx.x / PER_ROW; }
    __device__ __forceinline__ static int c() { return threadIdx.x % PER_ROW * V; }
    __device__ __forceinline__ Copy(const T* g, int ldg, int first, int count, int dim)
        : g(g), ldg(ldg), row(first), count(count), dim(dim),
          vector(dim % V == 0 && reinterpret_cast<size_t>(g) % 16 == 0) {
        if (vector) row += r();
        at = row * ldg + (vector ? c() : 0);
        if (vector && c() >= dim) this->count = 0;
    }
    // Starts to copy the next tile.
    __device__ __forceinline__ void operator()(T* s) {
        if (vector) {
            if (THREADS % PER_ROW == 0 || r() < STEP) {
                T* const to = s + r() * LD + c();
#pragma unroll
                for (int i = 0; i < ROWS; i += STEP)
                    // Where nothing is read, the address does not matter.
                    if (ROWS % STEP == 0 || r() + i < ROWS)
                        cp_async16(to + i * LD, g + at + i * ldg, (unsigned)(row + i) < (unsigned)count ? 16 : 0);
            }
        } else {
            for (int i = threadIdx.x; i < ROWS * DP; i += THREADS) {
                const int y = i / DP, x = i % DP;
                const bool inside = (unsigned)(row + y) < (unsigned)count && x < dim;
                s[y * LD + x] = inside ? g[at + y * ldg + x] : from_f<T>(0.f);
            }
        }
        row += ROWS, at += ROWS * ldg;
    }
};

// Starts copying `N` floats from `first` on, a multiple of 4, those past `count` as zeros.
template <int N>
__device__ __forceinline__ void copy_floats(float* s, const float* g, int first, int count) {
    for (int i = 4 * threadIdx.x; i < N; i += 4 * blockDim.x) {
        const int left = min(max(count - first - i, 0), 4);
        cp_async16(s + i, left > 0 ? g + first + i : g, 4 * left);
    }
}

// Writes a warp's 16·MT rows of accumulators times `scale[mt][half]`, through its own rows of shared memory `s`, to
// the rows first .. of one head that lie in 0..count.
template <class T, int LD, int MT, int NT>
__device__ __forceinline__ void store_rows(T* s, T* g, int ldg, int first, int count, int dim, bool vector,
                                           const float (&acc)[MT][NT][4], const float (&scale)[MT][2]) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float pair[2] = {acc[i][j][2 * half] * scale[i][half], acc[i][j][2 * half + 1] * scale[i][half]};
                store_vec<2>(s + acc_row(i, 2 * half) * LD + acc_col(j, 0), pair);
            }
    __syncwarp();
    if (vector) {
        constexpr int V = 16 / sizeof(T);
        const int per_row = dim / V;
        for (int i = lane_id(); i < 16 * MT * per_row; i += WARP) {
            const int r = i / per_row, c = i % per_row * V, row = first + r;
            if (row >= 0 && row < count)
                *reinterpret_cast<uint4*>(g + row * ldg + c) = *reinterpret_cast<const uint4*>(s + r * LD + c);
        }
    } else {
        for (int r = 0; r < 16 * MT; r++) {
            const int row = first + r;
            if (row >= 0 && row < count)
                for (int c = lane_id(); c < dim; c += WARP) g[row * ldg + c] = s[r * LD + c];
        }
    }
}

// A warp's rows of a left operand in shared memory, with KEEP in registers.
template <class R, int DP, int LD, int MT, bool KEEP>
struct Rows {
    const typename R::elem* s;
    __device__ __forceinline__ explicit Rows(const typename R::elem* rows) : s(rows) {}
    // acc += rows · tᵀ
    template <int NT>
    __device__ __forceinline__ void times(float (&acc)[MT][NT][4], const typename R::elem* t) const {
        warp_gemm<R, AlongK, AlongK, MT, NT>(acc, s, LD, t, LD, DP);
    }
};
template <int DP, int LD, int MT, bool KEEP>
struct Rows<Bf16, DP, LD, MT, KEEP> {
    const bf16* s;
    uint32_t kept[KEEP ? DP / 16 : 1][MT][4];
    __device__ __forceinline__ static int up() { return lane_id() / 8 % 2 * 8; }
    __device__ __forceinline__ static int half() { return lane_id() / 16 * 8; }
    __device__ __forceinline__ explicit Rows(const bf16* rows) : s(rows + (lane_id() % 8 + up()) * LD + half()) {
        if constexpr (KEEP)
#pragma unroll
            for (int k = 0; k < DP / 16; k++) load(kept[k], k);
    }
    __device__ __forceinline__ void load(uint32_t (&a)[MT][4], int k) const {
#pragma unroll
        for (int i = 0; i < MT; i++) ldmatrix_x4(a[i], s + 16 * i * LD + 16 * k);
    }
    template <int NT>
    __device__ __forceinline__ void times(float (&acc)[MT][NT][4], const bf16* t) const {
        static_assert(NT % 2 == 0);
        t += (lane_id() % 8 + half()) * LD + up();
#pragma unroll
        for (int k = 0; k < DP / 16; k++) {
            uint32_t loaded[MT][4];
            if constexpr (!KEEP) load(loaded, k);
            const auto& a = KEEP ? kept[KEEP ? k : 0] : loaded;
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, t + 8 * j * LD + 16 * k);
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_bf16(acc[i][j], a[i], b0);
                    mma_bf16(acc[i][j + 1], a[i], b1);
                }
            }
        }
    }
};

// One head of a tensor [B, rows, H, dim].
template <class T>
__device__ __forceinline__ T* head_of(T* x, int bh, int rows, int heads, int dim) {
    return x + ((long long)(bh / heads) * rows * heads + bh % heads) * dim;
}
template <class T>
__device__ __forceinline__ bool aligned(const T* x, int dim) {
    return dim * sizeof(T) % 16 == 0 && (reinterpret_cast<size_t>(x) & 15) == 0;
}

// What forget gates add to a kernel; all null without.
struct Forget {
    const float *queries, *keys;  // sums
    float *rows, *columns;
};

// The sums of one head.
struct Sums {
    const float *hi, *lo;
    __device__ __forceinline__ Sums(const float* sums, int bh, int n)
        : hi(sums + (long long)bh * 2 * (ceil_div(n, 4) * 4)), lo(hi + ceil_div(n, 4) * 4) {}
};

// A timestep that others are seen from.
struct From {
    float hi, lo;
    __device__ __forceinline__ From(const Sums& sums, int at) : hi(sums.hi[at]), lo(sums.lo[at]) {}
    __device__ __forceinline__ float to(float other_hi, float other_lo) const {
        return (other_hi - hi) + (other_lo - lo);
    }
    __device__ __forceinline__ float to(const Sums& sums, int at) const { return to(sums.hi[at], sums.lo[at]); }
    // The elements at..at+1 of a tile in shared memory: N of hi, then N of lo.
    template <int N>
    __device__ __forceinline__ void to_tile(const float* tile, int at, float (&out)[2]) const {
        float highs[2], lows[2];
        load_vec<2>(tile + at, highs);
        load_vec<2>(tile + N + at, lows);
        out[0] = to(highs[0], lows[0]), out[1] = to(highs[1], lows[1]);
    }
};

// Starts copying the sums of N timesteps from `first` on to such a tile.
template <int N>
__device__ __forceinline__ void copy_sums(float* tile, const Sums& sums, int first, int count) {
    copy_floats<N>(tile, sums.hi, first, count);
    copy_floats<N>(tile + N, sums.lo, first, count);
}

// Writes the sums over columns of a warp's 16·MT rows, of which a lane has a part, to those that lie in 0..count.
template <int MT>
__device__ __forceinline__ void store_sums(float* to, int first, int count, float (&sums)[MT][2]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sums[i][half] += __shfl_xor_sync(FULL, sums[i][half], 1);
            sums[i][half] += __shfl_xor_sync(FULL, sums[i][half], 2);
            const int row = first + acc_row(i, 2 * half);
            if (lane_id() % 4 == 0 && row >= 0 && row < count) to[row] = sums[i][half];
        }
}

struct Sizes {
    int steps, keys, heads, dim, values, window;
    // The first tile of BN keys that a query from `q` on sees.
    __device__ __forceinline__ int first_block(int q, int bn) const {
        const int key = keys - steps + q + 1 - window;
        return key > 0 ? key / bn : 0;
    }
    // The end of the tiles of BM queries that see a key before `end`.
    __device__ __forceinline__ int end_block(int end, int bm) const {
        const int query = min(end - 1 + window - 1 - (keys - steps), steps - 1);
        return query >= 0 ? query / bm + 1 : 0;
    }
};

// ---- forward

template <class R, int DP, class Tile, bool FORGETS>
__device__ __forceinline__ void forward(const typename R::elem* q, const typename R::elem* k,
                                        const typename R::elem* v, typename R::elem* o, float* lse, Forget forget,
                                        Sizes n, float scale) {
    using T = typename R::elem;
    constexpr int LD = DP + Pad<R>::K, LDV = DP + Pad<R>::MN, MT = Tile::MT, BM = Tile::OWN, BN = Tile::OTHER;
    constexpr int NT = BN / 8, THREADS = Tile::THREADS;
    DYNAMIC_SHARED(shared);
    T* const qs = reinterpret_cast<T*>(shared);  // [BM, LDV]; the output passes through it
    T* const ks = qs + BM * LDV;                 // two of [BN, LD]
    T* const vs = ks + 2 * BN * LD;              // two of [BN, LDV]
    float* const sums = reinterpret_cast<float*>(vs + 2 * BN * LDV);  // two of [2, BN], with forget gates

    // Tiles are counted from the end, the longest first: the ragged one is the one that sees the fewest keys.
    const int tiles = ceil_div(n.steps, BM), bh = blockIdx.x / tiles;
    const int q0 = n.steps - BM * (int)(blockIdx.x % tiles + 1), past = n.keys - n.steps;
    const int w0 = q0 + 16 * MT * warp_id();
    q = head_of(q, bh, n.steps, n.heads, n.dim), k = head_of(k, bh, n.keys, n.heads, n.dim);
    v = head_of(v, bh, n.keys, n.heads, n.values), o = head_of(o, bh, n.steps, n.heads, n.values);
    const int ld = n.heads * n.dim, ldv = n.heads * n.values;

    const int first = n.first_block(q0, BN);
    Copy<T, DP, LD, BN, THREADS> copy_k(k, ld, first * BN, n.keys, n.dim);
    Copy<T, DP, LDV, BN, THREADS> copy_v(v, ldv, first * BN, n.keys, n.values);
    const Sums of_queries(forget.queries, bh, n.steps), of_keys(forget.keys, bh, n.keys);
    const auto copy = [&](int block) {
        copy_k(ks + block % 2 * BN * LD);
        copy_v(vs + block % 2 * BN * LDV);
        if constexpr (FORGETS) copy_sums<BN>(sums + block % 2 * 2 * BN, of_keys, block * BN, n.keys);
        cp_async_commit();
    };
    Copy<T, DP, LD, BM, THREADS>(q, ld, q0, n.steps, n.dim)(qs);
    copy(first);
    cp_async_wait<0>();
    __syncthreads();
    const Rows<R, DP, LD, MT, DP <= 64> rows(qs + 16 * MT * warp_id() * LD);

    float acc[MT][DP / 8][4], max[MT][2], sum[MT][2];
    zero(acc);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) max[i][half] = -INFINITY, sum[i][half] = 0.f;

    const float log2_scale = scale * LOG2E, c = FORGETS ? 1.f : log2_scale;
    const int end = w0 + 16 * MT > 0 ? past + w0 + 16 * MT : 0;  // keys that the warp's last query sees
    const int blocks = ceil_div(past + q0 + BM, BN);
    const int low = past + w0 - n.window;  // the last key that the warp's first query does not see any more
    // Of the warp's queries, seen from the first.
    float row_sum[MT][2];
    const int row0 = w0 > 0 ? w0 : 0;
    if constexpr (FORGETS) {
        const From from(of_queries, row0);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = w0 + acc_row(i, 2 * half);
                row_sum[i][half] = from.to(of_queries, row > 0 ? row : 0);
            }
    }
    for (int block = first; block < blocks; block++) {
        cp_async_wait<0>();
        __syncthreads();  // the block's keys are here, and nobody reads the other buffer any more
        if (block + 1 < blocks) copy(block + 1);
        const int k0 = block * BN;
        if (k0 >= end || k0 + BN - 1 <= low) continue;

        float s[MT][NT][4];
        zero(s);
        rows.times(s, ks + block % 2 * BN * LD);
        if constexpr (FORGETS) {
            const From from(of_queries, row0);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                float key_sum[2];
                from.template to_tile<BN>(sums + block % 2 * 2 * BN, acc_col(j, 0), key_sum);
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[i][j][e] = fmaf(s[i][j][e], log2_scale, row_sum[i][e / 2] - key_sum[e % 2]);
            }
        }
        if (k0 + BN > past + w0 + 1 || k0 < low + 16 * MT) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = k0 + acc_col(j, e), row = acc_row(i, e);
                        // Rows before the first query keep a key, so that they stay finite; nobody sees them.
                        if (key > (past + w0 + row > 0 ? past + w0 + row : 0) || key <= low + row)
                            s[i][j][e] = -INFINITY;
                    }
        }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float top = max[i][half];
#pragma unroll
                for (int j = 0; j < NT; j++) top = fmaxf(top, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
                // A row whose window begins behind this tile has no score yet.
                const float base = top == -INFINITY ? 0.f : top;
                const float old = exp2_fast((max[i][half] - base) * c), shift = base * c;
                max[i][half] = top;
                float part = 0.f;
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], c, -shift));
                        part += s[i][j][e];
                    }
                sum[i][half] = fmaf(sum[i][half], old, part);
#pragma unroll
                for (int j = 0; j < DP / 8; j++) acc[i][j][2 * half] *= old, acc[i][j][2 * half + 1] *= old;
            }
        warp_gemm_acc<R, AlongMN>(acc, s, vs + block % 2 * BN * LDV, LDV);
    }

    float inverse[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[i][half];
            total += __shfl_xor_sync(FULL, total, 1);
            total += __shfl_xor_sync(FULL, total, 2);
            inverse[i][half] = 1.f / total;
            const int row = w0 + acc_row(i, 2 * half);
            if (lse && lane_id() % 4 == 0 && row >= 0)
                lse[(long long)bh * ceil_div(n.steps, 4) * 4 + row] = fmaf(max[i][half], c, log2f(total));
        }
    // Rows of q and of o differ in their stride (f32 only): wait for the other warps' reads of q.
    if (LD != LDV) __syncthreads();
    store_rows<T, LDV>(qs + 16 * MT * warp_id() * LDV, o, ldv, w0, n.steps, n.values, aligned(o, n.values), acc, inverse);
}

// ---- backward

// delta = rowsum(do ⊙ o) of a warp's rows, `dos` in shared memory; eight lanes a row.
template <class T, int LD, int ROWS>
__device__ __forceinline__ void row_deltas(float* delta, const T* dos, const T* o, int ldg, int first, int count,
                                           int dim, bool vector) {
    constexpr int V = 16 / sizeof(T);
#pragma unroll 4
    for (int r0 = 0; r0 < ROWS; r0 += WARP / 8) {
        const int r = r0 + lane_id() / 8, row = first + r;
        float sum = 0.f;
        if (row >= 0 && row < count) {
            const T* const from = o + row * ldg;
            if (vector) {
                for (int c = lane_id() % 8 * V; c < dim; c += 8 * V) {
                    float x[V], y[V];
                    load_vec<V>(from + c, x);
                    load_vec<V>(dos + r * LD + c, y);
#pragma unroll
                    for (int i = 0; i < V; i++) sum = fmaf(x[i], y[i], sum);
                }
            } else {
                for (int c = lane_id() % 8; c < dim; c += 8) sum = fmaf(to_f(from[c]), to_f(dos[r * LD + c]), sum);
            }
        }
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) sum += __shfl_xor_sync(FULL, sum, offset);
        if (lane_id() % 8 == 0) delta[r] = sum;
    }
    __syncwarp();
}

template <class R, int DP, class Tile, bool FORGETS>
__device__ __forceinline__ void backward_q(const typename R::elem* q, const typename R::elem* k,
                                           const typename R::elem* v, const typename R::elem* o, const float* lse,
                                           const typename R::elem* dout, float* delta, typename R::elem* dq,
                                           Forget forget, Sizes n, float scale) {
    using T = typename R::elem;
    constexpr int LD = DP + Pad<R>::K, MT = Tile::MT, BM = Tile::OWN, BN = Tile::OTHER;
    constexpr int NT = BN / 8, THREADS = Tile::THREADS;
    DYNAMIC_SHARED(shared);
    T* const qs = reinterpret_cast<T*>(shared);                        // [BM, LD]
    T* const dos = qs + BM * LD;                                       // [BM, LD]
    T* const ks = dos + BM * LD;                                       // two of [BN, LD]
    T* const vs = ks + 2 * BN * LD;                                    // two of [BN, LD]
    float* const deltas = reinterpret_cast<float*>(vs + 2 * BN * LD);  // [BM]
    float* const sums = deltas + BM;                                   // two of [2, BN], with forget gates

    const int tiles = ceil_div(n.steps, BM), bh = blockIdx.x / tiles;
    const int q0 = n.steps - BM * (int)(blockIdx.x % tiles + 1), past = n.keys - n.steps;
    const int own = 16 * MT * warp_id(), w0 = q0 + own;
    q = head_of(q, bh, n.steps, n.heads, n.dim), k = head_of(k, bh, n.keys, n.heads, n.dim);
    v = head_of(v, bh, n.keys, n.heads, n.values), o = head_of(o, bh, n.steps, n.heads, n.values);
    dout = head_of(dout, bh, n.steps, n.heads, n.values), dq = head_of(dq, bh, n.steps, n.heads, n.dim);
    lse += (long long)bh * ceil_div(n.steps, 4) * 4, delta += (long long)bh * ceil_div(n.steps, 4) * 4;
    const int ld = n.heads * n.dim, ldv = n.heads * n.values;

    const int first = n.first_block(q0, BN);
    Copy<T, DP, LD, BN, THREADS> copy_k(k, ld, first * BN, n.keys, n.dim), copy_v(v, ldv, first * BN, n.keys, n.values);
    const Sums of_queries(forget.queries, bh, n.steps), of_keys(forget.keys, bh, n.keys);
    const auto copy = [&](int block) {
        copy_k(ks + block % 2 * BN * LD);
        copy_v(vs + block % 2 * BN * LD);
        if constexpr (FORGETS) copy_sums<BN>(sums + block % 2 * 2 * BN, of_keys, block * BN, n.keys);
        cp_async_commit();
    };
    Copy<T, DP, LD, BM, THREADS>(dout, ldv, q0, n.steps, n.values)(dos);
    cp_async_commit();
    Copy<T, DP, LD, BM, THREADS>(q, ld, q0, n.steps, n.dim)(qs);
    copy(first);
    cp_async_wait<1>();
    __syncthreads();
    row_deltas<T, LD, 16 * MT>(deltas + own, dos + own * LD, o, ldv, w0, n.steps, n.values,
                               aligned(o, n.values) && aligned(dos, n.values));
    for (int r = lane_id(); r < 16 * MT; r += WARP)
        if (w0 + r >= 0) delta[w0 + r] = deltas[own + r];

    float row_lse[MT][2], row_delta[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = acc_row(i, 2 * half);
            row_lse[i][half] = w0 + r >= 0 ? lse[w0 + r] : 0.f;
            row_delta[i][half] = deltas[own + r];
        }
    // Of the warp's queries, seen from the first, and less lse; what ds sums up to.
    float row_sum[MT][2], row_ds[MT][2];
    const int row0 = max(w0, 0);
    if constexpr (FORGETS) {
        const From from(of_queries, row0);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = max(w0 + acc_row(i, 2 * half), 0);
                row_sum[i][half] = from.to(of_queries, row) - row_lse[i][half];
                row_ds[i][half] = 0.f;
            }
    }
    cp_async_wait<0>();
    __syncthreads();
    const Rows<R, DP, LD, MT, DP * MT <= 64> q_rows(qs + own * LD), do_rows(dos + own * LD);

    float acc[MT][DP / 8][4];
    zero(acc);
    const float c = scale * LOG2E;
    const int end = w0 + 16 * MT > 0 ? past + w0 + 16 * MT : 0;
    const int blocks = ceil_div(past + q0 + BM, BN);
    const int low = past + w0 - n.window;
    for (int block = first; block < blocks; block++) {
        cp_async_wait<0>();
        __syncthreads();
        if (block + 1 < blocks) copy(block + 1);
        const int k0 = block * BN;
        if (k0 >= end || k0 + BN - 1 <= low) continue;

        const T* const kt = ks + block % 2 * BN * LD;
        const T* const vt = vs + block % 2 * BN * LD;
        float s[MT][NT][4], ds[MT][NT][4];
        zero(s);
        q_rows.times(s, kt);
        zero(ds);
        do_rows.times(ds, vt);
        if (k0 + BN > past + w0 + 1 || k0 < low + 16 * MT || w0 < 0) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = k0 + acc_col(j, e), row = acc_row(i, e);
                        if (key > past + w0 + row || key <= low + row || w0 + row < 0) s[i][j][e] = -INFINITY;
                    }
        }
        if constexpr (FORGETS) {
            const From from(of_queries, row0);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                float key_sum[2];
                from.template to_tile<BN>(sums + block % 2 * 2 * BN, acc_col(j, 0), key_sum);
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], c, row_sum[i][e / 2] - key_sum[e % 2])) *
                                     (ds[i][j][e] - row_delta[i][e / 2]);
                        row_ds[i][e / 2] += s[i][j][e];
                    }
            }
        } else {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], c, -row_lse[i][e / 2])) *
                                     (ds[i][j][e] - row_delta[i][e / 2]);
        }
        warp_gemm_acc<R, AlongMN>(acc, s, kt, LD);
    }
    if constexpr (FORGETS)
        store_sums(forget.rows + (long long)bh * ceil_div(n.steps, 4) * 4, w0, n.steps, row_ds);
    float scales[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) scales[i][0] = scales[i][1] = scale;
    store_rows<T, LD>(qs + own * LD, dq, ld, w0, n.steps, n.dim, aligned(dq, n.dim), acc, scales);
}

template <class R, int DP, class Tile, bool FORGETS>
__device__ __forceinline__ void backward_kv(const typename R::elem* q, const typename R::elem* k,
                                            const typename R::elem* v, const float* lse, const typename R::elem* dout,
                                            const float* delta, typename R::elem* dk, typename R::elem* dv,
                                            Forget forget, Sizes n, float scale) {
    using T = typename R::elem;
    constexpr int LD = DP + Pad<R>::K, MT = Tile::MT, BN = Tile::OWN, BM = Tile::OTHER;
    constexpr int NT = BM / 8, THREADS = Tile::THREADS;
    DYNAMIC_SHARED(shared);
    T* const ks = reinterpret_cast<T*>(shared);                      // [BN, LD]
    T* const vs = ks + BN * LD;                                      // [BN, LD]
    T* const qs = vs + BN * LD;                                      // two of [BM, LD]
    T* const dos = qs + 2 * BM * LD;                                 // two of [BM, LD]
    float* const lses = reinterpret_cast<float*>(dos + 2 * BM * LD);  // two of [BM]
    float* const deltas = lses + 2 * BM;                             // two of [BM]
    float* const sums = deltas + 2 * BM;                             // two of [2, BM], with forget gates

    const int tiles = ceil_div(n.keys, BN), bh = blockIdx.x / tiles;
    const int k0 = BN * (int)(blockIdx.x % tiles), past = n.keys - n.steps;
    const int own = 16 * MT * warp_id(), w0 = k0 + own;
    q = head_of(q, bh, n.steps, n.heads, n.dim), k = head_of(k, bh, n.keys, n.heads, n.dim);
    v = head_of(v, bh, n.keys, n.heads, n.values), dout = head_of(dout, bh, n.steps, n.heads, n.values);
    dk = head_of(dk, bh, n.keys, n.heads, n.dim), dv = head_of(dv, bh, n.keys, n.heads, n.values);
    lse += (long long)bh * ceil_div(n.steps, 4) * 4, delta += (long long)bh * ceil_div(n.steps, 4) * 4;
    const int ld = n.heads * n.dim, ldv = n.heads * n.values;

    // From the tile of the first query that sees the first key.
    const int first = (k0 > past ? k0 - past : 0) / BM, blocks = n.end_block(k0 + BN, BM);
    Copy<T, DP, LD, BM, THREADS> copy_q(q, ld, first * BM, n.steps, n.dim);
    Copy<T, DP, LD, BM, THREADS> copy_do(dout, ldv, first * BM, n.steps, n.values);
    const Sums of_queries(forget.queries, bh, n.steps), of_keys(forget.keys, bh, n.keys);
    const auto copy = [&](int block) {
        const int buffer = block % 2;
        copy_q(qs + buffer * BM * LD);
        copy_do(dos + buffer * BM * LD);
        copy_floats<BM>(lses + buffer * BM, lse, block * BM, n.steps);
        copy_floats<BM>(deltas + buffer * BM, delta, block * BM, n.steps);
        if constexpr (FORGETS) copy_sums<BM>(sums + buffer * 2 * BM, of_queries, block * BM, n.steps);
        cp_async_commit();
    };
    Copy<T, DP, LD, BN, THREADS>(k, ld, k0, n.keys, n.dim)(ks);
    Copy<T, DP, LD, BN, THREADS>(v, ldv, k0, n.keys, n.values)(vs);
    copy(first);
    cp_async_wait<0>();
    __syncthreads();
    const Rows<R, DP, LD, MT, DP * MT <= 64> k_rows(ks + own * LD), v_rows(vs + own * LD);

    float acc_k[MT][DP / 8][4], acc_v[MT][DP / 8][4];
    zero(acc_k);
    zero(acc_v);
    const float c = scale * LOG2E;
    // Of the warp's keys, seen from the first; what their ds sums up to.
    float row_sum[MT][2], row_ds[MT][2];
    const int row0 = min(w0, n.keys - 1);
    if constexpr (FORGETS) {
        const From from(of_keys, row0);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                row_sum[i][half] = from.to(of_keys, min(w0 + acc_row(i, 2 * half), n.keys - 1));
                row_ds[i][half] = 0.f;
            }
    }
    for (int block = first; block < blocks; block++) {
        cp_async_wait<0>();
        __syncthreads();
        if (block + 1 < blocks) copy(block + 1);
        const int q0 = block * BM;
        // No query of the tile sees a key of this warp.
        if (past + q0 + BM <= w0 || past + q0 >= w0 + 16 * MT - 1 + n.window) continue;

        const T* const qt = qs + block % 2 * BM * LD;
        const T* const dot = dos + block % 2 * BM * LD;
        const float* const tile_lse = lses + block % 2 * BM;
        const float* const tile_delta = deltas + block % 2 * BM;
        float p[MT][NT][4], ds[MT][NT][4];
        zero(p);
        k_rows.times(p, qt);
        zero(ds);
        v_rows.times(ds, dot);
        if (past + q0 < w0 + 16 * MT - 1 || q0 + BM > n.steps || past + q0 + BM > w0 + n.window) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int t = q0 + acc_col(j, e), back = past + t - (w0 + acc_row(i, e));
                        if (back < 0 || back >= n.window || t >= n.steps) p[i][j][e] = -INFINITY;
                    }
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float of_lse[2], of_delta[2];
            load_vec<2>(tile_lse + acc_col(j, 0), of_lse);
            load_vec<2>(tile_delta + acc_col(j, 0), of_delta);
            float of_sum[2];
            if constexpr (FORGETS) {
                From(of_keys, row0).template to_tile<BM>(sums + block % 2 * 2 * BM, acc_col(j, 0), of_sum);
                of_sum[0] -= of_lse[0], of_sum[1] -= of_lse[1];
            }
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float rest = FORGETS ? of_sum[e % 2] - row_sum[i][e / 2] : -of_lse[e % 2];
                    p[i][j][e] = exp2_fast(fmaf(p[i][j][e], c, rest));
                    ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - of_delta[e % 2]);
                    if constexpr (FORGETS) row_ds[i][e / 2] += ds[i][j][e];
                }
        }
        warp_gemm_acc<R, AlongMN>(acc_v, p, dot, LD);
        warp_gemm_acc<R, AlongMN>(acc_k, ds, qt, LD);
    }
    if constexpr (FORGETS) store_sums(forget.columns + (long long)bh * ceil_div(n.keys, 4) * 4, w0, n.keys, row_ds);
    float scales[MT][2], ones[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) scales[i][0] = scales[i][1] = scale, ones[i][0] = ones[i][1] = 1.f;
    store_rows<T, LD>(ks + own * LD, dk, ld, w0, n.keys, n.dim, aligned(dk, n.dim), acc_k, scales);
    store_rows<T, LD>(vs + own * LD, dv, ldv, w0, n.keys, n.values, aligned(dv, n.values), acc_v, ones);
}

// attention_dkdv for wide heads in bf16. A warp's dk and dv of 32 keys do not fit in registers, and with 16 keys a warp
// reads shared memory more than it multiplies. So two warps share 32 keys: each forms the scores of half of the queries,
// gives them to the other as bf16, and owns half of the columns of dk and dv.
template <int DP, class Tile, bool FORGETS>
__device__ __forceinline__ void backward_kv_pairs(const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                                  const bf16* dout, const float* delta, bf16* dk, bf16* dv,
                                                  Forget forget, Sizes n, float scale) {
    constexpr int LD = DP + Pad<Bf16>::K, MT = 2, BN = Tile::OWN, BM = Tile::OTHER, THREADS = Tile::THREADS;
    constexpr int HALF = BM / 2, NT = HALF / 8, COLUMNS = DP / 2;
    static_assert(Tile::MT == 1 && HALF == 32 && COLUMNS % 16 == 0);
    DYNAMIC_SHARED(shared);
    bf16* const ks = reinterpret_cast<bf16*>(shared);                 // [BN, LD]
    bf16* const vs = ks + BN * LD;                                    // [BN, LD]
    bf16* const qs = vs + BN * LD;                                    // two of [BM, LD]
    bf16* const dos = qs + 2 * BM * LD;                               // two of [BM, LD]
    float* const lses = reinterpret_cast<float*>(dos + 2 * BM * LD);  // two of [BM]
    float* const deltas = lses + 2 * BM;                              // two of [BM]
    float* const sums = deltas + 2 * BM;                              // two of [2, BM], with forget gates
    bf16* const given = reinterpret_cast<bf16*>(sums + (FORGETS ? 4 * BM : 0));  // per warp [32, HALF], swizzled

    const int tiles = ceil_div(n.keys, BN), bh = blockIdx.x / tiles;
    const int k0 = BN * (int)(blockIdx.x % tiles), past = n.keys - n.steps;
    const int pair = warp_id() / 2, side = warp_id() % 2, own = 32 * pair, w0 = k0 + own;
    q = head_of(q, bh, n.steps, n.heads, n.dim), k = head_of(k, bh, n.keys, n.heads, n.dim);
    v = head_of(v, bh, n.keys, n.heads, n.values), dout = head_of(dout, bh, n.steps, n.heads, n.values);
    dk = head_of(dk, bh, n.keys, n.heads, n.dim), dv = head_of(dv, bh, n.keys, n.heads, n.values);
    lse += (long long)bh * ceil_div(n.steps, 4) * 4, delta += (long long)bh * ceil_div(n.steps, 4) * 4;
    const int ld = n.heads * n.dim, ldv = n.heads * n.values;

    const int first = (k0 > past ? k0 - past : 0) / BM, blocks = n.end_block(k0 + BN, BM);
    Copy<bf16, DP, LD, BM, THREADS> copy_q(q, ld, first * BM, n.steps, n.dim);
    Copy<bf16, DP, LD, BM, THREADS> copy_do(dout, ldv, first * BM, n.steps, n.values);
    const Sums of_queries(forget.queries, bh, n.steps), of_keys(forget.keys, bh, n.keys);
    const auto copy = [&](int block) {
        const int buffer = block % 2;
        copy_q(qs + buffer * BM * LD);
        copy_do(dos + buffer * BM * LD);
        copy_floats<BM>(lses + buffer * BM, lse, block * BM, n.steps);
        copy_floats<BM>(deltas + buffer * BM, delta, block * BM, n.steps);
        if constexpr (FORGETS) copy_sums<BM>(sums + buffer * 2 * BM, of_queries, block * BM, n.steps);
        cp_async_commit();
    };
    Copy<bf16, DP, LD, BN, THREADS>(k, ld, k0, n.keys, n.dim)(ks);
    Copy<bf16, DP, LD, BN, THREADS>(v, ldv, k0, n.keys, n.values)(vs);
    copy(first);
    cp_async_wait<0>();
    __syncthreads();
    const Rows<Bf16, DP, LD, MT, false> k_rows(ks + own * LD), v_rows(vs + own * LD);

    float acc_k[MT][COLUMNS / 8][4], acc_v[MT][COLUMNS / 8][4];
    zero(acc_k);
    zero(acc_v);
    const int l8 = lane_id() % 8, up = lane_id() / 8 % 2 * 8, half = lane_id() / 16 * 8;
    // acc += (32 x BM, of which this warp has `x` and the other gives the rest) (BM rows of t, this warp's columns)
    const auto multiply = [&](float (&acc)[MT][COLUMNS / 8][4], const float (&x)[MT][NT][4], const bf16* t) {
        t += (l8 + up) * LD + side * COLUMNS + half;
        const auto step = [&](const uint32_t (&a)[MT][4], const bf16* rows) {
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, rows + 8 * j);
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_bf16(acc[i][j], a[i], b0);
                    mma_bf16(acc[i][j + 1], a[i], b1);
                }
            }
        };
        // Rows of 64 bytes: the four chunks of two rows share all banks, each pair of rows in another order.
        const auto chunk = [&](int row, int c) { return row * HALF + (c ^ (row / 2 % 4)) * 8; };
        bf16* const to = given + warp_id() * 32 * HALF;
        const bf16* const from = given + (warp_id() ^ 1) * 32 * HALF;
        uint32_t mine[NT / 2][MT][4], other[NT / 2][MT][4];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const uint32_t bits = pack_bf16(x[i][j][2 * e], x[i][j][2 * e + 1]);
                    mine[j / 2][i][j % 2 * 2 + e] = bits;
                    *reinterpret_cast<uint32_t*>(to + chunk(acc_row(i, 2 * e), j) + acc_col(0, 0)) = bits;
                }
        pair_barrier(pair);
#pragma unroll
        for (int kt = 0; kt < NT / 2; kt++)
#pragma unroll
            for (int i = 0; i < MT; i++) ldmatrix_x4(other[kt][i], from + chunk(16 * i + l8 + up, 2 * kt + half / 8));
#pragma unroll
        for (int kt = 0; kt < NT / 2; kt++) step(mine[kt], t + (side * HALF + 16 * kt) * LD);
#pragma unroll
        for (int kt = 0; kt < NT / 2; kt++) step(other[kt], t + ((side ^ 1) * HALF + 16 * kt) * LD);
    };

    const float c = scale * LOG2E;
    // Of the warp's keys, seen from the first; what their ds sums up to.
    float row_sum[MT][2], row_ds[MT][2];
    const int row0 = min(w0, n.keys - 1);
    if constexpr (FORGETS) {
        const From from(of_keys, row0);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                row_sum[i][half] = from.to(of_keys, min(w0 + acc_row(i, 2 * half), n.keys - 1));
                row_ds[i][half] = 0.f;
            }
    }
    for (int block = first; block < blocks; block++) {
        cp_async_wait<0>();
        __syncthreads();
        if (block + 1 < blocks) copy(block + 1);
        // The same for both warps.
        if (past + block * BM + BM <= w0 || past + block * BM >= w0 + 16 * MT - 1 + n.window) continue;

        const int q0 = block * BM + side * HALF, buffer = block % 2;
        const bf16* const qt = qs + buffer * BM * LD;
        const bf16* const dot = dos + buffer * BM * LD;
        float p[MT][NT][4], ds[MT][NT][4];
        zero(p);
        k_rows.times(p, qt + side * HALF * LD);
        zero(ds);
        v_rows.times(ds, dot + side * HALF * LD);
        if (past + q0 < w0 + 16 * MT - 1 || q0 + HALF > n.steps || past + q0 + HALF > w0 + n.window) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int t = q0 + acc_col(j, e), back = past + t - (w0 + acc_row(i, e));
                        if (back < 0 || back >= n.window || t >= n.steps) p[i][j][e] = -INFINITY;
                    }
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float of_lse[2], of_delta[2];
            load_vec<2>(lses + buffer * BM + side * HALF + acc_col(j, 0), of_lse);
            load_vec<2>(deltas + buffer * BM + side * HALF + acc_col(j, 0), of_delta);
            float of_sum[2];
            if constexpr (FORGETS) {
                From(of_keys, row0).template to_tile<BM>(sums + block % 2 * 2 * BM, side * HALF + acc_col(j, 0), of_sum);
                of_sum[0] -= of_lse[0], of_sum[1] -= of_lse[1];
            }
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float rest = FORGETS ? of_sum[e % 2] - row_sum[i][e / 2] : -of_lse[e % 2];
                    p[i][j][e] = exp2_fast(fmaf(p[i][j][e], c, rest));
                    ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - of_delta[e % 2]);
                    if constexpr (FORGETS) row_ds[i][e / 2] += ds[i][j][e];
                }
        }
        multiply(acc_v, p, dot);
        pair_barrier(pair);  // both have read what was given
        multiply(acc_k, ds, qt);
    }
    __syncthreads();  // the other warp reads the same keys
    if constexpr (FORGETS) {
        // Each warp of a pair has the sums of half of the queries: the second gives them to the first.
        if (side == 1) store_sums(lses, own, own + 32, row_ds);
        pair_barrier(pair);
        if (side == 0) {
            store_sums(deltas, own, own + 32, row_ds);
            __syncwarp();
            const int row = own + lane_id();
            if (k0 + row < n.keys)
                forget.columns[(long long)bh * ceil_div(n.keys, 4) * 4 + k0 + row] = deltas[row] + lses[row];
        }
    }
    const float scales[MT][2] = {{scale, scale}, {scale, scale}}, ones[MT][2] = {{1.f, 1.f}, {1.f, 1.f}};
    const int at = side * COLUMNS;
    store_rows<bf16, LD>(ks + own * LD + at, dk + at, ld, w0, n.keys, min(n.dim - at, COLUMNS), aligned(dk, n.dim), acc_k,
                         scales);
    store_rows<bf16, LD>(vs + own * LD + at, dv + at, ldv, w0, n.keys, min(n.values - at, COLUMNS), aligned(dv, n.values),
                         acc_v, ones);
}

template <class R, int DP, class Tile, bool FORGETS>
__device__ __forceinline__ void choose_kv(const typename R::elem* q, const typename R::elem* k,
                                          const typename R::elem* v, const float* lse, const typename R::elem* dout,
                                          const float* delta, typename R::elem* dk, typename R::elem* dv,
                                          Forget forget, Sizes n, float scale) {
    if constexpr (__is_same(R, Bf16) && DP >= 96) {
        backward_kv_pairs<DP, Tile, FORGETS>(q, k, v, lse, dout, delta, dk, dv, forget, n, scale);
    } else {
        backward_kv<R, DP, Tile, FORGETS>(q, k, v, lse, dout, delta, dk, dv, forget, n, scale);
    }
}

// ---- forget gates

// put(i, x(0) + .. + x(i)) for all i below n, by one block of THREADS threads with ITEMS in a row each, in f64.
template <int THREADS, int ITEMS, class X, class Put>
__device__ __forceinline__ void sum_up(int n, X x, Put put) {
    __shared__ double warps[THREADS / WARP];
    double before = 0.;
    for (int first = 0; first < n; first += THREADS * ITEMS) {
        const int at = first + ITEMS * threadIdx.x;
        double own[ITEMS], total = 0.;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) own[i] = total += at + i < n ? x(at + i) : 0.;
        double through = total;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const double lower = __shfl_up_sync(FULL, through, offset);
            if (lane_id() >= offset) through += lower;
        }
        if (lane_id() == WARP - 1) warps[warp_id()] = through;
        __syncthreads();
        double start = before + (through - total);
        for (int w = 0; w < THREADS / WARP; w++) {
            if (w < warp_id()) start += warps[w];
            before += warps[w];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (at + i < n) put(at + i, start + own[i]);
    }
}

constexpr int SUM_THREADS = 256, SUM_ITEMS = 4;

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
attention_forget_sums(const float* g, float* of_queries, float* of_keys, int steps, int keys, int heads) {
    const int bh = blockIdx.x, past = keys - steps, steps4 = ceil_div(steps, 4) * 4, keys4 = ceil_div(keys, 4) * 4;
    g += (long long)(bh / heads) * keys * heads + bh % heads;
    of_queries += (long long)bh * 2 * steps4, of_keys += (long long)bh * 2 * keys4;
    const auto x = [&](int s) { return g[(long long)s * heads] * 1.4426950408889634; };
    sum_up<SUM_THREADS, SUM_ITEMS>(keys, x, [&](int s, double sum) {
        const float hi = (float)sum, lo = (float)(sum - hi);
        of_keys[s] = hi, of_keys[keys4 + s] = lo;
        if (s >= past) of_queries[s - past] = hi, of_queries[steps4 + s - past] = lo;
    });
    // Tiles are copied four at a time, to the end of a row.
    if (const int s = keys + threadIdx.x; s < keys4) of_keys[s] = of_keys[keys4 + s] = 0.f;
    if (const int t = steps + threadIdx.x; t < steps4) of_queries[t] = of_queries[steps4 + t] = 0.f;
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
attention_forget_gradient(const float* rows, const float* columns, float* dg, int steps, int keys, int heads) {
    const int bh = blockIdx.x, past = keys - steps;
    rows += (long long)bh * ceil_div(steps, 4) * 4, columns += (long long)bh * ceil_div(keys, 4) * 4;
    dg += (long long)(bh / heads) * keys * heads + bh % heads;
    const auto x = [&](int i) {
        const int s = keys - 1 - i;
        return (s >= past ? (double)rows[s - past] : 0.) - columns[s];
    };
    sum_up<SUM_THREADS, SUM_ITEMS>(
        keys, x, [&](int i, double sum) { dg[(long long)(keys - 1 - i) * heads] = (float)sum; });
}

// The tiles of src/ops/attention/cuda.rs.
#define ENTRIES(DP, R, NAME, FORWARD, FORWARD_BLOCKS, DQ, DQ_BLOCKS, DKDV, DKDV_BLOCKS)                                \
    extern "C" __global__ void __launch_bounds__(FORWARD::THREADS, FORWARD_BLOCKS) attention_forward_##DP##_##NAME(    \
        const R::elem* q, const R::elem* k, const R::elem* v, R::elem* o, float* lse, int steps, int keys, int heads,  \
        int dim, int values, int window, float scale) {                                                                \
        forward<R, DP, FORWARD, false>(q, k, v, o, lse, {}, {steps, keys, heads, dim, values, window}, scale);         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(DQ::THREADS, DQ_BLOCKS) attention_dq_##DP##_##NAME(                   \
        const R::elem* q, const R::elem* k, const R::elem* v, const R::elem* o, const float* lse, const R::elem* dout, \
        float* delta, R::elem* dq, int steps, int keys, int heads, int dim, int values, int window, float scale) {     \
        backward_q<R, DP, DQ, false>(q, k, v, o, lse, dout, delta, dq, {},                                             \
                                     {steps, keys, heads, dim, values, window}, scale);                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(DKDV::THREADS, DKDV_BLOCKS) attention_dkdv_##DP##_##NAME(             \
        const R::elem* q, const R::elem* k, const R::elem* v, const float* lse, const R::elem* dout,                   \
        const float* delta, R::elem* dk, R::elem* dv, int steps, int keys, int heads, int dim, int values, int window, \
        float scale) {                                                                                                 \
        choose_kv<R, DP, DKDV, false>(q, k, v, lse, dout, delta, dk, dv, {},                                           \
                                      {steps, keys, heads, dim, values, window}, scale);                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(FORWARD::THREADS, FORWARD_BLOCKS) forgetting_forward_##DP##_##NAME(   \
        const R::elem* q, const R::elem* k, const R::elem* v, R::elem* o, float* lse, const float* of_queries,         \
        const float* of_keys, int steps, int keys, int heads, int dim, int values, int window, float scale) {          \
        forward<R, DP, FORWARD, true>(q, k, v, o, lse, {of_queries, of_keys, nullptr, nullptr},                        \
                                      {steps, keys, heads, dim, values, window}, scale);                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(DQ::THREADS, DQ_BLOCKS) forgetting_dq_##DP##_##NAME(                  \
        const R::elem* q, const R::elem* k, const R::elem* v, const R::elem* o, const float* lse, const R::elem* dout, \
        float* delta, R::elem* dq, const float* of_queries, const float* of_keys, float* rows, int steps, int keys,    \
        int heads, int dim, int values, int window, float scale) {                                                     \
        backward_q<R, DP, DQ, true>(q, k, v, o, lse, dout, delta, dq, {of_queries, of_keys, rows, nullptr},            \
                                    {steps, keys, heads, dim, values, window}, scale);                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(DKDV::THREADS, DKDV_BLOCKS) forgetting_dkdv_##DP##_##NAME(            \
        const R::elem* q, const R::elem* k, const R::elem* v, const float* lse, const R::elem* dout,                   \
        const float* delta, R::elem* dk, R::elem* dv, const float* of_queries, const float* of_keys, float* columns,   \
        int steps, int keys, int heads, int dim, int values, int window, float scale) {                                \
        choose_kv<R, DP, DKDV, true>(q, k, v, lse, dout, delta, dk, dv, {of_queries, of_keys, nullptr, columns},       \
                                     {steps, keys, heads, dim, values, window}, scale);                                \
    }

using Wide = Tile<2, 4, 64>;     // 128 rows, 64 of the other side
using Narrow = Tile<2, 4, 32>;   // 128 rows, 32 of the other side
using Single = Tile<1, 4, 64>;   // 64 rows, 64 of the other side
using Small = Tile<1, 4, 32>;    // 64 rows, 32 of the other side

ENTRIES(32, Bf16, bf16, Wide, 2, Wide, 2, Wide, 2)
ENTRIES(64, Bf16, bf16, Wide, 2, Narrow, 2, Narrow, 2)
ENTRIES(80, Bf16, bf16, Wide, 2, Narrow, 2, Single, 2)
ENTRIES(96, Bf16, bf16, Wide, 2, Narrow, 2, Single, 2)
ENTRIES(128, Bf16, bf16, Wide, 2, Narrow, 2, Single, 2)
#define FLOAT_ENTRIES(DP, R, NAME) ENTRIES(DP, R, NAME, Small, 2, Small, 1, Small, 1)
FLOAT_ENTRIES(32, Tf32, tf32)
FLOAT_ENTRIES(64, Tf32, tf32)
FLOAT_ENTRIES(96, Tf32, tf32)
FLOAT_ENTRIES(128, Tf32, tf32)
FLOAT_ENTRIES(32, F32, f32)
FLOAT_ENTRIES(64, F32, f32)
FLOAT_ENTRIES(96, F32, f32)
FLOAT_ENTRIES(128, F32, f32)
