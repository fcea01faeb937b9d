"""Plan the removal of whole blocks: which may go, what each is worth, and the proof."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..errors import ModelError, RecipeError
from ..graph.trace import plain_operations
from ..measure.flops import flops
from ..recipe import Recipe
from ..registry import get
from ..surgery.depth import BLOCKS, block_lists, members_of, parameters_of, prove_depth
from ..surgery.pieces import Removed, member
from ..surgery.prove import outputs
from .choose import globbed
from .make import NOTHING, waking_twin
from .plan import inputs
from .score import weight_scores
from .targets import Target
from .whole import Piece, WholePlan, totals


def plan_depth(
    model: nn.Module,
    recipe: Recipe,
    *,
    target: str | Target,
    example: Any,
    batches: Sequence[Any] = (),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    run: Callable[[nn.Module, Any], Any],
    evidence: Mapping[str, Any] | None = None,
) -> WholePlan:
    """Find which blocks leave nothing missing when they are zero, score them, and take out the least until the target.

    Args:
        example: inputs of one forward pass.
        batches, run: data that the criterion measures on, and how a model is run on it.
        evidence: layer name -> facts, where the criterion scores single weights; a block's score is their sum.

    Raises:
        ModelError: the model has no list of blocks, or does not run on the example.
    """
    wanted = target if isinstance(target, Target) else Target.parse(target)
    args, kwargs = inputs(example)
    double, twin_args, twin_kwargs, _ = waking_twin(model, args, kwargs, outputs)
    free, left = _free(double, recipe, twin_args, twin_kwargs)
    work = flops(model, *args, **kwargs)
    total = totals(model, work.total)

    def counts(gone: Removed) -> dict[str, int]:
        less = sum(work.by_module.get(member(p, k), 0) for p, ks in gone.items() for k in ks)
        sizes = parameters_of(model, gone)
        return {
            "params": total["params"] - sum(sizes.values()),
            "flops": total["flops"] - less,
            "bytes": total["bytes"] - sum(n * size for size, n in sizes.items()),
        }

    limit = wanted.remaining(total[wanted.quantity])
    scorer = _Scorer(model, recipe, batches, loss, run, evidence or {})
    most = len(free) - len({p for p, _ in free})  # a list keeps one block at least
    removed: dict[str, list[int]] = {}
    scores: dict[Piece, float] = {}
    size = 0
    while counts(removed)[wanted.quantity] > limit and size < most:
        size += 1
        removed, scores = scorer.choose(free, size, removed, scores)
    notes = []
    if not free:
        notes.append(
            "no block can be taken out: " + (next(iter(left.values())) if left else "there is no list of blocks")
        )
    proof = prove_depth(double, removed, twin_args, twin_kwargs) if removed else NOTHING
    if removed and not proof.proven:
        notes.append(f"each of these blocks alone leaves nothing missing, all together do: {proof.reason}")
        removed = {}
    elif counts(removed)[wanted.quantity] > limit:
        notes.append(
            f"the target is not met: {wanted.quantity} can only go to {counts(removed)[wanted.quantity]:,} here"
        )
    return WholePlan(
        model, recipe, wanted, BLOCKS, scores, left, removed, counts({}), counts(removed), proof, notes, (args, kwargs)
    )


def _free(
    double: nn.Module, recipe: Recipe, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Piece], dict[Piece, str]]:
    """Blocks that leave nothing missing, and why others may not go; lists within blocks where none of a list may."""
    free: list[Piece] = []
    left: dict[Piece, str] = {}
    due = list(block_lists(double))
    while due:
        path = due.pop(0)
        mine, held = [], {}
        for k in range(len(members_of(double, path))):
            if why := globbed(recipe, [member(path, k)]):
                held[path, k] = why
                continue
            proof = prove_depth(double, {path: [k]}, args, kwargs)
            if proof.proven:
                mine.append((path, k))
            else:
                held[path, k] = f"without it {proof.reason}"
        inner = list(block_lists(double, path)) if not mine else []
        due += inner
        free += mine
        left.update({} if inner else held)
    return free, left


class _Scorer:
    """What each block is worth, measured once or after each removal."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, batches: Sequence[Any], loss: Any, run: Any, evidence: Mapping[str, Any]
    ) -> None:
        self.model, self.recipe, self.batches, self.loss, self.run = model, recipe, batches, loss, run
        if recipe.criterion is None:
            raise RecipeError("blocks are ranked by a criterion: name one with --criterion")
        self.part = get("criterion", recipe.criterion)
        self.again = bool(self.part.facts.get("again"))
        self.evidence = evidence
        self._once: dict[str, dict[Piece, Any]] = {}

    def choose(
        self, free: Sequence[Piece], size: int, removed: Removed, scores: Mapping[Piece, float]
    ) -> tuple[dict[str, list[int]], dict[Piece, float]]:
        """The ``size`` blocks that go, and the scores by which they do."""
        there = {p: len(members_of(self.model, p)) for p, _ in free}
        gone: list[Piece] = [(p, k) for p, ks in removed.items() for k in ks] if self.again else []
        rest = [b for b in free if b not in gone]
        fresh = self._scores(rest, size, removed)
        for block in sorted(rest, key=lambda b: fresh[b]):
            path = block[0]
            if len(gone) < size and sum(p == path for p, _ in gone) + 1 < there[path]:
                gone.append(block)
        found: dict[str, list[int]] = {}
        for path, k in sorted(gone):
            found.setdefault(path, []).append(k)
        return found, {**scores, **fresh}

    def _scores(self, blocks: Sequence[Piece], size: int, removed: Removed) -> dict[Piece, float]:
        if self.part.facts.get("of") != "block":
            return self._of_weights(blocks)
        found: dict[Piece, float] = {}
        for path in dict.fromkeys(p for p, _ in blocks):
            mine = [b[1] for b in blocks if b[0] == path]
            facts = self._facts(path, mine, size, removed)
            score = self.part(facts, **self.recipe.knobs_of("criterion"))
            found.update({(path, k): float(score[k]) for k in mine})
        return found

    def _facts(self, path: str, rest: Sequence[int], size: int, removed: Removed) -> dict[str, Any]:
        """What the criterion names, for all blocks of a list; those that are gone have no loss without them."""
        free = torch.zeros(len(members_of(self.model, path)), dtype=torch.bool)
        free[list(rest)] = True
        # Of several lists each is asked for as many as it can give; `choose` takes the best of all.
        facts: dict[str, Any] = {"count": min(size, len(free) - 1), "block_free": free}
        if "block_loss" in self.part.needs:
            losses = torch.full(free.shape, torch.nan)
            for k in rest:
                losses[k] = self._loss_without((path, k), removed)
            facts["block_loss"] = losses
        if {"block_cosine", "block_path"} & set(self.part.needs):
            facts.update(self._activations(path))
        return facts

    def _of_weights(self, blocks: Sequence[Piece]) -> dict[Piece, float]:
        if "weights" not in self._once:
            scored = weight_scores(self.model, self.recipe, self.evidence)
            self._once["weights"] = {
                b: sum(float(s.weights().sum()) for n, s in scored.items() if n.startswith(f"{member(*b)}."))
                for b in blocks
            }
        return {b: self._once["weights"][b] for b in blocks}

    def _loss_without(self, block: Piece, removed: Removed) -> float:
        if self.loss is None:
            raise RecipeError(f"criterion '{self.part.name}' needs a loss: pass loss=")
        gone = {p: list(ks) for p, ks in removed.items()}
        gone[block[0]] = sorted([*gone.get(block[0], []), block[1]])
        small = BLOCKS.without(self.model, gone)
        with plain_operations(small):
            return sum(float(self.loss(small, b)) for b in self.batches) / max(len(self.batches), 1)

    def _activations(self, path: str) -> dict[str, Any]:
        """Mean cosine between each block's input and output, and the last position's way through the blocks."""
        if path in self._once:
            return self._once[path]  # type: ignore[return-value]
        members = members_of(self.model, path)
        cosine = torch.zeros(len(members), dtype=torch.float64)
        count = 0
        ways: list[Tensor] = []
        way: list[Tensor] = []

        def seen(k: int) -> Callable[..., None]:
            def hook(_: nn.Module, given: Any, kwargs: Any, output: Any) -> None:
                x, y = _first(given, kwargs), _first(output, {})
                if x.shape != y.shape:
                    raise ModelError(
                        f"{member(path, k)} changes the shape of its input: criterion '{self.part.name}' does not apply"
                    )
                cosine[k] += float(nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).mean())
                way.append(_last(x))
                if k == len(members) - 1:
                    way.append(_last(y))

            return hook

        hooks = [m.register_forward_hook(seen(k), with_kwargs=True) for k, m in enumerate(members)]
        try:
            with plain_operations(self.model):
                for batch in self.batches:
                    way.clear()
                    self.run(self.model, batch)
                    ways.append(torch.stack(way))
                    count += 1
        finally:
            for hook in hooks:
                hook.remove()
        found: dict[str, Any] = {"block_cosine": cosine / max(count, 1), "block_path": torch.cat(ways, 1)}
        self._once[path] = found  # type: ignore[assignment]
        return found


def _last(x: Tensor) -> Tensor:
    """The last token's state in each window, or all of a state that is no sequence: ``(windows, width)``."""
    return (x[:, -1] if x.dim() == 3 else x.flatten(1)).float()


def _first(values: Any, kwargs: Any) -> Tensor:
    tensors = itertools.chain(tree_iter(values), tree_iter(dict(kwargs)))
    return next(x for x in tensors if isinstance(x, Tensor) and x.is_floating_point())
