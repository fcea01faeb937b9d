"""The survey's contrasts, ready made: a question, what is commonly reported, and the sides that answer it, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..errors import StudyError, UnknownName
from ..granularity import parse
from ..layers import find_layers
from ..recipe import Recipe
from ..runtime import is_runtime
from ..tasks import find
from ..when.healing import fresh_model
from .answers import Answer, Side, Statement, answer
from .rows import Row
from .study import Study
from .targets import PATTERN
from .verdicts import BETTER

_FINE: dict[str, Any] = {"knobs": {"recovery": {"length": 1.0}}}
_LOWER: dict[str, Any] = {"recovery": "finetune", "knobs": {"recovery": {"rate": 0.3}}}
_HIGH = {"0.9": "90 %", "0.95": "95 %", "0.98": "98 %", "0.99": "99 %"}
_LOW = {"0.3": "30 %", "0.5": "50 %", "0.7": "70 %"}


@dataclass(frozen=True)
class Contrast:
    """A pair, or a triple, of settings.

    Attributes:
        name: on the command line.
        question: what is asked.
        reported: what is commonly reported.
        expected: the sides from the better to the worse as reported; empty where reports disagree.
        source: of what is reported.
        tasks, models: side -> its contenders, on tasks and on language models; empty where it makes no sense there.
        levels: target -> level: targets of one level are compared with each other.
        budget: what ``epochs`` are of: ``total``, all training that a contender asks for, or ``run``, one training run.
        note: what to know of how the sides are matched.
    """

    name: str
    question: str
    reported: str
    source: str
    expected: tuple[str, ...] = ()
    tasks: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    models: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    levels: Mapping[str, str] = field(default_factory=dict)
    model_levels: Mapping[str, str] = field(default_factory=dict)
    budget: str = "total"
    note: str = ""

    def sides(self, kind: str) -> dict[str, list[dict[str, Any]]]:
        """Side -> contenders, each with a label of its own."""
        own = self.tasks if kind == "task" else self.models
        return {
            side: [{**c, "label": c.get("label", f"{c['method']} ({side})")} for c in given]
            for side, given in own.items()
        }

    def labels(self, kind: str) -> dict[str, list[str]]:
        """Side -> labels."""
        return {side: [str(c["label"]) for c in given] for side, given in self.sides(kind).items()}

    def levels_of(self, kind: str) -> Mapping[str, str]:
        """Target -> level, on tasks or on language models."""
        return self.model_levels if kind == "model" and self.model_levels else self.levels

    def meet(self, rows: Iterable[Row], kind: str) -> int:
        """How many of its sides have runs."""
        there = {row.label for row in rows if row.kind == kind and row.target in self.levels_of(kind)}
        return sum(not there.isdisjoint(labels) for labels in self.labels(kind).values())

    def answer(self, rows: Iterable[Row], kind: str) -> Answer:
        """What runs say to it."""
        levels = self.levels_of(kind)
        own = [r for r in rows if r.dense or (r.kind == kind and r.target in levels)]
        sides = [Side(name, tuple(labels)) for name, labels in self.labels(kind).items()]
        there = {side.name for side in sides if any(side.has(r) for r in own)}
        order = [name for name in self.expected if name in there]
        stated = [Statement(a, b, BETTER) for a, b in pairwise(order)]
        text = f"{self.reported} ({self.source})"
        return answer(
            own, [s for s in sides if s.name in there], question=self.question, published=text, statements=stated,
            same=levels,
        )  # fmt: skip


_CONTRASTS = (
    Contrast(
        "unstructured-vs-structured",
        "Does it matter what goes: single weights, patterns of weights or filters, at the same share of the work?",
        "Single weights keep more accuracy than patterns, and patterns more than filters; filters run faster anywhere.",
        "Mao et al., Exploring the granularity of sparsity, arXiv 1705.08922",
        ("unstructured", "semi-structured", "structured"),
        tasks={
            "unstructured": [{"method": "magnitude-finetune", "targets": ["0.5", "0.75"]}],
            "semi-structured": [{"method": "magnitude-finetune", "allocation": "uniform", "targets": ["2:4", "1:4"]}],
            "structured": [{"method": "l1-norm", "recovery": "finetune", "targets": ["flops 50%", "flops 75%"]}],
        },
        models={
            "unstructured": [{"method": "sparsegpt", "targets": ["0.5"]}, {"method": "wanda", "targets": ["0.5"]}],
            "semi-structured": [{"method": "sparsegpt", "targets": ["2:4"]}, {"method": "wanda", "targets": ["2:4"]}],
        },
        levels={
            "0.5": "half",
            "2:4": "half",
            "flops 50%": "half",
            "0.75": "three quarters",
            "1:4": "three quarters",
            "flops 75%": "three quarters",
        },
        model_levels={"0.5": "half", "2:4": "half"},
        note="Weights and patterns: a share of the weights. Filters: the same share of the FLOPs.",
    ),
    Contrast(
        "one-shot-vs-iterative",
        "Is it better to cut in rounds, with training between them, than at once?",
        "Rounds are better at high sparsity, and cost more; at low sparsity one cut is as good.",
        "Han et al., arXiv 1506.02626; Janusz et al., arXiv 2508.13836",
        ("iterative", "one-shot"),
        tasks={
            "one-shot": [{"method": "magnitude-finetune", "knobs": {"recovery": {"length": 2.0}}}],
            "iterative": [{"method": "iterative-magnitude", "steps": 4}],
        },
        levels=_HIGH,
        note="Both train as long: a third of the epochs before the cut, two thirds after one cut or in four rounds.",
    ),
    Contrast(
        "data-free-vs-data-driven",
        "Is data worth anything when weights are chosen?",
        "Data helps in language models; before training, methods without data keep up.",
        "Tanaka et al., arXiv 2006.05467; Sun et al., arXiv 2306.11695",
        ("data-driven", "data-free"),
        tasks={
            "data-free": [{"method": "synflow"}, {"method": "random-erk"}],
            "data-driven": [{"method": "snip"}, {"method": "grasp"}],
        },
        models={
            "data-free": [{"method": "magnitude"}],
            "data-driven": [{"method": "wanda"}, {"method": "sparsegpt"}],
        },
        levels=_HIGH,
        model_levels={**_LOW, "2:4": "2:4"},
    ),
    Contrast(
        "initialized-vs-pretrained",
        "Can weights be chosen before they are trained?",
        "Choosing at initialization costs less and stays below magnitude after training.",
        "Frankle et al., Pruning neural networks at initialization: why are we missing the mark?, arXiv 2009.08576",
        ("pre-trained", "initialized"),
        tasks={
            "initialized": [{"method": "snip"}, {"method": "synflow"}, {"method": "grasp"}],
            "pre-trained": [{"method": "magnitude-finetune"}],
        },
        levels=_HIGH,
        note="All train as many epochs in all; magnitude spends two thirds of them on the dense model.",
    ),
    Contrast(
        "scratch-vs-finetuned",
        "Are the weights that stay worth anything, or only the architecture that pruning finds?",
        "No agreement: filters can be trained from scratch as well, single weights want their values.",
        "Liu et al., Rethinking the value of network pruning, arXiv 1810.05270",
        tasks={
            "fine-tuned": [
                {"method": "magnitude-finetune", "targets": ["0.9", "0.95"], **_FINE},
                {"method": "l1-norm", "recovery": "finetune", "targets": ["flops 50%"], **_FINE},
            ],
            "scratch-E": [
                {"method": "magnitude-finetune", "recovery": "scratch", "targets": ["0.9", "0.95"]},
                {"method": "l1-norm", "recovery": "scratch", "targets": ["flops 50%"]},
            ],
            "scratch-B": [
                {
                    "method": "magnitude-finetune",
                    "recovery": "scratch",
                    "targets": ["0.9", "0.95"],
                    "knobs": {"recovery": {"budget": "flops"}},
                },
                {
                    "method": "l1-norm",
                    "recovery": "scratch",
                    "targets": ["flops 50%"],
                    "knobs": {"recovery": {"budget": "flops"}},
                },
            ],
        },
        levels={"0.9": "90 % of the weights", "0.95": "95 % of the weights", "flops 50%": "half of the FLOPs"},
        budget="run",
        note="scratch-E trains as many epochs as fine-tuning does, scratch-B as many FLOPs as the dense run, at most "
        "twice the epochs.",
    ),
    Contrast(
        "rewound-vs-reinitialized",
        "Does a sparse network need the weights that its mask was found with?",
        "Rewound to its early weights it trains better than drawn anew, the more so the sparser it is.",
        "Frankle and Carbin, The lottery ticket hypothesis, arXiv 1803.03635",
        ("rewound", "reinitialized"),
        tasks={
            "rewound": [{"method": "lth-rewind", "steps": 4}],
            "reinitialized": [{"method": "lth-rewind", "steps": 4, "recovery": "scratch"}],
        },
        levels=_HIGH,
        note="Four rounds of magnitude, each trained as long as the dense run, from early weights or from new ones, "
        "under one budget of epochs.",
    ),
    Contrast(
        "original-vs-transferred",
        "Does a mask that was found on one task serve another?",
        "Tickets transfer between tasks that resemble each other, better the larger the source.",
        "Morcos et al., One ticket to win them all, arXiv 1906.02773",
        ("original", "transferred"),
        tasks={
            "original": [{"method": "magnitude-finetune", "recovery": "none", "allocation": "erk", "masks": "own"}],
            "transferred": [
                {"method": "magnitude-finetune", "recovery": "none", "allocation": "erk", "masks": "other"}
            ],
        },
        levels=_HIGH,
        note="Masks are found by training densely on one task, and held from the first step on the other; layers that "
        "do not fit stay dense, so both tasks need one architecture.",
    ),
    Contrast(
        "static-vs-dynamic",
        "Is one smaller network for all inputs worse than a choice that each input makes for itself?",
        "At equal FLOPs a choice at run time keeps more accuracy, saves no memory, and is harder to batch.",
        "Gao et al., Dynamic channel pruning (FBS), arXiv 1810.05331",
        ("dynamic", "static"),
        tasks={
            "static": [{"method": "l1-norm", **_LOWER}, {"method": "taylor", **_LOWER}],
            "dynamic": [{"method": "fbs", "rate": 0.3}, {"method": "ftwt", "rate": 0.3}],
        },
        levels={"flops 50%": "half of the FLOPs", "flops 70%": "seven tenths of the FLOPs"},
        note="FLOPs of a dynamic network are those executed, the mean over test inputs. All train as long: two thirds "
        "of the epochs densely, then a third with filters gone, or with gates, at 0.3 of the learning rate.",
    ),
    Contrast(
        "layerwise-vs-global",
        "Should every layer lose the same share, or the whole network be ranked at once?",
        "One ranking is better until it empties a layer; in language models uneven layers help at high sparsity.",
        "Tanaka et al., arXiv 2006.05467; Yin et al. (OWL), arXiv 2310.05175",
        ("global", "layer-wise"),
        tasks={
            "layer-wise": [{"method": "magnitude-finetune", "allocation": "uniform"}],
            "global": [{"method": "magnitude-finetune", "allocation": "global"}],
        },
        models={
            "layer-wise": [{"method": "wanda"}, {"method": "sparsegpt"}],
            "global": [{"method": "owl-wanda"}, {"method": "owl-sparsegpt"}],
        },
        levels=_HIGH,
        model_levels=_LOW,
    ),
    Contrast(
        "criterion-vs-learned",
        "Is what stays better learned with the weights than ranked by a formula?",
        "Learned thresholds and gates are at the level of gradual magnitude pruning or above it, with more knobs.",
        "Kusupati et al. (STR), arXiv 2002.03231; Gale et al., The state of sparsity, arXiv 1902.09574",
        ("learned", "criterion"),
        tasks={
            "criterion": [{"method": "gmp"}],
            "learned": [{"method": "str"}, {"method": "continuous-sparsification"}],
        },
        levels=_HIGH,
    ),
)


def contrasts() -> dict[str, Contrast]:
    """The contrasts by name."""
    return {c.name: c for c in _CONTRASTS}


def contrast(name: str) -> Contrast:
    """The contrast of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in contrasts():
        raise UnknownName("contrast", name, contrasts(), "secateur contrast")
    return contrasts()[name]


