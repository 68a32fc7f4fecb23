"""Leaves, paths and placement: the little that the engine needs to know about parameter trees."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


def factor_dtype_of(dtype: Any, override: Any = None) -> Any:
    """Dtype of the factors of a parameter: ``override``, or its own but never below float32."""
    dtype = jnp.dtype(dtype if override is None else override)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves (``MaskedNode`` counts as one, so that positions agree) and the tree definition."""
    return jax.tree.flatten(tree, is_leaf=is_masked)


def unflatten(treedef: Any, leaves: list[Any]) -> Any:
    """The tree of leaves and ``MaskedNode``.

    A box of flax (nnx.Variable) around a ``MaskedNode`` is left out: flax 0.11 cannot hold one.
    """

    def unboxed(x: Any) -> Any:
        return optax.MaskedNode() if _is_box(x) and not jax.tree.leaves(x) else x

    return jax.tree.map(unboxed, treedef.unflatten(leaves), is_leaf=_is_box)


def _is_box(x: Any) -> bool:
    return hasattr(type(x), "get_metadata")


def _name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def path_name(path: Any) -> str:
    """'/'-joined names of a key path; the trailing box entry of flax's variables is dropped."""
    names = [_name(entry) for entry in path]
    if len(names) > 1 and names[-1] in ("value", "raw_value"):
        names = names[:-1]
    return "/".join(names)


def paths_of(tree: Any) -> list[str]:
    """Name of every leaf, ``MaskedNode`` counted as one."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]
    return [path_name(path) for path, _ in found]


def names_of(tree: Any) -> list[tuple[Any, ...] | None]:
    """Per leaf (``MaskedNode`` counted as one) the names that flax's boxes give to its axes.

    Read from linen's ``Partitioned`` boxes and the metadata of nnx's variables, without importing
    flax; None where there are none.
    """
    out: list[tuple[Any, ...] | None] = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: is_masked(x) or _axis_names(x) is not None):
        out += [_axis_names(node)] * len(flatten(node)[0])
    return out


def _axis_names(x: Any) -> tuple[Any, ...] | None:
    if hasattr(type(x), "get_partition_spec"):  # flax.core.meta.Partitioned and its children
        names = getattr(x, "names", None)
    elif _is_box(x):
        metadata = x.get_metadata()
        keys = ("out_sharding", "sharding_names", "sharding")  # nnx's name for it has changed twice
        names = next((metadata[k] for k in keys if metadata.get(k)), None)
    else:
        return None
    names = getattr(names, "spec", names)  # a NamedSharding
    return None if names is None else tuple(names)


def widened(tree: Any) -> Any:
    """The tree with half-precision leaves (also of ShapeDtypeStructs) in float32."""

    def wide(x: Any) -> Any:
        if is_masked(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        own = factor_dtype_of(x.dtype)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, own)
        return x.astype(own)

    return jax.tree.map(wide, tree, is_leaf=is_masked)


def check_dtypes(paths: list[str], leaves: list[Any]) -> None:
    """Raises ValueError for leaves that no method of this package can precondition."""
    for path, x in zip(paths, leaves, strict=True):
        if is_masked(x):
            continue
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise ValueError(
                f"parameter '{path}' is {x.dtype}: complex parameters are not supported; wrap the "
                "optimizer in optax.contrib.split_real_and_imaginary"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"parameter '{path}' has dtype {x.dtype}, which is not floating point; leave it "
                "out with optax.masked or optax.partition"
            )


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding of an array whose mesh has Explicit axes in use, else None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return None
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    used = [a for s in sharding.spec if s for a in (s if isinstance(s, tuple) else (s,))]
    explicit = any(types[a] == jax.sharding.AxisType.Explicit for a in used)
    return sharding if explicit else None


def replicate(x: jax.Array) -> jax.Array:
    """Gathers an Explicit-sharded array: matrix algebra is ambiguous on sharded matrix axes."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def place_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Gives ``x`` the Explicit sharding of ``like`` (no-op elsewhere)."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)
