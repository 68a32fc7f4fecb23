"""Comparisons from TOML."""

from pathlib import Path

import pytest

from kradagrad_jax.experiments import config, race
from kradagrad_jax.experiments.names import UsageError
from kradagrad_jax.experiments.plan import all_series, runs_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
HEAD = 'task = "digits"\n'
SGD = "[optimizers.sgd]\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_is_sound(path):
    c, _ = race.available(config.load(path))
    series = all_series(c)
    assert len({s.key for s in series}) == len(series) >= 2
    grids = {len(s.learning_rates) for s in series}
    assert len(grids) == 1, "optimizers are compared with grids of equal size"
    assert c.output == f"runs/{path.stem}"


def test_there_are_configs():
    assert {"quickstart", "quadratic", "digits"} <= {path.stem for path in CONFIGS}


def test_values_and_defaults():
    text = (
        HEAD + "steps = 7\nseeds = [3]\n[optimizers.a]\nname = 'adamw'\nlearning_rates = [1, 0.5]"
    )
    c = config.parse(text, "here")
    assert (c.task, c.steps, c.seeds, c.output) == ("digits", 7, (3,), "runs/here")
    assert c.optimizers["a"] == config.OptimizerConfig(name="adamw", learning_rates=(1, 0.5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = ", "here is not valid TOML"),
        (SGD, "here lacks 'task'"),
        (HEAD, "here lacks 'optimizers'"),
        (HEAD + "optimizers = {}", "at least one table"),
        (HEAD + "optimizers = 3", "optimizers must be a table, got 3"),
        (HEAD + "[optimizers]\nsgd = 3", r"\[optimizers.sgd\] must be a table"),
        (HEAD + "step = 3\n" + SGD, "did you mean 'steps'"),
        (HEAD + "steps = 0\n" + SGD, "steps must be at least 1, got 0"),
        (HEAD + "steps = true\n" + SGD, "steps must be a whole number, got True"),
        (HEAD + "seeds = []\n" + SGD, "seeds must not be empty"),
        (HEAD + "target = 'low'\n" + SGD, "target must be a number, got 'low'"),
        (HEAD + "select = 'last'\n" + SGD, "select must be 'best' or 'final', got 'last'"),
        (HEAD + SGD + "learning_rate = [1]", "did you mean 'learning_rates'"),
        (HEAD + SGD + "learning_rates = 1", "learning_rates must be a list, each a number, got 1"),
        (HEAD + SGD + "learning_rates = []", "at least one of learning_rates"),
        (HEAD + SGD + "dtypes = ['float16']", "dtypes must be a list, each 'float32' or 'float64'"),
    ],
)
def test_mistakes_name_the_place(text, message):
    with pytest.raises(UsageError, match=message):
        config.parse(text, "here")


def test_absent_file_lists_its_neighbours(tiny):
    with pytest.raises(UsageError, match=r"no configuration .*tin\.toml \(there are: .*tiny\.toml"):
        config.load(tiny.with_name("tin.toml"))


def test_variants_dtypes_and_grids_multiply():
    text = (
        HEAD
        + """
        seeds = [0, 1, 2]
        [variants.a]
        batch_size = 10
        [variants.b]
        batch_size = 20
        [optimizers.sgd]
        [optimizers.shampoo]
        dtypes = ["float32", "float64"]
        learning_rates = [0.1, 0.2]
    """
    )
    c = config.parse(text, "here")
    series = all_series(c)
    assert [s.key for s in series] == [
        f"{v}/{o}" for v in "ab" for o in ("sgd/float32", "shampoo/float32", "shampoo/float64")
    ]
    assert series[2].label == "shampoo, float64"
    assert series[2].settings["options"] == {"factor_dtype": "float64"}
    assert series[4].settings["task_options"] == {"batch_size": 20}
    assert len(runs_of(series[1], c.seeds)) == 6
    assert len({run.identity for s in series for run in runs_of(s, c.seeds)}) == 30


def test_float64_needs_an_optimizer_that_has_it():
    c = config.parse(HEAD + SGD + "dtypes = ['float64']", "here")
    with pytest.raises(UsageError, match=r"\[optimizers.sgd\].*no option 'factor_dtype'"):
        all_series(c)
