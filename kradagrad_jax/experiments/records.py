"""What came out of one run, and its form on disk."""

import math
from typing import Any, NamedTuple

from kradagrad_jax.experiments.training import Evaluation


class Record(NamedTuple):
    """A run that ended.

    Attributes:
      learning_rate: of the run.
      seed: of the run.
      curve: its evaluations, at least one.
    """

    learning_rate: float
    seed: int
    curve: list[Evaluation]

    @property
    def diverged(self) -> bool:
        """Whether it was stopped because the loss was not finite."""
        return not self.curve[-1].finite

    def chosen(self, select: str) -> Evaluation | None:
        """The evaluation that counts, ``select`` = "best" or "final"; None for a diverged run."""
        if self.diverged:
            return None
        if select == "final":
            return self.curve[-1]
        return min(self.curve, key=lambda point: point.metrics["loss"])

    def loss(self, select: str) -> float:
        """The loss that counts, infinite for a diverged run."""
        point = self.chosen(select)
        return math.inf if point is None else point.metrics["loss"]

    def reached(self, target: float) -> Evaluation | None:
        """The first evaluation at or below ``target``."""
        return next((p for p in self.curve if p.metrics["loss"] <= target), None)

    def to_json(self) -> dict[str, Any]:
        """Inverse of :func:`from_json`."""
        return {
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "status": "diverged" if self.diverged else "finished",
            "curve": [point._asdict() for point in self.curve],
        }


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no number that is not finite


def from_json(entry: dict[str, Any]) -> Record:
    """A record from a line of the log."""
    curve = [
        Evaluation(
            point["step"],
            point["seconds"],
            None if point["step"] == 0 else _number(point["train_loss"]),
            {name: _number(value) for name, value in point["metrics"].items()},
        )
        for point in entry["curve"]
    ]
    return Record(entry["learning_rate"], entry["seed"], curve)
