"""From a model directory to a pruned model directory, one block in memory, resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import CALIBRATION, Windows, windows
from .disk import refuse
from .errors import ModelError, OutputError, RecipeError
from .formats.integers import is_packed
from .formats.stored import is_stored
from .fuse import methods as decompositions
from .fuse import plan_factors
from .granularity import parse
from .layers import Layer, Skipped, find_layers
from .measure import Peak
from .models import known_grids, load_model, load_tokenizer, next_token_loss, resolve, skeleton
from .prune import MEMORY, Progress, Several, block_keeps, prune, recipe_of
from .recipe import Recipe
from .record import dumps, run_record
from .registry import get
from .report import write_report
from .solve import LayerRecord, allocate, layer_facts
from .stream import Engine, Tick, find_blocks
from .stream.blocks import enter
from .stream.shards import Checkpoint, Output, Shards
from .stream.storage import Layout, layout, notes, weight_map
from .stream.tables import check_tables, round_stored, round_tables
from .units import plan_coupled

WINDOWS = 64


@dataclass(frozen=True, eq=False)
class Plan:
    """What a recipe would do to a model; prints as an explanation. Nothing has been read but headers."""

    recipe: Recipe
    source: str
    layers: list[Layer]
    skipped: list[Skipped]
    blocks: int
    keeps: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "recipe": self.recipe.to_dict(),
            "digest": self.recipe.digest,
            "model": self.source,
            "blocks": self.blocks,
            "needs": sorted(self.recipe.needs()),
            "layers": [
                {"name": x.name, "shape": list(x.shape), "keep": None if self.keeps is None else self.keeps[x.name]}
                for x in self.layers
            ],
            "skipped": [{"name": s.name, "parameters": s.numel, "reason": s.reason} for s in self.skipped],
            "weights": sum(x.numel for x in self.layers),
            "weights_kept": self._kept(),
        }

    def _kept(self) -> int:
        pattern = parse(self.recipe.granularity)
        default = 1.0 - self.recipe.sparsity
        return sum(pattern.kept(x.shape, default if self.keeps is None else self.keeps[x.name]) for x in self.layers)

    def __str__(self) -> str:
        recipe, total = self.recipe, sum(x.numel for x in self.layers)
        left = sum(s.numel for s in self.skipped)
        needs = ", ".join(sorted(recipe.needs())) or "no data"
        solver = get("solver", recipe.solver).card.summary
        lines = [
            f"{recipe.method} on {self.source}  (recipe {recipe.digest})",
            f"  criterion    {recipe.criterion or 'the solver chooses'}",
            f"  granularity  {recipe.granularity}",
            f"  allocation   {recipe.allocation}"
            + ("" if self.keeps is not None else " (measured on the model before pruning)"),
            f"  solver       {recipe.solver}: {solver}",
            f"  recovery     {recipe.recovery}",
            f"  needs        {needs}",
            f"  prunes       {len(self.layers)} layers in {self.blocks} blocks: {total:,} weights -> {self._kept():,}",
            f"  leaves       {left:,} parameters:",
        ]
        reasons: dict[str, list[Skipped]] = {}
        for s in self.skipped:
            reasons.setdefault(s.reason, []).append(s)
        for reason, members in reasons.items():
            lines.append(f"    {sum(m.numel for m in members):>14,}  {reason}: {_some([m.name for m in members])}")
        return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def plan(
    model: str | Path | nn.Module,
    method: str | Recipe | Several = "magnitude",
    *,
    target: str | None = None,
    example: Any = None,
    data: Any = None,
    loss: Any = None,
    exported: bool = False,
    multiple: int = 8,
    **axes: Any,
) -> Any:
    """What `prune` would do, without doing it.

    Args:
        model: a module, a model directory, a hub id, or ``demo``; of a directory only headers are read.
        method: a named method or a recipe.
        target, example, data, loss, exported, multiple: for coupled units, as for `prune`. Each kind of method has a
            plan of its own; all of them print.
        axes: fields of the recipe that override the method's.
    """
    if not isinstance(method, (str, Recipe)) or method in decompositions():
        if not isinstance(model, nn.Module):
            raise RecipeError("steps that change layers are planned on a module: load the model first")
        if isinstance(method, (str, Recipe)):
            return plan_factors(model, str(method), target=target, data=data, **axes)
        axes |= {} if target is None else {"target": target}
        return method.preview(model, example=example, data=data, loss=loss, **axes)
    recipe = recipe_of(method, axes, target, example, exported)
    if parse(recipe.granularity).coupled:
        if not isinstance(model, nn.Module):
            raise RecipeError(f"granularity '{recipe.granularity}' works on a module: load the model first")
        return plan_coupled(
            model, recipe, target=target, example=example, data=data, loss=loss, exported=exported, multiple=multiple
        )
    source = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    net: Any = model if isinstance(model, nn.Module) else skeleton(resolve(model))
    blocks = find_blocks(net)
    layers, skipped = find_layers(net, recipe.only, recipe.skip, None if blocks is None else blocks.paths())
    recipe.check(layers)
    keeps = None
    if get("allocation", recipe.allocation).facts.get("measure") is None:
        keeps = allocate(recipe, {x.name: layer_facts(x) for x in layers})
    return Plan(recipe, source, layers, skipped, len(blocks) if blocks else 0, keeps)


def prune_directory(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    data: Any = CALIBRATION,
    windows_count: int | None = None,
    length: int = 512,
    memory: int = MEMORY,
    force: bool = False,
    resident: bool = False,
    storage: str | None = None,
    stop: int | None = None,
    command: str = "",
    progress: Progress | None = None,
    evaluate: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Prune a model directory into another that stock tools load.

    The model is built on ``meta``; block after block is loaded, pruned, written and freed. Interrupted at
    any moment, the same call goes on at the block it was in. The result appears under ``out`` only when
    it is whole.

    Args:
        model: what `models.resolve` accepts.
        recipe: what to do.
        out: where to; must not exist unless ``force``.
        data: calibration data; read only when the recipe needs it.
        windows_count: windows of text to calibrate on (64 when None); of given tensors, how many to take.
        resident: load the whole model through transformers instead (needed where its files name parameters
            differently from the model, as for fused experts); not resumable. Recipes that measure gradients, of
            the model's own next-token loss, or that take several steps always do; so do models stored as integers.
        storage: ``stock``, what stock tools load; or ``smallest``, each matrix in the fewest bytes, which secateur
            alone reads. The latter without being asked where no stock layout holds what the recipe makes.
        stop: prune only the first ``stop`` blocks and copy the others.
        evaluate: called with a model directory; measures the dense model before and the pruned one after.

    Returns:
        The record, as in ``run.json``.
    """
    target = Path(out)
    started = time.perf_counter()
    path = resolve(model)
    resident = resident or works_on_the_whole(recipe) or is_packed(path) or is_stored(path)
    form = layout(recipe, storage)
    if target.resolve() == path.resolve():
        raise OutputError(f"--out {target} is the model itself: choose another directory")
    refuse(target, force, way="choose another --out, or overwrite it with --force")
    tokens: Windows | None = None
    if recipe.needs_data:
        recipe.check(data=data is not None)
        count = WINDOWS if windows_count is None and isinstance(data, str) else windows_count
        tokens = windows(data, load_tokenizer(path), count=count, length=length)
    with Peak() as peak:
        job = _resident if resident else _streamed
        made = job(path, recipe, target, tokens, memory, force, stop, progress, form)
    records, skipped, described, timings, output = made
    timings["total"] = timings.pop("earlier", 0.0) + time.perf_counter() - started
    before = after = None
    if evaluate is not None:
        before, after = evaluate(path), evaluate(output.part)
    run = run_record(
        recipe=recipe,
        model={"source": str(model), **described},
        records=records, skipped=skipped,
        data=tokens.describe() if tokens else None,
        timings=timings, peak_memory=peak.bytes, command=command, before=before, after=after,
        notes=[
            *([] if stop is None else [f"only the first {stop} blocks were pruned, as asked"]),
            *notes(recipe, [r.name for r in records], form.coded(output)),
        ],
    )  # fmt: skip
    _provenance(output, run)
    output.write_text("recipe.yaml", recipe.dump())
    output.write_text("run.json", dumps(run))
    write_report(output.part / "report.html", run)
    output.finish()
    return run


