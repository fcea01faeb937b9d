"""Rules about what can be done at all: the model's structure, the data, the time, and the goal."""

from __future__ import annotations

from ..consistency import OF_UNITS
from ..registry import get, register
from .candidate import Candidate
from .situation import KINDS, Situation, spoken
from .verdict import Verdict, demote, drop

#: Epochs below which a training run is a short one.
SHORT = 5.0


@register("rule")
def blocks_are_there(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Whole blocks go only where a model is a row of blocks, and experts only where there are experts.

    Source: what the granularities ``depth`` and ``experts`` take out; see their cards.
    """
    if candidate.structure == "experts" and situation.kind != "moe":
        return drop(f"it takes out experts, and a {KINDS[situation.kind]} has none")
    if candidate.structure == "depth" and situation.kind in ("cnn", "other"):
        return drop(f"it takes out whole blocks, and a {KINDS[situation.kind]} is no row of blocks of one width")
    return None


@register("rule")
def criterion_sees_its_units(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Criteria of feature maps and of the normalization behind a unit need layers that have them: convolutions.

    Source: the cards of the criteria (what they rank, ``of``); network slimming, arXiv 1708.06519.
    """
    name = candidate.recipe.criterion
    of = get("criterion", name).facts.get("of") if name is not None else None
    on_scale = (
        candidate.recipe.penalty != "none" and get("penalty", candidate.recipe.penalty).facts.get("on") == "scale"
    )
    if (of in ("map", "norm") or on_scale) and situation.kind not in ("cnn", "other"):
        how = OF_UNITS["norm" if on_scale else str(of)]
        return drop(f"it ranks units {how}, which a {KINDS[situation.kind]} does not have for each unit")
    return None


@register("rule")
def data_is_there(situation: Situation, candidate: Candidate) -> Verdict | None:
    """What is measured on data needs data.

    Source: the positional parameters of the recipe's parts (`Recipe.needs`).
    """
    if candidate.needs_inputs and situation.data == "none":
        return drop(
            f"it needs data ({', '.join(sorted(candidate.needs))}), and there is none: --data unlabeled or more"
        )
    return None


@register("rule")
def loss_is_there(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Gradients and training need a loss: labels, or a language model whose text is its own target.

    Source: the facts that the recipe needs, and which of them take a loss (``facts.FACTS``).
    """
    if situation.data == "none" and candidate.needs_inputs:
        return None  # said already
    if candidate.needs_loss and not situation.has_loss:
        why = "it trains" if candidate.trains else f"it needs gradients ({', '.join(sorted(candidate.needs))})"
        what, data = ("text", "unlabeled") if situation.language else ("labels", "labels")
        return drop(f"{why}, which takes {what}: --data {data} or more")
    return None


@register("rule")
def time_is_there(situation: Situation, candidate: Candidate) -> Verdict | None:
    """What is part of a training run needs time to train.

    Source: the recipe's driver, gate, penalty and recovery.
    """
    if candidate.trains and situation.retraining.none:
        return drop("it is part of a training run, and there is no retraining: --retrain 2h or more")
    return None


@register("rule")
def epochs_suffice(situation: Situation, candidate: Candidate) -> Verdict | None:
    """The time allowed is held against the training runs that a recipe takes.

    A run of less than one epoch cannot be told to work; below five it is a short one. Where nobody says how long an
    epoch takes (``--epoch``), recipes of many runs are demoted.

    Source: runs as the recipe has them: rounds times the length of the recovery; the bounds are ours.
    """
    if not candidate.trains or situation.retraining.none:
        return None
    runs, allowed = candidate.runs, situation.retraining.allowed
    if allowed is None:
        if runs > 2 and situation.retraining.seconds is not None:
            time = spoken(situation.retraining.seconds)
            return demote(
                f"it takes {runs:.3g} training runs; whether they fit into {time} is not known: say --epoch 10m", 1.5
            )
        return None
    if allowed < runs:
        return drop(f"it takes {runs:.3g} training runs, and there is time for {allowed:.3g} epochs in all")
    if allowed < SHORT * runs:
        return demote(f"its {runs:.3g} training runs would be {allowed / runs:.3g} epochs each: short ones", 1.0)
    return None


@register("rule")
def scratch_throws_weights_away(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Masks before training, sparse training from the start and rewinding to the first weights train everything anew.

    Source: SNIP, arXiv 1810.02340; RigL, arXiv 1911.11134; the lottery ticket, arXiv 1803.03635. That masks before
    training stay below magnitude after it: Frankle et al., arXiv 2009.08576.
    """
    if not candidate.from_scratch or situation.weights == "init":
        return None
    if situation.data != "training":
        return drop("it trains from the start and makes no use of the trained weights: that takes --data training")
    return demote("it trains from the start, though trained weights are there", 2.0)


@register("rule")
def weights_say_something(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Weights that were never trained say nothing of what may go after training.

    Source: what ``when`` is of the method; the survey, arXiv 2308.06767, on pruning before and after training.
    """
    if situation.weights == "init" and candidate.when == "after" and not situation.trains:
        return drop("it prunes a trained model, and this one is not trained: train it first, or allow --retrain")
    return None


@register("rule")
def goal_is_within_reach(situation: Situation, candidate: Candidate) -> Verdict | None:
    """A method that cannot bring what is wanted on this hardware is dropped, with the figure that says so.

    Source: the measured figures that ship with the package (``speed.json``), and what the hardware computes.
    """
    return drop(candidate.unreached) if candidate.unreached else None


@register("rule")
def solver_is_quick_enough(situation: Situation, candidate: Candidate) -> Verdict | None:
    """A solver that states its operations refuses or takes very long on large models.

    Source: the solver's knob ``max_flops``; OBC, arXiv 2208.11580: cubic in the width for each row.
    """
    limited = "max_flops" in get("solver", candidate.recipe.solver).knobs
    size = situation.parameters or 0
    if limited and size > 50_000_000:
        return drop(f"its solver is cubic in the width for each row: too slow for {size / 1e6:.0f}M parameters")
    return None
