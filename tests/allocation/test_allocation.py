"""Allocations against the papers' formulas by brute force, and the laws that all of them keep."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur import Recipe
from secateur.allocation import LayerFacts, Sketch
from secateur.allocation.base import key_of, order_key
from secateur.allocation.ranked import lamp_score
from secateur.errors import RecipeError
from secateur.registry import get, parts
from secateur.select import select
from secateur.solve import allocate

SPARSITIES = [0.0, 0.2, 0.5, 0.9, 0.99]


def keeps_of(name: str, layers: Mapping[str, LayerFacts], sparsity: float, **knobs: object) -> dict[str, float]:
    found: dict[str, float] = get("allocation", name).function(layers, sparsity=sparsity, **knobs)
    return found


def conv(*dims: int, groups: int = 1) -> LayerFacts:
    return LayerFacts((dims[0], math.prod(dims[1:])), math.prod(dims), "conv", dims=dims)


def sketched(scores: Mapping[str, Tensor], exact: bool = True, per_block: int = 2) -> dict[str, LayerFacts]:
    return {
        n: LayerFacts((s.shape[0], s.shape[1]), s.numel(), block=f"b.{k // per_block}", sketch=Sketch(s, exact))
        for k, (n, s) in enumerate(scores.items())
    }


def random_scores(seed: int = 0, count: int = 6) -> dict[str, Tensor]:
    """Layers of different shape and scale, with heavy tails."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 40, (count, 2), generator=g).tolist()
    return {
        f"l{k}": torch.randn(o, i, generator=g).abs().pow(3) * float(torch.rand((), generator=g)) * 4
        for k, (o, i) in enumerate(sizes)
    }


# -- Erdos-Renyi --------------------------------------------------------------------------------------------------


def erdos_renyi(dims: Mapping[str, tuple[int, ...]], sparsity: float, kernel: bool) -> dict[str, float]:
    """Densities as in the code of RigL (get_sparsities_erdos_renyi): the densest layer is capped, again and again."""
    dense: set[str] = set()
    while True:
        divisor = right = 0.0
        raw: dict[str, float] = {}
        for name, d in dims.items():
            n = math.prod(d)
            if name in dense:
                right -= sparsity * n  # zeros that a dense layer does not take
            else:
                right += (1 - sparsity) * n
                sizes = d if kernel else d[:2]
                raw[name] = sum(sizes) / math.prod(sizes)
                divisor += raw[name] * n
        if not raw:
            return dict.fromkeys(dims, 1.0)
        epsilon = right / divisor
        worst = max(raw, key=lambda n: raw[n])
        if raw[worst] * epsilon <= 1:
            return {n: 1.0 if n in dense else epsilon * raw[n] for n in dims}
        dense.add(worst)