def works_on_the_whole(recipe: Recipe) -> bool:
    """Whether the whole model must be in memory: gradients go through all of it, and rounds come back to it."""
    return recipe.needs_whole


def _provenance(output: Output, run: dict[str, Any]) -> None:
    """A note in ``config.json``; everything else in it stays as it was."""
    file = output.part / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["secateur"] = {
        "version": run["secateur"], "method": run["recipe"]["method"], "digest": run["digest"],
        "sparsity": run["sparsity"]["pruned_layers"],
    }  # fmt: skip
    output.write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


_Result = tuple[list[LayerRecord], list[Skipped], dict[str, Any], dict[str, float], Output]


def _streamed(
    path: Path,
    recipe: Recipe,
    target: Path,
    tokens: Windows | None,
    memory: int,
    force: bool,
    stop: int | None,
    progress: Progress | None,
    form: Layout,
) -> _Result:
    started = time.perf_counter()
    checkpoint = Checkpoint(path)
    net = skeleton(path)
    blocks = find_blocks(net)
    if blocks is None:
        raise ModelError(f"{path} has no repeated blocks: prune it with --resident")
    layers, skipped = find_layers(net, recipe.only, recipe.skip, blocks.paths())
    recipe.check(layers)
    check_tables(net, recipe, layers)
    of_block = {p: [x for x in layers if x.name.startswith(f"{p}.")] for p in blocks.paths()}
    outside = {x.name for x in layers} - {x.name for found in of_block.values() for x in found}
    if outside:
        raise RecipeError(f"{sorted(outside)[0]} lies outside the repeated blocks: prune it with --resident")
    described = {
        "class": type(net).__name__,
        "parameters": sum(p.numel() for p in net.parameters()),
        "blocks": len(blocks),
    }
    shards = Shards(net, checkpoint, blocks.paths(), torch.float32)
    key = {
        "recipe": recipe.digest,
        "data": tokens.sha256 if tokens else None,
        "model": checkpoint.fingerprint(),
        "memory": memory,
        "stop": stop,
        "storage": type(form).__name__,
    }
    output = Output(target, force, key)
    if tokens is not None:
        shards.load_prelude(skip=_head(net))
        round_tables(net, recipe)  # layers are calibrated on what will be read

    def at(a: int, b: int) -> Any:
        assert tokens is not None
        ids = tokens.ids[a:b]
        return enter(net, blocks, lambda m: m(input_ids=ids, use_cache=False))

    def engine() -> Engine:
        made = Engine(recipe, at if tokens else None, len(tokens) if tokens else 0, memory, torch.float32)
        if not output.done or "keeps" not in output.state:
            made.start()
        return made

    keeps = output.state.get("keeps")
    if keeps is None:
        keeps = block_keeps(recipe, of_block, shards.load, engine, shards.free, exact=False)
        output.note(keeps=keeps)
    timings = {"load": time.perf_counter() - started}
    count = len(blocks) + 1
    run = engine()
    if output.done:
        kept = output.activations()
        run.hidden = kept.get("hidden")
        run.dense = kept.get("dense", run.hidden) if run.teacher else None
    records = [_record(r) for r in output.state["records"]]
    places = dict(output.state.get("weight_map", {}))
    seconds = float(output.state["seconds"])
    timings["earlier"] = seconds  # spent before an interruption
    end = len(blocks) if stop is None else min(stop, len(blocks))
    for k, block_path in enumerate(blocks.paths()):
        if k < output.done:
            if progress is not None:
                progress(Tick(k + 1, len(blocks), [], 0.0))
            continue
        start = time.perf_counter()
        found: list[LayerRecord] = []
        block = shards.load(k)
        if k < end:
            found, _ = run.prune_block(k, block, of_block[block_path], keeps, last=k + 1 == end)
        tensors = form.encoded(output, shards.free(k), run.grids, net)
        del block
        file = form.shard(k, count)
        output.write(file, tensors)
        places.update(dict.fromkeys(tensors, file))
        del tensors
        records += found
        seconds += time.perf_counter() - start
        output.state["weight_map"] = places
        activations = {} if run.hidden is None or k + 1 >= end else {"hidden": run.hidden}
        if run.dense is not None and activations and run.dense is not run.hidden:
            activations["dense"] = run.dense
        output.commit(k + 1, [r.to_dict() for r in records], seconds, activations)
        if progress is not None:
            progress(Tick(k + 1, len(blocks), found, time.perf_counter() - start))
    start = time.perf_counter()
    file = form.shard(len(blocks), count)
    rest, tables = round_stored(checkpoint.read(shards.rest), shards.names.of, net, recipe)
    rest = form.encoded(output, rest, tables, net)
    output.write(file, rest)
    places.update(dict.fromkeys(rest, file))
    output.state["weight_map"] = places
    output.copy(path)
    form.close(output, recipe, net)
    timings.update(prune=seconds, save=time.perf_counter() - start)
    return records, skipped, described, timings, output


