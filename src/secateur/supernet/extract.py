"""A sub-network as a plan: the whole model without its blocks, and what of it stays, with a proof."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..errors import ModelError
from ..structured.plan import StructuredPlan, describe
from ..structured.stock import stock_config
from ..structured.targets import Target
from ..surgery.depth import BLOCKS
from ..surgery.prove import Proof
from .elastic import Elastic
from .stages import renamed
from .subnet import Supernet

#: Of a plan for what is counted, which says nothing here: a sub-network was chosen already.
_CHOSEN = ("the target is not met", "more goes than was asked")


def extracted(net: Supernet, counts: tuple[int, ...], target: Target) -> tuple[nn.Module, Proof]:
    """A sub-network as `StructuredPlan.shrink` makes smaller models, which `secateur.save` writes; and its proof.

    Raises:
        ModelError: it is not proven to compute what the masked supernet does.
    """
    elastic = net.elastic
    applied = net.applied(counts)
    proof = elastic.prove(counts, applied)
    if not proof.proven:
        raise ModelError(f"the sub-network does not compute what the masked supernet does: {proof.reason}")
    plan = plan_of(elastic, applied, counts, target, proof)
    small = plan.shrink() if plan.kept else _described(plan)
    surgery: Any = small.secateur_surgery
    removed = elastic.cut(counts).removed
    if removed:
        surgery[BLOCKS.key] = {
            path: {"of": len(elastic.model.get_submodule(path)._modules), "gone": gone}
            for path, gone in removed.items()
        }
    return small, proof


def _described(plan: StructuredPlan) -> nn.Module:
    """The plan's model, of which no tensor loses anything, with the record that loaders read."""
    small, (args, kwargs) = plan.model, plan.example
    surgery = describe(plan)
    if stock_config(small, plan.sizes, args, kwargs):
        surgery["format"] = "transformers"
    small.secateur_surgery = surgery  # type: ignore[assignment]
    return small


def plan_of(
    elastic: Elastic, applied: nn.Module, counts: tuple[int, ...], target: Target, proof: Proof
) -> StructuredPlan:
    """The plan on the model without the blocks that are left out, which is made of ``applied`` in place."""
    cut, case = elastic.cut(counts), elastic.subject.case
    whole = case.plan(
        Target.parse("params 50%"), cut.labels, dataclasses.replace(proof, mends=cut.mends), {}, elastic.multiple
    )
    sizes = {a: list(b) for a, b in whole.sizes.items()}
    for path, gone in cut.removed.items():
        count = len(elastic.model.get_submodule(path)._modules)
        left = sizes.setdefault(count, [])
        left += [n for n in (count - len(gone),) if n not in left]
    BLOCKS.remove(applied, cut.removed)
    quantities = ("params", "flops", "bytes")
    return dataclasses.replace(
        whole, model=applied, target=target, kept=cut.kept_there, sizes=sizes,
        before={q: elastic.cost(q, elastic.most) for q in quantities},
        after={q: elastic.cost(q, counts) for q in quantities},
        emptied=[(n, a) for p, a in whole.emptied if (n := renamed(p, cut.removed)) is not None],
        notes=[n for n in whole.notes if not n.startswith(_CHOSEN)],
    )  # fmt: skip
