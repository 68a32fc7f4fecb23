"""Files of IKFAC, INGD and SINGD, and of the structures: the authors' classes in float64.

Layers enter as hand-made rows. Convolutions without groups run as kernels (height, width, in, out)
with `channels_first`; the official treatment of groups (one K, from patches averaged over groups)
runs as a dense layer on these patches.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
from kradagrad_jax.linalg.structures import Structure, structure
from kradagrad_jax.transforms.singd import scale_by_ikfac, scale_by_ingd, scale_by_singd
from tests.golden.case import check_keys
from tests.golden.kfac import layer_blocks, relative
from tests.golden.recorded import UnknownFile
from tests.x64 import x64

METHODS = ("singd", "ikfac", "ingd", "structures")
KEYS = (
    "lr momentum damping alpha1 weight_decay T loss_average lr_cov kfac_approx kfac_like "
    "normalize_lr_cov structures"
)
INGD_KEYS = "lr momentum damping beta2 weight_decay TCov TInv lr_cov schedule"


def tolerance_of(raw: dict[str, Any]) -> float:
    return float(raw.get("tolerance", 1e-12))


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of everything that the file records."""
    with x64():
        if raw["method"] == "structures":
            return _structures(raw)
        return trajectory(raw, jnp.float64)


def structure_of(config: dict[str, Any]) -> Structure:
    sizes = [str(config[key]) for key in ("size", "k", "k1", "k2") if key in config]
    return structure(":".join([config["name"], ",".join(sizes)]) if sizes else config["name"])


def _options(raw: dict[str, Any]) -> tuple[Any, tuple[Structure, Structure]]:
    """The transformation of a specification, and the structures of K and C."""
    c, method = raw["config"], raw["method"]
    common = {"preset": "official", "damping": c["damping"], "graft": "none"}
    if method == "ingd":
        check_keys(c, INGD_KEYS, raw["source"])
        rates = jnp.asarray([s["lr_cov"] for s in c["schedule"]])
        common |= {"riemannian_momentum": c["beta2"], "lr_cov": lambda t: rates[t]}
        dense = structure("dense")
        make = lambda spec: scale_by_ingd(spec, refresh_every=1, **common)  # noqa: E731
        return make, (dense, dense)
    check_keys(c, KEYS, raw["source"])
    pair = (structure_of(c["structures"]["K"]), structure_of(c["structures"]["C"]))
    rates = c["lr_cov"]
    if isinstance(rates, list):
        table = jnp.asarray(rates)
        rates = lambda t: table[t]  # noqa: E731
    common |= {
        "structures": pair,
        "lr_cov": rates,
        "refresh_every": c["T"],
        "normalize_lr_cov": "max_entry" if c["normalize_lr_cov"] else "none",
        "channels_first": True,
    }
    if c["kfac_like"]:
        return lambda spec: scale_by_ikfac(spec, **common), pair
    return lambda spec: scale_by_singd(spec, riemannian_momentum=c["alpha1"], **common), pair


