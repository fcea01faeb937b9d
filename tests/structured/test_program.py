"""Exported programs: sizes that a module derives can be mended there, and they are modules like others."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests import nets
from tests.conftest import Run
from torch import Tensor, fx, nn

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.graph import dependencies, trace
from secateur.structured import StructuredPlan
from secateur.surgery.program import Program, as_program
from secateur.surgery.prove import twin
from secateur.surgery.shrink import exact, kept_by_name, shrink
from secateur.surgery.sized import Sized


class Attention(nn.Module):
    """As timm writes it: the head's width follows from the input's, and the number of heads is the module's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        a = ((q * (C // self.num_heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(B, N, C))


class Vision(nn.Module):
    """A small vision transformer."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, width, 4, stride=4), nn.Parameter(torch.randn(1, 1, width))
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.attention(self.norm(x))
        return self.head((x + self.mlp(x))[:, 0])


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def vision() -> nn.Module:
    torch.manual_seed(0)
    return Vision().eval()


MADE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "encoder": (encoder, nets.noise(2, 6, 32)),
    "vision": (vision, nets.noise(1, 3, 8, 8)),
}


def planned(model: nn.Module, example: Any, exported: bool = True, **options: Any) -> StructuredPlan:
    found = secateur.plan(model, "l1-norm", **{"target": "params 40%", **options}, example=example, exported=exported)
    assert isinstance(found, StructuredPlan)
    return found


def attention_of(plan: StructuredPlan) -> list[Any]:
    return [f for f in plan.families if "qkv" in f.name or "in_proj" in f.name]


@pytest.fixture(scope="module", params=list(MADE))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, StructuredPlan, nn.Module]:
    make, x = MADE[request.param]
    model = make()
    before = nets.snapshot(model)
    plan = planned(model, x)
    small = plan.shrink()
    assert nets.same(before, model)
    return model, x, plan, small


Case = tuple[nn.Module, Tensor, StructuredPlan, nn.Module]


def test_what_derives_its_sizes_is_cut_in_the_program_only(case: Case) -> None:
    model, x, plan, _ = case
    alone = planned(model, x, exported=False)
    assert all(f.reason and f.kept == f.units for f in attention_of(alone))
    assert any("exported=True (--exported)" in note for note in alone.notes)
    assert plan.proof.proven and plan.proof.error is not None and plan.proof.error < 1e-12
    assert len(attention_of(plan)) >= len(attention_of(alone))  # also widths of heads, whose scale stays now
    assert all(f.kept < f.units and not f.reason for f in attention_of(plan))
    assert not any("exported" in note for note in plan.notes)


def test_masked_and_smaller_agree_at_every_batch_size(case: Case) -> None:
    model, x, plan, small = case
    masked = copy.deepcopy(model)
    again = secateur.prune(masked, "l1-norm", target="params 40%", example=x, exported=True)
    assert again.kept.keys() == plan.kept.keys() and not any("as it was" in n for n in again.notes)
    if any("normalizations go over fewer" in note for note in plan.notes):
        return  # the masked module itself takes them over all
    for batch in (1, 2, 5):
        y = nets.noise(batch, *x.shape[1:], seed=batch)
        with torch.no_grad():
            torch.testing.assert_close(small(y), masked(y), rtol=1e-4, atol=1e-5)


def test_the_smaller_program_is_a_module_like_others(case: Case) -> None:
    _, x, plan, small = case
    assert isinstance(small, Program) and sum(p.numel() for p in small.parameters()) == plan.after["params"]
    y = nets.noise(3, *x.shape[1:], seed=3)
    small(y).square().sum().backward()
    grads = [p.grad for p in small.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(small), (y,)).module()
        torch.testing.assert_close(program(y), small(y))
        assert small.bfloat16()(y.bfloat16()).dtype == torch.bfloat16
        small.float()
    with pytest.raises(ValueError, match="exported for inputs of other sizes"):
        small(nets.noise(2, *(n + 4 for n in x.shape[1:])))


@pytest.mark.parametrize("name", list(MADE))
def test_back_bit_by_bit_on_a_fresh_model(name: str, tmp_path: Path) -> None:
    make, x = MADE[name]
    small = planned(make(), x).shrink()
    secateur.save(small, tmp_path / "out")
    fresh = make()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    again = secateur.load(tmp_path / "out", fresh)
    assert isinstance(again, Program) and again is not fresh and str(again) == str(small)
    assert nets.same(nets.snapshot(small), again) and again.secateur_surgery == small.secateur_surgery
    with torch.no_grad():
        for batch in (1, 4):
            y = nets.noise(batch, *x.shape[1:])
            assert torch.equal(again(y), small(y))
    secateur.save(again, tmp_path / "twice")
    assert (tmp_path / "out/surgery.json").read_bytes() == (tmp_path / "twice/surgery.json").read_bytes()


def test_what_was_changed_is_refused(tmp_path: Path) -> None:
    x = nets.noise(2, 6, 5)
    model, _ = nets.build("multihead")
    folder = secateur.save(planned(model, x).shrink(), tmp_path / "out")
    record = json.loads((folder / "surgery.json").read_text())
    tensor = record["exported"]["args"][0]

    def refused(match: str, **changed: Any) -> None:
        (folder / "surgery.json").write_text(json.dumps({**record, **changed}))
        fresh, _ = nets.build("multihead")
        before = nets.snapshot(fresh)
        with pytest.raises(ModelError, match=match):
            secateur.load(folder, fresh)
        assert nets.same(before, fresh)

    whole = record["exported"]
    for entry in (
        {"shape": [1 << 40], "dtype": "float32"},
        {"shape": [-1], "dtype": "float32"},
        {**tensor, "dtype": "nn"},
        {"unknown": "Cache"},
        {"value": {}},
        {},
        3,
    ):
        refused("is damaged", exported={**whole, "args": [entry]})
    refused("is damaged", exported={**whole, "dynamic": 1})
    refused("is damaged", exported=True)
    refused("is damaged", removed={"i": {"of": 2, "gone": [1]}})
    refused("cannot be exported", exported={**whole, "args": [{**tensor, "shape": [2, 6, 7]}]})
    mends = [{**m, "attribute": "_dim"} for m in record["mends"]]
    refused("would change sizes", mends=mends)
    refused("would change sizes", mends=[{**m, "old": m["old"] + 1} for m in record["mends"]])
    refused(r"which is not .* \(or torch .* than 1.0, under", mends=mends, exported={**whole, "torch": "1.0"})
    refused("is damaged", exported={**whole, "torch": 1})
    del record["exported"]
    refused("damaged: KeyError")


@pytest.fixture(scope="module")
def heads() -> tuple[nn.Module, Program, Any, Tensor]:
    """Attention in float64, its program, and what can go together in it."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(24, 6, batch_first=True).double().eval()
    x = nets.noise(3, 5, 24).double()
    program = as_program(model, (x, x, x), {"need_weights": False})
    return model, program, dependencies(trace(program, (x, x, x), {"need_weights": False})), x


