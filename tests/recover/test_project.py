"""Principal directions of the hidden width: exact where the state has no others, and refused where it may not turn."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import secateur
from secateur.recover.project import _norms
from secateur.structured import StructuredPlan, load, save
from secateur.surgery.tied import shared_heads

WIDTH, VOCABULARY = 48, 96


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.2, **more,
    )  # fmt: skip
    return awake(transformers.LlamaForCausalLM(config))


def gemma() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=12, vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return awake(transformers.GemmaForCausalLM(config))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_inner=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return awake(transformers.GPT2LMHeadModel(config))


def awake(model: nn.Module) -> nn.Module:
    """With scales and biases of normalizations that are not all alike."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and "attn" not in name and "mlp" not in name:
                p.add_(0.3 * torch.rand_like(p))
    return model.double().eval()


def flat(model: nn.Module, rank: int, centred: bool) -> nn.Module:
    """Let everything that writes the hidden state write into a subspace of few dimensions."""
    start = torch.randn(WIDTH, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if centred:
        start -= start.mean(0)
    basis = torch.linalg.qr(start).Q
    within = basis @ basis.t()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed" in name or name.endswith((".wte.weight", ".wpe.weight")):
                p.copy_(p @ within)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                p.copy_(within @ p)
            elif "c_proj" in name:
                p.copy_(p @ within)
            elif "ln_f.bias" in name:  # the output layer has no bias that could take it
                p.zero_()
    return model


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (4, 12), generator=generator) for _ in range(count)]


def sliced(model: nn.Module, target: str = "params 20%", **knobs: Any) -> StructuredPlan:
    plan = secateur.plan(
        model, "slicegpt", target=target, example={"input_ids": batches()[0][:1]}, data=batches(),
        knobs={"recovery": knobs},
    )  # fmt: skip
    assert isinstance(plan, StructuredPlan)
    return plan


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_a_state_of_few_dimensions_loses_nothing(make: Any) -> None:
    centred = make is gpt2
    model = flat(make(), 8 - centred, centred)
    plan = sliced(model, "params to 10k", refit=False)
    small = plan.shrink()
    assert plan.proof.proven and {len(p) for axes in plan.kept.values() for p in axes.values()} == {8}
    ids = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(3))
    want = logits(model, ids)
    assert float((logits(small, ids) - want).abs().max()) < 5e-3 * float(want.abs().max())  # eps counts otherwise


def test_directions_are_better_than_features() -> None:
    model = llama()
    ids = batches(1)[0]
    want = logits(model, ids)
    turned = sliced(model, refit=False).shrink()
    cut = secateur.plan(
        model, "minitron", target="params 20%", example={"input_ids": ids[:1]}, data=batches(), only=["@residual"],
        recovery="none",
    ).shrink()  # fmt: skip
    errors = [float((logits(m, ids) - want).norm() / want.norm()) for m in (turned, cut)]
    assert errors[0] < errors[1], errors


def test_tied_matrices_are_untied_and_counted() -> None:
    model = llama(tie_word_embeddings=True)
    assert shared_heads(model) == ("lm_head.weight",)
    total = sum(p.numel() for p in model.parameters())
    plan = sliced(model)
    assert plan.before["params"] == total
    small = plan.shrink()
    assert sum(p.numel() for p in small.parameters()) == plan.after["params"] <= 0.8 * total
    assert small.lm_head.weight is not small.model.embed_tokens.weight  # type: ignore[union-attr]
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert model.config.tie_word_embeddings and not small.config.tie_word_embeddings  # type: ignore[union-attr]
    assert any("untied" in note for note in plan.notes)


def test_it_is_stock_where_heads_divide_the_width(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True).float()
    small = sliced(model).shrink()
    assert small.secateur_surgery["format"] == "transformers"  # type: ignore[index]
    save(small, tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = batches(1)[0]
    assert torch.equal(logits(again, ids), logits(small, ids))


class Net(nn.Module):
    """A pre-norm network with a tied output layer that no config describes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def test_a_saved_one_loads_onto_a_fresh_tied_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    ids = batches(1)[0]
    plan = secateur.plan(net, "slicegpt", target="params 10%", example=ids[:1], data=batches())
    small = plan.shrink()
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", Net()).eval()
    with torch.no_grad():
        assert torch.equal(again(ids), small(ids))
    record = json.loads((tmp_path / "small" / "surgery.json").read_text())
    for damage in (["norm.weight"], [["head.weight"]], [{}], [], None):
        (tmp_path / "small" / "surgery.json").write_text(json.dumps({**record, "untied": damage}))
        with pytest.raises(secateur.errors.ModelError):
            load(tmp_path / "small", Net())


class Odd(nn.Module):
    """Inputs of several shapes, a cast of its own, and a normalization that is not of the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(7, WIDTH), nn.Embedding(12, WIDTH)
        self.norm, self.last, self.inner = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.o, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, px: Tensor, pos: Tensor, cast: bool = False) -> Tensor:
        x = self.embed(px) + self.place(pos)
        x = x + self.o(torch.tanh(self.inner(self.q(self.norm(x)))))
        y = self.last(x).mean(1)
        out: Tensor = self.head(y.float() if cast else y)
        return out


def odd(**more: Any) -> StructuredPlan:
    torch.manual_seed(0)
    net = Odd().eval()
    data = [UserDict(px=torch.randn(8, 12, 7), pos=torch.arange(12), **more) for _ in range(3)]
    plan = secateur.plan(net, "slicegpt", target="params 20%", example=dict(data[0]), data=data, only="place*")
    assert isinstance(plan, StructuredPlan) and plan.kept
    return plan


def test_only_normalizations_of_the_hidden_state_are_turned() -> None:
    plan = odd()
    assert any("directions in place of" in note for note in plan.notes), plan.notes
    small = plan.shrink()
    assert small.inner.weight.shape == (WIDTH,) and small.norm.weight.shape < (WIDTH,)  # type: ignore[union-attr]


def test_a_model_that_does_not_run_in_float64_is_cut_by_features() -> None:
    plan = odd(cast=True)
    assert any("cut by single features: turning a copy of it failed" in n for n in plan.notes), plan.notes


def test_without_data_nothing_is_untied() -> None:
    model = llama(tie_word_embeddings=True)
    plan = secateur.plan(
        model, "l1-norm", granularity="coupled", target="params 10%", example={"input_ids": batches()[0][:1]},
        recovery="project",
    )  # fmt: skip
    assert isinstance(plan, StructuredPlan) and not plan.untied and plan.model is model


def test_a_bfloat16_model_is_turned() -> None:
    plan = sliced(llama().bfloat16())
    assert any("directions in place of" in note for note in plan.notes), plan.notes


def test_a_state_that_may_not_turn_is_cut_by_features() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        initializer_range=0.2,
    )  # fmt: skip
    plan = sliced(awake(transformers.BertForSequenceClassification(config)))
    assert plan.proof.proven and plan.kept
    assert any("cut by single features" in note for note in plan.notes), plan.notes


def test_normalizations_are_found_by_what_they_compute() -> None:
    for model, centred, offset in ((llama(), False, 0.0), (gemma(), False, 1.0), (gpt2(), True, 0.0)):
        found = list(_norms(model, WIDTH))
        assert len(found) == 5 and {(n.centred, n.offset) for n in found} == {(centred, offset)}
