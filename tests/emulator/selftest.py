"""What the emulator computes and what it must find."""
import os, subprocess, sys, time
import numpy as np, emu
rng = np.random.default_rng(0)
here = os.path.dirname(os.path.abspath(__file__))
mod = emu.build(here + "/selftest.cu")

if len(sys.argv) > 1:  # cases that must abort
    what = sys.argv[1]
    x = np.zeros(1024, np.float32)
    if what == "deadlock": mod.launch("deadlock", 2, 96, [np.zeros(1, np.int32)])
    if what == "misaligned": mod.launch("misaligned", 1, 4, [x, x.copy(), 1])
    if what == "smem_oob": mod.launch("smem_oob", 1, 1, [256], smem=1000)
    if what == "smem_oob2": mod.launch("smem_oob", 1, 1, [251], smem=1000)
    sys.exit(0)

x = rng.standard_normal((7, 1000)).astype(np.float32); out = emu.empty(7)
mod.launch("block_sum", 7, 256, [x, out, 1000])
print("block_sum", emu.rel(out, x.sum(1))); assert emu.rel(out, x.sum(1)) < 1e-5
K = 128
A, B, C = emu.bf16(rng.standard_normal((16, K))), emu.bf16(rng.standard_normal((K, 8))), emu.empty((16, 8))
ref = A.astype(np.float64) @ B.astype(np.float64)
mod.launch("mma_bf16", 1, 32, [A, B, C, K], smem=2 * 512 + 2 * 256)
print("mma_bf16", emu.rel(C, ref)); assert emu.rel(C, ref) < 1e-5
A, B, C = rng.standard_normal((16, K)).astype(np.float32), rng.standard_normal((K, 8)).astype(np.float32), emu.empty((16, 8))
mod.launch("mma_tf32", 1, 32, [A, B, C, K])
print("mma_tf32", emu.rel(C, A @ B)); assert 1e-6 < emu.rel(C, A @ B) < 2e-3

bad = emu.build(here + "/selftest.cu", defines={"NO_BARRIER": 1})
out = emu.empty(7); bad.launch("block_sum", 7, 256, [x, out, 1000])
print("missing __syncthreads", emu.rel(out, x.sum(1))); assert emu.rel(out, x.sum(1)) > 1e-3
A, B, C = emu.bf16(rng.standard_normal((16, K))), emu.bf16(rng.standard_normal((K, 8))), emu.empty((16, 8))
try:
    mod.launch("oob", 1, 32, [np.zeros(16, np.float32), 0]); raise SystemExit("oob not found")
except RuntimeError as e: print("ok:", e)
try:
    mod.launch("oob", 1, 32, [np.zeros(16, np.float32), np.int64(0)]); raise SystemExit("type not found")
except TypeError as e: print("ok:", e)
for what in ("deadlock", "misaligned", "smem_oob", "smem_oob2"):
    r = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True)
    print(f"--- {what}: exit {r.returncode}\n{r.stderr}"); assert r.returncode != 0
x = emu.empty(256); t = time.time(); mod.launch("speed", 4, 256, [x, 1000]); t = time.time() - t
print(f"speed: {t / 32000 * 1e6:.2f} us per warp mma")

# What only compute capability 9.0 has; rows and columns that the tensors lack are zeros.
hopper = emu.build(here + "/selftest_sm90a.cu")
A, B = (emu.bf16(rng.standard_normal((1, rows, 1, 120))) for rows in (60, 128))
out = emu.empty((1, 60, 1, 120), emu.bfloat16)
hopper.launch("product", 1, 128, [emu.Map(A), emu.Map(B), emu.Map(out)], smem=65 * 1024)
a, b = (x[0, :, 0].astype(np.float64) for x in (A, B))
print("product", emu.rel(out[0, :, 0], a @ b.T @ b)); assert emu.rel(out[0, :, 0], a @ b.T @ b) < 5e-3
A, B = (emu.bf16(rng.standard_normal((1, rows, 1, columns))) for rows, columns in ((64, 128), (128, 64)))
out, turn = emu.empty((8, 128, 4)), np.zeros(1, np.int32)
hopper.launch("twice", 1, 128, [emu.Map(A), emu.Map(B), out, turn], smem=49 * 1024)
a, b = (x[0, :, 0].astype(np.float64) for x in (A, B))
j, thread, i = np.ogrid[:8, :128, :4]
row, column = thread // 32 * 16 + thread % 32 // 4 + i // 2 * 8, 8 * j + thread % 4 * 2 + i % 2
print("twice", emu.rel(out, 2 * (a @ b)[row, column])); assert emu.rel(out, 2 * (a @ b)[row, column]) < 1e-5

# A kernel of the program: y += bias on rows that are no multiple of a vector.
linear = emu.build(emu.KERNELS + "/linear.cu")
y, bias = emu.bf16(rng.standard_normal((5, 27))), rng.standard_normal(27).astype(np.float32)
want = emu.bf16(y.astype(np.float32) + bias)
linear.launch("linear_bias_bf16", 3, 256, [y, bias, np.int64(y.size), 27])
assert (y == want).all()
print("all well")
