"""KrADagrad* and KrADagrad: inverse Kronecker statistics that are never inverted."""

from typing import Any

import optax

from kradagrad_jax.engine import Graft, Interval, Layout, Sharding, Timing
from kradagrad_jax.factors import KradOptions, alternating_method, star_method
from kradagrad_jax.factors.krad import BOUNDS
from kradagrad_jax.transforms.common import (
    ENGINE_DEFAULTS,
    PUBLISHED_LAYOUT,
    build,
    check_choice,
    choose,
    per_mode,
)

_COMMON = ENGINE_DEFAULTS | {
    "form": "direct",
    "root": "eigh",
    "root_damping": 0.0,
    "beta2": 1.0,
    "exponent": None,
    "damping": 0.0,
    "initial": 1.0,
    "initial_scale": "absolute",
    "graft": Graft("none"),
}
_PAPER = _COMMON | {
    "bound": "fro",
    "beta1": "none",
    "refresh_every": 1,
    "layout": PUBLISHED_LAYOUT,
    "fallback": "identity",
}
_RECOMMENDED = _COMMON | {
    "bound": "sym",
    "beta1": 0.9,
    "initial_scale": "gradient",
    "graft": Graft("adam"),
}
STAR_PRESETS: dict[str, dict[str, Any]] = {
    "recommended": _RECOMMENDED,
    "paper": _PAPER,
    "official": _PAPER
    | {"bound": "official", "initial": 1e4, "root_damping": 1e-8, "graft": Graft("sgd")},
}
ALTERNATING_PRESETS: dict[str, dict[str, Any]] = {
    "recommended": _RECOMMENDED,
    "paper": _PAPER,
    "official": _PAPER | {"damping": 1e-4, "root_damping": 1e-8, "timing": Timing(start=2)},
}


def _options(c: dict[str, Any], forms: tuple[str, ...]) -> KradOptions:
    check_choice("form", c["form"], forms)
    check_choice("bound", c["bound"], BOUNDS)
    check_choice("initial_scale", c["initial_scale"], ("absolute", "gradient"))
    check_choice("root", c["root"], ("eigh", "newton", "tracked"))
    damping = c["damping"]
    if c["form"] in ("factored", "exact") and not (
        isinstance(damping, (int, float)) and damping == 0
    ):
        raise ValueError(f"damping is part of the direct form only, not of form={c['form']!r}")
    return KradOptions(**{name: c[name] for name in KradOptions._fields})


