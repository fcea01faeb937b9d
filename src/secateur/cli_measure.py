"""The commands about speed and size: measure and compress."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape

from .data import EVALUATION
from .options import Example, Force, Json, Length, Model, Out, Tokens, numbers
from .printing import measured
from .terminal import bar, fail, interruptible, out_console, steps


def compress(
    model: Model,
    out: Out,
    target: Annotated[str, typer.Option("--for", help="What it is to run on: cpu or cuda.")] = "cpu",
    values: Annotated[
        str,
        typer.Option("--values", help="Kinds allowed, by commas: float32, bfloat16, int8, int8-dynamic, int4."),
    ] = "float32",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="On a GPU: bfloat16 (default), float16 or float32.")
    ] = None,
    tokens: Tokens = "128,1",
    example: Example = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Install the kernels for zeros that are faster than dense ones on this machine, and say which and why."""
    from .compression import is_compressed
    from .compression.command import compress_source
    from .compression.gpu import require_gpu
    from .coupled import example_inputs, load_module

    if target not in ("cpu", "cuda"):
        fail(f"--for {target} is not there: write --for cpu or --for cuda", 2)
    if target == "cpu" and dtype is not None:
        fail("--dtype is for GPUs (--for cuda); on the CPU --values says what the packed values may be", 2)
    if target == "cuda":
        require_gpu()
    if is_compressed(model):
        fail(f"{model} is compressed already: compress the model that it was made of", 2)
    net = load_module(model)
    given = example_inputs(example, net) if example else None
    with interruptible(f"stopped: {out} was not written"), bar("timing layers", None, not as_json) as show:
        fast = compress_source(
            net, model, out, example=given, tokens=numbers(tokens), kinds=[k.strip() for k in values.split(",")],
            fresh=fresh, force=force, progress=show, dtype=(dtype or "bfloat16") if target == "cuda" else "",
        )  # fmt: skip
    report: Any = fast.compression
    print(json.dumps(report.to_dict()) if as_json else report)
    if report.packed and not report.note and not as_json:
        out_console.print(f"model   {escape(str(out))}", soft_wrap=True)


def measure(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Held-out text.")] = EVALUATION,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Windows (default: all).")] = None,
    length: Length = 512,
    against: Annotated[str | None, typer.Option("--against", help="Baseline (default: what it was made of).")] = None,
    tokens: Tokens = "128,1",
    alone: Annotated[bool, typer.Option("--alone", help="Measure no baseline.")] = False,
    example: Example = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Size, FLOPs, latency, throughput, time per token, peak memory, energy, perplexity.

    A pruned model is measured beside the dense one that it was made of, or beside --against, and they take turns.

    A language model is timed on one pass for each of --tokens; the first of these is also the prompt for the time to
    the first token and per token.
    """
    from .figures import figures
    from .sources import sources

    if device not in ("cpu", "cuda"):
        fail(f"--device {device} is not known: write cpu or cuda", 2)
    lengths = numbers(tokens)
    asked = sources(model, against, alone, device)
    with interruptible("stopped"), steps("measuring", not as_json) as say:
        found = figures(
            asked, example=example, data=data, count=windows, length=length, tokens=lengths, progress=say
        )  # fmt: skip
    if as_json:
        print(json.dumps(found))
    else:
        out_console.print(measured(found))


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(measure)
    app.command()(compress)
