"""Files of K-FAC: kfac-jax trajectories, curvlinops factors, and the dense baseline of Puiu.

Statistics enter as hand-made rows or factors, as those of a user with hooks of their own would.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kradagrad_jax as kj
from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
from kradagrad_jax.engine import block_factors, layers
from tests.golden.case import check_keys
from tests.golden.recorded import UnknownFile
from tests.x64 import x64

METHODS = ("kfac", "kfac_factors", "K-FAC with max-eigenvalue damping")


def tolerance_of(raw: dict[str, Any]) -> float:
    return raw.get("tolerance", 1e-9)


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of everything that the file records."""
    with x64() if raw.get("dtype", "float64") == "float64" else contextlib.nullcontext():
        if raw["method"] == "kfac":
            return _official(raw)
        if raw["method"] == "kfac_factors":
            return _factors(raw)
        return _relative_damping(raw)


def relative(ours: Any, expected: Any) -> float:
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    difference = np.abs(ours - expected).max()
    return float(difference / np.abs(expected).max()) if difference else 0.0


def patches(x: np.ndarray, window: tuple[int, int], stride: int = 1, pad: int = 0) -> np.ndarray:
    """(n, positions, height * width * channel) windows of an NHWC array."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(x, window, axis=(1, 2))
    views = views[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)
    return views.reshape(len(x), views.shape[1] * views.shape[2], -1)


def scaled(a: np.ndarray, fields: list[np.ndarray], approx: str = "expand") -> tuple[Any, Any]:
    """Rows ``(a, g)`` of inputs (n, T, d) and fields of per-example output gradients (n, T, e)."""
    a, fields = (a if a.ndim == 3 else a[:, None]), [b.reshape(len(b), -1, b.shape[-1])
                                                   for b in fields]  # fmt: skip
    if approx == "reduce":
        a, fields = a.mean(1, keepdims=True), [b.sum(1, keepdims=True) for b in fields]
    rows = a.reshape(-1, a.shape[-1])
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1) / np.sqrt(len(rows))
    g = np.concatenate([b.reshape(-1, b.shape[-1]) for b in fields]) / np.sqrt(len(a))
    rows = np.tile(rows, (len(fields), 1)) / np.sqrt(len(fields))  # one set of rows per field
    return jnp.asarray(rows), jnp.asarray(g)


def _spec(params: dict[str, dict[str, Any]]) -> CaptureSpec:
    found = []
    for name, leaf in params.items():
        shape, bias = leaf["w"].shape, f"{name}/b"
        make = Layer.dense if len(shape) == 2 else Layer.conv
        found.append(make(f"{name}/w", shape, bias=bias))
    return CaptureSpec.from_layers(found)


def _tree(raw: Any) -> Any:
    """Nested dictionaries of lists as arrays."""
    if isinstance(raw, dict):
        return {k: _tree(v) for k, v in raw.items()}
    return jnp.asarray(raw)


def _official(raw: dict[str, Any]) -> dict[str, float]:
    """kfac-jax: bias-corrected averages, factored damping, norm constraint, momentum."""
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    check_keys(
        c,
        "l2_reg ema T_inv T_updt norm_constraint exact_inverse momentum lr damping estimation_mode",
        raw["source"],
    )
    params, kinds = _tree(inputs["params"]), inputs["layers"]
    damping = c["damping"]
    if isinstance(damping, list):
        table = jnp.asarray(damping) + c["l2_reg"]
        damping = lambda count: table[count]  # noqa: E731
    else:
        damping = damping + c["l2_reg"]
    options = {
        "preset": "official",
        "ema": c["ema"],
        "damping": damping,
        "damping_rule": "exact" if c["exact_inverse"] else "factored",
        "refresh_every": c["T_inv"],
        "statistics_every": c["T_updt"],
    }
    spec = _spec(params)
    plain = kj.scale_by_kfac(spec, **options)
    tx = kj.kfac(
        c["lr"], spec, momentum=c["momentum"], norm_constraint=c["norm_constraint"], **options
    )
    update, direct = jax.jit(tx.update), jax.jit(plain.update)
    state, shadow = jax.jit(tx.init)(params), jax.jit(plain.init)(params)
    worst = dict.fromkeys(("params", "precond_grads", "A_ema", "G_ema"), 0.0)
    for k, grads in enumerate(inputs["grads"]):
        rows = {}
        for name, kind in kinds.items():
            a = np.asarray(inputs["acts"][k][name])
            if kind == "conv":
                window = inputs["params"][name]["w"]
                size = (len(window), len(window[0]))
                positions = np.asarray(inputs["dy"][k][0][name]).shape[1]
                a = patches(a, size, pad=(positions + size[0] - 1 - a.shape[1]) // 2)
            rows[f"{name}/w"] = scaled(a, [np.asarray(f[name]) for f in inputs["dy"][k]])
        curvature = Curvature.from_rows(rows, spec)
        updates, state = update(_tree(grads), state, params, curvature=curvature)
        ours, shadow = direct(_tree(grads), shadow, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
        for kind, value in (("params", params), ("precond_grads", ours)):
            errors = jax.tree.map(relative, value, _tree(outputs[kind][k]))
            worst[kind] = max([worst[kind], *jax.tree.leaves(errors)])
    found = layer_factors(shadow, params, spec)
    for i, kind in enumerate(("A_ema", "G_ema")):
        for name, expected in outputs[kind].items():
            worst[kind] = max(
                worst[kind], relative(found[f"{name}/w"].statistics[i], np.asarray(expected))
            )
    return worst


def layer_factors(state: Any, params: Any, spec: CaptureSpec) -> dict[str, Any]:
    """Factor of every layer that is no stack, by the path of its weight."""
    return layer_blocks(state, params, spec, lambda path, shape: "dense")


def layer_blocks(state: Any, params: Any, spec: CaptureSpec, group: Any) -> dict[str, Any]:
    """The same, for methods that are grouped in another way."""
    packing = layers.packing_of(spec, params, True, lambda layer: True, False)
    layout = kj.Layout(
        block_size=None,
        merge="none",
        vectors="block",
        include="^layers/",
        stacked="^layers/",
        group=group,
    )
    blocks = block_factors(state, packing.split(params), layout)
    return {path.removeprefix("layers/"): found[0] for path, found in blocks.items()}


def _factors(raw: dict[str, Any]) -> dict[str, float]:
    """curvlinops: factors of one batch."""
    c, inputs = raw["config"], raw["inputs"]
    worst = {"A": 0.0, "G": 0.0}
    for name, text in c["layers"].items():
        a = np.asarray(inputs["acts"][name])
        fields = [np.asarray(b[name]) for b in inputs["b"]]
        weight = np.asarray(inputs["params"][f"{name}.weight"])
        order = np.arange(weight[0].size + 1)
        if text.startswith("Conv2d"):
            stride, pad = 2 if "stride=(2, 2)" in text else 1, 1 if "padding=(1, 1)" in text else 0
            a = patches(a.transpose(0, 2, 3, 1), weight.shape[2:], stride, pad)
            fields = [b.transpose(0, 2, 3, 1) for b in fields]
            shape = weight.transpose(2, 3, 1, 0).shape
            layer = Layer.conv("w", shape, bias="b")
            channels = np.arange(weight[0].size).reshape(*shape[:2], -1)
            order[:-1] = channels.transpose(2, 0, 1).reshape(-1)
        else:
            layer = Layer.dense("w", weight.T.shape, bias="b")
        spec = CaptureSpec.from_layers([layer])
        curvature = Curvature.from_rows({"w": scaled(a, fields, c["kfac_approx"])}, spec)
        grams = curvature.grams("w")
        ours = np.asarray(grams.a[0])[np.ix_(order, order)]
        worst["A"] = max(worst["A"], relative(ours, raw["outputs"]["A"][name]))
        worst["G"] = max(worst["G"], relative(grams.g[0], raw["outputs"]["G"][name]))
    return worst


def _relative_damping(raw: dict[str, Any]) -> dict[str, float]:
    """The dense baseline of arXiv 2206.15397: identity start, relative damping, RMS clip."""
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    if c["weight_decay"] or any(v["kind"] != "linear" for v in inputs["layers"].values()):
        raise UnknownFile("K-FAC with max-eigenvalue damping: only linear layers without decay")
    names = list(inputs["layers"])
    params = to_layers(inputs["params"], names)
    spec = _spec(params)
    options = {
        "ema": c["stat_decay"],
        "averaging": "identity",
        "damping": c["damping"],
        "damping_rule": "relative",
        "rms_clip": c["kl_clip"],
        "graft": "none",
        "refresh_every": c["T_inv"],
        "statistics_every": c["T_updt"],
        "fallback": "identity",
    }
    tx = kj.kfac(c["lr"], spec, momentum=c["momentum"] or None, **options)
    direct = kj.scale_by_kfac(spec, **options)
    update, only = jax.jit(tx.update), jax.jit(direct.update)
    state, shadow = jax.jit(tx.init)(params), jax.jit(direct.init)(params)
    worst = {"params": 0.0, "directions": 0.0, "eigenvalues": 0.0}
    for k in range(len(inputs["grads"])):
        grads = to_layers(inputs["grads"][k], names)
        rows = {}
        for name in names:
            g = np.asarray(inputs["outgrads"][k][name])
            rows[f"{name}/w"] = scaled(np.asarray(inputs["acts"][k][name]), [len(g) * g])
        curvature = Curvature.from_rows(rows, spec)
        updates, state = update(grads, state, params, curvature=curvature)
        ours, shadow = only(grads, shadow, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
        for kind, value in (("params", params), ("directions", ours)):
            expected = to_layers(outputs[kind][k], names)
            errors = jax.tree.map(relative, value, expected)
            worst[kind] = max([worst[kind], *jax.tree.leaves(errors)])
        if outputs["eigenvalues"][k]:
            found = layer_factors(shadow, params, spec)
            for key, expected in outputs["eigenvalues"][k].items():
                name, side = key.rsplit(".", 1)
                values = np.sort(np.asarray(found[f"{name}/w"].inverses["AG".index(side)]))[::-1]
                error = relative(values, expected)
                worst["eigenvalues"] = max(worst["eigenvalues"], error)
    return worst


def to_layers(flat: dict[str, Any], names: list[str]) -> dict[str, dict[str, jax.Array]]:
    """``{"0.weight": (out, in), ..}`` as ``{"0": {"w": (in, out), "b"}}``."""
    return {
        n: {"w": jnp.asarray(flat[f"{n}.weight"]).T, "b": jnp.asarray(flat[f"{n}.bias"])}
        for n in names
    }
