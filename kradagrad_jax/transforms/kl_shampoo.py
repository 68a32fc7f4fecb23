"""KL-Shampoo and KL-SOAP: Shampoo's factors without grafting, and Adam in their bases."""

import dataclasses
from typing import Any

import optax

from kradagrad_jax.engine import Graft
from kradagrad_jax.factors.kl import KlOptions, kl_method
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import BLOCK_DEFAULTS, build
from kradagrad_jax.transforms.ranges import Range
from kradagrad_jax.transforms.rest_adam import rest_adam
from kradagrad_jax.transforms.soap import WHOLE

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": BLOCK_DEFAULTS
    | {
        "beta1": 0.95,
        "beta2": 0.98,
        "shampoo_beta": None,
        "eps": 1e-8,
        "eps_rule": "absolute",
        "initial": "gradient",
        "cap": 100.0,
        "cap_rule": "relative",
        "damped": False,
        "mask": False,
        "bias_correction": False,
        "normalize_grads": False,
        "clip": 10.0,
        "graft": Graft("none"),
        "fallback": None,
        "late": False,
    }
}
PRESETS["official"] = PRESETS["recommended"] | {
    "beta1": 0.9,
    "initial": 0.1,
    "cap": 4000.0,
    "cap_rule": "length",
    "clip": "none",
    "late": True,
    "layout": dataclasses.replace(WHOLE, max_dim=None),
}
SOAP_PRESETS = PRESETS | {
    "recommended": PRESETS["recommended"]
    | {"eps": 1e-5, "eps_rule": "relative", "mask": True, "bias_correction": True}
}


_CHOICES: dict[str, Any] = {
    "eps_rule": ("relative", "absolute"),
    "cap_rule": ("relative", "length", "none"),
    "initial": Range("above 0, or 'gradient'", lambda x: x > 0, words=("gradient",)),
}
_HIDDEN = "late statistics_every mu_dtype"


@transformation(PRESETS, off="beta1 clip", without=f"{_HIDDEN} eps_rule mask", **_CHOICES)
def scale_by_kl_shampoo(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""KL-Shampoo (arXiv 2509.03378): the root of the Kronecker product nearest in KL divergence.

    Each mode's statistic is that of the gradient whitened in all others. For a matrix block
    :math:`G` (m x n) with bases :math:`Q_i` and scales :math:`w_i` (eigenvalues to the -1/2)

    .. math::
      u = Q_1 \big( (Q_1^T m\, Q_2) \circ w_1 w_2^T \big) Q_2^T, \quad
      S_1 \leftarrow b S_1 + \tfrac{1-b}{n} G\, Q_2 \mathrm{diag}(w_2^2) Q_2^T G^T, \quad
      w_1^{-2} \leftarrow b w_1^{-2} + (1-b)\, \mathrm{mean}_2 \big( Q_1^T G\, Q_2 w_2 \big)^2

    and likewise for the other side, all with the scales of the step before. Scales move at every
    step; every ``refresh_every`` steps one power step with QR renews the bases. The step has the
    right length without grafting. The first gradient makes the first basis alone: its step is
    zero.

    Args:
      preset: ``"recommended"``: scales start from the mean square of the first gradient and grow
        to at most 100 times that, steps are clipped at a root mean square of 10. ``"official"``:
        as yorkerlin/KL-Methods: start 0.1, absolute cap, parameters as they are (of two or more
        axes; vectors get Adam without its first gradient).
      beta1: decay of the average m of gradients; ``"none"``: the gradient itself, without the
        memory for it.
      beta2: decay of the second moments.
      shampoo_beta: decay b of statistics and scales. None: ``beta2``.
      eps: ``w / (1 + eps w)`` takes the place of the product w of the scales.
      initial: eigenvalues start from this number, or, ``"gradient"``, where the first gradient
        puts them: steps do not depend on its unit then.
      cap: see ``cap_rule``; without one, the step after a long silence explodes.
      cap_rule: ``"relative"``: scales grow to at most ``cap`` times their start; ``"length"``:
        to ``max(10, min(n, cap))``; ``"none"``.
      damped: adds ``eps`` times the mean squares of the other scales to what an eigenvalue
        averages.
      bias_correction: divides by the sum of the weights of m.
      normalize_grads: divides by the root mean square, block by block.
      clip: largest root mean square of the step of a block; ``"none"``: no limit.
      layout: how parameters are cut into blocks, see :class:`Layout`; a mode without a factor is
        left alone.
      refresh_every: steps between new bases.
      fallback: for parameters without factors: ``"identity"``, any graft kind, or a
        GradientTransformation. None: Adam with these decays.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a ``KlFactor``
      per block shape: ``2 (m^2 + n^2 + m + n) + m n`` numbers per ``m x n`` block; statistics are
      taken at every step, which moves the momentum.

    References:
      Lin et al., `KL-Shampoo <https://arxiv.org/abs/2509.03378>`_, 2025.
    """
    return _build(c, adam=False)


@transformation(SOAP_PRESETS, like=scale_by_kl_shampoo, without=_HIDDEN)
def scale_by_kl_soap(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""KL-SOAP (arXiv 2509.03378): Adam in the bases of KL-Shampoo.

    .. math::
      v \leftarrow \beta_2 v + (1-\beta_2) (Q_1^T G\, Q_2)^{\circ 2}, \quad
      u = c\, Q_1 \frac{Q_1^T m\, Q_2}{\sqrt{v} + \epsilon} Q_2^T

    with statistics, scales and bases as in :func:`scale_by_kl_shampoo`. v stays where it is when
    the bases are renewed.

    Args:
      preset: ``"recommended"``: as there, with bias correction, relative epsilon and null
        directions masked; ``"official"``: as there, without any.
      beta2: decay of v. Below ``beta1**2`` steps grow once gradients stop.
      eps: see ``eps_rule``.
      eps_rule: ``"relative"``: times the largest root of v in the block; ``"absolute"``.
      mask: as in :func:`scale_by_soap`.
      bias_correction: ``c = sqrt(1 - beta2^t) / (1 - beta1^t)``; else 1.

    Returns:
      As there, with ``m n`` numbers more per block.

    References:
      Lin et al., `KL-Shampoo <https://arxiv.org/abs/2509.03378>`_, 2025.
    """
    return _build(c, adam=True)


def _build(c: dict[str, Any], adam: bool) -> optax.GradientTransformationExtraArgs:
    c["adam"] = adam
    c["shampoo_beta"] = c["beta2"] if c["shampoo_beta"] is None else c["shampoo_beta"]
    if c["fallback"] is None:
        c["fallback"] = rest_adam(
            c["beta1"],
            c["beta2"],
            c["eps"] if c["eps_rule"] == "absolute" else 1e-8,
            late=c["late"],
            bias_correction=not c["late"],
            normalize=c["normalize_grads"],
        )
    method = kl_method(KlOptions(**{f.name: c[f.name] for f in dataclasses.fields(KlOptions)}))
    return build(method, c | {"refresh": "last", "beta1": None})
