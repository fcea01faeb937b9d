"""Models whose layers became products: the budget, what is left alone, later steps, and back from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.errors import ModelError, RecipeError, UnknownName
from secateur.measure import count_parameters
from secateur.methods import load
from tests import tiny


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten(1),
        nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 10),
    ).eval()  # fmt: skip


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def llama() -> Any:
    return tiny.build("llama")


def tokens() -> list[Tensor]:
    return [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(k)) for k in range(3)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens()[0]).logits
    return found


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("method", ["svd", "asvd", "low-rank"])
def test_budget_of_the_whole_model(method: str, share: float) -> None:
    net = small_net()
    before = count_parameters(net)[0]
    made = secateur.decompose(net, method, target=f"params {100 * share:g}%", data=images())
    after = count_parameters(net)[0]
    widest = max(sum(r.shape) for r in made.records)
    assert (1 - share) * before - widest <= after <= (1 - share) * before
    assert made.run["after"] == {"params": after, "bytes": 4 * after}
    assert net(images()).shape == (12, 10)
    for r in made.records:
        assert (r.kind == "dense") == (r.before == r.after)
        assert r.after <= r.before


def test_a_rank_that_saves_nothing_leaves_the_layer_dense() -> None:
    """A spectrum that is flat stays; one layer of low rank gives all that is asked for, without any error."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0])
        net[1].weight.copy_(torch.randn(16, 2) @ torch.randn(2, 16))
        net[2].weight[1:] = 0
    x = torch.randn(40, 16)
    wanted = net(x)
    first = net[0]
    made = secateur.decompose(net, "low-rank", sparsity=0.3, data=x)
    assert [r.kind for r in made.records] == ["dense", "low-rank", "low-rank"]
    assert net[0] is first and made.records[1].ranks == (2,)
    assert torch.allclose(net(x), wanted, atol=1e-4)
    narrow = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    kept = secateur.decompose(narrow, "svd", sparsity=0.3)
    assert "no rank makes it smaller" in kept.run["notes"][0] and isinstance(narrow[1], nn.Linear)


def test_the_error_of_a_layer_is_that_of_its_outputs() -> None:
    for layer, x in ((nn.Linear(12, 9), torch.randn(30, 12)), (nn.Conv2d(4, 9, 3, 2, 1, 2), torch.randn(5, 4, 9, 9))):
        net = nn.Sequential(layer)
        with torch.no_grad():
            dense, bias = net(x), layer.bias
            made = secateur.decompose(net, "low-rank", sparsity=0.5, data=x)
            shaped = bias if dense.dim() == 2 else bias[:, None, None]
            error = (net(x) - dense).norm() / (dense - shaped).norm()
        assert made.records[0].kind == "low-rank" and made.records[0].error == pytest.approx(float(error), rel=1e-4)


