"""Whole blocks: which may go, what they are worth, and that what is left computes what the masked model did."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import secateur
from secateur.criteria.depth import angular, block_influence
from secateur.errors import ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.structured import WholePlan
from secateur.surgery.depth import block_lists, remove


def llama(layers: int = 5, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(1))
EXAMPLE = {"input_ids": IDS[:1]}


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def planned(net: nn.Module, method: str, target: str, **options: Any) -> WholePlan:
    made = secateur.plan(
        net, method, target=target, example=EXAMPLE, data=list(IDS.split(2)), loss=next_token, **options
    )
    assert isinstance(made, WholePlan)
    return made


@pytest.mark.parametrize("method", ["shortgpt", "sleb", "angular-depth"])
def test_masked_equals_smaller(method: str, tmp_path: Path) -> None:
    net = llama()
    before = copy.deepcopy(net.state_dict())
    plan = planned(net, method, "params 25%")
    assert plan.proven and plan.proof.error is not None and plan.proof.error < 1e-12
    assert plan.after["params"] <= 0.75 * plan.before["params"]
    small = plan.shrink()
    assert sum(p.numel() for p in small.parameters()) == plan.after["params"]
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())  # nothing changed yet
    plan.mask()
    with torch.no_grad():
        torch.testing.assert_close(small(**EXAMPLE).logits, net(**EXAMPLE).logits)
    secateur.save(small, tmp_path / "small")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert stock.config.num_hidden_layers == 5 - len(plan.removed["model.layers"])
    with torch.no_grad():
        assert torch.equal(stock(**EXAMPLE).logits, small(**EXAMPLE).logits)
        cached = stock.generate(IDS[:1], max_new_tokens=4, do_sample=False)  # layer numbers are those of the cache
    assert cached.shape == (1, 16)


def test_sleb_takes_the_blocks_that_cost_least_one_after_the_other() -> None:
    net = llama(4)
    batches = list(IDS.split(2))

    def loss_without(gone: list[int]) -> float:
        small = copy.deepcopy(net)
        remove(small, {"model.layers": gone})
        with torch.no_grad():
            return sum(float(next_token(small, b)) for b in batches)

    first = min(range(4), key=lambda k: loss_without([k]))
    second = min((k for k in range(4) if k != first), key=lambda k: loss_without([first, k]))
    per_block = sum(p.numel() for p in net.model.layers[0].parameters())  # type: ignore[union-attr, index]
    total = sum(p.numel() for p in net.parameters())
    plan = planned(net, "sleb", f"params to {total - 2 * per_block}")
    assert plan.removed == {"model.layers": sorted([first, second])}


def test_block_influence_is_measured_on_the_model() -> None:
    net = llama(4)
    states: Any = net.model(IDS, output_hidden_states=True)  # type: ignore[operator]
    inputs = []
    hooks = [
        m.register_forward_hook(
            lambda m, a, k, o: inputs.append((a[0] if a else k["hidden_states"], o)), with_kwargs=True
        )
        for m in net.model.layers  # type: ignore[union-attr]
    ]
    with torch.no_grad():
        net(input_ids=IDS)
    for handle in hooks:
        handle.remove()
    wanted = [float(1 - nn.functional.cosine_similarity(x, y, dim=-1).mean()) for x, y in inputs]
    plan = planned(net, "shortgpt", "params 20%")
    assert [plan.scores["model.layers", k] for k in range(4)] == pytest.approx(wanted, abs=1e-5)
    goes = min(range(4), key=lambda k: wanted[k])
    assert goes in plan.removed["model.layers"]
    assert states.last_hidden_state.shape == (6, 12, 32)


def test_angular_takes_one_run() -> None:
    path = torch.randn(6, 7, 5)
    for count in (1, 2, 3):
        score = angular(path, torch.ones(5, dtype=torch.bool), count)
        gone = [k for k in range(5) if score[k] == 0]
        assert gone == list(range(gone[0], gone[0] + count))
        turns = [
            float(nn.functional.cosine_similarity(path[a], path[a + count], dim=-1).arccos().mean())
            for a in range(6 - count)
        ]
        assert turns[gone[0]] == min(turns)
    free = torch.tensor([True, True, False, True, True])
    around = angular(path, free, 2)
    assert [k for k in range(5) if around[k] == 0] in ([0, 1], [3, 4])
    assert torch.equal(block_influence(torch.tensor([1.0, -1.0])), torch.tensor([0.0, 2.0]))


class Post(nn.Module):
    """Normalizes after the sum: at zero it gives zero, not its input."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.f(x))
        return out