def study_of(
    name: str, kind: str, subject: str, *, options: Mapping[str, Any] | None = None, epochs: float | None = None,
    seeds: int = 3, other: Mapping[str, Any] | None = None, targets: Sequence[str] | None = None, **more: Any,
) -> Study:  # fmt: skip
    """The study that answers a contrast on a task or a language model.

    Args:
        kind, subject, options: ``task`` or ``model``, its name, and the sizes of a ready task.
        epochs: of all training that a contender asks for; of one run where the contrast is about that.
        other: the task that masks come from, for original-vs-transferred: ``{"task": NAME, ...sizes}``.
        targets: those of the contrast's that are wanted.
        more: further fields of the study.

    Raises:
        StudyError: it makes no sense there, or something is missing.
    """
    asked = contrast(name)
    sides = asked.sides(kind)
    if not sides:
        why = "it is about tasks" if kind == "model" and asked.tasks else asked.note
        raise StudyError(f"contrast '{name}' cannot be run on a {kind}: {why}")
    methods = [_masks(c, subject, options, other, name) for given in sides.values() for c in given]
    if kind == "task":
        methods = _fitting(methods, subject, options)
    levels = asked.levels_of(kind)
    named = {t for c in methods for t in c.get("targets", [])}
    wanted = [t for t in levels if (not named or t in named or any("targets" not in c for c in methods))]
    if targets is not None:
        if strange := [t for t in targets if t not in levels]:
            raise StudyError(f"contrast '{name}' has no target {strange[0]}; its targets: {', '.join(levels)}")
        wanted = [t for t in wanted if t in targets]
        methods = [{**c, "targets": [t for t in c["targets"] if t in wanted]} if "targets" in c else c for c in methods]
        met = [s for s, given in sides.items() if any(set(c.get("targets", wanted)) & set(wanted) for c in given)]
        if len(met) < 2:
            raise StudyError(
                f"contrast '{name}' has no two sides at {', '.join(targets)}: {', '.join(levels)} are its own"
            )
    budget = dict(more.pop("budget", None) or {})
    if epochs is None and asked.budget == "total" and kind == "task" and not budget.keys() & {"epochs", "total_epochs"}:
        epochs = float(find(subject, **(options or {})).epochs)  # of all training: as long as the task's own
    if epochs is not None:
        budget["total_epochs" if asked.budget == "total" else "epochs"] = epochs
    what = {"task": subject, "options": dict(options or {})} if kind == "task" else subject
    return Study.of({
        "study": name, "contrast": name, kind: what, "methods": methods, "targets": wanted, "seeds": seeds,
        "budget": budget, **more,
    })  # fmt: skip


