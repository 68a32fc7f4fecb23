"""K-FAC: Kronecker-factored approximate curvature of every layer of the model."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine.layers import scale_by_layers
from kradagrad_jax.factors.kfac import KfacOptions, kfac_method
from kradagrad_jax.transforms import clipping, examples
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import LAYER_DEFAULTS, engine_arguments

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": LAYER_DEFAULTS
    | {
        "ema": 0.95,
        "averaging": "corrected",
        "damping": 1e-3,
        "damping_rule": "factored",
        "inverse": None,
        "statistics": "gram",
        "max_dim": 8192,
        "norm_constraint": None,
        "rms_clip": None,
        "learning_rate": None,
        "beta1": "none",
        "graft": "adam",
    }
}
PRESETS["official"] = PRESETS["recommended"] | {
    "graft": "none",
    "refresh_every": 5,
    "fallback": "identity",
}
PRESETS["paper"] = PRESETS["official"] | {"averaging": "capped", "refresh_every": 20}


@transformation(
    PRESETS,
    layers=True,
    off="beta1 rms_clip",
    example=examples.LAYERS,
    damping_rule=("factored", "exact", "relative"),
    averaging=("corrected", "capped", "identity"),
    statistics=("gram", "square_root"),
    inverse=("cholesky", "eigh"),
)
def scale_by_kfac(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC (arXiv 1503.05671): the gradient M of a layer times inverse moments of its ends.

    .. math::
      A = E[a a^T], \quad G = E[g g^T], \quad
      u = (A + \pi\sqrt{\lambda} I)^{-1} M (G + \sqrt{\lambda}/\pi\, I)^{-1}, \quad
      \pi^2 = \frac{tr(A)/d_{in}}{tr(G)/d_{out}}

    with the layer inputs a (a constant 1 appended where the layer has a bias) and the gradients g
    at its outputs, which ``update(grads, state, params, curvature=...)`` receives from
    :mod:`kradagrad_jax.curvature`.

    Args:
      preset: ``"recommended"``: the direction of K-FAC with the step length of Adam, so that an
        AdamW learning rate carries over; ``"official"`` (kfac-jax): K-FAC's own step length,
        inverses every 5 steps, plain gradient for leaves that are no layer; bound it by
        ``norm_constraint``; ``"paper"`` (arXiv 1503.05671): also a plain mean of the first twenty
        statistics, then ``ema``, inverses every 20 steps.
      damping: lambda, in units of the curvature: a number or a schedule.
      damping_rule: ``"factored"``: as above; ``"exact"``: ``(A x G + lambda I)^-1``;
        ``"relative"``: exact, with lambda times the largest eigenvalues of A and G, so that the
        step does not depend on the scale of the loss (arXiv 2206.15397). The last two need
        ``inverse="eigh"``.
      ema: decay of the averages of A and G.
      averaging: ``"corrected"``: weighted mean of all statistics so far; ``"capped"``: see
        ``preset="paper"``; ``"identity"``: plain average that starts at the identity. At
        convolutions with T positions the authors' codes scale A by ``1/(n T^2)`` and G by ``n T``,
        here it is ``1/(n T)`` and ``n``: only a start at the identity tells them apart.
      inverse: ``"cholesky"`` or ``"eigh"``. None: what rule and statistics need, Cholesky if free.
      statistics: ``"gram"``, or ``"square_root"``: R with R^T R = A is kept and updated by QR of
        the rows, which gives float32 the quality of float64 on ill-conditioned layers; needs
        ``reducer="raw"`` statistics.
      max_dim: longer sides of a layer keep the diagonal of their factor only, as embeddings do for
        their rows; with square-root statistics such layers are left to the fallback. Give
        the reducers of :mod:`kradagrad_jax.curvature` the same.
      norm_constraint: largest predicted change ``lr^2 <u, M>`` summed over layers (kfac-jax); needs
        ``learning_rate``. None: no bound.
      learning_rate: what updates will be multiplied by, for ``norm_constraint``; the alias
        :func:`kfac` fills it in.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a ``KfacFactor``
      per layer shape: ``2 (d_in^2 + d_out^2)`` numbers per layer.

    Raises:
      ValueError: ``norm_constraint`` without ``learning_rate``; a model
        without layers; parameters that do not fit ``spec``; an update without ``curvature``.

    References:
      Martens and Grosse, `K-FAC <https://arxiv.org/abs/1503.05671>`_, 2015; Grosse and Martens,
      `KFC <https://arxiv.org/abs/1602.01407>`_, 2016; Eschenhagen et al.,
      `expand and reduce <https://arxiv.org/abs/2311.00636>`_, 2023.
    """
    options, kappa, learning_rate = _options(c), c["norm_constraint"], c["learning_rate"]
    if kappa is not None and learning_rate is None:
        raise ValueError("norm_constraint needs learning_rate: the bound is on lr^2 <u, gradient>")
    bound = None if kappa is None else clipping.norm_constraint(kappa, learning_rate)
    methods = {
        _FORMS[diagonal]: kfac_method(options._replace(diagonal=diagonal)) for diagonal in _FORMS
    }
    form = "rows" if options.statistics == "square_root" else "grams"
    return scale_by_layers(
        methods,
        c["spec"],
        assign=lambda layer: _form_of(layer, form, c["max_dim"], c["joint_bias"]),
        form=form,
        clip=clipping.both(clipping.rms_clip(c["rms_clip"]), bound),
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
    spectral = c["damping_rule"] != "factored" or c["statistics"] == "square_root"
    inverse = c["inverse"] or ("eigh" if spectral else "cholesky")
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