class Residual(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride, 1)
        self.short = nn.Conv2d(8, 8, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.short(x))


def test_blocks_that_leave_something_missing_stay() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Post(), Post(), Post()))
    plan = secateur.plan(net, "magnitude", granularity="depth", target="params 20%", example=torch.randn(2, 8))
    assert isinstance(plan, WholePlan)
    assert not plan.removed and len(plan.left) == 3 and not plan.proven
    with pytest.raises(ModelError, match="no block can be taken out"):
        plan.shrink()


def test_a_convolutional_network_loses_blocks_but_not_those_that_change_the_size(tmp_path: Path) -> None:
    torch.manual_seed(2)

    def factory() -> nn.Module:
        stages = [nn.Sequential(Residual(2), Residual(), Residual()) for _ in range(2)]
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(*stages), nn.Flatten()).eval()

    net, x = factory(), torch.randn(2, 3, 18, 18)
    assert list(block_lists(net)) == ["2"] and list(block_lists(net, "2")) == ["2.0", "2.1"]
    plan = secateur.plan(net, "magnitude", granularity="depth", target="flops 30%", example=x)
    assert isinstance(plan, WholePlan) and plan.proven
    assert set(plan.left) == {("2.0", 0), ("2.1", 0)}
    assert all(0 not in gone for gone in plan.removed.values())
    small = plan.shrink()
    assert flops(small, x).total == plan.after["flops"]
    secateur.save(small, tmp_path / "small")
    again = secateur.load(tmp_path / "small", factory())
    assert torch.equal(again(x), small(x))
    with pytest.raises(ModelError, match="which has not 3"):
        secateur.load(tmp_path / "small", nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_globs_and_floors() -> None:
    plan = planned(llama(3), "shortgpt", "params 90%", skip=["model.layers.1"])
    assert plan.left == {("model.layers", 1): "chosen by --skip"}
    assert plan.removed == {"model.layers": [0, 2]} or len(plan.removed["model.layers"]) == 1
    assert any("target is not met" in n for n in plan.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "shortgpt", "data": None}, "pass --data"),
        ({"method": "sleb", "loss": None}, "pass loss="),
        ({"method": "shortgpt", "granularity": "coupled"}, "ranks whole blocks"),
        ({"method": "shortgpt", "recovery": "refit"}, "have no such readers"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    given = {"data": list(IDS.split(2)), "loss": next_token, "example": EXAMPLE, "target": "params 20%", **options}
    with pytest.raises(RecipeError, match=message):
        secateur.plan(llama(3), given.pop("method"), **given)


def test_the_model_itself_may_be_the_list(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Residual(), Residual(), Residual(), Residual()).eval()

    net, x = factory(), torch.randn(1, 8, 6, 6).relu()
    plan = secateur.plan(net, "magnitude", granularity="depth", target="params 25%", example=x)
    assert isinstance(plan, WholePlan)
    if not plan.removed:  # relu(x) is x only where nothing is negative: the first block may change that
        assert plan.left
        return
    small = plan.shrink()
    secateur.save(small, tmp_path / "small")
    assert torch.equal(secateur.load(tmp_path / "small", factory())(x), small(x))


def test_angular_over_several_lists() -> None:
    torch.manual_seed(0)
    stages = [nn.Sequential(Residual(), Residual()) for _ in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(*stages), nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    plan = secateur.plan(net, "angular-depth", target="params 45%", example=x, data=[x])
    assert isinstance(plan, WholePlan) and plan.proven
    assert plan.removed


def test_a_plan_that_also_cuts_what_it_takes_out_is_refused_before_anything_changes(tmp_path: Path) -> None:
    net = llama()
    secateur.save(planned(net, "shortgpt", "params 25%", skip=["model.layers.0"]).shrink(), tmp_path / "small")
    record = json.loads((tmp_path / "small" / "surgery.json").read_text())
    weights = tmp_path / "small" / "model.safetensors"
    kept = {"model.layers.4.mlp.up_proj.weight": {"0": {"of": 48, "keep": [[0, 8]]}}}
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    bad = {**record, "format": "secateur", "kept": kept, "sha256": digest, "tied": {}, "shapes": {}}
    (tmp_path / "small" / "surgery.json").write_text(json.dumps(bad))
    fresh = llama()
    with pytest.raises(ModelError):
        secateur.load(tmp_path / "small", fresh)
    assert len(fresh.model.layers) == 5  # type: ignore[union-attr, arg-type]
