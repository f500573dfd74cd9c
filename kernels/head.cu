// Cross-entropy of given logits, its gradient, and the vote of every window; the matrix products around it are cuBLAS's.
//
//   logits [rows, C], row stride ld: those of the sequences b0 .. b0 + rows/T of a batch [B, T], all T steps of each
//   labels, element [B, T] u32: element is ascending along time, PAD on padding (no loss, no vote)
//   loss = log Σ e^logit − logit[label];  dlogits = (softmax − onehot) · scale, in place of the logits
//   vote of (b, e): the class with the largest sum of probabilities over the rows of element e, the first on ties
//
// A window, the consecutive rows of one element, is one block's: the sums of its probabilities stay in registers. Long
// sequences come in pieces of T steps: a window that is still open at the end of a piece goes on in the next one by way
// of `carry`: sums [B, C], and [2, B] its element (PAD: none) and label. A piece reads one carry and writes another.
//
//   head_rows_<f32|bf16>   grid rows, block 32·n threads, at most 256, with 16 columns each; shared 0. Losses, votes,
//                          gradient. Rows begin at 16 bytes and ld is a multiple of 8; else head_rows_odd_<f32|bf16>
//   head_bias_<f32|bf16>   column sums of dlogits over slabs of rows: grid (ceil(C/256), slabs), block 256
//   head_bias_sum          their sum over the slabs: grid ceil(C/256), block 256
//   head_flush             votes of the windows in a carry: grid B, block as head_rows
//   head_fill              fills with PAD: any grid
//   head_scale             1 / number of valid steps: grid 1, block 1024
//   head_loss              sum of losses and number of valid steps, added up in f64: grid 1, block 1024
//   head_count             right votes, and all: grid 1, block 1024
//   head_report            totals side by side: grid 1, block 1
#include "common.cuh"

constexpr uint32_t PAD = 0xffffffffu;
constexpr int ITEMS = 16;  // columns of a thread
constexpr int V = 8;       // columns side by side, where rows are aligned
constexpr int MOST = 256;  // threads of a row: up to 4,096 classes
constexpr int MANY = 1024;

// The column of a thread's i-th item.
template <bool VECTOR>
__device__ __forceinline__ int column(int i) {
    return VECTOR ? (i / V * (int)blockDim.x + (int)threadIdx.x) * V + i % V : i * (int)blockDim.x + (int)threadIdx.x;
}

// A thread's part of a row, on its way from memory.
template <class T, bool VECTOR>
struct Part {
    struct alignas(16) Chunk { T v[V]; };
    Chunk chunk[ITEMS / V];
    __device__ __forceinline__ void load(const T* row, int ld) {
#pragma unroll
        for (int i = 0; i < ITEMS; i += VECTOR ? V : 1) {
            const int c = column<VECTOR>(i);
            if (c < ld) {
                if constexpr (VECTOR) chunk[i / V] = *reinterpret_cast<const Chunk*>(row + c);
                else chunk[i / V].v[i % V] = row[c];
            }
        }
    }
};
template <class T, bool VECTOR>
__device__ __forceinline__ void store_part(T* row, int ld, const float (&x)[ITEMS]) {
    constexpr int W = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < ITEMS; i += VECTOR ? W : 1) {
        const int c = column<VECTOR>(i);
        if (c >= ld) continue;
        if constexpr (VECTOR) {
            float y[W];
#pragma unroll
            for (int j = 0; j < W; j++) y[j] = x[i + j];
            store_vec<W>(row + c, y);
        } else {
            row[c] = from_f<T>(x[i]);
        }
    }
}

struct Best {
    float value;
    int column;
    __device__ __forceinline__ void take(float v, int c) {
        if (v > value || (v == value && c < column)) value = v, column = c;
    }
};

// The column with the largest sum, for thread 0.
template <bool VECTOR>
__device__ __forceinline__ int vote(const float (&sum)[ITEMS], int classes) {
    __shared__ Best bests[WARP];
    Best best = {-INFINITY, 0x7fffffff};
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (column<VECTOR>(i) < classes) best.take(sum[i], column<VECTOR>(i));
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const float value = __shfl_xor_sync(FULL, best.value, offset);
        best.take(value, __shfl_xor_sync(FULL, best.column, offset));
    }
    __syncthreads();  // an earlier vote has been read
    if (lane_id() == 0) bests[warp_id()] = best;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < (int)blockDim.x / WARP; w++) best.take(bests[w].value, bests[w].column);
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

template <bool VECTOR>
__device__ __forceinline__ void cast(const Batch& x, int b, uint32_t element, uint32_t label, const float (&sum)[ITEMS]) {
    const int winner = vote<VECTOR>(sum, x.classes);
    if (threadIdx.x == 0 && element < (uint32_t)x.elements) {
        x.votes[(long long)b * x.elements + element] = winner;
        x.answers[(long long)b * x.elements + element] = label;
    }
}

template <bool VECTOR>
__device__ __forceinline__ void load_sums(float (&sum)[ITEMS], const Carry& carry, int b, int classes) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int c = column<VECTOR>(i);
        sum[i] = c < classes ? carry.sum[(long long)b * classes + c] : 0.f;
    }
}

