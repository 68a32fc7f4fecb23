"""Packs the weights and biases of layers into matrices, and takes them apart again."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.sharding import Split

LAYERS, REST = "layers", "rest"


@runtime_checkable
class LayerLike(Protocol):
    """What the engine has to know about a layer; ``curvature.Layer`` is one."""

    path: str
    shape: tuple[int, ...]
    bias: str | None
    bias_shape: tuple[int, ...] | None
    in_shape: tuple[int, ...]

    def pack(self, weight: jax.Array, bias: jax.Array | None) -> jax.Array: ...
    def unpack(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]: ...


class Packing(NamedTuple):
    """The layers present in a tree, by path, with the positions of weight and bias."""

    layers: dict[str, tuple[Any, int, int | None]]
    treedef: Any
    channels_first: bool
    mesh: Split | None

    def split(self, tree: Any) -> dict[str, Any]:
        """``{"layers": {path: matrix stack}, "rest": the tree with these leaves masked}``."""
        leaves = trees.flatten(tree)[0]
        matrices = {}
        for path, (layer, weight, bias) in self.layers.items():
            parts = [None if i is None else self._whole(leaves[i]) for i in (weight, bias)]
            matrix = layer.pack(parts[0], parts[1])
            matrices[path] = reorder(matrix, layer, 1) if self.channels_first else matrix
        for _, weight, bias in self.layers.values():
            for i in (weight, bias):
                if i is not None:
                    leaves[i] = optax.MaskedNode()
        return {LAYERS: matrices, REST: trees.unflatten(self.treedef, leaves)}

    def _whole(self, x: Any) -> Any:
        if self.mesh is None or not isinstance(x, jax.Array):
            return trees.replicate(x)
        return self.mesh.whole(x)

    def join(self, parts: dict[str, Any], like: Any) -> Any:
        """Inverse of :meth:`split`, with the dtypes and placement of ``like``."""
        leaves = trees.flatten(parts[REST])[0]
        wanted = trees.flatten(like)[0]
        for path, (layer, weight, bias) in self.layers.items():
            matrix = parts[LAYERS][path]
            if self.channels_first:
                matrix = reorder(matrix, layer, 1, back=True)
            for i, value in zip((weight, bias), layer.unpack(matrix), strict=True):
                if i is not None:
                    value = self._whole(value)
                    leaves[i] = trees.place_like(value.astype(wanted[i].dtype), wanted[i])
        return self.treedef.unflatten(leaves)


def reorder(x: jax.Array, layer: LayerLike, axis: int, back: bool = False) -> jax.Array:
    """Input index from (height, width, channel) to (channel, height, width) order, or back.

    The row of a joint bias, the last one, stays where it is.
    """
    dims = layer.in_shape
    if len(dims) < 2:
        return x
    inputs = math.prod(dims)
    order = np.moveaxis(np.arange(inputs).reshape(dims), -1, 0).reshape(-1)
    order = np.concatenate([order, np.arange(inputs, x.shape[axis])])
    return jnp.take(x, np.argsort(order) if back else order, axis=axis)


def packing_of(
    spec: Any,
    tree: Any,
    joint_bias: bool,
    used: Callable[[Any], bool],
    channels_first: bool,
    mesh: Split | None = None,
) -> Packing:
    """Finds the layers of ``spec`` in a tree of parameters or gradients.

    Raises:
      ValueError: the tree has no leaf of a layer's path, or one of another shape.
    """
    leaves, treedef = trees.flatten(tree)
    position = {path: i for i, path in enumerate(trees.paths_of(tree))}
    layers: dict[str, tuple[Any, int, int | None]] = {}
    for layer in spec.layers:
        if not used(layer):
            continue
        weight = _find(layer.path, layer.shape, position, leaves)
        if weight is None:
            continue
        bias = None
        if joint_bias and layer.bias is not None and layer.bias_shape is not None:
            bias = _find(layer.bias, layer.bias_shape, position, leaves)
        layers[layer.path] = (layer, weight, bias)
    return Packing(layers, treedef, channels_first, mesh)


def _find(
    path: str, shape: tuple[int, ...], position: dict[str, int], leaves: list[Any]
) -> int | None:
    """Position of a leaf; None where it, or a subtree that it lies in, is masked."""
    names = path.split("/")
    above = ["/".join(names[:i]) for i in range(1, len(names) + 1)]
    if any(p in position and trees.is_masked(leaves[position[p]]) for p in above):
        return None
    if path not in position:
        some = ", ".join(repr(p) for p in list(position)[:4])
        raise ValueError(
            f"spec has a layer '{path}', the parameters have no such leaf (they have {some}, ..): "
            "build the spec with the same tree that the optimizer gets"
        )
    x = leaves[position[path]]
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"spec was built for leaf '{path}' of shape {tuple(shape)}, the optimizer received "
            f"{tuple(x.shape)}: build the spec with the same parameters"
        )
    return position[path]
