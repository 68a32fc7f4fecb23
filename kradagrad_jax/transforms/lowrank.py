"""RS-KFAC, SRE-KFAC and the Brand K-FACs: K-FAC with the strongest eigenpairs of every factor."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import optax

from kradagrad_jax.engine import Graft, Interval, Sharding, Timing
from kradagrad_jax.engine.layers import scale_by_layers
from kradagrad_jax.factors.lowrank import low_rank_method
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online, Sketch
from kradagrad_jax.transforms import clipping
from kradagrad_jax.transforms.common import check_choice, choose, engine_arguments

_RECOMMENDED: dict[str, Any] = {
    "sketch": Sketch(),
    "ema": 0.95,
    "damping": 0.1,
    "start": "corrected",
    "continuation": True,
    "approx": "expand",
    "joint_bias": True,
    "rms_clip": 0.07,
    "graft": "none",
    "refresh_every": 10,
    "statistics_every": 1,
    "timing": Timing(),
    "fallback": "adam",
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
    spec: Any, preset: str, given: dict[str, Any], **fixed: Any
) -> optax.GradientTransformationExtraArgs:
    """``fixed``: decomposition, overwrite and correct of :class:`LowRankOptions`."""
    tracked = "online" in given
    presets = ONLINE_PRESETS if tracked else PRESETS
    c = choose(preset, presets, given, may_be_off=("rms_clip",))
    check_choice("start", c["start"], ("corrected", "counted", "identity"))
    check_choice("approx", c["approx"], ("expand", "reduce"))
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
        approx=c["approx"],
        joint_bias=c["joint_bias"],
        clip=None if c["rms_clip"] is None else clipping.rms_clip(c["rms_clip"]),
        **engine_arguments(c),
    )


def _assign(layer: Any, tracked: bool) -> str | None:
    """Convolutions and weights used at several positions have more rows than pairs are kept."""
    if layer.kind == "embed":
        return None
    return "online" if tracked and layer.kind == "dense" and not layer.shared else "sketched"


def scale_by_rs_kfac(
    spec: Any,
    *,
    preset: str = "recommended",
    sketch: Sketch | None = None,
    damping: Any = None,
    ema: Any = None,
    start: str | None = None,
    continuation: bool | None = None,
    approx: str | None = None,
    joint_bias: bool | None = None,
    rms_clip: Any = None,
    graft: Graft | str | None = None,
    refresh_every: Interval | None = None,
    statistics_every: Interval | None = None,
    timing: Timing | None = None,
    sharding: Sharding | None = None,
    fallback: Any = None,
    factor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC whose factors are replaced by their strongest eigenpairs, found at random.

    A factor M (of inputs or output gradients) becomes :math:`U D U^T + c (I - U U^T)`, and

    .. math::
      M^{-1} x \approx \frac{x}{\ell + c} + U \left[(D + \ell)^{-1} - (\ell + c)^{-1}\right] U^T x,
      \qquad \ell = \lambda \max(D)

    with c the smallest kept eigenvalue (spectrum continuation) or zero. The randomised SVD costs
    O(d^2 rank) where eigh costs O(d^3), applying it O(d rank) per column.

    Args:
      spec: what :func:`kradagrad_jax.curvature.inspect` says of the model.
      preset: ``"recommended"``: bias-corrected averages, continuation; ``"official"``
        (arXiv 2206.15397): average from the identity, no continuation, statistics every 10 and
        decompositions every 50 steps, plain gradients for leaves that are no layer.
      sketch: rank, oversampling, power iterations, seed, see :class:`Sketch`. Default: rank 220.
      damping: lambda, relative to the largest eigenvalue of each factor; a number or a schedule.
        Default 0.1.
      ema: decay of the averages. Default 0.95.
      start: ``"corrected"``: weighted mean of the statistics so far; ``"identity"``: plain average
        from the identity; ``"counted"``: from zero, the missing ``ema^count I`` added to the
        damping.
      continuation: see above.
      approx: ``"expand"`` or ``"reduce"`` for weights used at several positions.
      joint_bias: treat a layer's bias as a row of its weight.
      rms_clip: largest root mean square of a layer's update, or ``"none"``. Default 0.07.
      graft: step length per layer from another method. Default: its own.
      refresh_every: steps between decompositions. Default 10.
      statistics_every: steps between statistics. Default 1.
      timing: start, ramp, phases, staggering, see :class:`Timing`.
      sharding: devices over which factors and work are divided, see :class:`Sharding`. None: none.
      fallback: for leaves that are no layer: ``"adam"`` (default), another graft kind,
        ``"identity"`` or a GradientTransformation with positive sign.
      factor_dtype: dtype of the factors. None: float32, or float64 for float64 parameters.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState`; per layer
      ``d_in^2 + d_out^2 + rank (d_in + d_out)`` numbers.

    Raises:
      ValueError: unknown preset or choice; a model without layers; an update without
        ``curvature``.

    References:
      Puiu, `Randomized K-FACs <https://arxiv.org/abs/2206.15397>`_, 2022.
    """
    given = {k: v for k, v in locals().items() if k not in ("preset", "spec")}
    return _build(spec, preset, given, decomposition="rsvd")


