"""Input evidence: any split of the rows, in any order of merging, tells the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import NumericalError
from secateur.evidence import InputEvidence, gather_inputs
from secateur.evidence.inputs import INPUT_FACTS
from secateur.layers import find_layers

FACTS = tuple(INPUT_FACTS)


def _evidence(rows: torch.Tensor, cuts: list[int], needs=FACTS) -> InputEvidence:
    evidence = InputEvidence(rows.shape[1], needs)
    edges = [0, *sorted(cuts), rows.shape[0]]
    for a, b in itertools.pairwise(edges):
        evidence.update(rows[a:b])
    return evidence


def _assert_same(a: InputEvidence, b: InputEvidence, facts=FACTS) -> None:
    for fact in facts:
        torch.testing.assert_close(a[fact], b[fact], rtol=1e-4, atol=1e-4, msg=fact)


def test_facts_are_what_they_say():
    x = torch.randn(40, 6) * 3 + 1
    found = _evidence(x, [7, 20])
    expected = {
        "input_norm": x.square().sum(0).sqrt(),
        "input_mean": x.mean(0),
        "input_var": x.var(0, correction=0),
        "input_abs": x.abs().mean(0),
        "gram": x.t() @ x,
    }
    assert found["tokens"] == 40
    for fact, value in expected.items():
        torch.testing.assert_close(found[fact], value, rtol=1e-4, atol=1e-4, msg=fact)
        assert found[fact].dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=5), seed=st.integers(0, 100))
def test_any_split_tells_the_same(cuts, seed):
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed))
    _assert_same(_evidence(x, cuts), _evidence(x, []))


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 30), seed=st.integers(0, 100))
def test_merge_is_concatenation(cut, seed):
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed))
    first = _evidence(x[:cut], [])
    first.merge(_evidence(x[cut:], []))
    _assert_same(first, _evidence(x, []))


def test_wide_gram_is_complete_after_reading_updating_and_merging():
    """Only the upper stripes are summed: the lower ones must be right whenever the matrix is read."""
    x = torch.randn(20, 800)
    evidence = _evidence(x[:5], [], ("gram",))
    torch.testing.assert_close(evidence["gram"], x[:5].t() @ x[:5], rtol=1e-4, atol=1e-4)
    evidence.update(x[5:10])
    evidence.merge(_evidence(x[10:], [], ("gram",)))
    torch.testing.assert_close(evidence["gram"], x.t() @ x, rtol=1e-4, atol=1e-4)


def test_the_grams_diagonal_is_the_norm_squared():
    x = torch.randn(30, 8)
    gram, norm = _evidence(x, [9], ("gram",)), _evidence(x, [4], ("input_norm",))
    torch.testing.assert_close(gram["gram"].diagonal().sqrt(), norm["input_norm"])
    torch.testing.assert_close(gram["input_norm"], norm["input_norm"])  # no second sum is kept


@pytest.mark.parametrize("needs", [("input_var",), ("input_var", "gram")])
def test_variance_survives_a_large_mean(needs):
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) + 1000
    found = _evidence(x, list(range(0, 4000, 100)), needs)
    torch.testing.assert_close(found["input_var"], x.double().var(0, correction=0).float(), rtol=1e-3, atol=0)


def test_half_precision_rows_are_summed_in_float32():
    x = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    assert _evidence(x, list(range(0, 4096, 64)))["input_norm"].tolist() == [64.0, 64.0]
    assert _evidence(x, list(range(0, 4096, 64)), ("gram",))["gram"].tolist() == [[4096.0] * 2] * 2


def test_facts_that_were_not_asked_for_are_missing():
    evidence = _evidence(torch.randn(3, 2), [], ("input_norm",))
    for fact in ("gram", "input_mean", "input_var", "input_abs", "nonsense"):
        with pytest.raises(KeyError):
            evidence[fact]


def test_gather_sees_every_layer_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).requires_grad_(True)
    layers, _ = find_layers(model)
    batches = [torch.randn(3, 4), torch.randn(5, 4)]
    found = gather_inputs(model, layers, FACTS, batches, lambda m, b: m(b))
    x = torch.cat(batches)
    hidden = model[1](model[0](x)).detach()
    for name, rows in (("0", x), ("2", hidden)):
        _assert_same(found[name], _evidence(rows, []))
        assert not found[name]["input_norm"].requires_grad


def test_gather_names_the_layer_whose_input_is_not_finite():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    layers, _ = find_layers(model)
    with pytest.raises(NumericalError, match="input of 1 is NaN or infinite"):
        gather_inputs(model, layers, {"input_norm"}, [torch.ones(1, 2)], lambda m, b: m(b))
