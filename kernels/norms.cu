// Norms over rows of n elements: layer norm, and RMS norm without and with a gate.
//
//   layer      equations in layer_norm.cuh
//   rms        y = w ⊙ û                 u = x
//   rms_after  y = w ⊙ û ⊙ silu(z)       u = x            (flash-linear-attention)
//   rms_before y = w ⊙ û                 u = x ⊙ silu(z)  (Mamba-2, norm_before_gate = False)
//   rms_sigmoid y = w ⊙ û ⊙ σ(z)         u = x            (Kimi delta attention, xLSTM)
//
// with û = r u; r = 1/√(mean u² + eps), or 1/(√(mean u²) + eps) if `outside`. With g the gradient of û,
// du = r (g − û mean(g û) k), k = 1 inside and k = (√(mean u²) + eps)/√(mean u²) outside.
// Sources: Zhang, Sennrich, "Root mean square layer normalization", 2019; Dao, Gu, "Transformers are SSMs", 2024.
//
// x, z, y [rows, n]; w [n] in f32. A row is what one weight vector spans: a group of a tensor's last dimension.
// Grid: any; the blocks take rows in turn. Block: 256 threads, or one team where it is wider than a warp.
// Shared memory: n floats, or n for each warp where a thread has one vector (layer: see layer_norm.cuh). backward:
// partial [blocks, n] (layer [blocks, 2, n]) takes the sums for the weights, which columns_final adds.
#include "layer_norm.cuh"

enum Gate { NONE, AFTER, BEFORE, SIGMOID };

// What a gate after the norm multiplies with.
template <Gate GATE>
__device__ __forceinline__ float opened(float z) { return GATE == SIGMOID ? sigmoid(z) : silu(z); }

__device__ __forceinline__ float rms_factor(float square, float eps, int outside) {
    return outside ? 1.f / (sqrtf(square) + eps) : 1.f / sqrtf(square + eps);
}

template <class T, int VEC, int NV, Gate GATE>
__device__ __forceinline__ void rms_forward(const T* x, const T* z, const float* w, T* y, int rows, int n,
                                            int log_lanes, float eps, int outside) {
    __shared__ float scratch[2 * THREADS_WIDE / WARP];
    DYNAMIC_SHARED(memory);
    const Team team(log_lanes, scratch);
    const RowParam<VEC, NV> scale(w, n, team, reinterpret_cast<float*>(memory));
    if (NV > 1) __syncthreads();
    for (int first = blockIdx.x * team.count; first < rows; first += gridDim.x * team.count) {
        const int row = first + team.index;
        const bool live = row < rows;
        const long long at = (long long)row * n;
        float u[VEC * NV], gate[VEC * NV];
        load_row<VEC, NV>(x + at, n, live, team, u);
        if constexpr (GATE != NONE) load_row<VEC, NV>(z + at, n, live, team, gate);
        float sum[1] = {0.f};
#pragma unroll
        for (int i = 0; i < VEC * NV; i++) {
            if constexpr (GATE == BEFORE) u[i] *= silu(gate[i]);
            sum[0] += u[i] * u[i];
        }
        team_sum(sum, team);
        const float r = rms_factor(sum[0] / n, eps, outside);
#pragma unroll
        for (int v = 0; v < NV; v++) {
            float w[VEC];
            scale.get(v, team, w);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const int e = v * VEC + i;
                u[e] *= r * w[i];
                if constexpr (GATE == AFTER || GATE == SIGMOID) u[e] *= opened<GATE>(gate[e]);
            }
        }
        store_row<VEC, NV>(y + at, n, live, team, u);
    }
}

template <class T, int VEC, int NV, Gate GATE>
__device__ __forceinline__ void rms_backward(const T* x, const T* z, const float* w, const T* dy, T* dx, T* dz,
                                             float* partial, int rows, int n, int log_lanes, float eps,
                                             int outside) {
    __shared__ float scratch[2 * THREADS_WIDE / WARP];
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const Team team(log_lanes, scratch);
    const RowParam<VEC, NV> scale(w, n, team, shared);
    if (NV > 1) __syncthreads();
    float dw[VEC * NV];
#pragma unroll
    for (int i = 0; i < VEC * NV; i++) dw[i] = 0.f;
    for (int first = blockIdx.x * team.count; first < rows; first += gridDim.x * team.count) {
        const int row = first + team.index;
        const bool live = row < rows;
        const long long at = (long long)row * n;
        float u[VEC * NV], g[VEC * NV], gate[VEC * NV];
        load_row<VEC, NV>(x + at, n, live, team, u);
        load_row<VEC, NV>(dy + at, n, live, team, g);
        if constexpr (GATE != NONE) load_row<VEC, NV>(z + at, n, live, team, gate);
        // Σ u² and Σ g u, where g becomes the gradient of w ⊙ û and w g that of û.
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int v = 0; v < NV; v++) {
            float w[VEC];
            scale.get(v, team, w);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const int e = v * VEC + i;
                const float s = GATE == BEFORE ? u[e] * silu(gate[e]) : u[e];
                const float d = GATE == AFTER || GATE == SIGMOID ? g[e] * opened<GATE>(gate[e]) : g[e];
                sums[0] += s * s;
                sums[1] += d * w[i] * s;
            }
        }
        team_sum(sums, team);
        const float square = sums[0] / n;
        const float r = rms_factor(square, eps, outside);
        float along = sums[1] * r / n;
        if (outside) {
            // At zero the root has no derivative, but the product with û vanishes.
            const float root = sqrtf(square);
            along = root > 0.f ? along * ((root + eps) / root) : 0.f;
        }
        float dgate[VEC * NV];
