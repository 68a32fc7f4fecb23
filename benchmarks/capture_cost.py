"""Cost of capturing statistics, as a multiple of plain value_and_grad in the same process.

    python benchmarks/capture_cost.py [--case mlp] [--repeats 12] [--json out.json]

Times are minima over interleaved calls. `unused` are statistics that nobody consumes, `gated` is a
step between two statistics, `every 10` the mean of nine such steps and one with factors. In
brackets: the ratio of the compiled programs' flops.
"""

import argparse
import json
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kradagrad_jax import curvature
from kradagrad_jax.experiments.models import MLP, Attention, CharTransformer

CROSS_ENTROPY = curvature.losses.softmax_cross_entropy()


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 32, 64):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + Attention(4, jnp.dtype("float32"))(nn.LayerNorm()(x))
        h = nn.Dense(1024)(nn.LayerNorm()(x))
        return x + nn.Dense(256)(nn.gelu(h)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(96, 256)(tokens)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = stack()(x, None)
        return nn.Dense(96)(nn.LayerNorm()(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(256, rngs=rngs), nnx.LayerNorm(256, rngs=rngs)
        self.query, self.key = (nnx.Linear(256, 256, rngs=rngs) for _ in range(2))
        self.value, self.out = (nnx.Linear(256, 256, rngs=rngs) for _ in range(2))
        self.up, self.down = nnx.Linear(256, 1024, rngs=rngs), nnx.Linear(1024, 256, rngs=rngs)

    def __call__(self, x):
        y = self.norm1(x)
        q, k, v = (d(y).reshape(*y.shape[:2], 4, -1) for d in (self.query, self.key, self.value))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(96, 256, rngs=rngs)
        for i in range(4):
            setattr(self, f"block{i}", NnxBlock(rngs))
        self.out = nnx.Linear(256, 96, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for i in range(4):
            x = getattr(self, f"block{i}")(x)
        return self.out(x)


def images(n, *shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 10, n), jnp.int32)


def tokens():
    rng = np.random.default_rng(0)
    both = jnp.asarray(rng.integers(0, 96, (2, 16, 64)), jnp.int32)
    return both[0], both[1]


def linen(model, data):
    params = model.init(jax.random.key(0), data[0])["params"]
    return (lambda p, x: model.apply({"params": p}, x)), params, data


def nnx_model():
    graph, params = nnx.split(NnxTransformer(nnx.Rngs(0)), nnx.Param)
    return (lambda p, x: nnx.merge(graph, p)(x)), params, tokens()


CASES = {
    "mlp": lambda: linen(MLP((512, 512, 10)), images(256, 784)),
    "cnn": lambda: linen(ConvNet(), images(64, 28, 28, 1)),
    "transformer": lambda: linen(CharTransformer(96, 64, 4, 256, 4), tokens()),
    "scanned": lambda: linen(Scanned(), tokens()),
    "nnx": nnx_model,
}


def programs(model, likelihood):
    """Functions of (params, inputs, targets, rng, update) by name."""

    def loss(params, x, y):
        return likelihood.value(model(params, x), y)

    def capture(reducer, fisher="empirical", unused=False, gated=False):
        step = curvature.model_value_grad_and_curvature(
            model, likelihood, fisher=fisher, reducer=reducer
        )

        def run(params, x, y, rng, update):
            wanted = update if gated else True
            value, grads, found = step(params, x, y, rng=rng, update_stats=wanted)
            return (value, grads) if unused else (value, grads, found)

        return run

    return {
        "plain": lambda p, x, y, rng, update: jax.value_and_grad(loss)(p, x, y),
        "unused": capture("kron", unused=True),
        "raw": capture("raw"),
        "diagonal": capture("diag"),
        "factors": capture("kron"),
        "reduced": capture("kron_reduce"),
        "gated": capture("kron", gated=True),
        "mc factors": capture("kron", fisher="mc"),
    }


def flops(compiled) -> float:
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list | tuple) else analysis
    return float(analysis["flops"])


def measure(case: str, repeats: int) -> dict[str, float]:
    model, params, (x, y) = CASES[case]()
    arguments = (params, x, y, jax.random.key(1), jnp.asarray(True))
    compiled = {
        name: jax.jit(f).lower(*arguments).compile()
        for name, f in programs(model, CROSS_ENTROPY).items()
    }
    off = (*arguments[:4], jnp.asarray(False))
    best = dict.fromkeys([*compiled, "gated, on"], float("inf"))
    for turn in range(repeats + 1):
        for name, run in compiled.items():
            for label, given in [(name, off if name == "gated" else arguments)] + [
                ("gated, on", arguments)
            ] * (name == "gated"):
                start = time.perf_counter()
                jax.block_until_ready(run(*given))
                if turn:
                    best[label] = min(best[label], time.perf_counter() - start)
    row = {"plain ms": 1e3 * best["plain"]}
    base = flops(compiled["plain"])
    for name in compiled:
        if name != "plain":
            row[name] = best[name] / best["plain"]
            row[f"{name} flops"] = flops(compiled[name]) / base
    row["every 10"] = (9 * best["gated"] + best["gated, on"]) / (10 * best["plain"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", help="write all rows to this file")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {os.cpu_count()} cores")
    rows = {}
    for case in args.case or CASES:
        rows[case] = row = measure(case, args.repeats)
        cells = [
            f"{name} {value:.2f}" + (f" ({row[f'{name} flops']:.2f})" if name != "every 10" else "")
            for name, value in row.items()
            if name != "plain ms" and not name.endswith("flops")
        ]
        print(f"{case:12} plain {row['plain ms']:7.1f} ms  " + "  ".join(cells), flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
