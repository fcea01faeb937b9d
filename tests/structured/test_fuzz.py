"""Random networks, random units: the proof holds, and agrees with masking by hand, or it refuses."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, event, given
from hypothesis import strategies as st
from tests import nets
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Dependencies, dependencies, trace
from secateur.graph.trace import plain_operations
from secateur.surgery import prove, shrink
from secateur.surgery.prove import wake
from secateur.surgery.shrink import kept_by_name

#: Blocks over channels, which keep the width; those of `STRICT` are torch's own layers with code that fits any width.
STRICT = ("conv", "residual", "concat", "depthwise", "bn", "squeeze")
BLOCKS = (*STRICT, "split", "gate", "grouped", "shuffle", "unequal", "group-norm")
#: The same over tokens.
TOKENS = ("linear", "mlp", "attention", "merged", "gate", "layer-norm", "twice")


class Images(nn.Module):
    """A stem, blocks, pooling and a head."""

    def __init__(self, blocks: list[str], width: int, inner: int) -> None:
        super().__init__()
        self.blocks, self.layers = blocks, nn.ModuleList()
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Linear(width, 3)
        for block in blocks:
            self.layers.append(nn.ModuleList(self.parts(block, width, inner)))

    def parts(self, block: str, width: int, inner: int) -> list[nn.Module]:
        half = width // 2
        return {
            "conv": lambda: [nn.Conv2d(width, width, 3, padding=1)],
            "residual": lambda: [nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 1)],
            "concat": lambda: [nn.Conv2d(width, inner, 1), nn.Conv2d(width + inner, width, 1)],
            "depthwise": lambda: [nn.Conv2d(width, width, 3, padding=1, groups=width)],
            "bn": lambda: [nn.BatchNorm2d(width)],
            "squeeze": lambda: [nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)],
            "split": lambda: [nn.Conv2d(half, half, 1)],
            "gate": lambda: [nn.Conv2d(width, 2 * width, 1)],
            "grouped": lambda: [nn.Conv2d(width, width, 1, groups=2)],
            "shuffle": lambda: [nn.Conv2d(width, width, 1, groups=2), nn.Conv2d(width, width, 1, groups=2)],
            "unequal": lambda: [nn.Conv2d(width, width + inner, 1), nn.Conv2d(inner, width, 1)],
            "group-norm": lambda: [nn.GroupNorm(2, width)],
        }[block]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, parts in zip(self.blocks, self.layers, strict=True):
            x = self.block(block, list(parts), F.relu(x))
        return self.head(x.mean((2, 3)))

    def block(self, block: str, m: list[Any], x: Tensor) -> Tensor:
        if block == "residual":
            return x + m[2](F.relu(m[1](m[0](x))))
        if block == "concat":
            return m[1](torch.cat([x, m[0](x)], 1))
        if block == "squeeze":
            return x * torch.sigmoid(m[1](F.relu(m[0](x.mean((2, 3), keepdim=True)))))
        if block == "split":
            a, b = x.chunk(2, 1)
            return torch.cat([b, m[0](a)], 1)
        if block == "gate":
            a, b = m[0](x).chunk(2, 1)
            return a * torch.sigmoid(b)
        if block == "shuffle":
            return x + m[1](nets.shuffled(m[0](x), 2))
        if block == "unequal":
            y = m[0](x)
            return y[:, : x.shape[1]] + m[1](y[:, x.shape[1] :])
        return m[0](x)


class Sequences(nn.Module):
    """An embedding, blocks over tokens, and a head."""

    def __init__(self, blocks: list[str], width: int, inner: int, heads: int, dim: int) -> None:
        super().__init__()
        self.blocks, self.heads, self.scale, self.layers = blocks, heads, dim**-0.5, nn.ModuleList()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, 3)
        for block in blocks:
            parts = {
                "linear": lambda: [nn.Linear(width, width)],
                "mlp": lambda: [nn.Linear(width, inner), nn.Linear(inner, width)],
                "attention": lambda: [*(nn.Linear(width, heads * dim) for _ in "qkv"), nn.Linear(heads * dim, width)],
                "merged": lambda: [nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)],
                "gate": lambda: [nn.Linear(width, 2 * width)],
                "layer-norm": lambda: [nn.LayerNorm(width)],
                "twice": lambda: [nn.Linear(width, width)],
            }[block]()
            self.layers.append(nn.ModuleList(parts))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)  # sharp attention, in which every head counts

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, parts in zip(self.blocks, self.layers, strict=True):
            x = self.block(block, list(parts), torch.tanh(x))
        return self.head(x)

    def block(self, block: str, m: list[Any], x: Tensor) -> Tensor:
        if block == "mlp":
            return x + m[1](F.gelu(m[0](x)))
        if block == "gate":
            a, b = m[0](x).chunk(2, -1)
            return x + a * torch.sigmoid(b)
        if block == "twice":
            return m[0](F.relu(m[0](x)))
        if block in ("attention", "merged"):
            parts = m[0](x).chunk(3, -1) if block == "merged" else [m[i](x) for i in range(3)]
            q, k, v = (y.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in parts)
            a = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
            return x + m[-1](a.transpose(1, 2).flatten(2))
        return m[0](x)


def chosen(found: Dependencies, data: st.DataObject) -> frozenset[int]:
    """Half of the units of some families, but not all of any tensor."""
    gone: set[int] = set()
    for k, family in enumerate(found.families):
        if len(family) < 2 or not data.draw(st.booleans(), label=f"{family.name} loses some"):
            continue
        order = data.draw(st.permutations(range(len(family))), label=family.name)
        for unit in order[: len(family) // 2]:
            gone |= found.families[k].units[unit].gone
    assume(all(len(positions) for positions in found.kept(gone).values()))
    return frozenset(gone)


def masked(model: nn.Module, kept: dict[str, dict[int, Any]]) -> nn.Module:
    """A copy with zeros, written without the library."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            for axis, positions in kept.get(name, {}).items():
                stays = torch.zeros(parameter.shape[axis], dtype=parameter.dtype)
                stays[positions] = 1
                parameter.mul_(stays.view([-1 if d == axis else 1 for d in range(parameter.dim())]))
    return copied


