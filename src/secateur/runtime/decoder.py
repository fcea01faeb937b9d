"""A decoder whose key-value cache is pruned while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from .policy import Policy
from .rotary import Rotation, rotations
from .structure import call_of

if TYPE_CHECKING:
    from .cache import PrunedCache


class PrunedDecoder(nn.Module):
    """A decoder of transformers whose cache entries leave. The model is as it was, and its weights are the same.

    It is called as the model is, and `generate` is the model's own; both make a cache of their own where none is given,
    and leave it in ``used``. Nothing is differentiated. Batches are padded on the left, as transformers' generation is.

    Attributes:
        model: the dense model.
        policy: which entries stay.
        chunk: longer inputs go through the model in pieces of so many tokens, between which entries leave; None for
            all at once, after which they leave.
        rotations: how keys are moved, of layers whose positions are those in the cache.
        record: how it was made; plain data.
        used: the cache of the last call.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        chunk: int | None = None,
        found: Mapping[int, Rotation] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise RecipeError(f"chunk is {chunk}: it is how many tokens go through the model at once, 1 or more")
        if chunk is not None and policy.once:
            raise RecipeError("what is pruned once, behind the prompt, takes the prompt whole: leave out chunk")
        self.model, self.policy, self.chunk = model, policy, chunk
        self.rotations, self.record = dict(found or {}), dict(record or {})
        self.used: PrunedCache | None = None
        self._known: tuple[str, list[Any]] | None = None
        self.training = model.training

    def cache(self) -> PrunedCache:
        """A fresh cache, for calls that go on where another one ended."""
        from .cache import PrunedCache

        return PrunedCache(self.model.config, self.policy, self.rotations)

    @contextmanager
    def _running(self, kwargs: dict[str, Any]) -> Iterator[None]:
        from .attend import attending, configs
        from .cache import PrunedCache

        if self._known is None:
            self._known = cache_name(self.model), configs(self.model)
        name, known = self._known
        if kwargs.get(name) is None:
            kwargs[name] = self.cache()
        if not isinstance(kwargs[name], PrunedCache):
            raise RecipeError(
                f"{name} is a {type(kwargs[name]).__name__}, which entries do not leave: give what cache() makes"
            )
        self.used = kwargs[name]
        with attending(known), torch.no_grad():
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            names = inspect.signature(self.model.forward).parameters
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        kwargs = {"use_cache": True, **kwargs}
        with self._running(kwargs):
            pieces = self._pieces(kwargs)
            outs = [self.model(**piece) for piece in pieces]
        out = outs[-1]
        if len(outs) == 1:
            return out
        for name in ("logits", "last_hidden_state"):
            if getattr(out, name, None) is not None:
                out[name] = torch.cat([getattr(o, name) for o in outs], 1)
        wanted = kwargs.get("logits_to_keep", 0)  # of the whole input
        if getattr(out, "logits", None) is not None and (isinstance(wanted, Tensor) or wanted):
            out["logits"] = out.logits[:, wanted if isinstance(wanted, Tensor) else slice(-wanted, None)]
        return out

    def _pieces(self, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        """The arguments of the calls in which an input goes through the model."""
        given = {n: kwargs[n] for n in ("input_ids", "inputs_embeds", "position_ids") if kwargs.get(n) is not None}
        tokens = next((x.shape[1] for x in given.values()), 0)
        if self.chunk is None or tokens <= self.chunk:
            return [kwargs]
        if kwargs.get("labels") is not None:
            raise RecipeError("an input in chunks has no loss of its own: leave out labels, and use the logits")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise RecipeError(f"an input in chunks has logits alone: leave out {name}, or make it with chunk=None")
        if kwargs.get("return_dict") is False:
            raise RecipeError("an input in chunks is answered by an object with logits: leave out return_dict")
        mask = kwargs.get("attention_mask")
        before = 0 if mask is None else mask.shape[-1] - tokens
        found = []
        for begin in range(0, tokens, self.chunk):
            end = min(tokens, begin + self.chunk)
            piece = {n: x for n, x in kwargs.items() if n != "logits_to_keep"}
            piece |= {n: x[:, begin:end] for n, x in given.items()}
            if mask is not None:
                piece["attention_mask"] = mask[..., : before + end]
            found.append(piece)
        return found

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own ``generate``, with a pruned cache."""
        if self.chunk is not None:
            kwargs.setdefault("prefill_chunk_size", self.chunk)
        with self._running(kwargs):
            return generation(self.model)(*args, **kwargs)

    def extra_repr(self) -> str:
        return str(self.record)

    def saved(self) -> dict[str, Any]:
        return {"policy": self.policy.asdict(), "chunk": self.chunk, "example": self.record["example"]}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def told(self) -> str:
        """What was made, in one line."""
        entries, tokens = self.record["entries"], self.record["tokens"]
        before, after = (self.record["bytes"][k] / 2**20 for k in ("before", "after"))
        return (
            f"{self.record['method']}: {entries} of {tokens} entries stay in the cache of each head, "
            f"{after:.2f} of {before:.2f} MiB"
        )


def generation(model: nn.Module) -> Callable[..., Any]:
    """A model's own ``generate``.

    Raises:
        ModelError: it has none.
    """
    found: Callable[..., Any] | None = getattr(model, "generate", None)
    if found is None:
        raise ModelError(f"{type(model).__name__} does not generate: give one such as AutoModelForCausalLM makes")
    return found


def dense_cache(model: nn.Module) -> Any:
    """A cache of transformers that keeps everything."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cache_name(model: nn.Module) -> str:
    """The argument by which a model takes a cache.

    Raises:
        ModelError: it takes none.
    """
    names = inspect.signature(model.forward).parameters
    found = next((name for name in ("cache", "past_key_values") if name in names), None)
    config = getattr(model, "config", None)
    if found is None or config is None or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has no key-value cache that can be pruned: give a decoder of transformers, "
            "such as AutoModelForCausalLM makes"
        )
    return found


