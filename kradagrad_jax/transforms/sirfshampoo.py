"""SIRFShampoo: Shampoo without the root and without inverses, from gradients alone."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import scale_by_blocks
from kradagrad_jax.engine.plan import Plan
from kradagrad_jax.engine.static import Source
from kradagrad_jax.factors.sirfshampoo import SirfOptions, sirf_method
from kradagrad_jax.linalg.structures import Structure, structure
from kradagrad_jax.transforms import examples
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import BLOCK_DEFAULTS, engine_arguments
from kradagrad_jax.transforms.sampled import CUT, WHOLE

Name = str | Structure
PerAxis = Name | tuple[Name, ...] | Mapping[int, "Name | tuple[Name, ...]"]
Overrides = Sequence[tuple[str | Callable[[str, tuple[int, ...]], bool], PerAxis]]
FLATTEN = "flatten:"

_OFFICIAL: dict[str, Any] = BLOCK_DEFAULTS | {
    "batch_size": None,
    "structures": "dense",
    "overrides": (),
    "max_dim": "none",
    "damping": 1e-3,
    "lr_cov": 1e-2,
    "riemannian_momentum": 0.5,
    "graft": "none",
    "refresh_every": 1,
    "layout": WHOLE,
}
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": _OFFICIAL
    | {
        "lr_cov": 0.6,
        "damping": 1e-4,
        "riemannian_momentum": 0.0,
        "graft": "adam",
        "layout": CUT,
    },
    "official": _OFFICIAL,
    "paper": _OFFICIAL
    | {
        "lr_cov": 0.2,
        "damping": 1e-4,
        "riemannian_momentum": 0.6,
        "refresh_every": 2,
        "factor_dtype": jnp.bfloat16,
    },
}


@transformation(PRESETS, without="statistics_every mu_dtype", off="max_dim", example=examples.MEANS)
def scale_by_sirfshampoo(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""SIRFShampoo (arXiv 2402.03496): Shampoo without root and inverse, structured factors.

    The curvature is the Fisher matrix of the mini-batch gradient, ``B vec(G) vec(G)^T`` for a mean
    over B examples. With :math:`Y = \sqrt{B}\, G \times_1 K_1^T \cdots \times_N K_N^T`, D entries,
    :math:`\tau_k = tr(K_k^T K_k)/d_k` and P the projection onto a structure

    .. math::
      m_n &\leftarrow \alpha_2 m_n + \tfrac{1-\alpha_2}{2} [\tfrac{d_n}{D} P(Y_{(n)} Y_{(n)}^T)
             + \lambda \prod_{k \ne n} \tau_k\, P(K_n^T K_n) - I], \\
      K_n &\leftarrow K_n - \frac{\beta_2}{\max(1, \|m_n\|_F)} K_n m_n, \qquad
      u = G \times_1 K_1 K_1^T \cdots \times_N K_N K_N^T

    Axes of length 1 have no factor. Factors stay invertible for ``lr_cov < 1`` at any scale.

    Args:
      preset: ``"recommended"``: the length of Adam's step, lr_cov 0.6 without momentum, axes above
        2048 cut into pieces of at most this length (and none above 8192 preconditioned);
        ``"official"`` (f-dangel/sirfshampoo): lr_cov 1e-2, dense factors whatever the length;
        ``"paper"``: near the tuned values of arXiv 2402.03496, bfloat16 factors.
      batch_size: B, number of terms that the loss averages over: a number, or None: it is given as
        ``update(..., batch_size=...)``. A wrong value is a wrong scale of the curvature.
      structures: one name for all axes, a tuple with one per axis longer than 1, or a mapping from
        the number of such axes to either; see :func:`kradagrad_jax.linalg.structures.structure`.
      overrides: other structures for some parameters: pairs of a regular expression (searched in
        the path) or a predicate ``(path, shape)``, and structures; a name ``"flatten:..."`` treats
        the parameter as one vector, as for embeddings with a diagonal factor. The first that
        matches wins.
      max_dim: axes of a block longer than this get a diagonal factor; ``"none"``: none does.
      damping: lambda: a number or a schedule.
      lr_cov: beta_2, the factor step, below 1: a number or a schedule of the step (from 0).
      riemannian_momentum: alpha_2. A plain 0: no memory for it.
      refresh_every: T, steps between factor updates, the first step included.
      factor_dtype: dtype of factors and momenta, a tuple with one per axis, or a mapping as for
        ``structures``. None: float32 (float64 for float64 parameters).

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a ``SirfFactor``
      per shape: ``sum d_n^2`` numbers for dense factors (twice that with momentum).

    Raises:
      ValueError: unknown structure; a tuple whose length is not the number of axes; no batch size.

    References:
      Lin et al., `Can we remove the square root in adaptive gradient methods?
      <https://arxiv.org/abs/2402.03496>`_, 2024.
    """
    if c["timing"].stagger:
        raise ValueError("Timing(stagger=True) does not apply: factors move with every statistic")
    choices = [(None, c["structures"]), *c["overrides"]]
    methods = {str(i): _method(c, per_axis) for i, (_, per_axis) in enumerate(choices)}

    def group(path: str, shape: tuple[int, ...]) -> str:
        for i, (pattern, _) in enumerate(choices[1:], 1):
            found = pattern(path, shape) if callable(pattern) else re.search(pattern, path)
            if found:
                return str(i)
        return "0"

    if len(methods) > 1:
        c["layout"] = dataclasses.replace(c["layout"], group=group)
    # folding a gradient in is the refresh; factors have dtypes of their own
    engine = c | {"statistics_every": c["refresh_every"], "factor_dtype": None}
    return scale_by_blocks(
        methods if len(methods) > 1 else methods["0"],
        source=_source(c["batch_size"]),
        **engine_arguments(engine),
    )


