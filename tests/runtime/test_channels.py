"""Channels left out at run time: winners, products that are really smaller, batches, places, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

import secateur
from secateur.errors import DataError, ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime import ChannelGates, fbs, is_runtime
from secateur.runtime.alive import Alive, smaller
from secateur.runtime.measured import measured
from secateur.runtime.places import find

from .cnns import odd, pictures, plain, residual, taught, used
from .models import vit

NETS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "residual": residual, "odd": odd}


def call(x: Tensor) -> Any:
    return (x,), {}


def test_winners_are_those_of_a_plain_loop() -> None:
    """A layer computed by the paper's equations, channel by channel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.Flatten()).eval()
    net = nn.Sequential(*net, nn.LazyLinear(2))
    x = torch.randn(3, 2, 6, 6)
    net(x)
    gated = taught(fbs(net, x[:1], density=0.6))
    conv, norm, gate = net[0], net[1], gated.gates[0].predict
    decided = gated.decisions(x)["0"]
    seen: list[Tensor] = []
    net[3].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    gated(x)
    for b in range(3):
        size = torch.stack([x[b, c].abs().sum() / 36 for c in range(2)])
        score = [max(0.0, float((gate.weight[o] @ size + gate.bias[o]).detach())) for o in range(5)]
        winners = sorted(range(5), key=lambda o: (-score[o], o))[:3]
        assert decided[b].nonzero().flatten().tolist() == sorted(winners)
        for o in range(5):
            z = conv2d(x[b : b + 1], conv.weight[o : o + 1], conv.bias[o : o + 1])[0, 0]
            z = (z - norm.running_mean[o]) / (norm.running_var[o] + norm.eps).sqrt() * norm.weight[o] + norm.bias[o]
            wanted = relu(score[o] * z) if o in winners else torch.zeros_like(z)
            torch.testing.assert_close(seen[0][b, o], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_executed_is_masked_and_a_batch_is_its_inputs(name: str, density: float) -> None:
    net, x = NETS[name](), pictures(4)
    gated = taught(fbs(net, x[:1], density=density))
    executed = gated(x)
    assert any(not bool((m == m[:1]).all()) for m in gated.decisions(x).values())  # inputs disagree
    gated.executes = False
    torch.testing.assert_close(gated(x), executed, rtol=1e-4, atol=1e-5)
    gated.executes = True
    torch.testing.assert_close(torch.cat([gated(one) for one in x.split(1)]), executed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x), executed, atol=1e-4)
    twice = x[:1].expand(3, -1, -1, -1)  # inputs that agree run together
    torch.testing.assert_close(gated(twice), executed[:1].expand(3, *executed.shape[1:]), rtol=1e-4, atol=1e-5)


def test_density_one_is_the_dense_network_scaled() -> None:
    net, x = plain(), pictures()
    gated = fbs(net, x[:1], density=1.0).eval()
    for gate in gated.gates:
        nn.init.zeros_(gate.predict.weight)  # what stays of pi is rho = 1
    torch.testing.assert_close(gated(x), net(x))
    assert flops(net, x).total < flops(gated, x).total < 1.02 * flops(net, x).total


def test_operations_of_a_chain_in_closed_form() -> None:
    """Each convolution multiplies its winners with the winners before it, and the classifier reads winners alone."""
    net, x = plain(8), pictures(1)
    gated = taught(fbs(net, x, density=0.5))
    total, read, size = 0, 1, 8
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            made = layer.out_channels // 2
            total += 2 * (size * size * 9 * made * read + layer.in_channels * layer.out_channels)
            read = made
        size = size // 2 if isinstance(layer, nn.MaxPool2d) else size
    total += 2 * 10 * read
    assert flops(gated, x).total == total == gated.record["flops"]["after"]


def test_shortcuts_read_what_any_of_both_made() -> None:
    """A sum is zero where both are: measured per input, and never above the bound."""
    net, x = residual(6), pictures(3)
    gated = taught(fbs(net, x[:1], density=0.3))
    counts = [flops(gated, one).total for one in x.split(1)]
    assert max(counts) <= gated.record["flops"]["after"] < gated.record["flops"]["before"]
    assert len(set(counts)) > 1


