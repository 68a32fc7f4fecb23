"""A benchmark as a page of markdown: table, plot, command, versions, machine."""

import datetime
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

import jax

from kradagrad_jax.experiments.config import Comparison
from kradagrad_jax.experiments.race import HEAD, Race, cells, explained, verdict

_PACKAGES = ("kradagrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")
_PEERS = ("psgdax", "distributed-kron", "psgd-jax")


class About(NamedTuple):
    """What a page tells beside the results.

    Attributes:
      command: that makes it.
      left_out: optimizers of absent packages, and why.
      load: averages before and after training, from :func:`load_average`.
    """

    command: str
    left_out: tuple[str, ...] = ()
    load: tuple[float, ...] = ()


def load_average() -> float | None:
    """Processes that want a core, mean of the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in (*_PACKAGES, *_PEERS):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _machine(load: tuple[float, ...]) -> list[str]:
    cores = f"{os.cpu_count() or 1}"
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < int(cores):
        cores = f"{len(os.sched_getaffinity(0))} of {cores}"  # under taskset or in a container
    device = jax.devices()[0]
    kind = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    out = [f"{cores} CPU cores, {platform.machine()}, {platform.system()}; jax runs on {kind}"]
    if load:
        out[0] += f"; load averages before and after: {', '.join(f'{v:.1f}' for v in load)}"
    if load and min(load) > 1.5:  # the benchmark itself is about one, and that only at the end
        out.append(
            "The machine was doing other work at the same time: steps and losses are exact, "
            "seconds and their ratios are indicative only"
        )
    return out


def _table(race: Race) -> list[str]:
    rule = ["---", *["---:"] * (len(HEAD) - 1)]
    return [f"| {' | '.join(line)} |" for line in (HEAD, rule, *map(cells, race.lines))]


def _grids(c: Comparison) -> list[str]:
    out = []
    for key, optimizer in c.optimizers.items():
        rates = ", ".join(f"{rate:g}" for rate in optimizer.learning_rates)
        lengths = ", ".join(map(str, optimizer.schedule_lengths or (c.steps,)))
        text = f"- {optimizer.label or key}: learning rates {rates}; schedule lengths {lengths}"
        out.append(text + (f"; `{optimizer.options}`" if optimizer.options else ""))
    return out


def markdown(c: Comparison, races: list[Race], about: About) -> str:
    """The page. The plot is expected beside it, under the page's name."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [f"# {c.title or c.task}", ""]
    for race in races:
        lines += [f"## {race.variant}", ""] if race.variant else []
        lines += [*_table(race), "", explained(race, c.seeds), ""]
        lines += [f"- {sentence}" for sentence in verdict(race)] + [""]
    lines += ["![Loss against steps and against seconds](PLOT)", ""]
    lines += [f"Made on {date} with", "", "```bash", about.command, "```", ""]
    lines += [f"- {_versions()}", *[f"- {text}" for text in _machine(about.load)]]
    lines.append(
        f"- task `{c.task}` {c.task_options or ''}".rstrip()
        + f", {c.schedule} schedule, evaluated every {c.eval_every} steps, "
        f"seeds {', '.join(map(str, c.seeds))}"
    )
    lines += [f"- left out: {text}" for text in about.left_out]
    return "\n".join([*lines, "", "Tried:", "", *_grids(c), ""])


def publish(path: Path, text: str, plot: Path) -> None:
    """Writes the page and a copy of the plot (where there is one) beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = path.with_suffix(".png")
    if plot.is_file() and plot.resolve() != image.resolve():
        shutil.copyfile(plot, image)
    path.write_text(text.replace("(PLOT)", f"({image.name})"), encoding="utf-8")