template <class T, bool VECTOR>
__device__ __forceinline__ void window(T* logits, int ld, const float* bias, int first, const Batch& x) {
    __shared__ float2 scratch[2][WARP];
    const int b = first + blockIdx.x / x.steps, classes = x.classes;
    int t = blockIdx.x % x.steps;
    long long at = (long long)b * x.steps + t;
    const uint32_t element = x.element[at];
    uint32_t next = t + 1 < x.steps ? x.element[at + 1] : PAD;
    uint32_t label = x.labels[at];
    if (element != PAD && t > 0 && x.element[at - 1] == element) return;

    T* row = logits + (long long)blockIdx.x * ld;
    Part<T, VECTOR> coming;
    if (element != PAD) coming.load(row, ld);

    float sum[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) sum[i] = 0.f;
    if (t == 0 && x.in.state) {
        const uint32_t open = x.in.state[b];
        if (open != PAD) load_sums<VECTOR>(sum, x.in, b, classes);
        if (open != PAD && open != element) {
            cast<VECTOR>(x, b, open, x.in.state[x.batch + b], sum);
#pragma unroll
            for (int i = 0; i < ITEMS; i++) sum[i] = 0.f;
        }
    }
    if (element == PAD) {
        if (x.scale) store_part<T, VECTOR>(row, ld, sum);
        if (threadIdx.x == 0) {
            x.losses[at] = 0.f;
            if (t == x.steps - 1 && x.out.state) x.out.state[b] = PAD;
        }
        return;
    }

    const float scale = x.scale ? *x.scale : 0.f;
    const bool bias_vector = bias && reinterpret_cast<size_t>(bias) % 16 == 0;
    for (int round = 0;; round++) {
        const bool last = next != element;  // of the window, or of the piece
        const uint32_t own_label = label;
        float own = 0.f;
        if (threadIdx.x == 0) {
            const bool known = own_label < (uint32_t)classes;
            own = known ? to_f(row[own_label]) + (bias ? bias[own_label] : 0.f) : NAN;
        }
        float e[ITEMS], top = -INFINITY;
#pragma unroll
        for (int i = 0; i < ITEMS; i += 4) {
            float add[4] = {};
            if (VECTOR && bias_vector && column<VECTOR>(i) + 4 <= classes) {
                load_vec<4>(bias + column<VECTOR>(i), add);
            } else if (bias) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (column<VECTOR>(i + j) < classes) add[j] = bias[column<VECTOR>(i + j)];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float x = to_f(coming.chunk[i / V].v[i % V + j]) + add[j];
                e[i + j] = column<VECTOR>(i + j) < classes ? x : -INFINITY;
                top = fmaxf(top, e[i + j]);
            }
        }
        if (!last) {
            coming.load(row + ld, ld);
            next = t + 2 < x.steps ? x.element[at + 2] : PAD;
            label = x.labels[at + 1];
        }
        top = warp_max(top);
        if (top == -INFINITY) top = 0.f;  // a warp without columns
        float part = 0.f;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            e[i] = __expf(e[i] - top);
            part += e[i];
        }
        part = warp_sum(part);
        if (lane_id() == 0) scratch[round % 2][warp_id()] = make_float2(top, part);
        __syncthreads();  // also: thread 0 has read the label's logit
        float all_top = -INFINITY, total = 0.f;
        for (int w = 0; w < (int)blockDim.x / WARP; w++)
            if (scratch[round % 2][w].y != 0.f) all_top = fmaxf(all_top, scratch[round % 2][w].x);
        for (int w = 0; w < (int)blockDim.x / WARP; w++) {
            const float2 other = scratch[round % 2][w];
            total += other.y == 0.f ? 0.f : other.y * __expf(other.x - all_top);
        }
        if (threadIdx.x == 0) x.losses[at] = logf(total) + (all_top - own);
        const float factor = part == 0.f ? 0.f : __expf(top - all_top) / total;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            e[i] *= factor;
            sum[i] += e[i];
        }
        if (x.scale) {
#pragma unroll
            for (int i = 0; i < ITEMS; i++) e[i] = (e[i] - (column<VECTOR>(i) == (int)own_label ? 1.f : 0.f)) * scale;
            store_part<T, VECTOR>(row, ld, e);
        }
        if (last) {
            if (t + 1 < x.steps || !x.out.state) {
                cast<VECTOR>(x, b, element, own_label, sum);
            } else {
#pragma unroll
                for (int i = 0; i < ITEMS; i++) {
                    const int c = column<VECTOR>(i);
                    if (c < classes) x.out.sum[(long long)b * classes + c] = sum[i];
                }
                if (threadIdx.x == 0) x.out.state[b] = element, x.out.state[x.batch + b] = own_label;
            }
            return;
        }
        t++, at++, row += ld;
    }
}