@given(gone=st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_heads_of_torch_by_hand(heads: tuple[nn.Module, Program, Any, Tensor], gone: set[int]) -> None:
    """Without some heads, attention is the original with these heads' columns of the output projection at zero."""
    model, program, found, x = heads
    (family,) = [f for f in found.families if f.name == "in_proj_weight:0 x12"]
    places = [u for u in family.units for i, p in u.places.items() if found.slots[i].names == ("out_proj.weight",)]
    assert len(places) == 6
    labels = frozenset().union(*(family.units[k].gone for k in gone))
    small = twin(program)
    shrink(small, kept_by_name(found, labels), exact(program, found, labels))
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for k in gone:
            by_hand.out_proj.weight[:, 4 * k : 4 * k + 4] = 0
        got, wanted = small(x, x, x, need_weights=False)[0], by_hand(x, x, x)[0]
    assert small.in_proj_weight.shape == (3 * 4 * (6 - len(gone)), 24)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


class Padded(nn.Module):
    """Attention in which sizes are those of tensors made on the way: zeros, masks for all heads."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(5, 16), nn.Linear(16, 3)
        self.m = nn.MultiheadAttention(16, 4, batch_first=True, **options)

    def forward(self, x: Tensor, pad: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.i(x)
        return self.o(h + self.m(h, h, h, key_padding_mask=pad, attn_mask=mask)[0])


@pytest.mark.parametrize("name", ["pad", "both", "bias", "zeros"])
def test_attention_with_more_to_read(name: str) -> None:
    x, pad, mask = nets.noise(2, 6, 5), torch.zeros(2, 6, dtype=torch.bool), torch.ones(6, 6).triu(1).bool()
    pad[0, 4:] = True
    example = {"pad": {"x": x, "pad": pad}, "both": {"x": x, "pad": pad, "mask": mask}}.get(name, {"x": x})
    torch.manual_seed(0)
    model = Padded(add_bias_kv=name == "bias", add_zero_attn=name == "zeros").eval()
    plan = planned(model, example, target="params 50%", only=["m"])
    assert plan.proof.proven and len(attention_of(plan)) == 2  # heads, and widths of heads
    assert all(f.kept < f.units for f in attention_of(plan))
    more = {k: v if k == "mask" else torch.cat([v, v[:1]]) for k, v in example.items()}
    small = plan.shrink()
    secateur.prune(model, "l1-norm", target="params 50%", example=example, exported=True, only=["m"])
    with torch.no_grad():
        torch.testing.assert_close(small(**more), model(**more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["shuffle", "group-norm", "depthwise", "transposed", "chunked-qkv", "gqa", "mqa-fused", "lstm", "unet"]
)
def test_a_program_lets_go_what_the_module_does(name: str) -> None:
    model, example = nets.build(name)
    options: dict[str, Any] = {"multiple": 1, "target": "params 40%", "example": example}
    recipe = secateur.Recipe.of("magnitude", granularity="coupled")
    from secateur.units import plan_coupled

    alone, program = (plan_coupled(model, recipe, exported=e, **options) for e in (False, True))
    assert isinstance(alone, StructuredPlan) and isinstance(program, StructuredPlan)
    assert program.proof.proven and not any(f.reason for f in program.families)
    assert {f.name for f in alone.families} <= {f.name for f in program.families}
    assert alone.before == program.before
    program.shrink()


class Casts(nn.Module):
    """Names dtypes, makes tensors of its own, and cuts pieces out by literal bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 16), nn.Linear(8, 4), nn.LayerNorm(16)
        self.table = torch.arange(3.0)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        y = self.norm(self.a(x).to(torch.float32)).type_as(x) + torch.zeros(x.shape[0], 16, dtype=torch.float32)
        y = torch.tanh(y[:, :8]) * y[:, -8:] * scale
        return {"y": self.b(y) + torch.tensor([1.0, 2.0, 3.0, 4.0]), "sum": y.sum() + self.table.sum()}


