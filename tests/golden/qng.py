"""Files of QNG, the quasi-Newton optimizer beside Ginger: composed from its block method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.curvature.samples import Samples
from kradagrad_jax.engine import scale_by_blocks
from kradagrad_jax.factors import QngOptions, qng_method
from kradagrad_jax.transforms import sampled
from tests.golden.case import check_keys
from tests.golden.kfac import relative
from tests.x64 import x64

METHODS = ("ginger_qng",)
KEYS = "b1 b2 tau trust_region learning_rate form"


def tolerance_of(raw: dict[str, Any]) -> float:
    return float(raw.get("tolerance", 1e-6))


def qng(options: QngOptions, beta1: float) -> optax.GradientTransformationExtraArgs:
    """All leaves as one vector, sums of gradients, curvature vectors from `curvature=`."""
    return scale_by_blocks(
        qng_method(options),
        layout=dataclasses.replace(sampled.WHOLE, joined=True),
        source=sampled.source("qng", "model", vectors=True),
        graft="none",
        fallback="identity",
        beta1=beta1,
        average="sum",
    )


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of everything that the file records."""
    check_keys(raw["config"], KEYS, raw["source"])
    with x64():
        return _errors(raw)


def _errors(raw: dict[str, Any]) -> dict[str, float]:
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    rate = c["learning_rate"]
    options = QngOptions(c["b2"], c["tau"], c["form"], c.get("trust_region"), rate, c["b1"])
    tx = optax.chain(qng(options, c["b1"]), optax.scale(-rate))

    def arrays(tree: dict[str, Any]) -> dict[str, jax.Array]:
        return {name: jnp.asarray(value, jnp.float64) for name, value in tree.items()}

    params = arrays(inputs["params"])
    state, update = tx.init(params), jax.jit(tx.update)
    worst = {"params": 0.0, "dots": 0.0}
    for t, grads in enumerate(inputs["grads"]):
        samples = Samples.from_gradients(arrays(inputs["curvature_grads"][t]))
        updates, state = update(arrays(grads), state, params, curvature=samples)
        params = optax.apply_updates(params, updates)
        for name, expected in outputs["params"][t].items():
            worst["params"] = max(worst["params"], relative(params[name], np.asarray(expected)))
        (factor,) = state[0].factors.values()
        wanted = np.asarray(outputs["state"][t]["dots"])
        stored = min(t + 1, c["tau"])
        assert int(outputs["state"][t]["length"]) == stored
        ours = np.asarray(factor.lengths)[0, :stored]
        worst["dots"] = max(worst["dots"], relative(ours, wanted[:stored]))
    return worst
