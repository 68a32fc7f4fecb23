"""Files of SIRFShampoo: the authors' class in float64, random gradients, tensors of any order."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import Timing, block_factors
from kradagrad_jax.transforms.sampled import WHOLE
from kradagrad_jax.transforms.sirfshampoo import scale_by_sirfshampoo
from tests.golden.case import NEVER, check_keys
from tests.golden.kfac import relative
from tests.golden.recorded import UnknownFile
from tests.golden.singd import structure_of
from tests.x64 import x64

METHODS = ("sirfshampoo",)
KEYS = "lr beta2 alpha1 alpha2 lam kappa T batch_size structures gamma"


def tolerance_of(raw: dict[str, Any]) -> float:
    return float(raw.get("tolerance", 1e-12))


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of parameters, factors and momenta over all steps."""
    with x64():
        return trajectory(raw, jnp.float64)


def _timing(every: Any, steps: int) -> dict[str, Any]:
    """T is a number of steps, or the list of the steps (from 0) at which factors move."""
    if isinstance(every, int):
        return {"refresh_every": every}
    due = jnp.asarray([t in every for t in range(steps)])
    interval = lambda count: jnp.where(due[count - 1], 1, NEVER)  # noqa: E731
    return {"refresh_every": interval, "timing": Timing(phase=-1)}


def trajectory(raw: dict[str, Any], dtype: Any) -> dict[str, float]:
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    check_keys(c, KEYS, raw["source"])
    if c["gamma"] != 1:
        raise UnknownFile(f"{raw['source']}: gamma {c['gamma']}")
    names = list(c["structures"])
    pairs = {n: tuple(structure_of(s) for s in c["structures"][n]) for n in names}
    tx = scale_by_sirfshampoo(
        preset="official",
        batch_size=c["batch_size"],
        overrides=[(f"^{re.escape(n)}$", pairs[n]) for n in names],
        damping=c["lam"],
        lr_cov=c["beta2"],
        riemannian_momentum=c["alpha2"],
        **_timing(c["T"], len(inputs["grads"])),
    )
    params = {n: jnp.asarray(v, dtype) for n, v in inputs["params"].items()}
    state, update = tx.init(params), jax.jit(tx.update)
    buffer = jax.tree.map(jnp.zeros_like, params)
    worst = {"params": 0.0, "K": 0.0, "m_K": 0.0}
    # the groups that overrides make
    layout = dataclasses.replace(WHOLE, group=lambda path, shape: str(names.index(path) + 1))
    for t, grads in enumerate(inputs["grads"]):
        grads = {n: jnp.asarray(v, dtype) for n, v in grads.items()}
        z, state = update(grads, state, params)
        step = jax.tree.map(lambda u, p: u + c["kappa"] * p, z, params)
        buffer = jax.tree.map(lambda b, s: c["alpha1"] * b + s, buffer, step)
        params = jax.tree.map(lambda p, b: p - c["lr"] * b, params, buffer)
        factors = block_factors(state, params, layout)
        for name in names:
            worst["params"] = max(
                worst["params"], relative(params[name], outputs["params"][t][name])
            )
            (factor,) = factors[name]
            for kind, held in (("K", factor.roots), ("m_K", factor.momenta)):
                expected = outputs[kind][name][t]
                if held is None:
                    assert expected == [None] * len(factor.roots)
                    continue
                for s, ours, dense in zip(pairs[name], held, expected, strict=True):
                    worst[kind] = max(worst[kind], relative(s.to_dense(ours), dense))
    return worst