def test_the_target_is_met_with_as_many_channels_as_possible() -> None:
    net, x = plain(8), pictures(1)
    gated = fbs(net, x, target="flops 50%")
    limit, share = 0.5 * flops(net, x).total, gated.record["density"]
    assert gated.record["flops"]["after"] <= limit
    assert fbs(net, x, density=share + 0.001).record["flops"]["after"] > limit


def test_places() -> None:
    assert [p.conv for p in find(plain(), call(pictures(1)))] == [n for n, m in plain().named_modules() if isinstance(m, nn.Conv2d)]  # fmt: skip  # noqa: E501
    assert all(p.rectified for p in find(plain(), call(pictures(1))))  # in place
    found = {p.conv: p for p in find(residual(), call(pictures(1)))}
    assert found["0"].rectified and found["4.short.0"].norm and not found["4.short.0"].rectified
    # of the odd one: not what is grouped, shared, read by a group norm, or the answer
    assert [p.conv for p in find(odd(), call(pictures(1)))] == ["stem", "left", "right", "last"]
    assert [p.norm for p in find(odd(), call(pictures(1)))] == [False, True, False, False]


def test_the_model_is_as_it_was() -> None:
    net, x = residual(), pictures()
    before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    gated = taught(fbs(net, x[:1], density=0.5))
    gated(x)
    assert torch.equal(net(x), before)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


def test_training_masks_and_learns() -> None:
    net, x = residual(), pictures(6)
    gated = fbs(net, x[:1], density=0.5, lasso=0.1).train()
    sizes: list[Tensor] = []
    for gate in gated.gates:
        gate.register_forward_hook(lambda m, args, out: sizes.append(out.score.detach().abs().sum(1).mean()))
    loss = gated(x).square().mean()
    lasso = gated.penalty()
    torch.testing.assert_close(lasso.detach(), 0.1 * torch.stack(sizes).sum())
    assert float(gated.penalty()) == 0.0 < float(lasso.detach())
    (loss + lasso).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gated.parameters())


def test_the_density_falls_in_tenths() -> None:
    gated = fbs(plain(10), pictures(1), density=0.5, ramp=0.5)
    seen = []
    for k in range(21):
        gated.advance(k / 20)
        seen.append(gated.gates[0].winners())
    assert seen[0] == 10 and seen[10:] == [5] * 11 and seen == sorted(seen, reverse=True)
    assert set(seen) == {10, 9, 8, 7, 6, 5}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_smaller_products_are_masked_products(data: st.DataObject) -> None:
    b, i, o = (data.draw(st.integers(1, 4)) for _ in range(3))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = [torch.rand(b, n, generator=g) < data.draw(st.sampled_from([0.0, 0.5, 1.0])) for n in (i, o)]
    reads, makes = (m if data.draw(st.booleans()) else None for m in mask)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    x, weight = torch.randn(b, i, 5, 5, generator=g, dtype=dtype), torch.randn(o, i, 3, 3, generator=g, dtype=dtype)
    bias = torch.randn(o, generator=g, dtype=dtype) if data.draw(st.booleans()) else None
    if reads is not None:
        x = x * reads[..., None, None]
    if reads is None and makes is None:
        return
    found = smaller(x, weight, bias, reads, makes, lambda x, w, b: conv2d(x, w, b, padding=1))
    wanted = conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(found, wanted if makes is None else wanted * makes[..., None, None])


