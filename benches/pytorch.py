"""Measures in PyTorch what `selectivbench profile --json FILE` measured, so that both stand side by side.

    pip install torch safetensors numpy
    selectivbench profile --device cpu --json ops.json
    python benches/pytorch.py ops.json                  # every op of the profile, and its training steps
    python benches/pytorch.py ops.json --device cuda    # only what PyTorch ships as a kernel
    python benches/pytorch.py --check                   # layers and models against tests/golden, in float64

On the CPU a recurrence is the plain loop over time that its authors publish as the reference, in float32
with autograd; what PyTorch ships (attention, norms, convolutions, GRU, Adam) is what it ships. A loop takes
its steps out of a tensor with one `unbind`, whose gradient is one `stack`. The published loops write x[:, t],
whose gradient fills a tensor of the size of x at every step: that is `--slices index`, and slower.

Sizes, number formats and kinds of inputs are those of the profile. A time is the median of some rounds after
a warm-up, for one call: the forward pass without autograd, and both passes with a given gradient of the first
output. Where autograd would keep too much for this machine's memory, fewer sequences are measured, the time
is scaled to all of them, and it is marked with their number. The head is the loss alone: the program's also
counts votes.
"""

import argparse
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tensors"
TOLERANCE = 1e-6  # Relative RMS; the golden vectors are float64 results rounded to float32.
# Bytes that autograd may keep on the CPU. Beside them stand gradients: an op's own, or those of one layer.
KEPT = {"op": 4 << 30, "step": 8 << 30}
CACHE = 200 << 20  # Bytes of inputs that no GPU's cache holds.
DROPOUT = 0.2
SYMBOLS, CLASSES, LAYERS, STATE = 41, 1601, 8, 128  # Of the training steps: the program's defaults.


# Recurrences. Sizes: B sequences of T steps, H heads, keys of K and values of V channels, N states.


def take(x, how):
    """The steps of a tensor [B, T, ..], each [B, ..]."""
    return x.unbind(1) if how == "unbind" else (x[:, t] for t in range(x.shape[1]))


def steps(*inputs):
    """The steps of several tensors side by side."""
    return zip(*(take(x, steps.how) for x in inputs))


steps.how = "unbind"


def read(vector, matrix):
    """The row vectors [.., K] times the matrices [.., K, V]."""
    return (vector[..., None, :] @ matrix)[..., 0, :]


def outer(a, b):
    """The matrices [.., K, V] of the vectors [.., K] and [.., V]."""
    return a[..., :, None] * b[..., None, :]


def zeros(like, *shape):
    """Zeros of another tensor's type and place."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def delta_rule(q, k, v, beta, g=None, erases=True):
    """S ← exp(g) S, then S ← S + kᵀ β (v − k S) for each write of a token; o = K^-½ q S.

    q [B, T, H, K], g [B, T, H]; k, v and beta have n T steps: n writes for each token. Without `erases` the
    writes are S ← S + kᵀ β v, which is the sum rule.
    """
    (batch, length, heads, key), value = q.shape, v.shape[-1]
    state, outputs = zeros(q, batch, heads, key, value), []
    writes = list(steps(k, v, beta))
    number = len(writes) // length
    for t, (q_t, *decay) in enumerate(steps(q * key**-0.5) if g is None else steps(q * key**-0.5, g.exp())):
        for factor in decay:
            state = factor[..., None, None] * state
        for k_t, v_t, beta_t in writes[t * number : (t + 1) * number]:
            new = v_t - read(k_t, state) if erases else v_t
            state = state + outer(k_t, beta_t[..., None] * new)
        outputs.append(read(q_t, state))
    return torch.stack(outputs, 1)


def gla(q, k, v, g):
    """S ← diag(exp g) S + kᵀ v, o = K^-½ q S; g is [B, T, H, K], or [B, T, H, 1] for one decay a head."""
    batch, _, heads, key = q.shape
    state, outputs = zeros(q, batch, heads, key, v.shape[-1]), []
    for q_t, k_t, v_t, decay in steps(q * key**-0.5, k, v, g.exp()):
        state = decay[..., None] * state + outer(k_t, v_t)
        outputs.append(read(q_t, state))
    return torch.stack(outputs, 1)


def dplr(q, k, v, g, a, b, scale):
    """S ← (diag(exp g) − bᵀ a) S + kᵀ v, o = scale · q S; all but v are [B, T, H, K]."""
    batch, _, heads, key = q.shape
    state, outputs = zeros(q, batch, heads, key, v.shape[-1]), []
    for q_t, k_t, v_t, decay, a_t, b_t in steps(q * scale, k, v, g.exp(), a, b):
        state = decay[..., None] * state - outer(b_t, read(a_t, state)) + outer(k_t, v_t)
        outputs.append(read(q_t, state))
    return torch.stack(outputs, 1)


def mesa(q, k, v, beta, g, regularisation):
    """A ← e^g A + β kᵀ k, S ← e^g S + β kᵀ v, o = q (A + diag λ)⁻¹ S; beta and g are [B, T, H]."""
    batch, _, heads, key = q.shape
    ridge = torch.diag_embed(F.softplus(regularisation).view(heads, key) + 0.25)
    gram, state, outputs = zeros(q, batch, heads, key, key), zeros(q, batch, heads, key, v.shape[-1]), []
    for q_t, k_t, v_t, beta_t, decay in steps(q, k, v, beta[..., None], g.exp()[..., None, None]):
        gram = decay * gram + outer(k_t, beta_t * k_t)
        state = decay * state + outer(k_t, beta_t * v_t)
        outputs.append(read(torch.linalg.solve(gram + ridge, q_t[..., None])[..., 0], state))
    return torch.stack(outputs, 1)


def mlstm(q, k, v, i, log_f):
    """C ← f C + e^i kᵀ v, n ← f n + e^i k, h = q C / max(|q n|, 1), stabilised; i and log_f are [B, T, H]."""
    batch, _, heads, key = q.shape
    memory, total, outputs = zeros(q, batch, heads, key, v.shape[-1]), zeros(q, batch, heads, key), []
    most = zeros(q, batch, heads, 1)
    for q_t, k_t, v_t, i_t, f_t in steps(q, k * key**-0.5, v, i[..., None], log_f[..., None]):
        # The outputs do not depend on the stabiliser, so no gradient goes through it.
        before, most = most, torch.maximum(f_t + most, i_t).detach()
        keep, key_in = torch.exp(f_t + before - most), torch.exp(i_t - most) * k_t
        memory = keep[..., None] * memory + outer(key_in, v_t)
        total = keep * total + key_in
        divisor = torch.maximum((q_t * total).sum(-1, keepdim=True).abs(), torch.exp(-most))
        outputs.append(read(q_t, memory) / divisor)
    return torch.stack(outputs, 1)


def ssd(x, dt, a_log, b, c, d, dt_bias):
    """S ← exp(Δ A) S + Δ xᵀ B, y = S C + D x, with x [B, T, H, P], dt [B, T, H], b and c [B, T, G, N]."""
    (batch, _, heads, dim), states = x.shape, b.shape[-1]
    b, c = (maps.repeat_interleave(heads // maps.shape[2], 2) for maps in (b, c))
    dt = F.softplus(dt + dt_bias)
    state, outputs = zeros(x, batch, heads, dim, states), []
    for x_t, decay, b_t, c_t in steps(x * dt[..., None], torch.exp(-dt * a_log.exp()), b, c):
        state = decay[..., None, None] * state + outer(x_t, b_t)
        outputs.append((state @ c_t[..., None])[..., 0])
    return torch.stack(outputs, 1) + d[:, None] * x


def selective_scan(u, delta, a_log, b, c, d, delta_bias, z):
    """h ← exp(Δ A) h + Δ u B, y = (Σ C h + D u) silu(z), with u, delta and z [B, T, D], b and c [B, T, N]."""
    dt = F.softplus(delta + delta_bias)
    decays = torch.exp(dt[..., None] * -a_log.exp())
    writes = (dt * u)[..., None] * b[:, :, None, :]
    state, outputs = zeros(u, u.shape[0], *a_log.shape), []
    for decay, write, c_t in steps(decays, writes, c):
        state = decay * state + write
        outputs.append((state @ c_t[..., None])[..., 0])
    return (torch.stack(outputs, 1) + d * u) * F.silu(z)


def s4d(u, c, log_dt, log_a_real, a_imag, d):
    """The convolution of u [B, T, D] with 2 Re Σ C (e^{ΔA} − 1) / A e^{ΔAt}, by Fourier transforms."""
    length = u.shape[1]
    rates = torch.complex(-log_a_real.exp(), a_imag)
    turns = rates * log_dt.exp()[:, None]
    maps = torch.view_as_complex(c) * (turns.exp() - 1) / rates
    powers = torch.exp(turns[..., None] * torch.arange(length, device=u.device))
    kernel = 2 * torch.einsum("dn,dnt->dt", maps, powers).real
    x = u.transpose(1, 2)
    spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    y = torch.fft.irfft(spectrum, 2 * length)[..., :length] + d[:, None] * x
    return y.transpose(1, 2)


# What stands around the recurrences.


def attention(q, k, v, mask=None):
    """Causal softmax attention; q, k and v are [B, T, H, dim]; a mask takes the place of the causal one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)


