"""Traces a user's function and plans its taps."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature import internals
from kradagrad_jax.curvature.batch import BatchAxes, batch_axes
from kradagrad_jax.curvature.finder import Finder
from kradagrad_jax.curvature.plan import Plan, make_plan
from kradagrad_jax.engine.trees import paths_of

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Prepared:
    """A traced function with its plan."""

    plan: Plan
    examples: int  # N
    values: list[Any]  # the flat arguments that are arrays, parameters first
    tree: Any  # structure of the results

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the first result: the loss, or the outputs of the model."""
        graph, first = self.plan.graph, self.plan.graph.block.outputs[0]
        if not isinstance(first, int):
            return jax.ShapeDtypeStruct((), jnp.result_type(float))
        return jax.ShapeDtypeStruct(graph.shapes[first], graph.dtypes[first])

    def check_results(self, has_aux: bool, name: str, scalar: bool) -> None:
        """Raises ValueError unless the function returned what it has to."""
        out = self.tree.unflatten(range(self.tree.num_leaves))
        if has_aux and not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], int)):
            raise ValueError(f"{name} must return an array and aux with has_aux=True")
        if not has_aux and not isinstance(out, int):
            raise ValueError(
                f"{name} must return one array, got {type(out).__name__}; pass has_aux=True if it "
                "returns (array, aux)"
            )
        if scalar and self.output.shape != ():
            raise ValueError(f"{name} must return a scalar, got shape {self.output.shape}")


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def prepare(
    fn: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    batch_argnums: int | Sequence[int] | None,
) -> Prepared:
    """Traces ``fn(params, *args)`` and finds what to tap.

    Python scalars among the arguments stay constants. ``batch_argnums`` counts as in
    ``fn(params, *args)``: 1 is the first argument after the parameters.

    Raises:
      ValueError: no parameter was matched, or there is no batch.
    """
    leaves, tree = jax.tree.flatten((params, tuple(args)))
    count = len(jax.tree.leaves(params))
    _check_params(params, leaves[:count])
    dynamic = [i for i, x in enumerate(leaves) if i < count or _is_array(x)]
    structure: list[Any] = []

    def flat_fn(*values: Any) -> list[Any]:
        full = list(leaves)
        for i, v in zip(dynamic, values, strict=True):
            full[i] = v
        inner_params, inner_args = tree.unflatten(full)
        out, shape = jax.tree.flatten(fn(inner_params, *inner_args))
        structure.append(shape)
        return out

    values = [leaves[i] for i in dynamic]
    graph = internals.trace(flat_fn, values)
    owners = [k for k, x in enumerate((params, *args)) for _ in jax.tree.leaves(x)]
    arrays = [(place, owners[i], leaves[i]) for place, i in enumerate(dynamic) if owners[i]]
    batch, examples = _batch_leaves(arrays, len(args), batch_argnums)
    axes = batch_axes(graph, flat_fn, values, batch, examples)
    plan = _plan(graph, params, leaves[:count], axes)
    return Prepared(plan, examples, values, structure[0])


def _plan(graph: internals.Graph, params: Any, leaves: Sequence[Any], axes: BatchAxes) -> Plan:
    found = Finder(graph, [tuple(x.shape) for x in leaves], axes).found
    described = [(p, x.shape, x.dtype) for p, x in zip(paths_of(params), leaves, strict=True)]
    plan = make_plan(graph, found, described, axes.examples)
    if not plan.taps:
        raise ValueError(f"curvature capture: no parameter leaf was matched:\n{plan.spec}")
    return plan


def _check_params(params: Any, leaves: Sequence[Any]) -> None:
    for path, x in zip(paths_of(params), leaves, strict=True):
        if not _is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            kind = getattr(x, "dtype", type(x).__name__)
            raise ValueError(
                f"parameter '{path}' is {kind}, not a floating-point array: pass what is "
                "differentiated as the first argument, everything else after it"
            )


def _batch_leaves(
    arrays: Sequence[tuple[int, int, Any]], args: int, argnums: int | Sequence[int] | None
) -> tuple[list[int], int]:
    """Positions of the arrays with a batch axis, and its length.

    ``arrays``: position, number of the argument (from 1) and value of each.
    """
    wanted = range(1, args + 1) if argnums is None else argnums
    wanted = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    first = next((x for k in wanted[:1] for _, o, x in arrays if o == k and x.ndim), None)
    n = 0 if first is None else first.shape[0]
    chosen = [p for p, k, x in arrays if k in wanted and x.ndim and x.shape[0] == n]
    if not n:
        raise ValueError(
            "curvature capture: found no batch axis (axis 0 of the first array of argument "
            f"{wanted[0] if wanted else 1}); pass the batch as an argument after the parameters, "
            "and batch_argnums= if it is not the first"
        )
    return chosen, n


def report(prepared: Prepared, told: set[Any]) -> None:
    """Warns once about inexact leaves, and logs once what will get the fallback."""
    for leaf in prepared.plan.spec.leaves:
        key = (leaf.path, leaf.status)
        if key in told or leaf.status == "full":
            continue
        told.add(key)
        why = "; ".join(leaf.reasons)
        if leaf.status == "inexact":
            warnings.warn(f"curvature capture: leaf '{leaf.path}' inexact: {why}", stacklevel=4)
        else:
            log.info(
                "leaf '%s': status %s, reason: %s; it will use `fallback`",
                leaf.path, leaf.status, why,
            )  # fmt: skip
