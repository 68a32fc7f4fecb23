"""What a builder makes of a golden file, and how its factors are read back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import kradagrad_jax as kj
from kradagrad_jax.engine import block_factors
from tests.golden.recorded import UnknownFile
from tests.reading import orders

Factors = dict[str, dict[str, list[jax.Array]]]  # name -> kind -> flat list of matrices


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer that should reproduce a golden file.

    Attributes:
      tx: complete transformation, learning rate and sign included.
      layout: the layout that its blocks have.
      jit: whether `tx.update` may be jitted.
    """

    tx: optax.GradientTransformation
    layout: kj.Layout
    jit: bool = True

    def factors(self, state: Any, params: dict[str, jax.Array]) -> Factors:
        """Factors of every parameter that has blocks, from the first states that hold them."""
        found: Factors = {}
        for label, block_state in _block_states(state):
            seen = params
            if label is not None:
                of = orders(params, self.layout)
                seen = {
                    n: p if str(of[n]) == label else optax.MaskedNode() for n, p in params.items()
                }
            for name, blocks in block_factors(block_state, seen, self.layout).items():
                found.setdefault(
                    name,
                    {
                        kind: [m for block in blocks for m in getattr(block, kind) if m is not None]
                        for kind in ("statistics", "preconditioners")
                    },
                )
        return found


def _block_states(state: Any, label: str | None = None):
    """All BlockStates in a state, with the label of `optax.partition` that they are under."""
    if isinstance(state, kj.BlockState):
        yield label, state
    elif isinstance(state, optax.transforms.PartitionState):
        for key, inner in state.inner_states.items():
            yield from _block_states(inner, key)
    elif isinstance(state, tuple):
        for part in state:
            yield from _block_states(part, label)


def per_order(
    params: dict[str, jax.Array],
    layout: kj.Layout,
    make: Callable[[int], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One transformation per order: for exponents that are not the same for all parameters."""
    labels = {name: str(k) for name, k in orders(params, layout).items()}
    return optax.partition({k: make(int(k)) for k in sorted(set(labels.values()))}, labels)


NEVER = 2**30


def schedule(
    statistics_every: int,
    statistics_phase: int,
    refresh_every: int,
    refresh_phase: int,
    start: int,
    after_statistics: bool = False,
) -> dict[str, Any]:
    """Timing arguments for statistics and roots due at `t % every == phase` (t from 1).

    The public option has one phase for both; where the two disagree the statistics' interval is
    given as a function of the count. `after_statistics`: no root before there is a statistic.
    """

    def first_due(every: int, phase: int, since: int = 1) -> int:
        return next(t for t in range(since, since + every) if (t - phase) % every == 0)

    since = first_due(statistics_every, statistics_phase) if after_statistics else 1
    first = first_due(refresh_every, refresh_phase, since)
    common = next(
        (
            phase
            for phase in range(statistics_every * refresh_every)
            if (phase - statistics_phase) % statistics_every == 0
            and (phase - refresh_phase) % refresh_every == 0
        ),
        None,
    )
    if common is not None:
        timing = kj.Timing(start=start, first_refresh=first, phase=common)
        return {
            "timing": timing,
            "refresh_every": refresh_every,
            "statistics_every": statistics_every,
        }
    phase = refresh_phase - refresh_every  # below every t, so that t - phase is never 0

    def interval(t: jax.Array) -> jax.Array:
        due = (t - statistics_phase) % statistics_every == 0
        return jax.numpy.where(due, 1, NEVER)

    return {
        "timing": kj.Timing(start=start, first_refresh=first, phase=phase),
        "refresh_every": refresh_every,
        "statistics_every": interval,
    }


def check_keys(config: dict[str, Any], known: str, where: str) -> None:
    """Raises UnknownFile for configuration keys that a builder does not read."""
    extra = sorted(set(config) - set(known.split()))
    if extra:
        raise UnknownFile(f"{where}: unknown configuration keys {extra}")