def forgetting_attention(q, k, v, g):
    """Attention whose scores lose the log forget gates g [B, T, H] of all steps behind the key."""
    sums = g.cumsum(1).transpose(1, 2)
    later = torch.ones(2 * g.shape[1:2], dtype=torch.bool, device=g.device).triu(1)
    return attention(q, k, v, (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -math.inf))


def conv_silu(x, weight, bias=None):
    """A causal convolution along time in every channel of x [B, T, channels], then SiLU."""
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[-1] - 1, groups=x.shape[-1])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def unit(x):
    """Vectors of length one."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def outside_rms_norm(x, weight):
    """The RMS norm of the authors' transformer, which adds its epsilon outside of the root."""
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8) * weight


def rotate(x, frequencies, sign=1):
    """Turns the halves of every head of x [B, T, H, dim] by the position."""
    angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=frequencies.dtype), frequencies)
    cos, sin = angles.cos()[:, None].to(x.dtype), sign * angles.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def rotary(dim, base, like):
    """The frequencies of a rotary embedding."""
    return base ** (-torch.arange(0, dim, 2, device=like.device, dtype=like.dtype) / dim)


def decay_gate(a, a_log, dt_bias):
    """The log decay −exp(a_log) softplus(a + dt_bias), with a [.., H] and a number for each head."""
    return -a_log.exp() * F.softplus(a + dt_bias)


def kda_gate(f, a_log, dt_bias):
    """The log decay of every key channel, with f [B, T, H, K]."""
    return decay_gate(f, a_log[:, None], dt_bias.view(f.shape[2:]))


def kda_keys(k, g, beta):
    """Where a key is read, and where it is written and erased."""
    return g.exp() * k, beta[..., None] * k


def token_shift(x, mixes):
    """x [B, T, D] mixed with the step before, once for each row of `mixes` [n, D]."""
    change = F.pad(x, (0, 0, 1, -1)) - x
    return [x + change * mix for mix in mixes]


def rwkv7_keys(k, eta, k_k, k_a):
    """Where the state is read, where and how much is erased, and what is written; k [B, T, H, K]."""
    eta, k_k, k_a = (x.unflatten(-1, k.shape[2:]) for x in (eta, k_k, k_a))
    kappa = F.normalize(k * k_k, dim=-1)
    return kappa, eta * kappa, k * (1 + (eta - 1) * k_a)


def rwkv7_read(o, r, k, v, weight, bias, r_k, *gates):
    """The norm of each head of o [B, T, H, K], a bonus for the current token, and a gate or none."""
    batch, length, heads, key = o.shape
    normed = F.group_norm(o.flatten(0, 1).flatten(1), heads, weight, bias, 1e-5 * key)
    bonus = (r * k * r_k.view(heads, key)).sum(-1, keepdim=True) * v
    y = normed.view(batch, length, -1) + bonus.flatten(2)
    return y * gates[0] if gates else y


def swiglu(x, beta, bias=None):
    """a σ(β a) b, with a and b the halves of x plus a bias."""
    a, b = (x if bias is None else x + bias).chunk(2, -1)
    return a * torch.sigmoid(beta * a) * b


def residual_norm(branch, residual, weight, bias, p):
    """LayerNorm(residual + dropout(branch))."""
    return F.layer_norm(residual + F.dropout(branch, p), weight.shape, weight, bias)


def embedding(ids, weight, bias):
    """A linear layer of one-hot symbols, without the one-hot vectors; a symbol behind the last is a blank."""
    return F.embedding(ids, torch.cat([weight.T, zeros(weight, 1, len(weight))]) + bias)


def head_norm(x, weight):
    """The RMS norm of every group of channels that has a weight."""
    return F.rms_norm(x.unflatten(-1, (-1, len(weight))), weight.shape, weight, 1e-5).flatten(-2)


# Layers: parameters have the names and shapes of the program's.


def linear(inputs, outputs, bias=False):
    """A linear layer, most often without a bias."""
    return nn.Linear(inputs, outputs, bias)


def step_bias(*shape):
    """The inverse softplus of step sizes that are log-uniform between 1e-3 and 0.1."""
    dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


def log_uniform(low, high, *shape):
    """The logarithms of uniform numbers."""
    return nn.Parameter(torch.empty(shape).uniform_(low, high).log())


class Conv(nn.Conv1d):
    """The short convolution with its SiLU."""

    def __init__(self, channels, bias=False):
        super().__init__(channels, channels, 4, groups=channels, bias=bias)

    def forward(self, x):
        return conv_silu(x, self.weight, self.bias)