def _head(net: Any) -> list[str]:
    """The output head, unless it is tied: calibration never runs it."""
    head = net.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    if head is None:
        return []
    names = [n for n, p in net.named_parameters(remove_duplicate=False) if any(p is q for q in head.parameters())]
    return names if len(names) == 1 else []


def _record(data: dict[str, Any]) -> LayerRecord:
    return LayerRecord(**{**data, "shape": tuple(data["shape"]), "notes": tuple(data["notes"])})


def _resident(
    path: Path,
    recipe: Recipe,
    target: Path,
    tokens: Windows | None,
    memory: int,
    force: bool,
    stop: int | None,
    progress: Progress | None,
    form: Layout,
) -> _Result:
    if stop is not None:
        raise RecipeError(
            "--blocks goes with streaming, not with --resident, gradients or steps, which need the whole model"
        )
    started = time.perf_counter()
    net = load_model(path)
    loaded = time.perf_counter()
    pruned = prune(net, recipe, data=tokens, loss=next_token_loss, memory=memory, progress=progress)
    output = Output(target, force, {"recipe": recipe.digest, "resident": time.time_ns()})
    net.save_pretrained(output.part)
    output.copy(path)
    form.rewrite(output, {**form.lasting(known_grids(path), net), **pruned.grids}, net)
    output.state["weight_map"] = weight_map(output.part)
    form.close(output, recipe, net)
    described = {k: v for k, v in pruned.run["model"].items() if k != "source"}
    timings = {"load": loaded - started, "prune": time.perf_counter() - loaded}
    return pruned.records, pruned.skipped, described, timings, output
