"""Plan the removal of whole blocks: which may go, what each is worth, and the proof."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..errors import ModelError, RecipeError
from ..graph.trace import plain_operations
from ..measure.flops import flops
from ..recipe import Recipe
from ..registry import get
from ..surgery.depth import Removed, block_lists, members_of, parameters_of, prove_depth, remove, without
from .choose import globbed
from .make import waking_twin
from .plan import inputs
from .score import weight_scores
from .stock import same
from .targets import Target

Block = tuple[str, int]
_TOLERANCE = 1e-9


@dataclass(eq=False)
class DepthPlan:
    """Which blocks would be taken out of a model, with the proof. Prints as a table; nothing is changed before `run`.

    Attributes:
        scores: block -> what it is worth; of those that may go.
        left: block -> why it may not.
        removed: path of a list of blocks -> numbers of those that go.
        before, after: parameters and FLOPs of one forward pass of the example.
        error: largest relative difference of the model with these blocks at zero and without them.
    """

    model: nn.Module
    recipe: Recipe
    target: Target
    scores: dict[Block, float]
    left: dict[Block, str]
    removed: dict[str, list[int]]
    before: dict[str, int]
    after: dict[str, int]
    error: float | None
    notes: list[str]
    example: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)

    @property
    def proven(self) -> bool:
        return self.error is not None and bool(self.removed)

    def mask(self) -> nn.Module:
        """Set every parameter of the blocks that go to zero, in place: their place in the model is then empty."""
        with torch.no_grad():
            for path, gone in self.removed.items():
                for k in gone:
                    for parameter in self.model.get_submodule(f"{path}.{k}").parameters():
                        parameter.zero_()
        return self.model

    def shrink(self) -> nn.Module:
        """A copy of the model without these blocks. The model itself stays as it is.

        Raises:
            ModelError: no block can be taken out.
        """
        if not self.removed:
            raise ModelError("no block can be taken out: " + "; ".join(self.notes or ["none may go"]))
        small = copy.deepcopy(self.model)
        remove(small, self.removed)
        args, kwargs = self.example
        surgery = self._describe()
        if _stock(small, self.model, self.removed, args, kwargs):
            surgery["format"] = "transformers"
        small.secateur_surgery = surgery  # type: ignore[assignment]
        return small

    run = shrink

    def _describe(self) -> dict[str, Any]:
        values = (*self.example[0], *self.example[1].values())
        return {
            "version": 1,
            "format": "secateur",
            "recipe": self.recipe.to_dict(),
            "target": str(self.target),
            "before": self.before,
            "after": self.after,
            "error": self.error,
            "example": [
                {"shape": list(x.shape), "dtype": str(x.dtype)} if isinstance(x, Tensor) else None for x in values
            ],
            "kept": {},
            "mends": [],
            "removed": {p: {"of": len(members_of(self.model, p)), "gone": gone} for p, gone in self.removed.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "recipe": self.recipe.to_dict(),
            "target": str(self.target),
            "before": self.before,
            "after": self.after,
            "blocks": [
                {"name": f"{p}.{k}", "score": s, "goes": k in self.removed.get(p, ())}
                for (p, k), s in self.scores.items()
            ],
            "left": [{"name": f"{p}.{k}", "reason": why} for (p, k), why in self.left.items()],
            "removed": self.removed,
            "proof": {"proven": self.proven, "error": self.error},
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.recipe.method}, target {self.target}",
            f"{'':12}{'before':>18}{'after':>18}{'ratio':>10}",
        ]
        for key, a in self.before.items():
            b = self.after[key]
            lines.append(f"{key:12}{a:>18,}{b:>18,}{b / max(a, 1):>10.3f}")
        lines.append("")
        for (path, k), score in self.scores.items():
            goes = "goes" if k in self.removed.get(path, ()) else ""
            lines.append(f"  {f'{path}.{k}':60} {score:<12.5g} {goes}".rstrip())
        lines += [f"  {f'{p}.{k}':60} left alone: {why}" for (p, k), why in self.left.items()]
        error = "-" if self.error is None else f"{self.error:.1e}"
        lines.append(f"\nmasked == smaller: {'proven' if self.proven else 'NOT proven'}, error {error}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


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
) -> DepthPlan:
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
    double, twin_args, twin_kwargs = waking_twin(model, args, kwargs)
    free, left = _free(double, recipe, twin_args, twin_kwargs)
    counted = flops(model, *args, **kwargs)
    total = {
        "params": sum(p.numel() for p in model.parameters()),
        "flops": counted.total,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }

    def counts(gone: Removed) -> dict[str, int]:
        less = sum(counted.by_module.get(f"{p}.{k}", 0) for p, ks in gone.items() for k in ks)
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
    scores: dict[Block, float] = {}
    size = 0
    while counts(removed)[wanted.quantity] > limit and size < most:
        size += 1
        removed, scores = scorer.choose(free, size, removed, scores)
    notes = []
    if not free:
        notes.append(
            "no block can be taken out: " + (next(iter(left.values())) if left else "there is no list of blocks")
        )
    error, why = prove_depth(double, removed, twin_args, twin_kwargs) if removed else (None, "")
    if removed and (error is None or error > _TOLERANCE):
        notes.append(f"each of these blocks alone leaves nothing missing, all together do: {why or f'{error:.1e}'}")
        removed, error = {}, None
    elif counts(removed)[wanted.quantity] > limit:
        notes.append(
            f"the target is not met: {wanted.quantity} can only go to {counts(removed)[wanted.quantity]:,} here"
        )
    return DepthPlan(
        model, recipe, wanted, scores, left, removed, counts({}), counts(removed), error, notes, (args, kwargs)
    )


def _free(
    double: nn.Module, recipe: Recipe, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Block], dict[Block, str]]:
    """Blocks that leave nothing missing, and why others may not go; lists within blocks where none of a list may."""
    free: list[Block] = []
    left: dict[Block, str] = {}
    due = list(block_lists(double))
    while due:
        path = due.pop(0)
        mine, held = [], {}
        for k in range(len(members_of(double, path))):
            if why := globbed(recipe, [f"{path}.{k}"]):
                held[path, k] = why
                continue
            error, why = prove_depth(double, {path: [k]}, args, kwargs)
            if error is not None and error <= _TOLERANCE:
                mine.append((path, k))
            else:
                held[path, k] = why or f"the model computes something else without it (off by {error:.1e})"
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
        self._once: dict[str, dict[Block, Any]] = {}

    def choose(
        self, free: Sequence[Block], size: int, removed: Removed, scores: Mapping[Block, float]
    ) -> tuple[dict[str, list[int]], dict[Block, float]]:
        """The ``size`` blocks that go, and the scores by which they do."""
        there = {p: len(members_of(self.model, p)) for p, _ in free}
        gone: list[Block] = [(p, k) for p, ks in removed.items() for k in ks] if self.again else []
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

    def _scores(self, blocks: Sequence[Block], size: int, removed: Removed) -> dict[Block, float]:
        knobs = self.recipe.knobs_of("criterion")
        if self.part.facts.get("of") != "block":
            return self._of_weights(blocks)
        found: dict[Block, float] = {}
        for path in dict.fromkeys(p for p, _ in blocks):
            mine = [b for b in blocks if b[0] == path]
            facts: dict[str, Any] = {"count": size}
            if "block_loss" in self.part.needs:
                facts["block_loss"] = torch.tensor([self._loss_without(b, removed) for b in mine])
                found.update(zip(mine, self.part(facts, **knobs).tolist(), strict=True))
                continue
            facts.update(self._activations(path))
            every = self.part(facts, **knobs)
            found.update({b: float(every[b[1]]) for b in mine})
        return found

    def _of_weights(self, blocks: Sequence[Block]) -> dict[Block, float]:
        if "weights" not in self._once:
            scored = weight_scores(self.model, self.recipe, self.evidence)
            self._once["weights"] = {
                b: sum(float(s.score.sum()) for n, s in scored.items() if n.startswith(f"{b[0]}.{b[1]}."))
                for b in blocks
            }
        return {b: self._once["weights"][b] for b in blocks}

    def _loss_without(self, block: Block, removed: Removed) -> float:
        if self.loss is None:
            raise RecipeError(f"criterion '{self.part.name}' needs a loss: pass loss=")
        gone = {p: list(ks) for p, ks in removed.items()}
        gone[block[0]] = sorted([*gone.get(block[0], []), block[1]])
        small = without(self.model, gone)
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
                        f"{path}.{k} changes the shape of its input: criterion '{self.part.name}' does not apply"
                    )
                cosine[k] += float(nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).mean())
                way.append(x[:, -1].float())
                if k == len(members) - 1:
                    way.append(y[:, -1].float())

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


def _first(values: Any, kwargs: Any) -> Tensor:
    tensors = itertools.chain(tree_iter(values), tree_iter(dict(kwargs)))
    return next(x for x in tensors if isinstance(x, Tensor) and x.is_floating_point())


def _stock(
    small: nn.Module, model: nn.Module, removed: Removed, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Give the smaller model's config its new number of blocks, if stock loaders then build the same model."""
    config: Any = getattr(small, "config", None)
    if config is None or not hasattr(config, "to_dict") or len(removed) != 1 or not hasattr(small, "save_pretrained"):
        return False
    ((path, gone),) = removed.items()
    before = len(members_of(model, path))
    fields = [k for k, v in config.to_dict().items() if type(v) is int and v == before]
    due = {name: tuple(p.shape) for name, p in small.named_parameters()}
    for choice in itertools.islice(itertools.product((True, False), repeat=len(fields)), 64):
        trial = copy.deepcopy(config)
        for name, changed in zip(fields, choice, strict=True):
            setattr(trial, name, before - len(gone) if changed else before)
        try:
            with torch.device("meta"):
                built = type(small)(trial)
            if callable(check := getattr(trial, "validate", None)):
                check()
        except Exception:  # numbers that do not go together, as the class itself finds
            continue
        if {name: tuple(p.shape) for name, p in built.named_parameters()} == due and same(small, trial, args, kwargs):
            for module in small.modules():
                if getattr(module, "config", None) is config:
                    module.config = trial
            return True
    return False
