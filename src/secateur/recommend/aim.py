"""What a method would have to reach in a situation: its granularity, its sparsity or target, and whether it can."""

from __future__ import annotations

from dataclasses import replace

from ..errors import SecateurError
from . import speed
from .candidate import Aim, Candidate, Expected
from .situation import Situation

#: Bits that a mask adds to each weight of 32 bits, as a share of it.
_MASK = 1 / 32
_PAPER = "NVIDIA gives twice the arithmetic of a matrix product as the bound (arXiv 2104.08378); not measured here"


def fit(candidate: Candidate, situation: Situation) -> Candidate:
    """The method as it would be used: which granularity, how sparse, and what speed is to be expected."""
    made = _healed(candidate, situation)
    if made.structure in ("weights", "block", "pattern"):
        return _weights(_patterned(made, situation), situation)
    return {"units": _units, "depth": _depth, "experts": _experts}[made.structure](made, situation)


def _healed(candidate: Candidate, situation: Situation) -> Candidate:
    """Without data a smaller model is not refitted."""
    if candidate.recovery == "units" and situation.data == "none":
        return candidate.fitted(recovery="none")
    return candidate


def _patterned(candidate: Candidate, situation: Situation) -> Candidate:
    """Two of four where that is the only sparsity that the hardware has arithmetic for, and the goal allows half."""
    goal = situation.goal
    wanted = goal.quantity == "latency" or (goal.assumed and goal.keep == 0.5)
    if not (situation.hardware.two_in_four and wanted and "N:M" in candidate.granularities):
        return candidate
    if candidate.structure == "pattern":
        return candidate
    try:
        return candidate.fitted(granularity="2:4")
    except SecateurError:
        return candidate


def _weights(candidate: Candidate, situation: Situation) -> Candidate:
    goal, hardware = situation.goal, situation.hardware
    fixed = 1 - candidate.recipe.sparsity if candidate.structure == "pattern" else None
    expected, unreached = Expected(None, source="zeros make nothing faster without kernels for them"), ""
    keep = goal.keep
    if goal.quantity == "size":
        keep = goal.keep - _MASK
        if keep < 0.01:
            unreached = f"a mask alone takes {100 * _MASK:.0f} % of the size, and {100 * goal.keep:.3g} % may remain"
    elif goal.quantity == "memory" and not hardware.kernels:
        unreached = f"zeros take memory as all weights do: {hardware} has no kernels that read packed weights"
    elif goal.quantity == "latency":
        keep, expected, unreached = _fast(candidate, situation)
    elif hardware.kernels:
        expected = speed.zeros(situation.kind, hardware, 1 - keep)
    if goal.quantity != "latency" and hardware.two_in_four and candidate.structure == "pattern":
        expected = Expected(None, source=_PAPER)
    if not unreached and fixed is not None and keep < fixed - 1e-9:
        stays = f"{candidate.recipe.granularity} leaves {100 * fixed:.3g} % of the weights"
        unreached = f"{stays}, and {100 * keep:.3g} % may remain"
    if fixed is not None:
        keep = fixed
        if hardware.kernels:
            expected = speed.zeros(situation.kind, hardware, 1 - keep)
    keep = round(min(max(keep, 0.001), 0.999), 4)
    made = candidate if fixed is not None or unreached else candidate.fitted(sparsity=round(1 - keep, 4))
    return replace(made, aim=Aim(made.structure, "weights", keep), speed=expected, unreached=unreached)


def _fast(candidate: Candidate, situation: Situation) -> tuple[float, Expected, str]:
    """The share of the weights that may stay where a speed is wanted, what is expected, and why it cannot be."""
    goal, hardware, kind = situation.goal, situation.hardware, situation.kind
    if hardware.two_in_four:
        if candidate.structure != "pattern":
            return 0.5, Expected(None), f"{hardware} has no arithmetic for zeros in any place: only two of four pay"
        if goal.factor > 2:
            return (
                0.5,
                Expected(None),
                f"two of four at most double a matrix product, and {goal.factor:.3g} times are wanted",
            )
        return 0.5, Expected(None, source=_PAPER), ""
    if not hardware.kernels:
        return 0.5, Expected(None), f"{hardware} has no kernels for zeros: nothing becomes faster by them"
    found = speed.sparsity_for(kind, hardware, goal.factor)
    if found is None:
        most = speed.zeros(kind, hardware, 0.9)
        value = "nothing is measured" if most.value is None else f"{most.value:.2f} times as fast with 90 % zeros"
        return 0.1, most, f"zeros do not make it {goal.factor:.3g} times as fast: {value} ({most.source})"
    return 1 - found, speed.zeros(kind, hardware, found), ""


def _units(candidate: Candidate, situation: Situation) -> Candidate:
    goal, kind = situation.goal, situation.kind
    quantity = {"latency": "flops", "size": "params", "sparsity": "params"}.get(goal.quantity, goal.quantity)
    keep = goal.keep
    if goal.quantity == "latency" and situation.hardware.family == "cpu":
        keep = speed.flops_for(kind, goal.factor)
    expected = speed.units(kind, keep)
    if situation.hardware.family != "cpu":
        expected = Expected(
            None, source=f"a smaller model is faster anywhere; by how much is not measured on {situation.hardware}"
        )
    keep = round(min(max(keep, 0.01), 0.99), 4)
    made = candidate.fitted(sparsity=round(1 - keep**0.5, 2))
    return replace(made, aim=Aim("units", quantity, keep), speed=expected)


def _depth(candidate: Candidate, situation: Situation) -> Candidate:
    goal = situation.goal
    keep = round(min(max(goal.keep, 0.01), 0.99), 4)
    expected = Expected(1 / keep, source="as many times fewer blocks; the rest of the model is not counted")
    made = candidate.fitted(sparsity=round(1 - keep, 4))
    return replace(made, aim=Aim("depth", "weights", keep), speed=expected)


def _experts(candidate: Candidate, situation: Situation) -> Candidate:
    goal = situation.goal
    keep = round(min(max(goal.keep, 0.01), 0.99), 4)
    unreached = ""
    if goal.quantity in ("latency", "flops"):
        unreached = "each token goes through as many experts as before: fewer of them save memory, not time"
    made = candidate.fitted(sparsity=round(1 - keep, 4))
    return replace(
        made, aim=Aim("experts", "weights", keep), speed=Expected(1.0, source="as many experts run for a token"),
        unreached=unreached,
    )  # fmt: skip


def target_of(candidate: Candidate, situation: Situation) -> str | None:
    """What is written behind ``--target``; None where the recipe's own sparsity says it."""
    if candidate.structure != "units":
        return None
    goal = situation.goal
    if goal.quantity == "latency" and situation.hardware.family == "cpu":
        return f"latency {100 * (1 - goal.keep):.4g}%"  # measured on the machine that prunes
    return candidate.aim.text