def _patches(x: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
    """(n, positions, height, width, channel) windows of NCHW inputs, averaged over groups."""
    n, c, *_ = x.shape
    (kh, kw), groups = layer["kernel"], layer["groups"]
    x = x.reshape(n, groups, c // groups, *x.shape[2:]).mean(1).transpose(0, 2, 3, 1)
    x = np.pad(x, ((0, 0), *((p, p) for p in layer["pad"]), (0, 0)))
    dil, stride = layer["dil"], layer["stride"]
    spans = [d * (k - 1) + 1 for d, k in zip(dil, (kh, kw), strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(1, 2))
    views = views[:, :: stride[0], :: stride[1], :, :: dil[0], :: dil[1]]
    return views.transpose(0, 1, 2, 4, 5, 3).reshape(n, -1, kh, kw, c // groups)


def _is_kernel(layer: dict[str, Any]) -> bool:
    return layer["type"] == "conv" and layer["groups"] == 1


def rows_of(layer: dict[str, Any], t: int, average: Any, approx: str) -> tuple[Any, Any]:
    """Scaled rows ``(a, g)`` of step t, in the order of inputs that the layer has here."""
    a, g = np.asarray(layer["a"][t]), np.asarray(layer["g"][t])
    n = len(a)
    if layer["type"] == "conv":
        a = _patches(a, layer)
        a = a if _is_kernel(layer) else np.moveaxis(a, -1, 2)
        a, g = a.reshape(n, a.shape[1], -1), g.reshape(n, g.shape[1], -1).transpose(0, 2, 1)
    a, g = a.reshape(n, -1, a.shape[-1]), g.reshape(n, -1, g.shape[-1])
    positions = g.shape[1]
    if approx == "expand":
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    else:
        a, g = a.mean(1), g.sum(1)
    if layer["bias"]:
        a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
    q = {None: 1, "batch": n, "batch+sequence": n * positions}[average]
    return a / math.sqrt(len(a)), g * math.sqrt(q)


def _params(flat: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    """``{"layers.0.weight": (out, in, ..)}`` as ``{"layers.0": {"w": (.., in, out), "b"}}``."""
    out = {}
    for name, layer in layers.items():
        w = np.asarray(flat[f"{name}.weight"])
        w = w.transpose(2, 3, 1, 0) if _is_kernel(layer) else w.reshape(len(w), -1).T
        out[name] = {"w": w}
        if layer["bias"]:
            out[name]["b"] = np.asarray(flat[f"{name}.bias"])
    return out


def _layer(name: str, layer: dict[str, Any], params: dict[str, jax.Array]) -> Layer:
    make = Layer.conv if _is_kernel(layer) else Layer.dense
    return make(f"{name}/w", params["w"].shape, bias=f"{name}/b" if layer["bias"] else None)


def trajectory(raw: dict[str, Any], dtype: Any) -> dict[str, float]:
    """Replays a file; momentum and weight decay as the authors have them."""
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    layers, ingd = inputs["layers"], raw["method"] == "ingd"
    average, approx = c.get("loss_average", "batch"), c.get("kfac_approx", "expand")

    def arrays(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)

    params = arrays(_params(inputs["params"], layers))
    spec = CaptureSpec.from_layers([_layer(n, layer, params[n]) for n, layer in layers.items()])
    make, pair = _options(raw)
    tx = make(spec)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    buffer = jax.tree.map(jnp.zeros_like, params)
    worst = dict.fromkeys(("params", "curvature", *outputs["factors"]["layers.0"]), 0.0)

    def compare(kind: str, ours: Any, expected: Any) -> None:
        worst[kind] = max(worst[kind], relative(ours, expected))

    for t, grads in enumerate(inputs["grads"]):
        rows = {f"{n}/w": rows_of(layer, t, average, approx) for n, layer in layers.items()}
        rows = {k: tuple(jnp.asarray(x, dtype) for x in v) for k, v in rows.items()}
        curvature = Curvature.from_rows(rows, spec)
        now = c["schedule"][t] if ingd else {"update": True, "weight_decay": c["weight_decay"]}
        for name, layer in layers.items():
            if not _is_kernel(layer):
                found = curvature.grams(f"{name}/w")
                compare("curvature", found.a[0], layer["U"][t])
                compare("curvature", found.g[0], layer["G"][t])
        nat, state = update(
            arrays(_params(grads, layers)), state, params,
            curvature=curvature if now["update"] else None,
        )  # fmt: skip
        step = jax.tree.map(lambda u, p, w=now["weight_decay"]: u + w * p, nat, params)
        buffer = jax.tree.map(lambda b, s: c["momentum"] * b + s, buffer, step)
        params = jax.tree.map(lambda p, b: p - c["lr"] * b, params, buffer)
        expected = _params(outputs["params"][t], layers)
        jax.tree.map(lambda p, e: compare("params", p, e), params, expected)
        group = "|".join(s.name for s in pair)
        factors = layer_blocks(state, params, spec, lambda path, shape, g=group: g)
        for name in layers:
            recorded = {k: v[t] for k, v in outputs["factors"][name].items() if v}
            _compare_factor(compare, factors[f"{name}/w"], pair, recorded)
    return worst


def _compare_factor(compare: Any, factor: Any, pair: Any, recorded: dict[str, Any]) -> None:
    stored = {"K": factor.k, "C": factor.c, "m_K": factor.m_k, "m_C": factor.m_c}
    for name, ours in stored.items():
        s = pair["KC".index(name[-1])]
        if ours is None:
            assert name not in recorded, f"{name} should be stored"
        else:
            compare(name, s.to_dense(ours), recorded[name])


def _structures(raw: dict[str, Any]) -> dict[str, float]:
    """Single operations; errors relative to the largest entry, or to 1 where that is less."""
    worst: dict[str, float] = {}
    check_keys(raw["config"], "", raw["source"])
    for case in raw["outputs"]["cases"]:
        s, d = structure_of(case["structure"]), case["d"]
        given = {k: jnp.asarray(v) for k, v in case["inputs"].items()}
        ours = jax.jit(_operations, static_argnums=0)(s, **given)
        ours["stored_numbers"] = s.numbers(d)
        unknown = set(case["outputs"]) - set(ours)
        if unknown:
            raise UnknownFile(f"{raw['source']}: operations {sorted(unknown)}")
        for name, expected in case["outputs"].items():
            expected = np.asarray(expected)
            assert np.shape(ours[name]) == expected.shape
            error = np.abs(np.asarray(ours[name]) - expected).max() / max(1, np.abs(expected).max())
            worst[name] = max(worst.get(name, 0.0), float(error))
    return worst


def _operations(s: Structure, M: Any, M1: Any, M2: Any, X: Any) -> dict[str, Any]:
    p1, p2 = s.project_dense(M1), s.project_dense(M2)
    k, k2 = s.matmul(p1, p2), s.matmul(p2, p1)
    return {
        "proj_M": s.to_dense(s.project_dense(M)),
        "K": s.to_dense(k),
        "K2": s.to_dense(k2),
        "K_at_X": s.apply(k, X),
        "Kt_at_X": s.apply_transposed(k, X),
        "K_at_K2": s.to_dense(s.matmul(k, k2)),
        "proj_KtXXtK": s.to_dense(s.project_gram(s.apply_transposed(k, X))),
        "proj_KtK": s.to_dense(s.ktk(k)),
        "proj_XXt": s.to_dense(s.project_gram(X)),
        "mean_diag_K": s.average(k),
        "frobenius_K": s.frobenius(k),
        "max_abs_K": s.max_entry(k),
    }