def _fitting(
    methods: Sequence[dict[str, Any]], subject: str, options: Mapping[str, Any] | None
) -> list[dict[str, Any]]:  # fmt: skip
    """Where a pattern N:M is asked for, all contenders over weights leave the layers dense that it does not fit."""
    runs = [int(t.partition(":")[2]) for c in methods for t in c.get("targets", ()) if PATTERN.fullmatch(str(t))]
    if not runs:
        return list(methods)
    layers = find_layers(fresh_model(find(subject, **(options or {})), 0), only=("*",))[0]
    odd = [x.name for x in layers if any(x.shape[1] % m for m in runs)]
    single = [
        not is_runtime(c["method"]) and not parse(Recipe.of(str(c["method"])).granularity).coupled for c in methods
    ]
    return [{**c, "skip": odd} if odd and weights else c for c, weights in zip(methods, single, strict=True)]


def _masks(
    contender: Mapping[str, Any], subject: str, options: Mapping[str, Any] | None, other: Mapping[str, Any] | None,
    name: str,
) -> dict[str, Any]:  # fmt: skip
    found = dict(contender)
    if found.get("masks") == "own":
        found["masks"] = {"task": subject, **(options or {})}
    elif found.get("masks") == "other":
        if other is None:
            raise StudyError(f"contrast '{name}' needs the task that masks come from: --from digits")
        found["masks"] = dict(other)
    return found
