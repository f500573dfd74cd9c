"""Float64 references of the layers kda, rwkv7 and mlstm, step by step from the papers' equations.

    pip install numpy autograd safetensors
    python3 recurrent_layers.py          # writes tensors/layer_{kda,rwkv7,mlstm}.safetensors and .json

Outputs and gradients are of a layer of width 64 with 4 heads, two sequences of 70 steps; loss Σ y w. Gradients come
from autograd (https://github.com/HIPS/autograd). Everything is stored in f32: inputs and parameters are rounded
before they are used, results after. Nothing here knows of the program's own forms of these layers.
"""

import json
import os

import autograd
import autograd.numpy as np
import numpy
from safetensors.numpy import save_file

B, T, D, H = 2, 70, 64, 4
K = D // H


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def short_conv(x, weight):
    """silu of the sum of the last four steps, weighed by channel; weight[:, 0, 3] is that of the current one."""
    padded = np.concatenate([np.zeros((B, 3, x.shape[2])), x], axis=1)
    return silu(sum(padded[:, j : j + T] * weight[:, 0, j] for j in range(4)))


def heads(x):
    return np.reshape(x, (B, T, H, -1))


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def times(vector, matrix):
    """Row vectors [B, H, K] times matrices [B, H, K, V]."""
    return np.sum(vector[..., None] * matrix, axis=-2)


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def over_time(outputs):
    return np.stack(outputs, axis=1)


def kda(p, x):
    """Kimi Team, "Kimi Linear", arXiv 2510.26692: equation 1, section 4."""
    q, k, v = (heads(short_conv(x @ p[f"{n}_proj.weight"].T, p[f"{n}_conv1d.weight"])) for n in "qkv")
    q, k = unit(q) * K**-0.5, unit(k)
    beta = sigmoid(x @ p["b_proj.weight"].T)
    raw = x @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["dt_bias"]
    alpha = np.exp(-np.exp(p["A_log"])[:, None] * heads(np.log1p(np.exp(raw))))
    state, outputs = np.zeros((B, H, K, K)), []
    for t in range(T):
        state = alpha[:, t][..., None] * state
        erased = outer(k[:, t], times(k[:, t], state))
        written = outer(k[:, t], v[:, t])
        state = state + beta[:, t][..., None, None] * (written - erased)
        outputs.append(times(q[:, t], state))
    gate = sigmoid(x @ p["g_proj.0.weight"].T @ p["g_proj.1.weight"].T + p["g_proj.1.bias"])
    o = np.reshape(rms_norm(over_time(outputs), p["o_norm.weight"]), (B, T, D))
    return (o * gate) @ p["o_proj.weight"].T


def rwkv7(p, x):
    """Peng et al., "RWKV-7", arXiv 2503.14456: section 4.1, without the first layer's values."""
    before = np.concatenate([np.zeros((B, 1, D)), x[:, :-1]], axis=1)
    mixed = {n: x + (before - x) * p[f"x_{n}"] for n in "rwkvag"}

    def low_rank(name, f):
        z = f(mixed[name] @ p[f"{name}_lora.lora.0.weight"].T) @ p[f"{name}_lora.lora.2.weight"].T
        bias = f"{name}_lora.lora.2.bias"
        return z + p[bias] if bias in p else z

    r, k, v = (heads(mixed[n] @ p[f"{n}_proj.weight"].T) for n in "rkv")
    w = heads(np.exp(-np.exp(-0.5) * sigmoid(low_rank("w", np.tanh))))
    a = heads(sigmoid(low_rank("a", lambda z: z)))
    gate = low_rank("g", sigmoid)
    kappa = k * np.reshape(p["k_k"], (H, K))
    kappa = kappa / np.sqrt(np.sum(kappa * kappa, axis=-1, keepdims=True))
    k = k * (1 + (a - 1) * np.reshape(p["k_a"], (H, K)))
    # The paper's state is transposed: [V, K].
    state, outputs = np.zeros((B, H, K, K)), []
    for t in range(T):
        transition = np.eye(K) * w[:, t][..., None, :] - outer(kappa[:, t], a[:, t] * kappa[:, t])
        state = state @ transition + outer(v[:, t], k[:, t])
        outputs.append(np.sum(state * r[:, t][..., None, :], axis=-1))
    o = over_time(outputs)
    o = o - np.mean(o, axis=-1, keepdims=True)
    o = o / np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + 1e-5 * K)
    o = np.reshape(o, (B, T, D)) * p["g_norm.weight"] + p["g_norm.bias"]
    bonus = np.sum(r * k * p["r_k"], axis=-1, keepdims=True) * v
    return ((o + np.reshape(bonus, (B, T, D))) * gate) @ p["o_proj.weight"].T


