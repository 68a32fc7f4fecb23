"""linen and nnx models: a convolutional net, a language model (plain and scanned), LSTMs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class CNN(nn.Module):
    """Strided, depthwise and plain convolutions, group norm, a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.Conv(4, (3, 3), feature_group_count=4)(x)
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.relu(nn.Conv(6, (3, 3), kernel_dilation=2, use_bias=False)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class BatchNormNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(6)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(jnp.tanh(x))


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=self.width)(h, h)
        h = nn.Dense(2 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(h)), None


class LM(nn.Module):
    """Character model; ``scan`` stacks its blocks in a scan with rematerialisation."""

    scan: bool = False
    width: int = 8
    vocabulary: int = 11

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.width)(ids)
        x = x + self.param("position", nn.initializers.normal(1.0), (ids.shape[1], self.width))
        if self.scan:
            block = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = block(self.width)(x, None)
        else:
            x, _ = Block(self.width)(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class LSTM(nn.Module):
    """``fast``: the cell that concatenates the kernels of its gates."""

    fast: bool

    @nn.compact
    def __call__(self, x):
        cell = nn.OptimizedLSTMCell if self.fast else nn.LSTMCell
        return nn.Dense(2)(nn.RNN(cell(4, param_dtype=x.dtype))(x))


class NnxBlock(nnx.Module):
    def __init__(self, width, rngs, dtype=jnp.float32):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.norm1, self.norm2 = nnx.LayerNorm(width, **kw), nnx.LayerNorm(width, **kw)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, **kw)
        self.up, self.down = nnx.Linear(width, 2 * width, **kw), nnx.Linear(2 * width, width, **kw)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxLM(nnx.Module):
    def __init__(self, rngs, scan=False, width=8, vocabulary=11, dtype=jnp.float32):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(vocabulary, width, **kw)
        self.scan = scan
        if scan:
            make = nnx.vmap(lambda key: NnxBlock(width, nnx.Rngs(key), dtype))
            self.block = make(jax.random.split(rngs.params(), 2))
        else:
            self.block = NnxBlock(width, rngs, dtype)
        self.head = nnx.Linear(width, vocabulary, **kw)

    def __call__(self, ids):
        x = self.embed(ids)
        if self.scan:
            scan = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.head(scan(x, self.block))
        return self.head(self.block(x))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))
