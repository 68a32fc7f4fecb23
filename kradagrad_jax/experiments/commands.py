"""What the commands of the command line do."""

import dataclasses
import shlex
import textwrap
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from threadpoolctl import threadpool_limits

from kradagrad_jax.experiments import config, page, plots, race, summary, wording
from kradagrad_jax.experiments.compare import Findings, execute
from kradagrad_jax.experiments.names import UsageError
from kradagrad_jax.experiments.optimizers import OPTIMIZERS
from kradagrad_jax.experiments.plan import all_series
from kradagrad_jax.experiments.store import PLOT, Store
from kradagrad_jax.experiments.tasks import TASKS

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@dataclasses.dataclass(frozen=True)
class CompareRequest(config.Comparison):
    """Run several optimizers with their learning rates and seeds; print a table, write a plot."""

    only: tuple[str, ...] = ()
    """Optimizers of the configuration to run; all by default."""
    resume: bool = False
    """Go on where an earlier call stopped: finished runs are kept."""
    overwrite: bool = False
    """Throw away what the output folder holds."""


@dataclasses.dataclass(frozen=True)
class BenchmarkRequest(CompareRequest):
    """Steps and seconds of several optimizers to a loss, as ratios to those of the first one."""

    page: str = ""
    """Markdown file to write, with the plot beside it; by default in the output folder."""


@dataclasses.dataclass(frozen=True)
class CompareUsage:
    """Run the comparison described in a file; print a table, write a plot.

    Everything in the file can be overridden after its name: `COMMAND CONFIG.toml --help`.
    """

    config: tyro.conf.Positional[Path]
    """A TOML file, for example configs/digits_autoencoder.toml."""


