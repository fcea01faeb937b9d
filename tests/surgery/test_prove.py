"""The proof holds for what is right, and fails for what is wrong."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import nets
from torch import Tensor, nn

from secateur import Recipe
from secateur.errors import ModelError, SecateurError
from secateur.graph import Dependencies, dependencies, trace
from secateur.measure.flops import flops
from secateur.structured import StructuredPlan, plan_structured
from secateur.surgery import Proof, prove
from secateur.surgery.prove import masked_outputs, outputs, wake
from secateur.surgery.shrink import kept_by_name, shrink

module = importlib.import_module("secateur.surgery.prove")  # the function of this name hides it in the package


def planned(model: nn.Module, example: Any, target: str = "params 40%", **options: Any) -> StructuredPlan:
    return plan_structured(model, Recipe.of("magnitude"), target=target, multiple=1, example=example, **options)


def inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(example)) if isinstance(example, Mapping) else ((example,), {})


def doubled(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    args, kwargs = inputs(example)
    return tuple(double(x) for x in args), {k: double(x) for k, x in kwargs.items()}


def awake(name: str) -> tuple[nn.Module, Dependencies, tuple[Any, ...], dict[str, Any]]:
    """A network in float64, awake and analysed."""
    model, example = nets.build(name)
    args, kwargs = doubled(example)
    model.double()
    wake(model)
    return model, dependencies(trace(model, args, kwargs)), args, kwargs


def first(found: Dependencies, family: int = 0, count: int = 2) -> frozenset[int]:
    """The labels of the first units of a family."""
    return frozenset().union(*(u.gone for u in found.families[family].units[:count]))


@pytest.mark.parametrize("name", nets.NETS)
def test_a_smaller_network_computes_what_the_masked_one_does(name: str) -> None:
    model, example = nets.build(name)
    args, kwargs = inputs(example)
    before = nets.snapshot(model)
    plan = planned(model, example)
    assert plan.before["params"] == nets.parameters(model)
    assert plan.before["flops"] == flops(model, *args, **kwargs).total
    if name in nets.WHOLE:
        assert not plan.proof.proven and not plan.kept and plan.after == plan.before
        assert all(f.reason and f.kept == f.units for f in plan.families) and any("not met" in n for n in plan.notes)
        with pytest.raises(ModelError, match="nothing can be removed"):
            plan.shrink()
        return
    assert plan.proof.proven and plan.proof.error is not None and plan.proof.error <= 1e-9
    assert plan.proof.effect > 1e-6  # what goes mattered, so that the proof says something
    small = plan.shrink()
    assert plan.after["params"] == nets.parameters(small) < nets.parameters(model)
    assert plan.after["flops"] == flops(small, *args, **kwargs).total < plan.before["flops"]
    assert nets.same(before, model)
    if name in nets.STATISTICS:
        return
    masked = plan.mask().double()  # by hand: zeros in place, and no help with statistics
    args, kwargs = doubled(example)
    for a, b in zip(outputs(masked, args, kwargs), outputs(small.double(), args, kwargs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in nets.NETS if n not in nets.WHOLE])
def test_a_proof_leaves_the_model_as_it_was(name: str) -> None:
    model, found, args, kwargs = awake(name)
    before = nets.snapshot(model)
    prove(model, found, first(found, len(found.families) - 1, 1), args, kwargs)
    assert nets.same(before, model)


def moved(kept: Mapping[str, Mapping[int, Any]], model: nn.Module) -> dict[str, dict[int, Any]]:
    """As many positions, one further on."""
    shapes = {n: p.shape for n, p in [*model.named_parameters(), *model.named_buffers()]}
    return {n: {a: np.sort((p + 1) % shapes[n][a]) for a, p in axes.items()} for n, axes in kept.items()}


@pytest.mark.parametrize("name", ["residual", "vgg", "fused-qkv", "gru", "depthwise"])
def test_other_positions_of_the_same_count_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found, args, kwargs = awake(name)
    gone = first(found, count=1)
    assert prove(model, found, gone, args, kwargs).proven

    def wrong(small: nn.Module, kept: Any, mends: Any = ()) -> None:
        one = next(n for n, axes in kept.items() if 1 in axes)  # the reader, but not the writer
        shrink(small, {**kept, **moved({one: kept[one]}, small)}, mends)

    monkeypatch.setattr(module, "shrink", wrong)
    proof = prove(model, found, gone, args, kwargs)
    assert not proof.proven and proof.error is not None and proof.error > 1e-3
    assert "computes something else" in proof.reason


def test_two_layers_with_each_others_positions_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = nets.noise(4, 5).double()
    found = dependencies(trace(model, (x,)))
    gone = frozenset().union(*(u.gone for u in [*found.families[0].units[:3], *found.families[1].units[4:7]]))
    assert prove(model, found, gone, (x,), {}).proven

    def swapped(small: nn.Module, kept: Any, mends: Any = ()) -> None:
        a, b = kept["0.weight"][0], kept["2.weight"][0]
        assert len(a) == len(b)
        shrink(small, {**kept, "0.weight": {0: b}, "0.bias": {0: b}}, mends)

    monkeypatch.setattr(module, "shrink", swapped)
    assert not prove(model, found, gone, (x,), {}).proven


def test_a_plan_leaves_alone_what_is_not_proven_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(small: nn.Module, kept: Any, mends: Any = ()) -> None:
        shrink(small, {**kept, **moved({n: kept[n] for n in kept if n.startswith("c2")}, small)}, mends)

    monkeypatch.setattr(module, "shrink", wrong)
    model, example = nets.build("vgg")
    plan = planned(model, example)
    reasons = {f.name.split()[0]: f.reason for f in plan.families}
    assert "computes something else" in reasons["c2.weight:0"] and "c2.weight:0" in str(plan)
    assert not reasons["f1.weight:0"] and plan.proof.proven and set(plan.kept) == {"f1.weight", "f1.bias", "f2.weight"}


def halves(m: Any, x: Tensor) -> Tensor:
    """Reads two parts of one layer at an offset, and runs at any width."""
    y = m.up(x)
    return m.o(F.relu(m.a(x))) * y[..., : m.cut].sum(-1, keepdim=True) * y[..., m.cut :].sum(-1, keepdim=True)


def test_offsets_in_the_code_run_and_are_wrong() -> None:
    layers = {"a": nn.Linear(5, 16), "o": nn.Linear(16, 2), "up": nn.Linear(5, 8)}
    fixed = nets.Call(lambda m, x: halves(m, x), **layers)
    type_level = type("Fixed", (nets.Call,), {"cut": 4})  # a number that the instance does not hold: as a literal
    fixed.__class__ = type_level
    plan = planned(fixed, nets.noise(4, 5), target="params 30%")
    reasons = {f.name.split()[0]: f.reason for f in plan.families}
    assert "computes something else" in reasons["up.weight:0"] and not reasons["a.weight:0"]
    assert plan.proof.proven and plan.shrink().up.out_features == 8 > plan.shrink().a.out_features - 8
    assert "up.weight:0" in str(plan) and "left alone" in str(plan)


def test_offsets_that_the_module_keeps_are_mended() -> None:
    model = nets.Call(halves, a=nn.Linear(5, 16), o=nn.Linear(16, 2), up=nn.Linear(5, 8), cut=4).double()
    x = nets.noise(4, 5).double()
    found = dependencies(trace(model, (x,)))
    left = [u for f in found.families for u in f.units if f.name == "up.weight:0" and u.places]
    proof = prove(model, found, left[0].gone, (x,), {})
    assert proof.proven and [(m.attribute, m.old, m.new) for m in proof.mends] == [("cut", 4, 3)]


def test_waking_makes_a_branch_of_zeros_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = nets.build("scaled")
    model.double()
    x = example.double()
    found = dependencies(trace(model, (x,)))
    branch = next(i for i, f in enumerate(found.families) if f.name == "f.weight:0")

    def wrong(small: nn.Module, kept: Any, mends: Any = ()) -> None:
        shrink(small, {**kept, **moved({"h.weight": kept["h.weight"]}, small)}, mends)

    monkeypatch.setattr(module, "shrink", wrong)
    asleep = prove(model, found, first(found, branch), (x,), {})
    assert asleep.proven and asleep.effect == 0.0  # wrong, and nothing shows it
    wake(model)
    proof = prove(model, found, first(found, branch), (x,), {})
    assert not proof.proven and proof.effect > 1e-6
    monkeypatch.undo()
    assert prove(model, found, first(found, branch), (x,), {}).proven
    assert not any(f.reason for f in planned(*nets.build("scaled")).families)


def test_waking_is_repeatable_and_touches_only_what_sleeps() -> None:
    model, _ = nets.build("scaled")
    one, two, other = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    wake(one)
    wake(two)
    wake(other, seed=1)
    assert nets.same(nets.snapshot(one), two) and not nets.same(nets.snapshot(one), other)
    for name, parameter in model.named_parameters():
        asleep = float((parameter.max() - parameter.min()).detach()) < 1e-3
        assert torch.equal(parameter, one.get_parameter(name)) != asleep
        assert float(one.get_parameter(name).detach().abs().max()) > 1e-2
    norm = nn.BatchNorm2d(4)
    wake(norm)
    assert norm.running_var is not None and float(norm.running_var.min()) >= 0.5 and len(norm.running_var.unique()) == 4


def test_masking_restores_the_model_when_its_code_fails() -> None:
    model, found, args, kwargs = awake("vgg")
    before = nets.snapshot(model)
    with pytest.raises(RuntimeError):
        masked_outputs(model, found, first(found), (args[0][:, :1],), kwargs)
    assert nets.same(before, model)


def test_a_code_that_does_not_take_other_sizes_is_a_reason() -> None:
    model = nets.Call(lambda m, x: m.b(m.a(x).view(4, 8)), a=nn.Linear(5, 8), b=nn.Linear(8, 3)).double()
    x = nets.noise(4, 5).double()
    found = dependencies(trace(model, (x,)))
    proof = prove(model, found, first(found), (x,), {})
    assert proof == Proof(False, None, proof.effect, (), proof.reason) and "RuntimeError: shape" in proof.reason


def test_nothing_gone_is_proven_at_no_effect() -> None:
    model, found, args, kwargs = awake("residual")
    proof = prove(model, found, frozenset(), args, kwargs)
    assert proof.proven and proof.error == proof.effect == 0.0 and kept_by_name(found, frozenset()) == {}


def test_a_path_that_depends_on_the_values_is_refused_or_proven() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        h = h * 2 if float(h.norm()) > m.limit else h.transpose(1, 2).transpose(1, 2).clone()
        return m.o(m.n(h))

    for limit in np.arange(2.0, 8.0, 0.5).tolist():
        torch.manual_seed(0)
        model = nets.Call(forward, a=nn.Linear(5, 8), n=nn.LayerNorm(8), o=nn.Linear(8, 2), limit=limit)
        try:
            planned(model, nets.noise(2, 6, 5))
        except SecateurError:
            continue


class Result:
    """An output that is no container torch knows."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("kind", ["object", "integers", "no batch"])
