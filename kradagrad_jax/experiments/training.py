"""The training loop: jitted chunks of steps between evaluations, on plain pytrees."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.experiments.optimizers import Recipe
from kradagrad_jax.experiments.statistics import measure, spec_of
from kradagrad_jax.experiments.tasks import Task


@contextlib.contextmanager
def float64_mode(enabled: bool) -> Iterator[None]:
    """jax's 64-bit mode for a whole run, restored afterwards."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


class Evaluation(NamedTuple):
    """One point of a learning curve.

    Attributes:
      step: number of updates done.
      seconds: wall time of those updates, without compilation and evaluation.
      train_loss: mean loss over the batches since the last evaluation (None at step 0).
      metrics: what the task evaluates, ``"loss"`` among it.
    """

    step: int
    seconds: float
    train_loss: float | None
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.metrics["loss"]) and math.isfinite(self.train_loss or 0.0)


def learning_rate_schedule(kind: str, peak: Any, steps: int) -> Any:
    """``peak``, or for ``kind`` "linear" and "cosine" its decay to zero over ``steps``."""
    if kind == "constant":
        return peak
    if kind == "linear":
        return lambda count: peak * (1 - count / steps)
    return lambda count: peak * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))


class Program:
    """An optimizer on a task, compiled once for all seeds and learning rates.

    Enter :func:`float64_mode` around every use if the task or the optimizer needs it.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Recipe,
        steps: int,
        eval_every: int,
        schedule: str = "constant",
    ):
        self.task, self.optimizer, self.schedule = task, optimizer, schedule
        self.steps, self.eval_every = steps, eval_every
        self._spec: Any = None
        self._measure = measure(task, optimizer.capture)
        self._init = jax.jit(lambda params, rate: self.tx(rate).init(params))
        self._chunk = jax.jit(self._run_chunk, donate_argnums=0)
        self._evaluate = jax.jit(task.evaluate)
        self._compiled: dict[int, Any] = {}
        self.compile_seconds = 0.0
        """Spent so far on tracing and compiling the steps."""

    def tx(self, learning_rate: Any) -> optax.GradientTransformation:
        """The optimizer as the task runs it."""
        rate = learning_rate_schedule(self.schedule, learning_rate, self.steps)
        if self.optimizer.wants_spec and self._spec is None:
            with jax.ensure_compile_time_eval():
                self._spec = spec_of(self.task)
        tx = self.task.wrap(self.optimizer(rate, self._spec))
        return optax.with_extra_args_support(tx)

    def _run_chunk(
        self, carry: Any, data: Any, batches: jax.Array, learning_rate: Any, key: jax.Array
    ) -> Any:
        """Steps of a compiled loop, or, for one batch, a single step."""
        tx = self.tx(learning_rate)

        def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
            params, state, count = carry
            loss, grads, extra = self._measure(params, data, batch, key, count)
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state, count + 1), loss

        if not self.task.scan:
            return step(carry, batches)
        carry, losses = jax.lax.scan(step, carry, batches)
        return carry, jnp.mean(losses)

    def _compile(self, part: jax.Array, *others: Any) -> Any:
        """Chunk of steps as one call; compilation stays out of all timings."""
        carry, data, rate, key = others
        length = len(part) if self.task.scan else 0
        first = part if self.task.scan else part[0]
        if length not in self._compiled:
            began = time.perf_counter()
            lowered = self._chunk.lower(carry, data, first, rate, key)
            self._compiled[length] = lowered.compile()
            self.compile_seconds += time.perf_counter() - began
        run = self._compiled[length]
        if self.task.scan:
            return run

        def one_by_one(carry: Any, data: Any, part: jax.Array, *rest: Any) -> Any:
            losses = []
            for batch in part:
                carry, loss = run(carry, data, batch, *rest)
                losses.append(loss)
            return carry, jnp.mean(jnp.stack(losses))

        return one_by_one

    def train(self, seed: int, learning_rate: float) -> Iterator[Evaluation]:
        """Trains and yields an evaluation at step 0 and after every chunk.

        Stops early, after yielding it, at an evaluation that is not finite.
        """
        params, data = self.task.setup(seed)
        batches = jnp.asarray(self.task.order(seed, self.steps))
        rate = jnp.asarray(learning_rate, jnp.float32)
        key = jax.random.key(seed)
        count = jnp.zeros((), jnp.int32)
        carry = (jax.tree.map(jnp.copy, params), self._init(params, rate), count)
        yield self._evaluation(carry, data, 0, 0.0, None)
        seconds = 0.0
        for start in range(0, self.steps, self.eval_every):
            part = batches[start : start + self.eval_every]
            run = self._compile(part, carry, data, rate, key)
            began = time.perf_counter()
            carry, loss = jax.block_until_ready(run(carry, data, part, rate, key))
            seconds += time.perf_counter() - began
            point = self._evaluation(carry, data, start + len(part), seconds, float(loss))
            yield point
            if not point.finite:
                return

    def _evaluation(
        self, carry: Any, data: Any, step: int, seconds: float, train_loss: float | None
    ) -> Evaluation:
        metrics = self._evaluate(carry[0], data)
        return Evaluation(step, seconds, train_loss, {k: float(v) for k, v in metrics.items()})


class Cost(NamedTuple):
    """What an optimizer costs on a task.

    Attributes:
      update_ms: milliseconds of one update alone, without the gradient: mean over refresh periods.
      state_bytes: size of the optimizer's state.
      parameter_bytes: size of the parameters.
      compile_seconds: of the training steps; None where nothing was trained before.
    """

    update_ms: float
    state_bytes: int
    parameter_bytes: int
    compile_seconds: float | None = None


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure_cost(program: Program, *, steps: int = 40, repeats: int = 3) -> Cost:
    """Times updates on real gradients: the best of ``repeats`` means over ``steps`` of them."""
    task = program.task
    params, data = task.setup(0)
    batch = jnp.asarray(task.order(0, 1))[0]
    step = jnp.zeros((), jnp.int32)
    _, grads, extra = jax.jit(measure(task, program.optimizer.capture))(
        params, data, batch, jax.random.key(0), step
    )
    tx = program.tx(jnp.float32(1e-3))
    update = jax.jit(tx.update, donate_argnums=1)
    state = jax.jit(tx.init)(params)
    size = _bytes(state)
    for _ in range(3):  # compile, and pass the first steps of the optimizer's own schedule
        state = jax.block_until_ready(update(grads, state, params, **extra))[1]
    means = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(steps):
            state = update(grads, state, params, **extra)[1]
        jax.block_until_ready(state)
        means.append((time.perf_counter() - began) / steps)
    return Cost(1e3 * min(means), size, _bytes(params), program.compile_seconds or None)
