"""Experts that are left out where a token hardly needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibrate import batches_of, run_model
from ..errors import ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..registry import get, register
from ..surgery.experts import mixtures
from .decoder import dense_cache, generation
from .sparse import tokens_of
from .structure import Call, call_of

#: Routing weights of each token's experts, ``(tokens, k)``, and the number of the mixture -> which experts run, bool.
Rule = Callable[[Tensor, int], Tensor]
_WHERE = ("A3.9", "B4", "E4")


class ExpertGates(nn.Module):
    """A mixture of experts in which a token runs fewer of the experts that its router chose.

    What is left out is not computed: experts run for those tokens alone that keep them.

    Attributes:
        model: the dense model, with its own weights.
        paths: of the modules that hold experts.
        rule: which experts of a token run.
        renormalize: the weights of those that run are raised to the sum of all.
        record: how it was made; plain data.
        seen, chosen, ran: tokens, the experts that routers chose for them and those that ran, over all mixtures, since
            `reset`.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, int],
        rule: Rule,
        renormalize: bool = True,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.paths, self.rule, self.renormalize = model, dict(paths), rule, renormalize
        self.record = dict(record or {})
        self.training = model.training
        self.reset()

    def reset(self) -> None:
        """Count from here on."""
        self.seen = self.chosen = self.ran = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._gated():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own ``generate``."""
        with self._gated():
            return generation(self.model)(*args, **kwargs)

    def cache(self) -> Any:
        """A fresh cache, for calls that go on where another one ended."""
        return dense_cache(self.model)

    @contextmanager
    def _gated(self) -> Iterator[None]:
        with _looking(self.model, self.paths, self._gate), one_by_one(self.model):
            yield

    def _gate(self, number: int, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        runs = self.rule(weight, number)
        self.seen, self.chosen, self.ran = self.seen + len(runs), self.chosen + runs.numel(), self.ran + int(runs.sum())
        kept = weight * runs
        if self.renormalize:
            kept = kept * (weight.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
        nobody = list(self.paths.values())[number]
        return kept.to(weight.dtype), index.masked_fill(~runs, nobody)

    def extra_repr(self) -> str:
        return str(self.record)

    def saved(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def told(self) -> str:
        """What was made, in one line."""
        return (
            f"{self.record['method']}: {self.record['ran']:.2f} of {self.record['chosen']:.0f} experts run for a token"
        )


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside, experts run one after the other, those alone that have tokens."""
    name = "_experts_implementation"
    configs: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), name):
            configs[id(config)] = config
    before = [(c, getattr(c, name)) for c in configs.values()]
    for config, _ in before:
        config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, found in before:
            config._experts_implementation_internal = found


