"""RS-KFAC, SRE-KFAC and the Brand K-FACs: K-FAC with the strongest eigenpairs of every factor."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from kradagrad_jax.engine.layers import scale_by_layers
from kradagrad_jax.factors.lowrank import low_rank_method
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online, Sketch
from kradagrad_jax.transforms import clipping, examples
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import LAYER_DEFAULTS, engine_arguments

_RECOMMENDED: dict[str, Any] = LAYER_DEFAULTS | {
    "sketch": Sketch(),
    "ema": 0.95,
    "damping": 0.1,
    "start": "corrected",
    "continuation": True,
    "rms_clip": 0.07,
    "online": Online(),
}
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": _RECOMMENDED,
    "official": _RECOMMENDED
    | {
        "sketch": Sketch(orthonormalize=False),
        "start": "identity",
        "continuation": False,
        "refresh_every": 50,
        "statistics_every": 10,
        "fallback": "identity",
    },
}
ONLINE_PRESETS: dict[str, dict[str, Any]] = {
    "recommended": _RECOMMENDED,
    "official": _RECOMMENDED
    | {
        "sketch": Sketch(power=3),
        "start": "counted",
        "refresh_every": 100,
        "statistics_every": 20,
        "fallback": "identity",
        "online": Online(correct_with_batch=False),
    },
}


def _build(
    c: dict[str, Any], tracked: bool = False, **fixed: Any
) -> optax.GradientTransformationExtraArgs:
    """``fixed``: decomposition, overwrite and correct of :class:`LowRankOptions`."""
    spec = c["spec"]
    plain = LowRankOptions(
        c["sketch"], fixed["decomposition"], c["ema"], c["start"], c["damping"], c["continuation"]
    )
    methods = {"sketched": low_rank_method(plain)}
    if tracked:
        online = c["online"]
        if online.batch_size is None:
            online = dataclasses.replace(online, batch_size=spec.examples)
        if not online.batch_size:
            raise ValueError(
                "online updates need the number of rows per statistic, and the spec knows no "
                "batch: give online=Online(batch_size=...)"
            )
        methods["online"] = low_rank_method(plain._replace(online=online, **fixed))
    return scale_by_layers(
        methods,
        spec,
        assign=lambda layer: _assign(layer, tracked),
        form="rows" if tracked else "grams",
        clip=clipping.rms_clip(c["rms_clip"]),
        **engine_arguments(c),
    )


def _assign(layer: Any, tracked: bool) -> str | None:
    """Convolutions and weights used at several positions have more rows than pairs are kept."""
    if layer.kind == "embed":
        return None
    return "online" if tracked and layer.kind == "dense" and not layer.shared else "sketched"


@transformation(
    PRESETS,
    layers=True,
    without="online",
    off="rms_clip",
    example=examples.LAYERS,
    start=("corrected", "counted", "identity"),
)
def scale_by_rs_kfac(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""RS-KFAC (arXiv 2206.15397): K-FAC with the strongest eigenpairs, by randomised SVD.

    A factor M (of inputs or output gradients) becomes :math:`U D U^T + c (I - U U^T)`, and

    .. math::
      M^{-1} x \approx \frac{x}{\ell + c} + U \left[(D + \ell)^{-1} - (\ell + c)^{-1}\right] U^T x,
      \qquad \ell = \lambda \max(D)

    with c the smallest kept eigenvalue (spectrum continuation) or zero. The randomised SVD costs
    O(d^2 rank) where eigh costs O(d^3), applying it O(d rank) per column.

    Args:
      preset: ``"recommended"``: bias-corrected averages, continuation; ``"official"``
        (arXiv 2206.15397): average from the identity, no continuation, statistics every 10 and
        decompositions every 50 steps, plain gradients for leaves that are no layer.
      sketch: rank, oversampling, power iterations, seed, see :class:`Sketch`.
      damping: lambda, relative to the largest eigenvalue of each factor; a number or a schedule.
      ema: decay of the averages.
      start: ``"corrected"``: weighted mean of the statistics so far; ``"identity"``: plain average
        from the identity, which tells the scaling of convolutions apart, see
        :func:`scale_by_kfac`; ``"counted"``: from zero, the missing ``ema^count I`` added to the
        damping.
      continuation: c is the smallest kept eigenvalue, in place of zero.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState`; per layer
      ``d_in^2 + d_out^2 + rank (d_in + d_out)`` numbers.

    Raises:
      ValueError: a model without layers; an update without ``curvature``.

    References:
      Puiu, `Randomized K-FACs <https://arxiv.org/abs/2206.15397>`_, 2022.
    """
    return _build(c, decomposition="rsvd")


@transformation(PRESETS, like=scale_by_rs_kfac, without="online")
def scale_by_sre_kfac(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """SRE-KFAC (arXiv 2206.15397): RS-KFAC with a symmetric sketch: cheaper, less accurate.

    ``Sketch.power`` counts products. All else is as in :func:`scale_by_rs_kfac`.
    """
    return _build(c, decomposition="sre")


def _online(
    name: str, summary: str, **fixed: Any
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    def build(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
        return _build(c, tracked=True, decomposition="rsvd", **fixed)

    build.__name__, build.__doc__ = f"scale_by_{name}", summary + _ONLINE
    return transformation(ONLINE_PRESETS, like=scale_by_rs_kfac)(build)


_ONLINE = """

    The pairs of a dense layer's factors follow the average online, by Brand's update with the rows
    of each batch, where ``rank + batch_size`` is below the factor's size (inputs and outputs are
    judged separately); all other factors are treated as by :func:`scale_by_rs_kfac`. The update
    costs O(d (rank + batch_size)^2) for size d. Without correction a side of size d that is
    followed takes ``d (rank + batch_size)`` numbers.

    Args:
      preset: ``"recommended"``, or ``"official"``: the thesis code (statistics every 20,
        decompositions every 100 steps, ``start="counted"``).
      online: batch size and periods, see :class:`Online`.

    Raises:
      ValueError: as :func:`scale_by_rs_kfac`; a batch of another size.

    References:
      Puiu, `Brand New K-FACs <https://arxiv.org/abs/2210.08494>`_, 2022.
    """
scale_by_b_kfac = _online(
    "b_kfac",
    "B-KFAC (arXiv 2210.08494): eigenpairs of wide dense layers follow the factors online.",
)
scale_by_br_kfac = _online(
    "br_kfac", "B-R-KFAC (arXiv 2210.08494): B-KFAC with a randomised SVD now and then.",
    overwrite=True,
)  # fmt: skip
scale_by_bc_kfac = _online(
    "bc_kfac", "B-KFAC-C (arXiv 2210.08494): B-KFAC with corrections by the dense factor.",
    correct=True,
)  # fmt: skip
scale_by_brc_kfac = _online(
    "brc_kfac", "B-R-KFAC-C (arXiv 2210.08494): B-KFAC with both, replacement and correction.",
    overwrite=True, correct=True,
)  # fmt: skip
