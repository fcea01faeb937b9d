"""Gradient evidence: what it computes, and that it leaves the model alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import DataError, ModelError, NumericalError
from secateur.evidence import GradientEvidence, gather_gradients
from secateur.layers import find_layers

ALL = {"gradient", "fisher", "fisher_inverse", "hessian"}


def _mse(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def _batches(count=3, inputs=4, outputs=2):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(5, inputs, generator=g), torch.randn(5, outputs, generator=g)) for _ in range(count)]


def _snapshot(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
        [b.clone() for b in model.buffers()],
    )


def _assert_same(before, after):
    assert before[0] == after[0] and before[1] == after[1]
    assert all(a is b for a, b in zip(before[2], after[2], strict=True))
    for k in (3, 4, 5):
        for a, b in zip(before[k], after[k], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_gradient_and_fisher_are_means_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    layers, _ = find_layers(model)
    batches = _batches()
    found = gather_gradients(model, layers, {"gradient", "fisher"}, batches, _mse)
    for layer in layers:
        each = torch.stack([torch.autograd.grad(_mse(model, b), layer.stored)[0] for b in batches])
        torch.testing.assert_close(found[layer.name]["gradient"], each.mean(0))
        torch.testing.assert_close(found[layer.name]["fisher"], each.square().mean(0))
        with pytest.raises(KeyError):
            found[layer.name]["hessian"]


@pytest.mark.parametrize("shape", [(5, 4), (10, 12)])  # 20 weights: one short block; 120: two and a half
def test_fisher_inverse_is_the_inverse_within_each_block(shape):
    g = torch.Generator().manual_seed(0)
    evidence = GradientEvidence(shape, {"fisher_inverse"}, block=50, damp=1e-2)
    gradients = torch.randn(9, *shape, generator=g)
    for gradient in gradients:
        evidence.update(gradient)
    size = shape[0] * shape[1]
    flat = gradients.reshape(9, size).double()
    blocks, diagonal = evidence.inverse_blocks(), evidence["fisher_inverse"].reshape(-1)
    for k, a in enumerate(range(0, size, 50)):
        b = min(a + 50, size)
        part = flat[:, a:b]
        direct = torch.linalg.inv(part.t() @ part / 9 + 1e-2 * torch.eye(b - a, dtype=torch.float64))
        torch.testing.assert_close(blocks[k, : b - a, : b - a].double(), direct, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(diagonal[a:b].double(), direct.diagonal(), rtol=1e-4, atol=1e-4)


def test_fisher_inverse_is_woodfishers_recursion():
    """Singh and Alistarh: F_0^-1 = I / damp, then a Sherman-Morrison step for each gradient."""
    g = torch.Generator().manual_seed(1)
    gradients = torch.randn(6, 3, 4, generator=g)
    evidence = GradientEvidence((3, 4), {"fisher_inverse"}, damp=1e-2)
    inverse = torch.eye(12, dtype=torch.float64) / 1e-2
    for gradient in gradients:
        evidence.update(gradient)
        v = gradient.reshape(-1).double()
        u = inverse @ v
        inverse -= torch.outer(u, u) / (6 + v @ u)
    torch.testing.assert_close(evidence.inverse_blocks()[0, :12, :12].double(), inverse, rtol=1e-4, atol=1e-3)


def test_merge_is_concatenation():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    layers, _ = find_layers(model)
    batches = _batches(5)
    needs = ALL - {"hessian"}
    whole = gather_gradients(model, layers, needs, batches, _mse)["weight"]
    first = gather_gradients(model, layers, needs, batches[:2], _mse)["weight"]
    first.merge(gather_gradients(model, layers, needs, batches[2:], _mse)["weight"])
    assert first.batches == 5
    for fact in needs:
        # float32 sums of the Fisher, over a damping of 1e-5: three digits of the inverse are certain
        rtol = 1e-2 if fact == "fisher_inverse" else 1e-5
        torch.testing.assert_close(first[fact], whole[fact], rtol=rtol, atol=1e-6)


def test_hessian_is_exact_where_it_is_diagonal():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    curve = torch.linspace(-1, 5, 12).reshape(3, 4)
    layers, _ = find_layers(model)

    def loss(m, scale):
        return scale * 0.5 * (curve * m.weight.square()).sum() + m.bias.sum()

    found = gather_gradients(model, layers, {"hessian"}, [1.0, 3.0], loss, probes=2)
    assert found["weight"].probes == 4
    torch.testing.assert_close(found["weight"]["hessian"], 2 * curve)


def test_hessian_converges_to_the_true_diagonal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    layers, _ = find_layers(model)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def of(*weights):
        names = ["0.weight", "2.weight"]
        return F.mse_loss(torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)), y)

    full = torch.autograd.functional.hessian(of, (model[0].weight.detach(), model[2].weight.detach()))
    found = gather_gradients(model, layers, {"hessian"}, [(x, y)], _mse, probes=1500)
    for k, layer in enumerate(layers):
        size = layer.numel
        true = full[k][k].reshape(size, size).diagonal().reshape(layer.shape).float()
        assert (found[layer.name]["hessian"] - true).abs().max() < 0.15 * true.abs().max() + 0.02


def test_hessian_draws_from_the_generator_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    layers, _ = find_layers(model)
    state = torch.get_rng_state()

    def draw(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return gather_gradients(model, layers, {"hessian"}, _batches(), _mse, generator=generator)["0"]["hessian"]

    assert torch.equal(draw(None), draw(None)) and torch.equal(draw(None), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(state, torch.get_rng_state())


def test_hessian_of_a_linear_loss_is_zero_and_attention_has_a_second_derivative():
    model = nn.Linear(4, 2)
    layers, _ = find_layers(model)
    found = gather_gradients(model, layers, {"hessian", "gradient"}, [1.0], lambda m, b: m.weight.sum())
    assert not found["weight"]["hessian"].any() and (found["weight"]["gradient"] == 1).all()

    def attend(m, x):
        q = m(x)[None]
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    found = gather_gradients(model, layers, {"hessian"}, [torch.randn(5, 4)], attend)
    assert found["weight"]["hessian"].any()


def test_unit_curvature_is_the_weight_times_a_hessian_product():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()
    layers, _ = find_layers(model)
    names = ["0.weight", "3.weight"]
    weights = [model[0].weight, model[3].weight]
    batches = [(torch.randn(4, 2, 3).double(), torch.randn(4, 2).double()) for _ in range(2)]
    vectors = [[torch.randn_like(w) for w in weights] for _ in range(6)]
    directions = iter([{id(w): v for w, v in zip(weights, row, strict=True)} for row in vectors])
    needs = {"unit_curvature", "unit_change", "unit_trace"}
    found = gather_gradients(model, layers, needs, batches, _mse, probes=3, directions=directions)
    for k, layer in enumerate(layers):
        for row, v in enumerate(vectors):
            x, y = batches[row // 3]

            def of(*given, x=x, y=y):
                return F.mse_loss(torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,)), y)

            plain = tuple(w.detach() for w in weights)
            _, products = torch.autograd.functional.hvp(of, plain, tuple(v))
            wanted = plain[k] * products[k]
            for axis, lines in found[layer.name]["unit_curvature"].items():
                rest = [d for d in range(wanted.dim()) if d != axis]
                assert lines.shape == (6, wanted.shape[axis])
                torch.testing.assert_close(lines[row], wanted.sum(rest))
        assert {a: x.shape[0] for a, x in found[layer.name]["unit_change"].items()} == dict.fromkeys(
            range(wanted.dim()), 2
        )
        trace = found[layer.name]["unit_trace"]
        torch.testing.assert_close(trace[0].sum(), trace[1].sum())


def test_convolutions_are_seen_as_matrices():
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 6, 3, groups=2)
    layers, _ = find_layers(model)
    x = torch.randn(1, 4, 5, 5)
    found = gather_gradients(model, layers, {"gradient"}, [x], lambda m, b: m(b).square().mean())
    direct = torch.autograd.grad(model(x).square().mean(), model.weight)[0]
    assert found["weight"]["gradient"].shape == layers[0].shape
    torch.testing.assert_close(layers[0].from_oi(found["weight"]["gradient"]), direct)


class _Experts(nn.Module):
    """Three experts in one parameter; the batch says which are used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 2, 4))

    def forward(self, x, chosen):
        return sum(F.linear(x, self.experts[e]) for e in chosen)


