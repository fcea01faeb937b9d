"""Every family of language models, and encoders, vision and sequence to sequence, from tiny configs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from tests import nets, tiny
from torch import nn

from secateur import Recipe
from secateur.measure.flops import flops
from secateur.structured import StructuredPlan, plan_structured

IDS = tiny.ids(2, 8)
LAYERS = {"gpt2": "n_layer", "bloom": "n_layer"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def planned(model: Any, example: dict[str, Any], target: str = "params 30%", **fields: Any) -> StructuredPlan:
    return plan_structured(model, Recipe.of("magnitude", **fields), target=target, multiple=1, example=example)


def language_model(family: str, **overrides: Any) -> Any:
    return tiny.build(family, **{LAYERS.get(family, "num_hidden_layers"): 2, **overrides})


def tensors(output: Any) -> list[torch.Tensor]:
    return [x for x in output.to_tuple() if isinstance(x, torch.Tensor)]


def check(model: nn.Module, example: dict[str, Any], target: str = "params 30%") -> tuple[StructuredPlan, Any]:
    """Proven and smaller by exactly what the plan says."""
    before = nets.snapshot(model)
    plan = planned(model, example, target)
    assert nets.same(before, model)
    assert plan.before["params"] == nets.parameters(model)
    assert plan.before["flops"] == flops(model, **example).total
    assert (
        plan.proof.proven
        and plan.kept
        and plan.proof.error is not None
        and plan.proof.error <= 1e-6
        and plan.proof.effect > 1e-4
    )
    small = plan.shrink()
    assert plan.after["params"] == nets.parameters(small) < plan.before["params"]
    assert plan.after["flops"] == flops(small, **example).total < plan.before["flops"]
    with torch.no_grad():
        one, two = tensors(model(**example)), tensors(small(**example))
    assert [x.shape for x in one[:1]] == [x.shape for x in two[:1]] and bool(two[0].isfinite().all())
    return plan, small


@pytest.mark.filterwarnings("ignore")  # of the families, on what their fast kernels would need
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_language_models(family: str) -> None:
    experts = family in ("mixtral", "qwen3-moe")
    model = language_model(family, **({"num_hidden_layers": 1} if experts else {}))
    plan, small = check(model, {"input_ids": IDS, "use_cache": False})
    if not experts:  # the router's axis and the experts' are more than 70 %
        assert plan.after["params"] <= plan.target.remaining(plan.before["params"])
    with torch.no_grad():  # a plan without a cache holds with one
        cached = small(input_ids=IDS, use_cache=True).logits
        torch.testing.assert_close(cached, small(input_ids=IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_with_a_cache_the_plan_is_the_same(family: str) -> None:
    model = language_model(family)
    with_cache, small = check(model, {"input_ids": IDS, "use_cache": True})
    without = planned(model, {"input_ids": IDS, "use_cache": False})
    assert with_cache.after == without.after and with_cache.kept.keys() == without.kept.keys()
    with torch.no_grad():  # token by token, from the cache, as all at once
        whole = small(input_ids=IDS, use_cache=False).logits
        first = small(input_ids=IDS[:, :5], use_cache=True)
        name = "cache" if "cache" in inspect.signature(small.forward).parameters else "past_key_values"
        rest = small(input_ids=IDS[:, 5:], use_cache=True, **{name: getattr(first, name)})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio, cache", [(1, False), (2, False), (2, True), (4, True), (8, False)])
def test_grouped_queries(ratio: int, cache: bool) -> None:
    model = tiny.build("llama", num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8 // ratio)
    plan, small = check(model, {"input_ids": IDS, "use_cache": cache}, "params 50%")
    heads = [f for f in plan.families if f.name.split()[0].endswith(("q_proj.weight:0", "k_proj.weight:0"))]
    if ratio < 8:  # one key-value head is all there is
        assert any(f.kept < f.units for f in heads)
        attention = small.model.layers[0].self_attn
        assert attention.q_proj.out_features == ratio * attention.k_proj.out_features < 32


def test_multi_query_attention() -> None:
    model = tiny.build("falcon", num_hidden_layers=1, multi_query=True, new_decoder_architecture=False)
    check(model, {"input_ids": IDS, "use_cache": True})


def test_only_the_feed_forward_layers_against_masking_by_hand() -> None:
    model = language_model("llama").double()  # no normalization goes over what these lose
    ids = {"input_ids": IDS, "use_cache": False}
    plan = planned(model, ids, "params 15%", only=["*.mlp.gate_proj"], skip=["*norm*", "*embed*"])
    small = plan.shrink()
    assert {n.rsplit(".", 2)[-2] for n in plan.kept} == {"gate_proj", "up_proj", "down_proj"}
    with torch.no_grad():
        torch.testing.assert_close(plan.mask()(**ids).logits, small(**ids).logits, rtol=1e-9, atol=1e-9)


def test_a_bidirectional_encoder() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=64, max_position_embeddings=32)).eval()
    plan, _ = check(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert any("intermediate" in f.name and f.kept < f.units for f in plan.families)


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=5)
    check(transformers.ViTForImageClassification(config).eval(), {"pixel_values": nets.noise(2, 3, 16, 16)})


@pytest.mark.parametrize("cache", [True, False])
def test_sequence_to_sequence(cache: bool) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **special)).eval()
    check(model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5], "use_cache": cache})


def test_a_smaller_model_generates() -> None:
    model = language_model("llama", num_hidden_layers=1)
    small = planned(model, {"input_ids": IDS, "use_cache": True}).shrink()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    one = small.generate(IDS, use_cache=True, **options)
    assert one.shape == (2, 14) and torch.equal(one, small.generate(IDS, use_cache=False, **options))
