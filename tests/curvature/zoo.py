"""Small losses in plain JAX that together contain every construction the capture knows.

Every entry is ``name: (loss, params, batch)`` made by a function of no arguments; ``loss(params,
*batch)`` is the mean over examples (axis 0 of every array of the batch) of a per-example loss.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ENTRIES = {}


def entry(fn):
    ENTRIES[fn.__name__] = fn
    return fn


def draw(seed):
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.standard_normal(shape))


def quick(fn, *args):
    """``fn(*args)`` compiled as one program and without optimisation: the sizes are tiny."""
    return jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


def square(z):
    """Mean over examples of a per-example loss that is not symmetric in its outputs."""
    return jnp.mean(jnp.sum(jnp.sin(z) * jnp.cos(jnp.arange(z.size // len(z))).reshape(z.shape[1:]),
                            axis=tuple(range(1, z.ndim))))  # fmt: skip


@entry
def mlp():
    d = draw(0)
    p = {"w1": d(4, 6), "b1": d(6), "w2": d(6, 3), "b2": d(3)}

    def loss(p, x):
        return square(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])

    return loss, p, (d(8, 4),)


@entry
def equal_sizes():
    """Batch, time and features all 4: only the doubled trace tells them apart."""
    d = draw(1)
    p = {"w": d(4, 4), "v": d(4, 4)}

    def loss(p, x):
        h = jnp.tanh(jnp.swapaxes(x, 0, 1) @ p["w"])  # (time, example, feature)
        return square(jnp.swapaxes(h, 0, 1) @ p["v"])

    return loss, p, (d(4, 4, 4),)


@entry
def vmapped_torch_layout():
    d = draw(2)
    p = {"w": d(5, 4), "b": d(5), "v": d(3, 5)}

    def one(p, x):
        return p["v"] @ jnp.tanh(p["w"] @ x + p["b"])

    return lambda p, x: square(jax.vmap(partial(one, p))(x)), p, (d(6, 4),)


@entry
def merged_batch():
    """The batch is merged with the time into one axis."""
    d = draw(3)
    p = {"w": d(4, 6), "b": d(6)}

    def loss(p, x):
        n, t, k = x.shape
        h = x.reshape(n * t, k) @ p["w"] + p["b"]
        return square(h.reshape(n, t, -1))

    return loss, p, (d(6, 5, 4),)


@entry
def attention():
    d = draw(4)
    heads, size, width = 2, 3, 6
    p = {k: d(width, heads, size) * 0.5 for k in ("q", "k", "v")}
    p |= {f"b{k}": d(heads, size) for k in ("q", "k", "v")}
    p |= {"o": d(heads, size, width), "bo": d(width), "scale": d(width), "shift": d(width)}

    def loss(p, x):
        z = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3)
        z = z * p["scale"] + p["shift"]
        q, k, v = (jnp.einsum("ntd,dhe->nthe", z, p[c]) + p["b" + c] for c in "qkv")
        a = jax.nn.softmax(jnp.einsum("nthe,nshe->nhts", q, k))
        h = jnp.einsum("nhts,nshe->nthe", a, v)
        return square(x + jnp.einsum("nthe,hed->ntd", h, p["o"]) + p["bo"])

    return loss, p, (d(5, 4, width),)


def _conv(seed, kernel, x_shape, bias=True, numbers=("NHWC", "HWIO", "NHWC"), **kw):
    d = draw(seed)
    p = {"k": d(*kernel)} | ({"b": d(kernel[-1])} if bias else {})
    kw = {"window_strides": (1, 1), "padding": "SAME"} | kw

    def loss(p, x):
        y = lax.conv_general_dilated(x, p["k"], dimension_numbers=numbers, **kw)
        return square(y + p["b"] if bias else y)

    return loss, p, (d(*x_shape),)


@entry
def conv():
    return _conv(5, (3, 2, 2, 4), (4, 6, 5, 2))


@entry
def conv_strided():
    return _conv(6, (3, 3, 2, 4), (4, 7, 6, 2), window_strides=(2, 3), padding="VALID")


@entry
def conv_dilated():
    return _conv(7, (3, 2, 2, 4), (4, 8, 7, 2), rhs_dilation=(2, 3), padding=((1, 2), (0, 3)))


@entry
def conv_transposed():
    return _conv(8, (3, 3, 2, 4), (4, 3, 4, 2), lhs_dilation=(2, 2), padding=((1, 1), (2, 0)))


@entry
def conv_grouped():
    return _conv(9, (3, 3, 2, 6), (4, 5, 5, 4), feature_group_count=2)


@entry
def conv_depthwise():
    return _conv(10, (3, 3, 1, 6), (4, 5, 5, 3), feature_group_count=3)


@entry
def conv_torch_layout():
    numbers = ("NCHW", "OIHW", "NCHW")
    return _conv(11, (4, 2, 3, 3), (4, 2, 5, 5), bias=False, numbers=numbers)


def layers(p, x, wrap=lambda f: f):
    def body(h, layer):
        return jnp.tanh(h @ layer["w"] + layer["b"]), None

    return lax.scan(wrap(body), x, p)[0]


@entry
def scanned():
    d = draw(12)
    p = {"layers": {"w": d(3, 4, 4), "b": d(3, 4)}, "out": d(4, 2)}
    return lambda p, x: square(layers(p["layers"], x) @ p["out"]), p, (d(6, 5, 4),)


@entry
def scanned_remat():
    d = draw(13)
    p = {"layers": {"w": d(3, 4, 4), "b": d(3, 4)}, "out": d(4, 2)}

    def loss(p, x):
        return square(layers(p["layers"], x, jax.checkpoint) @ p["out"])

    return loss, p, (d(6, 5, 4),)


@entry
def rnn():
    """One weight shared over the time steps of a scan."""
    d = draw(14)
    p = {"wx": d(3, 4), "wh": d(4, 4), "b": d(4)}

    def loss(p, x):
        def body(h, u):
            return jnp.tanh(u @ p["wx"] + h @ p["wh"] + p["b"]), h

        h, hs = lax.scan(body, jnp.zeros((len(x), 4), x.dtype), jnp.swapaxes(x, 0, 1))
        return square(h) + square(jnp.swapaxes(hs, 0, 1))

    return loss, p, (d(5, 6, 3),)


@entry
def layers_times_time():
    """Stacked layers, each used at every step of a loop."""
    d = draw(15)
    p = {"w": d(3, 4, 4) * 0.5}

    def loss(p, x):
        def step(h, _):
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["w"])[0], None

        return square(lax.scan(step, x, None, length=5)[0])

    return loss, p, (d(6, 4),)


@entry
def carried_parameters():
    d = draw(16)
    p = {"w": d(4, 4)}

    def loss(p, x):
        def body(_, c):
            return c[0], jnp.tanh(c[1] @ c[0])

        return square(lax.fori_loop(0, 3, body, (p["w"], x))[1])

    return loss, p, (d(6, 4),)


@entry
def experts():
    d = draw(17)
    p = {"w": d(3, 4, 5), "b": d(3, 5)}

    def loss(p, x):
        return square(jnp.einsum("nd,edf->nef", x, p["w"]) + p["b"])

    return loss, p, (d(6, 4),)


@entry
def grouped_dense():
    """Every head has its own inputs and its own weight."""
    d = draw(18)
    p = {"w": d(3, 4, 5), "b": d(3, 5)}
    return (
        lambda p, x: square(jnp.einsum("nthd,hde->nthe", x, p["w"]) + p["b"]),
        p,
        (d(6, 2, 3, 4),),
    )


@entry
def branches():
    d = draw(19)
    p = {"w": d(4, 4), "v": d(4, 4), "u": d(4, 4)}

    def loss(p, x):
        def left(x):
            return lax.cond(x[0, 0] > 9, lambda: x @ p["v"], lambda: jnp.tanh(x @ p["u"]))

        y = lax.cond(jnp.sum(x) < 1e3, left, lambda x: x @ p["w"], x)
        return square(y @ p["w"])

    return loss, p, (d(6, 4),)


@entry
def jitted_and_custom():
    d = draw(20)
    p = {"w": d(4, 5), "v": d(5, 3)}
    dense = jax.jit(lambda w, x: jax.nn.relu(x @ w))

    def loss(p, x):
        h = dense(p["w"], x)
        return square(jax.jit(lambda v, h: jax.nn.silu(h @ v))(p["v"], h) + dense(p["w"], x)[:, :3])

    return loss, p, (d(6, 4),)


@entry
def embedding():
    d = draw(21)
    p = {"table": d(7, 4), "position": d(5, 4), "out": d(4, 3)}
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 7, (6, 5)))
    return (
        lambda p, ids: square(jnp.tanh(p["table"][ids] + p["position"]) @ p["out"]), p, (ids,)
    )  # fmt: skip


@entry
def tied():
    d = draw(22)
    p = {"table": d(7, 4), "w": d(4, 4)}
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 7, (6, 5)))

    def loss(p, ids):
        return square(jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T)

    return loss, p, (ids,)


@entry
def same_weight_twice():
    d = draw(23)
    p = {"w": d(4, 4), "b": d(4)}

    def loss(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return square(jnp.tanh(h @ p["w"] + p["b"]))

    return loss, p, (d(6, 3, 4),)


@entry
def scalars_and_signs():
    d = draw(24)
    p = {"gain": d(), "shift": d(1, 4), "w": d(4, 4), "v": d(4, 4)}

    def loss(p, x):
        return square((x - p["shift"]) @ (2 * p["w"]) * p["gain"] + x @ -p["v"])

    return loss, p, (d(6, 4),)


@entry
def python_indexed():
    d = draw(25)
    p = {"w": d(3, 4, 4), "b": d(3, 4)}

    def loss(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i] + p["b"][i])
        return square(x)

    return loss, p, (d(6, 4),)


@entry
def fused_qkv():
    d = draw(26)
    p = {"w": d(4, 12), "o": d(4, 4)}

    def loss(p, x):
        q, k, v = (x @ w for w in jnp.split(p["w"], 3, axis=1))
        return square((jnp.tanh(q * k) + v) @ p["o"])

    return loss, p, (d(6, 5, 4),)


@entry
def concatenated():
    """As flax's OptimizedLSTMCell: the kernels of the gates are joined before the product."""
    d = draw(27)
    names = "ifgo"
    p = {f"i{k}": d(3, 4) for k in names} | {f"h{k}": d(4, 4) for k in names}
    p |= {f"b{k}": d(4) for k in names}

    def loss(p, x):
        def body(carry, u):
            c, h = carry
            z = u @ jnp.concatenate([p["i" + k] for k in names], axis=-1)
            y = h @ jnp.concatenate([p["h" + k] for k in names], axis=-1)
            z = z + (y + jnp.concatenate([p["b" + k] for k in names], axis=-1))
            i, f, g, o = jnp.split(z, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

        zero = jnp.zeros((len(x), 4), x.dtype)
        return square(lax.scan(body, (zero, zero), jnp.swapaxes(x, 0, 1))[0][1])

    return loss, p, (d(5, 6, 3),)


@entry
def concatenated_inputs():
    d = draw(28)
    p = {"w": d(3, 4), "v": d(2, 4)}

    def loss(p, x, u):
        return square(jnp.concatenate([x, u], 1) @ jnp.concatenate([p["w"], p["v"]], 0))

    return loss, p, (d(5, 3), d(5, 2))