Request = TypeVar("Request", bound=CompareRequest)


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """Train once."""

    task: tyro.conf.Positional[str]
    """See `kradagrad-jax list`."""
    optimizer: tyro.conf.Positional[str]
    """See `kradagrad-jax list`."""
    learning_rate: float = 1e-3
    steps: int = 500
    """Number of updates."""
    eval_every: int = 25
    """Updates between evaluations."""
    seed: int = 0
    dtype: config.Dtype = "float32"
    """Precision of the optimizer's statistics and roots."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    option: tuple[str, ...] = ()
    """Arguments of the optimizer, for example: --option refresh_every=20 root=newton"""
    task_option: tuple[str, ...] = ()
    """Arguments of the task, for example: --task-option batch_size=50"""
    output: str = ""
    """Folder of log, results and plot, replaced every time; default runs/TASK-OPTIMIZER."""


def list_names(arguments: list[str]) -> int:
    """``kradagrad-jax list``."""
    if arguments:
        raise UsageError("list takes no arguments")
    for title, table in (("tasks", TASKS), ("optimizers", OPTIMIZERS)):
        print(title)
        for name, entry in table.items():
            print(f"  {name:22}{entry.summary}")
    return 0


def _options(pairs: tuple[str, ...], flag: str) -> dict[str, Any]:
    """``key=value`` pairs; values as in TOML, words without quotes as strings."""
    out = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"{flag} wants key=value, got '{pair}'")
        try:
            out[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            out[key] = text
    return out


def run(arguments: list[str]) -> int:
    """``kradagrad-jax run TASK OPTIMIZER``."""
    r = tyro.cli(RunRequest, args=arguments, prog="kradagrad-jax run")
    optimizer = config.OptimizerConfig(
        learning_rates=(r.learning_rate,),
        dtypes=(r.dtype,),
        options=_options(r.option, "--option"),
    )
    comparison = config.Comparison(
        task=r.task,
        optimizers={r.optimizer: optimizer},
        title=f"{r.optimizer} on {r.task}",
        steps=r.steps,
        eval_every=r.eval_every,
        seeds=(r.seed,),
        schedule=r.schedule,
        task_options=_options(r.task_option, "--task-option"),
        output=r.output or f"runs/{r.task}-{r.optimizer}",
    )
    return _conduct(comparison, (), resume=False, overwrite=True, again="")


def _request(kind: type[Request], command: str, arguments: list[str]) -> tuple[Request, str]:
    """What is asked for, and the command line that asks for it from the start."""
    if not arguments or arguments[0].startswith("-"):
        path = tyro.cli(CompareUsage, args=arguments, prog=f"kradagrad-jax {command}").config
        arguments = [str(path)]
    loaded = config.load(Path(arguments[0]))
    request = tyro.cli(
        kind,
        args=arguments[1:],
        default=kind(**vars(loaded)),
        prog=f"kradagrad-jax {command} {arguments[0]}",
    )
    if request.resume and request.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    again = [a for a in arguments if a not in ("--resume", "--overwrite")]
    return request, shlex.join(["kradagrad-jax", command, *again])


def compare(arguments: list[str]) -> int:
    """``kradagrad-jax compare CONFIG``."""
    request, line = _request(CompareRequest, "compare", arguments)
    return _conduct(
        request,
        request.only,
        resume=request.resume,
        overwrite=request.overwrite,
        again=f"{line} --resume",
    )


def benchmark(arguments: list[str]) -> int:
    """``kradagrad-jax benchmark CONFIG``."""
    request, line = _request(BenchmarkRequest, "benchmark", arguments)
    c, left_out = race.available(request)
    for text in left_out:
        print(f"left out: {text}")
    rows = all_series(c, tuple(name for name in request.only if name in c.optimizers))
    store = Store(Path(c.output), resume=request.resume, overwrite=request.overwrite)
    before = page.load_average()
    with threadpool_limits(1, user_api="blas"):
        findings = execute(c, rows, store)
    if findings.done:
        store.log("load", averages=[before, page.load_average()])
    found = race.races(c, rows, findings)
    tables = [summary.Table(r.variant, r.target, [x.row for x in r.lines]) for r in found]
    written = race.write(c, store, found, summary.results(c, tables, findings))
    if plots.draw(tables, c.title, store.folder / PLOT):
        written.append(store.folder / PLOT)
    loads = [value for event in store.events("load") for value in event["averages"] if value]
    about = page.About(line, tuple(left_out), tuple(loads))
    path = Path(request.page) if request.page else store.folder / "page.md"
    page.publish(path, page.markdown(c, found, about), store.folder / PLOT)
    _report_race(c, found, [*written, path])
    return _exit_status(findings, f"{line} --resume")


def _report_race(c: config.Comparison, found: list[race.Race], written: list[Path]) -> None:
    print(f"\n{c.title or c.task}")
    for one in found:
        print(f"\n{one.variant}\n" if one.variant else "")
        table, *text = race.render(one, c.seeds)
        print(table + "\n")
        for sentence in text:
            print(textwrap.fill(sentence, 100))
    print()
    for path in written:
        print(f"{path.name}: {path}")


def _exit_status(findings: Findings, again: str) -> int:
    if not findings.missing:
        return 0
    print(
        f"\ninterrupted with {findings.missing} runs to go"
        + (f"; go on with\n  {again}" if again else "")
    )
    return INTERRUPTED


def _conduct(
    c: config.Comparison, only: tuple[str, ...], *, resume: bool, overwrite: bool, again: str
) -> int:
    """Runs a comparison and reports on it, on an incomplete one too."""
    rows = all_series(c, only)
    store = Store(Path(c.output), resume=resume, overwrite=overwrite)
    # More BLAS threads than one are many times slower on a small busy machine.
    with threadpool_limits(1, user_api="blas"):
        findings = execute(c, rows, store)
    tables = summary.tabulate(c, rows, findings)
    written = [store.write_results(summary.results(c, tables, findings))]
    if plots.draw(tables, c.title, store.folder / PLOT):
        written.insert(0, store.folder / PLOT)
    _report(c, tables, written)
    return _exit_status(findings, again)


def _report(c: config.Comparison, tables: list[summary.Table], written: list[Path]) -> None:
    print(f"\n{c.title or c.task}")
    for table in tables:
        print(f"\n{table.variant}\n" if table.variant else "")
        print(summary.render(table, c.select))
    readings = [text for text in (wording.reading(table) for table in tables) if text]
    print()
    for text in readings:
        print(textwrap.fill(text, 100))
    for path in written:
        print(f"{path.stem}: {path}")
