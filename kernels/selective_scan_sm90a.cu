// The selective scan's backward pass on GPUs of compute capability 9.0: as selective_scan.cu has it, but a warpgroup
// prepares the inputs of the next steps and finishes the outputs of the last while two others walk over the steps between.
// All that is done for a channel and step alone, such as the softplus, and the sums over warps are off the way of the
// recurrence, and its warps never wait for each other. Of few states that would be too much for one warpgroup.
#include "selective_scan.cuh"
#include "wgmma.cuh"

namespace {

constexpr int WALKING = 2 * WARPGROUP, SERVING = WARPGROUP, ALL = WALKING + SERVING;

struct Served {
    static constexpr int SERVERS = SERVING / WARP;
    // Barrier 0 is __syncthreads. Inputs have two buffers; sums and room for them take turns.
    enum { STAFF = 1, INPUTS = 2, SUMS = 4, ROOM = 5 };

    // Together as many registers as three warpgroups start with, 168 each.
    static __device__ __forceinline__ void begin_serving() { fewer_registers<24>(); }
    static __device__ __forceinline__ void begin_walking() { more_registers<240>(); }
    static __device__ __forceinline__ void sync_staff() { named_barrier(STAFF, SERVING); }
    static __device__ __forceinline__ void give_inputs(int turn) { named_barrier_arrive(INPUTS + turn % 2, ALL); }
    static __device__ __forceinline__ void wait_for_inputs(int turn) { named_barrier(INPUTS + turn % 2, ALL); }
    static __device__ __forceinline__ void give_sums() { named_barrier_arrive(SUMS, ALL); }
    static __device__ __forceinline__ void wait_for_sums() { named_barrier(SUMS, ALL); }
    static __device__ __forceinline__ void give_room() { named_barrier_arrive(ROOM, ALL); }
    static __device__ __forceinline__ void wait_for_room() { named_barrier(ROOM, ALL); }
};

}  // namespace

// At most ceil(D / GROUP) B segments blocks of ALL threads, one on a multiprocessor; all else as selective_scan.cu says.
#define SERVED(NAME, T, LANES, TILES, GROUP) BACKWARD(NAME, T, ALL, 1, LANES, TILES, WALKING / WARP, GROUP, Served)
SERVED(selective_scan_backward_l32_f32_sm90a, float, 32, 1, 64)
SERVED(selective_scan_backward_l32_bf16_sm90a, bf16, 32, 1, 64)
SERVED(selective_scan_backward_l64_f32_sm90a, float, 32, 2, 32)
SERVED(selective_scan_backward_l64_bf16_sm90a, bf16, 32, 2, 32)