#pragma unroll
        for (int v = 0; v < NV; v++) {
            float w[VEC];
            scale.get(v, team, w);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const int e = v * VEC + i;
                if constexpr (GATE == NONE) {
                    const float hat = u[e] * r;
                    dw[e] += g[e] * hat;
                    u[e] = r * (g[e] * w[i] - hat * along);
                } else {
                    const float s = sigmoid(gate[e]), act = GATE == SIGMOID ? s : gate[e] * s;
                    const float slope = s * (GATE == SIGMOID ? 1.f - s : 1.f + gate[e] * (1.f - s));
                    if constexpr (GATE != BEFORE) {
                        const float hat = u[e] * r;
                        dw[e] += g[e] * act * hat;
                        dgate[e] = g[e] * w[i] * hat * slope;
                        u[e] = r * (g[e] * act * w[i] - hat * along);
                    } else {
                        const float hat = u[e] * act * r;
                        dw[e] += g[e] * hat;
                        const float du = r * (g[e] * w[i] - hat * along);
                        dgate[e] = du * u[e] * slope;
                        u[e] = du * act;
                    }
                }
            }
        }
        store_row<VEC, NV>(dx + at, n, live, team, u);
        if constexpr (GATE != NONE) store_row<VEC, NV>(dz + at, n, live, team, dgate);
    }
    store_block_sum<VEC, NV>(dw, n, team, shared, partial + (long long)n * blockIdx.x);
}

#define LAYER(NAME, SUFFIX, T, VEC, NV, ...)                                                                       \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) norms_layer_forward_##NAME##_##SUFFIX(               \
        const T* x, const float* w, const float* b, T* y, int rows, int n, int log_lanes, float eps) {             \
        layer_norm_forward<T, VEC, NV, false>(nullptr, x, w, b, y, rows, n, log_lanes, eps, Mask());               \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) norms_layer_backward_##NAME##_##SUFFIX(              \
        const T* x, const float* w, const T* dy, T* dx, float* partial, int rows, int n, int log_lanes,            \
        float eps) {                                                                                               \
        layer_norm_backward<T, VEC, NV, false>(nullptr, x, w, dy, nullptr, dx, partial, rows, n, log_lanes, eps,   \
                                               Mask());                                                            \
    }

#define RMS(OP, GATE, NAME, SUFFIX, T, VEC, NV, ...)                                                               \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) norms_##OP##_forward_##NAME##_##SUFFIX(              \
        const T* x, const T* z, const float* w, T* y, int rows, int n, int log_lanes, float eps, int outside) {    \
        rms_forward<T, VEC, NV, GATE>(x, z, w, y, rows, n, log_lanes, eps, outside);                               \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) norms_##OP##_backward_##NAME##_##SUFFIX(             \
        const T* x, const T* z, const float* w, const T* dy, T* dx, T* dz, float* partial, int rows, int n,        \
        int log_lanes, float eps, int outside) {                                                                   \
        rms_backward<T, VEC, NV, GATE>(x, z, w, dy, dx, dz, partial, rows, n, log_lanes, eps, outside);            \
    }

#define KERNELS(...)               \
    LAYER(__VA_ARGS__)             \
    RMS(rms, NONE, __VA_ARGS__)    \
    RMS(rms_after, AFTER, __VA_ARGS__) \
    RMS(rms_before, BEFORE, __VA_ARGS__) \
    RMS(rms_sigmoid, SIGMOID, __VA_ARGS__)

KERNELS(small, f32, float, VECTOR<float>, 1, THREADS, 3)
KERNELS(wide, f32, float, VECTOR<float>, MANY / VECTOR<float>, THREADS_WIDE)
KERNELS(odd, f32, float, 1, MANY, THREADS)
KERNELS(small, bf16, bf16, VECTOR<bf16>, 1, THREADS, 3)
KERNELS(wide, bf16, bf16, VECTOR<bf16>, MANY / VECTOR<bf16>, THREADS_WIDE)
KERNELS(odd, bf16, bf16, 1, MANY, THREADS)