#define ROWS(T, NAME, VECTOR)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MOST, 3) head_rows_##NAME(                                                                       \
        T* logits, int ld, const float* bias, const uint32_t* labels, const uint32_t* element, const float* scale,     \
        float* losses, uint32_t* votes, uint32_t* answers, float* in_sum, uint32_t* in_state, float* out_sum,          \
        uint32_t* out_state, int first, int batch, int steps, int elements, int classes) {                             \
        const Batch x = {labels,         element,              scale, losses, votes,    answers,                       \
                         {in_sum, in_state}, {out_sum, out_state}, batch, steps,  elements, classes};                      \
        window<T, VECTOR>(logits, ld, bias, first, x);                                                                 \
    }
ROWS(float, f32, true)
ROWS(bf16, bf16, true)
ROWS(float, odd_f32, false)
ROWS(bf16, odd_bf16, false)

extern "C" __global__ void head_flush(const float* sums, const uint32_t* state, uint32_t* votes, uint32_t* answers,
                                      int elements, int classes) {
    const int b = blockIdx.x, batch = gridDim.x;
    const uint32_t element = state[b];
    if (element == PAD) return;
    Batch x = {};
    x.votes = votes, x.answers = answers, x.elements = elements, x.classes = classes;
    float sum[ITEMS];
    load_sums<false>(sum, {const_cast<float*>(sums), nullptr}, b, classes);
    cast<false>(x, b, element, state[batch + b], sum);
}

// ---- bias

// partial [slabs, C] (+)= the sums of dlogits' columns over slabs of rows; a lane has 8 columns, a warp every 8th row.
template <class T>
__device__ __forceinline__ void slab_sums(const T* dlogits, int ld, float* partial, int rows, int classes, int more) {
    constexpr int WARPS = 8, COLUMNS = WARP * V;
    __shared__ float sums[WARPS][COLUMNS];
    const int slab = ceil_div(rows, (int)gridDim.y), begin = blockIdx.y * slab, end = min(begin + slab, rows);
    const int c0 = blockIdx.x * COLUMNS;
    const bool vector = ld % V == 0 && reinterpret_cast<size_t>(dlogits) % 16 == 0;
    float sum[V] = {};
    if (vector) {
        const int c = c0 + lane_id() * V;
        if (c < ld) {
            constexpr int W = 16 / sizeof(T);
#pragma unroll 4
            for (int r = begin + warp_id(); r < end; r += WARPS)
#pragma unroll
                for (int i = 0; i < V; i += W) {
                    float x[W];
                    load_vec<W>(dlogits + (long long)r * ld + c + i, x);
#pragma unroll
                    for (int j = 0; j < W; j++) sum[i + j] += x[j];
                }
        }
    } else {
#pragma unroll 4
        for (int r = begin + warp_id(); r < end; r += WARPS)
#pragma unroll
            for (int i = 0; i < V; i++) {
                const int c = c0 + i * WARP + lane_id();
                if (c < classes) sum[i] += to_f(dlogits[(long long)r * ld + c]);
            }
    }
#pragma unroll
    for (int i = 0; i < V; i++) sums[warp_id()][vector ? lane_id() * V + i : i * WARP + lane_id()] = sum[i];
    __syncthreads();
    const int c = c0 + threadIdx.x;
    if (c >= classes) return;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
    float* const to = partial + (long long)blockIdx.y * classes + c;
    *to = more ? *to + total : total;
}
extern "C" __global__ void __launch_bounds__(256) head_bias_f32(const float* dlogits, int ld, float* partial, int rows,
                                                                int classes, int more) {
    slab_sums(dlogits, ld, partial, rows, classes, more);
}
extern "C" __global__ void __launch_bounds__(256) head_bias_bf16(const bf16* dlogits, int ld, float* partial, int rows,
                                                                 int classes, int more) {
    slab_sums(dlogits, ld, partial, rows, classes, more);
}
extern "C" __global__ void __launch_bounds__(256) head_bias_sum(const float* partial, float* dbias, int slabs, int classes,
                                                                int more) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= classes) return;
    float total = more ? dbias[c] : 0.f;
#pragma unroll 8
    for (int s = 0; s < slabs; s++) total += partial[(long long)s * classes + c];
    dbias[c] = total;
}

// ---- totals

// The sum over a block of MANY threads, in one order.
template <class T>
__device__ __forceinline__ T many_sum(T x) {
    __shared__ T sums[MANY];
    __syncthreads();
    sums[threadIdx.x] = x;
    for (int half = MANY / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    return sums[0];
}

extern "C" __global__ void head_fill(uint32_t* x, long long n) {
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
        x[i] = PAD;
}

extern "C" __global__ void __launch_bounds__(MANY) head_scale(const uint32_t* element, float* scale, long long n) {
    uint32_t valid = 0;
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

// report [5] f64: loss_sum, steps, right, windows (+)=; then `other`, if there is one. What a host reads at once.
extern "C" __global__ void head_report(const double* loss_sum, const uint32_t* steps, const uint32_t* counts,
                                       const double* other, double* report, int more) {
    const double totals[4] = {*loss_sum, (double)*steps, (double)counts[0], (double)counts[1]};
    for (int i = 0; i < 4; i++) report[i] = more ? report[i] + totals[i] : totals[i];
    if (other) report[4] = *other;
}
