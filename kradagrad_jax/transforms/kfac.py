"""K-FAC: Kronecker-factored approximate curvature of every layer of the model."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import Graft, Interval, Sharding, Timing
from kradagrad_jax.engine.layers import scale_by_layers
from kradagrad_jax.factors.kfac import KfacOptions, kfac_method
from kradagrad_jax.transforms import clipping
from kradagrad_jax.transforms.common import check_choice, choose, engine_arguments

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "ema": 0.95,
        "averaging": "corrected",
        "damping": 1e-3,
        "damping_rule": "factored",
        "inverse": None,
        "statistics": "gram",
        "approx": "expand",
        "joint_bias": True,
        "max_dim": 8192,
        "beta1": "none",
        "graft": "adam",
        "refresh_every": 10,
        "statistics_every": 1,
        "timing": Timing(),
        "fallback": "adam",
    }
}
PRESETS["official"] = PRESETS["recommended"] | {
    "graft": "none",
    "refresh_every": 5,
    "fallback": "identity",
}
PRESETS["paper"] = PRESETS["official"] | {"averaging": "capped", "refresh_every": 20}


def scale_by_kfac(
    spec: Any,
    *,
    preset: str = "recommended",
    damping: Any = None,
    damping_rule: str | None = None,
    ema: Any = None,
    averaging: str | None = None,
    inverse: str | None = None,
    statistics: str | None = None,
    approx: str | None = None,
    joint_bias: bool | None = None,
    max_dim: int | None = None,
    norm_constraint: Any = None,
    rms_clip: Any = None,
    learning_rate: Any = None,
    beta1: Any = None,
    graft: Graft | str | None = None,
    refresh_every: Interval | None = None,
    statistics_every: Interval | None = None,
    timing: Timing | None = None,
    sharding: Sharding | None = None,
    fallback: Any = None,
    factor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions the gradient M of every layer by inverse second moments of its ends.

    .. math::
      A = E[a a^T], \quad G = E[g g^T], \quad
      u = (A + \pi\sqrt{\lambda} I)^{-1} M (G + \sqrt{\lambda}/\pi\, I)^{-1}, \quad
      \pi^2 = \frac{tr(A)/d_{in}}{tr(G)/d_{out}}

    with the layer inputs a (a constant 1 appended where the layer has a bias) and the gradients g
    at its outputs, which ``update(grads, state, params, curvature=...)`` receives from
    :mod:`kradagrad_jax.curvature`.

    Args:
      spec: what :func:`kradagrad_jax.curvature.inspect` says of the model.
      preset: ``"recommended"``: the direction of K-FAC with the step length of Adam, so that an
        AdamW learning rate carries over; ``"official"`` (kfac-jax): K-FAC's own step length,
        inverses every 5 steps, plain gradient for leaves that are no layer; bound it by
        ``norm_constraint``; ``"paper"`` (arXiv 1503.05671): also a plain mean of the first twenty
        statistics, then ``ema``, inverses every 20 steps. Given arguments override the preset.
      damping: lambda, in units of the curvature: a number or a schedule. Default 1e-3.
      damping_rule: ``"factored"``: as above; ``"exact"``: ``(A x G + lambda I)^-1``;
        ``"relative"``: exact, with lambda times the largest eigenvalues of A and G, so that the
        step does not depend on the scale of the loss (arXiv 2206.15397). The last two need
        ``inverse="eigh"``.
      ema: decay of the averages of A and G. Default 0.95.
      averaging: ``"corrected"``: weighted mean of all statistics so far; ``"capped"``: see
        ``preset="paper"``; ``"identity"``: plain average that starts at the identity.
      inverse: ``"cholesky"`` or ``"eigh"``. None: what rule and statistics need, Cholesky if free.
      statistics: ``"gram"``, or ``"square_root"``: R with R^T R = A is kept and updated by QR of
        the rows, which gives float32 the quality of float64 on ill-conditioned layers; needs
        ``reducer="raw"`` statistics.
      approx: ``"expand"`` or ``"reduce"`` (arXiv 2311.00636) for weights used at several positions;
        statistics of ``reducer="kron_reduce"`` are of the second kind.
      joint_bias: treat a layer's bias as a row of its weight; False: as any other vector.
      max_dim: longer sides of a layer keep the diagonal of their factor only, as embeddings do for
        their rows; with square-root statistics such layers are left to the fallback. Default 8192,
        as the reducers of :mod:`kradagrad_jax.curvature`.
      norm_constraint: largest predicted change ``lr^2 <u, M>`` summed over layers (kfac-jax); needs
        ``learning_rate``. None: no bound.
      rms_clip: largest root mean square of a layer's update (arXiv 2206.15397: 0.07). None: none.
      learning_rate: what updates will be multiplied by, for ``norm_constraint``; the alias
        :func:`kfac` fills it in.
      beta1: decay of a bias-corrected average of gradients that is preconditioned in place of the
        gradient; ``"none"`` (default): no average, no memory for it.
      graft: step length per layer from another method, see :class:`Graft`; ``"none"``: its own.
      refresh_every: steps between inverses. Default 10. A multiple of ``statistics_every``.
      statistics_every: steps between statistics; others are ignored where they are given.
      timing: start, ramp, phases, staggering, see :class:`Timing`.
      sharding: devices over which factors and work are divided, see :class:`Sharding`. None: none.
      fallback: for leaves that are no layer: a graft kind (default ``"adam"``), ``"identity"``, or
        a GradientTransformation with positive sign.
      factor_dtype: dtype of statistics and inverses. None: float32, or float64 for float64
        parameters.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a ``KfacFactor``
      per layer shape: ``2 (d_in^2 + d_out^2)`` numbers per layer.

    Raises:
      ValueError: unknown preset or choice; ``norm_constraint`` without ``learning_rate``; a model
        without layers; parameters that do not fit ``spec``; an update without ``curvature``.

    References:
      Martens and Grosse, `K-FAC <https://arxiv.org/abs/1503.05671>`_, 2015; Grosse and Martens,
      `KFC <https://arxiv.org/abs/1602.01407>`_, 2016; Eschenhagen et al.,
      `expand and reduce <https://arxiv.org/abs/2311.00636>`_, 2023.
    """
    given = {k: v for k, v in locals().items() if k not in ("preset", "spec")}
    c = choose(preset, PRESETS, given, may_be_off=("beta1",))
    options = _options(c)
    if norm_constraint is not None and learning_rate is None:
        raise ValueError("norm_constraint needs learning_rate: the bound is on lr^2 <u, gradient>")
    length = None if rms_clip is None else clipping.rms_clip(rms_clip)
    bound = None
    if norm_constraint is not None:
        bound = clipping.norm_constraint(norm_constraint, learning_rate)
    methods = {
        _FORMS[diagonal]: kfac_method(options._replace(diagonal=diagonal)) for diagonal in _FORMS
    }
    form = "rows" if options.statistics == "square_root" else "grams"
    return scale_by_layers(
        methods,
        spec,
        assign=lambda layer: _form_of(layer, form, c["max_dim"], c["joint_bias"]),
        form=form,
        approx=c["approx"],
        joint_bias=c["joint_bias"],
        clip=clipping.both(length, bound),
        **engine_arguments(c),
    )