class Headed(nn.Module):
    """A layer with queries, keys and values of heads: `sizes` of each in widths."""

    def __init__(self, dims, sizes, convolved="qkv", bias=False):
        super().__init__()
        self.heads, self.head_dim = dims.heads, dims.width // dims.heads
        for name, size in zip("qkv", sizes):
            self.add_module(f"{name}_proj", linear(dims.width, size * dims.width, bias))
            if name in convolved:
                self.add_module(f"{name}_conv1d", Conv(size * dims.width))

    def split(self, x):
        """[B, T, channels] as [B, T, H, channels of a head]."""
        return x.unflatten(-1, (self.heads, -1))

    def qkv(self, x):
        """Queries, keys and values, [B, T, channels] each."""
        made = [self.get_submodule(f"{name}_proj")(x) for name in "qkv"]
        convolve = [getattr(self, f"{name}_conv1d", None) for name in "qkv"]
        return [conv(y) if conv else y for conv, y in zip(convolve, made)]


class Transformer(Headed):
    """Rotary softmax attention and SwiGLU with residuals of its own."""

    def __init__(self, dims):
        super().__init__(dims, [1, 1, 1], convolved="", bias=True)
        width = dims.width
        self.out_proj = linear(width, width, True)
        self.rotary = nn.Module()
        self.rotary.register_buffer("inv_freq", rotary(self.head_dim, 1000.0, torch.zeros(1)))
        self.q_norm, self.k_norm, self.out_norm = (
            nn.ParameterDict({"weight": torch.ones(n)}) for n in (self.head_dim, self.head_dim, width)
        )
        self.linear1, self.linear2 = linear(width, 8 * width, True), linear(4 * width, width, True)
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x):
        q, k, v = (self.split(y) for y in self.qkv(x))
        q, k = outside_rms_norm(q, self.q_norm["weight"]), outside_rms_norm(k, self.k_norm["weight"])
        q, k = (rotate(y, self.rotary.inv_freq, -1).to(v.dtype) for y in (q, k))
        x = x + outside_rms_norm(self.out_proj(attention(q, k, v).flatten(2)), self.out_norm["weight"])
        y = self.linear2(swiglu(self.linear1(x), self.beta))
        return x + F.dropout(y, DROPOUT, self.training)


class Fox(Headed):
    """The forgetting transformer."""

    def __init__(self, dims):
        super().__init__(dims, [1, 1, 1], convolved="")
        self.f_proj, self.o_proj = linear(dims.width, dims.heads, True), linear(dims.width, dims.width)

    def forward(self, x):
        q, k, v = (self.split(y) for y in self.qkv(x))
        return self.o_proj(forgetting_attention(q, k, v, F.logsigmoid(self.f_proj(x))).flatten(2))


