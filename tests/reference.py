"""The library's formulas in float64 NumPy, sharing no code with it.

Weights are `(*batch, in, out)`, inputs `(*batch, rows, in)`, cotangents `c`
`(*batch, rows, out)`; gradients are those of `sum(y * c)`.
"""

import numpy as np


def f64(tree):
    """Any array, or dict of arrays, in float64."""
    if isinstance(tree, dict):
        return {name: f64(value) for name, value in tree.items()}
    return np.asarray(tree).astype(np.float64)


def t(x):
    """Swaps the last two axes."""
    return np.swapaxes(x, -1, -2)


def row(x):
    """`(*batch, n)` -> `(*batch, 1, n)`."""
    return np.expand_dims(x, -2)


def lora_weight(w, adapter, scale):
    """`W + scale * A @ B`."""
    return w + scale * adapter["A"] @ adapter["B"]


def lora_linear(x, w, adapter, scale, bias=0.0):
    """The adapted layer, with the adapter's biases where it has them."""
    u = x @ adapter["A"]
    if "A_bias" in adapter:
        u = u + row(adapter["A_bias"])
    update = u @ adapter["B"]
    if "B_bias" in adapter:
        update = update + row(adapter["B_bias"])
    return x @ w + scale * update + (row(bias) if np.ndim(bias) else bias)


def lora_gradients(x, w, adapter, scale, c):
    """Of `x` and of every entry of the adapter."""
    a, b = adapter["A"], adapter["B"]
    u = x @ a
    if "A_bias" in adapter:
        u = u + row(adapter["A_bias"])
    v = scale * c @ t(b)
    gradients = {"x": c @ t(w) + v @ t(a), "A": t(x) @ v, "B": scale * t(u) @ c}
    if "A_bias" in adapter:
        gradients["A_bias"] = v.sum(-2)
    if "B_bias" in adapter:
        gradients["B_bias"] = scale * c.sum(-2)
    return gradients


def norms(v, norm_axis):
    """Of the columns of a weight (`"out"`), or of its rows (`"in"`)."""
    return np.sqrt((v**2).sum(-2 if norm_axis == "out" else -1))


def along(vector, norm_axis):
    """The factor of a column, or of a row, with the axes of the weight."""
    return np.expand_dims(vector, -2 if norm_axis == "out" else -1)


def dora_weight(w, adapter, scale, norm_axis="out"):
    """`(m / n) * (W + scale * A @ B)`."""
    v = lora_weight(w, adapter, scale)
    return along(adapter["m"] / norms(v, norm_axis), norm_axis) * v


def dora_linear(x, w, adapter, scale, bias=0.0, norm_axis="out"):
    """The adapted layer; the bias is not scaled."""
    shift = row(bias) if np.ndim(bias) else bias
    return x @ dora_weight(w, adapter, scale, norm_axis) + shift


def dora_gradients(x, w, adapter, scale, c, norm_axis="out", detach_norm=True):
    """Of `x` and of every entry of the adapter."""
    a, b, m = adapter["A"], adapter["B"], adapter["m"]
    v = lora_weight(w, adapter, scale)
    n = norms(v, norm_axis)
    k = along(m / n, norm_axis)
    d_k = (c * (x @ v)).sum(-2) if norm_axis == "out" else ((c @ t(v)) * x).sum(-2)
    d_v = k * (t(x) @ c)
    if not detach_norm:
        d_v = d_v - along(d_k * m / n**2, norm_axis) * v / along(n, norm_axis)
    return {
        "x": c @ t(k * v),
        "A": scale * d_v @ t(b),
        "B": scale * t(a) @ d_v,
        "m": d_k / n,
    }