_FORMS = {
    (False, False): "dense",
    (True, False): "diagonal A",
    (False, True): "diagonal G",
    (True, True): "diagonal A, G",
}


def _form_of(layer: Any, form: str, max_dim: int, joint_bias: bool) -> str | None:
    """Which factors of a layer are kept as diagonals; None: the layer is left to the fallback."""
    inputs = layer.d_in + (joint_bias and layer.bias is not None)
    diagonal = (layer.kind == "embed" or inputs > max_dim, layer.d_out > max_dim)
    if form == "rows" and any(diagonal):
        return None
    return _FORMS[diagonal]


def _options(c: dict[str, Any]) -> KfacOptions:
    check_choice("damping_rule", c["damping_rule"], ("factored", "exact", "relative"))
    check_choice("averaging", c["averaging"], ("corrected", "capped", "identity"))
    check_choice("statistics", c["statistics"], ("gram", "square_root"))
    check_choice("approx", c["approx"], ("expand", "reduce"))
    spectral = c["damping_rule"] != "factored" or c["statistics"] == "square_root"
    inverse = c["inverse"] or ("eigh" if spectral else "cholesky")
    check_choice("inverse", inverse, ("cholesky", "eigh"))
    if spectral and inverse == "cholesky":
        raise ValueError(
            f"damping_rule={c['damping_rule']!r} with statistics={c['statistics']!r} needs "
            "inverse='eigh'"
        )
    return KfacOptions(
        c["ema"], c["averaging"], c["damping"], c["damping_rule"], inverse, c["statistics"]
    )


def adapt_damping(
    damping: jax.Array,
    loss_before: jax.Array,
    loss_after: jax.Array,
    predicted_change: jax.Array,
    factor: float = 0.95**5,
    minimum: float = 1e-8,
    maximum: float = 1e8,
) -> jax.Array:
    """The Levenberg-Marquardt rule: less damping where the quadratic model predicted well.

    Args:
      damping: current value, scalar.
      loss_before, loss_after: loss on ONE batch before and after a step, scalars.
      predicted_change: what the quadratic model said the step would change, negative.
      factor: damping is multiplied by it where the ratio of changes is above 3/4, divided by it
        where the ratio is below 1/4. The paper adapts every 5 steps, hence 0.95^5.
      minimum, maximum: bounds of the result.

    Returns:
      The new damping, scalar. Feed it back with ``optax.inject_hyperparams(kfac)``.

    References:
      `arXiv 1503.05671 <https://arxiv.org/abs/1503.05671>`_, section 6.5.
    """
    ratio = (loss_after - loss_before) / predicted_change
    change = jnp.where(ratio > 0.75, factor, jnp.where(ratio < 0.25, 1 / factor, 1.0))
    change = jnp.where(jnp.isfinite(ratio), change, 1 / factor)
    return jnp.clip(damping * change, minimum, maximum)
