"""What the transformations share: defaults, exponents, and the arguments that go to the engine."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from kradagrad_jax.engine import Graft, Layout, Timing, as_graft, scale_by_blocks
from kradagrad_jax.factors import BlockMethod
from kradagrad_jax.factors.numbers import is_number
from kradagrad_jax.transforms.ranges import check

ONE_SIDED = ("one_sided", "shorter", "longer", "input", "output")
LIBRARY_LAYOUT = Layout()
PUBLISHED_LAYOUT = Layout(
    block_size=128, merge="none", pieces="tail", vectors="block", max_dim=None, state_limit=None,
    biases=None,
)  # fmt: skip


def per_mode(exponent: Any, layout: Layout) -> tuple[Any, Layout]:
    """Splits an exponent into that of the factors and a layout without those of exponent 0.

    Args:
      exponent: None, a number, a tuple with one per mode, a mapping from the number of modes to
        either, or one of :data:`ONE_SIDED`.
      layout: that of the transformation; what it says of ``modes`` goes before.

    Returns:
      The exponent of the modes that have a factor, and the layout.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(exponent, str):
        check("exponent", exponent, ONE_SIDED)
        name = "shorter" if exponent == "one_sided" else exponent
        return None, layout if layout.modes else dataclasses.replace(layout, modes=name)
    orders = exponent if isinstance(exponent, Mapping) else {}
    if isinstance(exponent, (tuple, list)):
        orders = {len(exponent): tuple(exponent)}
    zero = {
        k: tuple(not is_number(e, 0) for e in given)
        for k, given in orders.items()
        if isinstance(given, (tuple, list)) and any(is_number(e, 0) for e in given)
    }
    if not zero or layout.modes:
        return exponent, layout
    return exponent, dataclasses.replace(layout, modes=lambda path, shape: zero.get(len(shape)))


def diagonal_fallback(graft: Graft, fallback: Any) -> Any:
    """``"diagonal"`` spelled out: the graft's own direction, or AdaGrad's where it has none."""
    if fallback != "diagonal":
        return fallback
    return graft if graft.adaptive else Graft("adagrad")


_ENGINE = (
    "layout", "timing", "sharding", "refresh_every", "statistics_every", "refresh", "graft",
    "fallback", "beta1", "average", "factor_dtype", "mu_dtype", "approx", "joint_bias",
)  # fmt: skip


def engine_arguments(chosen: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments (of blocks or of layers) among the chosen ones, in its form."""
    own = {name: chosen[name] for name in _ENGINE if name in chosen}
    if "graft" in own:
        own["graft"] = as_graft(own["graft"])
        own["fallback"] = diagonal_fallback(own["graft"], own["fallback"])
    return own


def build(method: BlockMethod, chosen: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Hands a block method and the engine's share of the arguments to the engine."""
    return scale_by_blocks(method, **engine_arguments(chosen))


BLOCK_DEFAULTS: dict[str, Any] = {
    "refresh_every": 10,
    "statistics_every": 1,
    "timing": Timing(),
    "layout": LIBRARY_LAYOUT,
    "fallback": "diagonal",
    "sharding": None,
    "factor_dtype": None,
    "mu_dtype": None,
}
LAYER_DEFAULTS: dict[str, Any] = {
    "approx": "expand",
    "joint_bias": True,
    "graft": "none",
    "refresh_every": 10,
    "statistics_every": 1,
    "timing": Timing(),
    "fallback": "adam",
    "sharding": None,
    "factor_dtype": None,
}
