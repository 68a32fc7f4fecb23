"""KrADagrad* and KrADagrad: inverse Kronecker statistics that are never inverted."""

from typing import Any

import optax

from kradagrad_jax.engine import Graft, Timing
from kradagrad_jax.factors import KradOptions, alternating_method, star_method
from kradagrad_jax.factors.krad import BOUNDS
from kradagrad_jax.factors.numbers import is_number
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import BLOCK_DEFAULTS, PUBLISHED_LAYOUT, build, per_mode
from kradagrad_jax.transforms.ranges import Range

_COMMON = BLOCK_DEFAULTS | {
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


_CHOICES = {
    "bound": BOUNDS,
    "initial_scale": ("absolute", "gradient"),
    "root": ("eigh", "newton", "tracked"),
    "beta2": Range("above 0 and at most 1", lambda x: 0 < x <= 1),
}


def _options(c: dict[str, Any]) -> KradOptions:
    if c["form"] in ("factored", "exact") and not is_number(c["damping"], 0):
        raise ValueError(f"damping is part of the direct form only, not of form={c['form']!r}")
    c["exponent"], c["layout"] = per_mode(c["exponent"], c["layout"])
    return KradOptions(**{name: c[name] for name in KradOptions._fields})


@transformation(
    STAR_PRESETS,
    off="beta1",
    form=("direct", "factored", "exact", "delayed"),
    **_CHOICES,
)
def scale_by_kradagrad_star(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""KrADagrad* (arXiv 2305.19416): every mode times a positive root of an inverse statistic.

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
      beta2: ``L <- L / beta2`` before each step. Below 1, L grows without bound along directions
        that gradients leave out.
      root: ``"eigh"``, ``"newton"`` (matmuls only), ``"tracked"`` (eigenbasis carried along;
        matmuls only but for the first refresh); the factored and exact forms use an SVD.
      root_damping: added to the eigenvalues before the root.

    Returns:
      A GradientTransformationExtraArgs; its state needs ``2 (m^2 + n^2)`` numbers per ``m x n``
      block (3 for ``"delayed"``), plus a copy of the parameters for ``beta1`` and for an adaptive
      graft.

    Raises:
      ValueError: damping with a form that has none; complex or integer parameters.

    References:
      Mei, Moreno and Walters, `KrADagrad <https://arxiv.org/abs/2305.19416>`_, UAI 2023,
      Algorithms 1 and 3.
    """
    return build(star_method(_options(c)), c)


@transformation(
    ALTERNATING_PRESETS, like=scale_by_kradagrad_star, form=("direct", "factored", "exact")
)
def scale_by_kradagrad(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""KrADagrad (arXiv 2305.19416, Algorithm 2): one mode per step, square roots only.

    At step t only the factor of mode i(t) is updated, with the gradient preconditioned in all
    other modes as its statistic; for a matrix and i = 1

    .. math::
      A = G R G^T, \quad L \leftarrow L - \frac{L A L}{1 + s}, \quad u = L^{1/2}\, G\, R^{1/2}.

    The schedule i(t) is the official one: every mode in turn for k^2 steps, then mostly the
    largest mode, the others about sqrt(t) times.

    Args:
      preset: as in :func:`scale_by_kradagrad_star`; ``"official"`` has ``damping=1e-4`` and leaves
        the first gradient unpreconditioned.
      form: as in :func:`scale_by_kradagrad_star`, without ``"delayed"``.
      exponent: overrides 1/2 per mode, otherwise as in :func:`scale_by_shampoo`.

    References:
      Mei, Moreno and Walters, `KrADagrad <https://arxiv.org/abs/2305.19416>`_, UAI 2023,
      Algorithm 2.
    """
    return build(alternating_method(_options(c)), c)
