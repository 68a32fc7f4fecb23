"""IKFAC, INGD and SINGD: K-FAC's natural gradient without any matrix inverse."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine.layers import scale_by_layers
from kradagrad_jax.factors.singd import SingdOptions, singd_method
from kradagrad_jax.linalg.structures import Structure, structure
from kradagrad_jax.transforms import examples
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import LAYER_DEFAULTS, engine_arguments

Name = str | Structure
Names = Name | tuple[Name, Name]
Overrides = Sequence[tuple[str | Callable[[Any], bool], Names | None]]
Pair = tuple[Structure, Structure]


def ingd_warm_up(count: jax.Array) -> jax.Array:
    """The factor step of the original INGD: 2e-4 up to step 100, 2e-3 below 500, then 1e-2."""
    return jnp.where(count <= 100, 2e-4, jnp.where(count < 500, 2e-3, 1e-2))


_OFFICIAL: dict[str, Any] = LAYER_DEFAULTS | {
    "structures": "dense",
    "overrides": (),
    "damping": 1e-3,
    "lr_cov": 1e-2,
    "riemannian_momentum": 0.5,
    "normalize_lr_cov": "none",
    "second_order": False,
    "statistics": "rows",
    "channels_first": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": _OFFICIAL
    | {
        "damping": 3e-5,
        "lr_cov": 0.8,
        "riemannian_momentum": 0.0,
        "normalize_lr_cov": "frobenius",
        "graft": "adam",
        "refresh_every": 1,
    },
    "official": _OFFICIAL,
    "paper": _OFFICIAL,
}
INGD_PRESETS = PRESETS | {"paper": _OFFICIAL | {"lr_cov": ingd_warm_up}}
IKFAC_PRESETS = PRESETS | {"recommended": PRESETS["recommended"] | {"damping": 1e-3}}


@transformation(
    PRESETS,
    layers=True,
    without="statistics_every",
    example=examples.LAYERS,
    normalize_lr_cov=("none", "max_entry", "frobenius"),
    statistics=("rows", "grams"),
)
def scale_by_singd(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""SINGD (arXiv 2312.05705): gradients M of layers times structured roots, without inverses.

    With U, G the second moments of inputs and output gradients, P the projection onto a structure,
    avg the mean of a diagonal, and s = 1/2 (under ``normalize_lr_cov`` :math:`(1-\alpha_1)/2`)

    .. math::
      m_K &\leftarrow \alpha_1 m_K + s\,[\,avg(C^T G C)\, P(K^T U K)
             + \lambda\, avg(C^T C)\, P(K^T K) - I\,], \\
      K &\leftarrow K - \beta_1 K m_K, \qquad u = K K^T M C C^T

    and C likewise, from the same K and C. Nothing is inverted or decomposed, so that all of it runs
    in half precision; sparse structures need less memory than Adam.

    Args:
      preset: ``"recommended"``: the length of Adam's step, a large factor step at every step,
        bounded by ``normalize_lr_cov="frobenius"``, no momentum; ``"official"`` (f-dangel/singd):
        small steps without a bound; ``"paper"``: the same, the papers' tuned values not being
        published as such (for :func:`scale_by_ingd`: with the warm-up of the authors' code).
      structures: of K and C: one name for both or a pair, see
        :func:`kradagrad_jax.linalg.structures.structure`. K acts on the inputs (the bias last),
        C on the outputs.
      overrides: other structures for some layers: pairs of a regular expression (searched in the
        path of the weight) or a predicate of the :class:`~kradagrad_jax.curvature.Layer`, and
        structures, or None for the fallback. The first that matches wins.
      damping: lambda: a number or a schedule. 0 lets factors grow where there is no curvature; a
        large value is plain gradient descent, scaled.
      lr_cov: beta_1, the factor step, below 1: a number or a schedule of the step (from 0).
      riemannian_momentum: alpha_1. A plain 0: no memory for it.
      normalize_lr_cov: divide the factor step by ``max(1, size of m)``: ``"max_entry"`` (official
        option; no guarantee), ``"frobenius"`` (with lr_cov < 1 factors stay invertible whatever the
        scale of the inputs), or ``"none"``.
      second_order: keep the second term of the exponential.
      statistics: ``"rows"`` (capture with ``reducer="raw"``) or ``"grams"`` (any reducer; forms U
        and G, which rows avoid for sparse structures).
      channels_first: order the inputs of convolutions as (channel, height, width), as the official
        code does. None: where a structure depends on their order.
      refresh_every: T, steps between factor updates, the first step included; statistics given at
        other steps are ignored. Short runs do not gain with 10.
      factor_dtype: dtype of K, C and momenta, or a pair of dtypes for K and C; bfloat16 freezes
        factors early for lr_cov far below 0.1. None: float32 (float64 for float64 parameters).

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a ``SingdFactor``
      per layer shape: the numbers of its structures, twice that with momentum.

    Raises:
      ValueError: an unknown structure; a model without layers; parameters that do not fit ``spec``;
        an update without ``curvature``.

    References:
      Lin et al., `SINGD <https://arxiv.org/abs/2312.05705>`_, 2024, and
      `INGD <https://arxiv.org/abs/2302.09738>`_, 2023.
    """
    return _build(c, adaptive=True)


