"""``kradagrad-jax benchmark`` on a problem that takes no time."""

import csv
import json
import sys
import types
from pathlib import Path

import optax
import pytest

from kradagrad_jax.experiments import cli, config, optimizers, peers, race
from kradagrad_jax.experiments.compare import Findings
from kradagrad_jax.experiments.names import UsageError
from kradagrad_jax.experiments.plan import all_series
from kradagrad_jax.experiments.records import Record
from kradagrad_jax.experiments.training import Cost, Evaluation

TOY = """
title = "toy"
task = "quadratic"
steps = 8
eval_every = 2
seeds = [0, 1, 2]
task_options = { n = 4 }

[optimizers.adamw]
label = "AdamW"
learning_rates = [1e-2, 1e-1]
schedule_lengths = [4, 8]

[optimizers.sgd]
learning_rates = [1e-3, 1e-2]

[optimizers.elsewhere]
learning_rates = [1e-3, 1e-2]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """``toy.toml`` in the current folder; one of its optimizers is of an absent package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))
    optimizers.register("elsewhere", "no_such_module:kron", "absent", package="no-such-package")
    Path("toy.toml").write_text(TOY)


def test_a_race_prints_ratios_and_writes_all_files(toy, capsys):
    assert cli.main(["benchmark", "toy.toml", "--page", "docs/toy.md"]) == 0
    out = capsys.readouterr().out
    assert "left out: optimizer 'elsewhere' needs the package no-such-package" in out
    assert "ratio" in out and "100%" in out and "In fewer steps than AdamW: " in out
    results = json.loads(Path("runs/toy/results.json").read_text())
    adamw, sgd = results["benchmark"]
    assert (adamw["optimizer"], sgd["optimizer"]) == ("AdamW", "sgd")
    assert (adamw["tried"], sgd["tried"]) == (4, 2)
    assert adamw["steps_ratio"] == adamw["seconds_ratio"] == 1
    assert sgd["compile_seconds"] > 0 and sgd["step_ms"] > 0
    losses = {}
    for run in results["runs"]:
        if run["series"].startswith("adamw"):
            best = min(point["metrics"]["loss"] for point in run["curve"])
            losses.setdefault((run["series"], run["learning_rate"]), []).append(best)
    assert len(losses) == 4
    assert adamw["target"] == min(sorted(three)[1] for three in losses.values())
    with Path("runs/toy/benchmark.csv").open() as file:
        assert [line["optimizer"] for line in csv.DictReader(file)] == ["AdamW", "sgd"]
    page = Path("docs/toy.md").read_text()
    assert "kradagrad-jax benchmark toy.toml --page docs/toy.md\n" in page
    assert "(toy.png)" in page and Path("docs/toy.png").read_bytes().startswith(b"\x89PNG")
    for text in ("| AdamW |", "optax ", "CPU cores", "schedule lengths 4, 8", "left out: "):
        assert text in page

    # the log is kept: the same runs against a loss that none of them reaches
    again = ["benchmark", "toy.toml", "--resume", "--target", "-1"]
    assert cli.main(again) == 0
    printed = capsys.readouterr()
    assert "[1/" not in printed.err
    assert "AdamW does not reach the target, so there are no ratios." in printed.out
    assert "Target not reached by: AdamW, sgd." in printed.out and "not reached" in printed.out
    results = json.loads(Path("runs/toy/results.json").read_text())
    assert all(line["steps"] is line["seconds_ratio"] is None for line in results["benchmark"])
    assert Path("runs/toy/page.md").is_file()


def findings(rows, curves):
    """Records of losses at steps 10, 20, ..., a second per 10 steps."""
    records = {row.key: [] for row in rows}
    for (key, rate), seeds in curves.items():
        for seed, losses in enumerate(seeds):
            points = [Evaluation(10 * i, float(i), None, {"loss": v}) for i, v in enumerate(losses)]
            records[key].append(Record(rate, seed, points))
    return Findings(records, {row.key: Cost(1.0, 8, 8, 2.0) for row in rows}, 0)


def test_settings_are_chosen_by_steps_and_medians_decide():
    text = """
    task = "digits"
    steps = 30
    seeds = [0, 1, 2]
    [optimizers.adamw]
    learning_rates = [1, 2]
    schedule_lengths = [20, 30]
    [optimizers.muon]
    learning_rates = [1, 2]
    [optimizers.sgd]
    learning_rates = [1, 2]
    """
    c = config.parse(text, "here")
    rows = all_series(c)
    short, long, muon, sgd = (row.key for row in rows)
    assert (short, long) == ("adamw/float32/20", "adamw/float32/30")
    curves = {
        (short, 1): [[9, 8, 6]] * 3,
        (short, 2): [[9, 8, 5]] * 3,
        (long, 1): [[9, 7, 6, 5], [9, 7, 6, 4], [9, 7, 6, 1]],  # the median is the target: 4
        (long, 2): [[9, 7, 6, 5]] * 3,
        (muon, 1): [[9, 4, 4, 3], [9, 4, 4, 3], [9, 9, 9, 9]],  # two of three are there at 10
        (muon, 2): [[9, 8, 4, 2]] * 3,
        (sgd, 1): [[9, 4], [9, 8], [9, 8]],  # one of three is not enough
        (sgd, 2): [[9, 7]] * 3,
    }
    (found,) = race.races(c, rows, findings(rows, curves))
    assert found.target == 4
    first, second, third = found.lines
    assert (first.schedule_length, first.steps, first.reached) == (30, 30, 2)
    assert (second.row.learning_rate, second.steps, second.reached) == (1, 10, 2)
    assert second.best_loss == 2  # of another learning rate
    assert second.steps_ratio == second.seconds_ratio == pytest.approx(1 / 3)
    assert (third.steps, third.seconds, third.steps_ratio, third.best_loss) == (None, None, None, 7)
    assert race.label(first) == "adamw"
    assert race.verdict(found)[0] == "In fewer steps than adamw: muon (33%)."
    assert "Target not reached by: sgd." in race.verdict(found)


def test_schedule_lengths_are_checked():
    with pytest.raises(UsageError, match=r"\[optimizers.sgd\]: schedule_lengths must be at least"):
        config.parse('task = "digits"\n[optimizers.sgd]\nschedule_lengths = [0]', "here")


def test_peers_are_imported_on_use_and_kept_quiet(monkeypatch, capsys):
    def kron(learning_rate, b1=0.9):
        sgd = optax.sgd(learning_rate, b1)
        return optax.GradientTransformation(lambda p: print("noise") or sgd.init(p), sgd.update)

    monkeypatch.setitem(sys.modules, "psgdax", types.SimpleNamespace(kron=kron))
    assert optimizers.absent("psgd_kron") == "" == optimizers.absent("adamw")
    tx = optimizers.resolve("psgd_kron", {"b1": 0.5})(0.1)
    tx.init({"w": 1.0})
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="no option 'b2'"):
        optimizers.resolve("psgd_kron", {"b2": 0.5})
    monkeypatch.setitem(sys.modules, "psgdax", None)
    assert "needs the package psgdax" in optimizers.absent("psgd_kron")
    with pytest.raises(AttributeError, match="no attribute nothing"):
        peers.nothing  # noqa: B018
