"""Targets, counts, choices and notes of a plan, and that planning changes nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests import nets
from torch import nn

import secateur
from secateur import Recipe
from secateur.errors import ModelError, NumericalError, RecipeError, SecateurError
from secateur.graph import Family, Unit, dependencies, trace
from secateur.measure.flops import flops
from secateur.structured import StructuredPlan, Target, plan_structured
from secateur.structured.allocate import gone, ranked, rounded, step_of, uniform
from secateur.structured.score import unit_scores, weight_scores


def planned(model: nn.Module, example: Any, target: str = "params 40%", **options: Any) -> StructuredPlan:
    recipe = options.pop("recipe", None) or Recipe.of("magnitude", **options.pop("fields", {}))
    return plan_structured(model, recipe, target=target, example=example, **{"multiple": 1, **options})


def wide() -> nn.Module:
    """Wide enough that rounding hardly counts."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 64, 3), nn.ReLU(), nn.Conv2d(64, 5, 1)
    ).eval()


IMAGE = nets.noise(1, 3, 6, 6)


@pytest.mark.parametrize(
    "text, quantity, before, remaining, shown",
    [
        ("params 50%", "params", 1000, 500, "params to 50%"),
        ("flops 40%", "flops", 1000, 600, "flops to 60%"),
        ("FLOPs to 30%", "flops", 1000, 300, "flops to 30%"),
        ("params to 2M", "params", 9e6, 2e6, "params to 2,000,000"),
        ("params to 1.5k", "params", 9e6, 1500, "params to 1,500"),
        ("flops to 3g", "flops", 9e9, 3e9, "flops to 3,000,000,000"),
        ("flops to 3B", "flops", 9e9, 3e9, "flops to 3,000,000,000"),
        ("params to 700", "params", 1000, 700, "params to 700"),
        ("  params   12.5 % ", "params", 1000, 875, "params to 87.5%"),
    ],
)
def test_targets(text: str, quantity: str, before: float, remaining: float, shown: str) -> None:
    target = Target.parse(text)
    assert target.quantity == quantity and target.remaining(before) == pytest.approx(remaining)
    assert str(target) == shown
    assert Target.parse(str(target).replace(",", "")) == target


@pytest.mark.parametrize(
    "text",
    [
        *("", "params", "50%", "params fifty%", "weights 50%", "params 50 percent", "params -50%", "params 50%%"),
        *("params 0%", "params 100%", "params to 0%", "params to 100%", "params 150%", "params to 150%"),
        *("params 2M", "flops 1000", "params 5q", "params to"),
    ],
)
def test_targets_that_are_not_understood(text: str) -> None:
    with pytest.raises(RecipeError, match="target"):
        Target.parse(text)


@pytest.mark.parametrize("text", ["params 5.0.1%", "params .%"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="target"):
        Target.parse(text)


def test_a_plan_refuses_what_it_cannot_read() -> None:
    model = wide()
    for target in ("half", "params 2M"):
        with pytest.raises(RecipeError):
            planned(model, IMAGE, target)
    with pytest.raises(RecipeError, match="uniform"):
        planned(model, IMAGE, fields={"allocation": "erk"})
    with pytest.raises(RecipeError, match="coupled"):
        planned(model, IMAGE, where="everywhere")
    for example in (3, None, [], "text"):
        with pytest.raises(ModelError, match="example"):
            planned(model, example)
    for wrong in (nets.noise(1, 4, 6, 6), {}, {"image": IMAGE}, (IMAGE, IMAGE)):
        with pytest.raises(ModelError, match="cannot be copied and run"):
            planned(model, wrong)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError):
        planned(model, IMAGE)


@pytest.mark.parametrize("kind", ["lazy", "meta", "graph"])
def test_models_that_cannot_be_copied_and_run(kind: str) -> None:
    x = nets.noise(2, 4)
    if kind == "lazy":
        model: nn.Module = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))
    else:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    if kind == "meta":
        model, x = model.to("meta"), x.to("meta")
    if kind == "graph":
        model.cached = model(x)  # not a leaf: deepcopy refuses
    try:
        planned(model, x)
    except ModelError:
        return


