"""What a gate and a penalty promise, and the card of every part; `secateur.testing` has these and the others."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from .errors import RecipeError
from .granularity import Granularity, parse
from .learned import Gate, Now, Penalty
from .registry import Part, get


def say(part: Part, broken: str) -> str:
    """A broken promise, with the part's name."""
    return f"{part.kind} '{part.name}' {broken}"


def check_card(part: Part) -> None:
    """The docstring says what a reader needs: summary, when to choose it, source; a criterion's formula too."""
    wanted = ["summary", "source"] + (["formula"] if part.kind == "criterion" else [])
    wanted += [] if part.kind in ("rule", "advice") else ["choose"]  # those speak by themselves
    opens = {"choose": "Choose it ...", "source": "Source: ...", "formula": ":: s = ..."}
    for field in wanted:
        assert getattr(part.card, field), say(
            part, f"has no {field} in its docstring ({opens.get(field, 'first line')})"
        )
    assert part.card.source.endswith("."), say(part, "has a source that is not a sentence")
    for knob, value in part.knobs.items():
        given = part.kind == "allocation" and knob == "sparsity"  # the recipe's, not the part's
        assert given or value is not inspect.Parameter.empty, say(part, f"has a knob '{knob}' without a default")


def check_gate(name: str) -> None:
    """A gate computes finite weights of the same shape, a score, and, where it has one, a density in [0, 1].

    A granularity that the gate cannot do must be refused with `RecipeError`; at least one must be done. One that
    knows units of the whole model (the fact ``units``) is also shown a column of these, which compete.
    """
    part = get("gate", name)
    check_card(part)
    done = 0
    cases = [(text, (8, 16)) for text in ("element", "row", "2:4", "block(2,4)")]
    for text, shape in [*cases, ("element", (8, 1))] if part.facts.get("units") else cases:
        granularity = parse(text)
        keep = 0.5 if granularity.keep is None else granularity.keep
        try:
            made = _settled(part, granularity, keep, shape)
        except RecipeError:
            continue
        done += 1
        _check_gated(part, granularity, *made, f"at {text}")
        again = _settled(part, granularity, keep, shape)
        for mine, other in zip(made[2:], again[2:], strict=True):
            same = all(torch.equal(mine[k], other[k]) for k in {*mine, *other})
            assert same, say(part, f"is not the same for the same generator at {text}")
    assert done, say(part, "refuses every granularity")


def _settled(
    part: Part, granularity: Granularity, keep: float, shape: tuple[int, int]
) -> tuple[Gate, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A gate with the weight before it, what it learns and what it fixed."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    facts = {"weight": weight, "granularity": granularity, "generator": generator}
    facts["pool_shape"] = granularity.pool_shape(*shape)[:2]
    before = weight.clone()
    gate = part({n: facts[n] for n in part.needs})
    assert isinstance(gate, Gate), say(part, f"returns {type(gate).__name__}, not Gate")
    learned = {k: v.clone().float() for k, v in gate.learned.items()}
    fixed = dict(gate.settle(weight, learned, Now(3, 10, keep, torch.Generator().manual_seed(4))))
    assert torch.equal(weight, before), say(part, "modifies the weight")
    return gate, weight, {k: v.requires_grad_() for k, v in learned.items()}, fixed


def _check_gated(
    part: Part, granularity: Granularity, gate: Gate, weight: Tensor, learned: dict[str, Tensor],
    fixed: dict[str, Tensor], where: str,
) -> None:  # fmt: skip
    assert (gate.weight is None) != (gate.factor is None), say(part, "has to have either a weight or a factor")
    whole = (weight.shape[0], weight.shape[1])
    shape = whole if gate.factor is None else granularity.pool_shape(*whole)[:2]
    for training in (True, False):
        x = weight.clone().requires_grad_()
        if gate.weight is not None:
            made = gate.weight(x, learned, fixed, training)
        else:
            assert gate.factor is not None
            made = gate.factor(learned, fixed, training)
        assert tuple(made.shape) == shape, say(part, f"gives shape {tuple(made.shape)}, not {shape}, {where}")
        assert torch.isfinite(made).all(), say(part, f"gives weights that are not finite {where}")
        if training:
            inputs = [*learned.values(), *([x] if gate.weight is not None else [])]
            slopes = torch.autograd.grad(made.square().sum(), inputs, allow_unused=True)
            finite = all(s is None or torch.isfinite(s).all() for s in slopes)
            assert finite and any(s is not None and s.any() for s in slopes), say(part, f"has no gradient {where}")
    score = gate.score(weight, learned)
    assert tuple(score.shape) == shape and torch.isfinite(score).all(), say(part, f"has no score of all {where}")
    if gate.density is not None:
        density = gate.density(weight, learned, fixed)
        assert bool(((density >= 0) & (density <= 1)).all()), say(part, f"has a density outside [0, 1] {where}")
        assert density.requires_grad, say(part, "has a density that what is learned does not move")
    if gate.regularizer is not None:
        value = gate.regularizer(weight, learned, fixed)
        assert value.dim() == 0 and torch.isfinite(value), say(part, "has a regularizer that is no finite number")


def check_penalty(name: str) -> None:
    """A penalty adds a finite number, keeps shapes, and changes nothing but what it returns."""
    part = get("penalty", name)
    check_card(part)
    looks = {"unit": (2, 6, 3), "zero-invariant": (1, 6, 4), "scale": (1, 6, 1), "density": (), "regularizer": ()}
    assert part.facts.get("on") in looks, say(part, f"does not say what it looks at: on= one of {', '.join(looks)}")
    penalty = part.function()
    assert isinstance(penalty, Penalty), say(part, f"returns {type(penalty).__name__}, not Penalty")
    assert penalty.value or penalty.step, say(part, "neither adds to the loss nor makes a step")
    for zero in (False, True):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(looks[part.facts["on"]], generator=generator).abs() * (not zero)
        state = dict(penalty.start(x, Now(0, 20, 0.5, lr=0.1, final=0.5)))
        for at in range(1, 21):
            now, before = Now(at, 20, 0.5, lr=0.1, final=0.5), x.clone()
            if penalty.value is not None:
                y = x.clone().requires_grad_()
                value = penalty.value(y, state)
                assert value.dim() == 0 and torch.isfinite(value), say(part, "adds no finite number")
                (slope,) = torch.autograd.grad(value, y)
                assert torch.isfinite(slope).all(), say(part, f"has no finite gradient{' at zero' * zero}")
            state = dict(penalty.update(x, state, now))
            new = x if penalty.step is None else penalty.step(x, state, now)
            assert new.shape == x.shape and torch.isfinite(new).all(), say(part, "makes a step to another shape")
            assert torch.equal(x, before), say(part, "modifies its input")
            assert all(isinstance(v, Tensor) for v in state.values()), say(part, "remembers what is no tensor")
            x = new
