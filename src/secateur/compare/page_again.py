"""How each point of a study is made again: a command line for a run, and its recipe as YAML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SecateurError
from ..frozen import plain, thawed
from ..recipe import Recipe
from ..report import values as v
from ..report.reproduce import yaml_of
from .rows import Row, trains_itself

#: Axes that both commands have an option for.
_OPTIONS = ("granularity", "allocation", "criterion", "solver", "recovery", "schedule", "steps")
_SHARE = re.compile(r"[\d.]+|\d+:\d+")
_VARIES = ("sparsity", "seed")


def commands(study: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """One command line for each row, in their order."""
    methods = {_label(m): m for m in v.items(study.get("methods")) if isinstance(m, Mapping)}
    tasks = {task_name(t): t for t in v.items(study.get("tasks"))}
    return [_command(study, row, tasks.get(row.subject), methods.get(row.label)) for row in rows]


def _label(method: Mapping[str, Any]) -> str:
    return str(method.get("label", method.get("method", "")))


def task_name(task: Any) -> str:
    """What rows call a task: its source, with the sizes that are not its own."""
    if not isinstance(task, Mapping):
        return str(task)
    options = task.get("options")
    given = sorted(options.items()) if isinstance(options, Mapping) else []
    sizes = ",".join(f"{k}={x}" for k, x in given)
    return f"{task.get('task')} ({sizes})" if sizes else str(task.get("task"))


def _command(study: Mapping[str, Any], row: Row, task: Any, method: Mapping[str, Any] | None) -> str:
    words = ["secateur", "train" if row.kind == "task" else "prune"]
    count, device = row.figure("protocol", "processes"), v.dig(row.result, "protocol", "device")
    if row.kind == "task" and count is not None:
        words = ["torchrun", "--nproc-per-node", f"{count:g}", "-m", *words]
    options = task.get("options") if isinstance(task, Mapping) else None
    words.append(str(task.get("task")) if isinstance(task, Mapping) else row.subject)
    if row.recipe is not None:
        words += _of_recipe(row)
        several = isinstance(row.recipe.get("steps"), (list, tuple))  # of a compound, which says its amounts
        if row.target and not several and not _SHARE.fullmatch(row.target):
            words += ["--target", row.target]
    elif row.kind != "task":
        return ""  # the model as it is
    if row.kind == "task":
        if method is not None and isinstance(method.get("when"), str):
            words += ["--when", method["when"]]
        if (epochs := row.figure("protocol", "epochs")) is not None:
            words += ["--epochs", f"{epochs:g}"]
        for key, value in sorted(options.items()) if isinstance(options, Mapping) else ():
            words += ["--set", f"task.{key}={_value(value)}"]
        words += ["--device", str(device)] if device else []
    else:
        words += ["--data", str(study["data"])] if study.get("data") else []
        for key, option in (("windows", "--windows"), ("length", "--length")):
            if (size := row.figure("protocol", key)) is not None:
                words += [option, f"{size:g}"]
        words += ["--eval", str(study["evaluation"])] if study.get("evaluation") else []
    words += ["--seed", str(row.seed), "--out", f"runs/{row.digest[:8]}"]
    return shlex.join(words)


def _of_recipe(row: Row) -> list[str]:
    """Options that make the recipe; a file where options cannot say it."""
    assert row.recipe is not None
    if trains_itself(row.recipe):
        own = row.recipe
        knobs = {**dict(own.get("knobs") or {}), **{k: own[k] for k in ("length", "rate") if k in own}}
        method = str(own.get("method"))
        return [
            "--method",
            method,
            *(w for k, x in sorted(knobs.items()) for w in ("--set", f"{method}.{k}={_value(x)}")),
        ]
    try:
        recipe = Recipe.from_dict({**row.recipe, "seed": row.seed})
        base = Recipe.of(recipe.method, seed=row.seed)
        words = ["--method", recipe.method]
        given: dict[str, Any] = {}
        for axis in _OPTIONS:
            if (value := getattr(recipe, axis)) != getattr(base, axis) and value is not None:
                given[axis] = value
                words += [f"--{axis}", str(value)]
        if recipe.sparsity != base.override(**given).sparsity or row.target.replace(".", "", 1).isdigit():
            given["sparsity"] = recipe.sparsity
            words += ["--sparsity", f"{recipe.sparsity:.12g}"]
        for axis in ("only", "skip"):
            if getattr(recipe, axis) != getattr(base, axis):
                given[axis] = list(getattr(recipe, axis))
                words += [word for glob in given[axis] for word in (f"--{axis}", glob)]
        knobs = {a: dict(k) for a, k in thawed(recipe.knobs).items() if k != thawed(base.knobs).get(a)}
        if knobs:
            given["knobs"] = knobs
            words += [
                word
                for a, own in sorted(knobs.items())
                for k, x in own.items()
                for word in ("--set", f"{a}.{k}={_value(x)}")
            ]
        if base.override(**given) == recipe:
            return words
    except (SecateurError, TypeError):
        pass  # of another version: its file says what it was
    return ["--recipe", f"{file_of(row.label)}.yaml"]


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def file_of(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "recipe"


def recipes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The recipe of each contender as YAML, once for all targets and seeds that differ in sparsity and seed alone."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row.recipe is None or trains_itself(row.recipe):  # a command says all of it
            continue
        same = str(sorted((k, str(x)) for k, x in plain(dict(row.recipe)).items() if k not in _VARIES))
        group = groups.setdefault((row.label, same), {"label": row.label, "recipe": row.recipe, "cells": {}})
        where = (row.subject, row.target)
        group["cells"].setdefault(where, (row.recipe.get("sparsity"), []))[1].append(row.seed)
    made = []
    for group in groups.values():
        text = yaml_of(group["recipe"])
        cells = group["cells"]
        targets = list(dict.fromkeys(t for _, t in cells))
        seeds = sorted({s for _, own in cells.values() for s in own})
        made.append(
            {
                "label": group["label"],
                "targets": ", ".join(targets),
                "seeds": ", ".join(map(str, seeds)),
                "yaml": text,
                "file": file_of(group["label"]),
                "others": sorted({v.word(s) for s, _ in cells.values()} - {v.word(group["recipe"].get("sparsity"))}),
            }
        )
    return sorted(made, key=lambda one: str(one["label"]))
