"""Spreads the stacks of blocks, and the work on them, over the devices of a mesh.

Every device holds an equal share of the blocks of each bucket and folds in, refreshes and applies
these alone; what all devices need afterwards is collected by one all-gather. All communication is
JAX's own: `jax.shard_map` and changes of sharding.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kradagrad_jax.factors.method import Rows, Step

Trees = dict[str, Any]  # by bucket


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How factors and the work on them are spread over devices. Hashable, static.

    Attributes:
      axis: name of the mesh axis over which blocks are divided, or several names.
      mesh: the mesh; None: the one of ``jax.set_mesh``. Its axes may be Auto or Explicit.
      gather: what is collected from all devices. ``"updates"``: the preconditioned gradients, once
        at every step; no part of the factors is ever held twice. ``"preconditioners"``: the arrays
        that multiply the gradient, once after every change of them (for methods with a refresh,
        once per refresh); they are then held by every device, and only the rest of the factors is
        divided.
      pad_to: stacks are filled up to a multiple of this number of blocks. None: the number of
        devices on ``axis``. A common multiple of several numbers of devices makes states that any
        of them can read from a checkpoint. Buckets of a single block are not divided.

    Raises:
      ValueError: unknown ``gather``, ``pad_to`` below 1, or no ``axis``.
    """

    axis: str | tuple[str, ...]
    mesh: Mesh | AbstractMesh | None = None
    gather: Literal["updates", "preconditioners"] = "updates"
    pad_to: int | None = None

    def __post_init__(self):
        if self.gather not in ("updates", "preconditioners"):
            raise ValueError(
                "Sharding.gather must be 'updates' or 'preconditioners', got " + repr(self.gather)
            )
        if self.pad_to is not None and (not isinstance(self.pad_to, int) or self.pad_to < 1):
            raise ValueError(f"Sharding.pad_to must be a positive integer, got {self.pad_to!r}")
        if not self.axis:
            raise ValueError("Sharding.axis must name at least one axis of the mesh")


