"""MetaPruning: a network that generates the weights of a model of any widths, and a search over widths with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Loss
from ..recipe import Recipe
from ..registry import register
from .explore import Trial
from .generated import Bound, Channels, prepared, smaller, write
from .run import Evaluate, Found, run
from .space import Counts, Space


class PruningNet(nn.Module):
    """Generates a model's convolutions from its widths; all else is trained as it is, batch norms once for each width.

    Args:
        hidden: units of the layer between the two widths of a convolution and its weights.
    """

    def __init__(self, channels: Channels, hidden: int = 32) -> None:
        super().__init__()
        self.channels = channels
        model = channels.model
        self._nodes = channels.subject.space.nodes
        parameters = dict(model.named_parameters())
        self._generated = list(channels.convolutions)
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, parameters[n].numel()))
            for n in self._generated
        )
        norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
        #: Parameters of batch norms -> the family whose width says which of them is used.
        self._of_width: dict[str, int] = {}
        for name in (f"{n}.{kind}".lstrip(".") for n in norms for kind in ("weight", "bias")):
            owners = channels.places.get(name, {}).get(0, (torch.tensor([-1]),))[0].unique()
            if len(owners) == 1 and owners[0] >= 0:
                self._of_width[name] = int(owners[0])
        self._plain = [n for n in parameters if n not in self._generated and n not in self._of_width]
        self.plain = nn.ParameterList(parameters[n].detach().clone() for n in self._plain)
        self.tables = nn.ParameterList(
            parameters[n].detach().expand(len(self._nodes[f].sizes), -1).clone() for n, f in self._of_width.items()
        )
        self._shapes = {n: p.shape for n, p in parameters.items()}

    def weights(self, counts: Counts) -> dict[str, Tensor]:
        """All parameters of the model with these widths: the first so many units of each family, zeros elsewhere."""
        stay = self.channels.first(counts)
        found: dict[str, Tensor] = {}
        for name, generate in zip(self._generated, self.generators, strict=True):
            widths = torch.stack([self.channels.kept(name, axis, stay).mean() for axis in (1, 0)])
            found[name] = generate(widths).reshape(self._shapes[name])
        found.update(zip(self._plain, self.plain, strict=True))
        for (name, family), table in zip(self._of_width.items(), self.tables, strict=True):
            found[name] = table[list(self._nodes[family].sizes).index(counts[family])]
        return self.channels.masked(found, stay)


def trained(
    net: PruningNet, batches: Sequence[Any], loss: Loss, steps: int, rate: float, generator: torch.Generator
) -> list[float]:
    """Train the generators on random widths, a draw for each step; returns the losses."""
    model, nodes = net.channels.model, net.channels.subject.space.nodes
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, max(1, steps))
    model.train()
    losses = []
    for step in range(steps):
        counts = tuple(n.sizes[int(torch.randint(len(n.sizes), (1,), generator=generator))] for n in nodes)
        found = loss(Bound(model, net.weights(counts)).train(), batches[step % len(batches)])
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(found.detach()))
    model.eval()
    return losses


class Widths:
    """A model of generated weights, as a search sees it."""

    def __init__(self, net: PruningNet) -> None:
        subject = net.channels.subject
        self._net, self._subject = net, subject
        self.model, self.recipe = net.channels.model, subject.recipe
        self.quantity, self.total = subject.quantity, subject.total
        self.space: Space = subject.space
        self.starts_from_own = False

    def own(self) -> list[float]:
        """Uniform: a width has no other meaning here."""
        return [1.0] * len(self.space)

    def recipe_of(self, counts: Counts) -> Recipe:
        """The recipe that keeps these counts."""
        return self._subject.recipe_of(counts)

    def apply(self, counts: Counts) -> None:
        """Put the weights that are generated for these counts into the model."""
        with torch.no_grad():
            write(self.model, self._net.weights(counts))


@register("transform", paper="1903.10258", survey="C2.2")
def metapruning(
    model: nn.Module,
    data: Any,
    loss: Loss,
    evaluate: Evaluate,
    example: Any,
    *,
    target: str | None = None,
    sparsity: float = 0.5,
    steps: int = 500,
    rate: float = 0.05,
    hidden: int = 32,
    budget: int = 60,
    strategy: str = "evolution",
    calibration: int = 8,
    multiple: int = 8,
    low: float = 0.2,
    bounds: Mapping[str, Sequence[float]] | None = None,
    history: str | Path | None = None,
    progress: Callable[[Trial], None] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Found]:
    """Learn to generate the weights of a model of any widths, then search for the widths with them.

    :: W_l = G_l(c_in / C_in, c_out / C_out), cropped to the widths;  min over G of E_c loss(W(c))

    Two linear layers to each convolution put out its weights; they train on random widths, with a batch norm of its
    own for each width, and linear layers as they are. Each candidate is evaluated with generated weights and batch
    norms measured anew on ``calibration`` batches. Returns the smaller model with generated weights, and what was
    found: its recipe, on a fresh model, gives the architecture that the paper trains from scratch.

    Choose it when widths are to be chosen for training from scratch, not for the weights that are there.

    Beware: the weights of the model are not used, and generated ones are only good for comparing widths.

    Source: Liu et al., MetaPruning, arXiv 1903.10258, sections 3.1 and 3.2 and the official code. Families of coupled
    channels take the place of its layers, so that skip connections need no rule of their own.
    """
    twin, channels, batches = prepared(model, data, target, example, multiple, low, bounds, sparsity, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = PruningNet(channels, hidden)
    trained(net, batches, loss, steps, rate, generator)
    subject = Widths(net)
    few = batches[:calibration]
    found = run(
        subject, strategy, evaluate, budget=budget, batches=few, history=history, progress=progress
    )  # fmt: skip
    with torch.no_grad():
        weights = net.weights(found.best.counts)
    return smaller(twin, found.recipe, weights, few, example, multiple), found
