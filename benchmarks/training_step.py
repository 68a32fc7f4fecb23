"""Times a training step of a benchmark's optimizers, in turn, as multiples of the first one's.

    python benchmarks/training_step.py configs/benchmark_digits_autoencoder.toml [optimizer ..]

`kradagrad-jax benchmark` trains one optimizer after the other, for minutes: on a machine with other
work their seconds belong to different moments. Here every round has all of them.
"""

import os
import sys
from pathlib import Path
from statistics import median

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from kradagrad_jax.experiments import config
from kradagrad_jax.experiments.optimizers import resolve
from kradagrad_jax.experiments.tasks import make_task
from kradagrad_jax.experiments.training import Program

ROUNDS, STEPS = 3, 60  # medians of the former


def main() -> None:
    path, *only = sys.argv[1:]
    c = config.load(Path(path))
    task = make_task(c.task, c.task_options)
    chosen = {key: o for key, o in c.optimizers.items() if not only or key in only}
    programs = {
        key: Program(task, resolve(o.name or key, o.options), STEPS, 20, c.schedule)
        for key, o in chosen.items()
    }
    times: dict[str, list[float]] = {key: [] for key in programs}
    for seed in range(ROUNDS):
        for key, program in programs.items():
            times[key].append(list(program.train(seed, 3e-3))[-1].seconds / STEPS)
    first = median(next(iter(times.values())))
    for key, seconds in times.items():
        print(f"{key:24} {1e3 * median(seconds):8.2f} ms  {median(seconds) / first:6.2f}")


if __name__ == "__main__":
    main()
