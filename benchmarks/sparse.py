"""Sparse kernels on this machine's processor: layers, one token, convolutions, whole models; dense in the same run.

Dense is torch in float32, and every engine of `sparse_peers.py` that is installed; a row is compared with the fastest
one of the same precision or a higher one. Candidates take turns, so that whatever else the machine does falls on all of
them alike. The share of the limit is of what this script measures first: bytes a second from memory (a sum over a large
tensor) and multiplications a second (a large matrix product).
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparse_peers
from common import RESULTS, environment, table, write_json
from sparse_peers import ALLOWED, DENSE, PEERS, SPARSE, Case, Engine, engines, errors, versions

SHAPES = [(1536, 576), (3072, 768), (8192, 2048)]
LEVELS = [0.5, 0.8, 0.9, 0.95]
#: Of those, at which zeros are also put four together along a row.
FOURS = [0.8]
#: Outputs, inputs, how many of them.
STACKS = [(3072, 768, 16), (8192, 2048, 3)]
#: Of ResNet-50: inputs, outputs, kernel, stride, size of the image.
CONVOLUTIONS = [
    (64, 64, 3, 1, 56), (256, 64, 1, 1, 56), (128, 128, 3, 1, 28), (128, 128, 3, 2, 56), (512, 128, 1, 1, 28),
    (256, 256, 3, 1, 14), (256, 1024, 1, 1, 14), (512, 512, 3, 1, 7), (512, 2048, 1, 1, 7),
]  # fmt: skip
PARTS = ["idle", "linear", "token", "convolution", "models"]


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, pause: float = 0) -> dict[str, float]:
    """Median seconds of each, with a pause of so many milliseconds after each run.

    After a pause threads are asleep, and waking them takes longer than small layers do: each turn has a run that does
    not count before the one that does. What needs 30 times as long as the first takes one turn only.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    slow: set[str] = set()
    first = float("inf")
    for turn in range(repeats + 2):
        for name, run in runs.items():
            if name in slow:
                continue
            if pause:
                run()
            begun = time.perf_counter()
            own = run()
            took = own if isinstance(own, float) else time.perf_counter() - begun  # a process of its own says it itself
            if name == next(iter(runs)):
                first = min(first, took)
            if turn == 1 and took > 30 * first:
                slow.add(name)
            if turn >= 2 or name in slow:
                times[name].append(took)
            if pause:
                time.sleep(pause / 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def zeroed(*shape: int, share: float, fours: bool = False) -> Any:
    """A random weight with so many zeros, of a matrix anywhere or four along a row together."""
    import torch

    if fours:
        kept = torch.rand(shape[0], shape[1] // 4) >= share
        return torch.randn(*shape) * kept.repeat_interleave(4, 1)
    return torch.randn(*shape) * (torch.rand(*shape) >= share)


def limits() -> dict[str, float]:
    """Bytes a second from memory, and multiplications a second."""
    import torch

    large, square = torch.ones(64 << 20), torch.randn(2048, 2048)
    found = interleaved({"sum": large.sum, "product": lambda: square @ square}, 7)
    return {"bytes": large.numel() * 4 / found["sum"], "multiplications": 2048**3 / found["product"]}


def sparse_linear(weights: list[Any], kind: str = "float32", index: str = "col") -> list[Any]:
    """Packed as the chooser does it."""
    from torch import nn

    from secateur.compression.candidates import Site

    site = Site("", nn.Linear(1, 1))
    return [site.made(kind, index, w, None) for w in weights]


def beside(
    args: argparse.Namespace, layers: list[Any], x: Any, sparse: dict[str, list[Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Dense layers, sparse ones and the peers in turns. All are compared with float64 first."""
    reference = [copy.deepcopy(m).double()(x.double()).numpy() for m in layers]
    case = Case(layers, x, args.threads)
    found, absent = engines(args.peers, case)
    for name, own in {"dense": layers, **sparse}.items():
        found[name] = Engine(lambda own=own: [m(x) for m in own], lambda own=own: [m(x).numpy() for m in own])
    off = {}
    for name in list(found):
        try:
            off[name] = errors(found[name].outputs(), reference)
        except Exception as error:
            if name not in args.peers:
                raise
            off[name], absent[name] = float("inf"), f"{type(error).__name__}: {error}"[:300]
        if off[name] > ALLOWED[kind_of(name)]:
            absent.setdefault(name, f"its outputs are off by {off[name]:.2g}")
            if name not in args.peers:
                raise SystemExit(f"{facts['case']}: {name} computes something else, relative error {off[name]:.2g}")
            del found[name]
    order = ["dense", *sparse, *(n for n in args.peers if n in found)]
    seconds = interleaved({name: found[name].run for name in order}, args.repeats, args.pause)
    case.close()
    row = {
        **facts,
        "seconds": seconds,
        "best": {kind: best(seconds, kind) for kind in ALLOWED},
        "errors": {n: e for n, e in off.items() if e != float("inf")},
        "absent": absent,
        "notes": {n: found[n].note for n in order if found[n].note},
    }
    return row


def kind_of(name: str) -> str:
    """The precision of a candidate."""
    if name in PEERS:
        return PEERS[name][0]
    return name.split(".")[1].removesuffix("-dynamic") if name.startswith("sparse.") else "float32"


def best(seconds: dict[str, float], kind: str, own: bool = False) -> str:
    """The fastest dense engine of a precision or a higher one, torch among them; or the fastest kernel of ours.

    Where bfloat16 has no arithmetic, dense float32 is the rival.
    """
    kinds = [kind] if own else [*ALLOWED][: [*ALLOWED].index(kind) + 1]
    fits = [n for n in seconds if kind_of(n) in kinds and (n.startswith("sparse.") if own else n in {"dense", *DENSE})]
    return min(fits, key=seconds.__getitem__, default="")


def linear(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    rows = []
    for out, inputs in SHAPES[: 1 if args.shapes == "small" else None]:
        dense = nn.Linear(inputs, out, bias=False)
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs)
            levels = args.levels or LEVELS
            for share, fours in [*((s, False) for s in levels), *((s, True) for s in levels if s in FOURS)]:
                dense.weight.data = zeroed(out, inputs, share=share, fours=fours)
                sparse = {f"sparse.{k}": sparse_linear([dense.weight], k) for k in ALLOWED}
                sparse["sparse.int8-dynamic.quad"] = sparse_linear([dense.weight], "int8-dynamic", "quad")
                case = f"{out} x {inputs}, {tokens} tokens{', zeros in fours' if fours else ''}"
                row = beside(args, [dense], x, sparse, {"case": case, "zeros": share})
                rate = tokens * sparse["sparse.float32"][0].packed.nonzeros / row["seconds"]["sparse.float32"]
                rows.append({**row, "of limit": rate / limit["multiplications"]})
                tell(rows[-1])
    return rows


def token(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    """A stack of layers that does not fit into the caches, one token. A peer runs it as one model."""
    import torch
    from torch import nn

    rows = []
    for out, inputs, count in STACKS if args.shapes == "all" else [(1536, 576, 16)]:
        x = torch.randn(1, inputs)
        for share in args.levels or LEVELS[:3]:
            stack = [nn.Linear(inputs, out, bias=False) for _ in range(count)]
            for d in stack:
                d.weight.data = zeroed(out, inputs, share=share)
            weights = [d.weight for d in stack]
            sparse = {
                f"sparse.{kind}.{index}": sparse_linear(weights, kind, index)
                for kind in ALLOWED
                for index in ("bits", "col")
            }
            sparse["sparse.int8-dynamic.bits"] = sparse_linear(weights, "int8-dynamic", "bits")
            row = beside(args, stack, x, sparse, {"case": f"{count} x {out} x {inputs}, 1 token", "zeros": share})
            seconds = row["seconds"]
            fast = best(seconds, "float32", own=True)
            row["of limit"] = sum(m.packed.bytes() for m in sparse[fast]) / seconds[fast] / limit["bytes"]
            row["dense of limit"] = count * out * inputs * 4 / seconds["dense"] / limit["bytes"]
            rows.append(row)
            tell(row)
    return rows


def convolution(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    from secateur.compression import SparseConv2d
    from secateur.formats import pack

    rows = []
    for inputs, out, kernel, stride, size in CONVOLUTIONS[: 2 if args.shapes == "small" else None]:
        dense = nn.Conv2d(inputs, out, kernel, stride, kernel // 2, bias=False)
        x = torch.randn(1, inputs, size, size)
        for share in args.levels or LEVELS[:3]:
            dense.weight.data = zeroed(*dense.weight.shape, share=share)
            sparse = {}
            for kind in ALLOWED:
                packed = pack(dense.weight.flatten(1), kind, group=64)
                shape = dense.kernel_size, dense.stride, dense.padding, dense.dilation
                sparse[f"sparse.{kind}"] = [SparseConv2d(packed.indexed(col=True, bits=False), None, *shape)]
            case = f"{kernel}x{kernel} of {inputs} to {out}, stride {stride}, {size}x{size}"
            row = beside(args, [dense], x, sparse, {"case": case, "zeros": share})
            rate = int(dense.weight.count_nonzero()) * (size // stride) ** 2 / row["seconds"]["sparse.float32"]
            rows.append({**row, "of limit": rate / limit["multiplications"]})
            tell(rows[-1])
    return rows


def idle(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    """Does an engine that waits take a core? The processor time that its process uses after a run, while nobody runs;
    and dense torch right after the engine against torch alone, and the reverse, without a pause and with the one used.

    With one thread there is nobody who could spin.
    """
    import torch
    from torch import nn

    dense, x = nn.Linear(768, 3072, bias=False), torch.randn(128, 768)
    case = Case([dense], x, args.threads)
    found, _ = engines(args.peers, case)
    kernel = sparse_linear([dense.weight])[0]
    own = {"dense": lambda: dense(x), "sparse": lambda: kernel(x)}
    rows: list[dict[str, Any]] = []
    for name, engine in {**{n: Engine(run, list) for n, run in own.items()}, **found}.items():
        time.sleep(0.2)
        row: dict[str, Any] = {"case": name, "ms used in 200 ms of waiting": 1e3 * engine.waiting()}
        for pause in sorted({0.0, args.pause}):
            runs = {"dense": own["dense"], "engine": engine.run}
            alone = {n: interleaved({n: run}, args.repeats, pause)[n] for n, run in runs.items()}
            for n, took in interleaved(runs, args.repeats, pause).items():
                row[f"{n} beside / alone, pause {pause:g} ms"] = took / alone[n]
        rows.append(row)
        print(row, flush=True)
    case.close()
    return rows


def tell(row: dict[str, Any]) -> None:
    """A row as it is there, and which engines took no part."""
    times = ", ".join(f"{n} {1e3 * t:.3f}" for n, t in row["seconds"].items())
    print(f"{row['case']}, {row['zeros']:.0%} zeros, ms: {times}", flush=True)


def models(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    """Whole models, compressed as a user would: magnitude pruning, then `secateur.compress`."""
    import torch

    import secateur
    from secateur.measure.latency import latency

    rows = []
    for name in args.models:
        for share in (0.5, 0.7, 0.9):
            model, loads = build(name)
            secateur.prune(model, "magnitude", sparsity=share)
            for allowed in args.kinds:
                kinds = allowed.split(",")
                with torch.inference_mode():
                    fast = secateur.compress(model, loads, kinds=kinds, cache=False)
                report: Any = fast.compression
                for load in loads:
                    given = ((), load) if isinstance(load, dict) else ((load,), {})
                    found = latency({"dense": model, "sparse": fast}, *given, repeats=args.repeats)
                    shape = tuple((load["input_ids"] if isinstance(load, dict) else load).shape)
                    rows.append(
                        {
                            "case": f"{name}, input {shape}, {kinds[-1]}",
                            "zeros": share,
                            "seconds": found,
                            "packed": len(report.packed),
                            "layers": len(report.choices),
                            "bytes": report.bytes,
                            "error": report.error,
                            "note": report.note,
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def build(name: str) -> tuple[Any, list[Any]]:
    import torch

    torch.manual_seed(0)
    if name == "smollm2":
        from secateur.models import load_model, resolve

        words = torch.randint(49152, (1, 128))
        return load_model(resolve("demo"), torch.float32), [{"input_ids": words}, {"input_ids": words[:, :1]}]
    if name == "bert-base":
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig()).eval(), [{"input_ids": torch.randint(30000, (1, 128))}]
    import timm

    return timm.create_model(name).eval(), [torch.randn(1, 3, 224, 224)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--models", nargs="+", default=["smollm2", "bert-base", "resnet50"])
    parser.add_argument(
        "--kinds", nargs="+", default=["float32", "float32,bfloat16,int8,int8-dynamic"], help="allowed in whole models"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shapes", choices=["all", "small"], default="all", help="small: few, for a quick trial")
    parser.add_argument("--levels", nargs="+", type=float, help="shares of zeros in layers")
    parser.add_argument("--pause", type=float, help="milliseconds after each run; 20, or none with one thread")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--deepsparse-python", type=Path, help="the interpreter that has deepsparse")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse.json")
    args = parser.parse_args()
    if args.no_peer:
        args.peers = []
    if args.pause is None:
        args.pause = 20.0 if args.threads > 1 else 0.0
    sparse_peers.deepsparse_python = args.deepsparse_python
    import torch

    from secateur.kernels import described

    torch.set_num_threads(args.threads)
    limit = limits()
    result: dict[str, Any] = {
        "environment": environment(args.threads),
        "kernels": described(),
        "engines": versions("onnxruntime", "openvino", "torch"),
        "pause": args.pause,
        "limits": limit,
    }
    parts = {"idle": idle, "linear": linear, "token": token, "convolution": convolution, "models": models}
    with torch.inference_mode():
        for part in args.parts:
            result[part] = parts[part](args, limit)
            write_json(args.out, result)
    print(f"{limit['bytes'] / 1e9:.1f} GB/s from memory, {2 * limit['multiplications'] / 1e9:.0f} GFLOP/s dense")
    for part in args.parts:
        print(f"\n{part}\n{show(result[part])}" if result[part] else f"\n{part}: nothing")


def show(rows: list[dict[str, Any]]) -> str:
    """Times as fast as torch's dense float32, then as the best dense engine of the same precision or a higher one.

    ``of limit`` is the share of what the machine could do.
    """
    if "seconds" not in rows[0]:
        return table([*rows[0]], [[v if isinstance(v, str) else f"{v:.2f}" for v in r.values()] for r in rows])
    names = list(dict.fromkeys(n for r in rows for n in r["seconds"] if n != "dense"))
    own = [n for n in names if n not in PEERS]
    peers = [n for n in names if n in PEERS]
    kinds = [k for k in ALLOWED if peers and best(dict.fromkeys(names, 0.0), k, own=True)]
    known = [n for n in names if n in SPARSE]
    limits = [k for k in rows[0] if "limit" in k]
    head = ["", "zeros", *own, *(f"{k} / best dense" for k in kinds), *(f"/ {n}" for n in known), *limits]
    lines, others = [], []
    for r in rows:
        seconds = r["seconds"]

        def ratio(a: str, b: str, seconds: dict[str, float] = seconds) -> str:
            return f"{seconds[a] / seconds[b]:.2f}x" if a in seconds and b in seconds else "-"

        line = [r["case"], f"{r['zeros']:.0%}"]
        others.append([*line, *(ratio("dense", n) for n in peers)])
        line += [ratio("dense", n) for n in own]
        for kind in kinds:
            name = r["best"].get(kind, "")
            line.append(f"{ratio(name, best(seconds, kind, own=True))} {name}")
        line += [ratio(n, best(seconds, kind_of(n), own=True)) for n in known]
        lines.append([*line, *(f"{r[k]:.0%}" for k in limits)])
    text = table(head, lines)
    if peers:
        text += f"\n\nthe other engines, torch float32 = 1\n{table(['', 'zeros', *peers], others)}"
    absent = dict.fromkeys(f"{n}: {why}" for r in rows for n, why in r.get("absent", {}).items())
    return "\n".join([text, *absent])


if __name__ == "__main__":
    main()
