"""Decompose the layers of a model under one budget: find, gather, allocate ranks, replace."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrate import run_model
from ..errors import ModelError
from ..layers import Layer, Skipped, evaluating
from ..measure import Peak, machine, versions
from ..surgery.depth import BLOCKS
from ..surgery.experts import EXPERTS
from ..surgery.factors import AFTER, BEFORE, factored, fill, put
from .choose import Allocation, choose
from .lowrank import Made


@dataclass(frozen=True)
class Layered:
    """What became of one layer.

    Attributes:
        name, shape: of the layer, as a matrix.
        kind: ``low-rank``, ``tucker``, ``cp``, ``low-rank+sparse``, ``sparse`` or ``dense``.
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
        method: ``low-rank``, ``asvd``, ``svd``, ``low-rank+sparse``, ``tucker`` or ``cp`` (``secateur methods``).
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
    started = time.perf_counter()
    with Peak() as peak, evaluating(model), torch.no_grad():
        found = choose(
            model, method, target, sparsity, data, tokenizer, windows_count, length, allocation, only, skip, knobs
        )
        records = _replace(model, found.layers, found.make(), found.notes, found.batches[:1])
    before, element = found.before, found.element
    after = {"params": before["params"] - sum(r.before - r.after for r in records)}
    mask = sum(-(-r.before // 8) for r in records if "sparse" in r.kind)
    after["bytes"] = before["bytes"] - element * (before["params"] - after["params"]) + mask
    run = {
        "secateur": versions().get("secateur", "0"),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "method": method,
        "knobs": found.knobs,
        "allocation": found.how,
        "target": found.asked,
        "model": {"source": "module", "class": type(model).__name__},
        "cite": [found.part.card.source],
        "data": found.described,
        "before": before,
        "after": after,
        "layers": [asdict(r) for r in records],
        "skipped": [{"name": s.name, "parameters": s.numel, "reason": s.reason} for s in found.skipped],
        "timings": {"total": round(time.perf_counter() - started, 3)},
        "peak_memory": peak.bytes,
        "notes": sorted({f"{n} stays dense: {why}" for n, why in found.notes.items()}),
        "versions": versions(),
        "machine": machine(),
    }
    _describe(model, run)
    return Decomposed(model, records, found.skipped, run)


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
