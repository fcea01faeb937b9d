"""Does a part keep its contract? What every registered part passes, and a plug-in's tests can call.

After scikit-learn's ``check_estimator``: each check raises `AssertionError` saying which promise is broken.

>>> from secateur.testing import check_criterion
>>> import secateur.criteria
>>> check_criterion("wanda")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .allocation import LayerFacts, Sketch
from .checks import check_card, check_gate, check_penalty
from .checks import say as _say
from .errors import RecipeError
from .granularity import parse
from .registry import Part, get
from .search import explore, known_optimum
from .select import select
from .solvers.base import Solved
from .solvers.curvature import Curvature

__all__ = [
    "check_allocation",
    "check_card",
    "check_criterion",
    "check_gate",
    "check_granularity",
    "check_penalty",
    "check_solver",
]

#: Makes a fact of a layer: ``(shape (o, i), generator, dtype) -> fact``.
Maker = Callable[[tuple[int, int], torch.Generator, torch.dtype], Any]


def _normal(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=g, dtype=dtype)


def _positive(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, generator=g, dtype=dtype) + 0.1


def _gram(shape: tuple[int, int], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    x = torch.randn(3 * shape[1], shape[1], generator=g)
    return x.t() @ x  # statistics of inputs are float32 whatever the weight is


def _fisher_blocks(shape: tuple[int, int], g: torch.Generator, block: int = 10) -> Tensor:
    count = -(-shape[0] * shape[1] // block)
    x_pnb = torch.randn(count, 2 * block, block, generator=g)
    return x_pnb.mT @ x_pnb / (2 * block) + 0.1 * torch.eye(block)


_MAKERS: dict[str, Maker] = {
    "weight": _normal,
    "score": _positive,
    "gradient": _normal,
    "hessian": _normal,
    "hessian_gradient": _normal,
    "meta_gradient": _normal,
    "flow": _positive,
    "tangent": _normal,
    "fisher": _positive,
    "fisher_inverse": _positive,
    "fisher_blocks": lambda s, g, d: _fisher_blocks(s, g),
    "granularity": lambda s, g, d: parse("element"),
    "input_norm": lambda s, g, d: _positive(s[1:], g, d),
    "input_mean": lambda s, g, d: _normal(s[1:], g, d),
    "input_var": lambda s, g, d: _positive(s[1:], g, d),
    "input_abs": lambda s, g, d: _positive(s[1:], g, d),
    "input_nonzero": lambda s, g, d: torch.rand(s[1:], generator=g).to(d),
    "gram": _gram,
    "curvature": lambda s, g, d: Curvature(_gram(s, g, d)),
    "tokens": lambda s, g, d: 3 * s[1],
    "generator": lambda s, g, d: g,
    "mask": lambda s, g, d: torch.rand(s, generator=g) < 0.5,
    "momentum": _normal,
    "movement": _normal,
    "sensitivity": _positive,
    "uncertainty": _positive,
    "sign": lambda s, g, d: torch.rand(s, generator=g) < 0.5,
}

#: Facts that a layer may have as zeros everywhere: dead weights, dead inputs, a flat loss.
_MAY_VANISH = ("weight", "gradient", "hessian", "fisher", "input_norm", "input_mean", "input_var", "input_abs")


def _facts(
    part: Part,
    needs: tuple[str, ...],
    shape: tuple[int, int],
    dtype: torch.dtype,
    facts: Mapping[str, Maker],
    seed: int = 0,
) -> dict[str, Any]:
    """The named facts, drawn from ``seed``: the same call gives equal facts."""
    makers = {**_MAKERS, **facts}
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in needs:
        assert name in makers, _say(part, f"needs '{name}', which is not a known fact; pass facts={{'{name}': maker}}")
        made[name] = makers[name](shape, generator, dtype)
    return made


def _tensor(value: Any) -> Tensor | None:
    """The tensor of a fact, if it has one."""
    if isinstance(value, Curvature):
        return value.gram
    return value if isinstance(value, Tensor) else None


def _copies(facts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: t.clone() for k, v in facts.items() if (t := _tensor(v)) is not None}


def _check_unmodified(part: Part, facts: Mapping[str, Any], before: Mapping[str, Tensor]) -> None:
    for name, value in before.items():
        now = _tensor(facts[name])
        assert now is not None and torch.equal(now, value), _say(part, f"modifies its input '{name}'")


def check_criterion(name: str, facts: Mapping[str, Maker] | None = None) -> None:
    """A criterion is a pure function from the facts it names to one finite float for each weight.

    Args:
        name: of a registered criterion.
        facts: makers of facts that secateur does not know, by name.
    """
    part, facts = get("criterion", name), facts or {}
    check_card(part)
    if part.facts.get("of"):
        return _check_unit_criterion(part, facts)
    for shape in ((6, 8), (1, 8), (6, 1)):
        for dtype in (torch.float32, torch.float64):
            given = _facts(part, part.needs, shape, dtype, facts)
            before = _copies(given)
            score = part(given)
            assert isinstance(score, Tensor), _say(part, f"returns {type(score).__name__}, not a tensor")
            assert tuple(score.shape) == shape, _say(
                part, f"returns shape {tuple(score.shape)} for a weight of {shape}"
            )
            assert score.dtype in (torch.float32, torch.float64), _say(
                part, f"returns {score.dtype}, not float32 or better"
            )
            assert torch.isfinite(score).all(), _say(part, "returns scores that are not finite")
            _check_unmodified(part, given, before)
            again = part(_facts(part, part.needs, shape, dtype, facts))
            assert torch.equal(score, again), _say(part, "gives different scores for the same facts")
    for zero in set(part.needs) & set(_MAY_VANISH) - facts.keys():
        given = _facts(part, part.needs, (6, 8), torch.float32, facts)
        given[zero] = torch.zeros_like(given[zero])
        assert torch.isfinite(part(given)).all(), _say(part, f"is not finite where '{zero}' is zero")
    _check_scales(part, facts)


def _check_unit_criterion(part: Part, makers: Mapping[str, Maker]) -> None:
    """A criterion of whole blocks, of experts, of tokens, of exits or of scales gives one finite number for each."""
    units = 6
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "scale": torch.randn(units, generator=generator),
        "unit_change": torch.randn(3, units, generator=generator),
        "unit_curvature": torch.randn(6, units, generator=generator),
        "unit_trace": torch.randn(units, generator=generator),
        "unit_flops": torch.randint(1, 9, (units,), generator=generator),
        "unit_square": torch.rand(units, generator=generator),
        "unit_size": torch.randint(1, 9, (units,), generator=generator),
        "map_rank": torch.rand(units, generator=generator),
        "map_independence": torch.rand(units, generator=generator),
        "block_cosine": torch.rand(units, generator=generator),
        "block_loss": torch.rand(units, generator=generator),
        "block_path": torch.randn(units + 1, 3, 4, generator=generator),
        "block_free": torch.ones(units, dtype=torch.bool),
        "expert_tokens": torch.randint(0, 9, (units,), generator=generator),
        "expert_gain": torch.rand(units, generator=generator),
        "token_key": torch.randn(units, 4, generator=generator),
        "token_free": torch.ones(units, dtype=torch.bool),
        "token_attention": torch.rand(2, 3, units, generator=generator),
        "exit_logits": torch.randn(units, 5, generator=generator),
        "state_before": torch.randn(units, 4, generator=generator),
        "state_after": torch.randn(units, 4, generator=generator),
        "token_position": torch.randperm(units, generator=generator),
        "activation": torch.randn(units, generator=generator),
        "expert_weight": torch.rand(units, generator=generator),
        "channel_size": torch.rand(4, generator=generator),
        "channel_map": torch.randn(units, 9, generator=generator),
        "gate_weight": torch.randn(units, 4, generator=generator),
        "gate_bias": torch.randn(units, generator=generator),
        "count": 2,
    }
    for name, maker in makers.items():
        given[name] = maker((units, units), generator, torch.float32)
    for name in part.needs:
        assert name in given, _say(part, f"needs '{name}', which is not a known fact; pass facts={{'{name}': maker}}")
    facts = {n: given[n] for n in part.needs}
    before = _copies(facts)
    score = part(facts)
    assert tuple(score.shape) == (units,), _say(part, f"returns shape {tuple(score.shape)} for {units} units")
    assert torch.isfinite(score).all(), _say(part, "returns scores that are not finite")
    _check_unmodified(part, facts, before)


def _check_scales(part: Part, facts: Mapping[str, Maker]) -> None:
    """``scales={"weight": 2}`` promises: with the weight times c, the scores are times c^2."""
    for fact, degree in part.facts.get("scales", {}).items():
        assert fact in part.needs, _say(part, f"declares a scale law for '{fact}', which it does not need")
        score = part(_facts(part, part.needs, (6, 8), torch.float64, facts))
        for c in (0.25, 3.0):
            given = _facts(part, part.needs, (6, 8), torch.float64, facts)
            value = given[fact]
            given[fact] = Curvature(value.gram * c) if isinstance(value, Curvature) else value * c
            close = torch.allclose(part(given), score * c**degree, rtol=1e-4, atol=0)
            assert close, _say(part, f"does not scale with degree {degree} in '{fact}', as it declares")


_SHAPES = [(8, 16), (12, 12), (16, 48), (30, 30), (32, 64), (64, 256)]


def _divided(text: str) -> tuple[int, int]:
    """A small shape that the granularity divides."""
    granularity = parse(text)
    for shape in _SHAPES:
        try:
            granularity.pool_shape(*shape)
        except RecipeError:
            continue
        return shape
    raise AssertionError(f"granularity '{text}' divides none of {_SHAPES}")


def check_granularity(text: str) -> None:
    """A granularity cuts a matrix so that each element is in exactly one unit, and puts it together again."""
    granularity, shape = parse(text), _divided(text)
    o, i = shape

    def holds(promise: bool, broken: str) -> None:
        assert promise, f"granularity '{text}' {broken}"

    again = parse(granularity.name)
    holds(again.name == granularity.name, f"is not read back from its name '{granularity.name}'")
    pools, units, elements = granularity.pool_shape(o, i)
    holds(pools * units * elements == o * i, f"cuts {shape} into {pools} x {units} x {elements}")
    number = torch.arange(o * i).reshape(o, i)
    cut = granularity.split(number)
    holds(tuple(cut.shape) == (pools, units, elements), f"splits into {tuple(cut.shape)}, not as pool_shape says")
    holds(torch.equal(cut.reshape(-1).sort().values, number.reshape(-1)), "does not put each element into one unit")
    holds(torch.equal(granularity.join(cut, shape), number), "does not join what it split")
    strided = number.t().contiguous().t()
    holds(torch.equal(granularity.split(strided), cut), "splits a transposed view differently")
    score = torch.rand(o, i, generator=torch.Generator().manual_seed(0))
    for keep in (0.0, 0.5, 0.37, 1.0) if granularity.keep is None else (granularity.keep,):
        mask = granularity.unpool(select(granularity.pool(score), keep), shape)
        holds(mask.dtype == torch.bool and tuple(mask.shape) == shape, "makes a mask of the wrong type or shape")
        holds(int(mask.sum()) == granularity.kept(shape, keep), f"keeps another number than it says at keep {keep}")
        whole = granularity.split(mask)
        holds(bool((whole == whole[..., :1]).all()), "breaks a unit")
    holds(i % granularity.run == 0, f"has runs of {granularity.run} columns, which do not divide {i}")
    if granularity.keep is not None:
        holds(0.0 < granularity.keep <= 1.0, f"fixes a keep of {granularity.keep}")


def check_solver(name: str, facts: Mapping[str, Maker] | None = None) -> None:
    """A solver returns a mask with exactly the granularity's count and a weight that is zero outside it.

    A granularity that the solver cannot do must be refused with `RecipeError`; ``element`` may not be. The weights of a
    solver that quantizes lie on the grid that it returns.
    """
    part, facts = get("solver", name), facts or {}
    check_card(part)
    for text in ("element", "row", "2:4", "block(2,4)"):
        granularity = parse(text)
        for keep in (0.25, 0.5, 1.0) if granularity.keep is None else (granularity.keep,):
            _check_solved(part, text, keep, facts)


def _check_solved(part: Part, text: str, keep: float, facts: Mapping[str, Maker]) -> None:
    quantizes = bool(part.facts.get("quantizes"))
    granularity, shape = parse(text), (8, 64 if quantizes else 16)
    where = f"at {text}, keep {keep:g}"

    def given() -> dict[str, Any]:
        needs = tuple(n for n in part.needs if n not in ("keep", "granularity", "mask"))
        made = _facts(part, needs, shape, torch.float32, facts)
        if "mask" in part.needs:
            score = torch.rand(shape, generator=torch.Generator().manual_seed(1))
            made["mask"] = granularity.unpool(select(granularity.pool(score), keep), shape)
        return {**made, "keep": keep, "granularity": granularity}

    inputs = given()
    before = _copies(inputs)
    try:
        solved = part(inputs)
    except RecipeError:
        assert text != "element", _say(part, "refuses granularity element")
        return
    assert isinstance(solved, Solved), _say(part, f"returns {type(solved).__name__}, not Solved")
    weight, mask = solved.weight, solved.mask
    assert mask.dtype == torch.bool and tuple(mask.shape) == shape, _say(
        part, "returns a mask of another type or shape"
    )
    assert tuple(weight.shape) == shape, _say(part, "returns a weight of another shape")
    assert weight.dtype in (torch.float32, torch.float64), _say(part, f"returns a weight in {weight.dtype}")
    assert torch.isfinite(weight).all(), _say(part, f"returns a weight that is not finite {where}")
    kept, wanted = int(mask.sum()), granularity.kept(shape, keep)
    assert kept == wanted, _say(part, f"keeps {kept} weights, not {wanted}, {where}")
    units = granularity.split(mask)
    assert (units == units[..., :1]).all(), _say(part, f"breaks a unit {where}")
    if granularity.keep is not None:
        each = units[..., 0].sum(1)
        assert (each == each[0]).all(), _say(part, f"does not keep the same number in each pool {where}")
    assert not weight[~mask].any(), _say(part, f"leaves weights outside its mask {where}")
    assert quantizes == (solved.grid is not None), _say(
        part, "returns a grid if, and only if, it says that it quantizes"
    )
    if solved.grid is not None:
        assert torch.equal(solved.grid.round(weight), weight), _say(part, f"leaves weights beside its grid {where}")
    assert all(isinstance(note, str) for note in solved.notes), _say(part, "returns notes that are not text")
    _check_unmodified(part, inputs, before)
    again = part(given())
    same = torch.equal(again.weight, weight) and torch.equal(again.mask, mask)
    assert same, _say(part, f"gives different results for the same facts {where}")


def check_allocation(name: str, facts: Mapping[str, Maker] | None = None) -> None:
    """An allocation meets the total within one weight, with keeps in [0, 1], whatever the order of the layers."""
    part, facts = get("allocation", name), facts or {}
    check_card(part)
    layers = _some_layers(part, facts)
    total = sum(x.numel for x in layers.values())
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        keeps = part.function(layers, sparsity=sparsity)
        assert keeps.keys() == layers.keys(), _say(part, "does not answer for exactly the layers it was given")
        where = f"at sparsity {sparsity:g}"
        for layer, keep in keeps.items():
            assert 0.0 <= keep <= 1.0, _say(part, f"keeps a fraction {keep} of {layer} {where}")
        kept = sum(keeps[n] * x.numel for n, x in layers.items())
        wanted = (1.0 - sparsity) * total
        assert abs(kept - wanted) <= 1.0, _say(part, f"keeps {kept:.1f} weights, not {wanted:.1f}, {where}")
        for names in (list(reversed(layers)), sorted(layers, key=lambda n: n[::-1])):
            permuted = part.function({n: layers[n] for n in names}, sparsity=sparsity)
            same = all(abs(permuted[n] - keeps[n]) <= 1e-6 for n in layers)
            assert same, _say(part, f"depends on the order of the layers {where}")


def _some_layers(part: Part, facts: Mapping[str, Maker]) -> dict[str, LayerFacts]:
    """Layers of several shapes in three blocks, with what the allocation measures of each."""
    measure = part.facts.get("measure")
    layers = {}
    for number, (o, i) in enumerate([(32, 16), (8, 64), (16, 16), (48, 24), (4, 8), (64, 32)]):
        sketch = None
        if measure is not None:
            needs = tuple(inspect.signature(measure).parameters)
            given = _facts(part, needs, (o, i), torch.float32, facts, seed=number)
            value = measure(*given.values())
            # Layers differ: without this every layer would be treated alike and nothing would be tested.
            sketch = None if value is None else Sketch(value * (1.0 + number))
        layers[f"blocks.{number // 2}.{number}"] = LayerFacts(
            (o, i), o * i, kind="linear", block=f"blocks.{number // 2}", sketch=sketch, dims=(o, i)
        )
    return layers


def check_search(name: str, options: Mapping[str, Any] | None = None) -> None:
    """A strategy meets the target with every proposal, repeats itself from a seed, and finds more than it was given.

    Args:
        options: knobs that make it quick.
    """
    part = get("search", name)
    check_card(part)
    space, value, optimum = known_optimum()
    trials = explore(space, name, value, budget=60, seed=1, knobs=options)
    assert 1 < len(trials) <= 60, _say(part, f"takes {len(trials)} evaluations of 60")
    for trial in trials:
        assert trial.cost == space.limit, _say(part, f"spends {trial.cost}, not {space.limit}")
    record = [t.to_dict() for t in trials[:30]]
    again = explore(space, name, value, budget=60, seed=1, knobs=options, record=record)
    same = [t.counts for t in again] == [t.counts for t in trials]
    assert same, _say(part, "gives different proposals for the same seed, or does not go on where it was stopped")
    uniform, best = trials[0].value, max(t.value for t in trials)
    assert best > uniform + 0.3 * (optimum - uniform), _say(part, f"finds {best:.3f}, uniform is {uniform:.3f}")
