"""Two and four processes that train together over gloo, one of which may die."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import flags

pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(name, folder, count, devices, death=0):
    """The processes, and the files that their messages go to."""
    environment = flags.simulating(devices) | {"PYTHONPATH": str(ROOT)}
    port, out = free_port(), []
    folder.mkdir(exist_ok=True)
    for rank in range(count):
        arguments = [rank, count, port, devices, name, folder, death]
        log = (folder / f"log{rank}").open("w")
        command = [sys.executable, "-m", "tests.sharding.process_script", *map(str, arguments)]
        out.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        log.close()
    return out


def finish(processes, folder, timeout=400):
    """Exit codes; as soon as one fails the others, which would wait for it, are killed."""
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in processes):
        failed = any(p.poll() not in (None, 0) for p in processes)
        if failed or time.monotonic() > end:
            for p in processes:
                p.kill()
            break
        time.sleep(0.1)
    return [p.wait() for p in processes]


def train(name, folder, count, devices):
    codes = finish(start(name, folder, count, devices), folder)
    logs = "\n".join((folder / f"log{rank}").read_text()[-2000:] for rank in range(count))
    assert codes == [0] * count, logs
    with np.load(folder / "params.npz") as data:
        return [data[key] for key in data.files]


@pytest.mark.slow
@pytest.mark.parametrize("name, grids", [("shampoo", [(2, 2), (4, 1)]), ("kfac", [(2, 1)])])
def test_processes_agree(name, grids, tmp_path):
    """One device alone, and processes with some devices each."""
    alone = train(name, tmp_path / "1", 1, 1)
    for count, devices in grids:
        together = train(name, tmp_path / f"{count}", count, devices)
        for a, b in zip(alone, together, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), (name, count)


@pytest.mark.slow
def test_death_and_resume(tmp_path):
    """A worker is killed after the checkpoint; a new start ends with the very same bits."""
    straight = train("shampoo", tmp_path / "straight", 2, 1)
    folder = tmp_path / "broken"
    codes = finish(start("shampoo", folder, 2, 1, death=9), folder)
    assert codes[1] == -9 and not (folder / "params.npz").exists()
    resumed = train("shampoo", folder, 2, 1)
    for a, b in zip(straight, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
    # the same checkpoint on another number of devices
    (folder / "params.npz").unlink()
    for a, b in zip(straight, train("shampoo", folder, 1, 4), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