def test_what_is_known_of_zeros_is_true() -> None:
    """Whatever is done: a channel that is said to be zero is zero, and changes in place are not missed."""
    mask = torch.tensor([[True, False, True], [False, True, True]])
    F = nn.functional
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "relu_": lambda x: x.relu_(), "hardtanh": lambda x: F.hardtanh(x, 0.5, 1.0), "relu6": F.relu6,
        "add number": lambda x: x + 1, "sum": lambda x: x + x, "scale": lambda x: x * 2,
        "pad": lambda x: F.pad(x, (1, 1)),
        "pad ones": lambda x: F.pad(x, (1, 1), value=1.0), "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 1)),
        "flat": lambda x: x.flatten(1), "view": lambda x: x.view(2, -1), "turned": lambda x: x.transpose(1, 2),
        "mean": lambda x: x.mean((2, 3)), "means": lambda x: x.mean(1, keepdim=True),
        "cat": lambda x: torch.cat([x, x + 1], 1),
        "below": lambda x: torch.cat([x, x], 0), "sigmoid": lambda x: x.sigmoid(),
        "in a view": lambda x: (x.view(-1).add_(1), x)[1],
        "under another name": lambda x: (x.flatten(1), x.add_(1))[0],
        "set": lambda x: (x.__setitem__((0, 1), 5.0), x)[1], "softmax": lambda x: x.softmax(1),
        "under": lambda x: torch.ones_like(x) / x.abs().add(1),

        "divided": lambda x: (x + 1) / x.clone(), "halved": lambda x: x / 2,

        "roll": lambda x: x.roll(1, 1),
        "pool": lambda x: F.max_pool2d(x, 2), "mean of all": lambda x: x.mean((0, 2, 3))[None],
    }  # fmt: skip
    known = set()
    for name, step in steps.items():
        alive = Alive()

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None, alive: Any = alive) -> Any:  # fmt: skip  # noqa: E501
                out = func(*args, **(kwargs or {}))
                alive.follow(func, args, kwargs or {}, out)
                return out

        x = torch.randn(2, 3, 4, 4) * mask[..., None, None]
        alive.set(x, mask)
        with Mode():
            out = step(x)
        for t in (x, out):
            if (found := alive.of(t)) is not None:
                known |= {name} if t is out else set()
                assert found.shape == t.shape[:2], name
                assert not bool((t.flatten(2).abs().amax(2) if t.dim() > 2 else t.abs())[~found].any()), name
    assert known == {"halved", "relu_", "relu6", "sum", "scale", "pad", "flat", "view", "mean", "cat", "pool"}


def test_dtypes() -> None:
    net, x = residual().bfloat16(), pictures().bfloat16()
    gated = taught(fbs(net, x[:1], density=0.5))
    assert gated(x).dtype == torch.bfloat16 and torch.isfinite(gated(x)).all()
    double = taught(fbs(residual().double(), pictures(1).double(), density=0.5))
    torch.testing.assert_close(double(pictures().double()).float(), taught(fbs(residual(), pictures(1), density=0.5))(pictures()), rtol=1e-3, atol=1e-4)  # fmt: skip  # noqa: E501


def test_measured_one_at_a_time() -> None:
    net = residual()
    gated = taught(fbs(net, pictures(1), density=0.5))
    found = measured(gated, [(pictures(3), torch.arange(3))], repeats=1)
    assert found["inputs"] == 3
    one = [flops(gated, x).total for x in pictures(3).split(1)]
    assert found["gated"]["flops"]["mean"] == sum(one) / 3 < found["dense"]["flops"]["mean"]


def test_save_and_load(tmp_path: Path) -> None:
    net, x = residual(), pictures()
    gated = taught(fbs(net, x[:1], density=0.5))
    secateur.save(gated, tmp_path / "out")
    again = secateur.load(tmp_path / "out", residual(seed=5))
    assert isinstance(again, ChannelGates) and torch.equal(again(x), gated(x))
    assert flops(again, x).total == flops(gated, x).total
    with pytest.raises(ModelError, match="fresh model"):
        secateur.load(tmp_path / "out")
    with pytest.raises(ModelError, match="not a model with gates"):
        secateur.load(tmp_path / "out", plain())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "one of them"), ({"density": 0.5, "target": "flops 50%"}, "one of them"), ({"density": 0.0}, "above 0"),
        ({"density": 1.5}, "at most 1"), ({"target": "params 50%"}, "not in params"),
        ({"target": "flops 99.99%"}, "out of reach"), ({"density": 0.5, "ramp": 2.0}, "ramp"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        fbs(plain(), pictures(1), **options)


def test_models_without_a_place() -> None:
    with pytest.raises(ModelError, match="makes the answer"):
        fbs(nn.Conv2d(1, 4, 3), pictures(1), density=0.5)
    with pytest.raises(ModelError, match="no convolution"):
        fbs(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), pictures(1), density=0.5)
    with pytest.raises(ModelError, match="makes the answer|no convolution that can have a gate"):
        fbs(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)), pictures(1), density=0.5)
    assert [p.conv for p in find(vit(), call(pictures(1, size=28)))] == ["patch"]
    with pytest.raises(RecipeError, match="secateur train"):
        secateur.prune(plain(), "fbs", example=pictures(1), target="flops 50%")
    assert is_runtime("fbs", trained=True)


