"""Files of google-research/precondition, `distributed_shampoo`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import kradagrad_jax as kj
from tests.golden.case import NEVER, Case, check_keys, schedule
from tests.golden.recorded import Recorded, UnknownFile

KEYS = (
    "learning_rate block_size beta1 beta2 diagonal_epsilon matrix_epsilon weight_decay "
    "start_preconditioning_step preconditioning_compute_steps statistics_compute_steps "
    "best_effort_shape_interpretation graft_type nesterov exponent_override "
    "moving_average_for_momentum relative_matrix_epsilon decoupled_weight_decay eigh"
)
GRAFTS = ("none", "sgd", "adagrad", "rmsprop")


def build(file: Recorded, params: dict[str, jax.Array]) -> Case:
    """Steps counted from 0; momentum after preconditioning, decay before or after it."""
    c = file.config
    check_keys(c, KEYS, file.name)
    kind, _, normalized = c["graft_type"].lower().partition("_")
    if kind not in GRAFTS or normalized not in ("", "normalized"):
        raise UnknownFile(f"{file.name}: no grafting type {c['graft_type']!r}")
    if kind == "rmsprop" and c["beta2"] == 1:
        kind = "adagrad"
    graft = kj.Graft(
        kind,
        beta2=c["beta2"],
        eps=c["diagonal_epsilon"],
        normalize=bool(normalized),
    )
    layout = kj.Layout(
        block_size=c["block_size"],
        merge="greedy" if c["best_effort_shape_interpretation"] else "none",
        merge_cap=4096,
        pieces="tail",
        vectors="block",
        max_dim=4096,
    )
    every = c["preconditioning_compute_steps"]
    options: dict[str, Any] = {
        "preset": "paper",
        "beta2": c["beta2"],
        "initial": c["matrix_epsilon"],
        "damping": c["matrix_epsilon"],
        "damping_rule": "relative" if c["relative_matrix_epsilon"] else "absolute",
        "exponent": 1 / c["exponent_override"] if c["exponent_override"] else None,
        "root": "eigh" if c["eigh"] or not c["relative_matrix_epsilon"] else "newton",
        "graft": graft,
        "fallback": "identity" if kind in ("none", "sgd") else graft,
        "layout": layout,
        **schedule(c["statistics_compute_steps"], 1, every, 1, 1),
    }
    track = outer(kj.scale_by_shampoo(**options), c)
    if c["start_preconditioning_step"] > 0:
        never = kj.Timing(start=NEVER, first_refresh=NEVER)
        grafted = kj.scale_by_shampoo(**options | {"timing": never, "refresh_every": 1})
        track = switch(outer(grafted, c), track, c["start_preconditioning_step"])
    after = c["weight_decay"] if c["decoupled_weight_decay"] else 0.0
    return Case(
        optax.chain(
            track,
            optax.add_decayed_weights(after),
            optax.scale_by_learning_rate(c["learning_rate"]),
        ),
        layout,
    )


def outer(inner: optax.GradientTransformation, c: dict[str, Any]) -> optax.GradientTransformation:
    """Coupled decay and momentum around a direction."""
    return optax.chain(
        inner,
        optax.add_decayed_weights(0.0 if c["decoupled_weight_decay"] else c["weight_decay"]),
        optax.scale(1 - c["beta1"] if c["moving_average_for_momentum"] else 1.0),
        optax.trace(c["beta1"], c["nesterov"]),
    )


def switch(
    before: optax.GradientTransformation, after: optax.GradientTransformation, start: int
) -> optax.GradientTransformation:
    """Runs both and returns the second from step `start` (counted from 0) on.

    The momentum of the preconditioned direction is gathered from the first step, before it is used.
    """

    def init(params: Any) -> tuple[Any, Any, jax.Array]:
        return after.init(params), before.init(params), jnp.zeros((), jnp.int32)

    def update(g: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        a, new_a = after.update(g, state[0], params)
        b, new_b = before.update(g, state[1], params)
        u = jax.tree.map(lambda x, y: jnp.where(state[2] >= start, x, y), a, b)
        return u, (new_a, new_b, state[2] + 1)

    return optax.GradientTransformation(init, update)
