"""A study as text: one table a subject, methods by targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .ablation import ablations, text
from .cells import RATIOS
from .rows import Row
from .study import Study


def table(study: Study, rows: Sequence[Row], missing: int = 0) -> str:
    """Means over seeds, and half of their ranges; what is compared, and how sure, is in the report."""
    lines: list[str] = []
    for subject in study.subjects:
        own = [r for r in rows if r.subject == subject.name and r.role == "final"]
        metric = next((r.metric for r in own if r.done), "score")
        lines.append(f"{subject.name}: {metric} on the test data, mean over seeds")
        ratio = metric in RATIOS
        width = max([len(c.label) for c in study.contenders] + [5])
        lines.append(" " * width + "".join(f"{t:>18}" for t in study.targets) + f"{'seconds':>10}")
        dense = [r.score for r in own if r.dense and r.score is not None]
        if dense:
            lines.append(f"{'dense':<{width}}{_cell(dense, ratio):>18}")
        for contender in study.contenders:
            line, cost = f"{contender.label:<{width}}", []
            for target in study.targets:
                cell = [r for r in own if r.label == contender.label and r.target == target]
                scores = [r.score for r in cell if r.done and r.score is not None]
                cost += [s for r in cell if (s := r.figure("cost", "seconds")) is not None]
                lost = sum(not r.done or r.score is None for r in cell)
                said = _cell(scores, ratio) if scores else ("failed" if lost else "–")
                line += f"{said + (f' ({lost} failed)' if lost and scores else ''):>18}"
            lines.append(line + (f"{statistics.mean(cost):>10.1f}" if cost else ""))
        lines.append("")
    lines += text(ablations(study.to_dict(), rows))
    if missing:
        lines.append(f"{missing} runs are missing: the same command goes on with them")
    return "\n".join(lines).rstrip()


def _cell(scores: Sequence[float], ratio: bool = False) -> str:
    mean = statistics.geometric_mean(scores) if ratio else statistics.mean(scores)
    if abs(mean) >= 1e6:  # a perplexity of a model that is lost
        return f"{mean:.2g}"
    digits = 4 if abs(mean) < 2 else max(0, 3 - int(math.log10(abs(mean)))) if mean else 4
    spread = f" ±{(max(scores) - min(scores)) / 2:.{digits}f}" if len(scores) > 1 else ""
    return f"{mean:.{digits}f}{spread}"
