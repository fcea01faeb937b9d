"""Structured pruning over many architectures: what comes out of secateur and of torch-pruning, model by model.

Each model and side runs in a process of its own, within a time limit. Results are stored as they come, and a rerun
does only what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from common import HERE, RESULTS, environment, start, table, write_json
from zoo_models import case, names

OUTCOMES = ("smaller", "little", "refused", "wrong", "crash", "timeout", "unbuilt")
SIDES = {"ours": "secateur", "peer": "torch-pruning"}
GOAL = 0.95


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[str(HERE / "zoo_models.txt")], help="entries, or files of them")
    parser.add_argument(
        "--timeout", type=int, default=120, help="seconds for one model and side; the checks get as many"
    )
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="torch-pruning as well")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.json")
    parser.add_argument(
        "--redo",
        nargs="?",
        const="all",
        choices=["all", "stale", "bad"],
        help="measure again: all, those of other sources of secateur, or secateur's that are not smaller and proven",
    )
    parser.add_argument("--print", action="store_true", help="print what is stored and stop")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    return parser.parse_args()


def side(args: argparse.Namespace) -> None:
    """What a child process does: one model on one side. Prints what is known so far as JSON, line by line."""
    import torch

    if args.side == "ours":
        from zoo_ours import run
    else:
        from zoo_peer import run
    from secateur.errors import SecateurError

    torch.set_num_threads(args.threads)
    known: dict[str, Any] = {"stage": "start"}

    def say(**facts: Any) -> None:
        if facts.get("stage") in ("build", "check"):
            arm(args.timeout)
        known.update(facts)
        print(json.dumps(known), flush=True)

    try:
        say(**run(case(args.models[0]), say))
    except SecateurError as error:
        say(outcome="refused", reason=f"{known['stage']}: {line(error)}")
    except Exception as error:  # that there is none of these is what the benchmark shows
        outcome = "unbuilt" if known["stage"] in ("start", "build") else "crash"
        tail = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)][-6:]
        say(outcome=outcome, reason=f"{known['stage']}: {line(error)}", traceback=tail)


def line(error: BaseException) -> str:
    """Type and message; cut off, for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def arm(seconds: int) -> None:
    """End this process after so many seconds, whatever code it is in."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)


def measure(args: argparse.Namespace, name: str, which: str) -> dict[str, Any]:
    """Run a child process, and make a record of what it said, however it ended."""
    command = [sys.executable, "-W", "ignore", HERE / "zoo.py", "--side", which, "--models", name]
    command += ["--timeout", args.timeout, "--threads", args.threads]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "output.txt"
        begun = time.perf_counter()
        process = start(command, args.threads, file)
        try:
            code = process.wait(2 * args.timeout + 120)  # it ends itself in time, where the system has alarms
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait() and None
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - begun
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    known: dict[str, Any] = {"stage": "start"}
    for text in lines:
        if text.startswith("{"):
            with contextlib.suppress(ValueError):
                known = json.loads(text)
    known["wall"] = round(wall, 1)
    if "outcome" not in known:
        late = code is None or code == -getattr(signal, "SIGALRM", 14)
        last = next((x for x in reversed(lines) if x.strip() and not x.startswith("{")), "")
        known["outcome"] = "timeout" if late else "crash"
        known["reason"] = f"during {known['stage']}" if late else f"exit code {code}: {last[:160]}"
    return known


def sources() -> str:
    """A digest of the package's code: the version alone does not change between commits."""
    import secateur

    digest = hashlib.sha256()
    for file in sorted(Path(str(secateur.__file__)).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def version(which: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(SIDES[which])
    return "none"


def key(args: argparse.Namespace, name: str, which: str) -> str:
    return f"{name} | {SIDES[which]} {version(which)} | {args.timeout} s, {args.threads} threads"


def due(args: argparse.Namespace, found: dict[str, Any] | None, which: str, code: str) -> bool:
    """Whether a model and side is to be measured."""
    if found is None or args.redo == "all":
        return True
    stale = which == "ours" and found.get("sources") != code
    return (args.redo == "stale" and stale) or (
        args.redo == "bad" and which == "ours" and found["outcome"] != "smaller"
    )


def main() -> None:
    args = arguments()
    if args.side:
        side(args)
        return
    chosen = names(args.models)
    sides = ["ours", *(["peer"] if args.peer else [])]
    stored: dict[str, Any] = {"results": {}}
    if args.out.exists():
        stored = json.loads(args.out.read_text(encoding="utf-8"))
    if not args.print:
        if args.peer and importlib.util.find_spec("torch_pruning") is None:
            raise SystemExit("torch-pruning is not installed: pip install torch-pruning, or give --no-peer")
        code, lock = sources(), threading.Lock()
        stored["environment"] = environment(args.threads)
        for package in ("timm", "torch-pruning"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                stored["environment"]["versions"][package] = metadata.version(package)
        stored["settings"] = {"timeout": args.timeout, "threads": args.threads, "jobs": args.jobs}
        jobs = [(n, w) for n in chosen for w in sides if due(args, stored["results"].get(key(args, n, w)), w, code)]

        def job(number: int, name: str, which: str) -> None:
            record = measure(args, name, which)
            record |= {"model": name, "side": which, "version": version(which), "sources": code}
            with lock:
                stored["results"].pop(key(args, name, which), None)  # the newest last
                stored["results"][key(args, name, which)] = record
                write_json(args.out, stored)
            what = f"{record['outcome']} {record['reason']}"[:150]
            print(f"{number}/{len(jobs)}  {name}, {SIDES[which]}: {what}", file=sys.stderr, flush=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(job, i, *x) for i, x in enumerate(jobs, 1)]
            try:
                for run in runs:
                    run.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    print(show(stored, chosen, sides))


def show(stored: dict[str, Any], chosen: list[str], sides: list[str]) -> str:
    """The table, what was not smaller and why, and the counts."""
    newest = {(r["model"], r["side"]): r for r in stored["results"].values()}
    rows, remarks = [], []
    for name in chosen:
        ours, peer = newest.get((name, "ours")), newest.get((name, "peer"))
        if ours is None and peer is None:
            continue
        size = next((r["params"][0] for r in (ours, peer) if r and "params" in r), 0)
        rows.append([name, f"{size / 1e6:.2f}", *cells_ours(ours), *(cells_peer(peer) if "peer" in sides else [])])
        for which in sides:
            r = newest.get((name, which))
            if r and r["reason"]:
                remarks.append(f"- {name}, {SIDES[which]}, {r['outcome']}: {r['reason']}")
            elif r and r.get("check", {}).get("kind") == "statistics":
                remarks.append(f"- {name}, {SIDES[which]}, {r['outcome']}: by the library's own proof alone")
    head = ["", "M params", "secateur", "gone", "proof", "check", "gradients", "save, load", "plan s", "shrink s"]
    head += ["torch-pruning", "gone", "s"] if "peer" in sides else []
    parts = [table(head, rows), "\n".join(remarks)]
    parts.append("\n".join(summary(w, [r for n in chosen if (r := newest.get((n, w)))]) for w in sides))
    return "\n\n".join(x for x in parts if x)


def gone(record: dict[str, Any]) -> str:
    before, after = record.get("params") or (0, 0)
    return (
        f"{100 * (1 - after / before):.0f} %" if before and record["outcome"] in ("smaller", "little", "wrong") else ""
    )


def cells_ours(r: dict[str, Any] | None) -> list[str]:
    if r is None:
        return [""] * 8
    proof, check, seconds = r.get("proof") or {}, r.get("check"), r.get("seconds") or {}
    error = proof.get("error")
    return [
        r["outcome"],
        gone(r),
        "" if error is None else f"{error:.0e}",
        "" if not check else check["kind"] + ("" if check["kind"] == "statistics" else f" {check['error']:.0e}"),
        *(("" if k not in r else "ok" if r[k] == "ok" else "no") for k in ("gradients", "saved")),
        *(f"{seconds[k]:.1f}" if k in seconds else "" for k in ("plan", "shrink")),
    ]


def cells_peer(r: dict[str, Any] | None) -> list[str]:
    if r is None:
        return [""] * 3
    seconds = (r.get("seconds") or {}).get("prune")
    return [r["outcome"], gone(r), "" if seconds is None else f"{seconds:.1f}"]


def summary(which: str, records: list[dict[str, Any]]) -> str:
    """Counts by outcome; the share is of all models that can be built, but for those of which nothing can go."""
    records, nothing = [[r for r in records if r["model"].startswith("none:") is x] for x in (False, True)]
    counts = Counter(r["outcome"] for r in records)
    able = len(records) - counts["unbuilt"]
    listed = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
    proven = "smaller and proven" if which == "ours" else "smaller and running (what it computes is not checked)"
    text = f"{SIDES[which]}: {listed}; {counts['smaller']} of {able} {proven}"
    text += f", {counts['smaller'] / able:.1%}" if able else ""
    if which == "ours":
        kinds = Counter(r["check"]["kind"] for r in records if r["outcome"] == "smaller")
        text += f" (goal {GOAL:.0%}; checked: {', '.join(f'{n} {k}' for k, n in kinds.most_common())})"
    times = [(r["wall"], r["model"]) for r in records if r["model"].startswith("gqa:")]
    if times:
        text += f"; grouped queries: slowest {max(times)[1]}, {max(times)[0]:.0f} s with start and checks"
    for r in nothing:
        text += f"; {r['model']}: {r['outcome']}" + (f" ({r['reason']})" if r["reason"] else "")
    return text


if __name__ == "__main__":
    main()
