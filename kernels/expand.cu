// From compact samples to timesteps: symbols, labels, elements and noise of a window of them (src/ops/expand; on the
// CPU `Samples` of src/task/batch.rs does the same).
//
// The compact samples of a batch lie in one buffer `packed` of u32:
//
//   meta         [B, META]  what META's names say
//   starts       [S]        first timestep of every element, sample after sample
//   labels       [S]        label of every element
//   symbols      [S]        symbol of every element
//   distractors             shown in the gaps, gap after gap, sample after sample
//
// An element shows its symbol for `frames` steps; its gap, blank or distractors, follows until the next one starts. A
// distractor is shown for `frames` steps too. A symbol is one-hot (`frames` 1), or the number of a recording, whose
// frames are rows of a table; then what stands for "symbol of a step" is the row.
#include "common.cuh"

constexpr uint32_t NONE = 0xffffffffu;  // no symbol, no element, no distractors: BLANK, PAD

enum Meta {
    FIRST,          // index of the sample's first element
    COUNT,          // its elements
    LENGTH,         // its timesteps
    DISTRACTORS,    // where its distractors begin, or NONE
    KEY_LOW, KEY_HIGH,      // of its noise
    INDEX_LOW, INDEX_HIGH,  // its index in the noise's counter
    META
};

// Grid (steps / 256, B), 256 threads. symbols, labels, element [B, steps] of the timesteps t0, t0 + 1, ...; the steps
// of a symbol before its last are no element's.
extern "C" __global__ void __launch_bounds__(256)
expand_window_u32(const uint32_t* __restrict__ packed, uint32_t* __restrict__ symbols, uint32_t* __restrict__ labels,
                  uint32_t* __restrict__ element, int batch, int total, int steps, uint32_t t0, uint32_t frames) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
    if (t >= steps) return;
    const uint32_t* meta = packed + b * META;
    const uint32_t at = t0 + t;
    uint32_t symbol = NONE, label = 0, number = NONE;
    if (at >= t0 && at < meta[LENGTH]) {
        const uint32_t first = meta[FIRST], distractors = meta[DISTRACTORS];
        const uint32_t* starts = packed + batch * META + first;
        // The last element that starts at or before `at`; the first one starts at 0.
        uint32_t low = 0, high = meta[COUNT];
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (starts[middle] <= at) low = middle; else high = middle;
        }
        const uint32_t inside = at - starts[low];
        if (inside + 1 >= frames) number = low;
        label = starts[total + low];
        if (inside < frames) {
            symbol = starts[2 * total + low] * frames + inside;
        } else if (distractors != NONE) {
            // What was shown before this step and was no element. All that is shown takes `frames` steps.
            symbol = packed[distractors + at / frames - (low + 1)] * frames + at % frames;
        }
    }
    const long long i = (long long)b * steps + t;
    symbols[i] = symbol;
    labels[i] = label;
    element[i] = number;
}

// Elements of the output that a block writes.
constexpr int TILE = 4096;

// Where recordings are shown, the table of their frames: `values` [rows, features], or counts that are mostly 0: those
// of row r are entries[starts[r]] to entries[starts[r + 1] - 1], by channel, channel << 16 | count. Null: one-hot.
struct Table {
    const float* values;
    const uint32_t* starts;
    const uint32_t* entries;
};

// The channels from `channel` on, four at most, of what a step shows.
__device__ __forceinline__ void shown(const Table& table, uint32_t symbol, int channel, int features,
                                      float (&value)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) value[j] = 0.f;
    if (symbol == NONE) return;
    if (table.values) {
        const float* row = table.values + (long long)symbol * features + channel;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (channel + j < features) value[j] = row[j];
        }
    } else if (table.starts) {
        const uint32_t end = table.starts[symbol + 1];
        uint32_t low = table.starts[symbol], high = end;
        // The first entry of these channels.
        while (low < high) {
            const uint32_t middle = low + (high - low) / 2;
            if ((int)(table.entries[middle] >> 16) < channel) low = middle + 1; else high = middle;
        }
        for (; low < end; low++) {
            const uint32_t entry = table.entries[low];
            const int j = (int)(entry >> 16) - channel;
            if (j >= 4) break;
            // Not value[j]: an index that is not constant would move the array to memory.
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (j == k) value[k] = (float)(entry & 0xffffu);
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (symbol == (uint32_t)(channel + j)) value[j] = 1.f;
        }
    }
}

