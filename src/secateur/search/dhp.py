"""DHP: convolutions generated from latent vectors, which a proximal step makes sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Loss
from ..recipe import Recipe
from ..registry import register
from .generated import Bound, Channels, prepared, smaller
from .space import Counts, project


class HyperNet(nn.Module):
    """One latent number for each unit, and for each convolution a network that makes its weights of two latent vectors.

    Axes that lie in no family, such as the channels of an image, have latent vectors of their own, which stay.
    """

    def __init__(self, channels: Channels, embedding: int = 8) -> None:
        super().__init__()
        self.channels = channels
        parameters = dict(channels.model.named_parameters())
        self.latents = nn.ParameterList(torch.randn(len(f)) for f in channels.subject.families)
        self._generated = list(channels.convolutions)
        self._plain = [n for n in parameters if n not in self._generated]
        self.plain = nn.ParameterList(parameters[n].detach().clone() for n in self._plain)
        fixed: dict[tuple[int, int], nn.Parameter] = {}
        self._parts: list[tuple[nn.Parameter, ...]] = []
        for number, name in enumerate(self._generated):
            o, i, *kernel = parameters[name].shape
            k = math.prod(kernel)
            for axis, size in ((0, o), (1, i)):
                owner = channels.places.get(name, {}).get(axis, (torch.full((size,), -1),))[0]
                if bool((owner < 0).any()):
                    fixed[number, axis] = nn.Parameter(torch.randn(size))
            first = torch.empty(i, o, embedding).uniform_(-math.sqrt(3), math.sqrt(3))
            bound = math.sqrt(3 / (embedding * i * k))  # hyperfan-in
            second = torch.empty(i, o, k, embedding).uniform_(-bound, bound)
            shapes = ((i, o), (i, o, embedding), (i, o, k))
            self._parts.append(tuple(nn.Parameter(t) for t in (first, second, *(torch.zeros(s) for s in shapes))))
        self._fixed: Mapping[tuple[int, int], Tensor] = fixed
        self.hyper = nn.ParameterList([*fixed.values(), *(p for part in self._parts for p in part)])
        self._shapes = {n: parameters[n].shape for n in self._generated}

    def latent(self, number: int, axis: int) -> Tensor:
        """The latent vector along an axis of the numbered convolution."""
        name = self._generated[number]
        fixed = self._fixed.get((number, axis))
        if axis not in self.channels.places.get(name, {}):
            assert fixed is not None
            return fixed
        owner, unit = self.channels.places[name][axis]
        found: Tensor = torch.zeros(len(owner)) if fixed is None else fixed
        for family, latent in enumerate(self.latents):
            found = torch.where(owner == family, latent[unit.clamp_max(len(latent) - 1)], found)
        return found

    def weight(self, number: int) -> Tensor:
        """The numbered convolution, generated."""
        first, second, zero, one, two = self._parts[number]
        z = self.latent(number, 1)[:, None] * self.latent(number, 0) + zero
        embedded = z[..., None] * first + one
        flat: Tensor = torch.einsum("iokm,iom->iok", second, embedded) + two
        shape = self._shapes[self._generated[number]]
        return flat.permute(1, 0, 2).reshape(shape)

    def weights(self) -> dict[str, Tensor]:
        """All parameters of the model."""
        found = {name: self.weight(k) for k, name in enumerate(self._generated)}
        return {**found, **dict(zip(self._plain, self.plain, strict=True))}


@torch.no_grad()
def shrink_latents(latents: Sequence[Tensor], amount: float, least: Sequence[int], threshold: float) -> None:
    """The proximal operator of the l1 norm, in place: towards zero by ``amount``, for vectors that may lose more.

    >>> z = [torch.tensor([0.5, -0.05, -2.0])]
    >>> shrink_latents(z, 0.1, [1], 1e-3); z[0].tolist()
    [0.4000000059604645, -0.0, -1.899999976158142]
    """
    for latent, floor in zip(latents, least, strict=True):
        if int((latent.abs() >= threshold).sum()) > floor:
            latent.copy_(latent.sign() * (latent.abs() - amount).clamp_min(0))


def above(channels: Channels, latents: Sequence[Tensor], threshold: float) -> Counts:
    """How many units of each family have a latent of at least the threshold, up to an allowed size."""
    counts = []
    for node, latent in zip(channels.subject.space.nodes, latents, strict=True):
        alive = int((latent.detach().abs() >= threshold).sum())
        counts.append(next((s for s in node.sizes if s >= alive), node.sizes[-1]))
    return tuple(counts)


@register("transform", paper="2003.13683", survey="C2.2")
def dhp(
    model: nn.Module,
    data: Any,
    loss: Loss,
    example: Any,
    *,
    target: str | None = None,
    sparsity: float = 0.5,
    steps: int = 500,
    rate: float = 0.05,
    strength: float = 0.2,
    threshold: float = 5e-3,
    embedding: int = 8,
    calibration: int = 8,
    multiple: int = 8,
    low: float = 0.2,
    bounds: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Recipe]:
    """Generate convolutions from a latent vector to each family of channels, and make the vectors sparse.

    :: W = W2 ((z_in z_out^T + B0) W1 + B1) + B2;  z <- sign(z) max(|z| - lr lambda, 0) after each step of SGD

    Training goes on until the latents below ``threshold`` are enough for the target, or for ``steps``; then the units
    with the largest latents stay, as many as the target lets. The hypernetwork is left behind: a plain smaller model
    with generated weights, to be trained on, and the recipe with what each family keeps.

    Choose it where a model is to be trained anyway, and widths are to follow from the training.

    Beware: the weights of the model are not used; ``strength`` must be such that the target is reached in the steps.

    Source: Li et al., DHP, arXiv 2003.13683, equations 1 to 7 and the official code: one latent vector to each family
    is its sharing across skip connections. Linear layers and grouped convolutions are trained as they are.
    """
    twin, channels, batches = prepared(model, data, target, example, multiple, low, bounds, sparsity, seed)
    space = channels.subject.space
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = HyperNet(channels, embedding)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    twin.train()
    for step in range(steps):
        found = loss(Bound(twin, net.weights()).train(), batches[step % len(batches)])
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        shrink_latents([*net.latents], rate * strength, space.least, threshold)
        if space.cost(above(channels, [*net.latents], threshold)) <= space.limit:
            break
    twin.eval()
    # What the latents say of each family, brought to the target exactly.
    counts = project(space, ranked([*net.latents], space.cost, space.limit, channels))
    stay = []
    for latent, count in zip(net.latents, counts, strict=True):
        mask = torch.zeros(len(latent), dtype=torch.bool)
        mask[latent.detach().abs().topk(count).indices] = True
        stay.append(mask)
    recipe = channels.subject.recipe_of(counts)
    with torch.no_grad():
        weights = channels.masked(net.weights(), stay)
    return smaller(twin, recipe, weights, batches[:calibration], example, multiple), recipe


def ranked(latents: Sequence[Tensor], cost: Any, limit: float, channels: Channels) -> list[float]:
    """Keeps by one threshold over all latents, the lowest at which the cost is within the limit."""
    levels = torch.cat([x.detach().abs() for x in latents]).sort().values.tolist()
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(above(channels, latents, levels[middle])) <= limit else (middle + 1, high)
    counts = above(channels, latents, levels[low])
    return [c / n.units for c, n in zip(counts, channels.subject.space.nodes, strict=True)]
