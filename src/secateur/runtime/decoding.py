"""What a decoder brings that leaves out work while it generates, with the dense model beside it in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from math import exp
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import DataError, ModelError
from ..layers import evaluating
from ..measure.latency import seconds
from .base import Decoding, Dynamic
from .padding import unpadded

#: Texts that are measured, at most, and tokens of each that are decoded.
TEXTS, STEPS = 4, 64


def decoded(made: Dynamic, batches: Iterable[Any], steps: int = STEPS) -> dict[str, Any]:
    """Seconds of a token, perplexity and bytes of the cache, token by token behind a prompt.

    The first half of each text is the prompt; of the other half so many tokens are fed one by one as they stand in the
    text, the dense and the gated model in turns at each token.

    Args:
        batches: token ids, ``(batch, tokens)``, or dicts of them; of pairs the first. Up to `TEXTS` are used.
        steps: tokens that are decoded of each.

    Returns:
        ``dense`` and ``gated``, each with ``seconds`` of a token (``mean``, ``p50``, ``p99``), ``perplexity`` of what
        was decoded, ``prefill`` (seconds of the prompt, the median) and ``bytes`` of the cache at the end;
        ``agreement``, the share of tokens with the same most likely successor; ``inputs``, ``prompt``, ``tokens``;
        ``ratio``, how many times as fast the gated model decodes, by the medians.

    Raises:
        DataError: there is no text of two tokens.
        ModelError: the model gives no logits.
    """
    from .cache import nbytes
    from .decoder import cache_name, dense_cache

    gated = cast("Decoding", made)
    models: dict[str, nn.Module] = {"dense": made.model, "gated": cast("nn.Module", made)}
    name = cache_name(made.model)
    took: dict[str, list[float]] = {m: [] for m in models}
    prefill: dict[str, list[float]] = {m: [] for m in models}
    loss, held = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    same, count, texts, prompt = 0, 0, 0, 0
    with evaluating(*models.values()), torch.inference_mode():
        for number, batch in enumerate(islice(batches, TEXTS)):
            ids = _ids(batch)
            prompt = ids.shape[1] // 2
            caches: dict[str, Any] = {"dense": dense_cache(made.model), "gated": gated.cache()}
            ahead: dict[str, Tensor] = {}
            for m, model in models.items():
                if number == 0:  # the first pass allocates memory and chooses kernels
                    _logits(model(ids[:, :prompt]), made.model)
                call = partial(model, ids[:, :prompt], use_cache=True, **{name: caches[m]})
                one, out = seconds(call)
                prefill[m].append(one)
                ahead[m] = out.logits[:, -1]
            for at in range(prompt, min(ids.shape[1], prompt + steps)):
                for m in models if at % 2 else reversed(models):
                    loss[m] += float(cross_entropy(ahead[m].float(), ids[:, at], reduction="sum"))
                same += int((ahead["dense"].argmax(-1) == ahead["gated"].argmax(-1)).sum())
                count += len(ids)
                for m in models if at % 2 else reversed(models):
                    call = partial(models[m], ids[:, at : at + 1], use_cache=True, **{name: caches[m]})
                    one, out = seconds(call)
                    took[m].append(one)
                    ahead[m] = out.logits[:, -1]
            held = {m: nbytes(cache) for m, cache in caches.items()}
            texts += len(ids)
    if not count:
        raise DataError("there is no text of at least two tokens to decode")
    result: dict[str, Any] = {
        m: {
            "seconds": spread(took[m]), "prefill": spread(prefill[m])["p50"], "perplexity": exp(loss[m] / count),
            "bytes": held[m],
        }
        for m in models
    }  # fmt: skip
    middle = {m: result[m]["seconds"]["p50"] for m in models}
    return {
        **result, "agreement": same / count, "inputs": texts, "prompt": prompt, "tokens": count,
        "ratio": middle["dense"] / middle["gated"],
    }  # fmt: skip


def _logits(out: Any, model: nn.Module) -> None:
    """Refuse a model that says nothing of the next token."""
    if not isinstance(getattr(out, "logits", None), Tensor):
        raise ModelError(
            f"{type(model).__name__} gives no logits, by which a decoder is measured: give one such as "
            "AutoModelForCausalLM makes"
        )


def _ids(batch: Any) -> Tensor:
    found = batch["input_ids"] if isinstance(batch, Mapping) else batch
    ids = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 2:
        raise DataError("a decoder is measured on token ids, (batch, tokens) with two tokens or more")
    return unpadded(batch, ids)


def spread(values: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile."""
    x = torch.tensor(values, dtype=torch.float64)
    low, high = x.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {"mean": float(x.mean()), "p50": low, "p99": high}


def table(made: Dynamic, found: Mapping[str, Any]) -> str:
    """What was made, and what was measured, as text."""
    lines = [made.told(), f"{'':24}{'dense':>14}{'gated':>14}"]
    if (expected := made.record.get("flops")) is not None:
        before, after = expected["before"] / 1e6, expected["after"] / 1e6
        lines.append(f"{'MFLOPs of a token':24}{before:>14.2f}{after:>14.2f}")
    for part in ("mean", "p50", "p99"):
        lines.append(_row(f"ms a token, {part}", found, lambda x, part=part: 1e3 * x["seconds"][part]))
    lines.append(_row("ms of the prompt", found, lambda x: 1e3 * x["prefill"]))
    lines.append(_row("MiB of the cache", found, lambda x: x["bytes"] / 2**20))
    lines.append(_row("perplexity", found, lambda x: x["perplexity"]))
    lines.append(f"{'same next token':24}{'':>14}{100 * found['agreement']:>13.2f}%")
    lines.append(
        f"{found['ratio']:.2f} times as fast here, token by token behind {found['prompt']} tokens of each of "
        f"{found['inputs']} texts"
    )
    return "\n".join(lines)


def _row(label: str, found: Mapping[str, Any], value: Any) -> str:
    return f"{label:24}" + "".join(f"{value(found[m]):>14.2f}" for m in ("dense", "gated"))
