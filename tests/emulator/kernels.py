"""Recurrences of kernels/ in the emulator against float64: what needs no GPU to be wrong. All, or those named.

    python3 kernels.py [gru] [mesa] [selective_scan]
"""

import sys

import numpy as np

import emu

# Relative RMS errors: f32 sums, 3 x tf32; what tf32 and bf16 round off.
TOLERANCE = {"f32": 1e-6, "tf32": 1e-3, "bf16": 6e-3}


def f64(x):
    return np.asarray(x, dtype=np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Draw:
    """Random inputs, rounded to the type of the activations."""

    def __init__(self, suffix, seed=0):
        self.rng, self.bf16 = np.random.default_rng(seed), suffix == "bf16"

    def round(self, x):
        x = np.asarray(x, np.float32)
        return emu.bf16(x) if self.bf16 else x

    def activation(self, *shape):
        return self.round(self.rng.standard_normal(shape))

    def normal(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def uniform(self, low, high, *shape):
        return self.rng.uniform(low, high, shape).astype(np.float32)


def compare(what, route, pairs):
    """Whether all outputs are near enough to what they should be."""
    errors = {name: emu.rel(f64(found), wanted) for name, (found, wanted) in pairs.items()}
    right = all(error < TOLERANCE[route] for error in errors.values())
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{'ok   ' if right else 'WRONG'} {what}: {listed}", flush=True)
    return right


def gru(module, route, tiles, B, T, D, stateful, cached):
    """Both passes, launched as one block that has all units and sequences."""
    suffix = "bf16" if route == "bf16" else "f32"
    draw, terms = Draw(suffix), 16 if suffix == "bf16" else 8
    x, bias = draw.activation(B, T, 3 * D), draw.normal(3 * D)
    weight = draw.round(draw.uniform(-1, 1, 3 * D, D) * D**-0.5)
    start = draw.uniform(-1, 1, B, D) if stateful else None
    units, rows = -(-D // 16), -(-B // (8 * tiles))
    per_gate = units * 16 // terms

    def launch(name, products, given, args, rounds):
        weights = emu.empty((units * 3 * per_gate * 32, 4), np.uint32)
        module.launch(f"gru_arrange_{suffix}", -(-len(weights) // 256), 256, [weight, weights, D, int(products == 1)])
        words = np.zeros((2, rows * tiles, given, per_gate, 8 * terms), np.uint32 if draw.bf16 else np.uint64)
        shared = 4 * 2 * 8 * products * 16 * (8 * tiles + 1) + (3 * per_gate * 512 if cached else 0)
        sizes = [rounds, B, T, D, units if cached else 1, cached]
        module.launch(f"gru_{name}_{route}_{tiles}", 1, 256, [weights, words, *args, *sizes], smem=shared)

    y, kept = emu.empty((B, T, D), x.dtype), emu.empty((B, T, 4, D), np.float32)
    last = start.copy() if stateful else np.zeros((B, D), np.float32)
    launch("forward", 3, 1, [x, bias, last, y, kept], T)
    h, U, states, gates = (f64(start) if stateful else np.zeros((B, D))), f64(weight), [], []
    for t in range(T):
        (r, z, n), a = np.split(f64(x)[:, t], 3, 1), np.split(h @ U.T + f64(bias), 3, 1)
        r, z = sigmoid(r + a[0]), sigmoid(z + a[1])
        n = np.tanh(n + r * a[2])
        gates.append((h, r, z, n, a[2]))
        h = (1 - z) * n + z * h
        states.append(h)

    dy, carry = draw.activation(B, T, D), draw.normal(B, D)
    d_last = carry.copy()
    dx, da = emu.empty(x.shape, x.dtype), emu.empty(x.shape, x.dtype)
    outputs = [carry, dx, da, emu.empty(y.shape, y.dtype)]
    launch("backward", 1, 3, [kept, y, start, dy, *outputs], T + int(stateful))
    wanted, d_h, through = np.zeros((2, B, T, 3 * D)), f64(d_last), np.zeros((B, 3 * D))
    for t in reversed(range(T)):
        before, r, z, n, a_n = gates[t]
        d = through @ U + d_h + f64(dy)[:, t]
        dn = d * (1 - z) * (1 - n * n)
        dr, dz, d_h = dn * a_n * r * (1 - r), d * (before - n) * z * (1 - z), d * z
        through = np.concatenate([dr, dz, dn * r], 1)
        wanted[:, :, t] = np.concatenate([dr, dz, dn], 1), through
    pairs = {"y": (y, np.stack(states, 1)), "state": (last, h), "dx": (dx, wanted[0]), "da": (da, wanted[1])}
    if stateful:
        pairs["dstate"] = (carry, through @ U + d_h)
    return compare(f"gru {route} tiles {tiles} B{B} T{T} D{D}{' cached' if cached else ''}", route, pairs)


def mesa(module, suffix, B, T, H, K, length, stateful):
    """Solutions of segments of time that are worked on by themselves."""
    draw = Draw(suffix)
    k = draw.normal(B, T, H, K)
    k = draw.round(k / np.linalg.norm(k, axis=-1, keepdims=True))
    beta, g, lam = draw.uniform(0, 1, B, T, H), draw.uniform(-0.3, 0, B, T, H), draw.normal(H, K)
    rhs, other, start = draw.activation(B, T, H, K), draw.activation(B, T, H, K), None
    if stateful:
        root = draw.normal(B, H, K, 2 * K)
        start = root @ root.transpose(0, 1, 3, 2) / K
    side = 4 if K <= 64 else 8
    rows, segments = -(-K // side), -(-T // length)
    width = rows * side
    threads = -(-max(rows * (rows + 3) // 2, width) // 32) * 32
    sizes = [T, H, K, segments, length]
    edges = emu.empty((B, H, segments - 1, K, K), np.float32) if segments > 1 else None
    if segments > 1:
        shared = 4 * 2 * 8 * (width + 2)
        args = [k, beta, g, start, edges, *sizes]
        module.launch(f"mesa_carry{side}_{suffix}", B * H, threads, args, smem=shared)
    x, minus, end = emu.empty(k.shape, k.dtype), emu.empty(k.shape, k.dtype), emu.empty((B, H, K, K), np.float32)
    shares = emu.empty((B, segments, H, K), np.float32)
    args = [k, beta, g, lam, rhs, start, edges, end, x, minus, other, shares, *sizes]
    shared = 4 * width * (width + side + 7)
    module.launch(f"mesa_solve{side}_{suffix}", B * H * segments, threads, args, smem=shared)
    A, solved = (f64(start) if stateful else np.zeros((B, H, K, K))), np.zeros((B, T, H, K))
    diagonal = np.log1p(np.exp(f64(lam))) + 0.25
    for t in range(T):
        key = f64(k)[:, t]
        outer = (f64(beta)[:, t, :, None] * key)[..., None] * key[..., None, :]
        A = np.exp(f64(g)[:, t])[..., None, None] * A + outer
        system = A + diagonal[:, :, None] * np.eye(K)
        solved[:, t] = np.linalg.solve(system, f64(rhs)[:, t][..., None])[..., 0]
    pairs = {"x": (x, solved), "minus": (minus, -solved), "end": (end, A)}
    pairs["shares"] = (f64(shares).sum(1), (solved * f64(other)).sum(1))
    return compare(f"mesa {suffix} B{B} T{T} H{H} K{K} segments of {length}", suffix, pairs)


def selective_scan(module, layout, served, B, T, D, N, segments, gated):
    """The backward pass. A layout: suffix, lanes of a channel, tiles of states, warps and channels of a block."""
    suffix, lanes, tiles, warps, group = layout
    draw, padded, chunks = Draw(suffix), 4 * lanes * tiles, -(-T // 64)
    groups, per_segment = -(-D // group), -(-chunks // segments)
    u, delta, z, dy = (draw.activation(B, T, D) for _ in range(4))
    b, c = draw.activation(B, T, N), draw.activation(B, T, N)
    a_log, d, bias = np.log(draw.uniform(1, 10, D, N)), draw.normal(D), draw.normal(D) - 1
    dfinal = draw.normal(B, D, N)
    dt, A = np.log1p(np.exp(f64(delta) + f64(bias))), -np.exp(f64(a_log))
    decay, gate = np.exp(dt[..., None] * A), sigmoid(f64(z)) * f64(z) if gated else 1.0

    # Forward: the states before every step, and y before the gate.
    h, before, plain = np.zeros((B, D, N)), np.zeros((B, T, D, N)), np.zeros((B, T, D))
    for t in range(T):
        before[:, t] = h
        h = decay[:, t] * h + (dt * f64(u))[:, t, :, None] * f64(b)[:, t, None]
        plain[:, t] = (h * f64(c)[:, t, None]).sum(-1) + f64(d) * f64(u)[:, t]
    rounded = draw.round(plain)
    # Backward.
    g, G = f64(dy) * gate, f64(dfinal)
    want = {name: np.zeros((B, T, D)) for name in ("du", "ddelta")}
    want.update(db=np.zeros((B, T, N)), dc=np.zeros((B, T, N)), da=np.zeros((B, D, N)))
    edges = np.zeros((B, max(segments - 1, 1), D, N), np.float32)
    for t in reversed(range(T)):
        if (t + 1) % (64 * per_segment) == 0 and t + 1 < T:
            edges[:, (t + 1) // (64 * per_segment) - 1] = G
        now = before[:, t] * decay[:, t] + (dt * f64(u))[:, t, :, None] * f64(b)[:, t, None]
        G = g[:, t, :, None] * f64(c)[:, t, None] + G
        q, by_b = G * decay[:, t] * before[:, t], (G * f64(b)[:, t, None]).sum(-1)
        want["du"][:, t] = f64(d) * g[:, t] + dt[:, t] * by_b
        slope = sigmoid(f64(delta)[:, t] + f64(bias))
        want["ddelta"][:, t] = (f64(u)[:, t] * by_b + (A * q).sum(-1)) * slope
        want["db"][:, t] = (G * (dt * f64(u))[:, t, :, None]).sum(1)
        want["dc"][:, t] = (g[:, t, :, None] * now).sum(1)
        want["da"] += dt[:, t, :, None] * q
        G = decay[:, t] * G
    want["dstate"] = G

    # What lies behind the last channel and state is read, and must not show.
    checkpoints = np.full((B, chunks, groups * group, padded), 0.5, np.float32)
    checkpoints[:, :, :D, :N] = before[:, ::64]
    du, ddelta, dz = (emu.empty(u.shape, u.dtype) for _ in range(3))
    dstate, maps = emu.empty((B, D, N), np.float32), emu.empty((2, groups, B, T, padded), np.float32)
    slabs, blocks = emu.empty((B * segments, D * (N + 2)), np.float32), 2
    scratch = emu.empty((blocks, 7, group, padded), np.float32)
    args = [u, delta, a_log, b, c, d, bias, z if gated else None, rounded if gated else None, dy, dfinal, checkpoints]
    args += [edges, du, ddelta, dz if gated else None, dstate, maps, slabs, scratch]
    shared = 4 * (3 * group * padded + 1280 * warps + 4 + 108 * group + 36 * padded)
    shared += 8 * (5 * group + 2 * padded) * u.itemsize
    name = f"selective_scan_backward_l{lanes * tiles}_{suffix}{'_sm90a' if served else ''}"
    threads = 32 * (warps + (4 if served else 0))
    module.launch(name, blocks, threads, [*args, B, T, D, N, segments, per_segment], smem=shared)
    pairs = {"du": (du, want["du"]), "ddelta": (ddelta, want["ddelta"]), "dstate": (dstate, want["dstate"])}
    db, dc = maps[..., :N].astype(np.float64).sum(1)
    rates = slabs[:, : D * N].astype(np.float64).sum(0).reshape(D, N)
    pairs |= {"db": (db, want["db"]), "dc": (dc, want["dc"]), "rates": (rates, want["da"].sum(0))}
    if gated:
        s = sigmoid(f64(z))
        pairs["dz"] = (dz, f64(dy) * f64(rounded) * s * (1 + f64(z) * (1 - s)))
    return compare(f"{name} B{B} T{T} D{D} N{N} segments {segments}", suffix, pairs)


def all_gru():
    module = emu.build(emu.KERNELS + "/gru.cu")
    sizes = [(1, 9, 3, 40, True, 0), (2, 17, 4, 33, True, 0), (4, 5, 3, 16, False, 1), (1, 1, 1, 7, True, 1)]
    return [gru(module, route, *size) for route in TOLERANCE for size in sizes]


def all_mesa():
    module = emu.build(emu.KERNELS + "/mesa.cu")
    sizes = [("f32", 2, 5, 2, 16, 5, False), ("f32", 1, 7, 2, 13, 3, True), ("bf16", 1, 9, 1, 64, 4, True)]
    sizes += [("f32", 1, 4, 1, 72, 2, True), ("bf16", 1, 3, 1, 128, 3, False), ("f32", 1, 1, 1, 4, 1, True)]
    return [mesa(module, *size) for size in sizes]


def all_selective_scan():
    alone, right = emu.build(emu.KERNELS + "/selective_scan.cu"), []
    layouts = [("bf16", 4, 1, 4, 128), ("bf16", 8, 1, 8, 128), ("bf16", 16, 1, 4, 64), ("f32", 16, 1, 8, 128)]
    layouts += [("bf16", 32, 1, 8, 64), ("f32", 32, 2, 8, 32)]
    for layout in layouts:
        _, lanes, tiles, _, group = layout
        right.append(selective_scan(alone, layout, False, 1, 70, group + 6, 4 * lanes * tiles, 1, True))
        right.append(selective_scan(alone, layout, False, 1, 131, group // 2 + 3, 4 * lanes * tiles - 3, 2, False))
    served = emu.build(emu.KERNELS + "/selective_scan_sm90a.cu")
    for layout in [("bf16", 32, 1, 8, 64), ("f32", 32, 2, 8, 32)]:
        _, lanes, tiles, _, group = layout
        right.append(selective_scan(served, layout, True, 1, 131, group + 6, 4 * lanes * tiles - 4, 2, True))
    return right


OPS = {"gru": all_gru, "mesa": all_mesa, "selective_scan": all_selective_scan}

if __name__ == "__main__":
    results = [right for name in sys.argv[1:] or OPS for right in OPS[name]()]
    print(f"{sum(results)} of {len(results)} right")
    sys.exit(not all(results))
