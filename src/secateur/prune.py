"""The algorithm on one page: find, gather, score, allocate, select, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from . import granularity
from .calibrate import Loss, as_batch, batches_of, evidence_of
from .control import controlled, restore
from .data import Windows, windows
from .disk import beside
from .errors import RecipeError
from .evidence.inputs import INPUT_FACTS
from .formats import Grid
from .fuse import decompose
from .fuse import methods as decompositions
from .layers import Layer, Skipped, evaluating, find_layers
from .masks import Masks
from .measure import Peak, count_parameters
from .recipe import TRAINING, Recipe
from .record import run_record
from .registry import get
from .runtime import is_runtime
from .runtime import made as gated
from .schedule import sparsity_at
from .solve import LayerRecord, allocate, held_by, layer_facts, shares, sketch_layer, solve_layer
from .stream import Blocks, Engine, Tick, find_blocks
from .stream.blocks import enter
from .structured import WholePlan
from .units import plan_coupled

MEMORY = 2 << 30
Progress = Callable[[Tick], None]


class Several(Protocol):
    """What is done in several steps; a `Compound` is one."""

    def carry_out(self, model: nn.Module, **given: Any) -> Any: ...

    def preview(self, model: nn.Module, **given: Any) -> Any: ...


@dataclass(eq=False)
class Pruned:
    """A pruned model with the record of what was done. Prints as a before and after table."""

    model: nn.Module
    recipe: Recipe
    masks: Masks
    records: list[LayerRecord]
    skipped: list[Skipped]
    run: dict[str, Any] = field(repr=False)
    grids: dict[str, Grid] = field(default_factory=dict, repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the pruned layers that is zero."""
        return float(self.run["sparsity"]["pruned_layers"])

    def save(self, out: str | Path, tokenizer: Any = None) -> Path:
        """Write the model, ``masks.safetensors``, ``recipe.yaml``, ``run.json`` and ``report.html``.

        A transformers model is saved by its own ``save_pretrained``, so stock tools load it.

        Raises:
            OutputError: the directory exists and is not empty.
        """
        from .report import write_run
        from .store import save_module

        with beside(out) as part:
            save_module(self.model, part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            write_run(part, self.recipe, self.masks, self.run)
        return Path(out)

    def __str__(self) -> str:
        total = sum(r.parameters for r in self.records)
        kept = sum(r.kept for r in self.records)
        errors = [r.error for r in self.records if r.error is not None]
        lines = [
            f"{self.recipe.method}: {len(self.records)} layers pruned, {len(self.skipped)} parameters left alone",
            f"{'':24}{'before':>16}{'after':>16}",
            f"{'weights in those layers':24}{total:>16,}{kept:>16,}",
            f"{'sparsity':24}{0:>16.4f}{1 - kept / total:>16.4f}",
        ]
        if errors:
            lines.append(f"{'mean output error':24}{'':>16}{sum(errors) / len(errors):>16.4f}")
        return "\n".join(lines)


def prune(
    model: nn.Module,
    method: str | Recipe | Several = "magnitude",
    *,
    data: Any = None,
    loss: Loss | None = None,
    tokenizer: Any = None,
    windows_count: int | None = None,
    length: int = 512,
    memory: int = MEMORY,
    progress: Progress | None = None,
    target: str | None = None,
    example: Any = None,
    exported: bool = False,
    multiple: int = 8,
    masks: Mapping[str, Tensor] | None = None,
    **axes: Any,
) -> Any:
    """Prune a model in place.

    Args:
        model: any module. Where it repeats blocks that feed each other (a transformer), it is pruned block
            by block; otherwise in one pass over the whole model.
        method: a named method (``secateur methods``), a `Recipe`, or a `Compound` of several steps.
        data: what the method measures on: batches of token ids for a language model (or ``text:FILE`` with
            a ``tokenizer``), or any batches that ``model(batch)`` accepts (a tuple's first item is the
            input; a dict is passed as keywords).
        loss: ``loss(model, batch) -> scalar``, for criteria that need gradients.
        windows_count, length: how text is cut.
        memory: bytes of activations that one pass through a block may hold.
        target: for coupled units, e.g. ``"flops 50%"`` (what goes) or ``"params to 2M"`` (what remains);
            see `structured.Target`. Without it ``sparsity`` is the share of the parameters that goes.
        example: for coupled units, inputs of one forward pass: a tensor, a tuple or a dict. For methods that need no
            more than the shape of an input (synflow, ntk-sap), one in place of data.
        exported: cut the program that ``torch.export`` makes of the model, where more can go, such as heads whose
            width ``forward`` derives from shapes; ``shrink()`` returns a smaller program then.
        multiple: for coupled units, sizes that remain are multiples of it where the units are single positions
            (heads and groups go whole); vector units of processors like 8 or 16.
        masks: what earlier rounds kept, by layer name: what they removed stays removed.
        axes: fields of the recipe that override the method's: ``sparsity``, ``granularity``, ...

    Returns:
        `Pruned`; the model itself has been changed. For coupled units a `StructuredPlan`, for whole blocks and experts
        a `WholePlan`: the model is masked (but for experts, which no zeros stand for), and its ``shrink()`` returns
        the smaller one. For methods of run time (tome, evit), whose knobs ``axes`` are, a `runtime.TokenGates`: a
        module to be used in place of the model, which is as it was. For decompositions (low-rank, tucker) a
        `Decomposed`, and for compounds a `Compounded`, whose ``model`` is to be used.

    Raises:
        RecipeError, DataError, ModelError, NumericalError: before the model is touched wherever possible.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> prune(net, "magnitude", sparsity=0.5).sparsity
    0.5
    """
    text = {"tokenizer": tokenizer, "windows_count": windows_count, "length": length}
    alone: dict[str, Any] = {"masks": masks, "exported": exported or None}  # what recipes alone know
    alone = {k: v for k, v in alone.items() if v is not None}
    if not isinstance(method, (str, Recipe)):
        alone |= {} if target is None else {"target": target}
        return method.carry_out(model, data=data, loss=loss, example=example, memory=memory, **text, **alone, **axes)
    if method in decompositions():
        return decompose(model, str(method), target=target, data=data, **text, **alone, **axes)
    if is_runtime(method):
        return gated(model, str(method), example, target=target, **axes)
    recipe = recipe_of(method, axes, target, example, exported)
    if get("recovery", recipe.recovery).facts.get("data") == "task":
        raise RecipeError(
            f"recovery '{recipe.recovery}' trains: give a task to secateur.train(task, ...), or attach() in your loop"
        )
    if granularity.parse(recipe.granularity).coupled:
        plan = plan_coupled(
            model, recipe, target=target, example=example, data=data, loss=loss, exported=exported, multiple=multiple
        )
        if isinstance(plan, WholePlan) and plan.pieces.empty is None:
            plan.notes.append(f"the model is as it was: no zeros stand for a missing {plan.pieces.name}; see shrink()")
        elif model not in (plan.model, getattr(plan, "origin", None)):
            plan.notes.append("the model is as it was: its parameters that are shared cannot be masked; see shrink()")
        else:
            plan.mask()
        return plan
    if data is None and recipe.needs_shape:
        data = as_batch(example)
    start = time.perf_counter()
    blocks = find_blocks(model)
    layers, skipped = find_layers(model, recipe.only, recipe.skip, None if blocks is None else blocks.paths())
    recipe.check(layers, data=data is not None, loss=loss is not None)
    for layer in layers:
        layer.check_finite()
    described: Mapping[str, Any] | None = None
    with Peak() as peak, evaluating(model):
        grids: dict[str, Grid] = {}
        if _by_block(model, recipe, blocks, layers, data):
            assert blocks is not None
            tokens = None
            if recipe.needs_data:
                tokens = windows(data, tokenizer, count=windows_count, length=length)
                described = tokens.describe()
            records, made = _by_blocks(model, recipe, blocks, layers, tokens, memory, progress, grids, masks)
        else:
            if recipe.needs_data:
                described = data.describe() if isinstance(data, Windows) else {"source": "batches"}
            records, made = _whole(model, recipe, layers, data, loss, masks, grids)
    run = run_record(
        recipe=recipe,
        model={
            "source": "module",
            "class": type(model).__name__,
            "parameters": count_parameters(model)[0],
            "blocks": len(blocks) if blocks else 0,
        },
        records=records,
        skipped=skipped,
        data=described,
        timings={"total": time.perf_counter() - start},
        peak_memory=peak.bytes,
    )
    return Pruned(model, recipe, made, records, skipped, run, grids)


def recipe_of(
    method: str | Recipe, axes: Mapping[str, Any], target: str | None, example: Any, exported: bool = False
) -> Recipe:
    """The recipe; a target or an example means coupled units where the method names none.

    A named method that makes a smaller model is healed by ``refit`` unless another recovery, or none, is asked for.

    Raises:
        RecipeError: an example, or an exported program, that nothing would use.
    """
    given = dict(axes)
    recipe = method.override(**given) if isinstance(method, Recipe) else Recipe.of(method, **given)
    if recipe.driver != "once" or recipe.gate != "none":
        way = "attach(model" if get("recovery", recipe.recovery).facts.get("data") != "task" else "train(task"
        raise RecipeError(
            f"method '{recipe.method}' prunes while the model trains: use secateur.{way}, '{recipe.method}', ...)"
        )
    if only := sorted(recipe.needs() & TRAINING):
        raise RecipeError(
            f"criterion '{recipe.criterion}' needs {only[0]}, which only a training run shows: use "
            "secateur.attach(model, ..., driver='renew') and train"
        )
    shape = recipe.needs_shape and target is None
    if not granularity.parse(recipe.granularity).coupled and not shape and (target is not None or example is not None):
        if "granularity" in given:
            raise RecipeError(
                f"target and example are for units of the whole model: granularity '{recipe.granularity}' takes a "
                "sparsity (or choose granularity coupled)"
            )
        recipe = recipe.override(granularity="coupled")
    pattern = granularity.parse(recipe.granularity)
    units = pattern.coupled and not pattern.whole
    if exported and not units:
        raise RecipeError(f"exported is for units of the whole model (coupled), not granularity '{recipe.granularity}'")
    own = isinstance(method, Recipe) or granularity.parse(Recipe.of(method).granularity).coupled
    asked = "recovery" in given if own else True  # a method over units says itself what heals
    if units and asked and recipe.recovery == "none" and given.get("recovery") is None:
        recipe = recipe.override(recovery="refit")
    return recipe


def _by_block(model: nn.Module, recipe: Recipe, blocks: Blocks | None, layers: list[Layer], data: Any) -> bool:
    """Whether the model is pruned block by block: it has blocks, all layers are in them, and inputs matter."""
    if blocks is None or recipe.needs_whole or not recipe.needs_data:
        return False
    inside = tuple(f"{p}." for p in blocks.paths())
    if not all(layer.name.startswith(inside) for layer in layers) or not hasattr(model, "config"):
        if recipe.propagate != "off" and get("recovery", recipe.recovery).facts.get("data") == "block":
            raise RecipeError(f"recovery '{recipe.recovery}' works on repeated blocks, and not all layers are in one")
        return False
    return True


def _by_blocks(
    model: nn.Module,
    recipe: Recipe,
    blocks: Blocks,
    layers: list[Layer],
    tokens: Windows | None,
    memory: int,
    progress: Progress | None,
    grids: dict[str, Grid],
    before: Mapping[str, Tensor] | None = None,
) -> tuple[list[LayerRecord], Masks]:
    parameter = next(model.parameters())
    held = held_by(layers, before)

    def at(a: int, b: int) -> Any:
        assert tokens is not None
        ids = tokens.ids[a:b].to(parameter.device)
        return enter(model, blocks, lambda m: m(input_ids=ids, use_cache=False))

    def engine() -> Engine:
        made = Engine(recipe, at if tokens is not None else None, len(tokens) if tokens else 0, memory, parameter.dtype)
        made.held = held
        made.start()
        return made

    from .models import eager_experts

    eager_experts(model)
    of_block = {p: [x for x in layers if x.name.startswith(f"{p}.")] for p in blocks.paths()}
    keeps = block_keeps(recipe, of_block, lambda k: blocks.modules[k], engine, held=held)
    records: list[LayerRecord] = []
    masks = Masks()
    run = engine()
    last = max(k for k, p in enumerate(blocks.paths()) if of_block[p])
    for k, path in enumerate(blocks.paths()):
        start = time.perf_counter()
        if k > last:
            break
        done, found = run.prune_block(k, blocks.modules[k], of_block[path], keeps, last=k == last)
        records += done
        for name, mask in found.items():
            masks.put(name, mask)
        if progress is not None:
            progress(Tick(k + 1, len(blocks), done, time.perf_counter() - start))
    grids |= run.grids
    return records, masks


def block_keeps(
    recipe: Recipe,
    of_block: Mapping[str, list[Layer]],
    load: Callable[[int], nn.Module],
    engine: Callable[[], Engine],
    free: Callable[[int], Any] | None = None,
    exact: bool = True,
    held: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """What every layer keeps; allocations that look at data take a pass of their own over the dense blocks."""
    measured = get("allocation", recipe.allocation).facts.get("measure") is not None
    facts: dict[str, Any] = {}
    run = engine() if measured and recipe.needs() & set(INPUT_FACTS) else None
    needs = frozenset(recipe.needs() & set(INPUT_FACTS))
    for k, (path, layers) in enumerate(of_block.items()):
        if not measured:
            facts.update({x.name: layer_facts(x, path) for x in layers})
            continue
        block = load(k)
        evidence = run.measure_block(k, block, layers, needs) if run is not None else {}
        for layer in layers:
            mask = (held or {}).get(layer.name)
            sketch = sketch_layer(layer, recipe, evidence.get(layer.name), exact, mask)
            facts[layer.name] = layer_facts(layer, path, sketch)
        if free is not None:
            free(k)
    return allocate(recipe, facts, before=shares(held or {}, facts))


def _whole(
    model: nn.Module,
    recipe: Recipe,
    layers: list[Layer],
    data: Any,
    loss: Loss | None,
    before: Mapping[str, Tensor] | None = None,
    grids: dict[str, Grid] | None = None,
) -> tuple[list[LayerRecord], Masks]:
    """All layers at once, in as many rounds as the recipe has steps; every round scores what is left.

    Where masks need not be nested, what is measured is of the weights that are left, and all weights are ranked by it.
    """
    if get("recovery", recipe.recovery).facts.get("data") == "block":
        raise RecipeError(
            f"recovery '{recipe.recovery}' works on repeated blocks in one step, from inputs alone: "
            "this model or recipe does not (choose --recovery none)"
        )
    batches = batches_of(data) if recipe.needs_data else []
    again = not recipe.nested and recipe.steps > 1
    dense = {x.name: x.stored.detach().clone() for x in layers} if again or recipe.control != "none" else {}
    records: dict[str, LayerRecord] = {}
    masks = held_by(layers, before)
    blocks = find_blocks(model)
    paths = blocks.paths() if blocks else []
    keeps = shares(masks, [x.name for x in layers])
    for step in range(1, recipe.steps + 1):
        sparsity = sparsity_at(recipe.schedule, step / recipe.steps, recipe.sparsity)
        evidence = evidence_of(model, recipe, layers, batches, loss)
        if again:
            restore(layers, dense)
            masks, keeps = {}, {}
        facts = {}
        for x in layers:
            block = next((p for p in paths if x.name.startswith(f"{p}.")), None)
            sketch = sketch_layer(x, recipe, evidence.get(x.name), True, masks.get(x.name))
            facts[x.name] = layer_facts(x, block, sketch)
        keeps = allocate(recipe, facts, sparsity, keeps)
        for x in layers:
            found = evidence.get(x.name)
            number = next((k for k, p in enumerate(paths) if x.name.startswith(f"{p}.")), None)
            records[x.name], masks[x.name] = solve_layer(
                x, recipe, keeps[x.name], evidence=found, block=number, mask=masks.get(x.name), grids=grids
            )
    return list(records.values()), Masks(controlled(recipe, layers, masks, dense))
