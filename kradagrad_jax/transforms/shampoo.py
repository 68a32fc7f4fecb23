"""Shampoo: an inverse root of a Gram matrix per mode of every parameter."""

from typing import Any

import optax

from kradagrad_jax.engine import Graft
from kradagrad_jax.factors import SquareRoot, array_method, gram_method
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import BLOCK_DEFAULTS, PUBLISHED_LAYOUT, build, per_mode
from kradagrad_jax.transforms.ranges import check

RULES = ("relative", "absolute", "shift", "pseudo", "none")
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": BLOCK_DEFAULTS
    | {
        "beta1": 0.9,
        "beta2": 0.99,
        "damping": 1e-6,
        "damping_rule": "relative",
        "initial": 0.0,
        "statistics": "gram",
        "root": None,
        "exponent": None,
        "bias_correction": True,
        "graft": Graft("adam"),
    }
}
PRESETS["paper"] = PRESETS["recommended"] | {
    "beta1": "none",
    "beta2": 1.0,
    "damping": 0.0,
    "damping_rule": "none",
    "initial": 1e-4,
    "bias_correction": False,
    "graft": Graft("none"),
    "refresh_every": 1,
    "layout": PUBLISHED_LAYOUT,
    "fallback": "identity",
}


@transformation(PRESETS, off="beta1")
def scale_by_shampoo(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo (arXiv 1802.09568): every mode times an inverse root of its Gram statistic.

    For a matrix block :math:`G` and :math:`k=2` modes

    .. math::
      S_1 \leftarrow \beta_2 S_1 + w\,G G^T, \quad S_2 \leftarrow \beta_2 S_2 + w\,G^T G, \quad
      u = (S_1 + \rho)^{-1/(2k)}\, G\, (S_2 + \rho)^{-1/(2k)}

    with :math:`w = 1` for a sum (``beta2=1``) and :math:`1-\beta_2` for an average.

    Args:
      preset: ``"recommended"``: averages, relative damping, Adam's step length (an AdamW learning
        rate carries over), refresh every 10 steps. ``"paper"`` (arXiv 1802.09568, Algorithms 1 and
        2): sums from ``initial * I``, exact roots at every step, no grafting, no averaging of
        gradients, full-matrix factors for vectors.
      beta2: decay of the statistics; exactly 1 sums them.
      damping: rho, see ``damping_rule``.
      damping_rule: ``"relative"``: ``max(w + rho*max(w), rho*max(w))`` for the eigenvalues w;
        ``"absolute"``: ``max(w + rho, rho)``; ``"shift"``: eigenvalues are moved up until the
        smallest is rho; ``"pseudo"``: eigenvalues at rounding level are dropped; ``"none"``:
        no damping, but nothing below the rounding level of the largest. Square-root statistics
        know ``"relative"``, ``"absolute"`` (both ``s^2 + rho``) and ``"clamp"`` (``max(s^2, rho)``,
        the rule that needs no damping in the statistic).
      initial: statistics start at ``initial * I``.
      statistics: ``"gram"``, or ``"square_root"`` / :class:`SquareRoot`: R with R^T R = S is kept
        and updated by QR, which gives float32 the quality of float64 on ill-conditioned problems.
      root: ``"eigh"``, ``"newton"`` (matmuls only), ``"tracked"`` (the eigenbasis is carried from
        refresh to refresh: matmuls only but for the first) for Gram statistics; square-root
        statistics always use ``"svd"``.
      bias_correction: divide averages by the sum of their weights.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a
      :class:`KronFactor` per block shape. It needs ``2 (m^2 + n^2)`` numbers per ``m x n`` block,
      plus one copy of the parameters for ``beta1`` and one for an adaptive graft.

    Raises:
      ValueError: complex or integer parameters.

    References:
      Gupta, Koren and Singer, `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; Anil et al.,
      `Scalable second order optimization <https://arxiv.org/abs/2002.09018>`_, 2020; grafting:
      `Agarwal et al. <https://arxiv.org/abs/2002.11803>`_, 2020.
    """
    c["exponent"], c["layout"] = per_mode(c["exponent"], c["layout"])
    form = c["statistics"]
    if not isinstance(form, SquareRoot):
        check("statistics", form, ("gram", "square_root"))
    shared = {
        name: c[name]
        for name in ("beta2", "damping", "damping_rule", "initial", "exponent", "bias_correction")
    }
    if form == "gram":
        check("damping_rule", c["damping_rule"], RULES)
        check("root", c["root"] or "eigh", ("eigh", "newton", "tracked"))
        return build(gram_method(root=c["root"] or "eigh", **shared), c)
    check("root (with square-root statistics)", c["root"] or "svd", ("svd",))
    check("damping_rule", c["damping_rule"], ("relative", "absolute", "clamp", "none"))
    form = form if isinstance(form, SquareRoot) else SquareRoot()
    return build(array_method(form, **shared), c)
