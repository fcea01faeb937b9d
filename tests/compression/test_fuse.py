"""What is folded into packed layers, and what must not be."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur
from secateur.compression import SparseConv2d, SparseLinear, compress
from secateur.compression.fuse import Tail, folded, tails
from secateur.compression.store import _of_record
from secateur.errors import ModelError
from secateur.kernels import library
from tests.compression.test_compress import sparse, sparse_wins  # noqa: F401

IMAGE = torch.randn(2, 4, 9, 9)
needs_kernels = pytest.mark.skipif(library() is None, reason="the sparse kernels are not built")


class Block(nn.Module):
    """A residual block in each of the ways that decide what may be folded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace="in place" in how)
        self.last = nn.Conv2d(4, 4, 1)
        for name, value in (("running_mean", torch.randn(4)), ("running_var", torch.rand(4) + 0.5)):
            setattr(self.norm, name, value)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "twice":
            x = self.act(self.norm(self.conv(x)))
            return self.act(self.norm(self.last(x)))
        y = self.conv(x)
        z = self.norm(y)
        if self.how in ("returned", "hooked"):
            return (self.act(z), y) if self.how == "returned" else self.act(z)
        if self.how == "before the norm":
            return self.last(self.act(z)) + y
        if self.how == "before the ReLU":
            return self.last(self.act(z)) + z
        if self.how == "before the ReLU in place":
            return self.last(z + 0) + self.act(z)
        if self.how == "functional":
            return self.last(F.relu(z))
        a = self.act(z)
        return self.last(a) + a


@pytest.mark.parametrize(
    "how, tail",
    [
        ("plain", Tail("norm", "act")),
        ("in place", Tail("norm", "act")),
        ("before the norm", None),
        ("before the ReLU", Tail("norm", "")),
        ("before the ReLU in place", Tail("norm", "")),
        ("functional", Tail("norm", "")),
        ("twice", None),
    ],
)
@needs_kernels
def test_only_what_nobody_else_reads(sparse_wins: None, how: str, tail: Tail | None, tmp_path: Path) -> None:  # noqa: F811
    torch.manual_seed(0)
    model = sparse(Block(how), 0.6)
    assert tails(model, ["conv", "last"], [((IMAGE,), {})]) == ({} if tail is None else {"conv": tail})
    before = copy.deepcopy(model.state_dict())
    fast = compress(model, IMAGE, cache=False)
    assert isinstance(fast.conv, SparseConv2d)
    torch.testing.assert_close(fast(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(fast.norm, nn.Identity) == (tail is not None)
    assert isinstance(fast.act, nn.Identity) == (tail is not None and bool(tail.relu))
    loaded = secateur.load(secateur.save(fast, tmp_path / "fast"), Block(how))
    assert torch.equal(loaded(IMAGE), fast(IMAGE))


@needs_kernels
def test_linear_layers_take_their_activation(sparse_wins: None) -> None:  # noqa: F811
    torch.manual_seed(0)
    model = sparse(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7)))
    fast = compress(model, torch.randn(5, 9), cache=False)
    assert isinstance(fast[0], SparseLinear) and fast[0].activation == "relu" and isinstance(fast[1], nn.Identity)
    x = torch.randn(6, 9)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert "with its ReLU" in fast.compression.choices[0].reason


def test_folding_is_the_norm_in_evaluation() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 2, bias=False), nn.BatchNorm2d(5, affine=False).eval()
    norm.running_mean, norm.running_var = torch.randn(5), torch.rand(5) + 0.1
    weight, bias = folded(conv.weight.flatten(1), None, norm)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(F.conv2d(x, weight.view(5, 3, 2, 2), bias), norm(conv(x)), rtol=1e-5, atol=1e-6)


@needs_kernels
def test_a_record_cannot_drop_other_modules(sparse_wins: None, tmp_path: Path) -> None:  # noqa: F811
    torch.manual_seed(0)
    out = secateur.save(compress(sparse(Block("plain")), IMAGE, cache=False), tmp_path / "fast")
    record = out / "compressed.json"
    told = json.loads(record.read_text())
    told["folded"].append("last")
    told["record"] = _of_record(told)
    record.write_text(json.dumps(told))
    with pytest.raises(ModelError, match="'last'"):
        secateur.load(out, Block("plain"))


def test_what_is_returned_or_watched_stays() -> None:
    torch.manual_seed(0)
    loads = [((IMAGE,), {})]
    assert tails(Block("returned").eval(), ["conv"], loads) == {}
    model = Block("hooked").eval()
    assert tails(model, ["conv"], loads) == {"conv": Tail("norm", "act")}
    model.act.register_forward_hook(lambda *_: None)
    assert tails(model, ["conv"], loads) == {"conv": Tail("norm", "")}