NETS: dict[str, dict[str, tuple[int, ...]]] = {
    "resnet": {"a": (16, 3, 3, 3), "b": (16, 16, 3, 3), "c": (32, 16, 1, 1), "d": (64, 32, 3, 3), "fc": (10, 64)},
    "mlp": {"a": (300, 784), "b": (100, 300), "c": (10, 100)},
    "tiny first": {"a": (2, 1, 1, 1), "b": (128, 64, 5, 5), "c": (4, 4), "d": (2, 128)},
    "1d": {"a": (8, 4, 7), "b": (8, 8, 3, 3, 3)},
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["er", "erk"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_er_and_erk_are_rigls(net: str, name: str, sparsity: float) -> None:
    layers = {n: conv(*d) for n, d in NETS[net].items()}
    expected = erdos_renyi(NETS[net], sparsity, kernel=name == "erk")
    assert keeps_of(name, layers, sparsity) == pytest.approx(expected, abs=1e-9)


def test_er_and_erk_differ_by_the_kernel_alone() -> None:
    linear = {n: conv(*d) for n, d in NETS["mlp"].items()}
    assert keeps_of("er", linear, 0.9) == pytest.approx(keeps_of("erk", linear, 0.9))
    convs = {n: conv(*d) for n, d in NETS["resnet"].items()}
    assert keeps_of("er", convs, 0.9) != pytest.approx(keeps_of("erk", convs, 0.9))
    # One shape of weights with other kernels: to er they are one.
    same = {"a": conv(32, 16, 1, 1), "b": conv(32, 16, 3, 3)}
    er = keeps_of("er", same, 0.9)
    assert er["a"] == pytest.approx(er["b"])


# -- one ranking --------------------------------------------------------------------------------------------------


def top_k_of_all(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    everything = torch.cat([s.reshape(-1) for s in scores.values()])[None]
    mask = select(everything, round((1 - sparsity) * everything.numel()))[0]
    counts, at = {}, 0
    for name, s in scores.items():
        counts[name] = int(mask[at : at + s.numel()].sum())
        at += s.numel()
    return counts


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_global_is_the_top_of_the_concatenation(sparsity: float, sign: bool, seed: int) -> None:
    scores = random_scores(seed)
    if sign:  # scores may be negative, and many may be zero
        scores = {n: torch.where(s < 0.2, torch.zeros(()), s - 1.0) for n, s in scores.items()}
    keeps = keeps_of("global", sketched(scores), sparsity)
    expected = top_k_of_all(scores, sparsity)
    total = sum(s.numel() for s in scores.values())
    assert sum(keeps[n] * s.numel() for n, s in scores.items()) == pytest.approx(round((1 - sparsity) * total))
    if not sign:
        assert {n: round(keeps[n] * s.numel(), 6) for n, s in scores.items()} == expected
    else:  # ties at the threshold are shared out
        edge = torch.cat([s.reshape(-1) for s in scores.values()]).sort(descending=True).values
        edge = edge[max(0, round((1 - sparsity) * total) - 1)]
        for n, s in scores.items():
            low, high = int((s > edge).sum()), int((s >= edge).sum())
            assert low - 1e-6 <= keeps[n] * s.numel() <= high + 1e-6


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_the_histogram_is_within_a_fifth_of_a_percent(sparsity: float) -> None:
    g = torch.Generator().manual_seed(0)
    scores = {f"l{k}": torch.randn(100, 200, generator=g).abs() * (0.3 + k) for k in range(4)}
    exact, near = (keeps_of("global", sketched(scores, e), sparsity) for e in (True, False))
    for n, s in scores.items():
        assert abs(exact[n] - near[n]) <= 0.002, n
        assert exact[n] * s.numel() == pytest.approx(top_k_of_all(scores, sparsity)[n])


def test_a_layer_may_collapse_and_ties_are_shared() -> None:
    scores = {"small": torch.full((4, 8), 1e-3), "large": torch.ones(4, 8)}
    assert keeps_of("global", sketched(scores), 0.5) == {"small": 0.0, "large": 1.0}
    even = {"a": torch.ones(4, 8), "b": torch.ones(8, 8)}
    assert keeps_of("global", sketched(even), 0.5) == {"a": 0.5, "b": 0.5}


def lamp_by_hand(weight: Tensor) -> Tensor:
    """Equation 4 of arXiv 2010.07611: u's own square over the sum over all v at least as large."""
    flat = weight.double().reshape(-1)
    order = sorted(range(flat.numel()), key=lambda k: float(flat[k] ** 2))
    score = torch.zeros_like(flat)
    for place, k in enumerate(order):
        score[k] = flat[k] ** 2 / sum(float(flat[j] ** 2) for j in order[place:])
    return score.reshape(weight.shape)


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
def test_lamp_is_the_ranking_by_the_papers_score(sparsity: float) -> None:
    g = torch.Generator().manual_seed(3)
    weights = {f"l{k}": torch.randn(5 + k, 7, generator=g) * 10.0 ** (k - 2) for k in range(4)}
    by_hand = {n: lamp_by_hand(w) for n, w in weights.items()}
    for n, w in weights.items():
        assert torch.allclose(lamp_score(w).double(), by_hand[n], rtol=1e-6)
    keeps = keeps_of("lamp", sketched({n: lamp_score(w) for n, w in weights.items()}), sparsity)
    # The largest weight of every layer scores 1, so those are tied; nothing else is.
    assert {n: round(keeps[n] * w.numel(), 6) for n, w in weights.items()} == top_k_of_all(by_hand, sparsity)


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_lamp_ignores_the_scale_of_a_layer(c: float, seed: int) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(lamp_score(weight * c), lamp_score(weight), rtol=1e-4)
    assert float(lamp_score(weight).max()) == 1.0
    assert not lamp_score(torch.zeros(2, 2)).any()


# -- OWL ----------------------------------------------------------------------------------------------------------


def official_owl(metrics: list[list[Tensor]], sparsity: float, lam: float, m: float) -> np.ndarray:
    """luuyin/OWL, lib/prune_all.py: check_outlier_mean of each block, then the adjustment."""
    ratios = []
    for block in metrics:
        w = torch.cat([torch.flatten(x) for x in block])
        ratios.append(float((w > torch.mean(w) * m).sum().item()) / w.numel() * 100)
    r = np.array(ratios)
    r = (r - r.min()) * (1 / (r.max() - r.min()) * lam * 2)
    kept: np.ndarray = r - np.mean(r) + (1 - sparsity)
    return kept


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sparsity,lam,m", [(0.7, 0.08, 5.0), (0.6, 0.2, 3.0), (0.5, 0.05, 2.0)])
def test_owl_is_the_official_code(exact: bool, sparsity: float, lam: float, m: float) -> None:
    g = torch.Generator().manual_seed(1)
    blocks = [[torch.randn(24, 50, generator=g).abs().pow(1 + k) for _ in range(2)] for k in range(4)]
    scores = {f"{k}.{j}": x for k, block in enumerate(blocks) for j, x in enumerate(block)}
    keeps = keeps_of("owl", sketched(scores, exact), sparsity, lam=lam, m=m)
    expected = official_owl(blocks, sparsity, lam, m)
    for k, want in enumerate(expected):
        for j in range(2):
            assert keeps[f"{k}.{j}"] == pytest.approx(want, abs=1e-6 if exact else 2e-3)


def test_owl_without_differences_is_uniform() -> None:
    scores = {f"l{k}": torch.ones(4, 4) for k in range(4)}
    assert keeps_of("owl", sketched(scores), 0.7) == pytest.approx(dict.fromkeys(scores, 0.3))


# -- by hand ------------------------------------------------------------------------------------------------------


def test_explicit_names_layers_or_globs_and_the_later_wins() -> None:
    layers = {n: LayerFacts((4, 4), 16) for n in ("m.0.q", "m.0.k", "m.1.q", "head")}
    table = {"*.q": 0.8, "m.1.*": 0.25, "k": 0.0}
    assert keeps_of("explicit", layers, 0.5, table=table) == pytest.approx(
        {"m.0.q": 0.2, "m.0.k": 1.0, "m.1.q": 0.75, "head": 0.5}
    )
    with pytest.raises(RecipeError, match=r"\['nothing'\], which no layer matches"):
        keeps_of("explicit", layers, 0.5, table={"nothing": 0.5})
    for bad in (1.0, -0.1, 50):
        with pytest.raises(RecipeError, match="give a fraction"):
            keeps_of("explicit", layers, 0.5, table={"head": bad})


# -- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", parts("allocation"))
@given(st.integers(0, 10**6), st.integers(1, 7), st.floats(0, 0.99), st.booleans())
def test_law_5(name: str, seed: int, count: int, sparsity: float, exact: bool) -> None:
    """Weighted mean keep = 1 - sparsity within one unit, keeps in [0, 1], and the order does not matter."""
    layers = sketched(random_scores(seed, count), exact)
    knobs = {"lam": 0.6, "m": 2.0} if name == "owl" else {}  # large enough to be clipped
    keeps = keeps_of(name, layers, sparsity, **knobs)
    assert keeps.keys() == layers.keys()
    assert all(-1e-12 <= k <= 1 + 1e-12 for k in keeps.values()), keeps
    total = sum(f.numel for f in layers.values())
    assert abs(sum(keeps[n] * f.numel for n, f in layers.items()) - (1 - sparsity) * total) <= 1
    back = keeps_of(name, dict(reversed(layers.items())), sparsity, **knobs)
    assert back == pytest.approx(keeps, abs=1e-9)


@given(st.integers(0, 10**6), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 8)]))
def test_n_of_m_keeps_are_whole_and_their_mean_stays(seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    g = torch.Generator().manual_seed(seed)
    scores = {f"l{k}": torch.randn(8, 8, generator=g).abs() * (1 + k) for k in range(8)}
    scores |= {"long": torch.rand(8, 64, generator=g)}
    recipe = Recipe(granularity=f"{n}:{m}", allocation="global", sparsity=1 - n / m)
    layers = sketched(scores)
    keeps = allocate(recipe, layers)
    assert all(abs(k * m - round(k * m)) < 1e-9 and 0 <= k <= 1 for k in keeps.values())
    free = keeps_of("global", layers, 1 - n / m)
    assert all(abs(keeps[x] - free[x]) < 1 / m + 1e-9 for x in layers)
    got, wanted = (sum(k[x] * f.numel for x, f in layers.items()) for k in (keeps, free))
    assert abs(got - wanted) <= 512 / m / 2 + 1e-6  # half a step of the largest layer
    uniform = allocate(Recipe(granularity=f"{n}:{m}", sparsity=1 - n / m), layers)
    assert set(uniform.values()) == {n / m}


# -- sketch -------------------------------------------------------------------------------------------------------

FLOATS = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1e-38, -1e-38, 1e30])


