"""The recommender, scored: each task is left out in turn, and the first choice held against the best in hindsight.

    recommend.py STUDY... [--shipped] [--older]      prints the table, writes results/recommend.json
    recommend.py --figures                           makes src/secateur/recommend/speed.json of benchmark results
    recommend.py STUDY --ship fashion [--subject NAME=KIND:PARAMETERS]      makes evidence/fashion.jsonl.gz of a study

``--older`` takes what was measured before there were studies (results of trends.py, quality.py and fashion.py) as rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import HERE, RESULTS, axes, environment, table, write_json

PACKAGE = HERE.parent / "src" / "secateur" / "recommend"
#: Whose figures of speed ship.
FIGURES = ("sparse.json", "sparse_avx512.json", "structured.json")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", nargs="*", type=Path, help="directories that secateur compare wrote, or exported files"
    )
    parser.add_argument("--shipped", action="store_true", help="with the studies that ship with the package")
    parser.add_argument("--older", action="store_true", help="with what was measured before there were studies")
    parser.add_argument("--out", type=Path, default=RESULTS / "recommend.json")
    parser.add_argument("--figures", action="store_true", help="make speed.json and do nothing else")
    parser.add_argument("--ship", metavar="NAME", help="make the file that ships of one study and do nothing else")
    parser.add_argument("--subject", action="append", default=[], help="NAME=KIND:PARAMETERS, for --ship")
    return parser.parse_args()


def figures() -> dict[str, Any]:
    """The figures of speed that ship with the package."""
    from secateur.recommend.speed import summarise

    return summarise({name: json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in FIGURES})


def older() -> Iterator[Any]:
    """Runs of older results."""
    from secateur.recommend.evidence import Run
    from secateur.recommend.subject import Subject

    for row in (*trends(), *quality(), *clothes()):
        kind = {"fashion-vgg": "cnn", "fashion-cnn": "cnn", "demo": "decoder"}[row.subject]
        size = {"fashion-vgg": 231_602, "fashion-cnn": 20_000, "demo": 134_515_008}[row.subject]
        yield Run(row, "older results", Subject(row.subject, kind, size))


def made(subject: str, kind: str, label: str, target: str, seed: int, metric: str, value: float, **recipe: Any) -> Any:
    """A row of an older result."""
    from secateur import Recipe
    from secateur.compare import Row

    name, _, _ = label.partition(":")
    chosen = None if label == "dense" else Recipe.of(name, **recipe).to_dict()
    higher = metric == "accuracy"
    result = {"metric": metric, "higher_is_better": higher, "test": value}
    return Row(f"{subject} {label} {target} {seed}", subject, kind, label, chosen, target, seed, result=result)


def trends() -> Iterator[Any]:
    """Of trends.py: a plain network on Fashion-MNIST, by sparsity."""
    from trends import parsed

    for line in (RESULTS / "trends-fashion-vgg.jsonl").read_text(encoding="utf-8").splitlines():
        r = json.loads(line)
        target = "" if r["method"] == "dense" else f"{r['sparsity']:g}"
        yield made(
            "fashion-vgg", "task", r["method"], target, r["seed"], "accuracy", r["metric"], **parsed(r["method"])[1]
        )


def quality() -> Iterator[Any]:
    """Of quality.py: perplexities of SmolLM2-135M, by sparsity and pattern."""
    for cell in json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["cells"].values():
        if not cell["method"].startswith("llm-compressor"):
            given = axes(cell["target"]) if cell["target"] else {}
            yield made("demo", "model", cell["method"], cell["target"], 0, "perplexity", cell["perplexity"], **given)


def clothes() -> Iterator[Any]:
    """Of fashion.py: a small network on Fashion-MNIST, half of its operations gone, refitted."""
    for key, values in json.loads((RESULTS / "fashion.json").read_text(encoding="utf-8"))["accuracy"].items():
        label, _, recovery = key.partition("|")
        for seed, value in enumerate(values):
            if label == "dense" or recovery == "refit":
                target = "" if label == "dense" else "flops 50%"
                yield made("fashion-cnn", "model", label, target, seed, "accuracy", value / 100)


def shown(found: dict[str, Any]) -> str:
    """The table of what was scored."""

    def cell(value: dict[str, Any]) -> str:
        half = "" if value["half"] is None else f" ± {value['half']:.3f}"
        return f"{value['mean']:.3f}{half}"

    first = ("recommender", "best of the other tasks", "default", "random")
    policies = found["policies"]
    rest = sorted(
        (p for p in policies if p not in first), key=lambda p: (-policies[p]["tasks"], policies[p]["spreads"]["mean"])
    )
    rows = [
        [p, cell(policies[p]["spreads"]), cell(policies[p]["drop"]), str(policies[p]["tasks"])]
        for p in (*first, *rest)
        if p in policies
    ]
    lines = [
        table(["choice", "regret", "drop beyond the best", "tasks"], rows),
        "",
        *(v["text"] for v in found["verdict"]),
    ]
    kept = found["intervals"]
    if kept["count"]:
        lines.append(f"intervals of drops: {100 * kept['held']:.0f} % of {kept['count']} held what came, 80 % were to")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.figures:
        return write_json(PACKAGE / "speed.json", figures())
    from secateur.recommend.evidence import export, gather
    from secateur.recommend.regret import score
    from secateur.recommend.situation import count
    from secateur.recommend.subject import Subject

    if args.ship:
        said = (text.partition("=") for text in args.subject)
        subjects = {n: Subject(n, k.partition(":")[0], count(k.partition(":")[2])) for n, _, k in said}
        target = PACKAGE / "evidence" / f"{args.ship}.jsonl.gz"
        target.parent.mkdir(exist_ok=True)
        return print(f"{export(args.studies[0], target, subjects)} rows in {target}")
    runs = gather(args.studies, with_shipped=args.shipped) + (list(older()) if args.older else [])
    found = score(runs)
    print(shown(found))
    given = {"studies": [str(s) for s in args.studies], "shipped": args.shipped, "older": args.older}
    write_json(args.out, {"settings": given, **found, "environment": environment()})


if __name__ == "__main__":
    main()
