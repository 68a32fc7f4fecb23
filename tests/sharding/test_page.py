"""The recipes of docs/scaling.md, as a reader would copy them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags
from tests.sharding.test_processes import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
ONE_HOST, TWO_PROCESSES, CHECKPOINT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def start(path, *arguments):
    environment = flags.default_environment()
    environment.pop("JAX_PLATFORMS", None)
    return subprocess.Popen(
        [sys.executable, path, *arguments],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_one_host(tmp_path):
    path = tmp_path / "one.py"
    path.write_text(ONE_HOST)
    out, err = start(path).communicate(timeout=300)
    assert re.search(r"loss \d+\.\d+", out), err[-2000:]
    assert "(8, 256, 256) of which a device holds (1, 256, 256)" in out


@pytest.mark.slow
def test_two_processes(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(TWO_PROCESSES.replace("9911", str(free_port())))
    running = [start(path, str(rank)) for rank in range(2)]
    results = [p.communicate(timeout=300) for p in running]
    assert re.search(r"2 devices, 2 processes, loss \d+\.\d+", results[0][0]), results[0][1][-2000:]
    assert [p.returncode for p in running] == [0, 0], results[1][1][-2000:]


@pytest.mark.slow
def test_checkpoint(tmp_path):
    """The lines on checkpoints, behind a training step of the first recipe."""
    pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    path = tmp_path / "checkpoint.py"
    before = f"\nfolder, step, before = {str(tmp_path / 'saved')!r}, 20, state\n"
    after = "\nmanager.close()\npairs = zip(*map(jax.tree.leaves, (before, state)))\n"
    equal = "assert all(bool((a == b).all()) for a, b in pairs)\n"
    path.write_text(ONE_HOST + before + CHECKPOINT + after + equal)
    process = start(path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