@given(st.lists(FLOATS, min_size=1, max_size=30), FLOATS)
def test_an_exact_sketch_counts(values: list[float], at: float) -> None:
    sketch = Sketch(torch.tensor(values))
    at = float(torch.tensor(at))
    assert sketch.numel == len(values) and sketch.total == pytest.approx(sum(torch.tensor(values).double().tolist()))
    stored = torch.tensor(values).tolist()
    assert sketch.above(at) == sum(v > at for v in stored)
    assert sketch.at_least(key_of(at)) == sum(v >= at for v in stored)
    assert sketch.at_least(sketch.low) == len(values) and sketch.at_least(sketch.high + 1) == 0


@given(st.lists(FLOATS, min_size=1, max_size=30))
def test_order_keys_sort_as_the_floats_do(values: list[float]) -> None:
    x = torch.tensor(values)
    keys = order_key(x)
    assert torch.equal(x[:, None] < x[None], keys[:, None] < keys[None])


@given(st.integers(0, 10**6), st.floats(-3, 3, width=32), st.booleans())
def test_a_histogram_counts_up_to_one_bin(seed: int, at: float, negative: bool) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(seed))
    x = x if negative else x.abs()
    x[:100] = 0.0
    sketch = Sketch(x, exact=False)
    wide = abs(at) * 2.0**-11
    count = sketch.above(at)
    lowest = float(x.max()) * 2.0**-47  # what lies further below the largest is one bin, zeros among it
    if 0 < at < lowest:
        assert int((x > at).sum()) <= count <= 2000
        assert count == 2000 or at >= lowest / 4  # below it, all scores are in the bin
    elif not negative or at > 0:
        assert int((x > at + wide).sum()) <= count <= int((x >= at - wide).sum())
    assert sketch.at_least(sketch.low) == 2000 and sketch.at_least(sketch.high + 1) == 0
