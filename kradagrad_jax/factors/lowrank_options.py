"""Static options of the low-rank K-FACs."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Sketch:
    """How a dense factor is decomposed at random. Static.

    Attributes:
      rank: number of eigenpairs that are kept.
      oversampling: further columns of the test matrix.
      power: power iterations (randomised SVD) or products (symmetric sketch).
      rank_schedule: step (from 0) -> number of pairs in use, at most ``rank``.
      oversampling_schedule: step -> columns in use beyond the rank, likewise.
      orthonormalize: symmetric sketch: a QR after each product; without it, as published, float32
        loses the weak pairs.
      seed: sketches depend on it, the step and the layer's shape alone.
      draw: ``(step, layer shape, 0 for inputs or 1 for outputs) -> (d, columns)`` in place of
        random test matrices.
    """

    rank: int = 220
    oversampling: int = 10
    power: int = 4
    rank_schedule: Callable[[jax.Array], Any] | None = None
    oversampling_schedule: Callable[[jax.Array], Any] | None = None
    orthonormalize: bool = True
    seed: int = 0
    draw: Callable[..., jax.Array] | None = None

    def __post_init__(self):
        for name, least in (("rank", 1), ("oversampling", 0), ("power", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Sketch.{name} must be an integer >= {least}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Online:
    """How eigenpairs follow a factor's average. Static.

    Attributes:
      batch_size: rows n per statistic; None: the batch that the spec was built with. Sides with
        ``rank + n < d`` are followed online, the others decomposed.
      every: statistics between updates; more than 1 is harmful.
      truncate: ``"before"``: all pairs of an update are used, and cut before the next one;
        ``"after"``: cut at once.
      overwrite_every: refreshes between decompositions that replace the pairs (B-R).
      correct_every: updates between light corrections (B-C).
      corrected_share: of the pairs, per correction.
      correct_with_batch: by the average that includes the current batch; as published: without.
      pick: ``(step, layer shape, 0 or 1) -> positions`` in place of random ones.
    """

    batch_size: int | None = None
    every: int = 1
    truncate: Literal["before", "after"] = "before"
    overwrite_every: int = 5
    correct_every: int = 5
    corrected_share: float = 0.2
    correct_with_batch: bool = True
    pick: Callable[..., jax.Array] | None = None

    def __post_init__(self):
        if self.truncate not in ("before", "after"):
            raise ValueError(f"Online.truncate must be 'before' or 'after', got {self.truncate!r}")
        for name in ("every", "overwrite_every", "correct_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Online.{name} must be at least 1, got {getattr(self, name)!r}")


class LowRankOptions(NamedTuple):
    """Static choices and numbers of the method; see :func:`scale_by_rs_kfac`.

    ``online`` None: nothing is tracked. ``overwrite``, ``correct``: as in B-R-KFAC and B-KFAC-C.
    """

    sketch: Sketch = Sketch()
    decomposition: str = "rsvd"
    ema: Any = 0.95
    start: str = "corrected"
    damping: Any = 0.1
    continuation: bool = True
    online: Online | None = None
    overwrite: bool = False
    correct: bool = False

    @property
    def columns(self) -> int:
        """Rows per statistic of the online update."""
        return (
            0 if self.online is None or self.online.batch_size is None else self.online.batch_size
        )