def test_experts_are_sliced_and_an_unused_one_has_zeros():
    torch.manual_seed(0)
    model = _Experts()
    layers, _ = find_layers(model)
    assert [x.index for x in layers] == [0, 1, 2]
    x = torch.randn(5, 4)
    found = gather_gradients(model, layers, ALL, [x, x], lambda m, b: m(b, [0, 2]).square().mean())
    whole = torch.autograd.grad(model(x, [0, 2]).square().mean(), model.experts)[0]
    for layer in layers:
        torch.testing.assert_close(found[layer.name]["gradient"], whole[layer.index])
    assert not found["experts.1"]["gradient"].any() and not found["experts.1"]["hessian"].any()
    assert found["experts.0"]["hessian"].any()
    assert (found["experts.1"]["fisher_inverse"] == torch.tensor(1 / 1e-5)).all()


def _trained_mode_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model.train()
    model[2].eval()
    return model


@pytest.mark.parametrize("needs", [{"gradient"}, ALL])
def test_the_model_is_left_as_it_was(needs):
    model = _trained_mode_net()
    layers, _ = find_layers(model)
    before = _snapshot(model)
    gather_gradients(model, layers, needs, _batches(), _mse)
    _assert_same(before, _snapshot(model))


def test_the_model_is_left_as_it_was_after_an_error():
    model = _trained_mode_net()
    layers, _ = find_layers(model)
    before = _snapshot(model)

    def loss(m, batch):
        _mse(m, batch)
        m.eval()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gather_gradients(model, layers, ALL, _batches(), loss)
    _assert_same(before, _snapshot(model))