@transformation(
    INGD_PRESETS,
    like=scale_by_singd,
    without="structures overrides channels_first statistics_every",
)
def scale_by_ingd(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """INGD (arXiv 2302.09738): inverse-free natural gradient, SINGD with dense factors.

    The recommended preset is that of :func:`scale_by_singd`: they differ in ``"paper"`` alone.

    Returns:
      As :func:`scale_by_singd`; ``d_in^2 + d_out^2`` numbers per layer, twice with momentum.

    References:
      Lin et al., `INGD <https://arxiv.org/abs/2302.09738>`_, 2023.
    """
    return _build(c, adaptive=True)


@transformation(IKFAC_PRESETS, like=scale_by_singd, without="riemannian_momentum statistics_every")
def scale_by_ikfac(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""IKFAC (arXiv 2312.05705): K-FAC's damped inverses followed by matrix products alone.

    :math:`m_K = (P(K^T U K) + \lambda P(K^T K) - I)/2`, without weights from the other side and
    without momentum: ``K K^T`` is the inverse of K-FAC's ``S + lambda I``, S averaged with decay
    ``1 - lr_cov``, up to O(lr_cov^2) per step.

    Returns:
      As :func:`scale_by_singd`, without momenta: ``d_in^2 + d_out^2`` numbers per dense layer.

    References:
      Lin et al., `SINGD <https://arxiv.org/abs/2312.05705>`_, 2024.
    """
    return _build(c | {"riemannian_momentum": 0.0}, adaptive=False)


def pair_of(names: Names) -> Pair:
    """Structures of K and C from one name for both, or a pair.

    Raises:
      ValueError: unknown structure, or a sequence of another length.
    """
    if isinstance(names, (str, Structure)):
        names = (names, names)
    if len(names) != 2:
        raise ValueError(f"structures must be one for both factors or a pair (K, C), got {names!r}")
    return structure(names[0]), structure(names[1])


def _layer_structures(layer: Any, default: Pair, overrides: Overrides) -> Pair | None:
    """What a layer gets; None: the fallback."""
    if layer.kind == "embed":
        return None
    for pattern, names in overrides:
        found = pattern(layer) if callable(pattern) else re.search(pattern, layer.path)
        if found:
            return None if names is None else pair_of(names)
    return default


def _build(c: dict[str, Any], adaptive: bool) -> optax.GradientTransformationExtraArgs:
    if c["timing"].stagger:
        raise ValueError("Timing(stagger=True) does not apply: factors move when statistics come")
    spec, default = c["spec"], pair_of(c["structures"])
    pairs = {x.path: _layer_structures(x, default, c["overrides"]) for x in spec.layers}
    groups = {path: f"{p[0].name}|{p[1].name}" for path, p in pairs.items() if p is not None}
    used = {groups[path]: pair for path, pair in pairs.items() if pair is not None}
    dtypes = c["factor_dtype"]
    dtypes = dtypes if isinstance(dtypes, (tuple, list)) else (dtypes, dtypes)
    k_dtype, c_dtype = (None if d is None else jnp.dtype(d) for d in dtypes)
    numbers = {name: c[name] for name in SingdOptions._fields if name in c and name != "structures"}
    options = SingdOptions(**numbers, adaptive=adaptive, factor_dtypes=(k_dtype, c_dtype))
    first = c["channels_first"]
    if first is None:
        first = any(pair[0].name not in ("dense", "diagonal") for pair in used.values())
    return scale_by_layers(
        {name: singd_method(options._replace(structures=pair)) for name, pair in used.items()},
        spec,
        assign=lambda layer: groups.get(layer.path),
        form=c["statistics"],
        channels_first=first,
        # folding a statistic in is the refresh; factors have dtypes of their own
        **engine_arguments(c | {"statistics_every": c["refresh_every"], "factor_dtype": None}),
    )
