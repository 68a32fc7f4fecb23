"""From the cotangents of the sinks to parts by parameter path."""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.execute import Sinks
from kradagrad_jax.curvature.parts import INPUT_SIDE, Part, scaled, wide
from kradagrad_jax.curvature.plan import Plan, Tap
from kradagrad_jax.curvature.reducers import Reducer


def assemble(plan: Plan, reducer: Reducer, stats: Sinks, scale: Any) -> dict[str, tuple[Part, ...]]:
    """Parts per path, all slices of a leaf stacked and the uses of a leaf summed.

    ``stats``: cotangents of the sinks; ``scale``: what makes of them those of the sum of the terms.
    """
    by_path: dict[str, list[tuple[Tap, Part]]] = defaultdict(list)
    for number, tap in enumerate(plan.taps):
        part = _scaled(tap, reducer, _flat(tap, reducer, stats[str(number)]), scale)
        by_path[tap.path].append((tap, part))
    return {path: _combined(held, reducer) for path, held in by_path.items()}


def _flat(tap: Tap, reducer: Reducer, part: Part) -> Part:
    """Axes of the loops: those of iterated parameters join S, the others join the positions."""
    flags = [flag for flag, _ in tap.use.view.loops if flag == "stack" or reducer.keeps_positions]
    stack = [i for i, flag in enumerate(flags) if flag == "stack"]
    time = [i for i, flag in enumerate(flags) if flag == "share"]
    return {key: _flat_array(key, x, len(flags), stack, time) for key, x in part.items()}


def _flat_array(key: str, x: jax.Array, loops: int, stack: list[int], time: list[int]) -> jax.Array:
    lead = math.prod(x.shape[i] for i in (*stack, loops))
    if not time:
        return x.reshape(lead, *x.shape[loops + 1 :])
    if key == "P":
        return jnp.sum(x, axis=tuple(time)).reshape(lead)
    at = {"g": 3, "a": 2, "ids": 2, "mask": 2, "v": 2}.get(key)
    if at is None:  # sums of an elementwise use, kept apart by iteration
        return jnp.sum(x, axis=tuple(time)).reshape(lead, *x.shape[loops + 1 :])
    keep = [i for i in range(x.ndim) if i not in time]
    position = len(stack) + at  # the axis R among those kept; v has none: behind N
    x = x.transpose([*keep[:position], *time, *keep[position:]])
    shape = [x.shape[i] for i in range(x.ndim)]
    steps = math.prod(shape[position : position + len(time)])
    head, tail = shape[len(stack) + 1 : position], shape[position + len(time) :]
    tail = tail if key == "v" else [steps * tail[0], *tail[1:]]
    if key == "v":
        head = [head[0] * steps]
    return x.reshape(lead, *head, *tail)


def _scaled(tap: Tap, reducer: Reducer, part: Part, scale: Any) -> Part:
    if reducer.custom is not None and tap.layer is not None:
        return part
    if "g" in part:
        part["scale"] = jnp.ones((), wide(part["g"]).dtype)
    return scaled(part, scale * tap.use.view.factor)


def _combined(held: Sequence[tuple[Tap, Part]], reducer: Reducer) -> tuple[Part, ...]:
    """Uses of one leaf: added where they are sums, kept side by side where they are raw."""
    add = functools.partial(jax.tree.map, jnp.add)
    roles: dict[bool, list[tuple[Tap, Part]]] = defaultdict(list)
    for tap, part in held:
        roles[tap.use.kind == "embed"].append((tap, part))
    out: list[Part] = []
    for role in sorted(roles, reverse=True):  # of a tied embedding the gather comes first
        count = held[0][0].slice[1]
        slices = [[p for tap, p in roles[role] if tap.slice[0] == i] for i in range(count)]
        if not reducer.keeps_positions:
            slices = [[functools.reduce(add, parts)] for parts in slices]
        if len({len(parts) for parts in slices}) > 1:
            raise NotImplementedError(
                "raw statistics of a parameter whose slices are used a different number of times; "
                "capture with reducer='kron'"
            )
        out += [_join(parts, held[0][0]) for parts in zip(*slices, strict=True)]
    return tuple(out)


def _join(parts: Sequence[Part], tap: Tap) -> Part:
    """Slices become part of the stack: after the axes of loops, before the groups."""
    if len(parts) == 1:
        return parts[0]
    before = math.prod(n for n, _ in tap.use.view.stack)
    out = {}
    for key in parts[0]:
        arrays = [p[key] for p in parts]
        if key == "scale":
            out[key] = arrays[0]
            continue
        split = [x.reshape(before, -1, *x.shape[1:]) for x in arrays]
        out[key] = jnp.concatenate(split, axis=1).reshape(-1, *arrays[0].shape[1:])
    return out


def over_directions(stats: Sinks, average: bool) -> Sinks:
    """Cotangents of several loss directions (leading axis) as statistics of all of them.

    What belongs to the inputs is the same for all and taken once; what belongs to the cotangents
    is summed, or averaged where the directions are draws of the same thing. Raw cotangents are kept
    side by side.
    """

    def merged(part: Part) -> Part:
        out = {}
        for key, x in part.items():
            if key in INPUT_SIDE:
                out[key] = x[0]
            elif key == "g":  # (C, loops.., S, 1, N, R, d) -> (loops.., S, C, N, R, d)
                count = jnp.sqrt(jnp.asarray(x.shape[0] if average else 1, x.dtype))
                out[key] = jnp.moveaxis(x[..., 0, :, :, :], 0, -4) / count
            elif key == "v":
                continue  # per-example gradients have no meaning for several directions
            else:
                out[key] = jnp.mean(x, axis=0) if average else jnp.sum(x, axis=0)
        return out

    return {k: merged(part) for k, part in stats.items()}
