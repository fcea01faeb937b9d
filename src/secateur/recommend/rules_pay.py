"""Rules about what pays: reasons for and against methods that could be used, each with its source."""

from __future__ import annotations

from ..registry import get, register
from . import speed
from .candidate import Candidate
from .situation import KINDS, Situation
from .verdict import Verdict, demote, promote


@register("rule")
def baselines_are_to_be_beaten(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Random choice is what every method must beat, not what one uses.

    Source: the family ``baseline``.
    """
    return demote("it is a baseline: at random", 4.0) if candidate.family == "baseline" else None


@register("rule")
def zeros_pay_from(situation: Situation, candidate: Candidate) -> Verdict | None:
    """On a CPU with our kernels zeros pay from a share on that was measured; elsewhere they make nothing faster.

    Source: ``speed.json``, from benchmarks/results/sparse.json and sparse_avx512.json.
    """
    if candidate.structure not in ("weights", "block") or situation.goal.quantity in ("size", "params"):
        return None
    gone, hardware = 1 - candidate.aim.keep, situation.hardware
    if not hardware.kernels:
        return demote(f"{hardware} has no kernels for zeros: nothing becomes faster or smaller in use", 1.0)
    start = speed.pays_from(situation.kind, hardware)
    if start is not None and gone < start:
        what = speed.zeros(situation.kind, hardware, gone)
        return demote(
            f"{100 * gone:.3g} % zeros do not pay yet: they do from {100 * start:.3g} % on ({what.source})", 1.0
        )
    return None


@register("rule")
def two_of_four_pay_on_ampere(situation: Situation, candidate: Candidate) -> Verdict | None:
    """2:4 pays on NVIDIA from Ampere on; elsewhere the same number of zeros anywhere costs less accuracy.

    Source: Mishra et al., arXiv 2104.08378. LLaMA-2-7B, half of the weights: 6.42 anywhere, 11.02 as 2:4 (wanda,
    arXiv 2306.11695).
    """
    if candidate.structure != "pattern":
        return None
    if situation.hardware.two_in_four:
        return promote(f"{situation.hardware} multiplies two of four at up to twice the rate", 1.0)
    pattern = candidate.recipe.granularity
    return demote(f"{pattern} costs more than zeros anywhere, and {situation.hardware} has no arithmetic for it", 1.5)


@register("rule")
def smaller_models_pay_anywhere(situation: Situation, candidate: Candidate) -> Verdict | None:
    """A smaller dense model is faster and smaller on any hardware, without kernels or formats of its own.

    Source: benchmarks/results/structured.json; the survey, arXiv 2308.06767, on universal speedup.
    """
    quick = situation.goal.quantity in ("latency", "memory", "flops")
    if candidate.structure in ("units", "depth") and quick and not situation.hardware.kernels:
        return promote("a smaller dense model is faster on any hardware", 1.0)
    return None


@register("rule")
def language_models_without_training(situation: Situation, candidate: Candidate) -> Verdict | None:
    """A language model that is not retrained does not bear more than about half of its weights gone.

    Source: benchmarks/results/quality.json: SmolLM2-135M, perplexity 24.6 dense, 39.5 at 50 %, 69.6 at 60 %, 150 at
    70 % (sparsegpt). LLaMA-7B at 70 %: 5.68 dense, 19.49 the best of them (OWL, arXiv 2310.05175).
    """
    if not situation.language or situation.trains or candidate.structure not in ("weights", "block", "pattern"):
        return None
    if candidate.aim.keep < 0.4 - 1e-9:
        gone = 100 * (1 - candidate.aim.keep)
        return demote(
            f"a language model that is not retrained does not bear {gone:.3g} % zeros: perplexity doubles or worse", 2.0
        )
    return None


@register("rule")
def units_of_language_models(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Taking units or blocks out of a language model without retraining costs more than zeros do.

    Source: benchmarks/results/structured_quality.json: SmolLM2-135M, a fifth of the parameters gone, perplexity 26.3
    dense, 39.4 the best (flap, refitted); LLM-Pruner, arXiv 2305.11627: 63.25 to 59.23 at a fifth.
    """
    if (
        situation.language
        and not situation.trains
        and candidate.structure in ("units", "depth")
        and candidate.aim.keep < 0.8
    ):
        return demote("units of a language model that is not retrained cost much beyond a fifth of it", 2.0)
    return None


@register("rule")
def magnitude_fails_in_language_models(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Magnitude alone, in one shot, breaks language models: few inputs are very large.

    Source: wanda, arXiv 2306.11695: LLaMA-2-7B at 50 %, magnitude 14.89, wanda 6.42; here 398 and 52.9 for SmolLM2-135M
    (benchmarks/results/quality.json).
    """
    if situation.language and not candidate.trains and not candidate.needs_inputs:
        return demote("it does not look at inputs, of which a few are very large in a language model", 2.0)
    return None


@register("rule")
def survivors_that_move(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Where nothing is retrained, a solver that moves the weights that stay makes up for part of what goes.

    Source: SparseGPT, arXiv 2301.00774; LLaMA-7B at 70 %: wanda 85.77, sparsegpt 26.30 (OWL, arXiv 2310.05175).
    """
    moves = "curvature" in get("solver", candidate.recipe.solver).needs or candidate.recovery == "block"
    if moves and not candidate.trains:
        return promote("the weights that stay make up for part of what goes", 1.0)
    return None


@register("rule")
def healing_is_worth_it(situation: Situation, candidate: Candidate) -> Verdict | None:
    """A smaller model whose readers are not refitted is often broken; refitting takes inputs without labels.

    Source: benchmarks/results/fashion.json: half of the operations gone, 12 % without, 90 % with it (l1-norm).
    """
    if candidate.structure != "units" or candidate.trains:
        return None
    if candidate.recovery == "units":
        return promote("what reads the units is refitted on data", 1.0)
    return demote("nothing is refitted: a smaller model that is not healed is often broken", 2.0)


@register("rule")
def collapse_of_layers(situation: Situation, candidate: Candidate) -> Verdict | None:
    """One threshold for magnitudes of all layers empties layers at extreme sparsity.

    Source: SynFlow, arXiv 2006.05467, and its released results: VGG-16, CIFAR-10, from 81 % to chance between 99.4
    and 99.7 % sparsity; ResNet-18 before training at 96.8 %.
    """
    one_threshold = candidate.recipe.allocation in ("global", "raw") and candidate.recipe.steps == 1
    if (
        one_threshold
        and candidate.aim.keep <= 0.05
        and candidate.structure != "units"
        and candidate.recipe.gate == "none"
    ):
        return demote("one threshold for all layers, in one step, can empty a layer at this sparsity", 1.5)
    return None


@register("rule")
def layers_differ(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Where little stays, layers of different sizes should not keep the same share.

    Source: RigL, arXiv 1911.11134: ResNet-50 at 90 %, uniform 72.02, ERK 73.07; OWL, arXiv 2310.05175: LLaMA-7B at
    70 %, 85.77 uniform, 24.55 not.
    """
    if candidate.recipe.allocation == "uniform" and candidate.aim.keep <= 0.3 and candidate.structure == "weights":
        return demote("every layer keeps the same share, which costs at this sparsity", 1.0)
    return None


@register("rule")
def rounds_at_high_sparsity(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Where much goes, going there in steps with training between them is better than one cut; else one cut is enough.

    Source: Han et al., arXiv 1506.02626; Janusz et al., arXiv 2508.13836: one shot at low, rounds at high ratios.
    """
    if not (candidate.trains and situation.trains) or candidate.from_scratch:
        return None
    stepwise = (
        candidate.recipe.steps > 1
        or candidate.recipe.driver.startswith("gradual")
        or candidate.recipe.schedule == "cubic"
    )
    if candidate.aim.keep <= 0.2 and stepwise:
        return promote("it goes to a high sparsity in steps, with training between them", 1.0)
    if candidate.aim.keep <= 0.2 and candidate.when == "after" and candidate.recipe.steps == 1:
        return demote("it cuts to a high sparsity at once", 0.5)
    return None


@register("rule")
def training_heals(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Where the model may be trained, what is not trained leaves most of the gain unused.

    Source: oBERT, arXiv 2203.07259: SQuAD at 90 % with training 88.31 of 88.54; network slimming, arXiv 1708.06519:
    32.5 % before fine-tuning, 93.78 % after it.
    """
    if situation.trains and not candidate.trains:
        return demote("it does not use the training that is allowed; combine it with --recovery finetune", 1.5)
    if situation.trains and get("recovery", candidate.recipe.recovery).facts.get("teacher"):
        return promote("it learns from the dense model", 0.5)
    return None


@register("rule")
def shown_on_other_models(situation: Situation, candidate: Candidate) -> Verdict | None:
    """A method that was made for, and shown on, one kind of model is a guess on another.

    Source: the family of the method: ``llm`` or ``cnn``.
    """
    if candidate.family == "llm" and not situation.language and situation.kind != "encoder-decoder":
        return demote(f"it was shown on language models, and this is a {KINDS[situation.kind]}", 0.5)
    if candidate.family == "cnn" and situation.kind not in ("cnn", "other"):
        return demote(f"it was shown on convolutional networks, and this is a {KINDS[situation.kind]}", 1.0)
    return None


@register("rule")
def rewinding_beats_fine_tuning(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Training on from an earlier point of the run, at its learning rates, heals more than fine-tuning at the last one.

    Source: Renda, Frankle and Carbin, arXiv 2003.02389: rewinding weights or learning rates.
    """
    if situation.trains and candidate.recipe.recovery == "rewind":
        return promote("it trains again at the rates of the run, which heals more than fine-tuning does", 1.0)
    return None


@register("rule")
def learned_masks_need_long_runs(situation: Situation, candidate: Candidate) -> Verdict | None:
    """Masks that are learned add what must be tuned, and in large comparisons do not beat gradual magnitude.

    Source: Gale, Elsen and Hooker, The state of sparsity, arXiv 1902.09574: against L0 and variational dropout.
    """
    if candidate.recipe.gate != "none" and candidate.structure == "weights":
        return demote("what is learned beside the weights must be tuned, and gradual magnitude is seldom worse", 1.0)
    return None


@register("rule")
def weights_that_are_trained(situation: Situation, candidate: Candidate) -> Verdict | None:
    """A supermask leaves the weights as they were drawn: of interest, and below what training them gives.

    Source: Ramanujan et al., arXiv 1911.13299: ResNet-50 68.6 %, where training gives 76 %.
    """
    if candidate.recipe.gate == "none":
        return None
    if candidate.recipe.knobs_of("gate").get("train_weights") is False and candidate.when == "before":
        return demote("it leaves the weights as they were drawn", 2.0)
    return None