def test_without_outputs_to_compare_nothing_is_proven(kind: str) -> None:
    wrap = {"object": Result, "integers": lambda y: y.argmax(-1), "no batch": lambda y: y}[kind]
    model = nets.Call(lambda m, x: wrap(m.b(F.relu(m.a(x)))), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    try:
        plan = planned(model, nets.noise(0 if kind == "no batch" else 4, 5))
    except SecateurError:
        return
    assert not plan.proof.proven and not plan.kept


def test_not_a_number_in_a_later_output_is_found_out() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.a(x))
        return m.b(h), m.c(h) * (1.0 if h.shape[-1] == 8 else float("nan"))

    model = nets.Call(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3), c=nn.Linear(8, 3))
    assert not planned(model, nets.noise(4, 5)).proof.proven


def test_what_the_example_does_not_reach_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = nets.Two()
    plan = planned(model, {"x": nets.noise(3, 4)})
    assert not any(name.startswith("b.") for name in plan.kept)
    assert any("b." in note and "not read" in note for note in plan.notes)


def windowed(m: Any, x: Tensor) -> Tensor:
    """Reads the last tokens only, as many as a number says that has nothing to do with the width."""
    return m.b(F.relu(m.a(x)))[:, -m.window :]


def test_numbers_that_only_happen_to_equal_a_size_stay() -> None:
    torch.manual_seed(0)
    model = nets.Call(windowed, a=nn.Linear(5, 8), b=nn.Linear(8, 3), window=8)
    plan = planned(model, nets.noise(2, 4, 5))
    assert plan.proof.proven and plan.shrink().window == 8


