"""Experts of mixtures: where they are, what they are worth, and that closing them and taking them out is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests import tiny
from torch import Tensor, nn

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.structured import WholePlan
from secateur.surgery.experts import mixtures

IDS = tiny.ids()
EXAMPLE = {"input_ids": IDS[:2]}

WIDE: dict[str, Any] = {**tiny.GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeConfig", {**WIDE, "head_dim": 8, "num_experts": 8}),
    "mixtral": ("MixtralConfig", {**tiny.GQA, "num_local_experts": 8}),
    "olmoe": ("OlmoeConfig", {**WIDE, "num_experts": 8}),
    "gpt-oss": ("GptOssConfig", {**WIDE, "head_dim": 8, "num_local_experts": 8, "sliding_window": 8}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **WIDE, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **tiny.GQA, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1, "attention_chunk_size": 32,
        },
    ),
    "granite-moe": ("GraniteMoeConfig", {**tiny.GQA, "num_local_experts": 8, "num_experts_per_tok": 2}),
}  # fmt: skip


def build(family: str = "qwen3-moe", **changes: Any) -> Any:
    name, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**fields, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def planned(net: nn.Module, method: str = "reap", target: str = "params 20%", **options: Any) -> WholePlan:
    data = options.pop("data", list(IDS.split(2)))
    made = secateur.plan(net, method, granularity="experts", target=target, example=EXAMPLE, data=data, **options)
    assert isinstance(made, WholePlan)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_equals_smaller_and_stock_loads_it(family: str, tmp_path: Path) -> None:
    net = build(family)
    method = "magnitude" if family == "llama4" else "reap"
    plan = planned(net, method, "params 15%")
    assert plan.proven, plan
    assert plan.after["params"] <= 0.85 * plan.before["params"]
    gone = {len(v) for v in plan.removed.values()}
    assert len(gone) == 1
    small = plan.shrink()
    assert sum(p.numel() for p in small.parameters()) == plan.after["params"]
    secateur.save(small, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "surgery.json").read_text())["format"] == "transformers"
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(stock(input_ids=IDS).logits, small(input_ids=IDS).logits)
    small(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)


def outputs_of_experts(net: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, routing weights ``(t, e)``, and every expert's output ``(e, t, width)``, by plain formulas."""
    seen: list[Tensor] = []
    block = net.model.layers[layer].mlp
    hook = block.register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        net(input_ids=IDS)
        hook.remove()
        x = seen[0].reshape(-1, seen[0].shape[-1])
        probability = (x @ block.gate.weight.t()).softmax(-1)
        best = probability.topk(block.gate.top_k, dim=-1)
        weights = torch.zeros_like(probability).scatter(1, best.indices, best.values)
        if block.gate.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        made = []
        for up, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
            a, b = (x @ up.t()).chunk(2, dim=-1)
            made.append((nn.functional.silu(a) * b) @ down.t())
    return x, weights, torch.stack(made)


def test_reap_and_frequency_are_measured_on_the_model() -> None:
    net = build()
    reap, often = planned(net, "reap"), planned(net, "expert-frequency")
    for layer in range(3):
        _, weights, made = outputs_of_experts(net, layer)
        chosen = weights > 0
        gain = (weights * made.norm(dim=-1).t()).sum(0) / chosen.sum(0).clamp_min(1)
        path = f"model.layers.{layer}.mlp.experts"
        assert [reap.scores[path, k] for k in range(8)] == pytest.approx(gain.tolist(), rel=1e-4)
        assert [often.scores[path, k] for k in range(8)] == chosen.sum(0).tolist()
        worst = sorted(range(8), key=lambda k: float(gain[k]))[: len(reap.removed[path])]
        assert reap.removed[path] == sorted(worst)


def test_magnitude_sums_an_experts_weights() -> None:
    net = build()
    plan = planned(net, "magnitude", data=None)
    stacks = [p.detach().abs() for p in net.model.layers[1].mlp.experts.parameters()]
    wanted = [sum(float(p[k].sum()) for p in stacks) for k in range(8)]
    assert [plan.scores["model.layers.1.mlp.experts", k] for k in range(8)] == pytest.approx(wanted, rel=1e-6)
    assert plan.notes == []


def test_no_less_stay_than_the_router_chooses() -> None:
    plan = planned(build(num_experts_per_tok=4), target="params 99%")
    assert plan.proven and {len(v) for v in plan.removed.values()} == {4}
    assert any("are more than can go" in n for n in plan.notes)
    assert any("target is not met" in n for n in plan.notes)


