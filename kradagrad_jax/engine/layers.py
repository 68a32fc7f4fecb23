"""Layers as blocks: a weight and its bias become one matrix, its statistic comes from `curvature=`.

The parameters of the layers are packed to ``(stack, d_in + 1, d_out)`` matrices (last row: bias),
which the engine treats as stacked parameters; all other leaves keep their place and get the
fallback. Guards, timing and grafting are thus those of :func:`scale_by_blocks`.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import report, sharding, trees
from kradagrad_jax.engine.layout import Layout
from kradagrad_jax.engine.packing import LAYERS, REST, LayerLike, Packing, packing_of, reorder
from kradagrad_jax.engine.plan import Plan
from kradagrad_jax.engine.state import BlockState
from kradagrad_jax.engine.transform import scale_by_blocks
from kradagrad_jax.factors.method import BlockMethod, Grams, Rows

Clip = Callable[[dict[str, jax.Array], dict[str, jax.Array], jax.Array], dict[str, jax.Array]]


def _statistics(packing: Packing, form: str, approx: str) -> Callable[..., tuple[Any, Any]]:
    """The engine's ``source``: stacks of :class:`Rows` or :class:`Grams` by bucket."""

    def source(plan: Plan, blocks: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        del blocks
        curvature = extra["curvature"]
        if curvature is None:
            return None, False
        out = {}
        for bucket in plan.buckets:
            parts = []
            paths = [p for slot in bucket.slots for p in plan.covered[slot.leaves].paths]
            for path in (p.removeprefix(LAYERS + "/") for p in paths):
                layer, _, bias = packing.layers[path]
                read = curvature.rows if form == "rows" else curvature.grams
                part = read(path, approx=approx, bias=bias is not None)
                parts.append(_ordered(part, layer) if packing.channels_first else part)
            out[bucket.key] = _stacked(parts, bucket.dtype)
        return out, curvature.fresh

    return source


def _ordered(part: Rows | Grams, layer: LayerLike) -> Rows | Grams:
    a = reorder(part.a, layer, part.a.ndim - 1)
    if isinstance(part, Grams) and a.ndim == 3:
        a = reorder(a, layer, 1)
    return part._replace(a=a)


def _stacked(parts: list[Any], dtype: Any) -> Any:
    """One stack of statistics; layers with fewer rows are padded with zeros."""
    if isinstance(parts[0], Rows):
        longest = [max(p[i].shape[1] for p in parts) for i in (0, 1)]
        parts = [
            Rows(*(jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0)))
                   for x, n in zip(p, longest, strict=True)))
            for p in parts
        ]  # fmt: skip
    return jax.tree.map(lambda *x: jnp.concatenate([y.astype(dtype) for y in x]), *parts)


class LayerTransformation(optax.GradientTransformationExtraArgs):
    """A GradientTransformationExtraArgs that knows which parameters it treats as layers.

    Attributes:
      covered: ``tree -> tree of bools``: True for the weights and biases of layers, False for what
        the fallback treats; a mask for optax.masked.
    """

    covered: Callable[[Any], Any]


