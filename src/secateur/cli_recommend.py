"""The command that recommends a method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import OutputError
from .options import Json
from .recommend import Situation
from .recommend import recommend as run
from .recommend.page import SHOWN, told
from .terminal import err_console


def recommend(
    model: Annotated[
        str, typer.Option("--model", help="A model as elsewhere, or a task; only its structure is read.")
    ] = "",
    kind: Annotated[
        str | None, typer.Option("--kind", help="What it is: cnn, vit, encoder, decoder, encoder-decoder, moe, other.")
    ] = None,
    parameters: Annotated[str | None, typer.Option("--parameters", help="How large it is: 25M, 1.3B.")] = None,
    hardware: Annotated[
        str, typer.Option("--hardware", help="Where it runs: cpu, 'cpu avx2', 'nvidia ampere', h100, edge, any.")
    ] = "any",
    want: Annotated[
        str | None, typer.Option("--want", help="'latency 2x', 'size 50%', 'flops 50%', 'params 30%', 'sparsity 0.7'.")
    ] = None,
    data: Annotated[str, typer.Option("--data", help="At hand: none, unlabeled, labels or training.")] = "none",
    retrain: Annotated[str, typer.Option("--retrain", help="Time to train: no, 30m, 2h, any, or '20 epochs'.")] = "no",
    epoch: Annotated[str | None, typer.Option("--epoch", help="How long an epoch takes, e.g. 10m.")] = None,
    weights: Annotated[str, typer.Option("--weights", help="pretrained, or init if not trained yet.")] = "pretrained",
    max_drop: Annotated[
        str | None,
        typer.Option("--max-drop", help="How much of the score may be lost: 1%. Relative to the dense model."),
    ] = None,
    studies: Annotated[
        list[Path] | None, typer.Option("--studies", help="A directory of secateur compare; may be repeated.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many methods are shown in full.")] = SHOWN,
    everything: Annotated[bool, typer.Option("--all", help="Every method, with its reasons.")] = False,
    write: Annotated[Path | None, typer.Option("--write", help="Write the first recipe (YAML).")] = None,
    write_study: Annotated[
        Path | None, typer.Option("--write-study", help="Write the study that would tell (YAML).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what --write and --write-study name.")] = False,
    as_json: Json = False,
) -> None:
    """Recommend a method for a model, its hardware, the data and the time at hand, with reasons and evidence.

    Rules drop what cannot be, and every method is kept, dropped or ranked with its reasons; measured runs rank the
    rest.
    """
    for file in (write, write_study):
        if file is not None and file.exists() and not force:
            raise OutputError(f"{file} exists: choose another file or --force")
    situation = Situation.of(
        model, kind=kind, parameters=parameters, hardware=hardware, want=want, data=data, retrain=retrain, epoch=epoch,
        weights=weights, max_drop=max_drop,
    )  # fmt: skip
    answer = run(situation, studies or ())
    if write is not None:
        write.write_text(answer.recipe(), encoding="utf-8")
    if write_study is not None:
        write_study.write_text(answer.study(), encoding="utf-8")
    if as_json:
        print(json.dumps(answer.to_dict()))
        return
    print(told(answer, top, everything), end="")
    for name, file in (("recipe", write), ("study", write_study)):
        if file is not None:
            err_console.print(f"{name}  {file}", soft_wrap=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(recommend)
