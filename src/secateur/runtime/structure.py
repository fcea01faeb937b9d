"""Where tokens can leave a model: found by running it once, whatever its modules are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ModelError
from ..layers import evaluating
from .packed import is_limited, packed_arguments, padding_mask
from .padding import padding

#: What adds the result of an attention to the hidden state.
ADDS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__))
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Structure:
    """Where tokens can leave.

    Attributes:
        sites: paths of modules that add what an attention found to their own first input, in the order of their calls.
        tokens: how many there are for the example.
        protected: how many at the front never leave: class tokens, registers.
        width: of the hidden state.
    """

    sites: tuple[str, ...]
    tokens: int
    protected: int
    width: int


def call_of(example: Any) -> Call:
    """Positional and keyword arguments of an example: a dict is keywords, a tuple several inputs."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module is called with."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


@dataclass(eq=False)
class _Frame:
    """A module that is running: what it was given, and how many tokens an attention in it has seen since."""

    name: str
    given: Tensor | None
    tokens: int = 0


class _Look(TorchFunctionMode):
    """Watches a model run: which modules add an attention's result to their input.

    Args:
        change: what becomes of the sum at each site, given its number; for experiments.
    """

    def __init__(self, change: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.change = change
        self.frames: list[_Frame] = []
        self.sites: list[str] = []
        self.hidden: list[Tensor] = []
        self.attentions = 0
        self.limited = ""
        self.valid: Tensor | None = None  # which tokens are no padding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            given = attention_arguments(args, kwargs)
            query, mask = given["query"], given["attn_mask"]
            self._attended(len(query), query.shape[-2], given["key"].shape[-2], mask, given["is_causal"])
        elif func is multi_head_attention_forward:  # (tokens, batch, width)
            given = packed_arguments(args, kwargs)
            query, mask = given["query"], padding_mask(given)
            self._attended(query.shape[1], len(query), len(given["key"]), mask, is_limited(given))
        elif func in ADDS and isinstance(out, Tensor) and out.dim() == 3:
            for frame in reversed(self.frames):
                x = frame.given
                if frame.tokens == out.shape[1] and x is not None and x.shape == out.shape and is_operand(x, args):
                    return self._found(frame, out)
        return out

    def _attended(self, batch: int, tokens: int, others: int, mask: Tensor | None, limited: bool) -> None:
        self.attentions += 1
        if tokens != others:
            return
        if mask is not None and not limited:
            self.valid = padding(mask, batch, tokens)
            limited = self.valid is None
        if limited:
            self.limited = self.limited or self.frames[-1].name
        for frame in self.frames:
            frame.tokens = tokens

    def _found(self, frame: _Frame, out: Tensor) -> Tensor:
        for outer in self.frames:
            outer.tokens = 0
        self.sites.append(frame.name)
        assert frame.given is not None
        self.hidden.append(frame.given)
        return out if self.change is None else self.change(len(self.sites) - 1, out)

    def watch(self, model: nn.Module, call: Call) -> Any:
        """Run the model."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda *_: self.frames.pop() and None, always_call=True))
        try:
            with self:
                return model(*call[0], **call[1])
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.frames.append(_Frame(name, first_tensor(args, kwargs)))

        return enter


def is_operand(x: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a tensor is one of the two that a sum has."""
    return any(a is x for a in args[:2])


def attention_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``scaled_dot_product_attention`` by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**given, **dict(zip(names, args, strict=False)), **kwargs}


def find(model: nn.Module, call: Call) -> Structure:
    """Run a model once, and a few times more, and say where tokens can leave it.

    Raises:
        ModelError: nowhere, or not without changing what the model means.
    """
    kind = type(model).__name__
    look = _Look()
    with evaluating(model), torch.no_grad():
        look.watch(model, call)
    if not look.attentions:
        raise ModelError(
            f"{kind} has no attention that can be seen: tokens leave models that call "
            "torch.nn.functional.scaled_dot_product_attention (transformers: attn_implementation='sdpa')"
        )
    if look.limited:
        raise ModelError(
            f"attention in {look.limited} has a mask, a bias or is causal: tokens can only leave where every token "
            "sees every other one, save padding, such as in vision transformers and encoders"
        )
    if not look.sites:
        raise ModelError(f"{kind} has attention, but no module adds what it finds to its own input")
    sizes = sorted({x.shape[1] for x in look.hidden})
    if len(sizes) > 1:
        raise ModelError(f"{kind} changes the number of tokens between its blocks itself ({sizes[0]} to {sizes[-1]})")
    protected = _protected(model, call, look)
    return Structure(tuple(look.sites), sizes[0], protected, look.hidden[0].shape[2])


def _protected(model: nn.Module, call: Call, look: _Look) -> int:
    """How many tokens at the front are not of the input's, or are all that the answer reads."""
    mask = _constant(model, call, look.hidden[0])
    if not bool(mask.any()):
        read = _read(model, call, len(look.sites))
        there = len(read) if look.valid is None else int(look.valid.any(0).sum())
        mask = read if 0 < int(read.sum()) <= there // 2 else mask
    count = int(mask.sum())
    if count == len(mask) or not bool(mask[:count].all()):
        raise ModelError(
            f"the tokens of {type(model).__name__} that must stay are not the first ones: "
            f"{mask.nonzero().flatten().tolist()[:8]} of {len(mask)}"
        )
    return count


def _constant(model: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """Which tokens are the same for another input; none where inputs are no floats."""
    generator = torch.Generator().manual_seed(0)

    def other(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x + 1 + torch.rand(x.shape, generator=generator).to(x)  # every number is another one
        return x

    if not any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(call)):
        return torch.zeros(hidden.shape[1], dtype=torch.bool)
    look = _Look()
    with evaluating(model), torch.no_grad():
        look.watch(model, tree_map(other, call))
    return (look.hidden[0] == hidden).all(2).all(0).cpu()


def _read(model: nn.Module, call: Call, count: int) -> Tensor:
    """Which tokens behind the last attention the answer depends on."""
    leaf: list[Tensor] = []

    def cut(site: int, x: Tensor) -> Tensor:
        if site < count - 1:
            return x
        leaf.append(x.detach().requires_grad_())
        return leaf[0]

    with evaluating(model), torch.enable_grad():
        out = _Look(cut).watch(model, call)
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(())
        for x in tree_leaves(dict(out) if isinstance(out, Mapping) else out):
            if isinstance(x, Tensor) and x.requires_grad:  # a random sum: the plain one of a norm's output is constant
                total = total + (x * torch.randn(x.shape, generator=generator).to(x)).sum().cpu()
        gradient = torch.autograd.grad(total, leaf[0], allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        return torch.zeros(leaf[0].shape[1], dtype=torch.bool)
    return (gradient != 0).any(2).any(0).cpu()
