"""Ready tasks on images: Fashion-MNIST, and digits that are drawn here."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..registry import register
from .arrays import batched
from .base import Split, Task, adamw, by_class
from .nets import VisionTransformer, resnet, vgg

#: Where Fashion-MNIST lies; read when data is asked for.
VARIABLE = "SECATEUR_FASHION_MNIST"
_FOLDER = "/usr/share/datasets/fashion-mnist"


def fashion_mnist(part: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, 28, 28)`` in [-1, 1] and labels of ``train`` (60,000) or ``t10k`` (10,000).

    Raises:
        DataError: the files are not there, or are not what they should be.
    """
    where = folder or Path(os.environ.get(VARIABLE, _FOLDER))
    labels = _idx(where, part, "labels", 8).long()
    images = _idx(where, part, "images", 16)
    if images.numel() != 784 * len(labels) or len(labels) == 0:
        raise DataError(f"the files of Fashion-MNIST in {where} are damaged: {part} has not as many images as labels")
    return images.reshape(-1, 1, 28, 28).float() / 127.5 - 1, labels


def _idx(folder: Path, part: str, name: str, skip: int) -> Tensor:
    found = sorted(folder.rglob(f"{part}-{name}*ubyte*"))
    if not found:
        raise DataError(
            f"Fashion-MNIST is not in {folder}: install the package dataset-fashion-mnist (Debian, Ubuntu), or put its "
            f"four *-ubyte.gz files (github.com/zalandoresearch/fashion-mnist) into a folder and set {VARIABLE} to it"
        )
    raw = found[0].read_bytes()
    try:
        raw = gzip.decompress(raw) if found[0].suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{found[0]} cannot be read: {error}") from None
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=min(skip, len(raw))).copy())


def _fashion(images: int, batch: int) -> Callable[[Split, int, int], Any]:
    made: list[Callable[[Split, int, int], Any]] = []

    def batches(split: Split, seed: int = 0, epoch: int = 0) -> Any:
        if not made:  # read when data is asked for, not when the task is made
            x, y = fashion_mnist("train")
            x_test, y_test = fashion_mnist("t10k")
            made.append(batched((x[:images], y[:images]), (x_test, y_test), batch))
        return made[0](split, seed, epoch)

    return batches


#: The ten kinds of clothes, by label.
CLOTHES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def _image() -> Tensor:
    return torch.zeros(1, 1, 28, 28)


@register("task", name="fashion-resnet")
def fashion_resnet(*, images: int = 60000, width: int = 16, depth: int = 3, epochs: int = 5, batch: int = 128) -> Task:
    """Clothes in ten classes (Fashion-MNIST), by a residual network of 20 layers, 0.27 million parameters.

    Choose it for what holds for residual networks: a run of 20,000 images and 2 epochs takes about a minute.

    Beware: the labels are noisy at the top: beyond 94 % differences are within the spread of seeds.

    Source: Xiao et al., Fashion-MNIST, arXiv 1708.07747; He et al., arXiv 1512.03385, section 4.2, for the network.
    """
    return Task(
        lambda seed: resnet(width, depth),
        _fashion(images, batch),
        epochs=epochs,
        example=_image,
        groups=by_class(CLOTHES),
    )


@register("task", name="fashion-vgg")
def fashion_vgg(*, images: int = 60000, width: int = 16, epochs: int = 5, batch: int = 128) -> Task:
    """Clothes in ten classes (Fashion-MNIST), by thirteen plain convolutions with batch norm, 0.9 million parameters.

    Choose it for layers of very different sizes, where layers collapse: there are no shortcuts around them.

    Source: Xiao et al., Fashion-MNIST, arXiv 1708.07747; Simonyan and Zisserman, arXiv 1409.1556, configuration D, a
    quarter as wide, with batch norm and one linear layer.
    """
    return Task(
        lambda seed: vgg(width), _fashion(images, batch), epochs=epochs, example=_image, groups=by_class(CLOTHES)
    )


@register("task", name="fashion-vit")
def fashion_vit(
    *, images: int = 60000, width: int = 64, depth: int = 4, patch: int = 4, epochs: int = 5, batch: int = 128
) -> Task:
    """Clothes in ten classes (Fashion-MNIST), by a small vision transformer, 0.2 million parameters.

    Choose it for transformers on images; the layers in the blocks are pruned, patches and answer are not. Patches of
    4 x 4 points are 49 tokens; with ``patch=2`` there are 196, and a run takes five times as long.

    Source: Xiao et al., Fashion-MNIST, arXiv 1708.07747; Dosovitskiy et al., arXiv 2010.11929, without a class token.
    """
    return Task(
        lambda seed: VisionTransformer(width, depth, patch=patch), _fashion(images, batch), optimizer=adamw,
        epochs=epochs, example=_image, groups=by_class(CLOTHES),
    )  # fmt: skip


#: Ten digits on five by seven points.
_GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111", "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip


def drawn_digits(count: int, seed: int, noise: float = 0.8) -> tuple[Tensor, Tensor]:
    """Images ``(count, 1, 12, 12)`` of digits: each glyph somewhere in the picture, under Gaussian noise.

    >>> drawn_digits(3, 0)[0].shape
    torch.Size([3, 1, 12, 12])
    """
    generator = torch.Generator().manual_seed(seed)
    glyphs = torch.tensor([[[float(c) for c in row] for row in g.split()] for g in _GLYPHS])
    labels = torch.randint(10, (count,), generator=generator)
    images = noise * torch.randn(count, 1, 12, 12, generator=generator)
    tops, lefts = (torch.randint(n, (count,), generator=generator) for n in (6, 8))
    rows, columns = tops[:, None, None] + torch.arange(7)[:, None], lefts[:, None, None] + torch.arange(5)
    images[torch.arange(count)[:, None, None], 0, rows, columns] += 2.0 * glyphs[labels]
    return images, labels


@register("task")
def digits(*, images: int = 2000, width: int = 8, epochs: int = 5, batch: int = 50) -> Task:
    """Digits that are drawn here, moved about and noisy, by a small convolutional network: a run takes a second.

    Choose it to try a command, and for tests: nothing is downloaded.

    Beware: far too small to tell methods from one another.

    Source: drawn by the package.
    """
    train, test = drawn_digits(images, 1), drawn_digits(1000, 2)
    return Task(lambda seed: resnet(width, 1), batched(train, test, batch), epochs=epochs)
