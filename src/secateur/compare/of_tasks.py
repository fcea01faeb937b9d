"""One run on a task: trained, pruned as the recipe says, and measured on the test data once, at the end."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compound import Compound, restored
from ..compound.steps import trains
from ..errors import StudyError
from ..granularity import parse
from ..layers import find_layers
from ..processes import leave, rank, world
from ..recipe import Recipe
from ..registry import get
from ..runtime.base import answering
from ..tasks import Task, find
from ..tasks.base import accuracy, by_class, placed
from ..when.course import settled
from ..when.dynamic import TrainedDynamic
from ..when.own import training_runs as own_runs
from ..when.result import Trained
from ..when.train import recipe_and_moment, train
from .measured import sizes, speed, stored, surroundings
from .rows import trains_itself


def run_task(spec: Mapping[str, Any], work: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of a run, as `Row` has it, and its record (curves, notes, layers).

    Several processes train together; the first one then measures, alone, and the others have nothing to say.
    """
    options = dict(spec["options"])
    task = find(spec["source"], **options)
    budget, tuning = spec["budget"], spec["role"] == "tune"
    if trains_itself(spec["recipe"]):
        return run_own(spec, work, name)
    asked = None if spec["recipe"] is None else restored(spec["recipe"])
    if isinstance(asked, Compound):
        return _compound(spec, work, name, task, asked)
    recipe = asked
    chosen, moment = recipe_and_moment(recipe, {} if recipe is not None else {"seed": spec["seed"]}, None, spec["when"])
    epochs = float(task.epochs if budget["epochs"] is None else budget["epochs"])
    if budget["total_epochs"] is not None:
        other = spec["masks"] is not None  # what finds the masks trains, and so does what holds them
        epochs = float(budget["total_epochs"]) / (training_runs(chosen, moment) + other)
    given: dict[str, Any] = {
        "epochs": epochs, "options": options, "dense": _dense(work, spec["code"], budget),
        "calibration": budget["samples"], "score": "valid" if tuning else "test", "device": budget.get("device", "cpu"),
    }  # fmt: skip
    out, count, own = work / name, world(), rank()
    for old in (out, out.with_name(out.name + ".partial")) if own == 0 else ():
        shutil.rmtree(old, ignore_errors=True)  # it ended just before an earlier attempt was stopped
    source = _elsewhere(spec, recipe, epochs, work) if spec["masks"] is not None else None
    if recipe is None:
        made = train(spec["source"], None, out=out, seed=spec["seed"], **given)
    elif source is not None:
        made = train(spec["source"], None, out=out, seed=spec["seed"], masks=dict(source.masks), **given)
    else:
        made = train(
            spec["source"], recipe, out=out, when=spec["when"], **given,
            **({"target": spec["target"]} if spec["target"] else {}),
        )  # fmt: skip
    leave()
    if own:
        return {}, {}
    shutil.rmtree(out, ignore_errors=True)
    valid, run = task.measure(made.model), made.run
    made.model.to("cpu")
    seconds = run["timings"]["total"] + (0.0 if source is None else source.run["timings"]["total"])
    masks: dict[str, Tensor] = dict(made.masks)
    example = task.example_input()
    rewound = float(chosen.knobs_of("recovery").get("to", 0.0))
    passed = _epochs(run["curves"], rewound)
    seen = round(sum(passed.values()) * _examples(spec["source"], tuple(sorted(options.items())), "train"))
    if source is not None:
        there = _epochs(source.run["curves"], rewound)
        mask_task, sizes_there = spec["masks"]["task"], tuple(sorted(_options_there(spec).items()))
        seen += round(sum(there.values()) * _examples(mask_task, sizes_there, "train"))
        passed |= {f"{leg} there": length for leg, length in there.items()}
    if recipe is not None and recipe.needs_data:
        seen += budget["samples"] * max(1, recipe.steps) * _batch(task)
    result = {
        "metric": task.metric_name, "higher_is_better": task.higher_is_better, "valid": valid,
        "test": None if tuning else made.metric, "test_count": None if tuning else _count(task, "test"),
        "groups": None if tuning else _groups(task, made.model), "sparsity": made.sparsity,
        **sizes(made.model, masks, _layers(made.model, masks), example),
        "latency": _speed(spec, work, given, made.model, bool(masks), example) if spec["latency"] and recipe else None,
        "cost": {
            "seconds": seconds, "peak_memory": run["peak_memory"], "samples": seen, "labels": seen,
            "epochs": round(sum(passed.values()), 4),
            "after_dense": round(sum(v for k, v in passed.items() if moment == "after" and k[:5] != "dense"), 4),
        },
        "protocol": {"epochs": epochs, "when": moment, "steps": chosen.steps, **_given(budget, count)},
        "data": {
            s: _hash(spec["source"], tuple(sorted(options.items())), s)
            for s in ("train", "valid", *(() if tuning else ("test",)))
        },
        "recipe_digest": None if recipe is None else recipe.digest, **surroundings(),
    }  # fmt: skip
    return result, run


