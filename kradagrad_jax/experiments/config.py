"""What a comparison is: dataclasses, read from TOML files."""

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from kradagrad_jax.experiments.names import UsageError, check_keys

Dtype = Literal["float32", "float64"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer of a comparison."""

    name: str = ""
    """Name in the registry (see `kradagrad-jax list`); by default the name of the table."""
    label: str = ""
    """What the table and the plot call it; by default the name of the table."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """All are run; the best one, averaged over seeds, is reported."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """Precisions of the optimizer's statistics and roots; each becomes a row of its own."""
    schedule_lengths: tuple[int, ...] = ()
    """Numbers of updates after which the schedule (and the run) ends, each a row of its own; by
    default that of the comparison."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the optimizer."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several optimizers on one task."""

    task: str
    """Name of the task (see `kradagrad-jax list`)."""
    optimizers: dict[str, OptimizerConfig]
    """The first one is the baseline."""
    title: str = ""
    """Heading of table and plot."""
    steps: int = 500
    """Number of updates of every run."""
    eval_every: int = 25
    """Updates between evaluations."""
    seeds: tuple[int, ...] = (0,)
    """One run each: start values, order of the data."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate stays, or falls to zero."""
    select: Literal["best", "final"] = "best"
    """Which loss of a run counts: the lowest evaluated one, or the last."""
    target: float | None = None
    """Loss to count steps and seconds to; by default what the baseline reaches."""
    task_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the task."""
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Further arguments of the task: everything is run once for each of these tables."""
    output: str = ""
    """Folder of log, results and plot; by default runs/NAME."""

    def __post_init__(self) -> None:
        if not self.optimizers:
            raise UsageError("a comparison needs at least one table [optimizers.NAME]")
        if not self.seeds:
            raise UsageError("seeds must not be empty")
        for name in ("steps", "eval_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, optimizer in self.optimizers.items():
            if not optimizer.learning_rates:
                raise UsageError(f"[optimizers.{name}] needs at least one of learning_rates")
            if any(length < 1 for length in optimizer.schedule_lengths):
                raise UsageError(f"[optimizers.{name}]: schedule_lengths must be at least 1")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value (lists made tuples) is of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, arguments[0]) for one in value)
    if origin is types.UnionType:
        return any(_fits(value, one) for one in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _wording(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    if origin is tuple:
        return f"a list, each {_wording(arguments[0])}"
    if origin is types.UnionType:
        return _wording(arguments[0])
    names = {float: "a number", int: "a whole number", str: "a string", dict: "a table"}
    return names[origin or hint]


def _build(kind: Any, table: Any, where: str) -> Any:
    """A dataclass from a TOML table, every value checked against its field's type."""
    if not isinstance(table, dict):
        raise UsageError(f"{where} must be a table, got {table!r}")
    hints = typing.get_type_hints(kind)
    check_keys(table, hints, where)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    for key, value in fields.items():
        if not _fits(value, hints[key]):
            raise UsageError(f"{where}: {key} must be {_wording(hints[key])}, got {table[key]!r}")
    return kind(**fields)


def parse(text: str, name: str) -> Comparison:
    """A comparison from the text of a TOML file.

    Args:
      text: the file's content.
      name: of the configuration; names the output folder and appears in errors.

    Raises:
      UsageError: not TOML, an unknown or missing key, a value outside the allowed ones.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from error
    for needed in ("task", "optimizers"):
        if needed not in table:
            raise UsageError(f"{name} lacks '{needed}'")
    if isinstance(table["optimizers"], dict):
        table["optimizers"] = {
            key: _build(OptimizerConfig, value, f"{name}, [optimizers.{key}]")
            for key, value in table["optimizers"].items()
        }
    table.setdefault("output", f"runs/{name}")
    return _build(Comparison, table, name)


def load(path: Path) -> Comparison:
    """Reads a comparison from a TOML file.

    Raises:
      UsageError: no such file (names the configurations beside it), or as :func:`parse`.
    """
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.toml")) or sorted(
            str(p) for p in Path("configs").glob("*.toml")
        )
        known = f" (there are: {', '.join(beside)})" if beside else ""
        raise UsageError(f"there is no configuration {path}{known}")
    return parse(path.read_text(encoding="utf-8"), path.stem)
