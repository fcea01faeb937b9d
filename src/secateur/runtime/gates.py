"""Gates in a model that runs: score this input's tokens, keep an exact number, act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..errors import ModelError, RecipeError
from ..select import keep_count
from .act import Act, Seen, wide
from .packed import attend_packed, is_limited, packed_arguments
from .padding import padding, sizes, told
from .structure import ADDS, Call, Structure, attention_arguments, first_tensor, is_operand

MEANS = frozenset((torch.mean, Tensor.mean))


@dataclass(frozen=True)
class Pace:
    """How many tokens leave at which gate.

    Attributes:
        r: so many at each, or as many as can.
        keep: the fraction that stays at each, of those that are not protected; where ``r`` is None.
        at: numbers of the attentions that have a gate; None for all.

    >>> Pace(keep=0.75).leaving(0, 17, 1, most=8), Pace(r=3).leaving(0, 17, 1, most=8)
    (4, 3)
    """

    r: int | None = None
    keep: float | None = None
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.r is not None and self.r < 0:
            raise RecipeError(f"r is {self.r}: it is how many tokens leave at each gate, 0 or more")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(
                f"keep is {self.keep}: it is the fraction of the tokens that stays, above 0 and at most 1"
            )

    def leaving(self, site: int, tokens: int, protected: int, most: int) -> int:
        """How many of the tokens leave at a gate, where at most ``most`` can."""
        if self.at is not None and site not in self.at:
            return 0
        free = tokens - protected
        wanted = self.r if self.r is not None else free - keep_count(1.0 if self.keep is None else self.keep, free)
        return min(wanted, most)


class TokenGates(nn.Module):
    """A model in which tokens leave at run time. The model itself is as it was, and its weights are the same tensors.

    At each gate as many leave for every input, so that the products that follow are really smaller and batches stay
    batches; which ones leave is the input's own.

    Attributes:
        model: the dense model.
        structure, act, pace: where, what and how many.
        record: how it was made; plain data.
    """

    def __init__(self, model: nn.Module, structure: Structure, act: Act, pace: Pace, record: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.structure, self.act, self.pace, self.record = structure, act, pace, dict(record)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)[0]

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, list[int]]:
        """The model's answer, and how many tokens there are behind each gate."""
        run = _Run(self.structure, self.act, self.pace, (args, kwargs))
        handles = []
        for name in dict.fromkeys(self.structure.sites):
            site = self.model.get_submodule(name)
            handles.append(site.register_forward_pre_hook(run.enter, with_kwargs=True))
            handles.append(site.register_forward_hook(run.leave))
        try:
            with run:
                out = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if len(run.tokens) != len(self.structure.sites):
            raise ModelError(
                f"{len(run.tokens)} of {len(self.structure.sites)} gates were passed: the model runs otherwise than it "
                "did on the example"
            )
        return out, run.tokens

    def extra_repr(self) -> str:
        return str(self.record)

    def saved(self) -> dict[str, Any]:
        return asdict(self.structure)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def told(self) -> str:
        """What was made, in one line."""
        tokens = " > ".join(map(str, self.record["tokens"]))
        return f"{self.record['method']}: tokens {tokens}, {self.record['protected']} of them protected"