def _compound(
    spec: Mapping[str, Any], work: Path, name: str, task: Task, compound: Compound
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of several steps."""
    options, budget, tuning = dict(spec["options"]), spec["budget"], spec["role"] == "tune"
    epochs = float(task.epochs if budget["epochs"] is None else budget["epochs"])
    if budget["total_epochs"] is not None:
        epochs = dense_epochs(compound, float(budget["total_epochs"]))
    out = work / name
    for old in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(old, ignore_errors=True)
    given: dict[str, Any] = {
        "epochs": epochs, "options": options, "dense": _dense(work, spec["code"], budget),
        "calibration": budget["samples"], "score": "valid" if tuning else "test", "device": budget.get("device", "cpu"),
    }  # fmt: skip
    made = train(spec["source"], compound, **given)
    valid, run, example = task.measure(made.model), made.run, task.example_input()
    made.model.to("cpu")
    masks = {n: m.cpu() for n, m in made.masks.items()}
    passed = {"dense": epochs, **_epochs(run["curves"])}
    seen = round(sum(passed.values()) * _examples(spec["source"], tuple(sorted(options.items())), "train"))
    seen += budget["samples"] * _batch(task) if "data" in compound.needs() else 0
    result = {
        "metric": task.metric_name, "higher_is_better": task.higher_is_better, "valid": valid,
        "test": None if tuning else run["metric"]["after"], "test_count": None if tuning else _count(task, "test"),
        "groups": None if tuning else _groups(task, made.model), "sparsity": made.sparsity,
        **sizes(made.model, masks, _layers(made.model, masks), example), **stored(made),
        "latency": _speed(spec, work, given, made.model, bool(masks), example) if spec["latency"] else None,
        "cost": {
            "seconds": run["timings"]["total"], "peak_memory": run["peak_memory"], "samples": seen, "labels": seen,
            "epochs": round(sum(passed.values()), 4),
            "after_dense": round(sum(v for k, v in passed.items() if k != "dense"), 4),
        },
        "protocol": {"epochs": epochs, "when": "after", "steps": len(compound.steps), **_given(budget, 1)},
        "data": {
            s: _hash(spec["source"], tuple(sorted(options.items())), s)
            for s in ("train", "valid", *(() if tuning else ("test",)))
        },
        "recipe_digest": compound.digest, **surroundings(),
    }  # fmt: skip
    return result, run


def run_own(spec: Mapping[str, Any], work: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`run_task` of a method that trains in a way of its own.

    Operations of one that decides for each input are those executed, the mean over inputs. Of a supernet each network
    that a sample goes through counts it, those that a search judges too.
    """
    task, budget = find(spec["source"], **spec["options"]), spec["budget"]
    method, asked = spec["recipe"]["method"], {k: v for k, v in spec["recipe"].items() if k not in ("method", "when")}
    epochs = float(task.epochs if budget["epochs"] is None else budget["epochs"])
    if budget["total_epochs"] is not None:
        epochs = float(budget["total_epochs"]) / own_runs(method, asked)
    out, count, own = work / name, world(), rank()
    for old in (out, out.with_name(out.name + ".partial")) if own == 0 else ():
        shutil.rmtree(old, ignore_errors=True)
    as_dense: dict[str, Any] = {
        "epochs": epochs, "options": dict(spec["options"]), "dense": _dense(work, spec["code"], budget),
        "device": budget.get("device", "cpu"),
    }  # fmt: skip
    if "calibration" in get("transform", method).knobs:
        asked["calibration"] = budget["samples"]
    made = train(spec["source"], method, out=out, target=spec["target"], **as_dense, **asked)
    leave()
    if own:
        return {}, {}
    shutil.rmtree(out, ignore_errors=True)
    run, dynamic = made.run, isinstance(made, TrainedDynamic)
    passed, given = _epochs(run["curves"]), tuple(sorted(spec["options"].items()))
    train_set, valid_set = (_examples(spec["source"], given, s) for s in ("train", "valid"))
    passes, tried = run.get("passes", {}), run.get("tried", 0)
    seen = sum(length * passes.get(leg, 1) for leg, length in passed.items()) * train_set + tried * valid_set
    seen += tried * run["knobs"]["calibration"] * _batch(task) if tried else 0
    with answering(made.gates) if dynamic else nullcontext():
        valid = task.measure(made.model)
        made.model.to("cpu")
        groups = _groups(task, made.model)
    plain = made.gates.model if dynamic else made.model
    executed = {}
    if dynamic:
        executed = dict.fromkeys(("flops", "effective_flops"), run["measured"]["gated"]["flops"]["mean"])
    result = {
        "metric": task.metric_name, "higher_is_better": task.higher_is_better, "valid": valid, "test": made.metric,
        "test_count": _count(task, "test"), "groups": groups, "sparsity": made.sparsity,
        **sizes(made.model, {}, _layers(plain, {}), task.example_input()), **executed,
        "latency": _speed(spec, work, as_dense, made.model, False, task.example_input()) if spec["latency"] else None,
        "cost": {
            "seconds": run["timings"]["total"], "peak_memory": run["peak_memory"],
            "samples": round(seen), "labels": round(sum(passed.values()) * train_set + tried * valid_set),
            "epochs": round(sum(passed.values()), 4),
            "after_dense": round(sum(v for k, v in passed.items() if k != "dense"), 4),
        },
        "protocol": {"epochs": epochs, "when": run["when"], "steps": 1, **_given(budget, count)},
        "data": {s: _hash(spec["source"], given, s) for s in ("train", "valid", "test")},
        "recipe_digest": None, **surroundings(),
    }  # fmt: skip
    return result, run


def dense_epochs(compound: Compound, total: float) -> float:
    """How long dense training may be, so that it and all steps that train take so many epochs.

    >>> dense_epochs(Compound.of([{"recover": "finetune"}, {"recover": {"method": "lora", "epochs": 1}}]), 7)
    4.0

    Raises:
        StudyError: the steps alone take longer.
    """
    shares, fixed = 1.0, 0.0
    for step in compound.steps:
        if step.kind == "recover":
            own = step.options.get("epochs")
            length = float(
                step.options.get("length", get("recovery", step.method).knobs["length"] if own is None else 1.0)
            )
            fixed, shares = (fixed, shares + length) if own is None else (fixed + length * float(own), shares)
        elif step.kind == "prune" and trains(step.recipe()):
            recipe, moment = recipe_and_moment(step.recipe(), {}, None, None)
            shares += training_runs(recipe, moment) - (1.0 if moment == "after" else 0.0)
    if fixed >= total:
        raise StudyError(f"the steps of {compound.name} train {fixed:g} epochs of the {total:g} that all may take")
    return (total - fixed) / shares


def training_runs(recipe: Recipe, moment: str) -> float:
    """How many trainings of full length a method asks for: the dense one, and what its recovery takes in each round.

    >>> training_runs(Recipe.of("rigl"), "during"), training_runs(Recipe.of("magnitude-finetune"), "after")
    (1.0, 1.5)
    >>> training_runs(Recipe.of("greg"), "after")
    2.0

    Raises:
        StudyError: its recovery trains until the FLOPs of dense training are spent, which is not known before.
    """
    part, knobs = get("recovery", recipe.recovery), recipe.knobs_of("recovery")
    share = 0.0
    if part.facts.get("data") == "task":
        if knobs.get("budget", "epochs") != "epochs":
            raise StudyError(
                "with total_epochs, recovery 'scratch' takes budget epochs: flops are not known beforehand"
            )
        share = float(knobs["length"]) if "length" in knobs else 1.0 - float(knobs.get("to", 0.0))
    after, coupled = moment == "after", bool(parse(recipe.granularity).coupled)
    rounds = recipe.steps if after and not coupled else 1  # units of the whole model go at once
    alone = 1.0 if after and settled(recipe) else 0.0  # gates and penalties train the dense model once more
    teacher = 1.0 if moment != "after" and part.facts.get("teacher") else 0.0  # it is trained for its own sake
    return 1.0 + rounds * share + alone + teacher


def _elsewhere(spec: Mapping[str, Any], recipe: Recipe | None, epochs: float, work: Path) -> Trained | TrainedDynamic:
    """The run on another task that finds the masks."""
    if recipe is None:
        raise StudyError("masks from another task belong to a method")
    made: Trained = train(
        spec["masks"]["task"], recipe, epochs=epochs, when=spec["when"], options=_options_there(spec),
        dense=_dense(work, spec.get("masks_code"), spec["budget"]), calibration=spec["budget"]["samples"],
        device=spec["budget"].get("device", "cpu"), score="valid",
    )  # fmt: skip
    return made


def _options_there(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in spec["masks"].items() if k != "task"}


def _dense(work: Path, code: str | None, budget: Mapping[str, Any]) -> Path:
    """Where dense models are kept: of a task in a file apart, for two files may have tasks of one name; and apart by
    how many processes train them, and where."""
    how = [str(budget[k]) for k in ("processes", "device") if k in budget]
    folder = work / "-".join(["dense", *how])
    return folder if code is None else folder / code


def _layers(model: nn.Module, masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for layer in find_layers(model, only=("*",))[0]:
        if masks and layer.name not in masks:
            continue
        kept = layer.numel if not masks else int(masks[layer.name].count_nonzero())
        rows.append({"name": layer.name, "parameters": layer.numel, "kept": kept})
    return rows


def _speed(
    spec: Mapping[str, Any], work: Path, given: dict[str, Any], made: nn.Module, masked: bool, example: Any
) -> dict[str, Any] | None:
    dense = train(
        spec["source"], None, seed=spec["seed"], **{**given, "score": "valid"}
    )  # kept: it is read, not trained
    where = torch.device(given["device"])
    return speed(dense.model.to(where), copy.deepcopy(made).to(where), masked, placed(example, where))


def _epochs(curves: list[dict[str, Any]], rewound: float = 0.0) -> dict[str, float]:
    """Leg -> epochs that it trained; a recovery that rewinds begins at that share of its schedule.

    >>> _epochs([{"leg": "dense", "epoch": 1.0, "step": 8}, {"leg": "dense", "epoch": 1.25, "step": 10}])
    {'dense': 1.25}
    """
    found = {}
    for leg, row in {row["leg"]: row for row in curves}.items():
        heals = leg == "recovery" or leg.startswith("round-")
        begun = round(rewound * row["step"]) if heals else 0
        found[leg] = row["epoch"] * (row["step"] - begun) / row["step"]
    return found


def _given(budget: Mapping[str, Any], processes: int) -> dict[str, Any]:
    given = {k: v for k, v in budget.items() if v is not None and k not in ("epochs", "processes")}
    return {**given, **({"processes": processes} if processes > 1 else {})}


def _groups(task: Task, model: nn.Module) -> dict[str, float] | None:
    """The metric by class of the test data, where the task says how, or classes are what it is about."""
    measure = task.groups or (by_class() if task.metric is accuracy else None)
    if measure is None:
        return None
    was = model.training
    model.eval()
    with torch.no_grad():
        found = dict(measure(model, task.batches("test", 0, 0)))
    model.train(was)
    return {str(k): float(v) for k, v in found.items()}


def _batch(task: Task) -> int:
    first = next(iter(task.batches("train", 0, 0)))
    return len(next(x for x in tree_leaves(first) if isinstance(x, Tensor)))


def _count(task: Task, split: Any) -> int:
    """Labels of a split; of text each position is one."""
    total = 0
    for batch in task.batches(split, 0, 0):
        total += [x for x in tree_leaves(batch) if isinstance(x, Tensor)][-1].numel()
    return total


@cache
def _examples(source: str, options: tuple[tuple[str, Any], ...], split: Any) -> int:
    task = find(source, **dict(options))
    return sum(len(next(x for x in tree_leaves(b) if isinstance(x, Tensor))) for b in task.batches(split, 0, 0))


@cache
def _hash(source: str, options: tuple[tuple[str, Any], ...], split: Any) -> str:
    """Of the data of a split, in the order of its first epoch."""
    total = hashlib.sha256()
    for batch in find(source, **dict(options)).batches(split, 0, 0):
        for x in tree_leaves(batch):
            if isinstance(x, Tensor):
                total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
