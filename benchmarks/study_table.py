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
    factor, digits = (100.0, 1) if args.percent else (1.0, 2)
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
                text = f"{factor * e.value:.{digits}f}"
                if e.low is not None and e.high is not None:
                    text += f" [{factor * e.low:.{digits}f}, {factor * e.high:.{digits}f}]"
                first = best.get((subject.name, target))
                text = f"**{text}**" if first is not None and contender.label in first.members else text
                line.append(text + (f" ({cell.failures} failed)" if cell.failures else ""))
            lines.append(line)
        metric = next((r.metric for r in found.rows if r.subject == subject.name and r.metric), "score")
        print(f"{subject.name}: {metric}, dense {factor * sum(dense) / max(1, len(dense)):.{digits}f}\n")
        print(table([metric, *own], lines))
        print("\nBold: not shown to be worse than the best.\n")


if __name__ == "__main__":
    main()
