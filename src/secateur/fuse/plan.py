"""What a decomposition would do to a model: said, and not done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers import evaluating
from .choose import Choice, choose
from .lowrank import Made


@dataclass(frozen=True, eq=False)
class FactorPlan:
    """Which layers would be decomposed under which budget, and with data what each becomes. Prints as an explanation.

    Attributes:
        made: layer -> what it becomes; None where the data that decides are not given.
    """

    choice: Choice
    source: str
    made: Mapping[str, Made] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        c, made = self.choice, self.made
        return {
            "method": c.part.name,
            "knobs": c.knobs,
            "allocation": c.how,
            "target": c.asked,
            "model": self.source,
            "needs": sorted(c.needs),
            "before": c.before,
            "values": {"before": sum(x.numel for x in c.layers), "budget": round(c.budget)},
            "layers": [
                {
                    "name": x.name,
                    "shape": list(x.shape),
                    "becomes": None if made is None else _facts(made.get(x.name)),
                    "error": made[x.name].error if made is not None and x.name in made else None,
                }
                for x in c.layers
            ],
            "skipped": [{"name": s.name, "parameters": s.numel, "reason": s.reason} for s in c.skipped],
            "notes": sorted({f"{n} stays dense: {why}" for n, why in c.notes.items()}),
        }  # fmt: skip

    def __str__(self) -> str:
        c, total = self.choice, sum(x.numel for x in self.choice.layers)
        lines = [
            f"{c.part.name} on {self.source}, target {c.asked}",
            f"  what         {c.part.card.summary}",
            f"  ranks        {c.how}",
            f"  needs        {', '.join(sorted(c.needs)) or 'no data'}",
            f"  decomposes   {len(c.layers)} layers: {total:,} values -> at most {c.budget:,.0f}",
            f"  parameters   {c.before['params']:,} -> at most {c.before['params'] - total + c.budget:,.0f}",
        ]
        if self.made is None:
            lines.append("  which ranks depends on data: give some to see them")
        else:
            for x in c.layers:
                found = self.made.get(x.name)
                text = "stays dense" if found is None else _text(found)
                lines.append(f"    {x.name:44} {text}")
        reasons: dict[str, int] = {}
        for s in c.skipped:
            reasons[s.reason] = reasons.get(s.reason, 0) + s.numel
        lines += [f"  leaves       {count:,} parameters: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def _facts(made: Made | None) -> dict[str, Any]:
    return {"kind": "dense"} if made is None else dict(made.facts)


def _text(made: Made) -> str:
    ranks = ", ".join(map(str, made.facts.get("ranks", ())))
    nonzeros = f", {made.facts['nonzeros']:,} single weights" if "nonzeros" in made.facts else ""
    return f"{made.facts['kind']}{' ' + ranks if ranks else ''}{nonzeros}, error {made.error:.4f}"


def plan_factors(model: nn.Module, method: str, *, source: str = "", **given: Any) -> FactorPlan:
    """What `decompose` would do, by the same arguments; the model stays as it is.

    >>> print(plan_factors(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "svd", sparsity=0.5).to_dict()["values"])
    {'before': 128, 'budget': 64}
    """
    options = {k: given.pop(k, d) for k, d in _DEFAULTS.items()}
    with evaluating(model), torch.no_grad():
        choice = choose(model, method, **options, knobs=given)
        made = choice.make() if choice.batches or not choice.needs else None
    return FactorPlan(choice, source or type(model).__name__, made)


_DEFAULTS: dict[str, Any] = {
    "target": None, "sparsity": None, "data": None, "tokenizer": None, "count": None, "length": 512,
    "allocation": None, "only": (), "skip": (),
}  # fmt: skip