def test_greedy_loses_less_than_uniform() -> None:
    found = {
        how: secateur.decompose(small_net(), "low-rank", sparsity=0.4, allocation=how, data=images())
        for how in ("greedy", "uniform")
    }
    lost = {how: sum(r.error**2 for r in made.records) for how, made in found.items()}
    assert lost["greedy"] < lost["uniform"]
    for r in found["uniform"].records:
        o, i = r.shape
        assert r.ranks == (int(0.6 * o * i / (o + i)),)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models_run_and_come_back(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    made = secateur.decompose(model, "low-rank", target="params 20%", data=tokens())
    assert any(r.kind == "low-rank" for r in made.records)
    made.save(tmp_path / "out")
    again = secateur.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["method"] == "low-rank"
    assert not (tmp_path / "out" / "config.json").exists()


def test_modules_come_back_onto_a_fresh_one(tmp_path: Path) -> None:
    net = small_net()
    secateur.decompose(net, "low-rank", target="params 40%", data=images())
    secateur.save(net, tmp_path / "out")
    again = secateur.load(tmp_path / "out", small_net())
    assert torch.equal(again(images()), net(images()))
    with pytest.raises(ModelError, match="does not fit this model: 5 is not the layer"):
        secateur.load(tmp_path / "out", small_net()[:5])


def test_twice(tmp_path: Path) -> None:
    net = small_net()
    for share in (20, 30):
        secateur.decompose(net, "svd", target=f"params {share}%")
    secateur.save(net, tmp_path / "out")
    assert torch.equal(secateur.load(tmp_path / "out", small_net())(images()), net(images()))


def test_pruned_then(tmp_path: Path) -> None:
    """The factors are layers as any others: masks."""
    model = llama()
    secateur.decompose(model, "svd", sparsity=0.2, only=["*.1.*proj"])
    made = secateur.prune(model, "magnitude", sparsity=0.5)
    assert sum(".0" in r.name.split("proj")[-1] for r in made.records) > 2
    secateur.save(model, tmp_path / "out")
    assert torch.equal(logits(secateur.load(tmp_path / "out")), logits(model))


def test_shrunk_then(tmp_path: Path) -> None:
    """The factors are layers as any others: channels, and ranks too, go; replayed in the same order."""
    net = small_net()
    secateur.decompose(net, "svd", sparsity=0.3, skip=["0", "2"])
    plan = secateur.plan(net, "magnitude", target="params 30%", example=images(2), multiple=1)
    small = plan.shrink()
    assert count_parameters(small)[0] < count_parameters(net)[0]
    secateur.save(small, tmp_path / "out")
    assert torch.equal(secateur.load(tmp_path / "out", small_net())(images()), small(images()))


def test_decomposed_after_it_was_shrunk(tmp_path: Path) -> None:
    net = secateur.plan(small_net(), "magnitude", target="params 30%", example=images(2), multiple=1).shrink()
    secateur.decompose(net, "low-rank", target="params 30%", data=images())
    secateur.save(net, tmp_path / "out")
    assert torch.equal(secateur.load(tmp_path / "out", small_net())(images()), net(images()))


class Reads(nn.Module):
    """Its code reads the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.to(self.a.weight.dtype)))


def test_a_model_whose_code_reads_a_weight_is_as_it_was() -> None:
    net = Reads()
    before = net.a, net.b
    with pytest.raises(ModelError, match="does not run with factored layers, and is as it was"):
        secateur.decompose(net, "low-rank", sparsity=0.6, data=torch.randn(9, 8))
    assert (net.a, net.b) == before
    secateur.decompose(net, "low-rank", sparsity=0.3, skip=["a"], data=torch.randn(9, 8))
    assert isinstance(net.b, nn.Sequential)


def test_what_cannot_be_factored_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 16))
    made = secateur.decompose(net, "svd", sparsity=0.5)
    assert [s.reason for s in made.skipped if s.name == "0"] == ["a grouped convolution"]
    layer = nn.Linear(6, 6)
    with pytest.raises(RecipeError, match="it shares its values with another"):
        secateur.decompose(nn.Sequential(layer, layer), "svd", sparsity=0.5)
    with pytest.raises(ModelError, match="a single layer"):
        secateur.decompose(nn.Linear(6, 6), "svd", sparsity=0.5)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"method": "low-rang", "sparsity": 0.5}, "did you mean 'low-rank'"),
        ({"method": "low-rank", "sparsity": 0.5}, "needs gram, which is measured on data"),
        ({"method": "svd"}, "say how much"),
        ({"method": "svd", "sparsity": 1.0}, r"in \(0, 1\), not 1"),
        ({"method": "svd", "target": "flops 30%"}, "not flops"),
        ({"method": "svd", "target": "params 99.9%"}, "takes .* values away"),
        ({"method": "svd", "sparsity": 0.98}, "the smallest ranks take"),
        ({"method": "svd", "sparsity": 0.5, "allocation": "erk"}, "no allocation of ranks named 'erk'"),
        ({"method": "asvd", "sparsity": 0.5, "beta": 2}, "has no knob 'beta'; its knobs: alpha"),
    ],
)
def test_bad_input(asked: dict[str, Any], told: str) -> None:
    net = small_net()
    before = [type(m) for m in net.modules()]
    with pytest.raises((RecipeError, UnknownName), match=told):
        secateur.decompose(net, **asked)
    assert [type(m) for m in net.modules()] == before


def test_a_rank_above_the_matrix_on_disk(tmp_path: Path) -> None:
    net = small_net()
    secateur.decompose(net, "svd", target="params 40%")
    secateur.save(net, tmp_path / "out")
    file = tmp_path / "out" / "surgery.json"
    plan = json.loads(file.read_text())
    plan["factored"]["5"]["ranks"] = [21]
    file.write_text(json.dumps(plan))
    with pytest.raises(ModelError, match="a layer of shape 20 x 192 has no rank 21: ranks are 1 to 20"):
        secateur.load(tmp_path / "out", small_net())


def test_command(tmp_path: Path) -> None:
    load()
    llama().save_pretrained(tmp_path / "model")
    file = tmp_path / "net.py"
    file.write_text("import torch\nfrom torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(30, 30))\n"
                    "def data():\n    return [torch.randn(9, 30)]\n")  # fmt: skip
    asked = ["prune", f"{file}:net", "--method", "low-rank", "--target", "params 30%", "--data", f"{file}:data"]
    done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0 and "1 of 1 layers decomposed" in done.output
    assert (tmp_path / "out" / "surgery.json").is_file()
    bad = CliRunner().invoke(app, [*asked, "--solver", "obc", "--out", str(tmp_path / "no")])
    assert isinstance(bad.exception, RecipeError) and "it has no --solver" in str(bad.exception)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("cp", {"ranks": 2.5}), ("cp", {"ranks": 0}), ("cp", {"iterations": 0}), ("svd", {"sparsity": "half"}),
        ("low-rank+sparse", {"iterations": 0, "data": torch.randn(2, 3, 6, 6)}),
    ],
)  # fmt: skip
def test_amounts_that_are_none_are_refused(method: str, given: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(RecipeError, match=r"at least 1|a fraction"):
        secateur.decompose(net, method, **{"sparsity": 0.5, **given})