class Mamba(nn.Module):
    """Mamba: a diagonal state of every channel."""

    def __init__(self, dims):
        super().__init__()
        inner, self.states, self.rank = 2 * dims.width, dims.state, -(-dims.width // 16)
        self.in_proj, self.conv1d = linear(dims.width, 2 * inner), Conv(inner, bias=True)
        self.x_proj = linear(inner, self.rank + 2 * dims.state)
        self.dt_proj = linear(self.rank, inner, True)
        self.dt_proj.bias = step_bias(inner)
        self.A_log = nn.Parameter(torch.arange(1.0, dims.state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = linear(inner, dims.width)

    def forward(self, u):
        x, z = self.in_proj(u).chunk(2, -1)
        x = self.conv1d(x)
        dt, b, c = self.x_proj(x).split([self.rank, self.states, self.states], -1)
        dt = F.linear(dt, self.dt_proj.weight)
        return self.out_proj(selective_scan(x, dt, self.A_log, b, c, self.D, self.dt_proj.bias, z))


class Mamba2(nn.Module):
    """Mamba-2: a matrix state that decays by one number for each head."""

    def __init__(self, dims):
        super().__init__()
        inner, heads, self.states = 2 * dims.width, 2 * dims.heads, dims.state
        self.sizes = [inner, inner + 2 * dims.state, heads]
        self.in_proj, self.conv1d = linear(dims.width, sum(self.sizes)), Conv(self.sizes[1], bias=True)
        self.dt_bias, self.A_log = step_bias(heads), log_uniform(1, 16, heads)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm, self.out_proj = nn.RMSNorm(inner, 1e-5), linear(inner, dims.width)

    def forward(self, u):
        z, xbc, dt = self.in_proj(u).split(self.sizes, -1)
        x, b, c = self.conv1d(xbc).split([self.sizes[0], self.states, self.states], -1)
        x, b, c = x.unflatten(-1, (self.sizes[2], -1)), b[:, :, None], c[:, :, None]
        y = ssd(x, dt, self.A_log, b, c, self.D, self.dt_bias).flatten(2)
        return self.out_proj(self.norm(y * F.silu(z)))


class Gla(Headed):
    """Gated linear attention: a decay of every key channel."""

    def __init__(self, dims):
        super().__init__(dims, [1, 1, 2])
        width = dims.width
        self.g_proj, self.o_proj = linear(width, 2 * width), linear(2 * width, width)
        self.gk_proj = nn.Sequential(linear(width, 16), linear(16, width, True))
        self.g_norm_swish_gate = nn.RMSNorm(2 * self.head_dim, 1e-5)

    def forward(self, x):
        g = F.logsigmoid(self.gk_proj(x)) / 16
        o = self.g_norm_swish_gate(gla(*(self.split(y) for y in (*self.qkv(x), g))))
        return self.o_proj(o.flatten(2) * F.silu(self.g_proj(x)))


class RetNet(Headed):
    """Retention: every head forgets at a fixed rate."""

    def __init__(self, dims):
        super().__init__(dims, [1, 1, 2])
        self.g_proj, self.o_proj = linear(dims.width, 2 * dims.width), linear(2 * dims.width, dims.width)
        self.g_norm_swish_gate = nn.RMSNorm(2 * self.head_dim, 1e-5)

    def forward(self, x):
        q, k, v = (self.split(y) for y in self.qkv(x))
        q, k = (rotate(y, rotary(self.head_dim, 10_000.0, y)) for y in (q, k))
        head = torch.arange(self.heads, device=x.device, dtype=x.dtype)
        decays = torch.log1p(-(2.0 ** (-5 - head)))[:, None].expand(*q.shape[:3], 1)
        o = self.g_norm_swish_gate(gla(q, k, v, decays)).flatten(2)
        return self.o_proj(o * F.silu(self.g_proj(x)))


class GatedDelta(Headed):
    """DeltaNet, with `gated` Gated DeltaNet, with several `writes` of a token Gated DeltaProduct."""

    def __init__(self, dims, gated, writes=1):
        super().__init__(dims, [1, writes, 2 * writes])
        self.writes, width = writes, dims.width
        self.b_proj, self.o_proj = linear(width, writes * dims.heads), linear(2 * width, width)
        self.o_norm = nn.RMSNorm(2 * self.head_dim, 1e-5)
        self.gated = gated
        if gated:
            self.a_proj, self.g_proj = linear(width, dims.heads), linear(width, 2 * width)
            self.A_log, self.dt_bias = log_uniform(1e-2, 16, dims.heads), step_bias(dims.heads)

    def forward(self, x):
        q, k, v = self.qkv(x)
        k, v, beta = (
            y.unflatten(-1, (self.writes, self.heads, -1)).flatten(1, 2) for y in (k, v, self.b_proj(x))
        )
        # With several writes the transition may have negative eigenvalues.
        beta = (2 if self.writes > 1 else 1) * torch.sigmoid(beta[..., 0])
        g = decay_gate(self.a_proj(x), self.A_log, self.dt_bias) if self.gated else None
        o = self.o_norm(delta_rule(unit(self.split(q)), unit(k), v, beta, g)).flatten(2)
        return self.o_proj(o * F.silu(self.g_proj(x)) if self.gated else o)


class Kda(Headed):
    """Kimi delta attention: the delta rule with a decay of every key channel."""

    def __init__(self, dims):
        super().__init__(dims, [1, 1, 1])
        width = dims.width
        self.b_proj, self.o_proj = linear(width, dims.heads), linear(width, width)
        self.f_proj = nn.Sequential(linear(width, self.head_dim), linear(self.head_dim, width))
        self.g_proj = nn.Sequential(linear(width, self.head_dim), linear(self.head_dim, width, True))
        self.A_log, self.dt_bias = log_uniform(1, 16, dims.heads), step_bias(width)
        self.o_norm = nn.RMSNorm(self.head_dim, 1e-5)

    def forward(self, x):
        q, k, v = (self.split(y) for y in self.qkv(x))
        q, k = unit(q), unit(k)
        g = kda_gate(self.split(self.f_proj(x)), self.A_log, self.dt_bias)
        reads, writes = kda_keys(k, g, torch.sigmoid(self.b_proj(x)))
        o = self.o_norm(dplr(q, writes, v, g, reads, writes, self.head_dim**-0.5)).flatten(2)
        return self.o_proj(o * torch.sigmoid(self.g_proj(x)))


class MesaNet(Headed):
    """The mesa layer: a least-squares fit at every step."""

    def __init__(self, dims):
        super().__init__(dims, [1, 1, 1], convolved="qk")
        self.a_proj, self.b_proj = (linear(dims.width, dims.heads, True) for _ in range(2))
        self.lambda_params = nn.Parameter(torch.full((dims.width,), math.log(math.expm1(0.75))))
        self.o_norm, self.o_proj = nn.RMSNorm(self.head_dim, 1e-5), linear(dims.width, dims.width)

    def forward(self, x):
        q, k, v = (self.split(y) for y in self.qkv(x))
        beta, g = torch.sigmoid(self.b_proj(x)), F.logsigmoid(self.a_proj(x))
        return self.o_proj(self.o_norm(mesa(unit(q), unit(k), v, beta, g, self.lambda_params)).flatten(2))


class LowRank(nn.Module):
    """A map of RWKV-7 through few channels."""

    def __init__(self, width, rank, squash, bias):
        super().__init__()
        self.lora = nn.Sequential(linear(width, rank), squash, linear(rank, width, bias))

    def forward(self, x):
        return self.lora(x)


class Rwkv7(nn.Module):
    """RWKV-7's time mixing."""

    def __init__(self, dims):
        super().__init__()
        width, self.heads = dims.width, dims.heads
        head_dim = width // dims.heads
        for name in "rkvawg":
            self.register_parameter(f"x_{name}", nn.Parameter(torch.rand(1, 1, width)))
        self.k_k, self.k_a = nn.Parameter(torch.full((width,), 0.7)), nn.Parameter(torch.ones(width))
        self.r_k = nn.Parameter(torch.full((dims.heads, head_dim), -0.04))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (linear(width, width) for _ in range(4))

        def rank(times):
            return 32 * max(math.floor(times * width**0.5 / 32 + 0.5), 1)

        inner = rank(2.5 * head_dim / 64)
        self.w_lora = LowRank(width, inner, nn.Tanh(), True)
        self.a_lora = LowRank(width, inner, nn.Identity(), True)
        self.g_lora = LowRank(width, rank(5.0), nn.Sigmoid(), False)
        self.g_norm = nn.GroupNorm(dims.heads, width, 1e-5 * head_dim)

    def forward(self, x):
        mixes = torch.cat([self.get_parameter(f"x_{name}")[0] for name in "rkvawg"])
        for_r, for_k, for_v, for_a, for_w, for_g = token_shift(x, mixes)
        r, k, v = self.r_proj(for_r), self.k_proj(for_k), self.v_proj(for_v)
        eta, g = torch.sigmoid(self.a_lora(for_a)), -math.exp(-0.5) * torch.sigmoid(self.w_lora(for_w))
        r, k, v, g = (y.unflatten(-1, (self.heads, -1)) for y in (r, k, v, g))
        kappa, erased, written = rwkv7_keys(k, eta, self.k_k, self.k_a)
        o = dplr(r, written, v, g, kappa, erased, 1.0)
        norm = (self.g_norm.weight, self.g_norm.bias)
        return self.o_proj(rwkv7_read(o, r, written, v, *norm, self.r_k, self.g_lora(for_g)))


class MLstm(Headed):
    """mLSTM: a matrix memory with an exponential input gate."""

    def __init__(self, dims):
        super().__init__(dims, [1, 1, 2])
        width = dims.width
        self.i_proj, self.f_proj = (linear(width, dims.heads, True) for _ in range(2))
        self.f_proj.bias = nn.Parameter(torch.linspace(3.0, 6.0, dims.heads))
        self.g_proj, self.o_proj = linear(width, 2 * width), linear(2 * width, width)
        self.o_norm = nn.RMSNorm(2 * self.head_dim, 1e-5)

    def forward(self, x):
        q, k, v = (self.split(y) for y in self.qkv(x))
        h = self.o_norm(mlstm(q, k, v, self.i_proj(x), F.logsigmoid(self.f_proj(x)))).flatten(2)
        return self.o_proj(h * torch.sigmoid(self.g_proj(x)))


class S4(nn.Module):
    """S4D, by the convolution, with a GELU and a gated linear layer."""

    def __init__(self, dims):
        super().__init__()
        width, pairs = dims.width, dims.state // 2
        self.D = nn.Parameter(torch.randn(width))
        self.kernel = nn.ParameterDict({
            "C": torch.randn(width, pairs, 2) * 0.5**0.5,
            "log_dt": torch.empty(width).uniform_(math.log(1e-3), math.log(0.1)),
            "log_A_real": torch.full((width, pairs), math.log(0.5)),
            "A_imag": (math.pi * torch.arange(pairs)).repeat(width, 1),
        })
        self.output_linear = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(1))

    def forward(self, u):
        kernel = (self.kernel[name] for name in ("C", "log_dt", "log_A_real", "A_imag"))
        y = F.gelu(s4d(u, *kernel, self.D)).transpose(1, 2)
        # One mask for all steps.
        return self.output_linear(F.dropout1d(y, DROPOUT, self.training)).transpose(1, 2)


class Gru(nn.GRU):
    """PyTorch's own."""

    def __init__(self, dims):
        super().__init__(dims.width, dims.width, batch_first=True)

    def forward(self, x):
        return super().forward(x)[0]


MODELS = {
    "transformer": Transformer,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "gla": Gla,
    "delta_net": lambda dims: GatedDelta(dims, gated=False),
    "gated_delta_net": lambda dims: GatedDelta(dims, gated=True),
    "gated_delta_product": lambda dims: GatedDelta(dims, gated=True, writes=4),
    "retnet": RetNet,
    "gru": Gru,
    "s4": S4,
    "mesa_net": MesaNet,
    "fox": Fox,
    "kda": Kda,
    "rwkv7": Rwkv7,
    "mlstm": MLstm,
}


class RecNet(nn.Module):
    """The stack: x ← LayerNorm(x + dropout(mixer(x))) between an encoder and a decoder."""

    def __init__(self, model, dims, inputs, classes, layers):
        super().__init__()
        self.encoder, self.decoder = linear(inputs, dims.width, True), linear(dims.width, classes, True)
        self.layers = nn.ModuleList(MODELS[model](dims) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dims.width) for _ in range(layers))

    def forward(self, x):
        x = self.encoder(x)
        for layer, norm in zip(self.layers, self.norms):
            x = norm(x + F.dropout(layer(x), DROPOUT, self.training))
        return self.decoder(x)


def heads_of(width):
    """Heads of a width: four up to 512, then the first power of two with at most 128 channels a head."""
    if width <= 512:
        return 4
    return next(n for n in (4 << i for i in range(16)) if width % n == 0 and width // n <= 128)


# Ops at the sizes of a profile.


class Missing(Exception):
    """There is nothing in PyTorch to measure."""


@contextmanager
def refusals():
    """With --deterministic PyTorch refuses what it has no such algorithm for: that is left out, as what is missing."""
    try:
        yield
    except RuntimeError as why:
        if "deterministic" not in str(why):
            raise
        raise Missing("no deterministic algorithm") from why


def parse_size(text):
    """The sizes of a label such as `B8 T400 H4 K64 V128`, `B8 T400 256 to 512` or `4700000`."""
    size = SimpleNamespace(B=1, T=1)
    for name, number in re.findall(r"\b([A-Za-z]+) ?(\d+)\b", text):
        setattr(size, name, int(number))
    if match := re.search(r"(\d+) to (\d+)", text):
        size.inputs, size.outputs = map(int, match.groups())
    if text.isdigit():
        size.count = int(text)
    size.words = set(re.findall(r"\b[a-z]+\b", text)) - {"to", "vocab"}
    if odd := size.words - {"dropout", "gate", "bias"}:
        raise Missing(f"no counterpart with {', '.join(sorted(odd))}")
    return size


class Draw:
    """Random tensors of one type on one device."""

    def __init__(self, device, dtype):
        self.place = {"device": device, "dtype": dtype}

    def __call__(self, *shape, scale=1.0):
        return scale * torch.randn(shape, **self.place)

    def uniform(self, *shape, low=0.0, high=1.0):
        return torch.empty(shape, **self.place).uniform_(low, high)

    def log_decay(self, *shape):
        """Log decays: mostly mild, some none at all, some that forget nearly everything."""
        kind, mild = self.uniform(*shape), 0.2 * torch.log1p(-self.uniform(*shape))
        strong = -20 * self.uniform(*shape)
        return torch.where(kind < 0.05, 0.0, torch.where(kind < 0.1, strong, mild))

    def integers(self, *shape, below):
        return torch.randint(below, shape, device=self.place["device"])


def wide(s):
    """Sequences of rows of D channels."""
    return s.B, s.T, s.D


def keys(s, writes=1):
    """Sequences with a key for each head."""
    return s.B, s.T * writes, s.H, s.K


def values(s, writes=1):
    """Sequences with a value for each head."""
    return s.B, s.T * writes, s.H, s.V


def heads(s, writes=1):
    """Sequences with a number for each head."""
    return s.B, s.T * writes, s.H


def qkv(s, d, q=lambda x: x, writes=1):
    """Queries, keys and values."""
    return q(d(*keys(s))), q(d(*keys(s, writes))), d(*values(s, writes))


def elementwise(f):
    """An op of one tensor."""
    return lambda s, d: ([d(*wide(s))], f)


def delta(gated, erases=True):
    """An op of the delta rule's family, with as many writes of a token as its size says."""

    def build(s, d):
        writes = getattr(s, "n", 1)
        beta = (2 if writes > 1 else 1) * d.uniform(*heads(s, writes))
        decays = [d.log_decay(*heads(s))] if gated else [None]
        return [*qkv(s, d, unit, writes), beta, *decays], lambda *x: delta_rule(*x, erases)

    return build


def build_dplr(s, d):
    """dplr with keys as of Kimi delta attention."""
    q, k, v = qkv(s, d, unit)
    a, b = k * d.uniform(*keys(s), low=0.5), k * d.uniform(*keys(s))
    return [q, k, v, d.log_decay(*keys(s)), a, b], lambda *x: dplr(*x, s.K**-0.5)


def build_ssd(s, d):
    """ssd with parameters as a layer begins with."""
    maps = [d(s.B, s.T, s.G, s.N) for _ in range(2)]
    a_log, dt_bias = d.uniform(s.H, high=2.7), d.uniform(s.H, low=-6.9, high=-2.3)
    return [d(s.B, s.T, s.H, s.P), d(*heads(s)), a_log, *maps, d(s.H), dt_bias], ssd


def build_scan(s, d):
    """selective_scan with parameters as a layer begins with."""
    a_log = torch.arange(1, s.N + 1, **d.place).log().repeat(s.D, 1)
    maps = [d(s.B, s.T, s.N) for _ in range(2)]
    dt_bias = d.uniform(s.D, low=-6.9, high=-2.3)
    return [d(*wide(s)), d(*wide(s)), a_log, *maps, d(s.D), dt_bias, d(*wide(s))], selective_scan


def build_s4d(s, d):
    """s4d with parameters as a layer begins with."""
    pairs = s.N // 2
    rates = d(s.D, pairs, scale=0.1) + math.log(0.5)
    turns = math.pi * torch.arange(pairs, **d.place) + d(s.D, pairs, scale=0.1)
    log_dt = d.uniform(s.D, low=-6.9, high=-2.3)
    return [d(*wide(s)), d(s.D, pairs, 2, scale=0.7), log_dt, rates, turns, d(s.D)], s4d


def build_gru(s, d):
    """PyTorch's GRU. The op is given gates; here an input of one channel makes them at next to no cost."""
    gru = nn.GRU(1, s.D, batch_first=True, **d.place)
    weights = [weight.detach() for weight in gru.parameters()]

    def run(x, *weights):
        start = x.new_zeros(1, s.B, s.D)
        return torch.gru(x, start, weights, True, 1, 0.0, True, False, True)[0]

    return [d(s.B, s.T, 1), *weights], run


def build_mesa(s, d):
    """mesa with keys of length one."""
    beta, g = d.uniform(*heads(s)), d.log_decay(*heads(s))
    return [*qkv(s, d, unit), beta, g, d(s.H * s.K, scale=0.5)], mesa


def build_mlstm(s, d):
    """mlstm with queries and keys that have no sum near zero."""
    return [*qkv(s, d, torch.abs), d(*heads(s), scale=2), d.log_decay(*heads(s))], mlstm


def build_head(s, d):
    """Linear layer and cross-entropy, with padding in the second half of the last sequence."""
    labels = d.integers(s.B, s.T, below=s.C)
    if s.B > 1:
        labels[-1, -(-s.T // 2) :] = -100

    def run(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), labels.flatten())

    return [d(*wide(s)), d(s.C, s.D, scale=2 * s.D**-0.5), d(s.C, scale=0.5)], run


def build_adam(s, d):
    """A step of PyTorch's fused Adam over one tensor."""
    value = nn.Parameter(d(s.count))
    value.grad = d(s.count)
    on_gpu = value.is_cuda
    optimizer = torch.optim.Adam([value], 1e-3, weight_decay=1e-2, fused=True, capturable=on_gpu)
    return [], lambda: optimizer.step()


def build_rwkv7_read(s, d):
    """rwkv7_read with a gate or without."""
    width = s.H * s.K
    params = [d.uniform(width, low=0.5, high=1.5), d(width, scale=0.3), d(s.H, s.K, scale=0.3)]
    gates = [d(s.B, s.T, width)] if "gate" in s.words else []
    return [*(d(*keys(s)) for _ in range(4)), *params, *gates], rwkv7_read


def build_embedding(s, d):
    """embedding of symbols of which some are blanks."""
    ids = d.integers(s.B, s.T, below=s.vocab + s.vocab // 2).clamp(max=s.vocab)
    return [d(s.D, s.vocab), d(s.D)], lambda weight, bias: embedding(ids, weight, bias)


def build_swiglu(s, d):
    """swiglu with a bias or without."""
    bias = [d(2 * s.D)] if "bias" in s.words else []
    return [d(s.B, s.T, 2 * s.D), d.uniform(1, low=0.5, high=1.5), *bias], swiglu


def gated_norm(norm_first, gate):
    """An RMS norm of every head with a gate behind it, or of all channels with a gate before it."""

    def build(s, d):
        weight = d.uniform(s.V if norm_first else s.H * s.V, low=0.5, high=1.5)
        x, z = (d(s.B, s.T, s.H * s.V) for _ in range(2))

        def run(x, z, weight):
            return head_norm(x, weight) * gate(z) if norm_first else head_norm(x * gate(z), weight)

        return [x, z, weight], run

    return build


def build_residual_norm(s, d):
    """residual_norm, compiled on a GPU: there PyTorch makes one kernel of it."""
    p = DROPOUT if "dropout" in s.words else 0.0
    run = torch.compile(residual_norm) if d.place["device"] == "cuda" else residual_norm
    return [d(*wide(s)), d(*wide(s)), d(s.D), d(s.D)], lambda *x: run(*x, p)


def build_qk_norm_rope(s, d):
    """The transformer's norm of every head and its rotary embedding."""
    frequencies = rotary(s.K, 1000.0, d(1))
    inputs = [d(*keys(s)), d.uniform(s.K, low=0.5, high=1.5)]
    return inputs, lambda x, weight: rotate(outside_rms_norm(x, weight), frequencies, -1)


def build_rope(s, d):
    """RetNet's rotary embedding."""
    frequencies = rotary(s.K, 10_000.0, d(1))
    return [d(*keys(s))], lambda x: rotate(x, frequencies)


# For each op: its inputs at a size, and the function of them.
OPS = {
    "adam": build_adam,
    "add": lambda s, d: ([d(*wide(s)), d(*wide(s))], torch.add),
    "attention": lambda s, d: (qkv(s, d), attention),
    "causal_conv1d": lambda s, d: ([d(*wide(s)), d(s.D, 1, 4, scale=0.5), d(s.D, scale=0.5)], conv_silu),
    "decay_gate": lambda s, d: ([d(*heads(s)), d(s.H), d(s.H) - 4], decay_gate),
    "delta_rule": delta(gated=False),
    "dplr": build_dplr,
    "dropout": elementwise(lambda x: F.dropout(x, DROPOUT)),
    "embedding": build_embedding,
    "forgetting_attention": lambda s, d: (
        [*qkv(s, d), F.logsigmoid(2 + 2 * d(*heads(s)))], forgetting_attention
    ),
    "gated_delta_product": delta(gated=True),
    "gated_delta_rule": delta(gated=True),
    "gated_rms_norm_after": gated_norm(True, F.silu),
    "gated_rms_norm_before": gated_norm(False, F.silu),
    "gated_rms_norm_sigmoid": gated_norm(True, torch.sigmoid),
    "gated_sum_rule": delta(gated=True, erases=False),
    "gelu": elementwise(F.gelu),
    "gla": lambda s, d: ([*qkv(s, d), F.logsigmoid(2 * d(*keys(s))) / 16], gla),
    "global_norm": lambda s, d: ([d(s.count)], torch.linalg.vector_norm),
    "glu": elementwise(F.glu),
    "gru": build_gru,
    "head": build_head,
    "kda_gate": lambda s, d: ([d(*keys(s)), d(s.H), d(s.H * s.K) - 4], kda_gate),
    "kda_keys": lambda s, d: (
        [unit(d(*keys(s))), d.log_decay(*keys(s)), d.uniform(*heads(s), high=2.0)], kda_keys
    ),
    "l2norm": lambda s, d: ([d(*keys(s))], unit),
    "layer_norm": lambda s, d: (
        [d(*wide(s)), d(s.D), d(s.D)], lambda x, w, b: F.layer_norm(x, w.shape, w, b)
    ),
    "linear": lambda s, d: ([d(s.B, s.T, s.inputs), d(s.outputs, s.inputs, scale=s.inputs**-0.5)], F.linear),
    "log_sigmoid": elementwise(lambda x: F.logsigmoid(x) / 16),
    "logistic": elementwise(torch.sigmoid),
    "mesa": build_mesa,
    "mlstm": build_mlstm,
    "qk_norm_rope": build_qk_norm_rope,
    "residual_norm": build_residual_norm,
    "rms_norm": lambda s, d: ([d(s.B, s.T, s.H * s.V), d(s.V)], head_norm),
    "rope": build_rope,
    "rwkv7_keys": lambda s, d: (
        [d(*keys(s)), d.uniform(s.B, s.T, s.H * s.K), d(s.H * s.K), d(s.H * s.K)], rwkv7_keys
    ),
    "rwkv7_read": build_rwkv7_read,
    "s4d": build_s4d,
    "selective_scan": build_scan,
    "sigmoid": elementwise(lambda x: 2 * torch.sigmoid(x)),
    "sigmoid_gate": lambda s, d: ([d(*wide(s)), d(*wide(s))], lambda a, b: a * torch.sigmoid(b)),
    "ssd": build_ssd,
    "swiglu": build_swiglu,
    "tanh": elementwise(torch.tanh),
    "token_shift": lambda s, d: ([d(*wide(s)), d.uniform(s.n, s.D)], token_shift),
}

# The ops for which PyTorch has a kernel of its own, or makes one.
SHIPPED = {
    "adam", "attention", "causal_conv1d", "dropout", "gelu", "global_norm", "glu", "gru", "head", "layer_norm",
    "linear", "residual_norm", "rms_norm",
}


class Case:
    """An op with inputs, and its passes."""

    def __init__(self, op, size, draw):
        inputs, self.function = OPS[op](size, draw)
        self.inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
        self.leaves = [x for x in self.inputs if x is not None]
        self.gradient = None

    def outputs(self):
        """The outputs, with a graph where autograd is on."""
        return self.function(*self.inputs)

    def forward(self):
        """The forward pass alone."""
        with torch.no_grad():
            self.outputs()

    def both(self):
        """Both passes, with a given gradient of the first output; it may not depend on every input."""
        outputs = self.outputs()
        first = outputs if torch.is_tensor(outputs) else outputs[0]
        if self.gradient is None:
            self.gradient = torch.randn_like(first)
        torch.autograd.grad(first, self.leaves, self.gradient, allow_unused=True)


# Time and memory.


class TooLarge(Exception):
    """A backward pass would keep too much."""


def kept_bytes(run, limit):
    """Bytes that autograd keeps for the backward pass of `run`."""
    kept, total = set(), 0

    def pack(x):
        nonlocal total
        storage = x.untyped_storage()
        if storage.data_ptr() not in kept:
            kept.add(storage.data_ptr())
            total += storage.nbytes()
        if total > limit:
            raise TooLarge(f"autograd would keep more than {limit >> 30} GiB of one sequence")
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    return total


def fitting(batch, run_one, limit):
    """As many sequences as fit into memory; `run_one` is the forward pass of one."""
    return max(min(batch, limit // max(kept_bytes(run_one, limit), 1)), 1)


def cpu_seconds(run, rounds):
    """The median time of a call after a warm-up."""

    def once():
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    first = once()
    return statistics.median(once() for _ in range(rounds or (3 if first > 1 else 9)))


def gpu_seconds(run, rounds):
    """The median time of what a call puts on the stream."""

    def once(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    once(3)
    seconds = max(once(3), 1e-6)
    # As the program does: a GPU at its power limit takes a while to settle on a clock.
    if seconds >= 1e-3:
        once(max(math.ceil(0.3 / seconds), 1))
    repeats = max(math.ceil(0.01 / seconds), 1)
    return statistics.median(once(repeats) for _ in range(rounds or 11))


def captured(run):
    """`run` as one CUDA graph; nothing where it cannot be captured."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


class Measured:
    """Seconds of a call, and what is to be said of them."""

    def __init__(self, seconds, mark=""):
        self.seconds, self.mark = seconds, mark


def measure_cpu(op, size, _, backward, rounds):
    """The passes of an op on the CPU, in f32."""
    draw, batch = Draw("cpu", torch.float32), size.B
    if backward:
        one = SimpleNamespace(**{**vars(size), "B": 1})
        size.B = fitting(batch, Case(op, one, draw).outputs, KEPT["op"])
    case, scale = Case(op, size, draw), batch / size.B
    mark = f" (B{size.B})" if size.B < batch else ""
    forward = Measured(scale * cpu_seconds(case.forward, rounds), mark)
    return forward, Measured(scale * cpu_seconds(case.both, rounds), mark) if backward else None


def measure_gpu(op, size, route, backward, rounds):
    """The passes of an op on the GPU: in one CUDA graph, or marked where that cannot be."""
    draw = Draw("cuda", torch.bfloat16 if route == "bf16" else torch.float32)
    cases = [Case(op, size, draw)]
    one = sum(x.nbytes for x in cases[0].leaves) or 4 * 4 * getattr(size, "count", 0)
    while len(cases) < min(16, -(-CACHE // one)):
        cases.append(Case(op, size, draw))

    def time_pass(name):
        passes = [getattr(case, name) for case in cases]

        def run():
            for call in passes:
                call()

        replay = captured(run)
        return Measured(gpu_seconds(replay or run, rounds) / len(cases), "" if replay else " (no graph)")

    return time_pass("forward"), time_pass("both") if backward else None


# Training steps.


class Training:
    """Updates of a model as the program makes them: loss, gradient, clipping, Adam."""

    def __init__(self, step, batch, device):
        width, length = step["width"], step["steps"]
        dims = SimpleNamespace(width=width, heads=heads_of(width), state=STATE)
        self.net = RecNet(step["model"], dims, SYMBOLS, CLASSES, LAYERS).to(device)
        count = sum(p.numel() for p in self.net.parameters())
        if count != step.get("parameters", count):
            raise Missing(f"a model of {step['parameters']:,} parameters; the default one has {count:,}")
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3, fused=True)
        symbols = torch.randint(SYMBOLS, (batch, length), device=device)
        # Every second step is a blank.
        blanks = (torch.arange(length, device=device) % 2 == 0)[:, None]
        self.inputs = F.one_hot(symbols, SYMBOLS) * blanks.float()
        self.labels = torch.randint(CLASSES, (batch, length), device=device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=step["route"] == "bf16")

    def loss(self):
        """The loss of the batch."""
        with self.autocast:
            logits = self.net(self.inputs)
            return F.cross_entropy(logits.flatten(0, 1), self.labels.flatten())

    def update(self):
        """One update, up to the loss on the host."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def measure_step(step, device, rounds):
    """Updates of a model: pairs of a name and a measurement."""
    batch = step["batch"]
    if device == "cpu":
        count = fitting(batch, Training(step, 1, device).loss, KEPT["step"])
        seconds = cpu_seconds(Training(step, count, device).update, rounds) * batch / count
        return [("", Measured(seconds, f" (B{count})" if count < batch else ""))]
    found = []
    for name in ("eager", "torch.compile"):
        training = Training(step, batch, device)
        if name == "torch.compile":
            training.net = torch.compile(training.net, mode="default")
        for _ in range(3):
            training.update()
        found.append((f", {name}", Measured(cpu_seconds(training.update, rounds or 12))))
    return found


# The comparison with golden vectors.


def relative(found, wanted):
    """The relative root mean square of an error."""
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def compare(module, tensors, output, loss):
    """The errors of a module's output and of all gradients of a loss, by name, in float64."""
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    module = module.double().eval()
    params = {n.removeprefix("param."): x for n, x in tensors.items() if n.startswith("param.")}
    module.load_state_dict(params)
    x = tensors["x"].requires_grad_()
    y = module(x)
    leaves = {"x": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(loss(y, tensors), list(leaves.values()))
    errors = {f"grad.{n}": relative(g, tensors[f"grad.{n}"]) for n, g in zip(leaves, gradients)}
    return relative(y.detach(), tensors[output]), errors


def layer_loss(y, golden):
    """The loss of the golden layers."""
    return (y * golden["w"]).sum()


def model_loss(logits, golden):
    """The loss of the golden models."""
    mask = golden["mask"].bool()
    return F.cross_entropy(logits[mask], golden["labels"][mask].long())


def check():
    """Compares every layer and every model that has golden vectors; whether all are right."""
    dims, right = SimpleNamespace(width=64, heads=4, state=16), True
    print("| golden | output | worst gradient | of |\n|---|--:|--:|---|")
    for kind, name in ((kind, name) for kind in ("layer", "model") for name in MODELS):
        path = GOLDEN / f"{kind}_{name}.safetensors"
        if not path.exists():
            print(f"| {kind} {name} | none | | |")
            continue
        tensors = load_file(path)
        if kind == "layer":
            error, gradients = compare(MODELS[name](dims), tensors, "y", layer_loss)
        else:
            net = RecNet(name, dims, tensors["x"].shape[-1], tensors["logits"].shape[-1], layers=2)
            error, gradients = compare(net, tensors, "logits", model_loss)
        worst = max(gradients, key=gradients.get)
        passed = max(error, gradients[worst]) <= TOLERANCE
        right = right and passed
        verdict = "" if passed else " FAILED"
        print(f"| {kind} {name}{verdict} | {error:.1e} | {gradients[worst]:.1e} | {worst} |", flush=True)
    return right


# The report.


class Report:
    """Lines of Markdown on the screen and in a file that has all so far."""

    def __init__(self, path):
        self.path, self.lines, self.left = path, [], {}

    def add(self, *lines):
        for line in lines:
            print(line, flush=True)
            self.lines.append(line)
        if self.path:
            self.path.write_text("\n".join(self.lines) + "\n")

    def row(self, *cells):
        """A row of a table."""
        self.add(f"| {' | '.join(cells)} |")

    def head(self, texts, numbers):
        """The head of a table that has some columns of text, and of numbers behind them."""
        self.add("")
        self.row(*texts, *numbers)
        self.row(*["---"] * len(texts), *["--:"] * len(numbers))

    def leave_out(self, name, why):
        """Remembers what is in no table."""
        self.left.setdefault(str(why), []).append(name)

    def end(self):
        """Says what is in no table, and why."""
        if self.left:
            reasons = (f"{', '.join(names)} ({why})" for why, names in self.left.items())
            self.add("", f"Left out: {'; '.join(reasons)}.")


def ms(measured):
    """Milliseconds, with three digits that count."""
    if measured is None:
        return "-"
    milli = 1e3 * measured.seconds
    digits = min(max(2 - math.floor(math.log10(max(milli, 1e-4))), 0), 4)
    return f"{milli:.{digits}f}{measured.mark}"


def ratio(ours, theirs):
    """How many times as long PyTorch takes."""
    if ours is None or theirs is None:
        return "-"
    times = theirs.seconds / ours.seconds
    return f"{times:.0f}" if times >= 100 else f"{times:.1f}" if times >= 1 else f"{times:.2f}"


def of_profile(one):
    """A pass in the profile: that of the kernels alone where it is known."""
    return Measured((one["graph"] or one["host"])["median"]) if one else None


def select_format(route):
    """Makes matrix products and convolutions of f32 tensors round as a format of the profile says."""
    torch.set_float32_matmul_precision("high" if route == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = route == "tf32"


def report_ops(ops, args, report):
    """The table of the ops."""
    passes = [f"{which}{of}" for of in (", ms", ", PyTorch ms", ", times") for which in ("forward", "both")]
    report.head(["op", "size", "format"], [*passes, "of the ceiling"])
    for op in ops:
        name, size, route, forward, both = (op[key] for key in ("op", "size", "route", "forward", "both"))
        try:
            if forward is None:
                raise Missing("no time in the profile")
            if name not in (OPS if args.device == "cpu" else SHIPPED):
                raise Missing("no counterpart")
            select_format(route)
            measure = measure_cpu if args.device == "cpu" else measure_gpu
            with refusals():
                theirs = measure(name, parse_size(size), route, both is not None, args.rounds)
        except (Missing, TooLarge) as why:
            report.leave_out(f"{name} {size}".strip(), why)
            continue
        ours, last = (of_profile(forward), of_profile(both)), both or forward
        share = f"{100 * max(last['share_of_copy'], last['share_of_matmul']):.0f} %"
        report.row(name, size, route, *map(ms, ours), *map(ms, theirs), *map(ratio, ours, theirs), share)
        gc.collect()


def report_steps(training, args, report):
    """The table of the training steps."""
    report.head(["model", "width", "batch", "format"], ["ms", "PyTorch ms", "times"])
    for step in training:
        name, route, ours = step["model"], step["route"], Measured(step["update"]["median"])
        try:
            if name not in (MODELS if args.device == "cpu" else ["transformer"]):
                raise Missing("no counterpart")
            select_format(route)
            with refusals():
                found = measure_step(step, args.device, args.rounds)
        except (Missing, TooLarge) as why:
            report.leave_out(f"{name} at width {step['width']}", why)
            continue
        for kind, theirs in found:
            sizes = [str(step["width"]), f"{step['batch']} x {step['steps']}"]
            report.row(name + kind, *sizes, route, ms(ours), ms(theirs), ratio(ours, theirs))
        gc.collect()


def chosen(entries, key, names, known, everything):
    """The entries of a profile that a list with commas names; without a list all or none."""
    if names is None or names == "all":
        return entries if names or everything else []
    names = names.split(",")
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"there is no {key} {', '.join(unknown)}; there are {', '.join(known)}")
    return [entry for entry in entries if entry[key] in names]


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    option = parser.add_argument
    option("profile", nargs="?", type=Path, help="what `selectivbench profile --json` wrote")
    option("--check", action="store_true", help="compare layers and models with tests/golden")
    option("--device", choices=["cpu", "cuda"], default="cpu", help="where PyTorch runs")
    option("--op", metavar="OP,..", help="only these ops, and without --model no training steps")
    option("--model", metavar="MODEL,..", help="only these models, and without --op no ops")
    option("--slices", choices=["unbind", "index"], default="unbind", help="how loops take their steps")
    option("--rounds", type=int, help="rounds of every measurement")
    option("--deterministic", action="store_true", help="only algorithms that give the same bits again, as ours do")
    option("--markdown", type=Path, metavar="FILE", help="write the tables to a file as well")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(1)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Asked to warn alone, attention on the GPU keeps an algorithm that is not deterministic.
        torch.use_deterministic_algorithms(True)
    if args.check:
        sys.exit(0 if check() else "not all layers are those of the golden vectors")
    if args.profile is None:
        parser.error("give a PROFILE.json, or --check")
    steps.how = args.slices
    profile = json.loads(args.profile.read_text())
    everything = args.op is None and args.model is None
    ops = chosen(profile["ops"], "op", args.op, OPS, everything)
    training = chosen(profile["steps"], "model", args.model, MODELS, everything)
    formats = {one["route"] for one in ops + training} - {"f32"}
    if args.device == "cpu" and formats:
        sys.exit(f"the profile has {', '.join(sorted(formats))}, but the CPU computes in f32: --device cuda")

    ours = profile["device"]["name"]
    if "threads" in profile["device"]:
        ours += f" with {profile['device']['threads']} threads"
    theirs = f"the CPU with {torch.get_num_threads()} threads"
    if args.device == "cuda":
        theirs = torch.cuda.get_device_name()
    if args.deterministic:
        theirs += ", deterministic algorithms"
    report = Report(args.markdown)
    report.add(f"selectivbench on {ours}; PyTorch {torch.__version__} on {theirs}, loops by {args.slices}.")
    if ops:
        report_ops(ops, args, report)
    if training:
        report_steps(training, args, report)
    report.end()


if __name__ == "__main__":
    main()
