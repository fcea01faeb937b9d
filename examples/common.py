"""What the examples share: how a smaller model is made, proven, compared with the dense one, and read back."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from secateur.measure.flops import flops
from secateur.measure.latency import latency


def options(text: str | None) -> argparse.Namespace:
    """``--small`` is what the tests run; the defaults take a minute or two."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--small", action="store_true", help="a few seconds, for a test")
    return parser.parse_args()


def smaller(
    model: nn.Module, method: str, target: str, example: dict[str, Any], fresh: Callable[[], nn.Module], **more: Any
) -> nn.Module:
    """Cut units, print what that brings, save the smaller model and read it back.

    Args:
        fresh: makes a model of the same architecture, for the way back from the file.
    """
    plan = secateur.plan(copy.deepcopy(model), method, target=target, example=example, **more)
    small: nn.Module = plan.shrink().eval()
    assert plan.proof.proven  # the smaller model computes what the masked one does, in float64
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, small))
    operations = [flops(net, **example).total for net in (model, small)]
    found = f"parameters {before:,} to {after:,}, FLOPs x {operations[1] / operations[0]:.2f}"
    if before > 100_000:  # below that nothing but the calls is timed
        took = latency({"dense": model, "small": small}, kwargs=example, repeats=5)
        found += f", {took['dense'] / took['small']:.2f} times as fast here"
    print(f"{type(model).__name__}: {method}, {target}: {found}")
    with tempfile.TemporaryDirectory() as folder:
        secateur.save(small, Path(folder) / "out")
        again = secateur.load(Path(folder) / "out", fresh()).eval()
        with torch.inference_mode():
            first, second = (torch.utils._pytree.tree_leaves(dict(net(**example))) for net in (small, again))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor))
    return small