def test_casts_constants_and_structure() -> None:
    torch.manual_seed(0)
    model, x = Casts().eval(), nets.noise(3, 6)
    plan = planned(model, {"x": x, "scale": 0.5}, target="params 30%")
    assert plan.proof.proven and plan.proof.error is not None and plan.proof.error < 1e-12  # casts go along
    small = plan.shrink()
    out = small(x=x, scale=0.5)
    assert out.keys() == {"y", "sum"} and out["y"].dtype == torch.float32
    double = copy.deepcopy(small).double()
    assert double(x=x.double(), scale=0.5)["y"].dtype == torch.float64
    torch.testing.assert_close(double(x=x.double(), scale=0.5)["y"].float(), out["y"])
    assert any(isinstance(m, Sized) and m.dtype == torch.float64 for m in double.modules())
    assert not any(isinstance(m, Sized) and m.dtype == torch.float64 for m in small.modules())


def test_transformers_tied_weights_and_outputs(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = {"input_ids": torch.arange(12)[None]}
    plan = planned(model, ids)
    assert plan.proof.proven and config.use_cache
    small = plan.shrink()
    assert small.lm_head.weight is small.model.embed_tokens.weight
    out = small(input_ids=torch.arange(24).view(2, 12))
    assert isinstance(out, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert out.get("cache", out.get("past_key_values")) is None
    secateur.save(small, tmp_path / "out")
    again = secateur.load(tmp_path / "out", transformers.LlamaForCausalLM(config).eval())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, small(**ids).logits)


def test_a_batch_that_is_fixed() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).view(2, 3, 16)).mean(1)

    model, x = Pairs().eval(), nets.noise(6, 4)
    small = planned(model, x).shrink()
    assert isinstance(small, Program) and not small.dynamic
    assert small(x).shape == (2, 3)
    with pytest.raises(ValueError, match="other sizes"):
        small(nets.noise(9, 4))


def test_what_cannot_be_exported() -> None:
    class Way(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y if y.sum() > 0 else -y)

    with pytest.raises(ModelError, match="cannot be exported on this example: the way .* depends on values"):
        planned(Way().eval(), nets.noise(2, 4))

    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.rand(16)

    with pytest.raises(ModelError, match="something else than the model"):
        planned(Chance().eval(), nets.noise(2, 4))


