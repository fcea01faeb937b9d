"""A language model that generates with a cache, some of whose blocks do something else while it does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import Flops, flops
from ..measure.latency import seconds
from .between import find_places, hidden, in_place_of, mask_of
from .decoder import generation
from .decoding import spread
from .padding import unpadded
from .structure import Call, call_of

#: Windows that a setting is chosen on, and that it is measured on, at most.
WINDOWS = 8


def cache_of(args: Any, kwargs: Mapping[str, Any]) -> tuple[str, Any]:
    """The cache that a block is given, and under which name; None where it has none."""
    for name, value in kwargs.items():
        if callable(getattr(value, "update", None)) and callable(getattr(value, "get_seq_length", None)):
            return name, value
    return "", None


class Through:
    """A cache that hands on what it is asked, save for ``update``."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class Decoder(nn.Module):
    """A causal language model whose blocks leave work out behind the prompt.

    Attributes:
        model: the language model.
        blocks: paths of its blocks, in order.
        record: how it was made, as plain data.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], record: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.blocks, self.record = model, tuple(blocks), dict(record)
        self.mask: Tensor | None = None
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.inside():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate`` of the model gives, with work left out.

        Raises:
            RecipeError: beam search is asked for, which reorders the cache.
        """
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        if int(kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1:
            raise RecipeError(f"{self.record['method']} follows each sequence by itself: beam search is not possible")
        with self.inside():
            return generation(self.model)(*args, **kwargs)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While this lasts the model itself leaves work out."""
        begin = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            with in_place_of(self.model, self.forwards()):
                yield
        finally:
            begin.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.mask = mask_of(module, args, kwargs)
        self.start()

    def start(self) -> None:
        """A new pass begins."""

    def forwards(self) -> dict[str, Callable[..., Any]]:
        """What modules do in place of their own forward, by path."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def quality(self) -> str:
        """What the setting costs on the data that it was chosen on, in words."""
        found = self.record["quality"]
        return (
            f"perplexity {found['dense']:.2f} > {found['gated']:.2f}, same next token {100 * found['agreement']:.1f} % "
            "on the data it was chosen on"
        )


def ids_of(batch: Any) -> Tensor:
    """The token ids of a batch, ``(sequences, tokens)``."""
    found = (
        batch["input_ids"] if isinstance(batch, Mapping) else batch[0] if isinstance(batch, (tuple, list)) else batch
    )
    if not isinstance(found, Tensor) or found.dim() != 2 or found.is_floating_point():
        raise DataError("a method for generation wants batches of token ids, (sequences, tokens)")
    return found


def windows_of(data: Iterable[Any]) -> list[Tensor]:
    """The first batches of token ids.

    Raises:
        DataError: there are none, or they have fewer than four tokens: half is the prompt.
    """
    given = [data] if isinstance(data, (Tensor, Mapping)) else data  # one batch
    found = [unpadded(batch, ids_of(batch)) for _, batch in zip(range(WINDOWS), given, strict=False)]
    if not found or min(x.shape[1] for x in found) < 4:
        raise DataError("there are no windows of at least four tokens: half of each is read as the prompt")
    return found


def step(model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """The logits of more tokens, and the cache with them in it."""
    inner: Any = getattr(model, "model", model) if isinstance(model, Decoder) else model
    name = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    given = {} if cache is None else {name: cache}
    out = model(input_ids=ids, use_cache=True, **given)
    cache = getattr(out, name, None)
    if cache is None or not isinstance(getattr(out, "logits", None), Tensor):
        raise ModelError(f"{type(inner).__name__} keeps no cache: methods for generation need a causal language model")
    return out.logits, cache


def blocks_of(model: nn.Module, example: Any) -> tuple[tuple[str, ...], Call]:
    """The blocks of a causal language model, and a call of it.

    Raises:
        ModelError: it has no blocks, or no cache, or its blocks give more than a hidden state.
    """
    call = call_of({"input_ids": ids_of(example)})
    places = find_places(model, call)
    given: set[str] = set()

    def look(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out, x = own(*args, **kwargs), hidden((args, kwargs))
        if cache_of(args, kwargs)[1] is not None and isinstance(out, Tensor) and x is not None and out.shape == x.shape:
            given.add("one")
        else:
            given.add("")
        return out

    with evaluating(model), torch.no_grad(), in_place_of(model, dict.fromkeys(places.paths, look)):
        step(model, call[1]["input_ids"][:, :2])
    if given != {"one"}:
        raise ModelError(
            f"the blocks of {type(model).__name__} ({places.paths[0]}, ...) are not given the cache and a hidden "
            "state, to give back a hidden state: methods for generation cannot leave them out"
        )
    return places.paths, call


def tail_of(model: nn.Module, blocks: Sequence[str], ids: Tensor) -> tuple[str, ...]:
    """Paths of the modules behind the last block that make logits of a hidden state, one after the other.

    Raises:
        ModelError: they do not.
    """
    ran: list[str] = []
    state: list[Tensor] = []

    def begin(module: nn.Module, args: Any, out: Tensor) -> None:
        state.append(out)
        ran.clear()

    handles = [model.get_submodule(blocks[-1]).register_forward_hook(begin)]
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_hook(lambda *_, n=name: ran.append(n)))
    try:
        with evaluating(model), torch.no_grad():
            logits = step(model, ids)[0]
            x = state[0]
            for name in (tail := tuple(ran)):
                x = model.get_submodule(name)(x)
    finally:
        for handle in handles:
            handle.remove()
    if not tail or x.shape != logits.shape or not torch.allclose(x, logits, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"the modules of {type(model).__name__} behind its last block do not make its logits one after the other: "
            "use measure='state'"
        )
    return tail


def continued(model: nn.Module, ids: Tensor, one_at_a_time: bool = False) -> Tensor:
    """Logits behind the prompt, which is the first half of a window: of all the rest, ``(sequences, rest, words)``."""
    half = ids.shape[1] // 2
    cache = step(model, ids[:, :half])[1]
    rest = ids[:, half:].split(1, 1) if one_at_a_time else [ids[:, half:]]
    found = []
    for part in rest:
        logits, cache = step(model, part, cache)
        found.append(logits)
    return torch.cat(found, 1)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihoods of the tokens behind the prompt that logits of the rest predict, flat."""
    truth = ids[:, ids.shape[1] // 2 + 1 :]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), truth.flatten(), reduction="none")


def quality_of(gates: Decoder, windows: Iterable[Tensor], dense: Iterable[Tensor]) -> dict[str, float]:
    """Perplexities behind the prompts of windows, and the share of next tokens that are the dense model's."""
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    same = []
    for ids, known in zip(windows, dense, strict=True):
        found = continued(gates, ids)
        losses[0].append(loss_of(known, ids))
        losses[1].append(loss_of(found, ids))
        same.append((found.argmax(-1) == known.argmax(-1)).flatten())
    a, b = (float(torch.cat(x).mean().exp()) for x in losses)
    return {"dense": a, "gated": b, "agreement": float(torch.cat(same).double().mean())}


def share_of(drop: float | None) -> float:
    """How many next tokens may be others than the dense model's."""
    if drop is not None and not 0 <= drop < 1:
        raise RecipeError(f"drop is {drop}: it is the share of next tokens that may be others, from 0 up to 1")
    return 0.1 if drop is None else drop


class _Step(nn.Module):
    """One step of generation, to be counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, cache: Any) -> None:
        self.found = step(self.model, ids, cache)


def step_flops(model: nn.Module, ids: Tensor) -> Flops:
    """Operations of the first token behind the prompt of a window, for one sequence."""
    half = ids.shape[1] // 2
    return flops(_Step(model), ids[:1, half : half + 1], step(model, ids[:1, :half])[1])


@torch.no_grad()
def measured_tokens(gates: Decoder, batches: Iterable[Any], repeats: int = 1) -> dict[str, Any]:
    """What a token behind the prompt costs, dense and gated in turns, and what is lost; see `measured.measured`.

    The first half of each window is read at once, the rest one token at a time. FLOPs are counted of every fourth token
    of two windows.
    """
    models: dict[str, nn.Module] = {"dense": gates.model, "gated": gates}
    took: dict[str, list[float]] = {name: [] for name in models}
    work: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[Tensor]] = {name: [] for name in models}
    same: list[Tensor] = []
    with evaluating(gates):
        for number, ids in enumerate(windows_of(batches)):
            said: dict[str, Tensor] = {}
            for turn in range(repeats):
                for name in models if (number + turn) % 2 == 0 else reversed(models):
                    said[name] = _timed(models[name], ids, took[name])
            for name, model in models.items():
                losses[name].append(loss_of(said[name], ids))
                if number < 2:
                    work[name] += _counted(model, ids)
            same.append((said["gated"].argmax(-1) == said["dense"].argmax(-1)).flatten())
    result: dict[str, Any] = {n: {"flops": spread(work[n]), "seconds": spread(took[n])} for n in models}
    for name in models:
        result[name]["perplexity"] = float(torch.cat(losses[name]).mean().exp())
    agreement = float(torch.cat(same).double().mean())
    middle = {name: result[name]["seconds"]["p50"] for name in models}
    return {
        **result, "agreement": agreement, "inputs": len(torch.cat(same)), "of": "token",
        "ratio": middle["dense"] / middle["gated"],
    }  # fmt: skip


def _timed(model: nn.Module, ids: Tensor, took: list[float]) -> Tensor:
    half = ids.shape[1] // 2
    cache, found = step(model, ids[:, :half])[1], []
    for part in ids[:, half:].split(1, 1):
        time, (logits, cache) = seconds(partial(step, model, part, cache))
        took.append(time)
        found.append(logits)
    return torch.cat(found, 1)


def _counted(model: nn.Module, ids: Tensor) -> list[float]:
    half = ids.shape[1] // 2
    cache, found, once = step(model, ids[:1, :half])[1], [], _Step(model)
    for number, part in enumerate(ids[:1, half:].split(1, 1)):
        if number % 4:
            cache = step(model, part, cache)[1]
        else:
            found.append(float(flops(once, part, cache).total))
            cache = once.found[1]
    return found