def scale_by_kradagrad_star(
    *,
    preset: str = "recommended",
    form: str | None = None,
    bound: str | None = None,
    initial: Any = None,
    initial_scale: str | None = None,
    damping: Any = None,
    beta1: Any = None,
    beta2: Any = None,
    exponent: Any = None,
    root: str | None = None,
    root_damping: Any = None,
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
    r"""Preconditions every mode by a positive root of an inverse statistic (KrADagrad*).

    For a matrix block :math:`G`, with :math:`t = 1 + s` and s from ``bound``,

    .. math::
      L \leftarrow L - \frac{L G G^T L}{t_L}, \quad R \leftarrow R - \frac{R G^T G R}{t_R}, \quad
      u = L^{1/4}\, G\, R^{1/4}

    (order k: exponents 1/(2k)). L stays below ``(L_0^-1 + sum G G^T / t)^-1``: an inverse that is
    never formed.

    Args:
      preset: ``"recommended"``: the tightest cheap bound, a start that follows the scale of the
        gradients, Adam's step length and averaging of gradients, roots every 10 steps.
        ``"paper"``: ``bound="fro"``, start at I, roots at every step, no grafting. ``"official"``:
        the released code's ``t = n (1 + tr)``, start at 1e4 I, SGD's step length; on the paper's
        own synthetic problem it is the identity preconditioner to 0.3% (see the documentation).
      form: ``"direct"`` keeps L. ``"factored"`` keeps S with L = S S^T, positive definite in any
        precision, first order like the paper. ``"exact"`` keeps K with L = K K^T and equals
        ``(I/initial + sum G G^T)^-1`` (one QR per mode and statistic). ``"delayed"`` sums Gram
        matrices and takes one step per refresh (supplement C.2; 3 (m^2+n^2) numbers).
      bound: ``"sym"``, ``"fro"``, ``"trace"``, ``"spectral"`` or ``"official"``, see
        :func:`kradagrad_jax.factors.krad_step`. Read by the direct form only (``"delayed"`` uses
        the trace).
      initial: L starts at ``initial * I``. In float32 the direct form needs ``initial`` times the
        norm of the summed statistic below about 1e7.
      initial_scale: ``"absolute"``, or ``"gradient"``: ``initial`` over the mean eigenvalue
        of the first non-zero statistic, which makes the method independent of the scale of the
        loss.
      damping: eps of ``L <- L - eps L^2`` before each step (direct and delayed forms); needs
        ``eps * lambda_max(L) < 1``.
      beta1: as in :func:`scale_by_shampoo`.
      beta2: ``L <- L / beta2`` before each step. Below 1, L grows without bound along directions
        that gradients leave out.
      exponent: overrides ``1/(2j)``, j the number of modes with a factor; a number, a tuple per
        mode, a mapping or a name as in :func:`scale_by_shampoo`.
      root: ``"eigh"``, ``"newton"`` (matmuls only), ``"tracked"`` (eigenbasis carried along;
        matmuls only but for the first refresh); the factored and exact forms use an SVD.
      root_damping: added to the eigenvalues before the root (official: 1e-8).
      graft: as in :func:`scale_by_shampoo`, like all arguments below.
      layout: see :class:`Layout`.
      refresh_every: steps between roots.
      statistics_every: steps between KrAD steps.
      timing: see :class:`Timing`.
      sharding: devices over which factors and work are divided, see :class:`Sharding`. None: none.
      fallback: for parameters without factors.
      factor_dtype: dtype of L and its root.
      mu_dtype: dtype of the average of gradients.

    Returns:
      A GradientTransformationExtraArgs; its state needs ``2 (m^2 + n^2)`` numbers per ``m x n``
      block (3 for ``"delayed"``), plus a copy of the parameters for ``beta1`` and for an adaptive
      graft.

    Raises:
      ValueError: unknown preset or choice, damping with a form that has none; complex or integer
        parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import kradagrad_jax as kj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = optax.chain(kj.scale_by_kradagrad_star(), optax.scale(-1e-2))
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> updates, state = tx.update(grads, state, params)

    References:
      Mei, Moreno and Walters, `KrADagrad <https://arxiv.org/abs/2305.19416>`_, UAI 2023,
      Algorithms 1 and 3.
    """
    given = {k: v for k, v in locals().items() if k != "preset"}
    c = choose(preset, STAR_PRESETS, given, may_be_off=("beta1",))
    c["exponent"], c["layout"] = per_mode(c["exponent"], c["layout"])
    return build(star_method(_options(c, ("direct", "factored", "exact", "delayed"))), c)


def scale_by_kradagrad(
    *,
    preset: str = "recommended",
    form: str | None = None,
    bound: str | None = None,
    initial: Any = None,
    initial_scale: str | None = None,
    damping: Any = None,
    beta1: Any = None,
    beta2: Any = None,
    exponent: Any = None,
    root: str | None = None,
    root_damping: Any = None,
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
    r"""KrADagrad: one mode per step, square roots whatever the order.

    At step t only the factor of mode i(t) is updated, with the gradient preconditioned in all
    other modes as its statistic; for a matrix and i = 1

    .. math::
      A = G R G^T, \quad L \leftarrow L - \frac{L A L}{1 + s}, \quad u = L^{1/2}\, G\, R^{1/2}.

    The schedule i(t) is the official one: every mode in turn for k^2 steps, then mostly the
    largest mode, the others about sqrt(t) times.

    Args:
      preset: as in :func:`scale_by_kradagrad_star`; ``"official"`` has ``damping=1e-4`` and leaves
        the first gradient unpreconditioned.
      form: ``"direct"``, ``"factored"`` or ``"exact"``.
      bound: see :func:`scale_by_kradagrad_star`, like all other arguments.
      initial: scale of the start.
      initial_scale: ``"absolute"`` or ``"gradient"``.
      damping: eps of ``L - eps L^2``.
      beta1: averaging of gradients.
      beta2: growth of L.
      exponent: overrides 1/2 per mode; as in :func:`scale_by_shampoo`.
      root: ``"eigh"``, ``"newton"``, ``"tracked"``.
      root_damping: added before the root.
      graft: step length.
      layout: blocks.
      refresh_every: steps between roots.
      statistics_every: steps between statistics.
      timing: start, ramp, phases.
      sharding: devices over which factors and work are divided, see :class:`Sharding`. None: none.
      fallback: for parameters without factors.
      factor_dtype: dtype of factors.
      mu_dtype: dtype of the average of gradients.

    Returns:
      A GradientTransformationExtraArgs, ``2 (m^2 + n^2)`` numbers per block as above.

    Raises:
      ValueError: as :func:`scale_by_kradagrad_star`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import kradagrad_jax as kj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = optax.chain(kj.scale_by_kradagrad(), optax.scale(-1e-2))
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> updates, state = tx.update(grads, state, params)

    References:
      Mei, Moreno and Walters, `KrADagrad <https://arxiv.org/abs/2305.19416>`_, UAI 2023,
      Algorithm 2.
    """
    given = {k: v for k, v in locals().items() if k != "preset"}
    c = choose(preset, ALTERNATING_PRESETS, given, may_be_off=("beta1",))
    c["exponent"], c["layout"] = per_mode(c["exponent"], c["layout"])
    return build(alternating_method(_options(c, ("direct", "factored", "exact"))), c)
