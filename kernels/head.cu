// Cross-entropy of given logits, its gradient, and the vote of every window; the matrix products around it are
// cuBLAS's.
//
//   logits [rows, C], row stride ld: those of the sequences b0 .. b0 + rows/T of a batch [B, T], all T steps of each
//   labels, element [B, T] u32: element is ascending along time, PAD on padding (no loss, no vote)
//   z = logits + bias;  loss = log Σ e^z − z[label];  dlogits = (softmax(z) − onehot) · scale, in place of the logits
//   vote of (b, e): the class with the largest sum of probabilities over the rows of element e, the first on ties
//
// A window, the consecutive rows of one element, is one block's: the sums of its probabilities stay in
// registers. A block takes the windows that begin in its slab of rows, one after the other, with the next rows
// on their way to shared memory, and adds up the columns of dlogits meanwhile. Long sequences come in pieces of
// T steps: a window that is still open at the end of a piece goes on in the next one by way of `carry`: sums
// [B, C], and [2, B] its element (PAD: none) and label. A piece reads one carry and writes another.
//
//   head_rows_<threads>_<f32|bf16>  losses, votes, gradient: grid ceil(rows/slab), block 32, 64, 128 or 256
//                          threads with 16 columns each; shared: `Ballot::rows` in src/ops/head/cuda.rs. Rows begin
//                          at 16 bytes, ld is a multiple of 8, and logits beyond the classes are finite; their
//                          gradient is 0
//   head_bias              the gradient of the bias from the sums of the slabs: grid ceil(C/32), block 1024
//   head_flush             votes of the windows in a carry: grid B, block 256
//   head_fill              fills with PAD: any grid
//   head_scale             1 / number of valid steps: grid 1, block 1024
//   head_loss              sum of losses and number of valid steps, added up in f64: grid 1, block 1024
//   head_count             right votes, and all: grid 1, block 1024
//   head_report            totals side by side: grid 1, block 1
#include "common.cuh"

constexpr uint32_t PAD = 0xffffffffu;
constexpr int ITEMS = 16;  // columns of a thread
constexpr int V = 8;       // columns side by side
constexpr int MOST = 256;  // threads of a row: up to 4,096 classes
constexpr int AHEAD = 3;   // rows on their way
constexpr int MANY = 1024;

// The column of a thread's i-th item.
template <int THREADS>
__device__ __forceinline__ int column(int i) { return (i / V * THREADS + (int)threadIdx.x) * V + i % V; }

// The largest sum of probabilities and its column, on its way from the warps to thread 0: written, a barrier, read.
struct Best {
    uint32_t value;  // the bits of a float that is not negative have its order
    int column;
};
// Columns beyond the classes have sums of 0 and come last: they never win.
template <int THREADS>
__device__ __forceinline__ void poll(Best (&bests)[THREADS / WARP], const float (&sum)[ITEMS]) {
    float top = sum[0];
    int item = 0;
#pragma unroll
    for (int i = 1; i < ITEMS; i++)
        if (sum[i] > top) top = sum[i], item = i;
    const uint32_t most = __reduce_max_sync(FULL, __float_as_uint(top));
    const int at = __reduce_min_sync(FULL, __float_as_uint(top) == most ? column<THREADS>(item) : 0x7fffffff);
    if (lane_id() == 0) bests[warp_id()] = {most, at};
}
template <int WARPS>
__device__ __forceinline__ int winner(const Best (&bests)[WARPS]) {
    Best best = bests[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) {
        const Best other = bests[w];
        if (other.value > best.value || (other.value == best.value && other.column < best.column)) best = other;
    }
    return best.column;
}

struct Carry {
    float* sum;       // [B, C]
    uint32_t* state;  // [2, B]: element, label
};

// What a batch is asked, and what it gives.
struct Batch {
    const uint32_t *labels, *element;
    const float* scale;  // null: no gradient
    float* losses;       // [B, T]
    uint32_t *votes, *answers;  // [B, E]; answers: the labels of the windows
    Carry in, out;              // null: every window begins and ends here
    int batch, steps, elements, classes;
};

template <int THREADS>
__device__ __forceinline__ void load_sums(float (&sum)[ITEMS], const Carry& carry, int b, int classes) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int c = column<THREADS>(i);
        sum[i] = c < classes ? carry.sum[(long long)b * classes + c] : 0.f;
    }
}

