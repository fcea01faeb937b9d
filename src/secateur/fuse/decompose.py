"""Decompose the layers of a model under one budget: find, gather, allocate ranks, replace."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from ..calibrate import batches_of, run_model
from ..data import Windows, windows
from ..errors import ModelError, RecipeError, UnknownName
from ..evidence import gather_inputs
from ..evidence.inputs import INPUT_FACTS, InputEvidence
from ..layers import Layer, Skipped, evaluating, find_layers
from ..measure import Peak, machine, versions
from ..registry import Part, get, parts
from ..stream import find_blocks
from ..structured import Target
from ..structured.whole import totals
from ..surgery.depth import BLOCKS
from ..surgery.experts import EXPERTS
from ..surgery.factors import AFTER, BEFORE, factored, fill, put, why_not
from .lowrank import Made, Options
from .ranks import Curve, greedy

Allocation = Literal["greedy", "uniform"]


@dataclass(frozen=True)
class Layered:
    """What became of one layer.

    Attributes:
        name, shape: of the layer, as a matrix.
        kind: ``low-rank``, ``tucker``, ``low-rank+sparse``, ``sparse`` or ``dense``.
        ranks: of the factors.
        before, after: values that are stored; of a sparse term those that are not zero.
        error: root of the squared error over what is approximated: outputs where the method sees inputs, else weights.
        note: what is to be said of it.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    ranks: tuple[int, ...]
    before: int
    after: int
    error: float
    note: str = ""


