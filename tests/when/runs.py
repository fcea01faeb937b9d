"""Small networks, batches and loops that the tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.registry import get

#: Every method whose masks change while a model trains, with what makes a short run of it.
OFTEN = {"driver": {"every": 4}}
WEIGHTS: dict[str, dict[str, Any]] = {
    **{n: {"knobs": OFTEN} for n in ("gmp", "global-gmp", "set", "rigl", "granet", "rigl-itop", "set-itop", "snfs")},
    **{n: {"knobs": OFTEN} for n in ("dsr", "mest", "top-kast", "srigl", "dpf")},
    **{n: {} for n in ("deep-r", "gsm", "movement", "soft-movement", "platon")},
    "sr-ste": {"sparsity": 0.5},
}
UNITS = {n: {"knobs": OFTEN} for n in ("sfp", "fpgm-soft", "gradual-structured")}
STEPS = 24


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def batch(k: int, units: bool = False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(8, 3, 6, 6, generator=g) if units else torch.randn(8, 12, generator=g)
    return x, torch.randint(4, (8,), generator=g)


def sgd(model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **more})


def attached(model: nn.Module, method: str, optimizer: Any, steps: int = STEPS, **more: Any) -> secateur.Session:
    """A session in which the method has much to do in a short run."""
    if method in UNITS:
        more = {"target": "flops 50%", "example": batch(0, True)[0], "multiple": 1, **UNITS[method], **more}
    else:
        more = {"sparsity": 0.75, **WEIGHTS[method], **more}
    return secateur.attach(model, method, optimizer=optimizer, steps=steps, **more)


def net_of(method: str, seed: int = 0) -> nn.Sequential:
    return cnn(seed) if method in UNITS else mlp(seed)


def backward(model: nn.Module, k: int, units: bool = False) -> None:
    x, y = batch(k, units)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def run(
    model: nn.Sequential, optimizer: Any, session: secateur.Session, begin: int = 0, end: int = STEPS
) -> Iterator[int]:
    """Step after step; yields the number of steps that have been taken."""
    for k in range(begin, end):
        backward(model, k, isinstance(model[0], nn.Conv2d))
        optimizer.step()
        session.step()
        yield k + 1


def held(session: secateur.Session) -> str:
    """How the method's hold treats weights: zero, free or dense."""
    found: str = get("hold", session.recipe.hold).facts["weight"]
    return found
