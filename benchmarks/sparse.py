"""Sparse kernels on this machine's processor: layers, one token, convolutions, whole models; dense in the same run.

Dense is torch in float32, and ONNX Runtime where it is installed. Candidates take turns, so that whatever else the
machine does falls on all of them alike. The share of the limit is of what this script measures first: bytes a second
from memory (a sum over a large tensor) and multiplications a second (a large matrix product).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

SHAPES = [(1536, 576), (3072, 768), (8192, 2048)]
LEVELS = [0.5, 0.8, 0.9, 0.95]
#: Of ResNet-50: inputs, outputs, kernel, stride, size of the image.
CONVOLUTIONS = [
    (64, 64, 3, 1, 56), (256, 64, 1, 1, 56), (128, 128, 3, 1, 28), (128, 128, 3, 2, 56), (512, 128, 1, 1, 28),
    (256, 256, 3, 1, 14), (256, 1024, 1, 1, 14), (512, 512, 3, 1, 7), (512, 2048, 1, 1, 7),
]  # fmt: skip
PARTS = ["linear", "token", "convolution", "models"]


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def zeroed(*shape: int, share: float) -> Any:
    """A random weight with so many zeros."""
    import torch

    return torch.randn(*shape) * (torch.rand(*shape) >= share)


def limits() -> dict[str, float]:
    """Bytes a second from memory, and multiplications a second."""
    import torch

    large, square = torch.ones(64 << 20), torch.randn(2048, 2048)
    found = interleaved({"sum": large.sum, "product": lambda: square @ square}, 7)
    return {"bytes": large.numel() * 4 / found["sum"], "multiplications": 2048**3 / found["product"]}


def runtime(module: Any, x: Any, threads: int) -> Callable[[], Any] | None:
    """The module in ONNX Runtime, or None without it."""
    try:
        import onnxruntime
        import torch
    except ImportError:
        return None
    import io

    file = io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would keep others waiting
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    given = {name: x.numpy()}
    return lambda: session.run(None, given)


def layer(weight: Any, kind: str = "float32", col: bool = True, bits: bool = False) -> Any:
    from secateur.compression import SparseLinear
    from secateur.formats import pack

    return SparseLinear(pack(weight, kind).indexed(col=col, bits=bits), None)


def linear(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    rows = []
    for out, inputs in SHAPES:
        dense = nn.Linear(inputs, out, bias=False)
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs)
            other = None if args.no_peer else runtime(dense, x, args.threads)
            for share in LEVELS:
                weight = zeroed(out, inputs, share=share)
                dense.weight.data = weight
                sparse = layer(weight)
                runs: dict[str, Callable[[], Any]] = {
                    "dense": lambda d=dense, x=x: d(x),
                    "sparse": lambda s=sparse, x=x: s(x),
                }
                if other is not None:
                    runs["onnxruntime"] = other
                found = interleaved(runs, args.repeats)
                rate = tokens * sparse.packed.nonzeros / found["sparse"]
                rows.append(
                    {
                        "case": f"{out} x {inputs}, {tokens} tokens",
                        "zeros": share,
                        **found,
                        "of limit": rate / limit["multiplications"],
                    }
                )
                print(rows[-1], flush=True)
    return rows


def token(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    """A stack of layers that does not fit into the caches, one token."""
    import torch
    from torch import nn

    rows = []
    for out, inputs, count in ((3072, 768, 16), (8192, 2048, 3)):
        x = torch.randn(1, inputs)
        for share in (0.5, 0.8, 0.9):
            weights = [zeroed(out, inputs, share=share) for _ in range(count)]
            stack = [nn.Linear(inputs, out, bias=False) for _ in weights]
            for d, w in zip(stack, weights, strict=True):
                d.weight.data = w
            runs: dict[str, Callable[[], Any]] = {"dense": lambda s=stack, x=x: [m(x) for m in s]}
            held = {}
            for kind in ("float32", "bfloat16", "int8"):
                for index in ("bits", "col"):
                    made = [layer(w, kind, index == "col", index == "bits") for w in weights]
                    runs[f"{kind}.{index}"] = lambda s=made, x=x: [m(x) for m in s]
                    held[f"{kind}.{index}"] = sum(m.packed.bytes() for m in made)
            found = interleaved(runs, args.repeats)
            best = min((name for name in found if name.startswith("float32")), key=found.__getitem__)
            rows.append(
                {
                    "case": f"{count} x {out} x {inputs}, 1 token",
                    "zeros": share,
                    **found,
                    "of limit": held[best] / found[best] / limit["bytes"],
                    "dense of limit": count * out * inputs * 4 / found["dense"] / limit["bytes"],
                }
            )
            print(rows[-1], flush=True)
    return rows


def convolution(args: argparse.Namespace, limit: dict[str, float]) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    from secateur.compression import SparseConv2d
    from secateur.formats import pack

    rows = []
    for inputs, out, kernel, stride, size in CONVOLUTIONS:
        dense = nn.Conv2d(inputs, out, kernel, stride, kernel // 2, bias=False)
        x = torch.randn(1, inputs, size, size)
        for share in (0.5, 0.8, 0.9):
            dense.weight.data = zeroed(*dense.weight.shape, share=share)
            packed = pack(dense.weight.flatten(1), group=64, panel=256 if kernel > 1 else None).indexed(
                col=True, bits=False
            )
            sparse = SparseConv2d(packed, None, dense.kernel_size, dense.stride, dense.padding, dense.dilation)
            found = interleaved(
                {"dense": lambda d=dense, x=x: d(x), "sparse": lambda s=sparse, x=x: s(x)}, args.repeats
            )
            work = packed.nonzeros * (size // stride) ** 2
            case = f"{kernel}x{kernel} of {inputs} to {out}, stride {stride}, {size}x{size}"
            rows.append(
                {"case": case, "zeros": share, **found, "of limit": work / found["sparse"] / limit["multiplications"]}
            )
            print(rows[-1], flush=True)
    return rows


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
                            **found,
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
        "--kinds", nargs="+", default=["float32", "float32,bfloat16,int8"], help="allowed in whole models"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse.json")
    args = parser.parse_args()
    import torch

    from secateur.kernels import described

    torch.set_num_threads(args.threads)
    limit = limits()
    result: dict[str, Any] = {"environment": environment(args.threads), "kernels": described(), "limits": limit}
    with torch.inference_mode():
        for part in args.parts:
            result[part] = {"linear": linear, "token": token, "convolution": convolution, "models": models}[part](
                args, limit
            )
            write_json(args.out, result)
    print(f"{limit['bytes'] / 1e9:.1f} GB/s from memory, {2 * limit['multiplications'] / 1e9:.0f} GFLOP/s dense")
    for part in args.parts:
        print(f"\n{show(result[part])}")


def show(rows: list[dict[str, Any]]) -> str:
    """Times as fast as torch's dense float32; ``of limit`` is the share of what the machine could do."""
    names = [
        k
        for k in rows[0]
        if isinstance(rows[0][k], float) and k not in ("zeros", "dense", "error") and "limit" not in k
    ]
    head = ["", "zeros", *names, *(k for k in rows[0] if "limit" in k)]
    lines = []
    for r in rows:
        ratios = [f"{r['dense'] / r[n]:.2f}x" for n in names]
        lines.append([r["case"], f"{r['zeros']:.0%}", *ratios, *(f"{r[k]:.0%}" for k in head if "limit" in k)])
    return table(head, lines)


if __name__ == "__main__":
    main()
