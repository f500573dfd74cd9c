// CPU emulation of the CUDA subset used by kernels/*.cu. See README.md. One .so per kernel file, one OS thread,
// each CUDA thread of a block is a fiber; blocks run one after the other.
#pragma once
#ifndef EMU_SCAN
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <assert.h>
#include <stdint.h>
#include <stddef.h>
#include <limits.h>
#include <float.h>
#include <signal.h>
#include <unistd.h>
#include <dlfcn.h>
#include <link.h>
#include <execinfo.h>
#include <sys/mman.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <algorithm>
#include <array>
#include <tuple>
#include <vector>
#endif

#ifdef EMU_SCAN
#define __global__ EMU_GLOBAL_MARK
#else
#define __global__
#endif
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__
#define __managed__
#define __grid_constant__
#define __shared__ static thread_local  // all TLS of the .so is shared memory; poisoned before each block

#ifndef EMU_SCAN
#define __CUDA_ARCH__ 900
// ------------------------------------------------------------------------------------------------ vector types
#define EMU_VEC(T, N)                                                                    \
  struct N##1 { T x; };                                                                     \
  struct __attribute__((aligned(sizeof(T) * 2))) N##2 { T x, y; };                          \
  struct N##3 { T x, y, z; };                                                               \
  struct __attribute__((aligned(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4))) N##4 { T x, y, z, w; }; \
  static inline N##1 make_##N##1(T x) { return N##1{x}; }                                   \
  static inline N##2 make_##N##2(T x, T y) { return N##2{x, y}; }                           \
  static inline N##3 make_##N##3(T x, T y, T z) { return N##3{x, y, z}; }                   \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return N##4{x, y, z, w}; }
EMU_VEC(signed char, char)
EMU_VEC(unsigned char, uchar)
EMU_VEC(short, short)
EMU_VEC(unsigned short, ushort)
EMU_VEC(int, int)
EMU_VEC(unsigned, uint)
EMU_VEC(long long, longlong)
EMU_VEC(unsigned long long, ulonglong)
EMU_VEC(float, float)
EMU_VEC(double, double)
struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------------- scheduler
asm(R"(
.text
.p2align 4
.type emu_switch_fiber,@function
emu_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_fiber, .-emu_switch_fiber
)");
extern "C" __attribute__((visibility("hidden"))) void emu_switch_fiber(void** save_sp, void* to_sp);