def ids_of(example: Any) -> Tensor:
    """The token ids of an example, ``(batch, tokens)``.

    Raises:
        ModelError: there are none, or fewer than two.
    """
    args, kwargs = call_of(example)
    ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 2:
        raise ModelError("a decoder needs an example of token ids, (batch, tokens) with two tokens or more")
    return ids


def pruned_decoder(model: nn.Module, example: Any, policy: Policy, chunk: int | None, record: dict[str, Any]) -> Any:
    """The model with a pruned cache, proven on the example: with room for all of it, it answers as the dense one.

    Raises:
        ModelError: it does not, or there is no such cache.
    """
    name, ids = cache_name(model), ids_of(example)
    from .cache import nbytes

    tokens = ids.shape[1]
    whole = replace(policy, budget=tokens + policy.least, keep=None, shift=False)
    with evaluating(model), torch.no_grad():
        kind = type(model).__name__
        dense = _answer(model(input_ids=ids, use_cache=True))
        alone = _answer(model(input_ids=ids[:, :-1]))
        if not _same(alone, dense[:, :-1]):
            raise ModelError(
                f"tokens of {kind} see those behind them, so that it keeps no key-value cache while it runs: give a "
                "decoder of transformers, such as AutoModelForCausalLM makes"
            )
        free = PrunedDecoder(model, whole)
        cache = free.cache()
        if not cache.pruned:
            raise ModelError(f"no layer of {kind} keeps all of its keys: there is nothing to prune in its cache")
        parts = [_answer(free(input_ids=x, **{name: cache})) for x in (ids[:, :-1], ids[:, -1:])]
        if any(layer.seen == 0 for layer in cache.pruned):
            raise ModelError(
                f"{kind} keeps no keys and values from token to token: give a decoder of transformers, such as "
                "AutoModelForCausalLM makes"
            )
        if any(layer.settled != tokens for layer in cache.pruned) or not _same(torch.cat(parts, 1), dense):
            raise ModelError(
                f"attention of {kind} is not the usual one that transformers' interface calls (it is capped, biased or "
                "its own), so that entries cannot leave its cache"
            )
        found = _rotations(model, ids, whole) if policy.shift and policy.sinks else {}
        made = PrunedDecoder(model, policy, chunk, found, record)
        before, after = free.cache(), made.cache()
        free(input_ids=ids[:, :-1], **{name: before})
        made(input_ids=ids[:, :-1], **{name: after})
        cost = {
            "before": flops(free, input_ids=ids[:, -1:], **{name: before}).total,
            "after": flops(made, input_ids=ids[:, -1:], **{name: after}).total,
        }
        made.used = None
    made.record |= {
        "policy": policy.asdict(), "chunk": chunk, "tokens": tokens, "entries": policy.count(tokens), "flops": cost,
        "bytes": {"before": _tight(before), "after": nbytes(after)}, "example": ids[:1, :64].tolist(),
    }  # fmt: skip
    return made


def _tight(cache: PrunedCache) -> int:
    """Bytes of the keys and values alone, without room for more, which is what a dense cache holds."""
    from .cache import others

    own = [t for layer in cache.pruned for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in [*own, *others(cache)])


def _answer(out: Any) -> Tensor:
    logits = getattr(out, "logits", None)
    found: Tensor = out.last_hidden_state if logits is None else logits
    return found


def _same(x: Tensor, y: Tensor) -> bool:
    close = 1e-3 if x.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((x - y).float().norm() <= close * y.float().norm())


def _rotations(model: nn.Module, ids: Tensor, policy: Policy) -> dict[int, Rotation]:
    name, free = cache_name(model), PrunedDecoder(model, policy)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__} takes no position_ids, so that keys cannot be moved: give sinks=0")

    def keys(position: Tensor) -> dict[int, Tensor]:
        cache = free.cache()
        free(input_ids=ids, position_ids=position.to(ids.device), **{name: cache})
        return {number: layer.keys for number, layer in enumerate(cache.layers) if layer in cache.pruned}

    far = 2 * int(getattr(model.config, "max_position_embeddings", None) or 2048)
    return rotations(model, keys, ids.shape[1], far)


def restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PrunedDecoder:
    """As it was saved; how keys turn is found again."""
    made, found = saved["record"], saved["saved"]
    policy = Policy(**found["policy"])
    ids = torch.tensor(found["example"], device=next(model.parameters()).device)
    turns = {}
    if policy.shift and policy.sinks:
        turns = _rotations(model, ids, replace(policy, budget=ids.shape[1] + policy.least, keep=None, shift=False))
    return PrunedDecoder(model, policy, found["chunk"], turns, made)
