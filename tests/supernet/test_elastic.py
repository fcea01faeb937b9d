"""What may vary in a model, what it costs, and sub-networks that compute what the masked supernet does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import ModelError, RecipeError
from secateur.graph.trace import stored_tensors
from secateur.measure.flops import flops
from secateur.recipe import Recipe
from secateur.structured.allocate import gone
from secateur.structured.plan import zero
from secateur.supernet import Elastic, Supernet
from secateur.supernet.kernels import Kernel, add_matrices, center, elastic_kernels, mends, name_of, remove_matrices
from secateur.supernet.stages import removed_of, renamed, stages
from secateur.surgery.shrink import shrink
from tests.nets import Residual as Plain
from tests.nets import noise

from .nets import Convolutional, Transformer, X, perceptron

RECIPE = Recipe.of("l1-norm", recovery="none", allocation="uniform")
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutional,
    "transformer": Transformer,
    "perceptron": perceptron,
}


def made(kind: str) -> tuple[nn.Module, Elastic]:
    torch.manual_seed(0)
    net = MAKERS[kind]().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return net, Elastic(net, RECIPE, X, multiple=2)


@pytest.fixture(scope="module")
def all_made() -> dict[str, tuple[nn.Module, Elastic]]:
    return {kind: made(kind) for kind in MAKERS}


def drawn(elastic: Elastic, seed: int) -> tuple[int, ...]:
    return elastic.draw(torch.Generator().manual_seed(seed))


def test_what_may_vary_is_found(all_made: dict[str, Any]) -> None:
    nodes = {n.name: (n.units, list(n.sizes)) for n in all_made["convolutions"][1].nodes}
    assert nodes["stem.weight:0"] == (8, [2, 4, 6, 8])
    assert nodes["first 0-1"] == (2, [1, 2]) and nodes["second 0-2"] == (3, [2, 3])
    assert nodes["stem kernel"] == (7, [3, 5, 7]) and nodes["wide kernel"] == (5, [3, 5])
    assert not any("body" in n and "kernel" in n for n in nodes)  # 3x3 stay as they are
    names = [n.name for n in all_made["transformer"][1].nodes]
    assert "blocks 0-2" in names and any("attention" in n for n in names)
    assert len(all_made["perceptron"][1].nodes) == 2


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_costs_are_those_of_the_sub_network(kind: str, all_made: dict[str, Any], seed: int) -> None:
    net, elastic = all_made[kind]
    counts = drawn(elastic, seed)
    small = Supernet.small_of(net, elastic, counts)
    assert elastic.cost("params", counts) == sum(p.numel() for p in small.parameters())
    assert elastic.cost("flops", counts) == flops(small, X).total
    assert elastic.cost("bytes", counts) == 4 * elastic.cost("params", counts)
    assert elastic.cost("flops", elastic.most) == elastic.found.flops()
    more = tuple(max(a, b) for a, b in zip(counts, drawn(elastic, seed + 1), strict=True))
    for quantity in ("flops", "params"):
        assert elastic.cost(quantity, more) >= elastic.cost(quantity, counts)


def test_a_sub_network_is_the_masked_supernet_by_hand() -> None:
    """Exact: zeros for units that go, for blocks that are left out, and around smaller kernels."""
    net, elastic = made("convolutions")
    net, x = net.double(), X.double()
    for seed in range(4):
        counts = drawn(elastic, seed)
        super_ = Supernet(net, elastic)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if ".to_" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        small, cut = super_.small(counts), elastic.cut(counts)
        masked = super_.applied(counts)
        super_.close()
        zero(masked, cut.kept)
        for path, lost in cut.removed.items():
            for k in lost:
                for p in masked.get_submodule(f"{path}.{k}").parameters():
                    p.data.zero_()
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
        torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-10)
        assert float((masked(x) - net(x)).detach().abs().max()) > 1e-3  # or nothing would be shown


@pytest.mark.parametrize("kind", MAKERS)
def test_any_sub_network_is_proven(kind: str, all_made: dict[str, Any]) -> None:
    _, elastic = all_made[kind]
    for counts in (elastic.least, elastic.most, drawn(elastic, 3)):
        assert elastic.prove(counts).proven
    wrong = elastic.prove(elastic.least, smaller=lambda model, cut: broken(model, cut))
    assert not wrong.proven and "something else" in wrong.reason


def broken(model: nn.Module, cut: Any) -> nn.Module:
    from secateur.supernet.cut import made as built

    small = built(model, cut)
    with torch.no_grad():
        list(small.parameters())[-1].add_(0.1)
    return small


@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_reach_what_the_sub_network_has_and_nothing_else(kind: str) -> None:
    net, elastic = made(kind)
    super_ = Supernet(net, elastic)
    counts = elastic.least
    sub = super_.sub(counts)
    torch.testing.assert_close(sub(X), super_.small(counts)(X))
    before = {n: b.clone() for n, b in net.named_buffers()}
    super_.model.train()
    super_.sub(counts)(X).square().sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())  # its statistics are its own
    cut = elastic.cut(counts)
    for name, p in net.named_parameters():
        if cut.name(name) is None:
            assert p.grad is None
        elif p.grad is not None and name in cut.kept:
            for axis, stay in cut.kept[name].items():
                lost = [i for i in range(p.shape[axis]) if i not in set(stay.tolist())]
                assert not p.grad.index_select(axis, torch.tensor(lost)).any()
    if elastic.kernels:
        assert super_.model.get_parameter("stem.to_3").grad.any()  # type: ignore[union-attr]
    keys = set(MAKERS[kind]().state_dict())
    super_.close()
    assert set(net.state_dict()) == keys


def test_the_whole_model_is_a_sub_network_too(all_made: dict[str, Any]) -> None:
    for net, elastic in all_made.values():
        whole = Supernet.small_of(net, elastic, elastic.most)
        assert all(torch.equal(t, stored_tensors(net)[n]) for n, t in stored_tensors(whole).items())


@pytest.mark.parametrize("kind", MAKERS)
def test_what_goes_is_what_pruning_would_take(kind: str, all_made: dict[str, Any]) -> None:
    _, elastic = all_made[kind]
    for seed in range(5):
        widths = elastic.split(drawn(elastic, seed))[0]
        labels = gone(elastic.subject.families, elastic.scores, widths)
        assert set(elastic.mask(widths).nonzero()[0].tolist()) == labels


def test_the_best_units_stay() -> None:
    net, elastic = made("perceptron")
    layer: Any = net[1]
    with torch.no_grad():
        layer.weight.copy_(torch.arange(16.0)[:, None].expand(-1, 64) + 1)
        net[3].weight.fill_(1.0)  # type: ignore[operator, union-attr]
    elastic.rank(net)
    counts = (4, 16) if elastic.nodes[0].name.startswith("1") else (16, 4)
    assert elastic.cut(counts).kept["1.weight"][0].tolist() == [12, 13, 14, 15]


# -- kernels -------------------------------------------------------------------------------------------


def test_a_center_is_what_nested_crops_and_matrices_give() -> None:
    kernel = Kernel("c", (3, 5, 7), 2)
    weight = noise(4, 2, 7, 7)
    torch.testing.assert_close(center(weight, kernel, 3, {}), weight[:, :, 2:5, 2:5])
    assert center(weight, kernel, 7, {}) is weight
    five, three = noise(25, 25, seed=2), noise(9, 9, seed=3)
    matrices = {"c.to_5": five, "c.to_3": three}
    middle = torch.einsum("pq,oiq->oip", five, weight[:, :, 1:6, 1:6].reshape(4, 2, 25)).reshape(4, 2, 5, 5)
    torch.testing.assert_close(center(weight, kernel, 5, matrices), middle)
    inner = torch.einsum("pq,oiq->oip", three, middle[:, :, 1:4, 1:4].reshape(4, 2, 9)).reshape(4, 2, 3, 3)
    torch.testing.assert_close(center(weight, kernel, 3, matrices), inner)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([3, 5, 7]), st.integers(1, 2), st.integers(0, 6), st.integers(1, 2), st.integers(1, 2),
    st.booleans(),
)  # fmt: skip
def test_smaller_kernels_give_what_zeros_around_the_center_do(
    size: int, dims: int, padding: int, dilation: int, stride: int, depthwise: bool
) -> None:
    make = nn.Conv1d if dims == 1 else nn.Conv2d
    conv = make(4, 4, size, padding=padding, dilation=dilation, stride=stride, groups=4 if depthwise else 1)
    x = noise(2, 4, *([16] * dims))
    for kernel in elastic_kernels(conv, 1):
        for small in kernel.sizes[:-1]:
            part = center(conv.weight.detach(), kernel, small, {})
            masked = make(4, 4, size, padding=padding, dilation=dilation, stride=stride, groups=conv.groups)
            masked.load_state_dict(conv.state_dict())
            inside = torch.zeros_like(masked.weight)
            index = (
                slice(None),
                slice(None),
                *(slice(kernel.positions(small).start, kernel.positions(small).stop),) * dims,
            )
            inside[index] = part
            masked.weight.data = inside
            other = make(4, 4, size, padding=padding, dilation=dilation, stride=stride, groups=conv.groups)
            other.load_state_dict(masked.state_dict())
            axes = {2 + a: torch.tensor(kernel.positions(small)).numpy() for a in range(dims)}
            shrink(other, {"weight": axes}, mends(other, "", small))
            torch.testing.assert_close(other(x), masked(x))


def test_kernels_that_cannot_follow_stay() -> None:
    net = nn.ModuleList([
        nn.Conv2d(1, 1, 4, padding=2), nn.Conv2d(1, 1, (3, 5), padding=1), nn.Conv2d(1, 1, 5),
        nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular"), nn.ConvTranspose2d(1, 1, 5, padding=2),
    ])  # fmt: skip
    assert elastic_kernels(net, 1) == []
    twice = nn.Conv2d(1, 1, 5, padding=2)
    other = nn.Conv2d(1, 1, 5, padding=2)
    other.weight = twice.weight
    assert elastic_kernels(nn.Sequential(twice, other), 1) == []


def test_matrices_are_put_in_and_taken_out() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 5, padding=2))
    kernels = elastic_kernels(net, 1)
    add_matrices(net, kernels)
    assert set(net.state_dict()) == {"0.weight", "0.bias", "0.to_1", "0.to_3"}
    assert torch.equal(net.get_parameter(name_of(kernels[0], 3)), torch.eye(9))
    remove_matrices(net, kernels)
    assert set(net.state_dict()) == {"0.weight", "0.bias"}


# -- depth ---------------------------------------------------------------------------------------------


def test_stages_begin_where_a_block_must_stay() -> None:
    from secateur.tasks.nets import resnet

    net = resnet(4, 3).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    found = stages(net, RECIPE, (noise(1, 1, 8, 8).double(),), {})
    assert [(s.path, s.blocks, s.length) for s in found] == [("", (3, 4, 5), 3), ("", (7, 8), 3), ("", (10, 11), 3)]
    assert removed_of(found, (1, 2, 0)) == {"": [4, 5, 10, 11]}
    skipped = stages(net, RECIPE.override(skip=["4"]), (noise(1, 1, 8, 8).double(),), {})
    assert skipped[0].blocks == (3,) and skipped[1].blocks == (5,)


@given(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 3)))
def test_names_follow_the_blocks_that_are_left(outer: set[int], inner: set[int]) -> None:
    def tree() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(*(nn.Linear(1, 1) for _ in range(4))) for _ in range(6)))

    from secateur.surgery.depth import remove

    net = tree()
    removed = {"2": sorted(inner), "": sorted(outer)}
    marks = dict(net.named_parameters())
    remove(net, removed)
    left = dict(net.named_parameters())
    assert {n for name in marks if (n := renamed(name, removed)) is not None} == set(left)
    assert all(left[n] is p for name, p in marks.items() if (n := renamed(name, removed)) is not None)


def test_bad_bounds_and_models_without_anything_to_vary() -> None:
    with pytest.raises(RecipeError, match="low is a share"):
        Elastic(perceptron(), RECIPE, X, low=0.0)
    with pytest.raises(ModelError, match="nothing can be removed"):
        Elastic(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), RECIPE, X)


def test_models_whose_statistics_are_fresh_are_told_apart() -> None:
    """A fresh batch norm and zero branches would hide what is wrong: proofs are made on an awake copy."""
    net = Plain(8, 6)
    elastic = Elastic(net, RECIPE, noise(1, 3, 8, 8), multiple=2)
    assert elastic.prove(elastic.least).proven and isinstance(elastic.least, tuple)