def _method(c: dict[str, Any], per_axis: PerAxis) -> Any:
    flatten, names = False, per_axis
    if isinstance(per_axis, str):
        flatten, names = per_axis.startswith(FLATTEN), per_axis.removeprefix(FLATTEN)
    meaning = _meaning(names)  # unknown structures are refused at once, not while tracing

    def structures(dims: tuple[int, ...]) -> tuple[Structure, ...]:
        chosen = per_axis_of(names, len(dims), "structures")
        limit = c["max_dim"]
        return tuple(
            structure("diagonal" if limit is not None and d > limit else name)
            for d, name in zip(dims, chosen, strict=True)
        )

    def dtypes(order: int) -> tuple[Any, ...]:
        chosen = per_axis_of(c["factor_dtype"], order, "factor_dtype")
        return tuple(None if d is None else jnp.dtype(d) for d in chosen)

    numbers = c["damping"], c["lr_cov"], c["riemannian_momentum"]
    return sirf_method(SirfOptions(structures, dtypes, flatten, *numbers, meaning))


def per_axis_of(value: Any, order: int, what: str) -> tuple[Any, ...]:
    """One entry per axis, from one for all, a tuple, or a mapping from the number of axes.

    Raises:
      ValueError: a tuple of another length, or a mapping without this number of axes.
    """
    if isinstance(value, Mapping):
        if order not in value:
            raise ValueError(
                f"{what} has no entry for parameters of {order} axes longer than 1, only for "
                f"{sorted(value)}"
            )
        value = value[order]
    if not isinstance(value, (tuple, list)):
        return (value,) * order
    if len(value) != order:
        raise ValueError(
            f"{what} names {len(value)} axes, a parameter has {order} longer than 1: give one name "
            f"for all, or a mapping {{{order}: (..)}}, or overrides for this parameter"
        )
    return tuple(value)


def _meaning(names: PerAxis) -> str:
    """The structures in their normal form; raises ValueError for an unknown one."""
    entries = names if isinstance(names, Mapping) else {"": names}
    axes = {k: x if isinstance(x, (tuple, list)) else [x] for k, x in entries.items()}
    return ", ".join(
        f"{k}{':' * bool(k)}{'|'.join(structure(n).name for n in x)}" for k, x in axes.items()
    )


def _source(batch_size: Any) -> Source:
    """Statistics: gradients times the root of the batch size."""

    def source(
        plan: Plan, blocks: dict[str, jax.Array], extra: dict[str, Any]
    ) -> tuple[dict[str, jax.Array], bool]:
        del plan
        size = extra.get("batch_size") if batch_size is None else batch_size
        if size is None:
            raise ValueError(
                "SIRFShampoo needs the number of examples that the loss averages over: "
                "batch_size=.. as argument, or update(.., batch_size=..)"
            )
        return {key: x * jnp.sqrt(jnp.asarray(size, x.dtype)) for key, x in blocks.items()}, True

    return source
