"""What compiling one update costs, and the memory that it needs, on the parameters of GPT-2.

    python benchmarks/compile_cost.py adam shampoo [--layers 12 24 48] [--scanned 12] [--json out]

Nothing of the size of the model is allocated: programs are compiled for ShapeDtypeStructs. Names
are aliases of `kradagrad_jax` that need gradients alone, or `adam` (optax's). CPU seconds are those
of this process (all of its threads), of tracing, and of lowering and compiling together, with the
default flags and without the persistent cache. ``temp`` is XLA's assignment of buffers that live
within one update, ``donated`` the same where the update may overwrite its state.
"""

import argparse
import json
import math
import os
import time
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax

import kradagrad_jax as kj

WIDTH, VOCABULARY, CONTEXT = 768, 50257, 1024


def layer(stack: tuple[int, ...] = ()) -> dict[str, Any]:
    """Shapes of one transformer layer; ``stack``: axes in front, of scanned layers."""

    def dense(m: int, n: int) -> dict[str, Any]:
        return {"kernel": (*stack, m, n), "bias": (*stack, n)}

    def norm() -> dict[str, Any]:
        return {"scale": (*stack, WIDTH), "bias": (*stack, WIDTH)}

    return {
        "ln_1": norm(),
        "attn": {"qkv": dense(WIDTH, 3 * WIDTH), "proj": dense(WIDTH, WIDTH)},
        "ln_2": norm(),
        "mlp": {"fc": dense(WIDTH, 4 * WIDTH), "out": dense(4 * WIDTH, WIDTH)},
    }


def gpt2(layers: int, scanned: bool) -> dict[str, Any]:
    """ShapeDtypeStructs of the model, its layers one by one or as one stack."""
    outer: dict[str, Any] = {
        "wte": (VOCABULARY, WIDTH),
        "wpe": (CONTEXT, WIDTH),
        "ln_f": {"scale": (WIDTH,), "bias": (WIDTH,)},
    }
    body = {"layers": layer((layers,))} if scanned else {f"h{i}": layer() for i in range(layers)}
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        outer | body,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def optimizer(name: str, scanned: bool) -> optax.GradientTransformation:
    """The optimizer at its defaults; scanned layers are declared."""
    if name == "adam":
        return optax.adam(1e-3)
    options: dict[str, Any] = {"batch_size": 1} if name == "sirfshampoo" else {}
    if name in ("tnt", "ginger"):
        options["fisher"] = "empirical"
    if scanned:
        options["layout"] = kj.Layout(stacked="^layers/")
    return getattr(kj, name)(1e-3, **options)


def size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def measure(name: str, layers: int, scanned: bool) -> dict[str, Any]:
    """Costs of one optimizer on one model."""
    params, tx = gpt2(layers, scanned), optimizer(name, scanned)
    state = jax.eval_shape(tx.init, params)
    number = size(params)
    out: dict[str, Any] = {
        "optimizer": name,
        "layers": layers,
        "scanned": scanned,
        "parameters": number,
        "state": sum(size(x) * x.dtype.itemsize for x in jax.tree.leaves(state)) / number,
    }
    for key, donated in (("temp", ()), ("donated", (1,))):
        jitted = jax.jit(tx.update, donate_argnums=donated)
        start = time.process_time()
        traced = jitted.trace(params, state, params)
        between = time.process_time()
        compiled = traced.lower().compile()
        if key == "temp":
            out["trace_s"] = between - start
            out["compile_s"] = time.process_time() - between
        memory = compiled.memory_analysis()
        out[key] = None if memory is None else memory.temp_size_in_bytes / number
        jax.clear_caches()
    return out


COLUMNS = ("optimizer", "layers", "scanned", "trace_s", "compile_s", "temp", "donated", "state")
HEADERS = ("optimizer", "layers", "scanned", "trace s", "compile s", "temp B/p", "donated B/p",
           "state B/p")  # fmt: skip


def show(cells: Any) -> str:
    texts = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells]
    return "  ".join(text.rjust(max(12, len(text))) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["adam", "shampoo"])
    parser.add_argument("--layers", nargs="*", type=int, default=[12, 24, 48], help="unrolled")
    parser.add_argument("--scanned", nargs="*", type=int, default=[12])
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    cases = [(n, False) for n in args.layers] + [(n, True) for n in args.scanned]
    measure("adam", 1, False)  # what is started or imported once is nobody's cost
    results = []
    print(show(HEADERS))
    for layers, scanned in cases:
        for name in args.names:
            results.append(measure(name, layers, scanned))
            print(show(results[-1][c] for c in COLUMNS), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"jax": jax.__version__, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
