"""The survey's contrasts on a task, or a language model, in one store: what each answers, beside what is reported.

    contrasts.py task fashion-resnet --set images=4000 width=8 depth=1 --epochs 3 --store DIR
    contrasts.py model demo --store DIR --windows 8 --length 256 --eval-windows 15

Runs that contrasts have in common are made once. A second start goes on with what is missing. Each contrast's rows,
protocol and report are written to ``results/studies/contrast-NAME-SUBJECT``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from common import RESULTS, table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["task", "model"])
    parser.add_argument("subject")
    parser.add_argument("--set", nargs="*", default=[], help="sizes of the task: images=4000")
    parser.add_argument(
        "--other", nargs="*", default=["digits", "width=8"], help="task that masks come from, its sizes"
    )
    parser.add_argument("--only", nargs="*", help="names of contrasts")
    parser.add_argument("--sparsity", nargs="*", help="some of the targets of contrasts that have these")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=36)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--store", type=Path, required=True, help="directory of all runs")
    parser.add_argument("--show", action="store_true", help="only write what there is")
    return parser.parse_args()


def sizes(items: list[str]) -> dict[str, int]:
    return {k: int(v) for k, _, v in (x.partition("=") for x in items)}


def main() -> None:
    args = arguments()
    from secateur.compare import compare, write_report, write_rows
    from secateur.compare.contrasts import contrasts, study_of
    from secateur.compare.engine import collect
    from secateur.compare.report import answers

    budget = {}
    if args.kind == "model":
        budget = {"windows": args.windows, "length": args.length, "eval_windows": args.eval_windows}
    lines = []
    for name, asked in contrasts().items():
        if not asked.sides(args.kind) or (args.only and name not in args.only):
            continue
        some = [t for t in args.sparsity or () if t in asked.levels_of(args.kind)]
        study = study_of(
            name, args.kind, args.subject, options=sizes(args.set), epochs=args.epochs, seeds=args.seeds, budget=budget,
            other={"task": args.other[0], **sizes(args.other[1:])}, targets=some or None,
        )  # fmt: skip
        if args.show:
            made = collect(study, args.store)
            if made.missing:
                print(f"{name}: {made.missing} runs are missing")
        else:
            made = compare(
                study, args.store, workers=args.workers, threads=args.threads,
                progress=lambda t, n=name: print(f"{n}: {t.done} of {t.total}, {t.left or 0:.0f} s left", flush=True),
            )  # fmt: skip
        words = re.sub(r"\W+", "-", args.subject).strip("-")
        out = RESULTS / "studies" / f"contrast-{name}-{words}"
        out.mkdir(parents=True, exist_ok=True)
        (out / "study.yaml").write_text(study.dump(), encoding="utf-8")
        write_rows(out / "rows.jsonl", made.rows)
        write_report(made, out / "report.html")
        for one in answers(made):
            for part in one.parts:
                lines.append([name, part.text, part.agreement or "–"])
    print(table(["contrast", "what the runs say", "reported"], lines))


if __name__ == "__main__":
    main()
