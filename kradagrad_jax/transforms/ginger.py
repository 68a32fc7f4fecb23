"""Ginger: the inverse of a low-rank average of curvature vectors, at linear cost."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from kradagrad_jax.engine import scale_by_blocks
from kradagrad_jax.factors.ginger import GingerOptions, ginger_method
from kradagrad_jax.transforms import examples, sampled
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import BLOCK_DEFAULTS, engine_arguments

POLISH_EVERY = 64  # steps between re-orthonormalisations, which cost 4 d tau^2
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": BLOCK_DEFAULTS
    | {
        "fisher": "model",
        "rank": 4,
        "damping": 1e-5,
        "clip": 1.0,
        "beta1": 0.9,
        "beta2": 0.99,
        "fisher_scale": 1.0,
        "partition": "leaf",
        "basis_dtype": None,
        "layout": sampled.WHOLE,
        "fallback": "identity",
    }
}
PRESETS["official"] = PRESETS["recommended"]
PRESETS["unclipped"] = PRESETS["recommended"] | {"clip": "none", "damping": 1e-2}


@transformation(
    PRESETS,
    without="refresh_every",
    off="beta1 clip",
    example=examples.SAMPLES,
    partition=("leaf", "model"),
)
def scale_by_ginger(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""Ginger (arXiv 2402.03295): averaged gradients times a low-rank inverse, at linear cost.

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
        clipping, damping 1e-2: the learning rate is gamma times that of SGD.
      rank: tau, number of directions per block (static). More samples at a time are folded in
        together.
      damping: gamma: a number or a schedule.
      clip: rho, bound on the entries of the direction, before the learning rate: a number, a
        schedule, or ``"none"``.
      beta2: decay of G, which is not bias-corrected.
      fisher_scale: multiplies every ``h h^T``; with the empirical Fisher the batch size gives
        ``h = sqrt(B) g``.
      partition: ``"leaf"``: one G per parameter; ``"model"``: one for all parameters as one vector,
        which keeps the curvature between them.
      basis_dtype: dtype in which the directions are stored, ``bfloat16`` saves half of the memory
        and costs digits (errors of the direction of percents). None: as ``factor_dtype``.
      layout: how parameters are cut into blocks (``include``, ``stacked``, ``block_size``); its
        ``merge`` is always ``"none"``. Not for ``partition="model"``.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a
      ``GingerFactor`` per block shape: ``tau (d + 1)`` numbers for d parameters, and one copy of
      the parameters for ``beta1``. Time is ``O(d tau^2)`` per step.

    Raises:
      ValueError: an update without ``curvature``.

    References:
      Hao, Cao and Mou, `Ginger <https://arxiv.org/abs/2402.03295>`_, 2024.
    """
    if c["partition"] == "model" and "layout" in c["given"]:
        raise ValueError("partition='model' treats all parameters as one vector: no layout=")
    basis_dtype = c["basis_dtype"]
    options = GingerOptions(
        c["beta2"], c["rank"], c["damping"], c["clip"], c["fisher_scale"],
        None if basis_dtype is None else jnp.dtype(basis_dtype),
    )  # fmt: skip
    whole = sampled.unmerged(c["layout"])
    c["layout"] = dataclasses.replace(whole, joined=c["partition"] == "model")
    return scale_by_blocks(
        ginger_method(options),
        source=sampled.source("ginger", c["fisher"], vectors=True),
        **engine_arguments(c | {"refresh_every": POLISH_EVERY}),
    )