class Split(NamedTuple):
    """A :class:`Sharding` on the mesh that is there while tracing."""

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]
    devices: int
    multiple: int
    gather: str

    def padded(self, size: int) -> int:
        """Length of the stack that holds ``size`` blocks."""
        return size if size == 1 else -(-size // self.multiple) * self.multiple

    def share(self, size: int) -> int:
        """Number of blocks on one device."""
        return size if size == 1 else self.padded(size) // self.devices

    @property
    def parts(self) -> PartitionSpec:
        return PartitionSpec(self.axes)

    def whole(self, tree: Any) -> Any:
        """The arrays on every device."""
        return self.place(tree, PartitionSpec())

    def place(self, tree: Any, spec: PartitionSpec) -> Any:
        """The arrays with this sharding of the mesh, Auto or Explicit."""
        sharding = NamedSharding(self.mesh, spec)
        explicit = AxisType.Explicit in self.mesh.axis_types
        change = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        return jax.tree.map(lambda x: change(x, sharding), tree)


def resolve(sharding: Sharding | None) -> Split | None:
    """The sharding on the mesh of this trace.

    Raises:
      ValueError: there is no mesh, it lacks the axis, or the axis is taken by a ``shard_map``
        around the update.
    """
    if sharding is None:
        return None
    ambient = jax.sharding.get_abstract_mesh()
    mesh = ambient if sharding.mesh is None or _manual(ambient) else sharding.mesh
    if mesh.empty:
        raise ValueError(
            f"Sharding({sharding.axis!r}) needs a mesh: give it mesh=, or call init and update "
            "under jax.set_mesh(mesh)"
        )
    axes = (sharding.axis,) if isinstance(sharding.axis, str) else tuple(sharding.axis)
    missing = [a for a in axes if a not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"Sharding: the mesh has axes {mesh.axis_names}, none named {missing[0]!r}"
        )
    if _manual(mesh):
        raise ValueError(
            "Sharding has no effect inside shard_map, where every device runs its own update: "
            "leave out sharding=, or call the optimizer outside of shard_map"
        )
    devices = math.prod(mesh.shape[a] for a in axes)
    multiple = sharding.pad_to or devices
    if multiple % devices:
        raise ValueError(
            f"Sharding.pad_to={multiple} is no multiple of the {devices} devices on {axes}"
        )
    return Split(mesh, axes, devices, multiple, sharding.gather)


def _manual(mesh: Any) -> bool:
    return AxisType.Manual in mesh.axis_types


def pad(x: jax.Array, size: int) -> jax.Array:
    """A stack filled up with zeros."""
    return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def divided(split: Split | None, stacks: Trees) -> Trees:
    """Stacks of all blocks, filled up and divided; single blocks stay on every device."""
    if split is None:
        return stacks

    def one(x: jax.Array, whole_first: bool) -> jax.Array:
        size = x.shape[0]
        if size == 1:
            return x
        x = pad(x, split.padded(size))
        return split.place(split.whole(x) if whole_first else x, split.parts)

    out = {}
    for key, tree in stacks.items():
        # Left to itself the partitioner divides what leads to the stack, at a cost. But the rows
        # of a divided batch are never made whole: every device gets those of its own layers.
        rows = isinstance(tree, Rows)
        out[key] = jax.tree.map(lambda x, w=not rows: one(x, w), tree)
    return out


def over_devices(
    split: Split | None, fun: Callable[..., tuple[Trees, Trees]], step: Step, *args: Trees
) -> tuple[Trees, jax.Array]:
    """Runs ``fun`` on every device's share of the stacks.

    Args:
      split: None runs it as it is.
      fun: ``(step, *args) -> (stacks, counts)``, dicts by bucket; counts are int32 scalars.
      step: scalars, the same on all devices.
      *args: dicts of stacks by bucket.

    Returns:
      The stacks, and the sum of the counts over all blocks. Stacks that ``fun`` returns untouched
      are the arguments themselves.

    Raises:
      ValueError: ``fun`` uses traced arrays on Explicit axes other than its arguments.
    """
    zero = jnp.zeros((), jnp.int32)
    if split is None:
        stacks, counts = fun(step, *args)
        return stacks, sum(counts.values(), start=zero)
    whole = {key for key, x in args[0].items() if jax.tree.leaves(x)[0].shape[0] == 1}
    traced = {k: v for k, v in step._asdict().items() if isinstance(v, jax.Array)}
    given = jax.tree.leaves(args)
    found: list[Any] = []  # the structure of the result, with places of arrays for leaves

    def run(traced: dict[str, jax.Array], *trees: Trees) -> tuple[Any, ...]:
        stacks, counts = fun(step._replace(**traced), *trees)
        position = {id(x): i for i, x in enumerate(jax.tree.leaves(trees))}
        lists: tuple[list[jax.Array], ...] = ([], [])

        def put(x: jax.Array, key: str) -> tuple[int, int]:
            if id(x) in position:
                return 2, position[id(x)]
            own = lists[key in whole]
            own.append(x)
            return int(key in whole), len(own) - 1

        found.append(
            {key: jax.tree.map(lambda x, k=key: put(x, k), t) for key, t in stacks.items()}
        )
        own = sum((c for key, c in counts.items() if key not in whole), start=zero)
        same = sum((c for key, c in counts.items() if key in whole), start=zero)
        return *lists, jax.lax.psum(own, split.axes) + same

    specs = tuple(_specs(split, tree, whole) for tree in args)
    try:
        parts, wholes, count = jax.shard_map(
            run,
            mesh=split.mesh,
            in_specs=(PartitionSpec(), *specs),
            out_specs=(split.parts, PartitionSpec(), PartitionSpec()),
            check_vma=False,
        )(traced, *args)
    except NotImplementedError as error:
        if "Explicit" not in str(error):
            raise
        raise ValueError(
            "Sharding on a mesh with Explicit axes does not go with traced hyperparameters (as "
            "optax.inject_hyperparams has them): name them in its static_args, use schedules of "
            "the step, or a mesh with Auto axes"
        ) from error
    lists = (parts, wholes, given)
    stacks = jax.tree.map(lambda at: lists[at[0]][at[1]], found[-1], is_leaf=_is_place)
    return stacks, count


def _is_place(x: Any) -> bool:
    return type(x) is tuple and len(x) == 2 and all(type(i) is int for i in x)


def _specs(split: Split, tree: Trees, whole: set[str]) -> Trees:
    return {
        key: jax.tree.map(lambda _, k=key: PartitionSpec() if k in whole else split.parts, x)
        for key, x in tree.items()
    }


def gathered(split: Split, tree: Any) -> Any:
    """Divided stacks, whole on every device, by ONE all-gather per dtype."""
    leaves, treedef = jax.tree.flatten(tree)
    out: list[Any] = list(leaves)
    for dtype in sorted({x.dtype for x in leaves}, key=str):
        own = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        pack = jax.shard_map(
            lambda *parts: jnp.concatenate([x.reshape(-1) for x in parts]),
            mesh=split.mesh,
            in_specs=split.parts,
            out_specs=split.parts,
            check_vma=False,
        )
        packed = split.whole(pack(*(leaves[i] for i in own)))
        packed = packed.reshape(split.devices, -1)
        start = 0
        for i in own:
            width = leaves[i].size // split.devices
            x = packed[:, start : start + width].reshape(leaves[i].shape)
            out[i] = split.whole(x)
            start += width
    return jax.tree.unflatten(treedef, out)
