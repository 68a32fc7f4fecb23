"""The command line from end to end, on a problem that takes no time."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from kradagrad_jax.experiments import cli, compare, store, training

RUNS = 8


def log_lines(folder, event):
    lines = (Path(folder) / store.LOG).read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def results(folder):
    return json.loads((Path(folder) / store.RESULTS).read_text())


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in the middle of the fourth run; call it to let later runs through."""
    real, started = training.Program.train, []

    def train(self, seed, learning_rate):
        started.append((seed, learning_rate))
        for point in real(self, seed, learning_rate):
            yield point
            if len(started) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(training.Program, "train", train)
    return lambda: monkeypatch.setattr(training.Program, "train", real)


def test_compare_prints_a_table_and_writes_all_files(tiny, capsys):
    assert cli.main(["compare", "tiny.toml"]) == 0
    printed = capsys.readouterr()
    assert "best loss" in printed.out and "ms/update" in printed.out
    assert "AdamW" in printed.out and "Lower loss is better" in printed.out
    assert f"[{RUNS}/{RUNS}]" in printed.err  # no terminal: a line per run, no bar
    assert (Path("runs/tiny") / store.PLOT).read_bytes().startswith(b"\x89PNG")
    assert len(log_lines("runs/tiny", "run")) == RUNS
    assert len(log_lines("runs/tiny", "evaluation")) == 3 * RUNS
    (table,) = results("runs/tiny")["tables"]
    sgd, adamw = table["rows"]
    assert (sgd["label"], adamw["label"]) == ("sgd", "AdamW")
    by_rate = {}
    for run in results("runs/tiny")["runs"]:
        if run["series"].startswith("sgd"):
            losses = [p["metrics"]["loss"] for p in run["curve"]]
            by_rate.setdefault(run["learning_rate"], []).append(min(losses))
    best = min(by_rate, key=lambda rate: sum(by_rate[rate]))
    assert sgd["learning_rate"] == best and sgd["edge"]
    assert sgd["loss"] == pytest.approx(sum(by_rate[best]) / 2)
    assert adamw["state_bytes"] == 2 * 4 * 16 + 4 + 4 * 16  # mu, nu, count; the task's momentum
    assert adamw["update_ms"] > 0


def test_equal_seeds_give_equal_runs(tiny):
    for folder in ("a", "b"):
        assert cli.main(["compare", "tiny.toml", "--output", folder, "--only", "adamw"]) == 0
    first, second = (
        [[p["metrics"] for p in run["curve"]] for run in results(folder)["runs"]]
        for folder in ("a", "b")
    )
    assert first == second


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(tiny, interrupted, capsys):
    assert cli.main(["compare", "tiny.toml"]) == 130
    out = capsys.readouterr().out
    assert "interrupted with 5 runs to go" in out
    assert "kradagrad-jax compare tiny.toml --resume" in out
    assert "not run" in out  # the table has AdamW's row all the same
    assert results("runs/tiny")["missing_runs"] == 5
    first = log_lines("runs/tiny", "run")
    assert len(first) == 3 and (Path("runs/tiny") / store.PLOT).is_file()

    interrupted()
    assert cli.main(["compare", "tiny.toml", "--resume"]) == 0
    both = log_lines("runs/tiny", "run")
    assert both[:3] == first and len(both) == RUNS
    assert len(log_lines("runs/tiny", "cost")) == 2
    assert results("runs/tiny")["missing_runs"] == 0

    assert cli.main(["compare", "tiny.toml", "--resume"]) == 0  # nothing left to do
    assert len(log_lines("runs/tiny", "run")) == RUNS


