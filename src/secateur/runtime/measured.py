"""What a gated model brings on real inputs, with the dense model beside it in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import DataError
from ..layers import evaluating
from ..measure.flops import flops
from ..measure.latency import WARMUP, seconds
from . import decoding
from .base import Dynamic, part_of
from .structure import Call

#: Inputs that are measured one at a time, at most.
SINGLES = 200


def measured(gates: Dynamic, batches: Iterable[Any], repeats: int = 3) -> dict[str, Any]:
    """FLOPs, seconds of a batch, and whether answers change, over a distribution of inputs.

    FLOPs are those that are executed. Where inputs differ in how much they leave out (the fact ``alone`` of the
    method), each is measured by itself, up to `SINGLES` of them. Decoders (the fact ``decodes``) are measured token by
    token, see `decoding.decoded`.

    Args:
        batches: a dict is passed as keywords; of a pair of inputs and class indices, the second gives the accuracy.
        repeats: how often each batch is timed, the dense and the gated model in turns.

    Returns:
        ``dense`` and ``gated``, each with ``flops`` (``mean``, ``p50``, ``p99`` over batches), ``seconds`` (the same)
        and, for pairs, ``accuracy``; ``agreement``, the share of answers with the same largest class, where there are
        classes; ``inputs`` and ``ratio``, how many times as fast the gated model is, by the medians.

    Raises:
        DataError: there are no batches.
    """
    if part_of(gates.record).facts.get("decodes"):
        return decoding.decoded(gates, batches)
    models = {"dense": gates.model, "gated": cast("nn.Module", gates)}
    if part_of(gates.record).facts.get("alone"):
        batches = islice(_singles(batches), SINGLES)
    found: dict[str, dict[str, list[float]]] = {name: {"flops": [], "seconds": []} for name in models}
    right, same, count, answered = dict.fromkeys(models, 0), 0, 0, 0
    labelled = True
    with evaluating(*models.values()), torch.inference_mode():
        for number, batch in enumerate(batches):
            (args, kwargs), labels = call_of_batch(batch)
            labelled = labelled and labels is not None
            answers: dict[str, Tensor | None] = {}
            for turn in range(-WARMUP if number == 0 else 0, repeats):
                for name in models if turn % 2 == 0 else reversed(models):
                    took, out = seconds(partial(models[name], *args, **kwargs))
                    if turn >= 0:
                        found[name]["seconds"].append(took)
                        answers[name] = _classes(out)
            for name, model in models.items():
                found[name]["flops"].append(flops(model, *args, **kwargs).total)
                if labels is not None and (best := answers[name]) is not None:
                    right[name] += int((best == labels).sum())
            dense, gated = answers["dense"], answers["gated"]
            if dense is not None and gated is not None:
                same, answered = same + int((dense == gated).sum()), answered + dense.numel()
            count += inputs_in((args, kwargs))
    if not count:
        raise DataError("there is no batch to measure on")
    result: dict[str, Any] = {name: {k: decoding.spread(v) for k, v in facts.items()} for name, facts in found.items()}
    if labelled and answered:
        for name in models:
            result[name]["accuracy"] = right[name] / answered
    if answered:
        result["agreement"] = same / answered
    middle = {name: result[name]["seconds"]["p50"] for name in models}
    return {**result, "inputs": count, "ratio": middle["dense"] / middle["gated"]}


def _singles(batches: Iterable[Any]) -> Iterator[Any]:
    """Each input of each batch as a batch of one."""
    for batch in batches:
        for k in range(count := inputs_in(batch)):
            yield tree_map(lambda x, k=k, n=count: x[k : k + 1] if is_of_inputs(x, n) else x, batch)


def inputs_in(batch: Any) -> int:
    """How many inputs a batch has: the rows of its first tensor.

    Raises:
        DataError: no tensor in it has rows.
    """
    for x in tree_leaves(batch):
        if isinstance(x, Tensor) and x.dim():
            return len(x)
    raise DataError("a batch has no tensor with a row for each input")


def is_of_inputs(x: Any, count: int) -> bool:
    """Whether something is a tensor with a row for each input; what all inputs share is not."""
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == count


def call_of_batch(batch: Any) -> tuple[Call, Tensor | None]:
    """How a model is called on a batch, and the classes of its inputs, where a batch is a pair of both."""
    if isinstance(batch, Mapping):
        given = dict(batch)
        return ((), given), _labels(given.pop("labels", None))
    if isinstance(batch, (tuple, list)):
        return ((batch[0],), {}), _labels(batch[1]) if len(batch) == 2 else None
    return ((batch,), {}), None


def _labels(x: Any) -> Tensor | None:
    """Class indices; None for what is no such thing."""
    return x if isinstance(x, Tensor) and x.dim() == 1 and not x.is_floating_point() else None


def _classes(out: Any) -> Tensor | None:
    """The largest class of each answer; None where answers are no classes."""
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    return logits.argmax(1) if isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > 1 else None


def table(made: Dynamic, found: Mapping[str, Any]) -> str:
    """What was made, what was expected of it, and what was measured, as text."""
    if "prompt" in found:
        return decoding.table(made, found)
    lines = [made.told(), f"{'':20}{'dense':>14}{'gated':>14}"]
    if (expected := made.record.get("flops")) is not None:
        before, after = expected["before"] / 1e6, expected["after"] / 1e6
        lines.append(f"{'MFLOPs, expected':20}{before:>14.2f}{after:>14.2f}")
    for name, unit in (("flops", 1e6), ("seconds", 1e-3)):
        for part in ("mean", "p50", "p99"):
            label = f"{'MFLOPs' if name == 'flops' else 'ms'} a {found.get('of', 'batch')}, {part}"
            lines.append(f"{label:20}" + "".join(f"{found[m][name][part] / unit:>14.2f}" for m in ("dense", "gated")))
    if "perplexity" in found["dense"]:
        lines.append(f"{'perplexity':20}" + "".join(f"{found[m]['perplexity']:>14.2f}" for m in ("dense", "gated")))
    if "accuracy" in found["dense"]:
        lines.append(f"{'accuracy':20}" + "".join(f"{100 * found[m]['accuracy']:>13.2f}%" for m in ("dense", "gated")))
    if "agreement" in found:
        lines.append(f"{'same answer':20}{'':>14}{100 * found['agreement']:>13.2f}%")
    lines.append(
        f"{found['ratio']:.2f} times as fast here, on {found['inputs']} {'tokens' if 'of' in found else 'inputs'}"
    )
    return "\n".join(lines)
