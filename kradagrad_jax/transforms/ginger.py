"""Ginger: the inverse of a low-rank average of curvature vectors, at linear cost."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from kradagrad_jax.engine import Interval, Layout, Sharding, Timing, scale_by_blocks
from kradagrad_jax.factors.ginger import GingerOptions, ginger_method
from kradagrad_jax.transforms import sampled
from kradagrad_jax.transforms.common import check_choice, choose, engine_arguments

POLISH_EVERY = 64  # steps between re-orthonormalisations, which cost 4 d tau^2
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "fisher": "model",
        "rank": 4,
        "damping": 1e-5,
        "clip": 1.0,
        "beta1": 0.9,
        "beta2": 0.99,
        "fisher_scale": 1.0,
        "partition": "leaf",
        "statistics_every": 1,
        "timing": Timing(),
        "layout": sampled.WHOLE,
        "fallback": "identity",
    }
}
PRESETS["official"] = PRESETS["recommended"]
PRESETS["unclipped"] = PRESETS["recommended"] | {"clip": "none", "damping": 1e-2}


def scale_by_ginger(
    *,
    preset: str = "recommended",
    fisher: str | None = None,
    rank: int | None = None,
    damping: Any = None,
    clip: Any = None,
    beta1: Any = None,
    beta2: Any = None,
    fisher_scale: Any = None,
    partition: str | None = None,
    basis_dtype: Any = None,
    layout: Layout | None = None,
    statistics_every: Interval | None = None,
    timing: Timing | None = None,
    sharding: Sharding | None = None,
    fallback: Any = None,
    factor_dtype: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions the average of gradients by the inverse of a low-rank Gauss-Newton matrix.

    With curvature vectors h, their weights w (equal), and the average m of the gradient,

    .. math::
      G \leftarrow \mathrm{trunc}_\tau(\beta_2 G + (1 - \beta_2) \sum_j w_j h_j h_j^T), \quad
      u = \mathrm{clip}((G + \gamma I)^{-1} m, \pm\rho)

    A curvature vector is the root of the batch size times the gradient of the mean loss at labels
    drawn from the model; ``update(grads, state, params, curvature=samples)`` receives it from
    :func:`kradagrad_jax.curvature.sampled_gradients`. ``curvature=None`` means "none at this step".

    With the published values nearly all entries are clipped: the method is then close to
    sign-momentum, the learning rate is the step per entry, and sign-momentum is what it has to be
    compared with. Without clipping steps outside of the tau directions have the length
    ``lr / gamma``.

    Args:
      preset: ``"recommended"`` and ``"official"`` are the authors' values; ``"unclipped"``: no
        clipping, damping 1e-2: the learning rate is gamma times that of SGD. Arguments that are
        given override the preset.
      fisher: ``"model"``: sampled gradients; ``"empirical"``: the gradient itself in place of h,
        which is biased towards it but needs nothing else. Default: model.
      rank: tau, number of directions per block (static). More samples at a time are folded in
        together. Default 4.
      damping: gamma: a number or a schedule. Default 1e-5.
      clip: rho, bound on the entries of the direction, before the learning rate: a number, a
        schedule, or ``"none"``. Default 1.
      beta1: decay of the bias-corrected average of gradients. Default 0.9; ``"none"``: none.
      beta2: decay of G, which is not bias-corrected. Default 0.99.
      fisher_scale: multiplies every ``h h^T``; with the empirical Fisher the batch size gives
        ``h = sqrt(B) g``. Default 1.
      partition: ``"leaf"``: one G per parameter; ``"model"``: one for all parameters as one vector,
        which keeps the curvature between them.
      basis_dtype: dtype in which the directions are stored, ``bfloat16`` saves half of the memory
        and costs digits (errors of the direction of percents). None: as ``factor_dtype``.
      layout: how parameters are cut into blocks (``include``, ``stacked``, ``block_size``); its
        ``merge`` is always ``"none"``. Default: whole parameters. Not for ``partition="model"``.
      statistics_every: steps between updates of G. Default 1.
      timing: start, ramp, phases, see :class:`Timing`.
      sharding: devices over which factors and work are divided, see :class:`Sharding`. None: none.
      fallback: for parameters left out by ``layout``: ``"identity"``, a graft kind, or a
        GradientTransformation with positive sign.
      factor_dtype: dtype of the factors. None: float32, or float64 for float64 parameters.
      mu_dtype: dtype of the average of gradients. None: as ``factor_dtype``.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a
      ``GingerFactor`` per block shape: ``tau (d + 1)`` numbers for d parameters, and one copy of
      the parameters for ``beta1``. Time is ``O(d tau^2)`` per step.

    Raises:
      ValueError: unknown preset or choice; a rank below 1; an update without ``curvature``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from kradagrad_jax.curvature import losses, sampled_gradients
      >>> from kradagrad_jax.transforms.ginger import scale_by_ginger
      >>> params, x, labels = {"w": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, int)
      >>> step = sampled_gradients(lambda p, x: x @ p["w"], losses.softmax_cross_entropy())
      >>> tx = optax.chain(scale_by_ginger(), optax.scale(-1e-3))
      >>> state = tx.init(params)
      >>> (value, _), grads, samples = step(params, x, labels, rng=jax.random.key(0))
      >>> updates, state = tx.update(grads, state, params, curvature=samples)

    References:
      Hao, Cao and Mou, `Ginger <https://arxiv.org/abs/2402.03295>`_, 2024.
    """
    given = {k: v for k, v in locals().items() if k not in ("preset", "basis_dtype")}
    c = choose(preset, PRESETS, given, may_be_off=("beta1", "clip"))
    check_choice("fisher", c["fisher"], ("model", "empirical"))
    check_choice("partition", c["partition"], ("leaf", "model"))
    if not isinstance(c["rank"], int) or c["rank"] < 1:
        raise ValueError(
            f"rank must be an integer, at least 1, got {c['rank']!r}; under "
            "optax.inject_hyperparams name it in static_args"
        )
    if c["partition"] == "model" and layout is not None:
        raise ValueError("partition='model' treats all parameters as one vector: no layout=")
    options = GingerOptions(
        c["beta2"], c["rank"], c["damping"], c["clip"], c["fisher_scale"],
        None if basis_dtype is None else jnp.dtype(basis_dtype),
    )  # fmt: skip
    whole = sampled.unmerged(c["layout"])
    c["layout"] = dataclasses.replace(whole, joined=c["partition"] == "model")
    return scale_by_blocks(
        ginger_method(options),
        source=sampled.source("ginger", c["fisher"], vectors=True),
        refresh_every=POLISH_EVERY,
        **engine_arguments(c),
    )