namespace emu {
static constexpr int MAX_THREADS = 1024;
static constexpr size_t STACK = 256 * 1024, MAX_SMEM = 1024 * 1024;

struct Copy { void* dst; const void* src; int size, bytes; long group; };
struct Fiber {
  void* sp; uint3 tid; int index;
  bool done;
  const char* what; void* pc; int id; uint32_t mask;  // what it waits for (what == nullptr: it doesn't)
  std::vector<Copy> copies; long groups;              // cp.async
};
typedef void (*Work)(void** args, uint32_t mask);
struct Group { uint32_t mask, arrived; Work work; const char* what; };
struct Warp { uint32_t alive; int n; Group group[32]; void* arg[32]; };
struct Barrier { int arrived, count, kind; long acc; std::vector<int> waiting; std::vector<long*> out; };

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static Barrier barriers[16];
static int ready[MAX_THREADS], n_ready, n_threads, n_alive;
static Fiber* cur; static void* main_sp; static char* stacks; static int n_stacks;
static uint64_t rng_state;
static const char* kernel_name = "?";
static void (*entry_fn)(void*); static void* entry_ctx;
static unsigned char *smem_region, *smem_base; static size_t smem_bytes;

static inline uint32_t rng() {
  rng_state ^= rng_state << 13; rng_state ^= rng_state >> 7; rng_state ^= rng_state << 17;
  return (uint32_t)(rng_state >> 32);
}
static void print_pc(void* const* pcs, int n) {  // source lines of addresses inside this .so
  Dl_info me; if (!dladdr((void*)&print_pc, &me)) return;
  for (int i = 0; i < n; i++) {
    Dl_info d; if (!dladdr(pcs[i], &d) || d.dli_fbase != me.dli_fbase) continue;
    char cmd[1024];
    snprintf(cmd, sizeof cmd, "addr2line -Cfpie '%s' 0x%lx 2>/dev/null | grep -v 'emulate\\.h' | sed 's/^/      at /' >&2", me.dli_fname,
             (unsigned long)((char*)pcs[i] - (char*)d.dli_fbase - 1));
    fflush(stderr); if (system(cmd)) {}
  }
}
static void where() {
  fprintf(stderr, "emu: kernel %s, block (%u,%u,%u)", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
  if (cur) fprintf(stderr, ", thread (%u,%u,%u)", cur->tid.x, cur->tid.y, cur->tid.z);
  fprintf(stderr, "\n");
}
template <class... A> [[noreturn]] static __attribute__((noinline)) void fail(const char* fmt, A... a) {
  fflush(stdout); fprintf(stderr, "\nemu: ERROR: "); fprintf(stderr, fmt, a...); fprintf(stderr, "\n"); abort();
}
[[noreturn]] static __attribute__((noinline)) void deadlock() {
  fflush(stdout);
  fprintf(stderr, "\nemu: ERROR: DEADLOCK: %d of %d threads have exited, the other %d all wait:\n", n_threads - n_alive, n_threads, n_alive);
  std::vector<char> seen(n_threads, 0);
  int printed = 0;
  for (int i = 0; i < n_threads; i++) {
    Fiber& f = fibers[i]; if (f.done || seen[i]) continue;
    int c = 0;
    for (int j = i; j < n_threads; j++) { Fiber& g = fibers[j];
      if (!g.done && g.what == f.what && g.pc == f.pc && g.id == f.id && g.mask == f.mask) { seen[j] = 1; c++; } }
    if (++printed > 12) continue;
    fprintf(stderr, "  %d thread(s), first (%u,%u,%u) = #%d (warp %d lane %d): %s", c, f.tid.x, f.tid.y, f.tid.z, i, i / 32, i % 32, f.what);
    if (f.id >= 0) fprintf(stderr, " id %d (%d of %d arrived)", f.id, barriers[f.id].arrived, barriers[f.id].count ? barriers[f.id].count : n_alive);
    else { fprintf(stderr, " mask 0x%08x", f.mask);
      for (int k = 0; k < warps[i / 32].n; k++) if (warps[i / 32].group[k].arrived >> (i % 32) & 1) fprintf(stderr, ", arrived 0x%08x", warps[i / 32].group[k].arrived); }
    fprintf(stderr, "\n"); print_pc(&f.pc, 1);
  }
  abort();
}
static inline void make_ready(int i) { ready[n_ready++] = i; }
// leave the current fiber (it must be in `ready` or be woken by someone) and run a random ready one
static __attribute__((noinline)) void reschedule(void** save) {
  if (n_ready == 0) deadlock();
  int k = (int)(((uint64_t)rng() * n_ready) >> 32), i = ready[k];
  ready[k] = ready[--n_ready];
  Fiber* next = &fibers[i];
  if (&next->sp == save) return;
  cur = next; threadIdx = next->tid;
  emu_switch_fiber(save, next->sp);
}
static inline void yield() { make_ready(cur->index); reschedule(&cur->sp); }

static void complete(Warp& w, int base, int gi, int self) {
  Group g = w.group[gi]; w.group[gi] = w.group[--w.n];
  if (g.work) g.work(w.arg, g.arrived);
  for (uint32_t m = g.arrived; m; m &= m - 1) { int l = __builtin_ctz(m); fibers[base + l].what = nullptr; if (base + l != self) make_ready(base + l); }
}
// All lanes of `mask` (that have not exited) meet; the last one runs work() for everyone.
static __attribute__((noinline)) void collective(uint32_t mask, Work work, const char* what, void* arg) {
  int wi = cur->index >> 5, lane = cur->index & 31; Warp& w = warps[wi];
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask 0x%08x", what, lane, mask);
  int gi = -1;
  for (int k = 0; k < w.n; k++) {
    Group& g = w.group[k]; if (!(g.mask & mask)) continue;
    if (g.mask != mask || g.work != work)
      fail("lane %d of warp %d calls %s with mask 0x%08x while lanes 0x%08x wait in %s with mask 0x%08x", lane, wi, what, mask, g.arrived, g.what, g.mask);
    gi = k;
  }
  if (gi < 0) { gi = w.n++; w.group[gi] = Group{mask, 0, work, what}; }
  w.arg[lane] = arg; w.group[gi].arrived |= 1u << lane;
  cur->what = what; cur->pc = __builtin_return_address(0); cur->id = -1; cur->mask = mask;
  if (!((mask & w.alive) & ~w.group[gi].arrived)) { complete(w, wi << 5, gi, -1); }
  reschedule(&cur->sp);
}
static void release(Barrier& b) {
  for (int i : b.waiting) { fibers[i].what = nullptr; make_ready(i); }
  for (long* o : b.out) if (o) *o = b.acc;
  b.waiting.clear(); b.out.clear(); b.arrived = 0; b.count = 0;
}
enum { SYNC, AND, OR, COUNT };
static __attribute__((noinline)) long barrier(int id, int count, int kind, long value, bool wait, const char* what) {
  if (id < 0 || id > 15) fail("named barrier id %d is not in 0..15", id);
  Barrier& b = barriers[id]; long out = 0;
  if (b.arrived && (b.count != count || b.kind != kind)) fail("barrier %d: %s with count %d meets one with count %d or of another kind", id, what, count, b.count);
  if (!b.arrived) { b.count = count; b.kind = kind; b.acc = kind == AND; }
  b.arrived++;
  if (kind == AND) b.acc = b.acc && value; else if (kind == OR) b.acc = b.acc || value; else if (kind == COUNT) b.acc += value != 0;
  if (wait) { b.waiting.push_back(cur->index); b.out.push_back(&out); cur->what = what; cur->pc = __builtin_return_address(0); cur->id = id; cur->mask = 0; }
  if (b.arrived >= (count ? count : n_alive)) release(b);
  if (wait) reschedule(&cur->sp);
  return out;
}
static void do_copy(const Copy& c) {
  memcpy(c.dst, c.src, c.bytes);
  if (c.bytes < c.size) memset((char*)c.dst + c.bytes, 0, c.size - c.bytes);
}
static void fiber_main() {
  entry_fn(entry_ctx);
  Fiber& f = *cur; int wi = f.index >> 5;
  if (!f.copies.empty()) {
    static bool told = false;
    if (!told) { told = true; fprintf(stderr, "emu: warning: a thread exits with cp.async copies it never waited for\n"); where(); }
    for (auto& c : f.copies) do_copy(c);
    f.copies.clear();
  }
  f.done = true; n_alive--;
  Warp& w = warps[wi]; w.alive &= ~(1u << (f.index & 31));
  for (int k = 0; k < w.n; k++) if (!((w.group[k].mask & w.alive) & ~w.group[k].arrived)) { complete(w, wi << 5, k, -1); k = -1; }
  for (auto& b : barriers) if (b.arrived && !b.count && n_alive && b.arrived >= n_alive) release(b);
  void* dead;
  if (!n_alive) emu_switch_fiber(&dead, main_sp);
  reschedule(&dead);
  __builtin_unreachable();
}
static unsigned char* dynamic_shared() { return smem_base; }

static volatile thread_local char tls_anchor;
struct Tls { char* base; size_t size; };
static int find_tls(struct dl_phdr_info* info, size_t, void* out) {
  bool mine = false; size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    auto& p = info->dlpi_phdr[i]; uintptr_t a = info->dlpi_addr + p.p_vaddr, me = (uintptr_t)&find_tls;
    if (p.p_type == PT_LOAD && me >= a && me < a + p.p_memsz) mine = true;
    if (p.p_type == PT_TLS) size = p.p_memsz;
  }
  if (!mine) return 0;
  *(Tls*)out = Tls{(char*)info->dlpi_tls_data, size};
  return 1;
}
static void on_signal(int sig, siginfo_t* si, void*) {
  static bool again = false;
  if (!again) {
    again = true; fflush(stdout);
    fprintf(stderr, "emu: %s%s\n", strsignal(sig), sig == SIGILL ? " (= failed -fsanitize check: array index out of bounds or misaligned vector access)" : sig == SIGALRM ? " (EMU_TIMEOUT reached)" : "");
    if (sig == SIGSEGV || sig == SIGBUS) fprintf(stderr, "emu: fault address %p (null: misaligned 16-byte access or wild pointer); dynamic shared memory is [%p,%p)\n", si->si_addr, smem_base, smem_base + smem_bytes);
    where();
    void* pcs[64]; int n = backtrace(pcs, 64); for (int i = 0; i < n; i++) if (pcs[i]) print_pc(pcs + i, 1);
  }
  signal(sig, SIG_DFL); signal(SIGABRT, SIG_DFL); abort();
}

static void run_grid(const char* name, dim3 g, dim3 b, size_t smem, void (*fn)(void*), void* ctx) {
  kernel_name = name; entry_fn = fn; entry_ctx = ctx; gridDim = g; blockDim = b; cur = nullptr;
  size_t nt = (size_t)b.x * b.y * b.z; n_threads = (int)nt;
  if (nt == 0 || nt > MAX_THREADS) fail("%s: %zu threads per block", name, nt);
  if (smem > MAX_SMEM) fail("%s: %zu bytes of dynamic shared memory", name, smem);
  const char* s = getenv("EMU_SEED"); rng_state = 0x9E3779B97F4A7C15ull * (uint64_t)((s ? atoll(s) : 1) * 2 + 1); for (int i = 0; i < 8; i++) rng();
  if (n_stacks < n_threads) {
    if (!stacks) stacks = (char*)mmap(nullptr, STACK * MAX_THREADS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (; n_stacks < n_threads; n_stacks++) if (mprotect(stacks + STACK * n_stacks + 4096, STACK - 4096, PROT_READ | PROT_WRITE)) fail("mprotect of stacks");
  }
  if (!smem_region) {
    smem_region = (unsigned char*)mmap(nullptr, MAX_SMEM + 16384, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(smem_region + MAX_SMEM + 8192, 4096, PROT_NONE);
  }
  size_t room = (smem + 1023) & ~(size_t)1023;  // the end of shared memory touches an unmapped page
  smem_base = smem_region + MAX_SMEM + 8192 - room; smem_bytes = smem;
  unsigned char *pre = smem_base - 1024, *post = smem_base + smem; size_t npost = room - smem;
  memset(pre, 0xFD, 1024); memset(post, 0xFD, npost);
  tls_anchor = 1; Tls tls{nullptr, 0}; dl_iterate_phdr(find_tls, &tls);

  static char alt[256 * 1024]; stack_t ss{}, old_ss; ss.ss_sp = alt; ss.ss_size = sizeof alt; sigaltstack(&ss, &old_ss);
  int sigs[] = {SIGSEGV, SIGBUS, SIGILL, SIGABRT, SIGFPE, SIGALRM}; struct sigaction sa{}, old[6];
  sa.sa_sigaction = on_signal; sa.sa_flags = SA_ONSTACK | SA_SIGINFO; for (int i = 0; i < 6; i++) sigaction(sigs[i], &sa, &old[i]);
  const char* to = getenv("EMU_TIMEOUT"); if (to) alarm(atoi(to));

  size_t nb = (size_t)g.x * g.y * g.z; std::vector<uint32_t> order(nb); for (size_t i = 0; i < nb; i++) order[i] = (uint32_t)i;
  const char* bo = getenv("EMU_BLOCKS");
  if (!(bo && !strcmp(bo, "order"))) for (size_t i = nb; i > 1; i--) std::swap(order[i - 1], order[rng() % i]);
  for (uint32_t bi : order) {
    blockIdx = uint3{bi % g.x, bi / g.x % g.y, bi / g.x / g.y};
    memset(smem_base, 0xFF, smem);
    if (tls.base) memset(tls.base, 0xFF, tls.size);
    n_alive = n_threads; n_ready = 0;
    for (int i = 0; i < (n_threads + 31) / 32; i++) { warps[i].n = 0; warps[i].alive = 0; }
    for (auto& x : barriers) { x.arrived = x.count = 0; x.waiting.clear(); x.out.clear(); }
    for (int i = 0; i < n_threads; i++) {
      Fiber& f = fibers[i]; f.index = i; f.tid = uint3{i % b.x, i / b.x % b.y, i / b.x / b.y};
      f.done = false; f.what = nullptr; f.copies.clear(); f.groups = 0;
      warps[i / 32].alive |= 1u << (i % 32);
      void** sp = (void**)(stacks + STACK * (i + 1) - 64 - (i * 37 % 512) * 64);  // 16-byte aligned; spread over the cache sets
      *--sp = nullptr; *--sp = (void*)&fiber_main; for (int k = 0; k < 6; k++) *--sp = nullptr;
      f.sp = sp; make_ready(i);
    }
    reschedule(&main_sp);
    cur = nullptr;
    for (auto& x : barriers) if (x.arrived) fail("barrier %d still had arrivals when the block ended", (int)(&x - barriers));
    for (int i = 0; i < 1024; i++) if (pre[i] != 0xFD) { where(); fail("%s wrote before dynamic shared memory (offset %d)", name, i - 1024); }
    for (size_t i = 0; i < npost; i++) if (post[i] != 0xFD) { where(); fail("%s wrote past its %zu bytes of dynamic shared memory (offset %zu)", name, smem, smem + i); }
  }
  if (to) alarm(0);
  for (int i = 0; i < 6; i++) sigaction(sigs[i], &old[i], nullptr);
  sigaltstack(&old_ss, nullptr);
  fflush(stdout);
}
template <class A> static constexpr int arg_code() {  // size*4 + (1 pointer, 2 floating, 3 integer, 0 other)
  return (int)sizeof(A) * 4 + (std::is_pointer<A>::value ? 1 : std::is_floating_point<A>::value ? 2 : std::is_integral<A>::value ? 3 : 0);
}
template <class... A, size_t... I>
static void run_impl(const char* name, void (*f)(A...), dim3 g, dim3 b, size_t smem, void** args, std::index_sequence<I...>) {
  struct Ctx { void (*f)(A...); void** args; } c{f, args};
  run_grid(name, g, b, smem, [](void* p) { Ctx& c = *(Ctx*)p; (void)c.args; c.f(*(std::remove_cv_t<A>*)c.args[I]...); }, &c);
}
template <class... A> static void run(const char* name, void (*f)(A...), dim3 g, dim3 b, size_t smem, void** args) {
  run_impl(name, f, g, b, smem, args, std::index_sequence_for<A...>{});
}
template <class... A> static int describe(void (*)(A...), int* out) {
  int codes[] = {arg_code<A>()..., 0}; for (size_t i = 0; i < sizeof...(A); i++) out[i] = codes[i];
  return (int)sizeof...(A);
}

// ----------------------------------------------------------------------------------- barriers and warp collectives
static inline void named_barrier(int id, int count) { barrier(id, count, SYNC, 0, true, "named barrier"); }
static inline void named_barrier_arrive(int id, int count) { barrier(id, count, SYNC, 0, false, "named barrier arrive"); }

struct ShflArg { unsigned char in[8], out[8]; int size, mode, b, width; };
static void shfl_work(void** args, uint32_t mask) {
  for (uint32_t m = mask; m; m &= m - 1) {
    int lane = __builtin_ctz(m); ShflArg& a = *(ShflArg*)args[lane];
    int seg = ~(a.width - 1) & 31, lo = lane & seg, hi = lo | (~seg & 31), j; bool ok;
    switch (a.mode) {
      case 0: j = lo | (a.b & ~seg & 31); ok = true; break;
      case 1: j = lane - a.b; ok = j >= lo; break;
      case 2: j = lane + a.b; ok = j <= hi; break;
      default: j = lane ^ a.b; ok = j <= hi && j >= 0; break;
    }
    if (!ok) j = lane;
    if (mask >> j & 1) { ShflArg& s = *(ShflArg*)args[j]; if (s.mode != a.mode || s.size != a.size) fail("lanes %d and %d use different kinds of shuffle", lane, j); memcpy(a.out, s.in, 8); }
    else memset(a.out, 0xFF, 8);  // reading a lane that is not there: poison
  }
}
template <class T> static inline __attribute__((always_inline)) T shfl(uint32_t mask, T v, int mode, int b, int width, const char* what) {
  static_assert(sizeof(T) <= 8, "shuffle of at most 8 bytes");
  ShflArg a; a.size = sizeof(T); a.mode = mode; a.b = b; a.width = width; memcpy(a.in, &v, sizeof(T));
  collective(mask, shfl_work, what, &a);
  memcpy(&v, a.out, sizeof(T)); return v;
}
struct VoteArg { long long v; unsigned long long out; int kind; };
static void vote_work(void** args, uint32_t mask) {
  uint32_t ballot = 0; int kind = -1;
  for (uint32_t m = mask; m; m &= m - 1) { int l = __builtin_ctz(m); VoteArg& a = *(VoteArg*)args[l]; if (a.v) ballot |= 1u << l;
    if (kind >= 0 && kind != a.kind) fail("lanes of one warp use different kinds of vote");
    kind = a.kind; }
  long long r = 0; bool first = true;
  if (kind >= 10) for (uint32_t m = mask; m; m &= m - 1) { long long v = ((VoteArg*)args[__builtin_ctz(m)])->v;
    if (first) { r = v; first = false; continue; }
    switch (kind) { case 10: r += v; break; case 11: r = std::min(r, v); break; case 12: r = std::max(r, v); break; case 13: r &= v; break; case 14: r |= v; break; default: r ^= v; } }
  for (uint32_t m = mask; m; m &= m - 1) { VoteArg& a = *(VoteArg*)args[__builtin_ctz(m)];
    if (kind >= 10) a.out = (unsigned long long)r; else if (kind == 0) a.out = ballot; else if (kind == 1) a.out = ballot != 0; else if (kind == 2) a.out = ballot == mask;
    else { a.out = 0; for (uint32_t k = mask; k; k &= k - 1) { int l = __builtin_ctz(k); if (((VoteArg*)args[l])->v == a.v) a.out |= 1u << l; } } }
}
static inline __attribute__((always_inline)) unsigned long long vote(uint32_t mask, long long v, int kind, const char* what) { VoteArg a{v, 0, kind}; collective(mask, vote_work, what, &a); return a.out; }

// ------------------------------------------------------------------------------------------------- tensor cores
static inline float bits_f(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t f_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
struct MmaArg { float* c; const uint32_t *a, *b; };
static inline void full_warp(uint32_t mask, const char* what) { if (mask != 0xffffffffu) fail("%s by lanes 0x%08x only", what, mask); }
// c + d rounded towards zero, as tensor cores add: after thousands of sums it shows.
static inline float add_towards_zero(float c, float d) {
  const float s = c + d, b = s - c, rest = (c - (s - b)) + (d - b);  // s + rest is exact
  uint32_t bits; memcpy(&bits, &s, 4);
  bits -= (rest < 0 && s > 0) || (rest > 0 && s < 0);
  return bits_f(bits);
}
template <int K> static inline void mma_finish(MmaArg** p, float (*A)[K], float (*B)[8]) {
  typedef float v8 __attribute__((vector_size(32), aligned(4)));
  float D[16][8];
  for (int i = 0; i < 16; i++) { v8 d = {}; for (int k = 0; k < K; k++) d += A[i][k] * *(v8*)B[k]; *(v8*)D[i] = d; }
  for (int l = 0; l < 32; l++) { int g = l >> 2, t = l & 3; float* c = p[l]->c;
    for (int i = 0; i < 4; i++) c[i] = add_towards_zero(c[i], D[g + i / 2 * 8][2 * t + i % 2]); }
}
template <int K> static void mma_bf16_work(void** args, uint32_t mask) {
  full_warp(mask, "mma bf16"); MmaArg** p = (MmaArg**)args; float A[16][K], B[K][8];
  for (int l = 0; l < 32; l++) { int g = l >> 2, t = l & 3;
    for (int r = 0; r < K / 4; r++) { uint32_t v = p[l]->a[r]; int row = g + 8 * (r & 1), k = 2 * t + 8 * (r >> 1); A[row][k] = bits_f(v << 16); A[row][k + 1] = bits_f(v & 0xffff0000u); }
    for (int r = 0; r < K / 8; r++) { uint32_t v = p[l]->b[r]; int k = 2 * t + 8 * r; B[k][g] = bits_f(v << 16); B[k + 1][g] = bits_f(v & 0xffff0000u); } }
  mma_finish<K>(p, A, B);
}
template <int K> static void mma_tf32_work(void** args, uint32_t mask) {
  full_warp(mask, "mma tf32"); MmaArg** p = (MmaArg**)args; float A[16][K], B[K][8];
  auto tf = [](uint32_t v) { return bits_f(v & 0xffffe000u); };
  for (int l = 0; l < 32; l++) { int g = l >> 2, t = l & 3;
    for (int r = 0; r < K / 2; r++) A[g + 8 * (r & 1)][t + 4 * (r >> 1)] = tf(p[l]->a[r]);
    for (int r = 0; r < K / 4; r++) B[t + 4 * r][g] = tf(p[l]->b[r]); }
  mma_finish<K>(p, A, B);
}
#define EMU_MMA(name, work, NA, NB) \
  static inline __attribute__((always_inline)) void name(float (&c)[4], const uint32_t (&a)[NA], const uint32_t (&b)[NB]) { MmaArg m{c, a, b}; collective(0xffffffffu, work, #name, &m); }
EMU_MMA(mma_m16n8k16_bf16, mma_bf16_work<16>, 4, 2)
EMU_MMA(mma_m16n8k8_bf16, mma_bf16_work<8>, 2, 1)
EMU_MMA(mma_m16n8k8_tf32, mma_tf32_work<8>, 4, 2)
EMU_MMA(mma_m16n8k4_tf32, mma_tf32_work<4>, 2, 1)

struct LdArg { uint32_t* r; const void* p; };
template <int N, bool TRANS, bool STORE> static void ldmatrix_work(void** args, uint32_t mask) {
  full_warp(mask, STORE ? "stmatrix" : "ldmatrix"); LdArg** p = (LdArg**)args;
  for (int l = 0; l < 8 * N; l++) if ((uintptr_t)p[l]->p % 16) fail("%s: lane %d's row address %p is not 16-byte aligned", STORE ? "stmatrix" : "ldmatrix", l, p[l]->p);
  for (int j = 0; j < N; j++) for (int l = 0; l < 32; l++) {
    int a = l >> 2, t = l & 3; uint16_t* h = (uint16_t*)&p[l]->r[j]; uint16_t* e[2];
    for (int k = 0; k < 2; k++) e[k] = TRANS ? (uint16_t*)p[8 * j + 2 * t + k]->p + a : (uint16_t*)p[8 * j + a]->p + 2 * t + k;
    for (int k = 0; k < 2; k++) if (STORE) memcpy(e[k], h + k, 2); else memcpy(h + k, e[k], 2);
  }
}
#define EMU_LDM(name, N, TRANS) \
  static inline __attribute__((always_inline)) void name(uint32_t (&r)[N], const void* row) { LdArg a{r, row}; collective(0xffffffffu, ldmatrix_work<N, TRANS, false>, #name, &a); }
#define EMU_STM(name, N, TRANS) \
  static inline __attribute__((always_inline)) void name(void* row, const uint32_t (&r)[N]) { LdArg a{(uint32_t*)r, row}; collective(0xffffffffu, ldmatrix_work<N, TRANS, true>, #name, &a); }
EMU_LDM(ldmatrix_x4, 4, false) EMU_LDM(ldmatrix_x4_trans, 4, true) EMU_LDM(ldmatrix_x2, 2, false) EMU_LDM(ldmatrix_x2_trans, 2, true)
EMU_LDM(ldmatrix_x1, 1, false) EMU_LDM(ldmatrix_x1_trans, 1, true)
EMU_STM(stmatrix_x4, 4, false) EMU_STM(stmatrix_x4_trans, 4, true) EMU_STM(stmatrix_x2, 2, false) EMU_STM(stmatrix_x2_trans, 2, true)

// cp.async: the destination is poisoned (0xFF) at once and gets its data when the thread waits: this shows both
// a missing wait and a buffer that is refilled while others still read it.
static __attribute__((noinline)) void cp_async(void* dst, const void* src, int size, int bytes) {
  if ((uintptr_t)dst % size) fail("cp_async%d: shared address %p is misaligned", size, dst);
  if (bytes < 0 || bytes > size) fail("cp_async%d: src_bytes = %d", size, bytes);
  if (bytes && (uintptr_t)src % size) fail("cp_async%d: global address %p is misaligned", size, src);
  memset(dst, 0xFF, size);
  cur->copies.push_back(Copy{dst, src, size, bytes, cur->groups});
}
static inline void cp_async16(void* s, const void* g, int src_bytes = 16) { cp_async(s, g, 16, src_bytes); }
static inline void cp_async8(void* s, const void* g, int src_bytes = 8) { cp_async(s, g, 8, src_bytes); }
static inline void cp_async4(void* s, const void* g, int src_bytes = 4) { cp_async(s, g, 4, src_bytes); }
static inline void cp_async_commit() { cur->groups++; }
static __attribute__((noinline)) void cp_async_wait(int left) {
  auto& v = cur->copies; size_t k = 0;
  while (k < v.size() && v[k].group < cur->groups - left) do_copy(v[k++]);
  v.erase(v.begin(), v.begin() + k);
}
static inline void cp_async_wait_all() { cur->groups++; cp_async_wait(0); }
static inline float nofuse(float x) { asm("" : "+x"(x)); return x; }
static inline double nofuse(double x) { asm("" : "+x"(x)); return x; }
}  // namespace emu

#define EMU_F static inline __attribute__((always_inline, unused))
EMU_F void __syncthreads() { emu::barrier(0, 0, emu::SYNC, 0, true, "__syncthreads"); }
EMU_F int __syncthreads_or(int p) { return (int)emu::barrier(0, 0, emu::OR, p != 0, true, "__syncthreads_or"); }
EMU_F int __syncthreads_and(int p) { return (int)emu::barrier(0, 0, emu::AND, p != 0, true, "__syncthreads_and"); }
EMU_F int __syncthreads_count(int p) { return (int)emu::barrier(0, 0, emu::COUNT, p != 0, true, "__syncthreads_count"); }
namespace emu { static void syncwarp_work(void**, uint32_t) {} }
EMU_F void __syncwarp(unsigned mask = 0xffffffffu) { emu::collective(mask, emu::syncwarp_work, "__syncwarp", nullptr); }
template <class T> EMU_F T __shfl_sync(unsigned m, T v, int src, int width = 32) { return emu::shfl(m, v, 0, src, width, "__shfl_sync"); }
template <class T> EMU_F T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32) { return emu::shfl(m, v, 1, (int)d, width, "__shfl_up_sync"); }
template <class T> EMU_F T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32) { return emu::shfl(m, v, 2, (int)d, width, "__shfl_down_sync"); }
template <class T> EMU_F T __shfl_xor_sync(unsigned m, T v, int x, int width = 32) { return emu::shfl(m, v, 3, x, width, "__shfl_xor_sync"); }
EMU_F unsigned __ballot_sync(unsigned m, int p) { return (unsigned)emu::vote(m, p != 0, 0, "__ballot_sync"); }
EMU_F int __any_sync(unsigned m, int p) { return (int)emu::vote(m, p != 0, 1, "__any_sync"); }
EMU_F int __all_sync(unsigned m, int p) { return (int)emu::vote(m, p != 0, 2, "__all_sync"); }
template <class T> EMU_F unsigned __match_any_sync(unsigned m, T v) { static_assert(sizeof(T) <= 8, ""); long long x = 0; memcpy(&x, &v, sizeof(T)); return (unsigned)emu::vote(m, x, 3, "__match_any_sync"); }
template <class T> EMU_F T __reduce_add_sync(unsigned m, T v) { return (T)emu::vote(m, v, 10, "__reduce_add_sync"); }
template <class T> EMU_F T __reduce_min_sync(unsigned m, T v) { return (T)emu::vote(m, v, 11, "__reduce_min_sync"); }
template <class T> EMU_F T __reduce_max_sync(unsigned m, T v) { return (T)emu::vote(m, v, 12, "__reduce_max_sync"); }
EMU_F unsigned __reduce_and_sync(unsigned m, unsigned v) { return (unsigned)emu::vote(m, v, 13, "__reduce_and_sync"); }
EMU_F unsigned __reduce_or_sync(unsigned m, unsigned v) { return (unsigned)emu::vote(m, v, 14, "__reduce_or_sync"); }
EMU_F unsigned __reduce_xor_sync(unsigned m, unsigned v) { return (unsigned)emu::vote(m, v, 15, "__reduce_xor_sync"); }
EMU_F unsigned __activemask() { return emu::warps[emu::cur->index >> 5].alive; }  // all lanes that have not exited
EMU_F void __threadfence() { emu::yield(); }
EMU_F void __threadfence_block() { emu::yield(); }
EMU_F void __threadfence_system() { emu::yield(); }
EMU_F void __nanosleep(unsigned) { emu::yield(); }
#define __trap() emu::fail("__trap() at %s:%d", __FILE__, __LINE__)
#define __builtin_assume(x) ((x) ? (void)0 : emu::fail("__builtin_assume(%s) is false at %s:%d", #x, __FILE__, __LINE__))
EMU_F long long clock64() { return 0; }
EMU_F int clock() { return 0; }

// -------------------------------------------------------------------------------------------------------- math
#define EMU_M1(name, expr) namespace emu { EMU_F float m_##name(float x) { return expr; } }
#define EMU_M2(name, expr) namespace emu { EMU_F float m_##name(float x, float y) { return expr; } }
EMU_M1(expf, ::expf(x)) EMU_M1(exp2f, ::exp2f(x)) EMU_M1(exp10f, ::exp10f(x)) EMU_M1(logf, ::logf(x)) EMU_M1(log2f, ::log2f(x)) EMU_M1(log10f, ::log10f(x))
EMU_M1(sinf, ::sinf(x)) EMU_M1(cosf, ::cosf(x)) EMU_M1(tanf, ::tanf(x)) EMU_M2(powf, ::powf(x, y))
#define __expf(x) emu::m_expf(x)      // glibc declares functions of these names, so macros
#define __exp2f(x) emu::m_exp2f(x)
#define __exp10f(x) emu::m_exp10f(x)
#define __logf(x) emu::m_logf(x)
#define __log2f(x) emu::m_log2f(x)
#define __log10f(x) emu::m_log10f(x)
#define __sinf(x) emu::m_sinf(x)
#define __cosf(x) emu::m_cosf(x)
#define __tanf(x) emu::m_tanf(x)
#define __powf(x, y) emu::m_powf(x, y)
#define __sincosf(x, s, c) (*(s) = ::sinf(x), *(c) = ::cosf(x), (void)0)
EMU_F float rsqrtf(float x) { return 1.0f / sqrtf(x); }
EMU_F double rsqrt(double x) { return 1.0 / sqrt(x); }
EMU_F float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
EMU_F float __frsqrt_rn(float x) { return rsqrtf(x); }
EMU_F float __fsqrt_rn(float x) { return sqrtf(x); }
EMU_F float __frcp_rn(float x) { return 1.0f / x; }
EMU_F float __fdividef(float a, float b) { return a / b; }
EMU_F float __fdiv_rn(float a, float b) { return a / b; }
EMU_F float __fadd_rn(float a, float b) { return emu::nofuse(a + b); }
EMU_F float __fsub_rn(float a, float b) { return emu::nofuse(a - b); }
EMU_F float __fmul_rn(float a, float b) { return emu::nofuse(a * b); }
EMU_F float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_F double __dadd_rn(double a, double b) { return emu::nofuse(a + b); }
EMU_F double __dmul_rn(double a, double b) { return emu::nofuse(a * b); }
EMU_F double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
EMU_F float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
template <class A, class B> EMU_F constexpr std::common_type_t<A, B> min(A a, B b) { using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<C>::value) return (C)__builtin_fmin((C)a, (C)b); else return (C)b < (C)a ? (C)b : (C)a; }
template <class A, class B> EMU_F constexpr std::common_type_t<A, B> max(A a, B b) { using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<C>::value) return (C)__builtin_fmax((C)a, (C)b); else return (C)a < (C)b ? (C)b : (C)a; }
EMU_F unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
EMU_F int __mulhi(int a, int b) { return (int)(((int64_t)a * b) >> 32); }
EMU_F unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)(((unsigned __int128)a * b) >> 64); }
EMU_F int __mul24(int a, int b) { return (int)((unsigned)((a << 8) >> 8) * (unsigned)((b << 8) >> 8)); }
EMU_F unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }
EMU_F int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_F int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMU_F int __ffs(int x) { return __builtin_ffs(x); }
EMU_F int __ffsll(long long x) { return __builtin_ffsll(x); }
EMU_F int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
EMU_F int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
EMU_F unsigned __brev(unsigned x) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
EMU_F unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { uint64_t v = (uint64_t)b << 32 | a; unsigned r = 0;
  for (int i = 0; i < 4; i++) { unsigned k = s >> (4 * i) & 15, t = (unsigned)(v >> (8 * (k & 7))) & 255; if (k & 8) t = t & 128 ? 255 : 0; r |= t << (8 * i); } return r; }
EMU_F unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { return (unsigned)((((uint64_t)hi << 32 | lo) << (s & 31)) >> 32); }
EMU_F unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { return (unsigned)(((uint64_t)hi << 32 | lo) >> (s & 31)); }
EMU_F unsigned __float_as_uint(float x) { return emu::f_bits(x); }
EMU_F float __uint_as_float(unsigned x) { return emu::bits_f(x); }
EMU_F int __float_as_int(float x) { return (int)emu::f_bits(x); }
EMU_F float __int_as_float(int x) { return emu::bits_f((unsigned)x); }
EMU_F long long __double_as_longlong(double x) { long long r; memcpy(&r, &x, 8); return r; }
EMU_F double __longlong_as_double(long long x) { double r; memcpy(&r, &x, 8); return r; }
EMU_F int __float2int_rn(float x) { return (int)rintf(x); }
EMU_F int __float2int_rz(float x) { return (int)x; }
EMU_F int __float2int_rd(float x) { return (int)floorf(x); }
EMU_F int __float2int_ru(float x) { return (int)ceilf(x); }
EMU_F unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
EMU_F unsigned __float2uint_rz(float x) { return (unsigned)x; }
EMU_F float __int2float_rn(int x) { return (float)x; }
EMU_F float __uint2float_rn(unsigned x) { return (float)x; }
EMU_F float __double2float_rn(double x) { return (float)x; }
template <class T> EMU_F T __ldg(const T* p) { return *p; }
template <class T> EMU_F T __ldcs(const T* p) { return *p; }
template <class T> EMU_F T __ldcg(const T* p) { return *p; }
template <class T> EMU_F T __ldca(const T* p) { return *p; }
template <class T> EMU_F T __ldlu(const T* p) { return *p; }
template <class T> EMU_F T __ldcv(const T* p) { return *p; }
template <class T> EMU_F void __stcs(T* p, std::common_type_t<T> v) { *p = v; }
template <class T> EMU_F void __stcg(T* p, std::common_type_t<T> v) { *p = v; }
template <class T> EMU_F void __stwb(T* p, std::common_type_t<T> v) { *p = v; }
template <class T> EMU_F void __stwt(T* p, std::common_type_t<T> v) { *p = v; }
EMU_F size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
EMU_F size_t __cvta_generic_to_global(const void* p) { return (size_t)p; }
#define EMU_ATOMIC(name, expr) template <class T> EMU_F T name(T* p, std::common_type_t<T> v) { T old = *p; *p = (T)(expr); return old; }
EMU_ATOMIC(atomicAdd, old + v) EMU_ATOMIC(atomicSub, old - v) EMU_ATOMIC(atomicMax, old < v ? v : old) EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicExch, v) EMU_ATOMIC(atomicOr, old | v) EMU_ATOMIC(atomicAnd, old & v) EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1) EMU_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
EMU_ATOMIC(atomicAdd_block, old + v)
template <class T> EMU_F T atomicCAS(T* p, std::common_type_t<T> c, std::common_type_t<T> v) { T old = *p; if (old == c) *p = v; emu::yield(); return old; }