@contextmanager
def _looking(
    model: nn.Module, paths: Iterable[str], change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Inside, each module of experts is called with weights and indices as ``change`` gives them."""

    def hook(
        number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        given = [*args, *kwargs.values()]
        pair = _routing(given)
        if pair is None:
            raise ModelError(
                f"experts {list(paths)[number]} are not called with their routing weights and indices, so that none "
                "can be left out"
            )
        new = dict(zip(map(id, pair), change(number, *pair), strict=True))
        swap = [new.get(id(x), x) for x in given]
        return tuple(swap[: len(args)]), dict(zip(kwargs, swap[len(args) :], strict=True))

    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(hook, number), with_kwargs=True)
        for number, path in enumerate(paths)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routing(given: Iterable[Any]) -> tuple[Tensor, Tensor] | None:
    """Routing weights and the experts that they belong to, ``(tokens, k)`` each, among arguments."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    for index in tensors:
        if not index.is_floating_point() and index.dim() == 2:
            for weight in tensors:
                if weight.is_floating_point() and weight.shape == index.shape:
                    return weight, index
    return None


class Share:
    """Experts run whose routing weight is at least a share of the token's largest; the first always runs."""

    def __init__(self, least: list[float]) -> None:
        self.least = least

    def __call__(self, weight: Tensor, number: int) -> Tensor:
        share: Tensor = get("criterion", "routing-share")({"expert_weight": weight})
        first = torch.zeros_like(share, dtype=torch.bool).scatter_(-1, share.argmax(-1, keepdim=True), True)
        return (share >= self.least[number]) | first


class Mass:
    """The fewest experts run whose routing weights make up this much of the sum."""

    def __init__(self, mass: float) -> None:
        self.mass = mass

    def __call__(self, weight: Tensor, number: int) -> Tensor:
        share = get("criterion", "routing-share")({"expert_weight": weight})
        order = share.sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        # Rounding: what is missing by less than a millionth is not missing.
        runs = before < (self.mass - 1e-6) * order.values.sum(-1, keepdim=True)
        runs[..., 0] = True
        return torch.zeros_like(runs).scatter_(-1, order.indices, runs)


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExpertGates:
    made = saved["record"]
    rule: Rule = Mass(float(made["mass"])) if "mass" in made else Share([float(x) for x in made["least"]])
    paths = {str(k): int(v) for k, v in saved["saved"]["paths"].items()}
    return ExpertGates(model, paths, rule, bool(made["renormalize"]), made)


@register("transform", name="expert-skipping", paper="2402.14800", survey=_WHERE, when="runtime", restore=_restored,
          decodes=True)  # fmt: skip
def expert_skipping(
    model: nn.Module, example: Any, data: Any, *, skip: float = 0.5, renormalize: bool = True
) -> ExpertGates:
    """Skip the lesser experts of a token in a mixture of experts, where the first one says nearly all.

    :: expert j of a token runs where w_j >= beta max_k w_k

    In each layer beta is such that, on the data, exactly the fraction ``skip`` of all experts but each token's first
    are skipped. The weights of those that run are raised to the sum of all (``renormalize``).

    Choose it for mixtures whose router sends each token to a few experts: it saves the more, the surer the router is.

    Beware: what is skipped on other texts is near ``skip``, not equal to it. Many tokens at once reach most experts: it
    saves products then, not weights that are read. Experts run one by one.

    >>> import transformers
    >>> config = transformers.MixtralConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=1, num_local_experts=4,
    ... )
    >>> ids = torch.arange(20)[None]
    >>> expert_skipping(transformers.MixtralForCausalLM(config), ids, ids).told()
    'expert-skipping: 1.50 of 2 experts run for a token'

    Source: Lu et al., Not all experts are equal, arXiv 2402.14800, section 3.3 and the official code, whose beta is the
    median (skip=0.5) for two experts; more than two are ours.
    """
    if not 0 <= skip <= 1:
        raise RecipeError(f"skip is {skip}: it is the fraction of the lesser experts that is skipped, from 0 to 1")
    call, paths = call_of(example), _paths(model)
    shares: list[list[Tensor]] = [[] for _ in paths]

    def look(batch: Any, number: int, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        share = get("criterion", "routing-share")({"expert_weight": tokens_of(batch, weight)})
        shares[number].append(share.sort(-1, descending=True).values[:, 1:].flatten())
        return weight, index

    with evaluating(model), torch.no_grad():
        for batch in batches_of(data):
            with _looking(model, paths, partial(look, batch)):
                run_model(model, batch)
    least = [min(2.0, edge(torch.cat(found), skip)) for found in shares]  # no share is above 1
    record = {"method": "expert-skipping", "skip": skip, "least": least, "renormalize": renormalize}
    return _made(model, call, ExpertGates(model, paths, Share(least), renormalize, record), batches_of(data))


@register("transform", name="expert-mass", paper="2403.07652", survey=_WHERE, when="runtime", restore=_restored,
          decodes=True)  # fmt: skip
def expert_mass(model: nn.Module, example: Any, *, mass: float = 0.8, renormalize: bool = True) -> ExpertGates:
    """Run as many experts for a token as its router needs to be sure, of those that it chose.

    :: the fewest experts, by falling weight, with sum_j w_j >= mass sum_k w_k

    A token that its router is sure of runs one expert, one that it is unsure of all. The weights of those that run are
    raised to the sum of all (``renormalize``).

    Choose it where tokens differ in difficulty, and there is no data to calibrate on.

    Beware: how much it saves is the router's to say; the paper trains the router for it. Experts run one by one.

    >>> Mass(0.8)(torch.tensor([[0.75, 0.25], [0.85, 0.15]]), 0).tolist()
    [[True, True], [True, False]]

    Source: Huang et al., Harder tasks need more experts, arXiv 2403.07652, equations 4 and 5, without its training, and
    within the k experts that the model's own router chooses.
    """
    if not 0 < mass <= 1:
        raise RecipeError(f"mass is {mass}: it is the share of the routing weights that has to run, above 0, at most 1")
    call, paths = call_of(example), _paths(model)
    record = {"method": "expert-mass", "mass": mass, "renormalize": renormalize}
    return _made(model, call, ExpertGates(model, paths, Mass(mass), renormalize, record), None)


def edge(values: Tensor, fraction: float) -> float:
    """What exactly ``round(fraction n)`` of the values are below, where no two are equal there.

    >>> edge(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.5)
    2.5
    """
    count = int(fraction * len(values) + 0.5)
    if count == 0:
        return 0.0
    order = values.float().sort().values
    if count >= len(order):
        return float("inf")
    low, high = order[count - 1 : count + 1].double().tolist()
    return float(low + high) / 2


def _paths(model: nn.Module) -> dict[str, int]:
    found = {path: mixture.count for path, mixture in mixtures(model)[0].items()}
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no mixture of experts whose matrices are stacked: nothing to skip"
        )
    return found


def _made(model: nn.Module, call: Call, made: ExpertGates, batches: list[Any] | None) -> ExpertGates:
    """The gated model, checked on the example: an expert without tokens must not run."""
    args, kwargs = call
    kind = type(model).__name__
    first = ExpertGates(model, made.paths, Mass(1e-6), renormalize=False)

    def silent(number: int, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return weight * first.rule(weight, number), index

    with evaluating(model), torch.no_grad():
        with _looking(model, made.paths, silent), one_by_one(model):
            wanted = _answer(model(*args, **kwargs))
        try:
            out = _answer(first(*args, **kwargs))
        except (RuntimeError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"experts of {kind} cannot be left out: {reason}") from None
        if not bool((out - wanted).float().norm() <= 1e-2 * wanted.float().norm()):
            raise ModelError(f"experts of {kind} are not left out where no token is sent to them")
        made.reset()
        for batch in batches or []:
            run_model(made, batch)
        if not batches:
            made(*args, **kwargs)
    made.record |= {"chosen": made.chosen / made.seen, "ran": made.ran / made.seen}
    with one_by_one(model):
        before = flops(model, *args, **kwargs).total
    made.record["flops"] = {"before": before, "after": flops(made, *args, **kwargs).total}
    made.reset()
    return made


def _answer(out: Any) -> Tensor:
    found: Tensor = next(
        x for x in tree_leaves(dict(out) if isinstance(out, Mapping) else out) if isinstance(x, Tensor)
    )
    return found