@pytest.mark.parametrize("quantity", ["params", "flops"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("share", [20, 50, 80])
def test_targets_are_met_closely(quantity: str, allocation: str, share: int) -> None:
    model = wide()
    plan = planned(model, IMAGE, f"{quantity} {share}%", fields={"allocation": allocation})
    limit = plan.before[quantity] * (1 - share / 100)
    assert plan.proof.proven and limit - 0.05 * plan.before[quantity] <= plan.after[quantity] <= limit
    assert not any("not met" in note for note in plan.notes)


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("target", ["flops 70%"])
def test_a_target_is_met_or_the_note_says_not(name: str, target: str) -> None:
    plan = planned(*nets.build(name), target)
    quantity = plan.target.quantity
    met = plan.after[quantity] <= plan.target.remaining(plan.before[quantity])
    assert met != any("the target is not met" in note for note in plan.notes)


def test_a_count_that_remains() -> None:
    plan = planned(wide(), IMAGE, "params to 9k")
    assert 8000 < plan.after["params"] <= 9000
    whole = planned(wide(), IMAGE, "params to 1G")
    assert whole.after == whole.before and not whole.kept and not any("not met" in note for note in whole.notes)
    with pytest.raises(ModelError, match="nothing can be removed"):
        whole.shrink()


def family(count: int, width: int = 1) -> Family:
    units = [Unit(frozenset({k}), {0: np.arange(width) + k * width}) for k in range(count)]
    return Family("f", units, (0,))


@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from([1, 2, 8, 16]), st.integers(1, 3))
def test_counts_are_rounded_and_never_run_out(count: int, keep: float, multiple: int, width: int) -> None:
    some = family(count, width)
    step = step_of(some, multiple)
    assert step == (multiple if width == 1 and count >= 2 * multiple else 1)
    kept = rounded(some, keep, multiple)
    assert 1 <= kept <= count and kept >= count / 10
    assert kept % step == 0 or kept == count
    assert abs(kept - keep * count) <= step or kept <= count / 10 + step
    assert uniform([some], [np.zeros(count)], keep, multiple) == [kept]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_sizes_are_multiples_of_eight(allocation: str) -> None:
    plan = planned(wide(), IMAGE, "params 45%", multiple=8, fields={"allocation": allocation})
    assert [f.units for f in plan.families] == [48, 64] and all(f.kept % 8 == 0 for f in plan.families)
    least = planned(wide(), IMAGE, "params 99.9%", multiple=8)
    assert [f.kept for f in least.families] == [8, 8] and "not met" in least.notes[0]
    assert [f.kept for f in planned(wide(), IMAGE, "params 99.9%").families] == [5, 7]  # a tenth, rounded up


def test_users_say_which_multiple() -> None:
    plan = secateur.prune(wide(), "l1-norm", target="params 45%", example=IMAGE, multiple=16)
    assert all(f.kept % 16 == 0 for f in plan.families) and plan.shrink()(IMAGE).shape[1] == 5
    assert secateur.plan(wide(), "l1-norm", target="params 45%", example=IMAGE, multiple=16).after == plan.after
    with pytest.raises(RecipeError, match="multiple is 0"):
        secateur.plan(wide(), "l1-norm", target="params 45%", example=IMAGE, multiple=0)


def test_uniform_keeps_fractions_and_global_follows_scores() -> None:
    model = wide()
    with torch.no_grad():
        model[3].weight[10:] *= 1e-3  # most of the second layer is worth nothing
    even = {f.name: f.kept / f.units for f in planned(model, IMAGE).families}
    assert abs(even["0.weight:0"] - even["3.weight:0"]) < 0.03
    plan = planned(model, IMAGE, fields={"allocation": "global"})
    kept = {f.name: f.kept / f.units for f in plan.families}
    assert kept["3.weight:0"] < even["3.weight:0"] < kept["0.weight:0"]
    assert set(range(10)) <= set(plan.kept["3.weight"][0].tolist())
    scores = [np.array([1.0, 2.0, 3.0, 6.0]), np.array([10.0, 20.0, 30.0, 60.0])]
    assert ranked([family(4), family(4)], scores, 0.5, 1) == [2, 2]  # scales between families do not matter


def test_what_is_kept_scores_highest() -> None:
    model = wide()
    plan = planned(model, IMAGE)
    found = dependencies(trace(model, (IMAGE,)))
    expected = [
        model[0].weight.abs().sum((1, 2, 3)) + model[3].weight.abs().sum((0, 2, 3)),
        model[3].weight.abs().sum((1, 2, 3)) + model[5].weight.abs().sum((0, 2, 3)),
    ]
    scores = unit_scores(found, weight_scores(model, Recipe.of("magnitude"), {}))
    for score, hand, name in zip(scores, expected, ("0.weight", "3.weight"), strict=True):
        np.testing.assert_allclose(score, hand.detach().double().numpy(), rtol=1e-5)
        kept = plan.kept[name][0]
        lost = np.setdiff1d(np.arange(len(score)), kept)
        assert score[kept].min() >= score[lost].max()
    outputs = unit_scores(found, weight_scores(model, Recipe.of("magnitude"), {}), "output")
    hand = model[0].weight.abs().sum((1, 2, 3)).detach().double().numpy()
    np.testing.assert_allclose(outputs[0], hand, rtol=1e-5)
    assert len(gone(found.families, scores, [40, 60])) == 8 + 4


def test_only_and_skip() -> None:
    model, example = nets.build("vgg")
    everything = {f.name: f for f in planned(model, example).families}
    assert not any(f.reason for f in everything.values())
    for fields, cut in (
        ({"only": ["c2"]}, {"c1.weight:0", "c2.weight:0"}),  # the first is what c2 reads
        ({"only": ["f2*"]}, {"f1.weight:0"}),
        ({"skip": ["c1"]}, {"c2.weight:0", "f1.weight:0"}),
        ({"skip": ["f1", "c1.weight"]}, set()),
        ({"only": ["c*"], "skip": ["f1"]}, {"c1.weight:0"}),
    ):
        plan = planned(model, example, fields=fields)
        assert {f.name for f in plan.families if not f.reason} == cut
        assert all(f.kept == f.units for f in plan.families if f.reason)
        assert all(f.reason.startswith(("not chosen", "chosen by")) for f in plan.families if f.name not in cut)
        if cut:
            assert plan.proof.proven and {n.split(".")[0] for n in plan.kept} <= {n for c in cut for n in reads(c)}


def reads(name: str) -> set[str]:
    order = ["c1", "c2", "f1", "f2"]
    k = order.index(name.split(".")[0])
    return {order[k], order[k + 1]}


def same(a: StructuredPlan, b: StructuredPlan) -> bool:
    if a.kept.keys() != b.kept.keys():
        return False
    return all(np.array_equal(p, b.kept[n][axis]) for n, axes in a.kept.items() for axis, p in axes.items())


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_the_same_seed_gives_the_same_plan(criterion: str) -> None:
    model, example = nets.build("residual")
    plans = [planned(model, example, fields={"criterion": criterion, "seed": s}) for s in (1, 1, 2)]
    assert same(plans[0], plans[1]) and str(plans[0]) == str(plans[1])
    assert same(plans[0], plans[2]) == (criterion == "magnitude")
    assert nets.same(nets.snapshot(plans[0].shrink()), plans[1].shrink())


@pytest.mark.parametrize("name", ["residual", "unet", "tied", "gru", "scaled"])
def test_planning_and_shrinking_change_nothing(name: str) -> None:
    model, example = nets.build(name)
    model.train()
    next(model.children()).eval()
    tensors = {k: t.data_ptr() for k, t in model.state_dict().items()}
    before, modes, shown = nets.snapshot(model), [m.training for m in model.modules()], str(model)
    random, gradients = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    values = list(example.values()) if isinstance(example, dict) else [example]
    inputs = [x.clone() for x in values]
    small = planned(model, example).shrink()
    assert nets.same(before, model) and tensors == {k: t.data_ptr() for k, t in model.state_dict().items()}
    assert [m.training for m in model.modules()] == modes and str(model) == shown
    assert not any(m._forward_hooks or m._forward_pre_hooks for top in (model, small) for m in top.modules())
    assert torch.equal(random, torch.get_rng_state()) and all(map(torch.equal, values, inputs))
    assert [p.requires_grad for p in model.parameters()] == gradients and all(
        p.grad is None for p in model.parameters()
    )
    assert [m.training for m in small.modules()] == modes and type(small) is type(model)
    assert not {t.data_ptr() for t in small.state_dict().values()} & set(tensors.values())
    assert torch.is_grad_enabled() and torch.backends.mkldnn.enabled and torch.backends.mha.get_fastpath_enabled()


def test_a_plan_prints_as_a_table() -> None:
    plan = planned(*nets.build("unet"))
    text = str(plan)
    for family in plan.families:
        assert family.name in text
    for word in ("params", "flops", "frozen:", "proven, error", "output of the model", "note: normalizations"):
        assert word in text
    assert f"{plan.before['params']:,}" in text and f"{plan.after['flops']:,}" in text
    assert "NOT proven" in str(planned(*nets.build("single")))


def test_a_smaller_model_can_be_made_smaller_again() -> None:
    model = wide()
    once = planned(model, IMAGE, "params 30%").shrink()
    plan = planned(once, IMAGE, "params 30%")
    twice = plan.shrink()
    assert plan.proof.proven and nets.parameters(twice) == plan.after["params"]
    assert nets.parameters(twice) < 0.5 * nets.parameters(model) and flops(twice, IMAGE).total == plan.after["flops"]


def test_masking_works_in_place() -> None:
    model = wide()
    plan = planned(model, IMAGE)
    assert plan.mask() is model
    lost = np.setdiff1d(np.arange(48), plan.kept["0.weight"][0])
    assert float(model[0].weight[lost].detach().abs().sum()) == 0 == float(model[1].bias[lost].detach().abs().sum())
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGE), plan.shrink()(IMAGE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gqa", "mqa-fused"])
def test_heads_go_whole_where_single_dimensions_cannot(kind: str) -> None:
    plan = planned(*nets.build(kind), "params 30%")
    cut = [f.name for f in plan.families if f.kept < f.units and f.name.startswith("q.weight:0")]
    assert plan.proof.proven and cut


@pytest.mark.parametrize("name, share", [("shuffle", 20), ("gqa", 20), ("group-norm", 30)])
def test_far_more_than_asked_goes_only_with_a_note(name: str, share: int) -> None:
    plan = planned(*nets.build(name), f"params {share}%")
    beyond = plan.target.remaining(plan.before["params"]) - plan.after["params"]
    assert beyond <= 0.05 * plan.before["params"] or any("more" in note for note in plan.notes)


def test_models_of_functions_of_their_own() -> None:
    model = nets.Call(lambda m, x: torch.einsum("ti,ih->th", x, m.w), w=nn.Parameter(nets.noise(4, 3)))
    for net in (model, nn.ReLU()):
        with pytest.raises(SecateurError):
            planned(net, nets.noise(2, 4))
    gated = nets.Call(lambda m, x: m.b(F.glu(m.a(x))), a=nn.Linear(4, 16), b=nn.Linear(8, 2))
    plan = planned(gated, nets.noise(2, 4))
    assert plan.proof.proven or any("glu" in note for note in plan.notes)


def test_something_of_every_tensor_stays() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 1)]
    plan = planned(nn.Sequential(*layers), nets.noise(2, 3, 4, 4), "params 80%")  # as many groups as places
    assert all(len(p) for axes in plan.kept.values() for p in axes.values())


