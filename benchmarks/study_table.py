"""A study as a Markdown table: the mean over seeds and half of its 95 % interval, methods by targets.

study_table.py results/studies/fashion [--percent]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="directory with study.yaml and rows.jsonl")
    parser.add_argument("--percent", action="store_true")
    args = parser.parse_args()
    from secateur.compare import load
    from secateur.compare.cells import tables
    from secateur.compare.leaders import leaders
    from secateur.compare.statistics import mean

    found = load(args.study)
    factor, top = (100.0, 100.0) if args.percent else (1.0, float("inf"))

    def shown(x: float) -> str:
        if args.percent:
            return f"{x:.1f}"
        return f"{x:.2f}" if x < 100 else f"{x:.0f}" if x < 1e5 else f"{x:.0e}".replace("e+0", "e")

    grid = tables(found.rows)
    best = {(x.subject, x.target): x for x in leaders(found.rows)}
    for subject in found.study.subjects:
        dense = [r.score for r in found.rows if r.dense and r.subject == subject.name and r.score is not None]
        own = {target: cells for (name, target), cells in grid.items() if name == subject.name}
        lines = []
        for contender in found.study.contenders:
            line = [f"`{contender.label}`"]
            for target, cells in own.items():
                cell = cells.get(contender.label)
                scores = [] if cell is None else list(cell.finite.values())
                if cell is None or not scores:
                    line.append("failed" if cell is not None and cell.failures else "–")
                    continue
                e = mean(scores, scale=cell.scale)
                text = shown(factor * e.value)
                if e.low is not None and e.high is not None and e.low != e.high:
                    text += f" [{shown(max(0.0, factor * e.low))}, {shown(min(top, factor * e.high))}]"
                first = best.get((subject.name, target))
                text = f"**{text}**" if first is not None and contender.label in first.members else text
                line.append(text + (f" ({cell.failures} failed)" if cell.failures else ""))
            lines.append(line)
        metric = next((r.metric for r in found.rows if r.subject == subject.name and r.metric), "score")
        print(f"{subject.name}: {metric}, dense {shown(factor * sum(dense) / max(1, len(dense)))}\n")
        print(table([metric, *own], lines))
        print("\nBold: not shown to be worse than the best.\n")


if __name__ == "__main__":
    main()