def flat(m: Any, x: Tensor) -> Tensor:
    """As many heads as the layer before has channels; the heads can be any number that divides."""
    x = m.b(F.gelu(m.a(x)))
    q, k, v = (layer(x).view(*x.shape[:2], m.heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_another_number_of_heads_is_found_out_where_attention_is_flat() -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 2), "b": nn.Linear(2, 8), "o": nn.Linear(8, 3), "v": nn.Linear(8, 8)}
    model = nets.Call(flat, q=nn.Linear(8, 8), k=nn.Linear(8, 8), heads=2, **layers).double()
    with torch.no_grad():
        for parameter in (*model.q.parameters(), *model.k.parameters()):
            parameter.mul_(3e-3)
    x = nets.noise(2, 6, 5).double()
    found = dependencies(trace(model, (x,)))
    inner = next(i for i, f in enumerate(found.families) if f.name == "a.weight:0")
    proof = prove(model, found, first(found, inner, 1), (x,), {})
    assert proof.proven and not proof.mends and proof.error is not None and proof.error <= 1e-12


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_a_convolution_is_that_of_its_input(groups: int, layout: torch.memory_format) -> None:
    conv = nn.Conv2d(8, 16, 3, groups=groups).double()
    x = nets.noise(2, 8, 6, 6).double().contiguous(memory_format=layout)
    with torch.no_grad():
        expected = conv(x)
    (found,) = outputs(conv, (x,), {})
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