class _Run(TorchFunctionMode):
    """One forward pass of a gated model."""

    def __init__(self, structure: Structure, act: Act, pace: Pace, call: Call) -> None:
        super().__init__()
        self.structure, self.act, self.pace, self.call = structure, act, pace, call
        self.given: Tensor | None = None  # what the site that is running was given
        self.seen: Seen | None = None
        self.size: Tensor | None = None  # None while every token stands for itself, and none is padding
        self.lengths: list[int] | None = None  # tokens of each input, where there is padding
        self.mask: Tensor | None = None  # of attention, before any token left
        self.told: list[Tensor] | None = None  # inputs that say which tokens are padding, when some have left
        self.tokens: list[int] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.given, self.seen = first_tensor(args, kwargs), None

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.given = self.seen = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return self._attend(attention_arguments(args, kwargs))
        if func is multi_head_attention_forward and (self.given is not None or self.size is not None):
            given = packed_arguments(args, kwargs)
            if is_limited(given):
                raise masked()
            return attend_packed(given, self._attend)
        if self.seen is not None and func in ADDS:
            out = func(*args, **kwargs)
            assert self.given is not None
            if isinstance(out, Tensor) and out.shape == self.given.shape and is_operand(self.given, args):
                return self._gate(out)
            return out
        if self.told and any(a is t for t in self.told for a in (*args, *kwargs.values())):
            args = tuple(self._remaining(a) for a in args)
            kwargs = {name: self._remaining(a) for name, a in kwargs.items()}
        if self.size is not None and func in MEANS:
            size = self.size if self.act.weighs else (self.size > 0).float()
            if (found := mean_of_tokens(args, kwargs, size, self.structure)) is not None:
                return found
        return func(*args, **kwargs)

    def _attend(self, given: dict[str, Any]) -> Tensor:
        query, key, value = given["query"], given["key"], given["value"]
        tokens = key.shape[-2]
        known = self.size is not None and tokens == self.size.shape[1]
        site = self.given is not None and query.shape[-2] == tokens == self.given.shape[1]
        if known or site:
            self._read_mask(given, len(query), tokens)
            given["attn_mask"] = None
            if self.size is not None and (self.act.weighs or self.lengths is not None):
                bias = self.size.log().to(query.dtype) if self.act.weighs else self.size > 0
                given["attn_mask"] = bias[:, None, None].expand(-1, 1, query.shape[-2], -1)
        attention = None
        if site:
            if self.act.attends and self._leaves(tokens):
                attention = self._attention(given)
            size = self.size if self.size is not None else key.new_ones(len(key), tokens, dtype=torch.float32)
            seen = self._counted(attention, size)
            self.seen = Seen(key.detach().mean(1), seen, size, self.structure.protected, self.lengths)
        if attention is not None and attention.shape[2] == query.shape[-2] and not given["dropout_p"]:
            mixed: Tensor = attention.to(value.dtype) @ heads_of(value, query)
            return mixed
        return scaled_dot_product_attention(query, key, value, **{k: v for k, v in given.items() if k not in _QKV})

    def _read_mask(self, given: dict[str, Any], batch: int, tokens: int) -> None:
        """Padding, at the first attention; later masks say the same of tokens of which some may have left."""
        mask: Tensor | None = given["attn_mask"]
        if given["is_causal"]:
            raise masked()
        if mask is None or mask is self.mask:
            return
        if self.mask is not None and mask.shape == self.mask.shape and bool((mask == self.mask).all()):
            return
        if (valid := padding(mask, batch, tokens)) is None:
            raise masked()
        if self.size is not None:  # made of what `_remaining` gave, or anew for each block
            if not bool((valid == (self.size > 0)).all()):
                raise masked()
            return
        self.mask, self.size = mask, sizes(valid)
        if self.size is not None:
            self.lengths = valid.sum(1).tolist()
            if self.structure.protected and not bool(valid[:, : self.structure.protected].all()):
                raise ModelError(f"padding is in front of {self.structure.protected} tokens that must stay: pad behind")

    def _attention(self, given: dict[str, Any]) -> Tensor:
        """Attention of the first token, where that is a class token, else of all."""
        query, key, mask = given["query"], given["key"], given["attn_mask"]
        if self.structure.protected and not self.act.every:
            query, mask = query[..., :1, :], None if mask is None else mask[..., :1, :]
        scale = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
        score: Tensor = (query * scale) @ heads_of(key, query).mT
        if mask is not None:
            score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
        return score.softmax(-1, dtype=torch.float32)

    def _counted(self, attention: Tensor | None, size: Tensor) -> Tensor | None:
        """Without what padding looks at: the mean over all queries is that over the real ones."""
        if attention is None or self.lengths is None or attention.shape[2] == 1:
            return attention
        real = size > 0
        return attention * (real * (real.shape[1] / real.sum(1, keepdim=True)))[:, None, :, None]

    def _leaves(self, tokens: int) -> bool:
        leave = self._leaving(tokens)
        return leave > 0 if isinstance(leave, int) else any(leave)

    def _leaving(self, tokens: int) -> int | list[int]:
        """How many leave: of each input where there is padding, else of all."""
        site, protected, act = len(self.tokens), self.structure.protected, self.act
        if self.lengths is None:
            return self.pace.leaving(site, tokens, protected, act.most(tokens, protected))
        return [self.pace.leaving(site, n, protected, act.most(n, protected)) for n in self.lengths]

    def _gate(self, x: Tensor) -> Tensor:
        seen, self.seen = self.seen, None
        assert seen is not None
        if self._leaves(x.shape[1]):
            if self.told is None:
                self.told = told(self.call, seen.size > 0)
            x, size = self.act(x, seen, self._leaving(x.shape[1]))
            if self.act.weighs or self.lengths is not None or self.told:
                self.size = size
            if self.lengths is not None:
                self.lengths = (size > 0).sum(1).tolist()
        self.tokens.append(x.shape[1])
        return x

    def _remaining(self, x: Any) -> Any:
        """In place of what said which tokens are padding: how many each of the remaining ones stands for."""
        if not any(x is t for t in self.told or ()):
            return x
        assert self.size is not None
        if not self.act.weighs:
            return (self.size > 0).to(x.dtype)
        if x.dtype == torch.bool:
            raise ModelError("tokens that were merged count more than once: give the attention mask as integers")
        return self.size.to(x.dtype)


def mean_of_tokens(args: Any, kwargs: Any, size: Tensor, structure: Structure) -> Tensor | None:
    """A mean over tokens, weighted by how many each stands for; None for any other mean.

    Args:
        args, kwargs: of ``torch.mean``.
        size: of all tokens, ``(batch, tokens)``; those at the front that are protected may be missing in the mean.
    """
    x = args[0] if args else None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    axes = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    if not isinstance(x, Tensor) or x.dim() != 3 or axes not in ((1,), (-2,)) or len(x) != len(size):
        return None
    without = size.shape[1] - x.shape[1]
    if not 0 <= without <= structure.protected or x.shape[2] != structure.width:
        return None
    weight = size[:, without:, None]
    found = ((wide(x) * weight).sum(1) / weight.sum(1).clamp_min(1)).to(kwargs.get("dtype") or x.dtype)
    keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    return found[:, None] if keep else found


_QKV = ("query", "key", "value")


def masked() -> ModelError:
    """Why tokens cannot leave where attention is limited."""
    return ModelError(
        "attention is masked or causal for this input: tokens can only leave where every token sees every other one, "
        "save padding, which is the same for all of them and in all blocks"
    )


def heads_of(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with as many heads as the queries have."""
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)