// Everything is to base 2. partial [grid, C]: (+)= the sums of dlogits' columns over the slab, or null.
template <class T, int THREADS>
__device__ __forceinline__ void slab_of_rows(T* logits, int ld, const float* bias, float* partial, int more, int first,
                                             int rows, int slab, const Batch& x) {
    constexpr int W = 16 / sizeof(T), STAGES = AHEAD + 1, WARPS = THREADS / WARP;
    __shared__ float2 scratch[2][WARPS];
    __shared__ Best bests[2][WARPS];  // in turn, so that the barrier of the next row is enough
    DYNAMIC_SHARED(memory);
    // A thread reads only what it wrote: no barriers. Vectors of one place of all threads lie side by side.
    float* const shift = reinterpret_cast<float*>(memory) + threadIdx.x * 4;            // [ITEMS / 4][THREADS][4]
    T* const stages = reinterpret_cast<T*>(memory + ITEMS * THREADS * sizeof(float)) + threadIdx.x * W;
    const auto stage = [&](int i) { return stages + i % STAGES * ITEMS * THREADS; };    // [ITEMS / W][THREADS][W]

    const int steps = x.steps, classes = x.classes;
    const int begin = blockIdx.x * slab, end = min(begin + slab, rows);
    const uint32_t* element = x.element + (long long)first * steps;
    float sum[ITEMS], total[ITEMS];  // of a window, of the slab
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        sum[i] = total[i] = 0.f;
        const int c = column<THREADS>(i);
        shift[i / 4 * 4 * THREADS + i % 4] = c >= classes ? -INFINITY : bias ? LOG2E * bias[c] : 0.f;
    }

    // The first row from `r` on that begins a window, or `rows`. Padding is on its own.
    const auto window_from = [&](int r) {
        for (;; r += WARP) {
            const int mine = r + lane_id();
            const bool begins =
                mine >= rows || mine % steps == 0 || element[mine] == PAD || element[mine] != element[mine - 1];
            const unsigned found = __ballot_sync(FULL, begins);
            if (found) return min(r + __ffs(found) - 1, rows);
        }
    };
    int row = window_from(begin);
    const int stop = row < end ? window_from(end) : row;

    // All of these go on with the rows.
    element += row;
    const uint32_t* label = x.labels + (long long)first * steps + row;
    float* loss = x.losses + (long long)first * steps + row;
    T* logit = logits + (long long)row * ld;
    const T* ahead = logit;
    const auto fetch = [&](int i, bool exists) {
        if (exists) {
#pragma unroll
            for (int j = 0; j < ITEMS; j += W) {
                const bool inside = column<THREADS>(j) < ld;
                cp_async16(stage(i) + j * THREADS, ahead + (inside ? column<THREADS>(j) : 0), inside ? 16 : 0);
            }
        }
        ahead += ld;
        cp_async_commit();
    };
    const float scale = x.scale ? *x.scale : 0.f;
    uint32_t now = PAD, next = PAD, now_label = 0, next_label = 0;
    if (row < stop) now = element[0], now_label = label[0];
    if (row + 1 < stop) next = element[1], next_label = label[1];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(i, row + i < stop);
    int b = first + row / steps, t = row % steps, side = 0, at = 0;
    // The window whose vote is cast after the next barrier.
    long long due = -1;
    uint32_t due_label = 0;
    int turn = 0;
    const auto cast = [&] {
        if (due >= 0 && threadIdx.x == 0) x.votes[due] = winner(bests[turn ^ 1]), x.answers[due] = due_label;
        due = -1;
    };
    const auto close = [&](uint32_t of, uint32_t its_label) {
        poll<THREADS>(bests[turn], sum);
        turn ^= 1;
        due = of < (uint32_t)x.elements ? (long long)b * x.elements + of : -1, due_label = its_label;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) total[i] += sum[i], sum[i] = 0.f;
    };

    for (; row < stop; row++) {
        uint32_t then = PAD, then_label = 0;
        if (row + 2 < stop) then = element[2], then_label = label[2];
        fetch(at + AHEAD, row + AHEAD < stop);
        if (t == 0 && x.in.state) {
            if (due >= 0) {
                __syncthreads();
                cast();
            }
            const uint32_t open = x.in.state[b];
            if (open != PAD) load_sums<THREADS>(sum, x.in, b, classes);
            if (open != PAD && open != now) {
                close(open, x.in.state[x.batch + b]);
                __syncthreads();
                cast();
            }
        }
        cp_async_wait<AHEAD>();
        if (now == PAD) {
            if (x.scale) {
                const float zeros[W] = {};
#pragma unroll
                for (int i = 0; i < ITEMS; i += W)
                    if (column<THREADS>(i) < ld) store_vec<W>(logit + column<THREADS>(i), zeros);
            }
            if (threadIdx.x == 0) {
                *loss = 0.f;
                if (t == steps - 1 && x.out.state) x.out.state[b] = PAD;
            }
        } else {
            float e[ITEMS], top = -INFINITY;
#pragma unroll
            for (int i = 0; i < ITEMS; i += W) {
                float part_of_row[W];
                load_vec<W>(stage(at) + i * THREADS, part_of_row);
#pragma unroll
                for (int j = 0; j < W; j += 4) {
                    float add[4];
                    load_vec<4>(shift + (i + j) * THREADS, add);
#pragma unroll
                    for (int l = 0; l < 4; l++) {
                        e[i + j + l] = fmaf(LOG2E, part_of_row[j + l], add[l]);
                        top = fmaxf(top, e[i + j + l]);
                    }
                }
            }
            // The label's column is item `mine` of one thread; a label that is no class makes the loss NaN.
            const bool known = now_label < (uint32_t)classes;
            const uint32_t vector = known ? now_label / V : 0;
            const bool owner = threadIdx.x == vector % THREADS;
            const int mine = known ? (int)(vector / THREADS * V + now_label % V) : ITEMS;
            float own = NAN;
            if (owner) {
#pragma unroll
                for (int i = 0; i < ITEMS; i++) own = i == mine ? e[i] : own;
            }
            top = warp_max(top);
            float part = 0.f;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                e[i] = exp2_fast(e[i] - top);
                part += e[i];
            }
            part = warp_sum(part);
            if (lane_id() == 0) scratch[side][warp_id()] = make_float2(top, part);
            __syncthreads();
            cast();
            float all_top = -INFINITY, all = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) all_top = fmaxf(all_top, scratch[side][w].x);