// -------------------------------------------------------------------------------------------------------- bf16
struct __align__(2) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  static uint16_t round(float f) { uint32_t u = emu::f_bits(f); if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff; return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16); }
  __nv_bfloat16(float f) : bits(round(f)) {}
  __nv_bfloat16(double f) : bits(round((float)f)) {}
  __nv_bfloat16(int f) : bits(round((float)f)) {}
  __nv_bfloat16(unsigned f) : bits(round((float)f)) {}
  operator float() const { return emu::bits_f((uint32_t)bits << 16); }
};
#define EMU_OP(op) \
  EMU_F __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16((float)a op (float)b); } \
  EMU_F __nv_bfloat16& operator op##=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a op b; }
EMU_OP(+) EMU_OP(-) EMU_OP(*) EMU_OP(/)
EMU_F __nv_bfloat16 operator-(__nv_bfloat16 a) { a.bits ^= 0x8000; return a; }
#define EMU_CMP(op) EMU_F bool operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return (float)a op (float)b; }
EMU_CMP(<) EMU_CMP(>) EMU_CMP(<=) EMU_CMP(>=) EMU_CMP(==) EMU_CMP(!=)
struct __align__(4) __nv_bfloat162 { __nv_bfloat16 x, y; __nv_bfloat162() = default; __nv_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) : x(a), y(b) {} };
typedef __nv_bfloat16 nv_bfloat16; typedef __nv_bfloat162 nv_bfloat162;
EMU_F __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
EMU_F __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
EMU_F __nv_bfloat16 __double2bfloat16(double f) { return __nv_bfloat16((float)f); }
EMU_F float __bfloat162float(__nv_bfloat16 b) { return (float)b; }
EMU_F __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return __nv_bfloat162(__nv_bfloat16(a), __nv_bfloat16(b)); }
EMU_F __nv_bfloat162 __float22bfloat162_rn(float2 a) { return __floats2bfloat162_rn(a.x, a.y); }
EMU_F __nv_bfloat162 __float2bfloat162_rn(float a) { return __floats2bfloat162_rn(a, a); }
EMU_F __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat162(a, b); }
EMU_F __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat162(a, b); }
EMU_F __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return __nv_bfloat162(a, a); }
EMU_F float2 __bfloat1622float2(__nv_bfloat162 v) { return float2{(float)v.x, (float)v.y}; }
EMU_F float __low2float(__nv_bfloat162 v) { return (float)v.x; }
EMU_F float __high2float(__nv_bfloat162 v) { return (float)v.y; }
EMU_F __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
EMU_F __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
EMU_F unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
EMU_F __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { __nv_bfloat16 b; b.bits = u; return b; }
EMU_F __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return a + b; }
EMU_F __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) { return a - b; }
EMU_F __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return a * b; }
EMU_F __nv_bfloat16 __hneg(__nv_bfloat16 a) { return -a; }
EMU_F __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) { return __nv_bfloat16(fmaf(a, b, c)); }
EMU_F __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(fmaxf(a, b)); }
EMU_F __nv_bfloat16 __hmin(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(fminf(a, b)); }
EMU_F __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return __nv_bfloat162(a.x + b.x, a.y + b.y); }
EMU_F __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) { return __nv_bfloat162(a.x - b.x, a.y - b.y); }
EMU_F __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return __nv_bfloat162(a.x * b.x, a.y * b.y); }
EMU_F __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return __nv_bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }
EMU_F __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) { return __nv_bfloat162(__hmax(a.x, b.x), __hmax(a.y, b.y)); }
#endif  // EMU_SCAN
