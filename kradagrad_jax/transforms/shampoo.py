"""Shampoo: an inverse root of a Gram matrix per mode of every parameter."""

from typing import Any

import optax

from kradagrad_jax.engine import Graft, Interval, Layout, Sharding, Timing
from kradagrad_jax.factors import SquareRoot, array_method, gram_method
from kradagrad_jax.transforms.common import (
    ENGINE_DEFAULTS,
    PUBLISHED_LAYOUT,
    build,
    check_choice,
    choose,
    per_mode,
)

RULES = ("relative", "absolute", "shift", "pseudo", "none")
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": ENGINE_DEFAULTS
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
    },
    "paper": ENGINE_DEFAULTS
    | {
        "beta1": "none",
        "beta2": 1.0,
        "damping": 0.0,
        "damping_rule": "none",
        "initial": 1e-4,
        "statistics": "gram",
        "root": None,
        "exponent": None,
        "bias_correction": False,
        "graft": Graft("none"),
        "refresh_every": 1,
        "layout": PUBLISHED_LAYOUT,
        "fallback": "identity",
    },
}


def scale_by_shampoo(
    *,
    preset: str = "recommended",
    beta1: Any = None,
    beta2: Any = None,
    damping: Any = None,
    damping_rule: str | None = None,
    initial: Any = None,
    exponent: Any = None,
    statistics: str | SquareRoot | None = None,
    root: str | None = None,
    bias_correction: bool | None = None,
    graft: Graft | str | None = None,
    layout: Layout | None = None,
    refresh_every: Interval | None = None,
    statistics_every: Interval | None = None,
    timing: Timing | None = None,
    sharding: Sharding | None = None,
    fallback: Any = None,
    factor_dtype: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions every mode of the gradient by an inverse root of its Gram statistic.

    For a matrix block :math:`G` and :math:`k=2` modes

    .. math::
      S_1 \leftarrow \beta_2 S_1 + w\,G G^T, \quad S_2 \leftarrow \beta_2 S_2 + w\,G^T G, \quad
      u = (S_1 + \rho)^{-1/(2k)}\, G\, (S_2 + \rho)^{-1/(2k)}

    with :math:`w = 1` for a sum (``beta2=1``) and :math:`1-\beta_2` for an average.

    Args:
      preset: ``"recommended"``: averages, relative damping, Adam's step length (an AdamW learning
        rate carries over), refresh every 10 steps. ``"paper"`` (arXiv 1802.09568, Algorithms 1 and
        2): sums from ``initial * I``, exact roots at every step, no grafting, no averaging of
        gradients, full-matrix factors for vectors. Arguments that are given override the preset.
      beta1: decay of the bias-corrected average of gradients that is preconditioned (as Adam's);
        0 turns it off in effect, ``"none"`` also saves its memory. Recommended: 0.9.
      beta2: decay of the statistics; exactly 1 sums them. Recommended: 0.99, paper: 1.
      damping: rho, see ``damping_rule``. Recommended: 1e-6.
      damping_rule: ``"relative"``: ``max(w + rho*max(w), rho*max(w))`` for the eigenvalues w;
        ``"absolute"``: ``max(w + rho, rho)``; ``"shift"``: eigenvalues are moved up until the
        smallest is rho; ``"pseudo"``: eigenvalues at rounding level are dropped; ``"none"``:
        no damping, but nothing below the rounding level of the largest. Square-root statistics
        know ``"relative"``, ``"absolute"`` (both ``s^2 + rho``) and ``"clamp"`` (``max(s^2, rho)``,
        the rule that needs no damping in the statistic).
      initial: statistics start at ``initial * I``.
      exponent: overrides ``1/(2j)``, j the number of modes with a factor: a positive number; a
        tuple with one per mode (0: the mode has no factor, no state, no cost); a mapping from the
        number of modes to either; ``"one_sided"`` (1/2 on the shorter mode alone; also
        ``"longer"``, ``"input"``, ``"output"``).
      statistics: ``"gram"``, or ``"square_root"`` / :class:`SquareRoot`: R with R^T R = S is kept
        and updated by QR, which gives float32 the quality of float64 on ill-conditioned problems.
      root: ``"eigh"``, ``"newton"`` (matmuls only), ``"tracked"`` (the eigenbasis is carried from
        refresh to refresh: matmuls only but for the first) for Gram statistics; square-root
        statistics always use ``"svd"``.
      bias_correction: divide averages by the sum of their weights.
      graft: step length: ``"none"``, ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"``, or a
        :class:`Graft`.
      layout: how parameters are cut into blocks, see :class:`Layout`.
      refresh_every: steps between recomputations of the roots: int, traced int, or function of
        the count. Recommended: 10, paper: 1.
      statistics_every: steps between statistics, likewise. Default: 1.
      timing: start, ramp, phases, staggering, see :class:`Timing`.
      sharding: devices over which factors and work are divided, see :class:`Sharding`. None: none.
      fallback: for parameters without factors (scalars, vectors by default, excluded ones):
        ``"diagonal"``: the direction of the graft, or of AdaGrad; ``"identity"``; any graft kind;
        or a GradientTransformation.
      factor_dtype: dtype of statistics and roots. None: float32, or float64 for float64 parameters.
      mu_dtype: dtype of the average of gradients. None: as ``factor_dtype``.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a
      :class:`KronFactor` per block shape. It needs ``2 (m^2 + n^2)`` numbers per ``m x n`` block,
      plus one copy of the parameters for ``beta1`` and one for an adaptive graft.

    Raises:
      ValueError: unknown preset or choice; complex or integer parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import kradagrad_jax as kj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = optax.chain(kj.scale_by_shampoo(), optax.scale(-1e-2))
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> updates, state = tx.update(grads, state, params)

    References:
      Gupta, Koren and Singer, `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; Anil et al.,
      `Scalable second order optimization <https://arxiv.org/abs/2002.09018>`_, 2020; grafting:
      `Agarwal et al. <https://arxiv.org/abs/2002.11803>`_, 2020.
    """
    given = {k: v for k, v in locals().items() if k != "preset"}
    c = choose(preset, PRESETS, given, may_be_off=("beta1",))
    c["exponent"], c["layout"] = per_mode(c["exponent"], c["layout"])
    form = c["statistics"]
    if not isinstance(form, SquareRoot):
        check_choice("statistics", form, ("gram", "square_root"))
    shared = {
        name: c[name]
        for name in ("beta2", "damping", "damping_rule", "initial", "exponent", "bias_correction")
    }
    if form == "gram":
        check_choice("damping_rule", c["damping_rule"], RULES)
        check_choice("root", c["root"] or "eigh", ("eigh", "newton", "tracked"))
        return build(gram_method(root=c["root"] or "eigh", **shared), c)
    check_choice("root (with square-root statistics)", c["root"] or "svd", ("svd",))
    check_choice("damping_rule", c["damping_rule"], ("relative", "absolute", "clamp", "none"))
    form = form if isinstance(form, SquareRoot) else SquareRoot()
    return build(array_method(form, **shared), c)