#pragma unroll
            for (int w = 0; w < WARPS; w++) all += scratch[side][w].y * exp2_fast(scratch[side][w].x - all_top);
            const float factor = __fdividef(exp2_fast(top - all_top), all);
            side ^= 1;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) sum[i] = fmaf(e[i], factor, sum[i]);
            if (owner) *loss = LN2 * (log2f(all) + (all_top - own));
            if (x.scale) {
                const float down = factor * scale;
#pragma unroll
                for (int i = 0; i < ITEMS; i++) e[i] *= down;
                if (owner) {
#pragma unroll
                    for (int i = 0; i < ITEMS; i++) {
                        e[i] -= i == mine ? scale : 0.f;
                        total[i] -= i == mine ? 1.f : 0.f;
                    }
                }
#pragma unroll
                for (int i = 0; i < ITEMS; i += W) {
                    float y[W];
#pragma unroll
                    for (int j = 0; j < W; j++) y[j] = e[i + j];
                    if (column<THREADS>(i) < ld) store_vec<W>(logit + column<THREADS>(i), y);
                }
            }
            if (t == steps - 1 && x.out.state) {
#pragma unroll
                for (int i = 0; i < ITEMS; i++) {
                    const int c = column<THREADS>(i);
                    if (c < classes) x.out.sum[(long long)b * classes + c] = sum[i];
                    sum[i] = 0.f;
                }
                if (threadIdx.x == 0) x.out.state[b] = now, x.out.state[x.batch + b] = now_label;
            } else if (t == steps - 1 || next != now) {
                close(now, now_label);
            }
        }
        if (++t == steps) t = 0, b++;
        now = next, now_label = next_label, next = then, next_label = then_label;
        at++, element++, label++, loss++, logit += ld;
    }
    if (due >= 0) {
        __syncthreads();
        cast();
    }
    cp_async_wait<0>();
    if (!partial) return;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (column<THREADS>(i) >= classes) continue;
        float* const to = partial + (long long)blockIdx.x * classes + column<THREADS>(i);
        *to = fmaf(scale, total[i], more ? *to : 0.f);
    }
}

#define ROWS(THREADS, T, SUFFIX)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 640 / THREADS) head_rows_##THREADS##_##SUFFIX(               \
        T* logits, int ld, const float* bias, const uint32_t* labels, const uint32_t* element, const float* scale,     \
        float* losses, uint32_t* votes, uint32_t* answers, float* in_sum, uint32_t* in_state, float* out_sum,          \
        uint32_t* out_state, float* partial, int more, int first, int rows, int slab, int batch, int steps,            \
        int elements, int classes) {                                                                                   \
        const Batch x = {labels,         element,              scale, losses, votes,    answers,                       \
                         {in_sum, in_state}, {out_sum, out_state}, batch, steps,  elements, classes};                  \
        slab_of_rows<T, THREADS>(logits, ld, bias, partial, more, first, rows, slab, x);                               \
    }
#define BOTH(THREADS)          \
    ROWS(THREADS, float, f32)  \
    ROWS(THREADS, bf16, bf16)
BOTH(32)
BOTH(64)
BOTH(128)
BOTH(256)