def test_options_that_do_not_go_together() -> None:
    model, x = nets.build("multihead")
    for options, match in (
        ({"steps": 2, "schedule": "linear"}, "in one step"),
        ({"granularity": "depth"}, "not granularity 'depth'"),
    ):
        with pytest.raises(RecipeError, match=match):
            secateur.plan(model, "magnitude", target="params 20%", example=x, exported=True, **options)
    with pytest.raises(RecipeError, match="has none"):
        secateur.plan(model, "slicegpt", target="params 20%", example=x, data=[x], exported=True)
    with pytest.raises(RecipeError, match="exported is for units"):
        secateur.prune(model, "magnitude", sparsity=0.5, exported=True)
    plan = planned(model, x, data=[x, x])
    assert any("was left out: it fits layers" in note for note in plan.notes)


def test_from_the_command_line(run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "given.py", tmp_path / "small"
    file.write_text("from tests.structured.test_program import vision\n")
    words = [f"{file}:vision", "--method", "l1-norm", "--target", "params 40%", "--example", "1x3x8x8"]
    status, printed, err = run("plan", *words)
    assert status == 0 and "exported=True (--exported)" in printed, err
    status, printed, err = run("plan", *words, "--exported")
    assert status == 0 and "masked == smaller: proven" in printed and "left alone" not in printed, err
    status, printed, err = run("prune", *words, "--exported", "--out", out)
    assert status == 0 and "times as fast here" in printed, err
    record = json.loads((out / "run.json").read_text())
    assert record["proof"]["proven"] and record["model"]["class"] == "Vision"
    status, printed, err = run("measure", out, "--against", f"{file}:vision", "--json")
    assert status == 0, err
    assert json.loads(printed)["parameters"] == record["after"]["params"]


def test_sizes_know_their_axes() -> None:
    """What each kind of operation says of sizes, against the operation on what is left."""
    stays = np.array([True, False, True, True, False, False, True, True])

    def of(op: Any, args: list[Any], inputs: list[Any], outputs: list[Any]) -> dict[int, int]:
        labels = np.arange(8)
        found = [[tuple(labels if a else None for a in axes) for axes in side] for side in (inputs, outputs)]
        return Sized(op, args, {}).lengths(*found, lambda axis: stays[axis])

    aten = torch.ops.aten
    assert of(aten.view.default, [None, [3, 8]], [(1,)], [(0, 1)]) == {1: 5}
    assert of(aten.view.default, [None, [3, -1]], [(1,)], [(0, 1)]) == {}
    graph = fx.Graph()
    batch = graph.placeholder("batch")
    several = graph.call_function(operator.mul, (batch, 8))
    assert of(aten.zeros.default, [[several, 2]], [], [(1, 0)]) == {0: 5}
    assert Sized(aten.zeros.default, [[several, 2]], {})([3, None]).shape == (24, 2)
    assert of(aten.unflatten.int, [None, -1, [3, 8]], [(0, 1)], [(0, 0, 1)]) == {1: 5}
    assert of(aten.slice.Tensor, [None, 1, 2, 6, 1], [(0, 1)], [(0, 1)]) == {0: 1, 1: 3}
    assert of(aten.slice.Tensor, [None, 1, 0, 1 << 62, 1], [(0, 1)], [(0, 1)]) == {0: 0}
    assert of(aten.layer_norm.default, [None, [8], None, None], [(0, 1)], [(0, 1)]) == {0: 5}
    assert of(aten.group_norm.default, [None, 4, None, None], [(0, 1)], [(0, 1)]) == {0: 3}
    assert of(aten.conv1d.default, [None, None, None, [1], [0], [1], 8], [(0, 1), (1, 0)], [(0, 1)]) == {0: 5}


class Positions(nn.Module):
    """Makes positions as it runs, and takes their sines in float32 whatever its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device).float().sin()
        out: Tensor = self.a(x) + at.to(x.dtype)[None, :, None]
        return out


def test_a_program_moves_and_refuses_what_would_change_its_casts() -> None:
    x = nets.noise(2, 600, 1)
    program = as_program(Positions().eval(), (x,), {})
    assert program.to("meta")(x.to("meta")).device.type == "meta"
    program = as_program(Positions().eval(), (x,), {})
    with pytest.raises(ModelError, match="convert the model to torch.bfloat16 first"):
        program.to(torch.bfloat16)
    half = Positions().eval().bfloat16()
    program = as_program(half, (x.bfloat16(),), {})
    there = copy.deepcopy(program).double()
    back = there.bfloat16()
    with torch.no_grad():
        assert torch.equal(back(x.bfloat16()), half(x.bfloat16()))
