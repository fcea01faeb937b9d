"""Small networks with every kind of coupling, for the dependency analysis, the proof and the plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Call(nn.Module):
    """A function of (module, inputs) as a forward, over the modules, parameters and plain values it is given."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Residual(nn.Module):
    """A stem, one residual block and a head."""

    def __init__(self, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.stem, self.b0 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.c1, self.b1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.c2, self.b2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b0(self.stem(x)))
        x = F.relu(x + self.b2(self.c2(F.relu(self.b1(self.c1(x))))))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.n, self.c, self.head = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 1), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([x, self.b(x)], 1)
        x = torch.cat([x, self.c(F.relu(self.n(x)))], 1)
        return self.head(x.mean((2, 3)))


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class FusedAttention(nn.Module):
    """Queries, keys and values out of one layer, with a residual around."""

    def __init__(self, heads: int = 2, dim: int = 4, how: str = "unbind") -> None:
        super().__init__()
        self.heads, self.dim, self.how = heads, dim, how
        self.i, self.o = nn.Linear(5, 8), nn.Linear(8, 3)
        self.qkv, self.p = nn.Linear(8, 3 * heads * dim), nn.Linear(heads * dim, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        b, t, _ = x.shape
        y = self.qkv(x)
        if self.how == "unbind":
            q, k, v = y.reshape(b, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part.view(b, t, self.heads, self.dim).transpose(1, 2) for part in y.chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v)
        return self.o(x + self.p(a.transpose(1, 2).reshape(b, t, -1)))


class GroupedAttention(nn.Module):
    """Several query heads to a key-value head; the numbers of heads follow from the shapes."""

    def __init__(self, heads: int = 4, kv: int = 2, dim: int = 4, how: str = "expand") -> None:
        super().__init__()
        self.times, self.dim, self.how = heads // kv, dim, how
        self.i, self.q, self.o = nn.Linear(5, 8), nn.Linear(8, heads * dim), nn.Linear(heads * dim, 3)
        self.k, self.v = nn.Linear(8, kv * dim), nn.Linear(8, kv * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, self.dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.how == "fused":
            a = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (y[:, :, None].expand(b, y.shape[1], self.times, t, -1).flatten(1, 2) for y in (k, v))
            a = (q @ k.transpose(-2, -1) / math.sqrt(self.dim)).softmax(-1) @ v
        return self.o(a.transpose(1, 2).reshape(b, t, -1))


class Multihead(nn.Module):
    """torch's own attention module, which asserts its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.m, self.o = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        return self.o(h + self.m(h, h, h, need_weights=False)[0])


class Tied(nn.Module):
    """A language model whose embedding is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.g = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.e.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return self.out(x + self.g(F.relu(self.f(x))))


class Two(nn.Module):
    """Two inputs, one of them by keyword only; the output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, *, other: Tensor | None = None) -> dict[str, Tensor]:
        y = self.a(x)
        return {"logits": self.o(F.relu(y if other is None else y * self.b(other)))}


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.i, self.r = nn.Linear(4, 6), getattr(nn, kind)(6, 8, batch_first=True, **options)
        self.o = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(F.relu(self.i(x)))[0])


class Mixer(nn.Module):
    """Mixes over tokens, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.n, self.o = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.t1, self.t2, self.c1, self.c2 = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        x = x + self.t2(F.gelu(self.t1(self.n(x).transpose(1, 2)))).transpose(1, 2)
        return self.o((x + self.c2(F.gelu(self.c1(x)))).mean(1))


class CrossAttention(nn.Module):
    """Pixels ask, a context answers."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.k, self.v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, t, _ = x.shape
        layers = ((self.q, x), (self.k, context), (self.v, context))
        q, k, v = (layer(y).view(b, -1, self.heads, self.dim).transpose(1, 2) for layer, y in layers)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Unet(nn.Module):
    """Down, cross attention and a time embedding, up, and a skip by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.d, self.m = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16)
        self.x, self.time = CrossAttention(16, 6, 4), nn.Linear(4, 16)
        self.u, self.o = nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        a = F.silu(self.n(self.a(x)))
        h = F.silu(self.m(self.d(a))) + self.time(time)[:, :, None, None]
        b, c, height, width = h.shape
        h = h + self.x(h.flatten(2).transpose(1, 2), context).transpose(1, 2).reshape(b, c, height, width)
        return self.o(F.silu(self.u(torch.cat([a, F.interpolate(h, scale_factor=2)], 1))))


class Scaled(nn.Module):
    """A branch that starts at zero, under a layer scale of a millionth, beside a position embedding of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.h, self.o = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)
        self.scale, self.position = nn.Parameter(torch.full((8,), 1e-6)), nn.Parameter(torch.zeros(1, 5, 8))
        nn.init.zeros_(self.h.weight)
        nn.init.zeros_(self.h.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.position
        return self.o(x + self.scale * self.h(F.gelu(self.f(x))))


def _shuffle() -> nn.Module:
    return Call(
        lambda m, x: m.head(F.relu(m.g2(shuffled(m.g1(x), 2)))),
        g1=nn.Conv2d(4, 8, 1, groups=2),
        g2=nn.Conv2d(8, 8, 1, groups=2),
        head=nn.Conv2d(8, 3, 1),
    )


def _glu() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, -1)
        return m.down(a * torch.sigmoid(b))

    return Call(forward, up=nn.Linear(6, 16), down=nn.Linear(8, 4))


def _excite() -> nn.Module:
    return Call(
        lambda m, x: m.head((h := m.c(x)) * torch.sigmoid(m.x(F.relu(m.r(F.adaptive_avg_pool2d(h, 1)))))),
        **{"c": nn.Conv2d(3, 8, 3), "r": nn.Conv2d(8, 4, 1), "x": nn.Conv2d(4, 8, 1), "head": nn.Conv2d(8, 3, 1)},
    )


def _vgg() -> nn.Module:
    return Call(
        lambda m, x: m.f2(F.relu(m.f1(F.max_pool2d(m.c2(F.max_pool2d(F.relu(m.c1(x)), 2)), 2).flatten(1)))),
        **{"c1": nn.Conv2d(3, 4, 3, padding=1), "c2": nn.Conv2d(4, 6, 3, padding=1)},
        **{"f1": nn.Linear(24, 10), "f2": nn.Linear(10, 3)},
    )


def _norm_mlp() -> nn.Module:
    return Call(
        lambda m, x: m.o((h := m.a(x)) + m.g(F.gelu(m.f(m.n(h))))),
        **{"a": nn.Linear(5, 8), "n": nn.LayerNorm(8), "f": nn.Linear(8, 12), "g": nn.Linear(12, 8)},
        o=nn.Linear(8, 3),
    )


def _transposed() -> nn.Module:
    return Call(
        lambda m, x: m.o(F.relu(m.b(m.t(F.relu(m.a(x)))))),
        **{"a": nn.Conv2d(3, 8, 3, stride=2, padding=1), "t": nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)},
        **{"b": nn.BatchNorm2d(6), "o": nn.Conv2d(6, 3, 1)},
    )


def _depthwise() -> nn.Module:
    return Call(
        lambda m, x: m.p(F.relu6(m.d(F.relu6(m.b(m.e(x)))))),
        **{"e": nn.Conv2d(3, 8, 1, bias=False), "b": nn.BatchNorm2d(8)},
        **{"d": nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), "p": nn.Conv2d(8, 4, 1)},
    )


def _group_norm() -> nn.Module:
    layers = {"a": nn.Conv2d(3, 8, 3), "n": nn.GroupNorm(4, 8), "b": nn.Conv2d(8, 3, 1)}
    return Call(lambda m, x: m.b(F.relu(m.n(m.a(x)))), **layers)


def _fourier() -> nn.Module:
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 3)}
    return Call(lambda m, x: m.c(F.relu(m.b(torch.fft.fft(m.a(x), dim=-1).real))), **layers)


#: Name -> how to make the network, and what it reads: a tensor, or keywords.
NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "residual": (Residual, noise(2, 3, 8, 8)),
    "concat": (Dense, noise(2, 3, 8, 8)),
    "glu": (_glu, noise(3, 6)),
    "shuffle": (_shuffle, noise(2, 4, 3, 3)),
    "depthwise": (_depthwise, noise(2, 3, 8, 8)),
    "squeeze-excite": (_excite, noise(2, 3, 8, 8)),
    "transposed": (_transposed, noise(2, 3, 8, 8)),
    "vgg": (_vgg, noise(2, 3, 8, 8)),
    "group-norm": (_group_norm, noise(2, 3, 6, 6)),
    "layer-norm": (_norm_mlp, noise(4, 5)),
    "multihead": (Multihead, noise(2, 6, 5)),
    "fused-qkv": (FusedAttention, noise(2, 6, 5)),
    "chunked-qkv": (lambda: FusedAttention(how="chunk"), noise(2, 6, 5)),
    "gqa": (GroupedAttention, noise(2, 6, 5)),
    "gqa-fused": (lambda: GroupedAttention(how="fused"), noise(2, 6, 5)),
    "mqa": (lambda: GroupedAttention(kv=1), noise(2, 6, 5)),
    "mqa-fused": (lambda: GroupedAttention(kv=1, how="fused"), noise(2, 6, 5)),
    "tied": (Tied, torch.arange(10).view(2, 5)),
    "keyword": (Two, {"x": noise(3, 4), "other": noise(3, 6, seed=2)}),
    "lstm": (lambda: Recurrent("LSTM"), noise(2, 5, 4)),
    "lstm-deep": (lambda: Recurrent("LSTM", num_layers=2, bidirectional=True), noise(2, 5, 4)),
    "gru": (lambda: Recurrent("GRU"), noise(2, 5, 4)),
    "rnn": (lambda: Recurrent("RNN"), noise(2, 5, 4)),
    "mixer": (Mixer, noise(2, 6, 5)),
    "unet": (Unet, {"x": noise(2, 3, 8, 8), "time": noise(2, 4), "context": noise(2, 5, 6)}),
    "scaled": (Scaled, noise(2, 5, 4)),
    "fourier": (_fourier, noise(2, 4)),
    "single": (lambda: nn.Linear(4, 3), noise(2, 4)),
}
#: Of these nothing can go.
WHOLE = {"multihead", "single"}
#: Over channels of these a normalization takes statistics, so that zeros in the channels count.
STATISTICS = {"group-norm", "layer-norm", "mixer", "unet"}


def build(name: str) -> tuple[nn.Module, Any]:
    """A network in evaluation mode, with its example."""
    torch.manual_seed(0)
    make, example = NETS[name]
    return make().eval(), example


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every stored tensor."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether the model is, bit by bit, what the snapshot says."""
    after = snapshot(model)
    return before.keys() == after.keys() and all(
        x.dtype == after[k].dtype and x.shape == after[k].shape and torch.equal(x, after[k]) for k, x in before.items()
    )
