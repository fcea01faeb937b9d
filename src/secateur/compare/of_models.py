"""One run on a language model: pruned on calibration text that its seed draws, measured on held-out text."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compound import Compound, restored
from ..compound.run import carry_out
from ..coupled import example_inputs, vocabulary
from ..data import Windows, windows
from ..directory import prune_directory
from ..errors import DataError
from ..granularity import parse
from ..layers import find_layers
from ..masks import Masks
from ..measure import Peak
from ..models import load_model, load_tokenizer, next_token_loss, resolve
from ..processes import leave, rank, world
from ..prune import prune, recipe_of
from ..recipe import Recipe
from ..registry import get
from .language import Held, kinds_of_tokens, losses
from .measured import sizes, speed, stored, surroundings


def shares(recipe: Recipe | Compound) -> str | None:
    """Why processes cannot share the calibration of a method; None where they can.

    >>> shares(Recipe.of("wanda")), shares(Recipe.of("magnitude"))
    (None, 'it measures nothing')
    """
    if isinstance(recipe, Compound):
        return "it has several steps"
    if not recipe.needs_data:
        return "it measures nothing"
    if parse(recipe.granularity).coupled:
        return "it takes units of the whole model away"
    if recipe.needs_whole:
        return "it measures the whole model at once"
    if get("recovery", recipe.recovery).facts.get("data") == "block":
        return "its recovery trains each block"
    return None


def run_model(spec: Mapping[str, Any], work: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of a run, as `Row` has it, and its record.

    Several processes calibrate together; the first one then measures, alone, and the others have nothing to say.
    """
    path, budget = resolve(spec["source"]), spec["budget"]
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise DataError(f"{spec['source']} has no tokenizer to read a text with")
    recipe = None if spec["recipe"] is None else restored(spec["recipe"])
    text = None
    if recipe is not None and (recipe.needs_data if isinstance(recipe, Recipe) else "data" in recipe.needs()):
        text = windows(
            spec["data"]["source"], tokenizer, count=budget["windows"], length=budget["length"], seed=spec["seed"]
        )
    begun = time.perf_counter()
    record: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    reached, peak, packed = 0.0, 0, {}
    protocol = {k: v for k, v in budget.items() if v is not None and k != "processes"}
    if recipe is not None and (why := shares(recipe)) is not None and budget.get("processes", 1) > 1:
        protocol["processes"] = f"1, for {why}"
    if recipe is None:
        model = load_model(path, torch.float32)
    elif isinstance(recipe, Compound):
        made = carry_out(load_model(path, torch.float32), recipe, data=text)
        model, masks, record, peak = made.model.eval(), dict(made.masks), made.run, made.run["peak_memory"]
        reached, packed = made.sparsity, stored(made)
    elif (count := world()) > 1:
        model, own = load_model(path, torch.float32), rank()
        pruned = prune(model, recipe, data=text, shared=True)
        leave()
        if own:
            return {}, {}
        model, record, peak = pruned.model.eval(), pruned.run, pruned.run["peak_memory"]
        masks, reached = dict(pruned.masks), pruned.sparsity
        protocol["processes"] = count
    elif parse(recipe.granularity).coupled:
        model, record, peak = _smaller(path, recipe, spec["target"], text)
    else:
        out = work / name
        shutil.rmtree(out, ignore_errors=True)
        record = prune_directory(path, recipe, out, data=text if text is not None else spec["data"]["source"])
        model, peak = load_model(out, torch.float32), record["peak_memory"]
        masks = dict(Masks.of_zeros(model, [x["name"] for x in record["layers"]]))
        reached = record["sparsity"]["pruned_layers"]
        shutil.rmtree(out)
    seconds = time.perf_counter() - begun
    held = Held.of(
        windows(spec["evaluation"]["source"], tokenizer, count=budget["eval_windows"], length=budget["length"])
    )
    tuning = spec["role"] == "tune"
    valid = losses(model, held.valid)
    test = None if tuning else losses(model, held.test)
    example = {"input_ids": held.valid[:1]}
    result = {
        "metric": "perplexity", "higher_is_better": False, "valid": valid.perplexity,
        "test": None if test is None else test.perplexity, "test_count": None if test is None else test.count,
        "groups": None if test is None else test.by_kind(kinds_of_tokens(tokenizer, vocabulary(model))),
        "sparsity": reached, **sizes(model, masks, _layers(model, record), example), **packed,
        "latency": None,
        "cost": {
            "seconds": seconds if recipe is not None else 0.0, "peak_memory": peak,
            "samples": 0 if text is None else len(text), "labels": 0, "epochs": 0.0, "after_dense": 0.0,
        },
        "protocol": protocol,
        "data": {
            "calibration": None if text is None else text.sha256, "valid": held.hashes[0],
            "test": None if tuning else held.hashes[1],
        },
        "calibration": None if text is None else {"windows": len(text), "of": text.available // text.length},
        "recipe_digest": None if recipe is None else recipe.digest, **surroundings(),
    }  # fmt: skip
    if spec["latency"] and recipe is not None:
        result["latency"] = speed(load_model(path, torch.float32), model, bool(masks), example)
    del model
    gc.collect()
    return result, record


def _smaller(
    path: Path, recipe: Recipe, target: str | None, text: Windows | None
) -> tuple[nn.Module, dict[str, Any], int]:  # fmt: skip
    model = load_model(path, torch.float32)
    example = example_inputs(None, model)
    recipe = recipe_of(recipe, {}, target, example)
    with Peak() as peak:
        plan = prune(
            model, recipe, target=target, example=example, loss=next_token_loss,
            data=None if text is None else list(text.ids.split(1)),
        )  # fmt: skip
        small: nn.Module = plan.shrink()
    return small.eval(), json.loads(json.dumps(plan.to_dict(), default=str)), peak.bytes


def _layers(model: nn.Module, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "layers" in record and record["layers"] and "kept" in record["layers"][0]:
        return [{k: x[k] for k in ("name", "parameters", "kept")} for x in record["layers"]]
    found = find_layers(model, only=("*",))[0]
    return [{"name": x.name, "parameters": x.numel, "kept": x.numel} for x in found]
