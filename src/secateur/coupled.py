"""Structured pruning from the command line: any module in, a smaller one on disk out."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import windows
from .disk import beside, refuse
from .errors import DataError, ModelError, RecipeError
from .measure import machine, versions
from .measure.latency import latency
from .models import load_model, load_tokenizer, named, next_token_loss, resolve
from .recipe import Recipe
from .record import dumps
from .structured import StructuredPlan, WholePlan, save
from .units import plan_coupled


def load_module(source: str, weights: bool = True, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A model from what a user writes.

    Args:
        source: ``timm:NAME`` (``timm-config:NAME`` with random weights), ``FILE.py:callable``, or what
            `models.resolve` accepts. A file is run only because the user named it.
        weights: False where a plan alone is wanted: timm models are then not fetched.
        dtype: of what `models.resolve` finds; None for the one that it is stored in.

    Raises:
        ModelError: nothing is there, or it is not a module.
    """
    if source.startswith(("timm:", "timm-config:")):
        kind, _, name = source.partition(":")
        return _timm(name, weights and kind == "timm")
    path, colon, name = source.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), name)
    found: nn.Module = load_model(resolve(source), dtype)
    return found


def _timm(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"timm models need timm: pip install 'secateur[vision]' ({error})") from None
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"timm:{name} cannot be made: {reason} (timm-config:{name} has random weights and fetches nothing)"
        ) from None
    return model.eval()


def _from_file(path: Path, name: str) -> nn.Module:
    made = named(path, name)
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    if not isinstance(made, nn.Module):
        raise ModelError(f"{path} has no callable '{name}' that returns a torch.nn.Module")
    return made.eval()


def batches_of(source: str, data: str | None, net: nn.Module, count: int, length: int) -> tuple[list[Any], Any]:
    """Calibration batches and a loss for them: text for a language model, or ``FILE.py:callable``.

    The callable returns batches. The loss is the file's ``loss(model, batch)``, where it has one; else pairs of inputs
    and class indices have cross-entropy. A model that is no language model has no data where none is named.
    """
    path, colon, name = (data or "").rpartition(":")
    if colon and path.endswith(".py"):
        made = named(Path(path), name)
        batches = list(made() if callable(made) else made or [])
        if not batches:
            raise DataError(f"{path} has nothing named '{name}' that gives batches")
        labelled = isinstance(batches[0], (tuple, list)) and len(batches[0]) == 2
        own = named(Path(path), "loss")
        return batches, own if callable(own) else _cross_entropy if labelled else None
    if data is None or not vocabulary(net):
        return [], None
    return list(
        windows(data, load_tokenizer(resolve(source)), count=count, length=length).ids.split(1)
    ), next_token_loss


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def example_inputs(text: str | None, model: nn.Module) -> Any:
    """Inputs of one forward pass: a shape as a user writes it, or what the model itself says it takes.

    >>> example_inputs("2x3x8x8", nn.Identity()).shape
    torch.Size([2, 3, 8, 8])
    """
    generator = torch.Generator().manual_seed(0)
    if text is not None:
        try:
            shape = [int(n) for n in text.lower().split("x")]
        except ValueError:
            raise RecipeError(f"--example '{text}' is not understood: write a shape, e.g. 1x3x224x224") from None
        if not shape or min(shape) < 1:
            raise RecipeError(f"--example '{text}' has a size below 1")
        if vocabulary(model):
            return {"input_ids": torch.randint(0, vocabulary(model), shape, generator=generator)}
        return torch.randn(shape, generator=generator)
    if vocabulary(model):
        return {"input_ids": torch.randint(0, vocabulary(model), (1, 16), generator=generator)}
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise RecipeError("this model does not say what it takes: give a shape, e.g. --example 1x3x224x224")
    return torch.randn(1, *size, generator=generator)


def vocabulary(model: nn.Module) -> int:
    """How many tokens a language model knows; 0 for any other model."""
    return int(getattr(getattr(model, "config", None), "vocab_size", None) or 0)


def plan_source(
    source: str,
    recipe: Recipe,
    *,
    target: str | None,
    example: str | None,
    data: str | None = None,
    count: int = 64,
    length: int = 512,
    weights: bool = True,
    exported: bool = False,
    multiple: int = 8,
) -> StructuredPlan | WholePlan:
    """The plan for a model named on the command line.

    Without ``weights`` the plan is a preview: where the method ranks by data that is not given, sizes are those
    that magnitude would give, and a note says so.
    """
    net = load_module(source, weights)
    note = None
    batches: list[Any] = []
    loss = None
    if not weights:  # a preview heals nothing
        recipe = recipe.override(recovery="none")
    if recipe.needs_data or recipe.recovery != "none":
        batches, loss = batches_of(source, data, net, count, length)
    if recipe.needs_data and not recipe.needs_shape and not batches and not weights:
        note = f"method '{recipe.method}' ranks by data: which units go is shown for magnitude, until data is given"
        recipe = recipe.override(criterion="magnitude")
    plan = plan_coupled(
        net,
        recipe,
        target=target,
        example=example_inputs(example, net),
        data=batches or None,
        loss=loss,
        exported=exported,
        multiple=multiple,
    )
    plan.notes += [note] if note else []
    return plan


def prune_source(
    source: str,
    recipe: Recipe,
    out: Path,
    *,
    target: str | None,
    example: str | None,
    data: str | None,
    count: int = 64,
    length: int = 512,
    force: bool = False,
    command: str = "",
    exported: bool = False,
    multiple: int = 8,
) -> tuple[StructuredPlan | WholePlan, dict[str, Any]]:
    """Make a smaller model and write it, with ``run.json`` beside it; returns the plan and the record.

    Raises:
        ModelError: nothing can be removed; nothing is written then.
        OutputError: ``out`` exists.
    """
    refuse(out, force, way="choose another directory or --force")
    begun = time.perf_counter()
    plan = plan_source(
        source, recipe, target=target, example=example, data=data, count=count, length=length, exported=exported,
        multiple=multiple,
    )  # fmt: skip
    planned = time.perf_counter() - begun
    small = plan.shrink()
    args, kwargs = plan.example
    given = getattr(plan, "origin", None) or plan.model
    speed = latency({"before": given, "after": small}, args, kwargs)
    run = {
        **plan.to_dict(),
        "secateur": versions().get("secateur", "0"),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "digest": plan.recipe.digest,
        "cite": plan.recipe.cite(),
        "model": {"source": source, "class": type(given).__name__},
        "before": {**plan.before, "seconds": speed["before"]},
        "after": {**plan.after, "seconds": speed["after"]},
        "timings": {"plan": round(planned, 3), "total": round(time.perf_counter() - begun, 3)},
        "versions": versions(),
        "machine": machine(),
    }
    surgery: Any = small.secateur_surgery
    surgery["source"] = source
    with beside(out, force) as part:
        save(small, part)
        if hasattr(small, "save_pretrained") and vocabulary(small):
            load_tokenizer(resolve(source)).save_pretrained(part)
        (part / "run.json").write_text(dumps(run), encoding="utf-8")
    return plan, run
