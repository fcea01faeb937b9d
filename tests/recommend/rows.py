"""Synthetic runs: what methods lose is known, so that it is known what the recommender should find."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from secateur import Recipe
from secateur.compare import Row
from secateur.recommend.evidence import Run
from secateur.recommend.subject import Subject

METHODS = ("magnitude", "global-magnitude", "random", "wanda", "ria", "sparsegpt", "owl-sparsegpt", "admm")


def row(
    subject: str, label: str, target: str, seed: int, score: float | None, *, kind: str = "task",
    metric: str = "accuracy", status: str = "done", **result: object,
) -> Row:  # fmt: skip
    """One run; a target of ``0.9`` is its sparsity."""
    recipe = None
    if label != "dense":
        given = {"granularity": target} if ":" in target else {"sparsity": float(target)} if target[0] == "0" else {}
        recipe = Recipe.of(label.partition("/")[0], **given).to_dict()
    found = {"metric": metric, "higher_is_better": metric == "accuracy", "test": score, **result}
    return Row(
        f"{subject}-{label}-{target}-{seed}", subject, kind, label, recipe, target, seed, status=status,
        reason=None if status == "done" else "it broke", result=found if status == "done" else {},
    )  # fmt: skip


def study(
    name: str, subject: Subject, drops: Mapping[str, float], *, targets: tuple[str, ...] = ("0.5", "0.7"),
    seeds: int = 2, noise: float = 0.002, task: bool = False, own: bool = False, dense: float = 0.9,
) -> list[Run]:  # fmt: skip
    """A study of one subject: every method loses what is said, more at the later targets."""
    draw = random.Random(f"{name}-{subject.name}")
    kind = "task" if task else "model"
    rows = [row(subject.name, "dense", "", s, dense, kind=kind) for s in range(seeds)]
    for k, target in enumerate(targets, 1):
        for label, drop in drops.items():
            for s in range(seeds):
                rows.append(
                    row(subject.name, label, target, s, dense * (1 - k * drop + draw.gauss(0, noise)), kind=kind)
                )
    return [Run(r, name, subject, own) for r in rows]


def world(per_kind: int, loses: Callable[[str, str, random.Random], float], seed: int = 0) -> list[Run]:
    """Tasks of two kinds, one study for each."""
    draw = random.Random(seed)
    runs = []
    for kind in ("cnn", "encoder"):
        for k in range(per_kind):
            subject = Subject(f"{kind}-{k}", kind, 1_000_000)
            runs += study(f"study {kind} {k}", subject, {m: loses(kind, m, draw) for m in METHODS})
    return runs