extern "C" __global__ void head_flush(const float* sums, const uint32_t* state, uint32_t* votes, uint32_t* answers,
                                      int elements, int classes) {
    __shared__ Best bests[MOST / WARP];
    const int b = blockIdx.x, batch = gridDim.x;
    const uint32_t element = state[b];
    if (element >= (uint32_t)elements) return;
    float sum[ITEMS];
    load_sums<MOST>(sum, {const_cast<float*>(sums), nullptr}, b, classes);
    poll<MOST>(bests, sum);
    __syncthreads();
    if (threadIdx.x > 0) return;
    votes[(long long)b * elements + element] = winner(bests);
    answers[(long long)b * elements + element] = state[batch + b];
}

// A lane has a column, a warp every 32nd slab.
extern "C" __global__ void __launch_bounds__(1024) head_bias(const float* partial, float* dbias, int slabs,
                                                             int classes) {
    __shared__ float sums[WARP][WARP + 1];
    const int c = blockIdx.x * WARP + lane_id();
    float sum = 0.f;
    if (c < classes) {
#pragma unroll 4
        for (int slab = warp_id(); slab < slabs; slab += WARP) sum += partial[(long long)slab * classes + c];
    }
    sums[lane_id()][warp_id()] = sum;
    __syncthreads();
    sum = warp_sum(sums[warp_id()][lane_id()]);
    if (lane_id() == 0 && blockIdx.x * WARP + warp_id() < classes) dbias[blockIdx.x * WARP + warp_id()] = sum;
}

// ---- totals

// The sum over a block of MANY threads, in one order, for the first warp.
template <class T>
__device__ __forceinline__ T many_sum(T x) {
    __shared__ T sums[MANY / WARP];
    const auto of_warp = [](T y) {
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(FULL, y, offset);
        return y;
    };
    x = of_warp(x);
    __syncthreads();
    if (lane_id() == 0) sums[warp_id()] = x;
    __syncthreads();
    return of_warp(sums[lane_id()]);
}

extern "C" __global__ void head_fill(uint32_t* x, long long n) {
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
        x[i] = PAD;
}

extern "C" __global__ void __launch_bounds__(MANY) head_scale(const uint32_t* element, float* scale, long long n) {
    uint32_t valid = 0;
#pragma unroll 8
    for (long long i = threadIdx.x; i < n; i += MANY) valid += element[i] != PAD;
    valid = many_sum(valid);
    if (threadIdx.x == 0) *scale = valid ? 1.f / valid : 0.f;
}

// loss_sum (+)= Σ losses, steps (+)= valid steps; loss, if wanted, is Σ losses · scale of this call.
extern "C" __global__ void __launch_bounds__(MANY) head_loss(const float* losses, const uint32_t* element,
                                                             const float* scale, double* loss_sum, uint32_t* steps,
                                                             float* loss, long long n, int more) {
    double sum = 0.0;
    uint32_t valid = 0;
#pragma unroll 8
    for (long long i = threadIdx.x; i < n; i += MANY) sum += losses[i], valid += element[i] != PAD;
    sum = many_sum(sum), valid = many_sum(valid);
    if (threadIdx.x == 0) {
        *loss_sum = more ? *loss_sum + sum : sum;
        *steps = more ? *steps + valid : valid;
        if (loss) *loss = (float)(sum * *scale);
    }
}

// counts [2]: (+)= windows whose vote is their label, and windows.
extern "C" __global__ void __launch_bounds__(MANY) head_count(const uint32_t* votes, const uint32_t* answers,
                                                              uint32_t* counts, long long n, int more) {
    uint32_t right = 0, all = 0;
#pragma unroll 8
    for (long long i = threadIdx.x; i < n; i += MANY) {
        all += answers[i] != PAD;
        right += answers[i] != PAD && votes[i] == answers[i];
    }
    right = many_sum(right), all = many_sum(all);
    if (threadIdx.x == 0) {
        counts[0] = more ? counts[0] + right : right;
        counts[1] = more ? counts[1] + all : all;
    }
}

// report [6] f64: loss_sum, steps, right, windows (+)=; then `other`, if there is one; and 1 from the first loss_sum or
// `other` on that is not finite. What a host reads at once.
extern "C" __global__ void head_report(const double* loss_sum, const uint32_t* steps, const uint32_t* counts,
                                       const double* other, double* report, int more) {
    const double totals[4] = {*loss_sum, (double)*steps, (double)counts[0], (double)counts[1]};
    for (int i = 0; i < 4; i++) report[i] = more ? report[i] + totals[i] : totals[i];
    if (other) report[4] = *other;
    if (!isfinite(report[0]) || (other && !isfinite(*other))) report[5] = 1.;
}