def check(model: nn.Module, x: Tensor, data: st.DataObject, *, strict: bool, statistics: bool) -> None:
    model, x = model.double().eval(), x.double()
    wake(model, seed=data.draw(st.integers(0, 3), label="weights"))
    before = nets.snapshot(model)
    try:
        found = dependencies(trace(model, (x,)))
        gone = chosen(found, data)
        proof = prove(model, found, gone, (x,), {})
    except SecateurError:
        event("typed refusal")
        return
    assert nets.same(before, model)
    event("proven" if proof.proven else "refused")
    if not proof.proven:
        assert proof.reason and not strict
        return
    assert proof.error is not None and proof.error <= 1e-9
    kept = kept_by_name(found, gone)
    small = copy.deepcopy(model)
    shrink(small, kept, proof.mends)
    assert nets.parameters(small) == found.parameters(gone) and (
        not gone or found.parameters(gone) < nets.parameters(model)
    )
    if statistics:
        return
    with torch.no_grad(), plain_operations(small):
        torch.testing.assert_close(small(x), masked(model, kept)(x), rtol=1e-9, atol=1e-9)


@given(
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4), st.sampled_from([4, 6, 8]), st.integers(2, 5), st.data()
)
def test_random_networks_over_images(blocks: list[str], width: int, inner: int, data: st.DataObject) -> None:
    torch.manual_seed(0)
    check(
        Images(blocks, width, inner),
        nets.noise(2, 3, 4, 4),
        data,
        strict=set(blocks) <= set(STRICT),
        statistics="group-norm" in blocks,
    )


@given(
    st.lists(st.sampled_from(TOKENS), min_size=1, max_size=4),
    *(st.integers(4, 7), st.integers(2, 5), st.integers(1, 3), st.integers(2, 4), st.data()),
)
def test_random_networks_over_tokens(
    blocks: list[str], width: int, inner: int, heads: int, dim: int, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    model = Sequences(blocks, width, inner, heads, dim)
    check(
        model,
        nets.noise(2, 5, 3),
        data,
        strict=not {"attention", "merged"} & set(blocks),
        statistics="layer-norm" in blocks,
    )
