"""Over which devices of a mesh the blocks are spread, and how many each has."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


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
