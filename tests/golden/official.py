"""Files of jonathanmei/kradagrad: its Shampoo, KrADagrad* (KradagradPP) and KrADagrad (MM).

What the official classes do differently from every public preset is reproduced here, in
test-only transformations around the public ones (section 3.7 of the specification).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import kradagrad_jax as kj
from tests import reading
from tests.golden.alternating import build_alternating
from tests.golden.case import NEVER, Case, check_keys, per_order, schedule
from tests.golden.official_roots import own_method
from tests.golden.quirks import two_tracks
from tests.golden.recorded import Recorded, UnknownFile

KEYS = (
    "lr momentum nesterov beta2 eps diag_eps weight_decay override start root_every stat_every "
    "block merge graft iterative_roots"
)
RIDGE = 1e-8  # added by the official eigendecomposition, whatever matrix_eps is


def build(file: Recorded, params: dict[str, jax.Array]) -> Case:
    """The alias where the official step is one of its own, else the official momentum tracks."""
    c = file.config
    check_keys(c, KEYS, file.name)
    if c["graft"] not in ("none", "sgd", "adagrad", "adam"):
        raise UnknownFile(f"{file.name}: no grafting type {c['graft']!r}")
    layout = kj.Layout(
        block_size=c["block"] or None,
        merge="greedy" if c["merge"] else "none",
        merge_cap=c["block"] or None,
        pieces="tail",
        vectors="block",
    )
    if file.method == "kradagrad":
        return build_alternating(file, params, layout, RIDGE)
    kind = _effective_graft(file.method, c["graft"])
    graft, scale = _graft(kind, c)
    shared = {
        "layout": layout,
        "graft": graft,
        "fallback": graft if graft.adaptive else "identity",
        **schedule(c["stat_every"], 0, c["root_every"], 0, 1),
    }
    plain = not c["momentum"] or not (c["nesterov"] or c["weight_decay"])
    public = not _own_roots(file.method, c) and not _star_override(file.method, c)
    if public and plain and c["start"] <= 1 and scale == 1:
        alias = kj.shampoo if file.method == "shampoo" else kj.kradagrad_star
        options = _options(file.method, c) | shared
        decay = {"momentum": c["momentum"] or None, "weight_decay": c["weight_decay"]}
        return Case(alias(c["lr"], **decay, **options), layout)

    inner = optax.chain(_scale_by(file.method, c, params, shared), optax.scale(scale))
    grafted = None
    if graft.adaptive:
        never = {"timing": kj.Timing(start=NEVER, first_refresh=NEVER), "refresh_every": 1}
        grafted = _scale_by(file.method, c, params, shared | never)
        grafted = optax.chain(grafted, optax.scale(scale))
    orders = reading.orders(params, layout)
    tracks = two_tracks(inner, grafted, kind, c, orders)
    return Case(optax.chain(tracks, optax.scale_by_learning_rate(c["lr"])), layout)


def _options(method: str, c: dict[str, Any]) -> dict[str, Any]:
    """Method arguments of the public transformation."""
    if method == "shampoo":
        return {
            "preset": "paper",
            "beta2": c["beta2"],
            "initial": c["eps"],
            "damping": RIDGE,
            "damping_rule": "absolute",
            "exponent": 1 / c["override"] if c["override"] else None,
        }
    return {
        "preset": "official",
        "beta2": c["beta2"],
        "initial": 1 / c["eps"],
        "root_damping": RIDGE,
    }


def _own_roots(method: str, c: dict[str, Any]) -> bool:
    """Roots that no public option gives: ridges kept in the statistic, clamps above the ridge."""
    return c["iterative_roots"] or (method == "shampoo" and c["beta2"] < 1)


def _star_override(method: str, c: dict[str, Any]) -> bool:
    return method == "kradagradstar" and c["override"] > 0


def _scale_by(
    method: str, c: dict[str, Any], params: dict[str, jax.Array], shared: dict[str, Any]
) -> optax.GradientTransformation:
    options = _options(method, c)
    if _own_roots(method, c):
        return kj.scale_by_blocks(own_method(method, c, RIDGE), **shared)
    if _star_override(method, c):  # exponent 1/k, and L itself where that is 1

        def make(order: int) -> optax.GradientTransformation:
            changed = {"exponent": 1 / max(order, 1), "root_damping": RIDGE * (order != 1)}
            return kj.scale_by_kradagrad_star(**options | shared | changed)

        return per_order(params, shared["layout"], make)
    scale_by = kj.scale_by_shampoo if method == "shampoo" else kj.scale_by_kradagrad_star
    return scale_by(**options, **shared)


def _effective_graft(method: str, name: str) -> str:
    """Each official class knows some of the grafting types and takes the others for "none"."""
    known = ("sgd", "adagrad") if method == "shampoo" else ("adam",)
    return name if name in known else "none"


def _graft(kind: str, c: dict[str, Any]) -> tuple[kj.Graft, float]:
    """Our graft and the factor that its direction lacks.

    "none" still rescales to the norm of the gradient. The official "adam" keeps
    `v <- beta2 v + g^2` without the weight 1 - beta2.
    """
    if kind in ("none", "sgd"):
        return kj.Graft("sgd"), 1.0
    if kind == "adagrad" or c["beta2"] == 1:
        return kj.Graft("adagrad", eps=c["diag_eps"]), 1.0
    root = float(jnp.sqrt(1 - c["beta2"]))
    return kj.Graft("rmsprop", beta2=c["beta2"], eps=c["diag_eps"] * root), root