# -- bytes, latency, and criteria of whole units --------------------------------------------------------------------


def test_bytes_count_each_tensor_in_its_dtype() -> None:
    net = wide()
    plan = planned(net, IMAGE, "bytes 40%")
    assert plan.before["bytes"] == 4 * plan.before["params"] and plan.after["bytes"] == 4 * plan.after["params"]
    assert plan.after["bytes"] <= 0.6 * plan.before["bytes"]


@pytest.mark.parametrize("text", ["latency to 20", "params to 3ms", "latency to 5M"])
def test_units_belong_to_their_quantities(text: str) -> None:
    with pytest.raises(RecipeError, match="unit of time"):
        Target.parse(text)


def test_latency_targets() -> None:
    assert Target.parse("latency to 20ms").remaining(0.5) == pytest.approx(0.02)
    assert Target.parse("latency 40%").remaining(0.5) == pytest.approx(0.3)
    assert str(Target.parse("latency to 20ms")) == "latency to 20ms"


def test_the_latency_search_meets_a_target_on_a_clock_that_counts_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is replaced by FLOPs with an overhead, so that the search is tested and not the machine."""
    from secateur.structured import measured

    def clock(models: dict[str, nn.Module], args: Any, kwargs: Any) -> dict[str, float]:
        return {n: 1e-3 + 1e-9 * flops(m, *args, **kwargs).total for n, m in models.items()}

    monkeypatch.setattr(measured, "latency", clock)
    net, image = wide(), nets.noise(1, 3, 24, 24)

    def make(goal: Target) -> StructuredPlan:
        return planned(net, image, goal)  # type: ignore[arg-type]

    dense = clock({"net": net}, (image,), {})["net"]
    for share in (0.7, 0.5):
        wanted = Target("latency", fraction=share)
        plan = measured.plan_measured(net, wanted, image, make)
        reached = clock({"net": plan.shrink()}, (image,), {})["net"] / dense
        assert share * 0.93 <= reached <= share * 1.05, (share, reached, plan.notes)
        assert plan.target == wanted and plan.after["latency us"] < plan.before["latency us"]
    out_of_reach = measured.plan_measured(net, Target("latency", fraction=0.02), image, make)
    assert any("could only be brought to" in n for n in out_of_reach.notes)


def test_norm_scale_ranks_by_the_batch_norm_alone() -> None:
    net = wide()
    scale = torch.linspace(0.1, 1.0, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(3))]
    with torch.no_grad():
        net[1].weight.copy_(scale)  # type: ignore[index, union-attr]
    plan = planned(net, IMAGE, "params 30%", recipe=Recipe.of("network-slimming", recovery="none"))
    kept = plan.kept["0.weight"][0]
    lost = np.setdiff1d(np.arange(48), kept)
    assert scale[torch.from_numpy(lost)].max() < scale[torch.from_numpy(kept)].min()
    assert "3.weight" not in {n for n, axes in plan.kept.items() if 0 in axes}  # nothing normalizes behind it
    assert any("has no score" in f.reason for f in plan.families)


def test_channel_scores_look_at_readers_and_filter_scores_at_writers() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 17)[:, None].expand(16, 4))  # type: ignore[union-attr]
        net[2].weight.copy_(torch.arange(16.0, 0, -1)[None].expand(3, 16))  # type: ignore[union-attr]
    found = dependencies(trace(net, (nets.noise(2, 4),), {}))
    scores = weight_scores(net, Recipe.of("magnitude"), {})
    family = next(i for i, f in enumerate(found.families) if len(f) == 16)
    written = unit_scores(found, scores, "output")[family]
    read = unit_scores(found, scores, "input")[family]
    both = unit_scores(found, scores, "coupled")[family]
    assert np.allclose(written, 4 * np.arange(1, 17)) and np.allclose(read, 3 * np.arange(16, 0, -1))
    assert np.allclose(both, written + read)


def test_isomorphic_families_compete_only_with_their_like() -> None:
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            with torch.no_grad():
                self.up.weight.mul_(scale)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    net = nn.Sequential(nn.Linear(16, 16), nn.Sequential(Block(1.0), Block(4.0)), nn.Linear(16, 16)).eval()
    fields = {"allocation": "isomorphic", "granularity": "coupled", "skip": ["@residual"]}
    plan = planned(net, nets.noise(2, 16), "params 30%", fields=fields)
    kept = {f.name: f.kept for f in plan.families if len(f.name) and f.units == 32}
    assert len(kept) == 2 and len(set(kept.values())) > 1  # scores are divided by each family's mean
    residual = [f for f in plan.families if f.units == 16]
    assert residual and all(f.reason == "chosen by --skip" for f in residual)


def test_families_of_one_place_are_printed_on_one_line() -> None:
    from secateur.structured.plan import FamilyPlan, _grouped

    def family(k: int, kept: int, reason: str = "") -> FamilyPlan:
        return FamilyPlan(f"layers.{k}.conv2d.weight:0 x3", 8, kept, reason)

    lines = dict(_grouped([family(0, 4), family(1, 5), FamilyPlan("head.weight:0", 8, 8), family(11, 8, "no proof")]))
    assert lines == {
        "layers.#.conv2d.weight:0 x3  (2 of these)": "4 to 5 of 8, on average 4.5",
        "head.weight:0": "8 of 8",
        "layers.11.conv2d.weight:0 x3": "left alone: no proof",
    }


@pytest.mark.parametrize("schedule", ["linear", "cubic", "geometric"])
def test_rounds_end_at_the_target_and_are_proven_as_a_whole(schedule: str) -> None:
    import secateur

    net, x = wide(), nets.noise(4, 3, 8, 8)
    plan = secateur.plan(
        net, "wanda-sp", target="params 50%", example=x, data=[x, x], steps=3, schedule=schedule, recovery="refit",
    )  # fmt: skip
    assert isinstance(plan, StructuredPlan) and plan.proof.proven
    assert plan.after["params"] <= 0.5 * plan.before["params"]
    assert plan.after["params"] > 0.3 * plan.before["params"]
    small = plan.shrink()
    assert nets.parameters(small) == plan.after["params"]
    plan.mask()
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)


def test_rounds_are_composed() -> None:
    """Positions of a later round are among those that stayed."""
    from secateur.structured.rounds import _composed

    first = {"a": {0: np.array([0, 2, 3, 5])}}
    then = {"a": {0: np.array([1, 3]), 1: np.array([0])}, "b": {1: np.array([2])}}
    found = _composed(first, then)
    assert found["a"][0].tolist() == [2, 5] and found["a"][1].tolist() == [0] and found["b"][1].tolist() == [2]
    assert first["a"][0].tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2, "schedule": "linear", "target": "latency 20%"}, "met in one step"),
        ({"steps": 2, "schedule": "linear", "granularity": "depth"}, "go in one step"),
    ],
)
def test_what_rounds_cannot_do(options: dict[str, Any], message: str) -> None:
    import secateur

    with pytest.raises(RecipeError, match=message):
        secateur.plan(wide(), "magnitude", example=IMAGE, **{"target": "params 20%", **options})


def test_standardized_scores_are_means_of_standardized_positions() -> None:
    """A head of many positions lies near 0 where its positions differ as much among themselves as between heads."""
    net, example = nets.build("multihead")
    args, kwargs = ((), dict(example)) if isinstance(example, dict) else ((example,), {})
    found = dependencies(trace(net, args, kwargs))
    scores = weight_scores(net, Recipe.of("magnitude"), {})
    for family, level in zip(found.families, unit_scores(found, scores, "input", standardized=True), strict=True):
        used = [i for i in family.slots if any(n in scores for n in found.slots[i].names)]
        reads = [i for i in used if found.slots[i].axis == 1] or used
        if not reads or len(family) < 2:
            continue
        means = np.zeros(len(family))
        for i in reads:
            slot = found.slots[i]
            score = scores[next(n for n in slot.names if n in scores)].score
            line = score.sum([d for d in range(score.dim()) if d != slot.axis]).numpy() if score.dim() > 1 else score
            places = np.concatenate([u.places[i] for u in family.units])
            z = (np.asarray(line) - np.asarray(line)[places].mean()) / np.asarray(line)[places].std()
            means += [z[u.places[i]].sum() for u in family.units]
        widths = [sum(len(u.places[i]) for i in reads) for u in family.units]
        assert np.allclose(level, means / widths)
        assert abs(float(np.average(level, weights=widths))) < 1e-9


# -- what modules keep from one run to the next ----------------------------------------------------------------------


class Biased(nn.Module):
    """Attention weights with a bias that is gathered once for each device, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16, 4))
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 3)
        self.cache: dict[str, torch.Tensor] = {}
        self.table = {"one": torch.ones(3)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = str(x.device)
        if self.training or key not in self.cache:
            self.cache[key] = self.scale.sum(1)
        out: torch.Tensor = self.outer(torch.relu(self.inner(x)) * self.cache[key]) * self.table["one"]
        return out


@pytest.mark.parametrize("before", ["fresh", "run", "run with gradients"])
def test_what_a_module_keeps_from_earlier_runs_is_no_obstacle(before: str) -> None:
    torch.manual_seed(0)
    net, x = Biased().eval(), torch.randn(5, 6)
    if before != "fresh":
        with torch.set_grad_enabled(before != "run"):
            net(x)
    held = dict(net.cache)
    plan = planned(net, x, "params 40%")
    assert plan.proof.proven and all(net.cache[k] is v for k, v in held.items()) and len(held) == len(net.cache)
    small = plan.shrink()
    assert small.inner.weight.shape[0] < 16 and small.scale.shape[0] == small.inner.weight.shape[0]  # type: ignore
    plan.mask()
    net.cache.clear()
    torch.testing.assert_close(small(x), net(x))


class Positions(nn.Module):
    """Makes a buffer as it runs, for the size of its input, as ConViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(1, 3), persistent=False)
        self.place, self.inner, self.outer = nn.Linear(3, 16), nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.grid) != len(x):
            self.grid = torch.arange(3.0 * len(x), dtype=x.dtype).reshape(len(x), 3)
        out: torch.Tensor = self.outer(self.inner(x) + self.place(self.grid))
        return out


@pytest.mark.parametrize("run", [False, True])
def test_a_buffer_that_the_model_makes_as_it_runs(run: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Positions().eval(), torch.randn(5, 6)
    if run:
        net(x)
    plan = planned(net, x, "params 40%")
    assert plan.proof.proven
    small = plan.shrink()
    assert any("is made by the model as it runs" in f.reason for f in plan.families)
    small(torch.randn(7, 6))  # and so does the smaller one
    secateur.save(small, tmp_path / "small")
    again = secateur.load(tmp_path / "small", Positions().eval())
    assert torch.equal(again(x), small(x))


class Keeps(nn.Module):
    """Constants that a run reads whatever is there, and a place that a run fills."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = {"v": torch.full((3,), 10.0)}
        self.last: dict[str, torch.Tensor | None] = {"k": None}
        self.ready = False
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ready = True
        self.last["k"] = y = self.outer(torch.relu(self.inner(x)))
        for extra in self.extra.values():
            y = y + extra
        return y


def test_constants_stay_and_the_users_model_is_as_it_was() -> None:
    torch.manual_seed(0)
    net, x = Keeps().eval(), torch.randn(5, 6)
    plan = planned(net, x, "params 40%")
    assert plan.proof.proven and net.last == {"k": None} and not net.ready and list(net.extra) == ["v"]
    small = plan.shrink()
    plan.mask()
    torch.testing.assert_close(small(x), net(x))


def test_trying_shapes_without_data_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is done is a matter of time, so the plan must not depend on it."""
    proving = importlib.import_module("secateur.surgery.prove")  # the package has a function of this name
    made = []
    for costly in (0.0, float("inf")):
        monkeypatch.setattr(proving, "_COSTLY", costly)
        torch.manual_seed(0)
        plan = planned(wide(), IMAGE, "params 40%")
        made.append(({n: {a: list(p) for a, p in axes.items()} for n, axes in plan.kept.items()}, plan.proof.proven))
    assert made[0] == made[1] and made[0][1]


def test_planning_with_data_leaves_a_model_in_training_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(16, 8, 3))
    state = {n: t.clone() for n, t in net.train().state_dict().items()}
    data = [nets.noise(4, 3, 8, 8) for _ in range(2)]
    made = [secateur.plan(net, m, target="params 30%", example=data[0], data=data) for m in ("wanda-sp", "hrank")]
    assert all(plan.proof.proven for plan in made) and all(m.training for m in net.modules())
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())


def test_a_model_that_looks_at_values_is_not_judged_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) > 1e9:
                raise ValueError("too large")
            out: torch.Tensor = self.outer(torch.relu(self.inner(x)))
            return out

    proving = importlib.import_module("secateur.surgery.prove")
    monkeypatch.setattr(proving, "_COSTLY", 0.0)
    assert planned(Looks(), nets.noise(4, 6), "params 40%").proof.proven


def test_a_plan_runs_the_model_three_times_and_the_smaller_one_once() -> None:
    net, runs = wide(), []
    net.register_forward_pre_hook(lambda _, args: runs.append((args[0].dtype, args[0].device.type)))  # copies keep it
    plan = planned(net, IMAGE)
    assert plan.proof.proven and runs == [(torch.float64, "cpu")] * 3  # traced, masked, smaller
    plan.shrink()
    assert runs[3:] == [(torch.float32, "cpu")]


def test_a_model_whose_first_run_leaves_a_buffer_is_traced_again() -> None:
    net, runs = Positions(), []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    assert planned(net, nets.noise(2, 6)).proof.proven
    assert len(runs) == 5  # twice traced, once without the buffer, masked, smaller
    assert net.grid.shape == (1, 3)


def test_units_have_one_score_each_however_many_positions_they_take() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 4, 5))
    found = dependencies(trace(net, (nets.noise(1, 3, 2, 2),)))
    (family,) = (f for f in found.families if len(f) == 8)
    wide_slot = next(i for i in family.slots if found.slots[i].tensor is net[2].weight and found.slots[i].axis == 1)
    assert family.places(wide_slot).tolist() == [[4 * k + j for j in range(4)] for k in range(8)]
    assert [u.places[wide_slot].tolist() for u in family.units] == family.places(wide_slot).tolist()