def test_only_pruned_parameters_require_a_gradient():
    model = _trained_mode_net()
    layers, _ = find_layers(model, only=["2"])

    def loss(m, batch):
        assert [n for n, p in m.named_parameters() if p.requires_grad] == ["2.weight"]
        return _mse(m, batch)

    with torch.no_grad():  # the caller's grad mode does not matter
        gather_gradients(model, layers, {"gradient"}, _batches(), loss)


def test_half_precision_gradients_are_accumulated_in_float32():
    model = nn.Linear(4, 2).to(torch.bfloat16)
    layers, _ = find_layers(model)
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    found = gather_gradients(model, layers, {"gradient"}, [x] * 3, lambda m, b: m(b).square().mean())
    direct = torch.autograd.grad(model(x).square().mean(), model.weight)[0].float()
    assert found["weight"]["gradient"].dtype == torch.float32
    torch.testing.assert_close(found["weight"]["gradient"], direct, rtol=1e-6, atol=0)


def test_a_layer_that_no_batch_reaches_is_an_error_that_names_it():
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "idle": nn.Linear(4, 2)})
    layers, _ = find_layers(model)
    with pytest.raises(ModelError, match=r"idle received no gradient.*--skip idle"):
        gather_gradients(model, layers, {"gradient"}, _batches(), lambda m, b: _mse(m["used"], b))
    with pytest.raises(ModelError, match="used received no gradient"):
        gather_gradients(model, layers, {"gradient"}, _batches(), lambda m, b: torch.tensor(1.0))
    # One batch is enough: a router need not choose every layer every time.
    turns = iter(["used", "idle"])
    found = gather_gradients(model, layers, {"gradient"}, _batches(2), lambda m, b: _mse(m[next(turns)], b))
    assert all(found[n]["gradient"].any() for n in ("used", "idle"))


def test_what_cannot_be_used_is_refused():
    model = nn.Linear(4, 2)
    layers, _ = find_layers(model)
    with pytest.raises(DataError, match="no batches"):
        gather_gradients(model, layers, {"gradient"}, [], _mse)
    with pytest.raises(DataError, match="one element"):
        gather_gradients(model, layers, {"gradient"}, _batches(), lambda m, b: m(b[0]))
    for needs in ({"gradient"}, {"fisher"}, {"fisher_inverse"}, {"hessian"}, {"unit_change"}, {"unit_trace"}):
        with pytest.raises(NumericalError, match="gradient of weight is NaN"):
            gather_gradients(model, layers, needs, _batches(), lambda m, b: _mse(m, b) * m.weight.sum() * float("nan"))