def mlstm(p, x):
    """Beck et al., "xLSTM", arXiv 2405.04517: equations 19 to 27, without the stabiliser."""
    q, k, v = (heads(short_conv(x @ p[f"{n}_proj.weight"].T, p[f"{n}_conv1d.weight"])) for n in "qkv")
    k = k * K**-0.5
    i = np.exp(x @ p["i_proj.weight"].T + p["i_proj.bias"])
    f = sigmoid(x @ p["f_proj.weight"].T + p["f_proj.bias"])
    memory, total, outputs = np.zeros((B, H, K, 2 * K)), np.zeros((B, H, K)), []
    for t in range(T):
        memory = f[:, t][..., None, None] * memory + i[:, t][..., None, None] * outer(k[:, t], v[:, t])
        total = f[:, t][..., None] * total + i[:, t][..., None] * k[:, t]
        divisor = np.maximum(np.abs(np.sum(q[:, t] * total, axis=-1, keepdims=True)), 1.0)
        outputs.append(times(q[:, t], memory) / divisor)
    h = np.reshape(rms_norm(over_time(outputs), p["o_norm.weight"]), (B, T, 2 * D))
    return (h * sigmoid(x @ p["g_proj.weight"].T)) @ p["o_proj.weight"].T


SHAPES = {
    kda: {
        **{f"{n}_proj.weight": (D, D) for n in "qkvo"},
        **{f"{n}_conv1d.weight": (D, 1, 4) for n in "qkv"},
        "b_proj.weight": (H, D), "f_proj.0.weight": (K, D), "f_proj.1.weight": (D, K), "A_log": (H,),
        "dt_bias": (D,), "g_proj.0.weight": (K, D), "g_proj.1.weight": (D, K), "g_proj.1.bias": (D,),
        "o_norm.weight": (K,),
    },
    rwkv7: {
        **{f"x_{n}": (1, 1, D) for n in "rwkvag"},
        **{f"{n}_proj.weight": (D, D) for n in "rkvo"},
        **{f"{n}_lora.lora.0.weight": (32, D) for n in "wag"},
        **{f"{n}_lora.lora.2.weight": (D, 32) for n in "wag"},
        "w_lora.lora.2.bias": (D,), "a_lora.lora.2.bias": (D,), "k_k": (D,), "k_a": (D,), "r_k": (H, K),
        "g_norm.weight": (D,), "g_norm.bias": (D,),
    },
    mlstm: {
        "q_proj.weight": (D, D), "k_proj.weight": (D, D), "v_proj.weight": (2 * D, D), "o_proj.weight": (D, 2 * D),
        "q_conv1d.weight": (D, 1, 4), "k_conv1d.weight": (D, 1, 4), "v_conv1d.weight": (2 * D, 1, 4),
        "i_proj.weight": (H, D), "i_proj.bias": (H,), "f_proj.weight": (H, D), "f_proj.bias": (H,),
        "g_proj.weight": (2 * D, D), "o_norm.weight": (2 * K,),
    },
}

# Where a parameter lies that is not around zero: its middle.
MIDDLE = {
    "A_log": 1.0, "dt_bias": -3.0, "o_norm.weight": 1.0, "g_norm.weight": 1.0, "k_k": 0.7, "k_a": 1.0, "f_proj.bias": 3.0, "i_proj.bias": -2.0,
    "w_lora.lora.2.bias": -2.0, **{f"x_{n}": 0.5 for n in "rwkvag"},
}


def single(x):
    return x.astype(numpy.float32).astype(numpy.float64)


def main():
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tensors")
    for seed, (layer, shapes) in enumerate(SHAPES.items(), start=1):
        rng = numpy.random.default_rng(seed)
        params = {}
        for name, shape in shapes.items():
            fan_in = shape[-1] if name.endswith("weight") and len(shape) > 1 else 10
            params[name] = single(MIDDLE.get(name, 0.0) + rng.normal(size=shape) / fan_in**0.5)
        x, w = single(rng.normal(size=(B, T, D))), single(rng.normal(size=(B, T, D)))
        loss = autograd.grad(lambda both: np.sum(layer(both[0], both[1]) * w))
        d_params, dx = loss((params, x))
        tensors = {"x": x, "w": w, "y": layer(params, x), "grad.x": dx}
        tensors |= {f"param.{name}": value for name, value in params.items()}
        tensors |= {f"grad.{name}": value for name, value in d_params.items()}
        name = layer.__name__
        stored = {n: numpy.ascontiguousarray(value, numpy.float32) for n, value in tensors.items()}
        assert all(numpy.isfinite(value).all() for value in stored.values()), name
        save_file(stored, os.path.join(here, f"layer_{name}.safetensors"))
        about = {
            "kind": "layer",
            "model": name,
            "source": " ".join(layer.__doc__.split()),
            "dims": {"d_model": D, "n_head": H, "T": T, "B": B},
            "seed": seed,
            "loss": "sum(y*w)",
            "note": "y and grad.* are tests/golden/recurrent_layers.py in float64, rounded to float32",
        }
        with open(os.path.join(here, f"layer_{name}.json"), "w") as file:
            file.write(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