def test_targets_that_experts_can_and_cannot_meet() -> None:
    with pytest.raises(RecipeError, match="FLOPs stay"):
        planned(build(), target="flops 30%")
    plan = planned(build(), "magnitude", target="memory 10%", data=None)
    assert {len(v) for v in plan.removed.values()} <= {1, 2, 3}
    assert plan.after["memory"] <= 0.9 * 1.05 * plan.before["memory"]


def test_the_most_that_can_go_is_found() -> None:
    net = build(num_experts=24, num_experts_per_tok=3)
    plan = planned(net, "magnitude", target="params 99%", data=None)
    assert {len(v) for v in plan.removed.values()} == {21}
    held = planned(net, "magnitude", target="params 5%", data=None, skip=["model.layers.0.mlp.experts.1"])
    assert held.left == {("model.layers.0.mlp.experts", 1): "chosen by --skip"}
    assert held.removed and 1 not in held.removed["model.layers.0.mlp.experts"]


def test_layers_that_differ_come_back_by_our_own_loader(tmp_path: Path) -> None:
    net = build()
    plan = planned(net, skip=["model.layers.1.mlp.experts"])
    assert set(plan.removed) == {"model.layers.0.mlp.experts", "model.layers.2.mlp.experts"}
    assert plan.left == {("model.layers.1.mlp.experts", -1): "chosen by --skip"}
    small = plan.shrink()
    secateur.save(small, tmp_path / "small")
    again = secateur.load(tmp_path / "small", build())
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, small(input_ids=IDS).logits)
    record = json.loads((tmp_path / "small" / "surgery.json").read_text())
    for damage in ({"of": 9, "gone": [0]}, {"of": 8, "gone": [8]}, {"of": 8, "gone": list(range(8))}):
        bad = {**record, "experts": {"model.layers.0.mlp.experts": damage}}
        (tmp_path / "small" / "surgery.json").write_text(json.dumps(bad))
        with pytest.raises(ModelError, match="takes experts out of"):
            secateur.load(tmp_path / "small", build())


def test_groups_of_experts_that_would_regroup_are_not_cut() -> None:
    """Limited routing picks groups first: without some experts, others would come to share a group."""
    net = build("deepseek-v3", n_group=2, topk_group=1)
    plan = planned(net, target="params 10%")
    assert not plan.removed and not plan.proven
    assert any("more than can go" in n for n in plan.notes)


def test_a_model_without_experts_says_so() -> None:
    plan = planned(tiny.build("llama"), "magnitude", data=None)
    assert not plan.removed and plan.notes == ["no expert can be taken out: there are none"]
    with pytest.raises(ModelError, match="no expert can be taken out"):
        plan.shrink()
    with pytest.raises(ModelError, match="use shrink"):
        planned(build()).mask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "pass --data"),
        ({"recovery": "refit"}, "have no such readers"),
        ({"method": "shortgpt"}, "ranks whole blocks"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(build(), **options)
    with pytest.raises(RecipeError, match="ranks whole experts"):
        secateur.plan(build(), "reap", granularity="coupled", target="params 20%", example=EXAMPLE, data=[IDS])
    with pytest.raises(RecipeError, match="not called with an index"):
        planned(build("llama4"))


def test_mixtures_are_found_by_structure() -> None:
    found, left = mixtures(build("deepseek-v3"))
    assert set(found) == {"model.layers.1.mlp.experts", "model.layers.2.mlp.experts"} and not left
    mixture = found["model.layers.1.mlp.experts"]
    assert mixture.router == "model.layers.1.mlp.gate.weight"
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in mixture.tensors
    net = build()
    net.model.layers[0].mlp.other = nn.Linear(4, 8)  # as many rows as there are experts
    found, left = mixtures(net)
    assert "several parameters have 8 rows" in left["model.layers.0.mlp.experts"]


def test_prune_leaves_the_model_and_says_so() -> None:
    net = build()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    made = secateur.prune(net, "expert-frequency", target="params 20%", example=EXAMPLE, data=[IDS[:1, :2]])
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())
    assert isinstance(made, WholePlan) and any("the model is as it was" in n for n in made.notes)
    assert any("were given no token" in n for n in made.notes)
    assert sum(p.numel() for p in made.shrink().parameters()) == made.after["params"]
