"""Files of Ginger: the authors' optimizer, and folds of several vectors at once."""

import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kradagrad_jax as kj
from kradagrad_jax.curvature.samples import Samples
from kradagrad_jax.engine import block_factors
from kradagrad_jax.transforms.ginger import scale_by_ginger
from tests.golden.case import check_keys
from tests.golden.kfac import relative
from tests.golden.recorded import UnknownFile
from tests.reading import averages
from tests.x64 import x64

METHODS = ("ginger", "ginger_batch")
WHOLE = kj.Layout(block_size=None, merge="none", vectors="block")
KEYS = "b1 b2 tau damping gamma rho mu_dtype learning_rate partition b weights interval"


def _single(raw: dict[str, Any]) -> bool:
    return raw["config"].get("mu_dtype", "float64") == "float32"


def tolerance_of(raw: dict[str, Any]) -> float:
    return float(raw.get("tolerance", 1e-4 if _single(raw) else 1e-9))


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of everything that the file records."""
    check_keys(raw["config"], KEYS, raw["source"])
    with contextlib.nullcontext() if _single(raw) else x64():
        return _errors(raw)


def _rate(value: Any) -> Any:
    """The learning rate as an optax schedule; the files count steps from 1."""
    if not isinstance(value, dict):
        return value
    number = r"([-+.\de]+)"
    linear = rf"{number} \+ \({number}-{number}\)\*min\(t,(\d+)\)/(\d+)"
    found = re.search(linear, value["formula"])
    if value["kind"] != "linear" or not found:
        raise UnknownFile(f"unknown schedule {value['formula']!r}")
    start, end, again, until, steps = map(float, found.groups())
    if start != again or until != steps:
        raise UnknownFile(f"unknown schedule {value['formula']!r}")
    return lambda t: start + (end - start) * jnp.minimum(t + 1, steps) / steps


def _errors(raw: dict[str, Any]) -> dict[str, float]:
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    dtype = jnp.float32 if _single(raw) else jnp.float64
    whole_model = c.get("partition", "leaf") != "leaf"

    def arrays(tree: dict[str, Any]) -> dict[str, jax.Array]:
        return {name: jnp.asarray(value, dtype) for name, value in tree.items()}

    tx = optax.chain(
        scale_by_ginger(
            preset="official",
            rank=c["tau"],
            damping=c.get("damping", c.get("gamma")),
            clip="none" if c["rho"] is None else c["rho"],
            beta1=c["b1"],
            beta2=c["b2"],
            partition="model" if whole_model else "leaf",
            statistics_every=c.get("interval", 1),
        ),
        optax.scale_by_learning_rate(_rate(c["learning_rate"])),
    )
    params = arrays(inputs["params"])
    state, update, worst = tx.init(params), jax.jit(tx.update), {}

    def note(kind: str, ours: Any, expected: Any) -> None:
        error = relative(ours, np.asarray(expected, dtype))
        worst[kind] = max(worst.get(kind, 0.0), error)

    for t, grads in enumerate(inputs["grads"]):
        vectors = inputs["curvature_grads"][t]
        vectors = vectors if isinstance(vectors, list) else [vectors]
        weights = c.get("weights") or [1 / len(vectors)] * len(vectors)
        scaled = [
            {k: np.sqrt(len(vectors) * w) * np.asarray(x) for k, x in v.items()}
            for v, w in zip(vectors, weights, strict=True)
        ]
        samples = Samples.from_gradients(*map(arrays, scaled))
        updates, state = update(arrays(grads), state, params, curvature=samples)
        params = optax.apply_updates(params, updates)
        for name, expected in outputs["params"][t].items():
            note("params", params[name], expected)
        for name, expected in outputs.get("updates", [{}] * (t + 1))[t].items():
            note("updates", updates[name], expected)
        for name, expected in outputs["state"][t].items():
            basis, sigma = _basis(state[0], params, name, whole_model)
            wanted = np.sort(np.asarray(expected["sigma"]))[::-1]
            assert not wanted[len(sigma) :].any()  # no more columns than entries are held
            note("sigma", sigma, wanted[: len(sigma)])
            matrix = expected.get("G")
            if matrix is None:
                u = np.asarray(expected["U"])
                matrix = u * np.asarray(expected["sigma"]) @ u.T
            note("G", (basis.T * sigma) @ basis, matrix)
            if "mu" in expected:
                layout = dataclasses.replace(WHOLE, joined=whole_model)
                note("mu", averages(state[0], params, layout)[name], expected["mu"])
    return worst


def _basis(state: Any, params: Any, name: str, whole_model: bool) -> tuple[np.ndarray, np.ndarray]:
    """Basis ``(tau, d)`` and values of a parameter, or of the whole model."""
    if whole_model:
        (stack,) = state.factors.values()
        factor = jax.tree.map(lambda x: x[0], stack)
    else:
        factor = block_factors(state, params, WHOLE)[name][0]
    basis = np.asarray(factor.basis)
    return basis.reshape(len(basis), -1), np.asarray(factor.values)
