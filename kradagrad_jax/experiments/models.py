"""The Flax models of the tasks. Their parameters are plain dicts of arrays."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Activation = Literal["relu", "tanh", "sigmoid"]


class MLP(nn.Module):
    """Dense layers with ReLU (or what is asked for) between them.

    Attributes:
      widths: outputs of every layer, the last one without activation.
      activation: between the layers.
    """

    widths: Sequence[int]
    activation: Activation = "relu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, inputs)`` to ``(n, widths[-1])``."""
        between = getattr(nn, self.activation)
        for i, width in enumerate(self.widths):
            x = nn.Dense(width)(x if i == 0 else between(x))
        return x


class Autoencoder(nn.Module):
    """Encoder and its mirror image, linear code, logits of the pixels.

    Attributes:
      widths: pixels first, code last, e.g. ``(64, 128, 64, 32, 16)``.
      activation: between the layers.
    """

    widths: Sequence[int]
    activation: Activation = "relu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, pixels)`` to ``(n, pixels)``."""
        code = MLP(tuple(self.widths[1:]), self.activation, name="encoder")(x)
        return MLP(tuple(reversed(self.widths[:-1])), self.activation, name="decoder")(code)


class ConvNet(nn.Module):
    """Convolutions with ReLU and 2x2 mean pooling, then one dense layer on the mean over positions.

    Attributes:
      channels: of the convolutions (3x3, padded).
      outputs: number of classes.
    """

    channels: Sequence[int]
    outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, pixels)`` of square images to ``(n, outputs)``."""
        side = round(x.shape[1] ** 0.5)
        x = x.reshape(len(x), side, side, 1)
        for i, width in enumerate(self.channels):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            if i < len(self.channels) - 1:
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.outputs)(jnp.mean(x, axis=(1, 2)))


class ConvNet1D(nn.Module):
    """Convolutions of stride 2 with ReLU on signals, then one dense layer on all that is left.

    Attributes:
      channels: of the convolutions (window 5, padded).
      outputs: number of classes.
    """

    channels: Sequence[int]
    outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, length)`` to ``(n, outputs)``."""
        x = x[..., None]
        for width in self.channels:
            x = nn.relu(nn.Conv(width, (5,), strides=(2,))(x))
        return nn.Dense(self.outputs)(x.reshape(len(x), -1))


class Factorisation(nn.Module):
    """Inner product of two embeddings, plus an offset of each side and a constant.

    Attributes:
      users, items: number of rows of the two tables.
      rank: length of the embeddings.
      mean: the constant.
    """

    users: int
    items: int
    rank: int = 16
    mean: float = 0.0

    @nn.compact
    def __call__(self, pairs: jax.Array) -> jax.Array:
        """``(n, 2)`` int32, user and item, to ``(n,)``."""
        start = nn.initializers.normal(self.rank**-0.5)  # of unit length on average
        vectors, offsets = [], []
        for i, (name, size) in enumerate((("user", self.users), ("item", self.items))):
            table = nn.Embed(size, self.rank, embedding_init=start, name=name)
            offset = nn.Embed(size, 1, embedding_init=nn.initializers.zeros, name=f"{name}_offset")
            vectors.append(table(pairs[:, i]))
            offsets.append(offset(pairs[:, i])[:, 0])
        return self.mean + jnp.sum(vectors[0] * vectors[1], axis=-1) + offsets[0] + offsets[1]


class GraphConvNet(nn.Module):
    """Dense layers whose outputs are averaged over neighbours, ReLU between them.

    Attributes:
      widths: of the hidden layers.
      outputs: classes of a node.
    """

    widths: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, graphs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Features ``(n, nodes, features)``, adjacency ``(n, nodes, nodes)`` to logits per node."""
        x, adjacency = graphs
        for width in self.widths:
            x = nn.relu(adjacency @ nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class Attention(nn.Module):
    """Causal self-attention; query, key and value read the same input."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, length, width)`` to the same."""
        n, length, width = x.shape
        q, k, v = (
            nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(n, length, self.heads, -1)
            for name in ("query", "key", "value")
        )
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return nn.Dense(width, dtype=self.dtype, name="out")(out.reshape(n, length, width))


class CharTransformer(nn.Module):
    """A decoder-only transformer on characters: pre-norm, learned positions, no dropout.

    Attributes:
      vocabulary: number of characters.
      length: of the sequences.
      layers, width, heads: of the blocks; the hidden layer of each has ``4 * width``.
      dtype: of the computation; parameters stay float32.
    """

    vocabulary: int
    length: int
    layers: int = 2
    width: int = 64
    heads: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """``(n, length)`` int32 to logits ``(n, length, vocabulary)`` of the next character."""
        dtype = jnp.dtype(self.dtype)
        x = nn.Embed(self.vocabulary, self.width, dtype=dtype)(tokens)
        place = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = x + place.astype(dtype)
        for _ in range(self.layers):
            x = x + Attention(self.heads, dtype)(nn.LayerNorm(dtype=dtype)(x))
            h = nn.Dense(4 * self.width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
            x = x + nn.Dense(self.width, dtype=dtype)(nn.gelu(h))
        return nn.Dense(self.vocabulary, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