def test_resume_runs_again_what_was_configured_differently(tiny, capsys):
    assert cli.main(["compare", "tiny.toml", "--only", "sgd"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", "tiny.toml", "--only", "sgd", "--resume", "--seeds", "0", "2"]) == 0
    assert "[2/2]" in capsys.readouterr().err
    assert cli.main(["compare", "tiny.toml", "--only", "sgd", "--resume", "--steps", "3"]) == 0
    assert "[4/4]" in capsys.readouterr().err


def test_a_log_cut_short_is_resumed(tiny, interrupted, capsys):
    cli.main(["compare", "tiny.toml"])
    interrupted()
    with (Path("runs/tiny") / store.LOG).open("a") as file:
        file.write('{"event": "run", "settings": {"tas')
    capsys.readouterr()
    assert cli.main(["compare", "tiny.toml", "--resume"]) == 0
    assert "[5/5]" in capsys.readouterr().err


def test_results_are_not_overwritten_by_accident(tiny, capsys):
    assert cli.main(["compare", "tiny.toml", "--only", "sgd"]) == 0
    assert cli.main(["compare", "tiny.toml", "--only", "sgd"]) == 2
    assert "holds 4 finished runs: --resume" in capsys.readouterr().err
    assert cli.main(["compare", "tiny.toml", "--only", "sgd", "--overwrite"]) == 0
    assert len(log_lines("runs/tiny", "run")) == 4
    assert cli.main(["compare", "tiny.toml", "--resume", "--overwrite"]) == 2


def test_diverged_runs_are_told_apart(tiny, capsys):
    arguments = ["--only", "sgd", "--optimizers.sgd.learning-rates", "10", "0.001"]
    assert cli.main(["compare", "tiny.toml", "--steps", "600", *arguments]) == 0
    assert "lr 10, seed 0: diverged" in capsys.readouterr().err
    (row,) = results("runs/tiny")["tables"][0]["rows"]
    assert row["learning_rate"] == 0.001 and row["loss"] > 0
    assert cli.main(["compare", "tiny.toml", "--steps", "600", *arguments, "--resume"]) == 0
    capsys.readouterr()
    only_bad = [*arguments[:-1], "--overwrite", "--steps", "600"]
    assert cli.main(["compare", "tiny.toml", *only_bad]) == 0
    assert "diverged" in capsys.readouterr().out


def test_float64_rows_and_variants(tiny, capsys):
    tiny.write_text(
        """
        task = "quadratic"
        steps = 4
        eval_every = 2
        select = "final"
        [variants.flat]
        n = 3
        q = 1
        [variants.steep]
        n = 4
        [optimizers.shampoo]
        learning_rates = [1e-2]
        dtypes = ["float32", "float64"]
        """
    )
    assert cli.main(["compare", "tiny.toml"]) == 0
    out = capsys.readouterr().out
    assert "flat: Lower loss is better. Float32 gets within 5% of float64 with 'shampoo'." in out
    tables = results("runs/tiny")["tables"]
    assert [t["variant"] for t in tables] == ["flat", "steep"]
    low, high = tables[1]["rows"]
    assert high["state_bytes"] > low["state_bytes"]
    assert 0 < abs(high["loss"] - low["loss"]) < 0.01 * high["loss"]


def test_run(tiny, capsys):
    command = ["run", "quadratic", "shampoo", "--steps", "4", "--eval-every", "2"]
    command += ["--option", "refresh_every=2", "graft=sgd", "--task-option", "n=5"]
    assert cli.main(command) == 0
    assert "shampoo on quadratic" in capsys.readouterr().out
    (run,) = log_lines("runs/quadratic-shampoo", "run")
    assert run["settings"]["options"] == {"refresh_every": 2, "graft": "sgd"}
    assert run["settings"]["task_options"] == {"n": 5}
    assert cli.main(command) == 0  # replaces it


def test_list_names_everything(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("quadratic", "fashion_autoencoder", "adamw", "kradagrad_star", "shampoo_sqrt"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lits"], "unknown command 'lits'; did you mean 'list'?"),
        (["list", "all"], "list takes no arguments"),
        (["compare", "tin.toml"], "there is no configuration tin.toml (there are: tiny.toml)"),
        (["compare", "tiny.toml", "--only", "sdg"], "the configuration has sgd, adamw"),
        (["compare", "tiny.toml", "--task", "quadratics"], "did you mean 'quadratic'?"),
        (["run", "digits", "shampo"], "did you mean 'shampoo'?"),
        (["run", "digits", "adamw", "--option", "b1"], "--option wants key=value, got 'b1'"),
    ],
)
def test_mistakes_end_with_one_line(tiny, capsys, arguments, message):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("kradagrad-jax: ") and error.count("\n") == 1


def test_wrong_overrides_end_with_the_parsers_message(tiny, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "tiny.toml", "--steps", "0"])
    assert "steps must be at least 1, got 0" in capsys.readouterr().err


def test_no_command_prints_the_usage(capsys):
    assert cli.main([]) == 0
    assert "compare CONFIG.toml" in capsys.readouterr().out


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    for name in ("commands", "cli"):
        monkeypatch.delitem(sys.modules, f"kradagrad_jax.experiments.{name}", raising=False)
    monkeypatch.delattr("kradagrad_jax.experiments.commands", raising=False)
    assert cli.main(["list"]) == 2
    assert "pip install 'kradagrad-jax[experiments]'" in capsys.readouterr().err


def test_bar_only_on_a_terminal(monkeypatch, capsys):
    settings = types.SimpleNamespace(settings={"steps": 10})
    runs = [compare.Run(settings, 0.1, 0)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = compare.Progress(runs)
    bar.close()
    assert "0/10" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_for_real(tiny):
    """An interrupt signal to the process itself, while it trains."""
    root = Path(__file__).parents[2]
    # a shell's background jobs are born deaf to the signal
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from kradagrad_jax.experiments.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "compare", str(tiny)]
    process = subprocess.Popen(
        [*command, "--steps", "50000"],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    log = Path("runs/tiny") / store.LOG
    try:
        for _ in range(2400):  # a busy machine takes its time to import jax
            if log.is_file() and '"event": "run"' in log.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "interrupted with" in out and "--steps 50000 --resume" in out
    assert results("runs/tiny")["runs"]