// Grid B*steps*features / TILE, 256 threads. x [B, steps, features]: symbols plus noise, which is `drawn`
// [B, steps, features] or, where that is null, `level` times a number in [0, 1) by Philox: counter [channel / 4,
// step, index low, index high]. Noise ends with a sample.
// Four channels have one counter, and rows begin anywhere: the tile is put together in shared memory.
template <class T>
__device__ __forceinline__ void dense(const uint32_t* __restrict__ packed, const uint32_t* __restrict__ symbols,
                                      const float* __restrict__ drawn, const Table& table, T* __restrict__ x,
                                      int batch, int steps, int features, uint32_t t0, float level) {
    __shared__ __align__(16) T tile[TILE];
    constexpr int V = 16 / sizeof(T);
    const long long begin = (long long)blockIdx.x * TILE;
    const int size = (int)min((long long)TILE, (long long)batch * steps * features - begin);
    const int row0 = (int)(begin / features), channel0 = (int)(begin % features);
    const int groups = ceil_div(features, 4);
    // The last element of the tile, counted from the start of its first row.
    const int last = channel0 + size - 1;
    const int items = last / features * groups + last % features / 4;
    for (int item = channel0 / 4 + threadIdx.x; item <= items; item += blockDim.x) {
        const int row = item / groups, channel = item % groups * 4;
        const int r = row0 + row, b = r / steps, t = r % steps;
        const uint32_t* meta = packed + b * META;
        const uint32_t at = t0 + t, symbol = symbols[r];
        float noise[4] = {0.f, 0.f, 0.f, 0.f};
        if (drawn) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (channel + j < features) noise[j] = drawn[(long long)r * features + channel + j];
            }
        } else if (level != 0.f && at >= t0 && at < meta[LENGTH]) {
            const uint4 bits = philox4x32(make_uint4(channel / 4, at, meta[INDEX_LOW], meta[INDEX_HIGH]),
                                          make_uint2(meta[KEY_LOW], meta[KEY_HIGH]));
            // Rounded as on the CPU: the product first, then the sum.
            noise[0] = __fmul_rn(unit_f32(bits.x), level);
            noise[1] = __fmul_rn(unit_f32(bits.y), level);
            noise[2] = __fmul_rn(unit_f32(bits.z), level);
            noise[3] = __fmul_rn(unit_f32(bits.w), level);
        }
        float value[4];
        shown(table, symbol, channel, features, value);
        // Where the four channels lie in the tile; the tile may begin or end between them.
        const int place = row * features + channel - channel0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = place + j;
            if (channel + j >= features || i < 0 || i >= size) continue;
            tile[i] = from_f<T>(__fadd_rn(noise[j], value[j]));
        }
    }
    __syncthreads();
    // x is a new buffer, and tiles are multiples of 16 bytes.
    for (int i = threadIdx.x; i < size / V; i += blockDim.x) {
        *reinterpret_cast<uint4*>(x + begin + i * V) = *reinterpret_cast<const uint4*>(tile + i * V);
    }
    for (int i = size / V * V + threadIdx.x; i < size; i += blockDim.x) x[begin + i] = tile[i];
}

#define EXPAND(T, suffix)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
    expand_dense_##suffix(const uint32_t* packed, const uint32_t* symbols, const float* drawn, const float* values, \
                          const uint32_t* starts, const uint32_t* entries, T* x, int batch, int steps,              \
                          int features, uint32_t t0, float level) {                                                 \
        dense<T>(packed, symbols, drawn, Table{values, starts, entries}, x, batch, steps, features, t0, level);     \
    }
EXPAND(float, f32)
EXPAND(bf16, bf16)
