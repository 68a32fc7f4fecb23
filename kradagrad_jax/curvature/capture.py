"""Loss, gradients and curvature in one forward and one backward pass."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.assemble import assemble
from kradagrad_jax.curvature.container import Curvature
from kradagrad_jax.curvature.execute import Context, Inputs, Sinks, evaluate, make_sinks
from kradagrad_jax.curvature.internals import varying_axes
from kradagrad_jax.curvature.plan import Plan
from kradagrad_jax.curvature.prepare import Prepared, prepare, report
from kradagrad_jax.curvature.reducers import CustomReduce, Reducer, as_reducer
from kradagrad_jax.curvature.spec import CaptureSpec
from kradagrad_jax.engine import trees

BatchArgnums = int | Sequence[int] | None
AnyReducer = str | Reducer | CustomReduce
Step = Callable[..., tuple[Any, Any, Curvature]]


def inspect(
    fn: Callable[..., Any], params: Any, *args: Any, batch_argnums: BatchArgnums = None
) -> CaptureSpec:
    """How the parameters of a loss or model enter it; nothing is computed.

    Args:
      fn: ``fn(params, *args)``, a loss (``has_aux`` or not) or a model.
      params: pytree of floating-point arrays, or their ``jax.ShapeDtypeStruct``.
      *args: further arguments, arrays or ``jax.ShapeDtypeStruct``; the batch is axis 0.
      batch_argnums: which arguments carry the batch, counted as in ``fn(params, *args)``; all by
        default. The first array of the first one gives the number of examples, and every array
        of these arguments whose axis 0 is as long carries the batch. Leave out state and keys.

    Returns:
      A static, hashable :class:`CaptureSpec`; ``print`` it for a table.

    Raises:
      ValueError: no parameter enters a linear operation, or there is no batch axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from kradagrad_jax import curvature
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"] + params["b"]) ** 2)
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> spec = curvature.inspect(loss, params, jnp.ones((5, 3)))
      >>> print(spec)
      parameter  shape   status  kind   matrices  note
      b          (2)     full    bias   1x2       bias of w
      w          (3, 2)  full    dense  3x2       with bias b
      2 of 2 parameters matched, 2 in 1 Kronecker-factored layers
    """
    return prepare(fn, params, args, batch_argnums).plan.spec


def value_grad_and_curvature(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    batch_argnums: BatchArgnums = None,
    reducer: AnyReducer = "kron",
    loss_terms: Any = None,
    reduction: str = "mean",
) -> Step:
    """As ``jax.value_and_grad``, with the curvature statistics of the same backward pass.

    The curvature is that of the *empirical* Fisher: output gradients at the true labels. For the
    Fisher with sampled labels or the exact Gauss-Newton matrix see
    :func:`model_value_grad_and_curvature`.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or, with ``has_aux``, ``(loss, aux)``. It must be
        pure: it is traced two or three times.
      has_aux: whether ``loss_fn`` returns further results.
      batch_argnums: see :func:`inspect`.
      reducer: ``"kron"``, ``"kron_reduce"``, ``"diag"``, ``"raw"``, ``"tnt"``, a
        :class:`Reducer`, or a function (see :class:`Reducer`).
      loss_terms: number M of terms that the loss averages or sums over: a number, or
        ``f(params, *args)``. Default: the number of examples. For a loss averaged over N x T
        tokens pass ``N * T``; for a weighted mean the sum of the weights.
      reduction: ``"mean"`` or ``"sum"`` over the terms.

    Returns:
      ``step(params, *args, update_stats=True, extra=None, loss_scale=None)``, which returns
      ``(loss, grads, curvature)`` or ``((loss, aux), grads, curvature)``. ``update_stats`` may be a
      traced bool: where it is False only the gradients are computed and the statistics are
      zero (``curvature.fresh`` is False). ``extra`` maps weight paths to pytrees with leading axis
      ``Layer.stack`` for a custom reducer. ``loss_scale`` is the factor the loss was multiplied by
      against underflow: it is taken out of the statistics, not of the gradients.

    Raises:
      ValueError: see :func:`inspect`; a loss that is no scalar; an unknown reducer or reduction;
        arguments that are divided over Explicit mesh axes.

    References:
      Martens, Grosse, `K-FAC <https://arxiv.org/abs/1503.05671>`_; Eschenhagen et al.,
      `weight sharing <https://arxiv.org/abs/2311.00636>`_, for expand and reduce.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from kradagrad_jax import curvature
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> step = jax.jit(curvature.value_grad_and_curvature(loss))
      >>> value, grads, curv = step({"w": jnp.ones((3, 2))}, jnp.ones((5, 3)))
      >>> curv.grams("w").a.shape, curv.grams("w").g.shape
      ((1, 3, 3), (1, 2, 2))
    """
    how = as_reducer(reducer)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    told: set[Any] = set()

    def step(
        params: Any,
        *args: Any,
        update_stats: Any = True,
        extra: Mapping[str, Any] | None = None,
        loss_scale: Any = None,
    ) -> Any:
        ready = prepare(loss_fn, params, args, batch_argnums)
        ready.check_results(has_aux, "loss_fn", scalar=True)
        report(ready, told)
        terms = ready.examples if loss_terms is None else loss_terms
        terms = terms(params, *args) if callable(terms) else terms
        terms = jnp.asarray(terms, jnp.result_type(float))
        scale = terms if reduction == "mean" else jnp.ones_like(terms)
        scale = scale if loss_scale is None else scale / loss_scale
        run = Run(ready, how, update_stats, extra, scale, loss_terms is None)
        leaves, tree = jax.tree.flatten(params)
        value, (stats, grads) = jax.value_and_grad(run.results, argnums=(0, 1), has_aux=True)(
            run.sinks, leaves, has_aux
        )
        value = value if has_aux else value[0]
        return value, tree.unflatten(grads), run.curvature(stats, terms)

    return step


@dataclasses.dataclass
class Run:
    """Sinks and operands of the taps for one evaluation."""

    ready: Prepared
    reducer: Reducer
    update_stats: Any
    extra: Mapping[str, Any] | None
    scale: Any
    default_terms: bool = False

    def __post_init__(self) -> None:
        if any(trees.explicit_sharding(x) for x in self.ready.values):
            raise ValueError(
                "statistics cannot be taken of arrays that are divided over Explicit mesh axes: "
                "wrap the step, jax.sharding.auto_axes(step, out_sharding=jax.P()), or make the "
                "mesh with axis_types=(AxisType.Auto,)"
            )
        by_tap = _extra_by_tap(self.ready.plan, self.extra)
        static = isinstance(self.update_stats, bool)
        gate = None if static else jnp.asarray(self.update_stats, bool)
        self.inputs = Inputs(gate, jnp.asarray(self.scale), by_tap)
        axes = frozenset().union(*map(varying_axes, self.ready.values))
        self.sinks = make_sinks(self.ready.plan, self.reducer, by_tap, axes)

    def results(self, sinks: Sinks, leaves: Sequence[Any], has_aux: bool) -> tuple[Any, Any]:
        """Result and aux (or None) of the function at these parameters, with taps."""
        context = Context(self.ready.plan, self.reducer, sinks, self.inputs)
        flat = evaluate(context, [*leaves, *self.ready.values[len(leaves) :]])
        out = self.ready.tree.unflatten(flat)
        return out if has_aux else (out, None)

    def curvature(self, stats: Sinks, terms: Any) -> Curvature:
        """The statistics by path; zeros if they are switched off."""
        plan = self.ready.plan
        if self.update_stats is False:
            stats = jax.tree.map(jnp.zeros_like, stats)
        held = assemble(plan, self.reducer, stats, self.scale)
        spec = plan.spec
        if self.default_terms:
            note = f"loss terms: {self.ready.examples} (the batch; loss_terms= for token losses)"
            spec = dataclasses.replace(spec, terms=note)
        fresh = jnp.asarray(self.update_stats, bool)
        terms = jnp.where(fresh, terms, 0)  # what was not taken does not count in a sum
        name = "custom" if self.reducer.custom else self.reducer.name
        return Curvature(held, terms, fresh, spec, name)


def _extra_by_tap(plan: Plan, extra: Mapping[str, Any] | None) -> Sinks:
    """Per tap its part of ``extra``: axes of scans in front, then the groups."""
    out: Sinks = {}
    unknown = set(extra or {}) - {layer.path for layer in plan.spec.layers}
    if unknown:
        raise ValueError(f"extra= names no layers: {sorted(unknown)}")
    for number, tap in enumerate(plan.taps):
        if tap.layer is None or extra is None or tap.path not in extra:
            continue
        lengths = [n for n, _ in tap.use.view.stack]
        place, slices = tap.slice

        def pick(x: Any, lengths: Any = lengths, slices: int = slices, place: int = place) -> Any:
            split = x.reshape(*lengths, slices, -1, *x.shape[1:])
            return jnp.take(split, place, axis=len(lengths))

        out[str(number)] = jax.tree.map(pick, extra[tap.path])
    return out
