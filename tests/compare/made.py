"""Rows of made-up studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.compare.rows import Row


def row(
    label: str,
    target: str,
    seed: int,
    score: float | None,
    *,
    subject: str = "toy",
    metric: str = "accuracy",
    up: bool = True,
    recipe: Mapping[str, Any] | None = None,
    failed: bool = False,
    **result: Any,
) -> Row:
    """A final run; of the label ``dense`` the baseline."""
    found: dict[str, Any] = {"metric": metric, "higher_is_better": up, "valid": score, "test": score, **result}
    plain = None if label == "dense" else {"method": label, "criterion": label, **(recipe or {})}
    return Row(
        f"{subject}/{label}/{target}/{seed}",
        subject,
        "task",
        label,
        plain,
        "" if label == "dense" else target,
        seed,
        status="failed" if failed else "done",
        reason="out of memory" if failed else None,
        result={} if failed else found,
    )


def rows(scores: Mapping[str, Iterable[float | None]], target: str = "0.9", **more: Any) -> list[Row]:
    """label -> a score a seed; None is a run that failed."""
    return [
        row(label, target, seed, score, failed=score is None, **more)
        for label, of_label in scores.items()
        for seed, score in enumerate(of_label)
    ]
