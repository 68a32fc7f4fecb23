"""KrADagrad (KradagradMM): one mode per step, counted from 0."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import kradagrad_jax as kj
from kradagrad_jax.factors.krad import scheduled_mode
from tests.golden.case import Case, schedule
from tests.golden.quirks import overwriting_trace, rounded_to_float32
from tests.golden.recorded import Recorded, UnknownFile
from tests.reading import blocks_of


def build_alternating(
    file: Recorded, params: dict[str, jax.Array], layout: kj.Layout, ridge: float
) -> Case:
    """`preset="official"` and its momentum; partial application only where roots are not fresh."""
    c = file.config
    exponent, ridge = (None, ridge) if c["override"] == 0 else (1.0, 0.0)
    options: dict[str, Any] = {
        "preset": "official",
        "initial": 1.0,
        "damping": c["eps"],
        "beta2": c["beta2"],
        "root_damping": 0.0 if c["iterative_roots"] else ridge,
        "exponent": exponent,
        "layout": layout,
        **schedule(c["stat_every"], 1, c["root_every"], 1, c["start"] + 1, True),
    }
    rounded = "removed" not in file.source
    fresh = c["root_every"] == 1 and c["start"] <= 1
    one_block = all(len(b) == 1 for b in blocks_of(params, layout).values())
    if not one_block:
        raise UnknownFile(
            f"{file.name}: the official class refreshes the roots of the first block only"
        )
    plain = not c["momentum"] or not (c["nesterov"] or c["weight_decay"])
    if fresh and plain and not rounded:
        tx = kj.kradagrad(
            c["lr"],
            momentum=c["momentum"] or None,
            weight_decay=c["weight_decay"],
            **options,
        )
        return Case(tx, layout)
    inner = kj.scale_by_kradagrad(**options)
    return Case(
        optax.chain(
            rounded_to_float32() if rounded else optax.identity(),
            inner if fresh else partly_applied(inner, layout, c),
            optax.add_decayed_weights(c["weight_decay"]),
            overwriting_trace(c["momentum"], c["nesterov"]),
            optax.scale_by_learning_rate(c["lr"]),
        ),
        layout,
        jit=fresh,
    )


def partly_applied(
    inner: optax.GradientTransformation, layout: kj.Layout, c: dict[str, Any]
) -> optax.GradientTransformation:
    """The official order of application, from the factors that `inner` keeps.

    The gradient is multiplied by the OLD roots of all modes but the scheduled one; from `start` on
    by the root of that mode as it is after this step. Counts must be concrete.
    """
    update_inner = jax.jit(inner.update)

    def update(g: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, new = update_inner(g, state, params)
        t = int(state.count)  # from 0
        case = Case(inner, layout)
        before, after = case.factors(state, g), case.factors(new, g)
        out = dict(g)
        for name, roots in after.items():
            old, fresh = before[name]["preconditioners"], roots["preconditioners"]
            modes = list(range(len(old)))
            x = g[name].reshape([len(p) for p in old])
            if t % c["stat_every"]:
                x = _multiply(x, fresh, modes) if t >= c["start"] else x
            else:
                mode = int(scheduled_mode(jnp.asarray(t + 1), x.shape))
                x = _multiply(x, old, [i for i in modes if i != mode])
                x = _multiply(x, fresh, [mode]) if t >= c["start"] else x
            out[name] = x.reshape(g[name].shape)
        return out, new

    return optax.GradientTransformation(inner.init, update)


def _multiply(x: jax.Array, matrices: list[jax.Array], modes: list[int]) -> jax.Array:
    for i in modes:
        x = jnp.moveaxis(jnp.tensordot(matrices[i], x, ((1,), (i,))), 0, i)
    return x
