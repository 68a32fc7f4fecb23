"""What the transformations share: presets, and the arguments that go to the engine."""

from typing import Any

import optax

from kradagrad_jax.engine import Graft, Layout, Timing, as_graft, scale_by_blocks
from kradagrad_jax.factors import BlockMethod

LIBRARY_LAYOUT = Layout()
PUBLISHED_LAYOUT = Layout(block_size=128, merge="none", pieces="tail", vectors="block")


def choose(
    preset: str, presets: dict[str, dict[str, Any]], given: dict[str, Any]
) -> dict[str, Any]:
    """The preset's values, overridden by every given argument that is not None.

    Raises:
      ValueError: unknown preset.
    """
    if preset not in presets:
        raise ValueError(f"preset must be one of {sorted(presets)}, got {preset!r}")
    chosen = dict(presets[preset])
    chosen.update({name: value for name, value in given.items() if value is not None})
    return chosen


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def diagonal_fallback(graft: Graft, fallback: Any) -> Any:
    """``"diagonal"`` spelled out: the graft's own direction, or AdaGrad's where it has none."""
    if fallback != "diagonal":
        return fallback
    return graft if graft.adaptive else Graft("adagrad")


def build(method: BlockMethod, chosen: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Hands a block method and the engine's share of the arguments to the engine."""
    graft = as_graft(chosen["graft"])
    return scale_by_blocks(
        method,
        layout=chosen["layout"],
        timing=chosen["timing"],
        sharding=chosen.get("sharding"),
        refresh_every=chosen["refresh_every"],
        statistics_every=chosen["statistics_every"],
        graft=graft,
        fallback=diagonal_fallback(graft, chosen["fallback"]),
        beta1=None if isinstance(chosen["beta1"], str) else chosen["beta1"],
        factor_dtype=chosen["factor_dtype"],
        mu_dtype=chosen["mu_dtype"],
    )


ENGINE_DEFAULTS: dict[str, Any] = {
    "refresh_every": 10,
    "statistics_every": 1,
    "timing": Timing(),
    "layout": LIBRARY_LAYOUT,
    "fallback": "diagonal",
    "factor_dtype": None,
    "mu_dtype": None,
}
