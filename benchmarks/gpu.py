"""Zeros on a GPU: bit masks and 2:4 beside the dense product, by shape, share of zeros and tokens.

Times are of the GPU's work (CUDA events, cold caches, candidates take turns), not of launches. ``of bandwidth`` is what
a candidate's weights take in memory, over its time, over the bytes a second that a large copy moves here.
``--sweep`` times other tilings of the bit-mask kernel instead, the best first. Without a GPU there is nothing to do.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "14336x4096"]


def bandwidth(repeats: int) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    import torch

    from secateur.compression.gpu import event_times

    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(event_times({"copy": lambda: target.copy_(source)}, repeats)["copy"])


def zeroed(rows: int, cols: int, share: float, dtype: Any) -> Any:
    """A random weight with so many zeros, on the CPU."""
    import torch

    return (torch.randn(rows, cols) * (torch.rand(rows, cols) >= share)).to(dtype)


def two_of_four(rows: int, cols: int, dtype: Any) -> Any:
    """A random weight with two of four zero, on the CPU."""
    import torch

    order = torch.rand(rows, cols // 4, 4).argsort(-1)
    return torch.where(order < 2, torch.randn(rows, cols // 4, 4), 0.0).view(rows, cols).to(dtype)


def held(module: Any) -> int:
    """Bytes of its weight."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def layers(args: argparse.Namespace, limit: float) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    from secateur.compression import GpuLinear, SemiLinear
    from secateur.compression.gpu import DTYPES, event_times
    from secateur.compression.gpu_layers import packed_for_gpu
    from secateur.errors import SecateurError
    from secateur.kernels import gpu

    rows, dtype = [], DTYPES[args.dtype]
    for rows_, cols in args.shapes:
        dense = nn.Linear(cols, rows_, bias=False, device="cuda", dtype=dtype)
        fixed: dict[str, Any] = {"dense": dense}
        if args.dtype != "float32":
            try:
                fixed["2:4"] = SemiLinear(two_of_four(rows_, cols, dtype).cuda(), None)
            except SecateurError as error:
                print(error)
        for share in args.levels:
            made = dict(fixed)
            if gpu.kernels() is not None:
                made["bits"] = GpuLinear(packed_for_gpu(zeroed(rows_, cols, share, dtype)), None).to("cuda")
            for tokens in args.tokens:
                x = torch.randn(tokens, cols, device="cuda", dtype=dtype)
                runs: dict[str, Callable[[], Any]] = {n: lambda m=m, x=x: m(x) for n, m in made.items()}  # type: ignore[misc]
                found = {n: statistics.median(t) for n, t in event_times(runs, args.repeats).items()}
                rows.append(
                    {
                        "case": f"{rows_} x {cols}, {tokens} tokens",
                        "zeros": share,
                        "seconds": found,
                        "of bandwidth": {n: held(made[n]) / s / limit for n, s in found.items()},
                    }
                )
                print(rows[-1], flush=True)
    return rows


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the bit-mask kernel by tiling, at the first of the levels and of the tokens."""
    import torch

    from secateur.compression.gpu import DTYPES, event_times
    from secateur.compression.gpu_layers import packed_for_gpu
    from secateur.kernels import gpu

    rows, share, tokens = [], args.levels[0], args.tokens[0]
    for rows_, cols in args.shapes:
        packed = packed_for_gpu(zeroed(rows_, cols, share, DTYPES[args.dtype]))
        assert packed.bits is not None
        parts = [t.cuda() for t in (packed.values, packed.start, packed.bits)]
        x = torch.randn(tokens, cols, device="cuda", dtype=DTYPES[args.dtype])
        for height, panels, reach, warps in itertools.product((1, 2, 4, 8), (4, 8, 16), (2, 4, 8, 16), (1, 2, 4, 8)):
            tiling = {"ROWS": height, "PANELS": panels, "REACH": reach, "num_warps": warps}

            def run(tiling: dict[str, int] = tiling, x: Any = x, parts: list[Any] = parts) -> Any:
                return gpu.multiply(x, *parts, None, packed.rows, packed.cols, packed.group, 0, tiling)  # noqa: B023

            seconds = statistics.median(event_times({"bits": run}, args.repeats)["bits"])
            rows.append({"case": f"{rows_} x {cols}, {tokens} tokens", "tiling": tiling, "seconds": seconds})
    return sorted(rows, key=lambda row: (str(row["case"]), row["seconds"]))


def shape(text: str) -> tuple[int, int]:
    """``4096x11008`` is 4096 outputs and 11008 inputs."""
    rows, cols = text.split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape, default=[shape(s) for s in SHAPES])
    parser.add_argument("--levels", nargs="+", type=float, default=[0.5, 0.6, 0.7], help="shares of zeros")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        return
    torch.manual_seed(0)
    result: dict[str, Any] = {"environment": {**environment(), "gpu": torch.cuda.get_device_name()}}
    with torch.inference_mode():
        result["bandwidth"] = bandwidth(args.repeats)
        if args.sweep:
            result["tilings"] = sweep(args)
        else:
            result["layers"] = layers(args, result["bandwidth"])
    write_json(args.out, result)
    print(f"{result['environment']['gpu']}: {result['bandwidth'] / 1e9:.0f} GB/s\n")
    if args.sweep:
        lines = [[r["case"], str(r["tiling"]), f"{1e6 * r['seconds']:.1f} us"] for r in result["tilings"]]
        print(table(["", "tiling", "time"], lines))
        return
    names = ("bits", "2:4")
    lines = []
    for r in result["layers"]:
        seconds, share = r["seconds"], r["of bandwidth"]
        ratios = [f"{seconds['dense'] / seconds[n]:.2f}x" if n in seconds else "" for n in names]
        lines.append(
            [r["case"], f"{r['zeros']:.0%}", f"{1e6 * seconds['dense']:.1f} us", *ratios]
            + [f"{share[n]:.0%}" if n in share else "" for n in ("dense", *names)]
        )
    head = ["", "zeros", "dense", *names, *(f"{n} of bandwidth" for n in ("dense", *names))]
    print(table(head, lines))


if __name__ == "__main__":
    main()
