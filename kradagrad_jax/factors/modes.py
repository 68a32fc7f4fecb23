"""Blocks as tensors whose modes are groups of axes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

Shape = tuple[int, ...]
Groups = tuple[tuple[int, ...], ...]


def axis_groups(grouping: str | Callable[[Shape], Groups], shape: Shape) -> Groups:
    """Which axes of a block form one mode.

    Args:
      grouping: ``"filter_flattening"``: all axes but the last two are one mode (kernels
        ``(h, w, in, out)`` have three); ``"kfac_reshaping"``: all but the last are one; ``"none"``:
        every axis is a mode; or ``shape -> groups``, every axis in exactly one group.
      shape: shape of the block.

    Raises:
      ValueError: groups that are no partition of the axes.
    """
    n = len(shape)
    if callable(grouping):
        groups = tuple(tuple(group) for group in grouping(shape))
        if sorted(axis for group in groups for axis in group) != list(range(n)):
            raise ValueError(f"grouping of shape {shape} is no partition of its axes: {groups}")
        return groups
    merged = {"none": 1, "filter_flattening": max(n - 2, 1), "kfac_reshaping": max(n - 1, 1)}
    first = merged[grouping]
    return (tuple(range(first)), *((axis,) for axis in range(first, n)))


class Merge(NamedTuple):
    """A block as a tensor whose modes are groups of its axes."""

    groups: Groups
    shape: Shape

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(axis for group in self.groups for axis in group)

    @property
    def merged(self) -> Shape:
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    def merge(self, x: jax.Array) -> jax.Array:
        """``(*batch, *block shape) -> (*batch, *merged)``."""
        lead = x.ndim - len(self.shape)
        x = x.transpose(*range(lead), *(lead + axis for axis in self.order))
        return x.reshape(*x.shape[:lead], *self.merged)

    def unmerge(self, x: jax.Array) -> jax.Array:
        x = x.reshape([self.shape[axis] for axis in self.order])
        return x.transpose([self.order.index(axis) for axis in range(len(self.shape))])
