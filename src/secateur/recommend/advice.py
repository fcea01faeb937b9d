"""What is true beyond methods: whether to prune at all, what stands in the way, and what nobody knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..registry import parts, register
from . import speed
from .bits import held
from .cells import Cell
from .predict import lost
from .rank import counted
from .situation import Situation

if TYPE_CHECKING:
    from .answer import Entry

#: What would lift a rule that drops methods.
_LIFTS = {
    "data_is_there": "data without labels (--data unlabeled)",
    "loss_is_there": "labels (--data labels)",
    "time_is_there": "time to retrain (--retrain 2h)",
    "epochs_suffice": "more time to retrain",
    "scratch_throws_weights_away": "the training data (--data training)",
    "weights_say_something": "trained weights, or time to train",
    "goal_is_within_reach": "a smaller goal, or other hardware",
}


def advise(situation: Situation, entries: Sequence[Entry], mixed: Sequence[Cell] = ()) -> list[str]:
    """What every registered adviser says, in their order; ``mixed`` are cells of `bits.held_together`."""
    said = (part.function(situation, entries, mixed) for part in parts("advice").values())
    return [text for text in said if text is not None]


def _usable(entries: Iterable[Entry]) -> list[Entry]:
    return [e for e in entries if e.status != "dropped"]


@register("advice")
def quantize_instead(situation: Situation, entries: Sequence[Entry], mixed: Sequence[Cell]) -> str | None:
    """A small factor in size or in time, and no training: fewer bits for each weight cost less than fewer weights.

    Where quantized and pruned models were held to one target near this situation, those runs say which. Eight bits make
    a quarter of float32 and half of 16 bits. On a CPU integer products are faster by what was measured.

    Source: such runs. Without them ``speed.json`` (torch's int8 product against float32,
    benchmarks/results/sparse_avx512.json); LLM.int8(), arXiv 2208.07339: eight bits without degradation up to 175B
    parameters. That zeros cost more is what ``language-models-without-training`` rests on; for other models it is
    common practice.
    """
    if situation.trains or situation.goal.assumed:
        return None
    goal = situation.goal
    bits = held(situation, mixed) if goal.quantity in ("size", "memory") else None
    if bits is not None and bits.fewer_bits == bits.tasks:
        return f"do not prune: quantize. Held to one target, fewer bits lost less: {bits.text}"
    if bits is not None:
        return (
            f"whether to prune or to quantize is not settled: fewer bits lost less on {bits.fewer_bits} of "
            f"{counted(bits.tasks, 'task')}: {bits.text}"
        )
    if goal.quantity in ("size", "memory") and goal.factor <= 4.0:
        from_16 = (
            " (2 times than 16 bits, so where the weights have 16 bits this is all they give)"
            if goal.factor > 2
            else ""
        )
        return (
            "do not prune: quantize. Eight bits a weight are 4 times smaller than 32 bits, 2 times than 16, and cost "
            f"less than {100 * (1 - goal.keep):.3g} % of the weights would without retraining{from_16}"
        )
    figures = speed.shipped()["int8"]
    if goal.quantity == "latency" and situation.hardware.family == "cpu" and figures:
        low, high = min(f["low"] for f in figures), max(f["high"] for f in figures)
        if goal.factor <= low and situation.kind != "cnn":
            machines = " and ".join(sorted({speed.named(f["machine"]) for f in figures}))
            return (
                f"do not prune first: quantize. torch's int8 product is {low:.2g} to {high:.2g} times as fast as "
                f"float32 on linear layers ({sum(f['cases'] for f in figures)} cases on {machines}): "
                "secateur compress MODEL --for cpu --values int8-dynamic; zeros add to that"
            )
    return None


@register("advice")
def language_models_need_text(situation: Situation, entries: Sequence[Entry], mixed: Sequence[Cell]) -> str | None:
    """Without a line of text a language model is pruned by its weights alone, which breaks it; any text would do.

    Source: benchmarks/results/quality.json: SmolLM2-135M with half of the weights gone, perplexity 24.6 dense, 398 by
    magnitude, 39.5 by sparsegpt with 64 windows of text.
    """
    if not situation.language or situation.data != "none":
        return None
    return (
        "do not prune a language model without any text: quantize it, which needs none, or take a few windows of "
        "any text (--data unlabeled). With half of the weights gone SmolLM2-135M went from a perplexity of 24.6 to 398 "
        "by magnitude, and to 39.5 by sparsegpt with 64 windows"
    )


@register("advice")
def the_drop_is_not_held(situation: Situation, entries: Sequence[Entry], mixed: Sequence[Cell]) -> str | None:
    """Where every prediction is beyond the drop that is allowed, that is said.

    Source: the predictions themselves.
    """
    usable = _usable(entries)
    known = [e for e in usable if e.holds is not None]
    if situation.max_drop is None or not known or any(e.holds for e in known):
        return None
    best = min(known, key=lambda e: e.loss.value or 0.0)
    unknown = len(usable) - len(known)
    rest = f"; of {unknown} others nothing is known" if unknown else ""
    return (
        f"no method with runs near this is expected to hold a drop of {100 * situation.max_drop:g} %: the least is "
        f"{best.name}, {lost(best.loss, situation.language)}{rest}"
    )


@register("advice")
def too_much_without_training(situation: Situation, entries: Sequence[Entry], mixed: Sequence[Cell]) -> str | None:
    """Beyond a share a model that is not retrained is not what it was, whatever the method.

    Six tenths for language models, as of the rule ``language-models-without-training``; seven tenths for others,
    which is prudence more than knowledge.

    Source: benchmarks/results/quality.json for language models; a bound of our own for others.
    """
    usable = _usable(entries)
    if situation.trains or not usable:
        return None
    least = min(1 - e.candidate.aim.keep for e in usable)
    if least > (0.6 if situation.language else 0.7) + 1e-9:
        return (
            f"every way to this goal takes {100 * least:.3g} % or more out of a model that is not retrained, and no "
            "method is known to hold that: take a smaller model, quantize, or allow retraining (--retrain 2h, labels)"
        )
    return None


@register("advice")
def nothing_fits(situation: Situation, entries: Sequence[Entry], mixed: Sequence[Cell]) -> str | None:
    """Where every method was dropped: what stands in the way of most.

    Source: the rules that dropped them.
    """
    if _usable(entries):
        return None
    first = Counter(next(v.rule for v in e.verdicts if v.action == "drop") for e in entries)
    lifts = [
        f"{n} lack {_LIFTS[rule.replace('-', '_')]}"
        for rule, n in first.most_common()
        if rule.replace("-", "_") in _LIFTS
    ]
    return f"no method fits; of {len(entries)}, " + ("; ".join(lifts) or "see the reasons with --all")


@register("advice")
def nothing_is_known(situation: Situation, entries: Sequence[Entry], mixed: Sequence[Cell]) -> str | None:
    """Where no run is near, the order is that of the rules alone, and a study would tell.

    Source: the evidence, or that there is none.
    """
    usable = _usable(entries)
    if not usable:
        return None
    if not any(e.status == "ranked" for e in usable):
        values = [e.effect.value for e in usable if e.effect is not None]
        equal = sum(abs(v - values[0]) < 1e-9 for v in values)
        ties = f" (by which the first {equal} are equal: what needs least stands in front)" if equal > 1 else ""
        return (
            "nothing is known for this: no study near it was measured, and the order below is that of the rules "
            f"alone{ties}. --write-study study.yaml writes the study that would tell"
        )
    if usable[0].effect is not None and not usable[0].effect.runs:
        return (
            f"{usable[0].name} itself was not measured near this; recipes that share its axes were. "
            "--write-study study.yaml writes the study that would tell"
        )
    return None
