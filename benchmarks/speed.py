"""Pruning time of secateur and of llm-compressor: same model, same windows, same machine, one run.

Both sides run in fresh processes, taking turns. The time is of the pruning call alone: the model is loaded and the
windows are cut before it, and nothing is saved in it. A plain forward pass over the same windows is the yardstick.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, axes, child, environment, peer_axes, table, write_json

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter that has llmcompressor; without it only secateur is timed")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--targets", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[1], help="each is a row of its own")
    parser.add_argument("--peer-no-propagate", action="store_true", help="also the peer with propagate_error=False")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--side", choices=["ours", "forward"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    return parser.parse_args()


def side(args: argparse.Namespace) -> dict[str, Any]:
    """What the child process does: load, then prune (or run the model once), and time that."""
    import torch
    from safetensors.torch import load_file

    import secateur
    from secateur.measure.size import resident_bytes
    from secateur.models import load_model

    torch.set_num_threads(args.threads)
    model = load_model(Path(args.model), torch.float32)
    ids = load_file(args.file)["ids"]
    loaded = resident_bytes()
    begun = time.perf_counter()
    answer: dict[str, Any] = {}
    if args.side == "forward":
        with torch.no_grad():
            for rows in ids.split(4):
                model.model(input_ids=rows, use_cache=False)  # without the head, which no pruning runs
        seconds = time.perf_counter() - begun
    else:
        pruned = secateur.prune(model, args.methods[0], data=ids, **axes(args.targets[0]))
        seconds = time.perf_counter() - begun
        answer = {"sparsity": pruned.sparsity, "layers": len(pruned.records)}
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    threads = torch.get_num_threads()
    return {**answer, "seconds": seconds, "peak_memory": peak, "loaded_memory": loaded, "threads": threads}


def cut(args: argparse.Namespace, file: Path) -> tuple[Path, dict[str, Any]]:
    """The model's directory, and the windows, written where both sides read them."""
    from safetensors.torch import save_file

    from secateur.data import windows
    from secateur.models import load_tokenizer, resolve

    path = resolve(args.model)
    tokens = windows("text:calibration", load_tokenizer(path), count=args.windows, length=args.length)
    save_file({"ids": tokens.ids.contiguous()}, file)
    described = tokens.describe()
    return path, {k: described[k] for k in ("source", "sha256", "windows", "length", "tokens")}


def main() -> None:
    args = arguments()
    if args.side:
        print(json.dumps(side(args)), flush=True)
        return
    env = environment(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "windows.safetensors"
        path, data = cut(args, file)
        common = ["--model", path, "--threads", args.threads]
        mine = [sys.executable, HERE / "speed.py", *common, "--file", file]
        peer = [args.peer_python, HERE / "peer_llmcompressor.py", *common, "--windows", file]
        cells = [(m, t) for m in args.methods for t in args.targets]
        jobs: list[tuple[str, str, str, list[Any]]] = [("forward pass", "", "", [*mine, "--side", "forward"])]
        for method, target in cells:
            name = "secateur"
            jobs.append((name, method, target, [*mine, "--side", "ours", "--methods", method, "--targets", target]))
            if not args.peer_python or method not in ("wanda", "sparsegpt"):
                continue
            for batch in args.peer_batch:
                name = "llm-compressor" + (f" (batch {batch})" if len(args.peer_batch) > 1 else "")
                job = [*peer, "--method", method, *peer_axes(target), "--batch", batch]
                jobs.append((name, method, target, job))
                if args.peer_no_propagate:
                    jobs.append((f"{name}, no propagation", method, target, [*job, "--no-propagate"]))
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for repeat in range(args.repeats):  # everyone takes a turn before anyone takes the next
            for name, method, target, command in jobs:
                answer = child(command, args.threads)
                found.setdefault((name, method, target), []).append(answer)
                what = " ".join(x for x in (name, method, target) if x)
                print(f"{repeat + 1}/{args.repeats}  {what}: {answer['seconds']:.1f} s", file=sys.stderr, flush=True)
            versions = next((r["versions"] for runs in found.values() for r in runs if "versions" in r), None)
            result = {
                "environment": env,
                "peer_versions": versions,
                "settings": {"model": args.model, "data": data, "repeats": repeat + 1, "threads": args.threads},
                "rows": [summary(key, runs) for key, runs in found.items()],
            }
            write_json(args.out, result)  # after each round, so that a run which is cut off leaves whole rounds
    print(show(result))


def summary(key: tuple[str, str, str], runs: list[dict[str, Any]]) -> dict[str, Any]:
    name, method, target = key
    times = [r["seconds"] for r in runs]
    wrong = sorted({n for r in runs for n in r.get("changed_outside", [])})
    if wrong:
        raise SystemExit(f"{name} {method} {target} changed {wrong[0]}, which it must not: the times do not compare")
    return {
        "name": name,
        "method": method,
        "target": target,
        "seconds": [round(t, 3) for t in times],
        "median": round(statistics.median(times), 3),
        "best": round(min(times), 3),
        "sparsity": runs[0].get("sparsity"),
        "layers": runs[0].get("layers"),
        "peak_memory": max(r["peak_memory"] for r in runs),
        "over_model": max(r["peak_memory"] - r["loaded_memory"] for r in runs),
    }


def show(result: dict[str, Any]) -> str:
    """The table: times are medians, ratios are of medians."""
    rows, settings = result["rows"], result["settings"]
    forward = next(r["median"] for r in rows if r["name"] == "forward pass")
    ours = {(r["method"], r["target"]): r["median"] for r in rows if r["name"] == "secateur"}
    lines = []
    rows = sorted(rows, key=lambda r: (r["name"] != "forward pass", r["method"], r["target"], r["name"] != "secateur"))
    for r in rows:
        base = ours.get((r["method"], r["target"]))
        lines.append(
            [
                f"{r['method']} {r['target']}, {r['name']}" if r["method"] else r["name"],
                f"{r['median']:.1f}",
                f"{min(r['seconds']):.1f} to {max(r['seconds']):.1f}",
                f"{r['median'] / forward:.2f}",
                f"{r['median'] / base:.2f}" if base else "",
                "" if r["sparsity"] is None else f"{r['sparsity']:.6f}",
                f"{r['peak_memory'] / 2**30:.2f}",
                f"{r['over_model'] / 2**30:.2f}",
            ]
        )
    head = ["", "s", "range", "/ forward pass", "/ secateur", "sparsity", "peak GiB", "over loaded model GiB"]
    data, env = settings["data"], result["environment"]
    note = (
        f"{settings['model']}, {data['windows']} windows of {data['length']} tokens, {settings['threads']} threads, "
        f"{settings['repeats']} repeats taking turns, {env['cpu']}; time of the pruning call alone"
    )
    return f"{table(head, lines)}\n\n{note}"


if __name__ == "__main__":
    main()