def test_a_linear_layer_over_positions_reads_all_of_them() -> None:
    """Of what has more than two dimensions it reads the last one, which is not that of the channels."""
    for positions in (6, 8):  # 8: as many as channels
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Linear(positions, 6), nn.Flatten(), nn.Linear(48, 5)
        ).eval()
        x = torch.randn(3, 1, positions)
        gated = taught(fbs(net, x[:1], density=0.5)).eval()
        with torch.no_grad():
            found = gated(x)
            gated.executes = False
            torch.testing.assert_close(found, gated(x), rtol=1e-4, atol=1e-5)


class Words(nn.Module):
    """Calls everything by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        F, n = nn.functional, self.norm
        x = x if scale is None else x * scale
        x = F.conv2d(input=x, weight=self.conv.weight, bias=self.conv.bias)
        x = F.batch_norm(
            input=x, running_mean=n.running_mean, running_var=n.running_var, weight=n.weight, bias=n.bias,
            training=self.training,
        )  # fmt: skip
        x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
        return F.linear(input=x, weight=self.linear.weight, bias=self.linear.bias)


def test_arguments_by_keyword() -> None:
    torch.manual_seed(0)
    net, x = used(Words()), pictures(4)
    assert [(p.conv, p.norm, p.rectified) for p in find(net, call(x))] == [("conv", True, True)]
    gated = taught(fbs(net, x[:1], density=0.5))
    out = gated(x)
    assert flops(gated, x[:1]).total == 2 * (1 * 6 + 36 * 9 * 3 + 3 * 3)  # its gate, half of both products
    gated.executes = False
    torch.testing.assert_close(gated(x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fbs", "ftwt", "manidp", "cgnet"])
def test_a_model_in_evaluation_gets_gates_in_evaluation(method: str) -> None:
    """Before any call of eval() or train(): nothing is learned from the first inputs."""
    net, x = residual(), pictures(4)
    knobs = {"cgnet": {}, "ftwt": {"mass": 0.7}}.get(method, {"density": 0.5})
    gated = secateur.runtime.made(net, method, x, [x], **knobs)
    state = {k: v.clone() for k, v in gated.state_dict().items()}  # type: ignore[attr-defined]
    gated(x)
    assert all(torch.equal(v, gated.state_dict()[k]) for k, v in state.items())  # type: ignore[attr-defined]
    assert gated(x[:0]).shape == (0, 10)  # of no inputs no answers


@pytest.mark.parametrize("method", ["fbs", "ftwt", "manidp", "cgnet"])
def test_mixed_precision_and_channels_last(method: str) -> None:
    net, x = plain(8), pictures(4)
    knobs = {"cgnet": {}, "ftwt": {"mass": 0.7}}.get(method, {"density": 0.5})
    gated: Any = secateur.runtime.made(net, method, x, [x], **knobs)
    out = gated(x)
    torch.testing.assert_close(gated(x.contiguous(memory_format=torch.channels_last)), out, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(gated(x)).all()
        gated.train()
        loss = gated(x).float().square().mean() + gated.penalty()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in gated.parameters() if p.grad is not None)


def test_what_all_inputs_share_is_not_cut_and_numbers_are_no_classes() -> None:
    gated = taught(fbs(used(Words()), pictures(1), density=0.5))
    found = measured(gated, [{"x": pictures(3), "scale": torch.full((1,), 2.0), "labels": torch.rand(3)}], repeats=1)
    assert found["inputs"] == 3 and "accuracy" not in found["gated"]
    with pytest.raises(DataError, match="a row for each input"):
        measured(gated, [{"x": torch.zeros(())}], repeats=1)
