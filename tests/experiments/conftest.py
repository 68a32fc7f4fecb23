"""A tiny comparison in a folder of its own."""

from pathlib import Path

import pytest

TINY = """
title = "tiny"
task = "quadratic"
steps = 6
eval_every = 3
seeds = [0, 1]
task_options = {{ n = 4 }}
{extra}

[optimizers.sgd]
learning_rates = [1e-3, 1e-4]
options = {{ momentum = 0.0 }}

[optimizers.adamw]
label = "AdamW"
learning_rates = [1e-2, 1e-1]
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tiny.toml`` in the current folder: 2 optimizers x 2 learning rates x 2 seeds."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(extra=""))
    return path
