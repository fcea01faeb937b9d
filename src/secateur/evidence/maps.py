"""Statistics of the feature maps that convolutions read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..layers import Layer
from .watch import watch


def map_rank(x: Tensor) -> Tensor:
    """Rank of every feature map of ``(n, c, h, w)``: ``(n, c)``."""
    noise = max(x.shape[-2:]) * torch.finfo(x.dtype).eps  # of the dtype in which the maps were computed
    ranks: Tensor = torch.linalg.matrix_rank(x.double(), rtol=noise)
    return ranks.double()


def map_independence(x: Tensor) -> Tensor:
    """Nuclear norm of the matrix of all maps of an image, less that without each: ``(n, c, h, w) -> (n, c)``.

    Removing a row subtracts its outer product from ``A^T A``, or a row and column from ``A A^T``; the smaller of
    the two is decomposed.
    """
    a = x.double().flatten(2)
    channels, places = a.shape[1:]
    found = []
    for image in a:
        whole = torch.linalg.svdvals(image).sum()
        if places <= channels:
            gram = image.t() @ image
            without = gram - image[:, :, None] * image[:, None, :]
        else:
            stays = ~torch.eye(channels, dtype=torch.bool, device=x.device)
            gram = image @ image.t()
            without = gram * stays[:, :, None] * stays[:, None, :]
        found.append(whole - torch.linalg.eigvalsh(without).clamp_min(0).sqrt().sum(-1))
    return torch.stack(found)


_MAKERS: dict[str, Callable[[Tensor], Tensor]] = {"map_rank": map_rank, "map_independence": map_independence}


@torch.no_grad()
def gather_maps(
    model: nn.Module,
    layers: Sequence[Layer],
    needs: Iterable[str],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
) -> dict[str, dict[str, Tensor]]:
    """Layer name -> fact -> ``(channels,)``, of every two-dimensional convolution without groups.

    Raises:
        DataError: no batch reaches such a layer.
    """
    needs = sorted(needs)
    sums: dict[str, dict[str, Tensor]] = {}
    images: dict[str, int] = {}

    def arrive(layer: Layer, x: Tensor) -> None:
        if x.dim() != 4:
            return
        images[layer.name] = images.get(layer.name, 0) + x.shape[0]
        here = sums.setdefault(layer.name, {})
        for name in needs:
            total = _MAKERS[name](x).sum(0)
            here[name] = here[name] + total if name in here else total

    chosen = [x for x in layers if x.kind == "conv" and x.stored.dim() == 4 and getattr(x.module, "groups", 1) == 1]
    with watch(chosen, arrive):
        for batch in batches:
            run(model, batch)
    if not sums:
        raise DataError("feature maps are those of two-dimensional convolutions, and none was reached: give images")
    return {layer: {k: v / images[layer] for k, v in facts.items()} for layer, facts in sums.items()}