@dataclass(eq=False)
class Decomposed:
    """A decomposed model with the record of what was done. Prints as a before and after table."""

    model: nn.Module
    records: list[Layered]
    skipped: list[Skipped]
    run: dict[str, Any] = field(repr=False)

    def save(self, out: str | Path, tokenizer: Any = None, force: bool = False) -> Path:
        """Write the model as `secateur.save` does, which `secateur.load` reads, and ``run.json``.

        Raises:
            OutputError: ``out`` exists and is not empty, and is not to be replaced (``force``).
        """
        from ..disk import beside
        from ..record import dumps
        from ..structured import save

        with beside(out, force) as part:
            save(self.model, part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            (part / "run.json").write_text(dumps(self.run), encoding="utf-8")
        return Path(out)

    def __str__(self) -> str:
        before, after = self.run["before"], self.run["after"]
        of_layers = sum(r.before for r in self.records), sum(r.after for r in self.records)
        changed = [r for r in self.records if r.kind != "dense"]
        ranks = [r.ranks[0] for r in changed if r.ranks]
        lines = [
            f"{self.run['method']}: {len(changed)} of {len(self.records)} layers decomposed, "
            f"{len(self.skipped)} parameters left alone",
            f"{'':24}{'before':>16}{'after':>16}",
            f"{'values in those layers':24}{of_layers[0]:>16,}{of_layers[1]:>16,}",
            f"{'parameters':24}{before['params']:>16,}{after['params']:>16,}",
            f"{'bytes':24}{before['bytes']:>16,}{after['bytes']:>16,}",
        ]
        if ranks:
            lines.append(f"{'ranks':24}{'':>16}{f'{min(ranks)} to {max(ranks)}':>16}")
            mean = sum(r.error for r in changed) / len(changed)
            lines.append(f"{'mean error of a layer':24}{'':>16}{mean:>16.4f}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.run["notes"])])


def methods() -> dict[str, Part]:
    """The registered decompositions by name."""
    return {n: p for n, p in parts("transform").items() if p.facts.get("makes") == "factors"}


def decompose(
    model: nn.Module,
    method: str = "low-rank",
    *,
    target: str | None = None,
    sparsity: float | None = None,
    data: Any = None,
    tokenizer: Any = None,
    windows_count: int | None = None,
    length: int = 512,
    allocation: Allocation | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    **knobs: Any,
) -> Decomposed:
    """Replace layers by products, or sums, of smaller plain layers, in place.

    Args:
        model: any module. Where it repeats blocks, the layers in these are decomposed, others only by name.
        method: ``low-rank``, ``asvd``, ``svd``, ``low-rank+sparse`` or ``tucker`` (``secateur methods``).
        target: what of the whole model goes or stays, as ``"params 30%"`` or ``"bytes to 40%"``.
        sparsity: instead, the fraction of the weights of the decomposed layers that goes.
        data: batches that ``model(batch)`` accepts, or text (``text:FILE``) with a ``tokenizer``, for what sees inputs.
        tokenizer, windows_count, length: how text is cut.
        allocation: ``greedy`` spends the budget where it takes away most error of a layer, relative to the layer;
            ``uniform`` takes the same share of every layer.
        only, skip: globs over layer names.
        knobs: of the method.

    Returns:
        The model and the record. A layer that no rank makes smaller, or that the budget can keep, stays as it is.

    Raises:
        RecipeError: what is asked for is unknown, missing or impossible; nothing is changed then.
        ModelError: the model does not run with factored layers; it is then as it was.
    """
    if method not in methods():
        raise UnknownName("decomposition", method, methods())
    part = get("transform", method)
    values = part.knobs_with(knobs)
    budgeted = "budget" in part.needs
    how = allocation or ("uniform" if budgeted else "greedy")
    if how not in get_args(Allocation):
        raise UnknownName("allocation of ranks", how, get_args(Allocation), ", ".join(get_args(Allocation)))
    if budgeted and how == "greedy":
        raise RecipeError(f"'{method}' divides the budget of each layer itself: allocation uniform")
    started = time.perf_counter()
    with Peak() as peak, evaluating(model), torch.no_grad():
        layers, skipped = _layers(model, part, only, skip)
        before = _counts(model)
        budget, element, quantity = _budget(model, layers, target, sparsity)
        needs = frozenset(part.needs) & INPUT_FACTS.keys()
        batches, described = _batches(model, data, tokenizer, windows_count, length) if needs else ([], None)
        if needs and not batches:
            raise RecipeError(f"'{method}' needs {sorted(needs)[0]}, which is measured on data: pass data= (--data)")
        seen = gather_inputs(model, layers, needs, batches, run_model) if needs else {}
        work = _Work(part, values, seen, element if quantity == "bytes" else None)
        made = work.budgeted(layers, budget) if budgeted else work.ranked(layers, budget, how)
        records = _replace(model, layers, made, work.notes, batches[:1])
    after = {"params": before["params"] - sum(r.before - r.after for r in records)}
    mask = sum(-(-r.before // 8) for r in records if "sparse" in r.kind)
    after["bytes"] = before["bytes"] - element * (before["params"] - after["params"]) + mask
    asked = target if target is not None else f"{sparsity:g} of the weights in those layers"
    run = {
        "secateur": versions().get("secateur", "0"),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "method": method,
        "knobs": values,
        "allocation": how,
        "target": asked,
        "model": {"source": "module", "class": type(model).__name__},
        "cite": [part.card.source],
        "data": described,
        "before": before,
        "after": after,
        "layers": [asdict(r) for r in records],
        "skipped": [{"name": s.name, "parameters": s.numel, "reason": s.reason} for s in skipped],
        "timings": {"total": round(time.perf_counter() - started, 3)},
        "peak_memory": peak.bytes,
        "notes": sorted({f"{n} stays dense: {why}" for n, why in work.notes.items()}),
        "versions": versions(),
        "machine": machine(),
    }
    _describe(model, run)
    return Decomposed(model, records, skipped, run)


def _counts(model: nn.Module) -> dict[str, int]:
    return {k: int(v) for k, v in totals(model, 0).items() if k != "flops"}


def _layers(
    model: nn.Module, part: Part, only: Sequence[str], skip: Sequence[str]
) -> tuple[list[Layer], list[Skipped]]:
    """Plain layers, and why others are left alone."""
    blocks = find_blocks(model)
    found, skipped = find_layers(model, only, skip, None if blocks is None else blocks.paths())
    names: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        names[id(p)] = names.get(id(p), 0) + 1
    layers = []
    for layer in found:
        reason = why_not(layer.module)
        if reason is None and names[id(getattr(layer.module, layer.parameter))] > 1:
            reason = "it shares its values with another"
        kinds = part.facts.get("kinds")
        if reason is None and kinds and layer.kind not in kinds:
            reason = f"{part.name} is for layers of kind {', '.join(kinds)}"
        if reason is None and layer.module is model:
            raise ModelError("this model is a single layer: put it into a torch.nn.Sequential")
        if reason is None:
            layer.check_finite()
            layers.append(layer)
        else:
            skipped.append(Skipped(layer.name, layer.numel, reason))
    if not layers:
        reasons = sorted({s.reason for s in skipped})
        raise RecipeError(f"there is no layer that {part.name} can decompose: {'; '.join(reasons)}")
    return layers, skipped


def _budget(
    model: nn.Module, layers: Sequence[Layer], target: str | None, sparsity: float | None
) -> tuple[float, int, str]:
    """How many values the layers may keep, bytes of a value, and what the target counts."""
    if (target is None) == (sparsity is None):
        raise RecipeError("say how much: target='params 30%' of the model, or sparsity=0.3 of the decomposed layers")
    total = sum(x.numel for x in layers)
    sizes = {x.stored.element_size() for x in layers}
    element = sizes.pop()
    if sizes:
        raise RecipeError("the layers have values of several types: convert the model to one")
    if target is None:
        assert sparsity is not None
        if not 0 < sparsity < 1:
            raise RecipeError(f"sparsity is a fraction of what goes, in (0, 1), not {sparsity:g}")
        return (1 - sparsity) * total, element, "params"
    wanted, counts = Target.parse(target), _counts(model)
    if wanted.quantity not in ("params", "bytes"):
        raise RecipeError(f"ranks are given out by 'params' or 'bytes', not {wanted.quantity}")
    unit = element if wanted.quantity == "bytes" else 1
    gone = (counts[wanted.quantity] - wanted.remaining(counts[wanted.quantity])) / unit
    if not 0 < gone < total:
        raise RecipeError(
            f"target '{target}' takes {gone:,.0f} values away, and the layers that can be decomposed have {total:,}"
        )
    return total - gone, element, wanted.quantity


def _batches(
    model: nn.Module, data: Any, tokenizer: Any, count: int | None, length: int
) -> tuple[list[Any], dict[str, Any] | None]:
    if data is None:
        return [], None
    if not isinstance(data, (str, Windows)):
        return batches_of(data), {"source": "batches"}
    device = next(model.parameters()).device
    text = windows(data, tokenizer, count=count, length=length)
    return [ids.to(device) for ids in text.ids.split(1)], text.describe()


class _Work:
    """What each layer becomes; layers that are not in the answer stay dense."""

    def __init__(
        self, part: Part, knobs: Mapping[str, Any], seen: Mapping[str, InputEvidence], element: int | None
    ) -> None:
        self.part, self.knobs, self.seen, self.element = part, knobs, seen, element
        self.notes: dict[str, str] = {}

    def _given(self, layer: Layer, **more: Any) -> Any:
        facts: dict[str, Any] = {"weight": layer.weight(), "stored": layer.stored.detach(), **more}
        evidence = self.seen.get(layer.name)
        facts |= {n: evidence[n] for n in self.part.needs if evidence is not None and n in INPUT_FACTS}
        return self.part(facts, **self.knobs)

    def _seen(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those whose inputs were seen, where inputs matter."""
        for x in layers:
            if x.name in self.seen and not self.seen[x.name].tokens:
                self.notes[x.name] = "no calibration input reached it"
        return [x for x in layers if x.name not in self.notes]

    def ranked(self, layers: Sequence[Layer], budget: float, how: str) -> dict[str, Made]:
        """Ranks out of one budget, or the same share of every layer."""
        usable = self._seen(layers)
        budget -= sum(x.numel for x in layers if x.name in self.notes)
        total = sum(x.numel for x in usable)
        options: dict[str, Options] = {}
        curves: dict[str, Curve] = {}
        for x in usable:
            found = self._given(x)
            saves = found.curve.sizes < x.numel
            if not saves.any():
                self.notes[x.name] = "no rank makes it smaller"
                budget, total = budget - x.numel, total - x.numel
                continue
            options[x.name] = found
            sizes = np.append(found.curve.sizes[saves], float(x.numel))
            curves[x.name] = Curve(sizes, np.append(found.curve.errors[saves], 0.0))
        if how == "greedy":
            chosen = greedy(curves, budget)
        else:
            share = budget / max(total, 1)
            chosen = {
                n: max(0, int(np.searchsorted(c.sizes, share * c.sizes[-1], side="right")) - 1)
                for n, c in curves.items()
            }  # fmt: skip
            if sum(float(curves[n].sizes[k]) for n, k in chosen.items()) > budget:
                raise RecipeError("the smallest ranks are larger than the same share of every layer: ask for less")
        return {n: options[n].make(k) for n, k in chosen.items() if k < len(curves[n].sizes) - 1}

    def budgeted(self, layers: Sequence[Layer], budget: float) -> dict[str, Made]:
        """The same share of every layer, which divides it itself."""
        usable = self._seen(layers)
        budget -= sum(x.numel for x in layers if x.name in self.notes)
        share = budget / max(sum(x.numel for x in usable), 1)
        made = {}
        for x in usable:
            mask = 0.0 if self.element is None else x.numel / (8 * self.element)
            found = self._given(x, budget=share * x.numel, mask_size=mask)
            if found.facts["kind"] == "dense":
                raise RecipeError(f"{x.name} has no room for one rank or one weight: ask for less to go")
            made[x.name] = found
        return made


def _replace(
    model: nn.Module, layers: Sequence[Layer], made: Mapping[str, Made], notes: dict[str, str], batch: Sequence[Any]
) -> list[Layered]:
    records = []
    dense = {x.name: x.module for x in layers if x.name in made}
    masked = {x.name: x.weight().clone() for x in layers if x.name in made and made[x.name].facts["kind"] == "sparse"}
    for x in layers:
        if x.name not in made:
            note = notes.get(x.name, "")
            records.append(Layered(x.name, x.shape, "dense", (), x.numel, x.numel, 0.0, note))
            continue
        found = made[x.name]
        kind, ranks = found.facts["kind"], tuple(found.facts.get("ranks", ()))
        if kind == "sparse":
            x.write(found.tensors[0])
        else:
            new = factored(x.module, found.facts)
            fill(new, found.tensors, getattr(x.module, "bias", None))
            put(model, x.name, new)
        size = int(found.facts.get("nonzeros", 0)) + sum(
            t.numel() for t in (found.tensors[:2] if "sparse" in kind else found.tensors) if kind != "sparse"
        )
        records.append(Layered(x.name, x.shape, kind, ranks, x.numel, size, found.error))
    try:
        for one in batch:
            run_model(model, one)
    except Exception as error:  # the model's own code
        for name, module in dense.items():
            put(model, name, module)
        for x in layers:
            if x.name in masked:
                x.write(masked[x.name])
        raise ModelError(
            f"the model does not run with factored layers, and is as it was: {type(error).__name__} {error} "
            "(leave out the layers whose weights its code reads, with skip=)"
        ) from None
    return records


def _describe(model: nn.Module, run: Mapping[str, Any]) -> None:
    """What `secateur.save` writes, so that the decomposition can be replayed on a fresh model."""
    own: Any = model
    old = getattr(own, "secateur_surgery", None)
    facts = {r["name"]: _facts(r) for r in run["layers"] if r["kind"] != "dense"}
    keep = isinstance(old, dict) and old.get("format") != "transformers"  # a stock config says the smaller sizes
    surgery: dict[str, Any] = (
        dict(old)
        if keep and isinstance(old, dict)
        else {"version": 1, "format": "secateur", "kept": {}, "mends": []}
    )  # fmt: skip
    cut = bool(surgery["kept"]) or any(surgery.get(k.key) for k in (BLOCKS, EXPERTS))
    key = AFTER if cut else BEFORE
    surgery[key] = {**surgery.get(key, {}), **facts}
    surgery["method"], surgery["target"] = run["method"], run["target"]
    if not cut:
        surgery["before"] = surgery.get("before", run["before"])
    surgery["after"] = run["after"]
    own.secateur_surgery = surgery


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    found = {"kind": record["kind"], "ranks": list(record["ranks"])}
    return found
