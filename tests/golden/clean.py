"""Files of the reference implementation with the clean semantics of arXiv 2305.19416."""

from typing import Any

import jax
import optax

import kradagrad_jax as kj
from tests.golden.case import Case, check_keys, per_order, schedule
from tests.golden.recorded import Recorded, UnknownFile

KEYS = (
    "lr momentum nesterov eps init tnorm dim beta2 alpha ridge root_every stat_every start block "
    "merge graft weight_decay"
)


def build(file: Recorded, params: dict[str, jax.Array]) -> Case:
    """`preset="paper"` with the file's settings; decay, where there is any, before momentum."""
    c = file.config
    check_keys(c, KEYS, file.name)
    star = file.method == "kradagradstar"
    layout = kj.Layout(
        block_size=c["block"] or None,
        merge="greedy" if c["merge"] else "none",
        merge_cap=c["merge"] or None,
        pieces="tail",
        vectors="block",
    )
    options: dict[str, Any] = {
        "preset": "paper",
        "bound": _bound(c, file.name),
        "initial": c["init"],
        "damping": c["eps"],
        "beta2": c["beta2"],
        "graft": "sgd" if c["graft"] else "none",
        "layout": layout,
        # the reference counts roots of the alternating method from 0, all else from 1
        **schedule(c["stat_every"], 0, c["root_every"], 0 if star else 1, c["start"], True),
    }

    def scale_by(order: int) -> optax.GradientTransformation:
        exponent = c["alpha"] / max(order, 1) if star else c["alpha"]
        ridge = 0.0 if exponent == 1 else c["ridge"]  # the reference takes L itself then
        make = kj.scale_by_kradagrad_star if star else kj.scale_by_kradagrad
        return make(exponent=exponent, root_damping=ridge, **options)

    if c["alpha"] == 0.5 and not (c["momentum"] and c["weight_decay"]):
        alias = kj.kradagrad_star if star else kj.kradagrad
        tx = alias(
            c["lr"],
            momentum=c["momentum"] or None,
            nesterov=c["nesterov"],
            weight_decay=c["weight_decay"],
            root_damping=c["ridge"],
            **options,
        )
        return Case(tx, layout)
    inner = per_order(params, layout, scale_by) if star else scale_by(1)
    return Case(
        optax.chain(
            inner,
            optax.add_decayed_weights(c["weight_decay"]),
            optax.trace(c["momentum"], c["nesterov"]),
            optax.scale_by_learning_rate(c["lr"]),
        ),
        layout,
    )


def _bound(c: dict[str, Any], name: str) -> str:
    if not c["dim"]:
        return c["tnorm"]
    if c["tnorm"] != "trace":
        raise UnknownFile(f"{name}: no bound n (1 + s) with s = {c['tnorm']!r}, only with trace")
    return "official"