def scale_by_layers(
    method: BlockMethod | Mapping[str, BlockMethod],
    spec: Any,
    *,
    assign: Callable[[Any], str | None] | None = None,
    form: str = "rows",
    approx: str = "expand",
    joint_bias: bool = True,
    channels_first: bool = False,
    clip: Clip | None = None,
    fallback: Any = "adam",
    **engine: Any,
) -> "LayerTransformation":
    """Builds a transformation whose statistics are layer inputs and output gradients.

    Args:
      method: pure functions on one layer: gradient ``(d_in [+ 1], d_out)``, statistic
        :class:`Rows` or :class:`Grams`; or several, by name, with ``assign``.
      spec: the :class:`~kradagrad_jax.curvature.CaptureSpec` of the model.
      assign: ``layer -> name of its method``, or None for the fallback. With a single method:
        ``layer -> None`` leaves a layer out, any string keeps it.
      form: ``"rows"`` or ``"grams"``, what the method takes.
      approx: ``"expand"`` or ``"reduce"`` where a weight is used at several positions.
      joint_bias: the bias is the last row of its layer's matrix; False leaves it to the fallback.
      channels_first: rows of convolutions ordered (channel, height, width).
      clip: ``(updates, gradients, count) -> updates`` on ``{path: packed matrices}``.
      fallback: for leaves that are no layer: ``"adam"`` (``optax.scale_by_adam()`` in float32),
        another graft kind, ``"identity"``, or a GradientTransformation with positive sign, which
        gets half-precision leaves as they are.
      **engine: further arguments of :func:`scale_by_blocks`.

    Returns:
      A :class:`LayerTransformation`; ``update(grads, state, params, curvature=...)``.
      ``curvature=None`` means "no new statistics at this step".

    Raises:
      ValueError: while tracing: no layer in ``spec``, parameters that do not fit it, an ``update``
        without ``curvature``.
    """
    if not spec.layers:
        raise ValueError(f"no parameter leaf of the model has statistics:\n{spec}")
    methods = {"": method} if isinstance(method, BlockMethod) else dict(method)
    single = isinstance(method, BlockMethod)
    groups = {layer.path: "" if assign is None else assign(layer) for layer in spec.layers}
    if single:
        groups = {path: None if name is None else "" for path, name in groups.items()}
    unknown = sorted({str(g) for g in groups.values() if g is not None and g not in methods})
    if unknown:
        raise ValueError(f"assign names methods {unknown}, there are {sorted(methods)}")
    if isinstance(fallback, str) and fallback == "adam":
        fallback = _in_float32(optax.scale_by_adam())
    rest = _on_rest(cast(Any, fallback)) if hasattr(fallback, "update") else fallback
    layout = Layout(
        block_size=None,
        merge="none",
        vectors="block",
        max_dim=None,
        state_limit=None,
        biases=None,
        include=lambda path, _: path.startswith(LAYERS + "/"),
        stacked=lambda path, _: path.startswith(LAYERS + "/"),
        group=lambda path, _: groups[path.removeprefix(LAYERS + "/")] or "",
    )

    def packed(tree: Any) -> Packing:
        wanted = {path for path, group in groups.items() if group is not None}
        mesh = sharding.resolve(engine.get("sharding"))
        return packing_of(spec, tree, joint_bias, lambda x: x.path in wanted, channels_first, mesh)

    def engine_of(packing: Packing | None) -> optax.GradientTransformationExtraArgs:
        source = {} if packing is None else {"source": _statistics(packing, form, approx)}
        return scale_by_blocks(
            methods[""] if single else methods,
            layout=layout,
            fallback=rest,
            **source,
            **engine,
        )

    def init(params: optax.Params) -> Any:
        if not jax.tree.leaves(params):
            return engine_of(None).init(params)
        packing = packed(params)
        state = engine_of(packing).init(cast(Any, packing.split(params)))
        report.amend(packing)
        return state

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if "curvature" not in extra:
            raise ValueError(
                "`curvature=` is missing in the update; did a wrapper drop extra arguments "
                "(TrainState, lookahead)? Pass curvature=None for a step without new statistics"
            )
        packing = packed(updates)
        parts = packing.split(updates)
        theirs = None if params is None else packing.split(params)
        result = engine_of(packing).update(cast(Any, parts), state, cast(Any, theirs), **extra)
        out, new = cast(tuple[dict[str, Any], BlockState], result)
        if clip is not None and packing.layers:
            out = {LAYERS: clip(out[LAYERS], parts[LAYERS], new.count), REST: out[REST]}
        return packing.join(out, updates), cast(optax.OptState, new)

    def covered(tree: Any) -> Any:
        packing = packed(tree)
        leaves, treedef = trees.flatten(tree)
        own = {i for _, weight, bias in packing.layers.values() for i in (weight, bias)}
        return treedef.unflatten(
            [x if trees.is_masked(x) else i in own for i, x in enumerate(leaves)]
        )

    out = LayerTransformation(init, update)
    out.covered = covered
    return out


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` on half-precision leaves: in float16 squares of gradients below 1e-4 are zero."""
    run = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        own = None if params is None else trees.widened(params)
        return run.update(trees.widened(updates), state, own, **extra)

    def init(params: Any) -> Any:
        return run.init(trees.widened(params))

    return optax.GradientTransformationExtraArgs(init, update)


def _on_rest(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The user's fallback, on the leaves in their own tree structure."""
    run = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[dict[str, Any], Any]:
        own = None if params is None else params[REST]
        rest, state = run.update(updates[REST], state, own, **extra)
        return {LAYERS: updates[LAYERS], REST: rest}, state

    def init(params: Any) -> Any:
        return run.init(params[REST] if isinstance(params, dict) and REST in params else params)

    return optax.GradientTransformationExtraArgs(init, update)