def _like_rs_kfac(
    name: str, doc: str, tracked: bool, **fixed: Any
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """A transformation with the arguments of :func:`scale_by_rs_kfac`, and ``online``."""

    def scale_by(
        spec: Any, *, preset: str = "recommended", **options: Any
    ) -> optax.GradientTransformationExtraArgs:
        unknown = sorted(set(options) - set(parameters))
        if unknown:
            raise TypeError(f"scale_by_{name} has no {unknown}; it has {sorted(parameters)}")
        given = ({"online": None} if tracked else {}) | options
        return _build(spec, preset, given, **fixed)

    parameters = dict(inspect.signature(scale_by_rs_kfac).parameters)
    if tracked:
        parameters["online"] = inspect.Parameter(
            "online", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Online | None
        )
    scale_by.__name__ = scale_by.__qualname__ = f"scale_by_{name}"
    scale_by.__doc__ = doc
    scale_by.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return scale_by


scale_by_sre_kfac = _like_rs_kfac(
    "sre_kfac",
    """RS-KFAC with a symmetric randomised eigendecomposition: cheaper, and less accurate.

    Args:
      spec: what :func:`kradagrad_jax.curvature.inspect` says of the model.
      preset: as in :func:`scale_by_rs_kfac`.
      **options: as in :func:`scale_by_rs_kfac`. ``Sketch.power`` counts products.

    Returns:
      As :func:`scale_by_rs_kfac`.

    Raises:
      ValueError: as :func:`scale_by_rs_kfac`.

    References:
      Puiu, `Randomized K-FACs <https://arxiv.org/abs/2206.15397>`_, 2022.
    """,
    tracked=False,
    decomposition="sre",
)

_ONLINE_DOC = """{summary}

    The pairs of a dense layer's factors follow the average online, by Brand's update with the rows
    of each batch, where ``rank + batch_size`` is below the factor's size (inputs and outputs are
    judged separately); all other factors are treated as by :func:`scale_by_rs_kfac`. The update
    costs O(d (rank + batch_size)^2) for size d.

    Args:
      spec: what :func:`kradagrad_jax.curvature.inspect` says of the model.
      preset: ``"recommended"``, or ``"official"``: the thesis code (statistics every 20,
        decompositions every 100 steps, ``start="counted"``).
      **options: as in :func:`scale_by_rs_kfac`.
      online: batch size and periods, see :class:`Online`.

    Returns:
      As :func:`scale_by_rs_kfac`. {memory}

    Raises:
      ValueError: as :func:`scale_by_rs_kfac`; a batch of another size.

    References:
      Puiu, `Brand New K-FACs <https://arxiv.org/abs/2210.08494>`_, 2022.
    """


def _online(name: str, summary: str, memory: str = "", **fixed: Any) -> Callable[..., Any]:
    doc = _ONLINE_DOC.format(summary=summary, memory=memory)
    return _like_rs_kfac(name, doc, tracked=True, decomposition="rsvd", **fixed)


scale_by_b_kfac = _online(
    "b_kfac",
    "B-KFAC: eigenpairs that follow the factors online; no dense factor of such sides.",
    "A side of size d that is followed takes ``d (rank + batch_size)`` numbers.",
)
scale_by_br_kfac = _online(
    "br_kfac", "B-R-KFAC: B-KFAC whose pairs are replaced by a randomised SVD now and then.",
    overwrite=True,
)  # fmt: skip
scale_by_bc_kfac = _online(
    "bc_kfac", "B-KFAC-C: B-KFAC with a light correction of some pairs by the dense factor.",
    correct=True,
)  # fmt: skip
scale_by_brc_kfac = _online(
    "brc_kfac", "B-R-KFAC-C: B-KFAC with both, replacement and light correction.",
    overwrite=True, correct=True,
)  # fmt: skip
