"""DynamicViT: small networks, trained with the model, say at a few places which tokens go on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    dropout,
    kl_div,
    log_softmax,
    mse_loss,
    multi_head_attention_forward,
    scaled_dot_product_attention,
)
from torch.overrides import TorchFunctionMode

from ..errors import ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..processes import mean, noise
from ..registry import register
from ..select import keep_count, select
from ..structured import Target
from .act import positions, take
from .gates import MEANS, heads_of, masked, mean_of_tokens
from .packed import attend_packed, is_limited, packed_arguments
from .structure import Call, Structure, attention_arguments, call_of, find, first_tensor
from .tokens import check_output, one_of, places_in, reaching

#: Of the attention in training, so that no row of it is 0 / 0.
_EPS = 1e-6


class Predictor(nn.Module):
    """Of each token, the logarithms of the probabilities that it stays and that it goes.

    Half of what it knows is the token's own, half the mean over the tokens that are there.
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """Tokens ``(batch, tokens, width)`` and which of them are there, ``(batch, tokens)``."""
        x = self.enter(x)
        own, other = x.split([x.shape[2] - x.shape[2] // 2, x.shape[2] // 2], dim=2)
        there = there.to(x.dtype)[..., None]
        mean = (other * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
        return log_softmax(self.out(torch.cat([own, mean.expand_as(other)], 2)).float(), -1)


def drawn(log: Tensor) -> Tensor:
    """1 for tokens that stay and 0 for the others, drawn with these probabilities; gradients are those of a softmax.

    Straight-through Gumbel-softmax with temperature 1.
    """
    gumbel = -noise(log, lambda x: x.exponential_()).log()
    soft = (log + gumbel).softmax(-1)[..., 0]
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def attend_to(query: Tensor, key: Tensor, value: Tensor, there: Tensor, scale: float | None, rate: float) -> Tensor:
    """Attention in which each token sees those that are there, and itself; ``there`` gets gradients."""
    score = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ heads_of(key, query).mT
    n = score.shape[-1]
    seen = there.float()[:, None, None, :]
    seen = seen + (1 - seen) * torch.eye(n, device=score.device)
    weight = (score.float() - score.float().amax(-1, keepdim=True).detach()).exp() * seen
    weight = (weight + _EPS / n) / (weight.sum(-1, keepdim=True) + _EPS)
    found: Tensor = dropout(weight, rate).to(value.dtype) @ heads_of(value, query)
    return found


class DynamicViT(nn.Module):
    """A vision transformer with predictors in front of some of its blocks.

    In evaluation mode tokens leave: of the tokens of the input that are not protected, exactly ``round(keep^s n)`` are
    left behind the s-th predictor. In training mode all stay, and those that are not drawn are seen by no other.

    Attributes:
        model: the dense model, which is trained too.
        predictors: one for each place.
        structure, at, keep: where, and the fraction that each predictor keeps.
        ratio, distill: weights of the penalty's parts.
        record: how it was made; plain data.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, at: tuple[int, ...], keep: float, ratio: float, distill: float,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.structure, self.at, self.keep, self.ratio, self.distill = structure, at, keep, ratio, distill
        generator = torch.Generator().manual_seed(seed)
        like = next(model.parameters())
        self.predictors = nn.ModuleList(Predictor(structure.width, generator) for _ in at)
        self.predictors.to(device=like.device, dtype=like.dtype)
        self.record: dict[str, Any] = {}
        self.training = model.training
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple: it is no part of this module
        self._penalty: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.run(*args, **kwargs)[0]
        run = _Run(self, masks=True)
        out = run.through(self.model, args, kwargs)
        self._penalty = self._cost(out, run, args, kwargs)
        return out

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, list[int]]:
        """The model's answer on the tokens that go on, and how many there are behind each predictor."""
        run = _Run(self, masks=False)
        out = run.through(self.model, args, kwargs)
        return out, run.tokens

    def _cost(self, out: Any, run: _Run, args: Any, kwargs: Any) -> Tensor:
        """Too many or too few that stay, and answers and tokens that differ from the dense model's."""
        free = self.structure.protected
        total = sum(((d[:, free:].mean(1) - self.keep ** (s + 1)) ** 2).mean() for s, d in enumerate(run.decisions)) * (
            self.ratio / len(self.at)
        )
        if not self.distill:
            return torch.as_tensor(total)
        if not self._teacher:  # a model that was loaded and is trained further
            self.distil_from(self.model)
        dense = _Run(self, masks=False, looks=True)
        with evaluating(self._teacher[0]), torch.no_grad():
            wanted = dense.through(self._teacher[0], args, kwargs)
        logits, target = (log_softmax(_answer(x).float(), -1) for x in (out, wanted))
        total = total + self.distill * kl_div(logits, target, reduction="batchmean", log_target=True)
        stays = run.decisions[-1][:, free:].detach() > 0.5
        mine, its = (r.last[:, free:][stays].float() for r in (run, dense))
        apart = mse_loss(mine, its, reduction="sum")
        return torch.as_tensor(total + self.distill * mean(apart, mine.numel()))

    def distil_from(self, model: nn.Module) -> None:
        """Compare with this model, as it is now, in training."""
        self._teacher = (copy.deepcopy(model).requires_grad_(False),)

    def penalty(self) -> Tensor:
        if self._penalty is None:
            return torch.zeros((), device=next(self.parameters()).device)
        return self._penalty

    def advance(self, done: float) -> None:
        """Nothing changes in the course of training."""

    def settle(self, batches: Iterable[Any]) -> None:
        """Nothing is left to settle: counts are given."""

    def saved(self) -> dict[str, Any]:
        return asdict(self.structure)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.predictors.state_dict())

    def extra_repr(self) -> str:
        return str(self.record)

    def told(self) -> str:
        """What was made, in one line."""
        tokens = " > ".join(map(str, self.record["tokens"]))
        return f"dynamicvit: tokens {tokens}, {self.record['protected']} of them protected"


class _Run(TorchFunctionMode):
    """One forward pass.

    Args:
        masks: tokens stay, and are not seen; else they leave.
        looks: nothing leaves at all: the pass is that of the teacher.
    """

    def __init__(self, gates: DynamicViT, *, masks: bool, looks: bool = False) -> None:
        super().__init__()
        self.gates, self.masks, self.looks = gates, masks, looks
        self.calls, self.first = 0, 0
        self.there: Tensor | None = None  # which tokens are there, (batch, tokens), while masks are on
        self.decisions: list[Tensor] = []
        self.tokens: list[int] = []
        self.last: Tensor = torch.zeros(())

    def through(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        handles = []
        sites = self.gates.structure.sites
        for name in dict.fromkeys(sites):
            site = model.get_submodule(name)
            handles.append(site.register_forward_pre_hook(self._enter, with_kwargs=True))
            if name == sites[-1]:
                handles.append(site.register_forward_hook(self._leave))
        try:
            with self:
                out = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if self.calls != len(sites):
            raise ModelError(
                f"{self.calls} of {len(sites)} blocks were passed: the model runs otherwise than it did on the example"
            )
        return out

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if self.looks or number not in self.gates.at:
            return None
        x = first_tensor(args, kwargs)
        assert x is not None
        new = self._stage(x)
        if new is x:
            return None
        return tuple(new if a is x else a for a in args), {k: new if a is x else a for k, a in kwargs.items()}

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.last = first_tensor(out if isinstance(out, tuple) else (out,), {})  # type: ignore[assignment]

    def _stage(self, x: Tensor) -> Tensor:
        """The next predictor decides."""
        gates, protected, number = self.gates, self.gates.structure.protected, len(self.tokens)
        inner = x[:, protected:]
        if number == 0:
            self.first = inner.shape[1]
        front = x.new_ones(len(x), protected)
        if self.masks:
            there = inner.new_ones(inner.shape[:2]) if self.there is None else self.there[:, protected:]
            stays = drawn(gates.predictors[number](inner, there)) * there
            self.there = torch.cat([front.to(stays.dtype), stays], 1)
            self.decisions.append(self.there)
            self.tokens.append(x.shape[1])
            return x
        count = max(1, keep_count(gates.keep ** (number + 1), self.first))
        score = gates.predictors[number](inner, inner.new_ones(inner.shape[:2]))[..., 0]
        mask = select(score, min(count, inner.shape[1]))
        x = take(x, positions(torch.cat([front.bool(), mask], 1), None)[0])
        self.tokens.append(x.shape[1])
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return self._attend(attention_arguments(args, kwargs))
        if func is multi_head_attention_forward:
            given = packed_arguments(args, kwargs)
            if is_limited(given):
                raise masked()
            return attend_packed(given, self._attend)
        if self.there is not None and func in MEANS:
            found = mean_of_tokens(args, kwargs, self.there.float(), self.gates.structure)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def _attend(self, given: dict[str, Any]) -> Tensor:
        if given["attn_mask"] is not None or given["is_causal"]:
            raise masked()
        query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
        if self.there is None or not query.shape[-2] == key.shape[-2] == self.there.shape[1]:
            return scaled_dot_product_attention(query, key, value, **given)
        return attend_to(query, key, value, self.there, given["scale"], given["dropout_p"])


def _answer(out: Any) -> Tensor:
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise ModelError("dynamicvit compares class scores with the dense model's: give a classifier, or distill=0")
    return found


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DynamicViT:
    made, found = saved["record"], saved["saved"]
    numbers = {name: int(found[name]) for name in ("tokens", "protected", "width")}
    structure = Structure(tuple(map(str, found["sites"])), **numbers)
    paths = dict(model.named_modules())
    if missing := [name for name in structure.sites if name not in paths]:
        raise ModelError(f"runtime.json does not fit the model: it has no {missing[0]}")
    at = tuple(map(int, made["at"]))
    gates = DynamicViT(model, structure, at, float(made["keep"]), float(made["ratio"]), float(made["distill"]), 0)
    gates.predictors.load_state_dict(tensors)
    gates.record = dict(made)
    return gates


@register(
    "transform",
    paper="2106.02034",
    survey=("A3.6", "B3.5", "B4", "E2"),
    when="runtime",
    restore=_restored,
    trained=True,
)
def dynamicvit(
    model: nn.Module,
    example: Any,
    *,
    keep: float | None = None,
    target: str | None = None,
    at: tuple[int, ...] | None = None,
    ratio: float = 2.0,
    distill: float = 0.5,
    seed: int = 0,
) -> DynamicViT:
    """Learn, with the model, which tokens of a vision transformer go on: a small network before a few blocks decides.

    :: L = L_task + ratio/S sum_s (keep^s - mean_i D_i^s)^2 + distill (KL(y, y_dense) + mean |t - t_dense|^2)

    In training D is drawn by Gumbel-softmax with straight-through gradients, and a token that is not drawn is seen by
    no other in attention and counts in no mean. In evaluation the ``round(keep^s n)`` highest scores stay, and the
    others leave: batches stay rectangular. Predictors are at a quarter, half and three quarters of the depth, or in
    front of the blocks that ``at`` numbers from 0 on. With a ``target`` such as ``"flops 30%"`` the largest ``keep`` is
    taken that reaches it; the operations of the predictors count.

    Choose it where there are data and time to train, and much is to go: what matters is learned, not guessed from keys
    or attention.

    Beware: the dense model is trained with it and becomes another one. Predictors of narrow models cost much of what
    they save.

    >>> from secateur.tasks.nets import VisionTransformer
    >>> gates = dynamicvit(VisionTransformer(16, 4).eval(), torch.zeros(1, 1, 28, 28), keep=0.7)
    >>> gates.run(torch.zeros(5, 1, 28, 28))[1]  # round(0.7 49), round(0.49 49), round(0.343 49)
    [34, 24, 17]

    Source: Rao et al., DynamicViT, arXiv 2106.02034, section 3 and the official code. Counts are rounded, where the
    code cuts off; models without a class token are served, whose mean is over the tokens that are there; tokens are
    compared behind the last block, in front of the last normalization; predictors and model have one learning rate.
    """
    given = one_of(keep=keep, target=target)
    if keep is not None and not 0 < keep <= 1:
        raise RecipeError(f"keep is {keep}: it is the fraction of the tokens that stays, above 0 and at most 1")
    if ratio < 0 or distill < 0:
        raise RecipeError(f"ratio and distill are weights, 0 or more, not {ratio:g} and {distill:g}")
    call = call_of(example)
    structure = find(model, call)
    if structure.width < 4:
        raise ModelError(f"a hidden state of {structure.width} numbers is too narrow for a predictor")
    depth, free = len(structure.sites), structure.tokens - structure.protected
    places = tuple(sorted({depth * k // 4 for k in (1, 2, 3)})) if at is None else places_in(at, depth)
    if list(places) != sorted(set(places)):
        raise RecipeError(f"at is {places}: numbers of blocks, each once, in their order")

    def level(k: int) -> float:
        return (free - k) / free

    build = partial(DynamicViT, model, structure, places, ratio=ratio, distill=distill, seed=seed)
    check_output(model, call, structure, build(keep=keep or level(free - 1)))
    before = flops(model, *call[0], **call[1]).total

    def cost(share: float) -> int:
        return _executed(build(keep=share), call)

    if keep is None:
        keep = reaching(Target.parse(given["target"]), before, cost, level, range(free), "dynamicvit")
    gates = build(keep=keep)
    if distill:
        gates.distil_from(model)
    with evaluating(gates), torch.no_grad():
        tokens = gates.run(*call[0], **call[1])[1]
    gates.record = {
        "method": "dynamicvit", "keep": keep, "at": list(places), "ratio": ratio, "distill": distill,
        "tokens": [structure.tokens, *tokens], "protected": structure.protected,
        "flops": {"before": before, "after": cost(keep)},
    }  # fmt: skip
    return gates


def _executed(gates: DynamicViT, call: Call) -> int:
    with evaluating(gates):
        return flops(gates, *call[0], **call[1]).total
