"""States on meshes: where every array of a state belongs, and states of other device counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from kradagrad_jax.engine import trees


def state_sharding(tx: optax.GradientTransformation, params: Any) -> Any:
    """Shardings for every array of ``tx.init(params)``.

    For ``jax.jit(tx.init, out_shardings=...)``, which makes a state without ever holding it whole
    on one device, and for restoring checkpoints. Factors lie as the transformation's
    :class:`Sharding` says, arrays shaped like a parameter lie as that parameter, all else is
    replicated. Parts of the chain that are not ours are included.

    Args:
      tx: an optax transformation.
      params: arrays or ShapeDtypeStructs with NamedShardings.

    Returns:
      Tree of NamedShardings with the structure of the state.

    Raises:
      ValueError: no parameter has a NamedSharding; a :class:`Sharding` finds no mesh.
    """
    own: dict[str, tuple[tuple[int, ...], NamedSharding]] = {}
    for path, x in zip(trees.paths_of(params), trees.flatten(params)[0], strict=True):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            own[path] = (tuple(x.shape), sharding)
    if not own:
        raise ValueError(
            "state_sharding needs parameters on a mesh: jax.device_put(params, NamedSharding(mesh, "
            "PartitionSpec())), or ShapeDtypeStructs with such a sharding"
        )
    replicated = NamedSharding(next(iter(own.values()))[1].mesh, PartitionSpec())
    leaves, treedef = jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, params))
    placed = jax.tree.leaves(jax.jit(tx.init).lower(params).compile().output_shardings)
    out = []
    for (path, x), found in zip(leaves, placed, strict=True):
        names = trees.path_name(path).split("/")
        ends = ["/".join(names[i:]) for i in range(len(names))]
        like = [own[e][1] for e in ends if e in own and own[e][0] == tuple(x.shape)]
        fallback = found if isinstance(found, NamedSharding) else replicated
        out.append(like[0] if like else fallback)
    return treedef.unflatten(out)


def fit_state(state: Any, like: Any) -> Any:
    """A state for another number of devices: stacks of blocks get the length that ``like`` has.

    Stacks are filled up to a multiple of the number of devices; blocks in excess are unused and are
    cut off, missing ones are taken from ``like``. Not needed where ``Sharding.pad_to`` is the same
    multiple on all machines.

    Args:
      state: of the same transformation and parameters, from a mesh of any size.
      like: ``tx.init(params)`` on the mesh of today.

    Returns:
      The state, with the shapes and shardings of ``like``.

    Raises:
      ValueError: arrays differ in more than the length of their first axis.
    """
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError("fit_state: the states are of different transformations or parameters")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)

    def fit(path: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if x.dtype != y.dtype or x.shape[1:] != y.shape[1:] or x.ndim != y.ndim:
            raise ValueError(
                f"fit_state: '{path}' is {x.dtype}{x.shape} in the state and {y.dtype}{y.shape} in "
                "the new one: they are of different parameters, layouts or dtypes"
            )
        host = np.asarray(jax.device_get(x))
        if x.shape != y.shape:
            host = np.concatenate([host[: y.shape[0]], np.asarray(jax.device_get(y))[len(host) :]])
        # an array that lies nowhere in particular must not be tied to a device
        return jax.device_put(host, y.sharding) if y.committed else jnp.asarray(host)

    pairs = zip(leaves, jax.tree.leaves(state), strict=True)
    return treedef.unflatten([fit(trees.path_name(path), x, y) for (path, y), x in pairs])
