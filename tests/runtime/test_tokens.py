"""Where tokens can leave is found; what is executed is counted; what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime import TokenGates, evit, power_bert, tome
from secateur.runtime.act import Fuse, Seen
from secateur.runtime.measured import measured
from secateur.tasks.nets import TextTransformer

from .models import classifier, images, vectors, vit

METHODS = {"tome": tome, "evit": evit, "power-bert": power_bert}


def test_evit_against_a_plain_loop() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 11, 5, generator=g)
    attention = torch.randn(4, 3, 1, 11, generator=g).softmax(-1)
    out, size = Fuse()(x, Seen(x, attention, torch.ones(4, 11), 1), 6)
    assert out.shape == (4, 6, 5)  # the class token, four, and the fused one
    for b in range(4):
        score = attention[b, :, 0].mean(0)
        kept = sorted(sorted(range(1, 11), key=lambda i: -float(score[i]))[:4])
        lost = [i for i in range(1, 11) if i not in kept]
        wanted = [x[b, 0], *(x[b, i] for i in kept), sum(score[i] * x[b, i] for i in lost)]
        torch.testing.assert_close(out[b], torch.stack(wanted))
    assert size.sum(1).tolist() == [11.0] * 4


def test_evit_scores_by_the_attention_of_the_model() -> None:
    """The gate's weights are those of the model's own attention: with all queries its output is the same."""
    net, x = vit(), images()
    fast = evit(net, x, keep=0.5, at=(1,))
    assert fast.structure.protected == 0
    almost = TokenGates(net, fast.structure, Fuse(fuse=False), secateur.runtime.Pace(keep=48 / 49, at=(2,)), {})
    assert almost.run(x)[1] == [49, 49, 48]
    together = fast(x)
    torch.testing.assert_close(together, torch.cat([fast(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("special", [0, 1, 2, 4])
def test_special_tokens_are_found_and_stay(method: str, special: int) -> None:
    net, x = classifier(special, pool=special == 0), vectors()
    fast = METHODS[method](net, x, target="flops 25%")
    assert fast.structure.protected == special
    assert fast.record["flops"]["after"] <= 0.75 * fast.record["flops"]["before"]
    assert fast.record["flops"]["after"] == flops(fast, x).total
    assert fast(x).shape == net(x).shape


def test_the_target_is_met_with_as_little_as_possible() -> None:
    net, x = vit(), images(1)
    fast = tome(net, x, target="flops 40%")
    less = tome(net, x, r=fast.pace.r - 1)  # type: ignore[operator]
    dense = flops(net, x).total
    assert flops(fast, x).total <= 0.6 * dense < flops(less, x).total


def test_other_sizes_of_input_are_served() -> None:
    net = classifier(1)
    fast = tome(net, vectors(tokens=20), keep=0.8)
    assert fast.run(vectors(1, 40))[1] == [33, 27, 22]
    assert fast.run(vectors(5, 1))[1] == [2, 2, 2]


def transformers_models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    image = {**sizes, "image_size": 16, "patch_size": 4}
    words = {**sizes, "vocab_size": 40}
    t = transformers
    return {
        "vit": (t.ViTForImageClassification, t.ViTConfig(**image), 1),
        "deit": (t.DeiTForImageClassificationWithTeacher, t.DeiTConfig(**image), 2),
        "dinov2": (t.Dinov2ForImageClassification, t.Dinov2Config(**image), 1),
        "bert": (t.BertForSequenceClassification, t.BertConfig(**words), 1),
        "albert": (t.AlbertForSequenceClassification, t.AlbertConfig(**words, embedding_size=8), 1),
    }


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "bert", "albert"])
def test_transformers(name: str) -> None:
    kind, config, special = transformers_models()[name]
    torch.manual_seed(0)
    net = kind(config).eval()
    g = torch.Generator().manual_seed(0)
    ids = {"input_ids": torch.randint(2, 40, (2, 17), generator=g)}
    x: Any = ids if name in ("bert", "albert") else torch.randn(2, 3, 16, 16, generator=g)
    for method in METHODS.values():
        fast = method(net, x, target="flops 20%")
        assert fast.structure.protected == special and len(fast.structure.sites) == 2
        same = TokenGates(net, fast.structure, fast.act, secateur.runtime.Pace(r=0), {})
        call: Any = (lambda m: m(**x)) if isinstance(x, dict) else (lambda m: m(x))
        torch.testing.assert_close(call(same).logits, call(net).logits)
        assert call(fast).logits.shape == call(net).logits.shape


@pytest.mark.parametrize("first", [True, False])
def test_modules_of_torch(first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(x).mean(1))

    torch.manual_seed(0)
    net, x = Encoder().eval(), vectors()
    for method in METHODS.values():
        fast = method(net, x, target="flops 20%")
        assert fast.structure.sites == ("encoder.layers.0", "encoder.layers.1")
        same = TokenGates(net, fast.structure, fast.act, secateur.runtime.Pace(r=0), {})
        torch.testing.assert_close(same(x), net(x))
        assert fast.run(x)[1][-1] < 20


@pytest.mark.parametrize(
    ("net", "example", "match"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LazyLinear(3)), images(1), "no attention"),
        (TextTransformer(30, 16, 30, 16, 2, causal=True), torch.zeros(1, 16, dtype=torch.int64), "causal"),
        (nn.TransformerEncoderLayer(16, 2, batch_first=True), vectors(), "an entry for each token"),
        (classifier(1).blocks, vectors(), "an entry for each token"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(net: nn.Module, example: Any, match: str) -> None:
    with torch.no_grad():
        net(example)
    with pytest.raises(ModelError, match=match):
        tome(net.eval(), example, r=2)


def test_positions_in_the_attention_are_refused() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier(1)
            self.net.blocks[1].norm2.register_forward_hook(lambda m, a, out: out + torch.ones(1, 21, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    with pytest.raises(ModelError, match="does not run on fewer than its 21 tokens"):
        tome(Rotary().eval(), vectors(), r=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "given: none"),
        ({"r": 2, "keep": 0.5}, "given: r, keep"),
        ({"r": -1}, "0 or more"),
        ({"keep": 1.5}, "at most 1"),
        ({"keep": 0.0}, "above 0"),
        ({"target": "params 50%"}, "not in params"),
        ({"target": "flops 95%"}, "out of reach"),
        ({"rr": 3}, "no knob 'rr'"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        secateur.prune(vit(), "tome", example=images(1), **options)


def test_other_bad_options() -> None:
    with pytest.raises(RecipeError, match="give an example"):
        secateur.prune(vit(), "evit", keep=0.5)
    with pytest.raises(RecipeError, match="attention 7"):
        evit(vit(), images(1), keep=0.5, at=(7,))
    with pytest.raises(RecipeError, match="names no attention"):
        tome(vit(), images(1), keep=0.5, at=())
    with pytest.raises(RecipeError, match="method of run time"):
        secateur.prune(vit(), "magnitude", criterion="token-redundancy")


def test_save_and_load(tmp_path: Path) -> None:
    net, x = vit(), images()
    for fast in (tome(net, x, r=7, at=(0, 2)), power_bert(net, x, keep=0.9), evit(net, x, keep=0.6, fuse=False)):
        out = tmp_path / fast.record["method"]
        secateur.save(fast, out)
        again = secateur.load(out, vit(seed=5))
        assert torch.equal(again(x), fast(x))
    with pytest.raises(ModelError, match="fresh model"):
        secateur.load(out)
    with pytest.raises(ModelError, match="not a model with gates"):
        secateur.load(out, vit(width=32))
    with pytest.raises(ModelError, match="does not fit|not a model with gates"):
        secateur.load(out, vit(depth=2))
    (out / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="changed or cut off"):
        secateur.load(out, vit())


def test_save_and_load_transformers(tmp_path: Path) -> None:
    kind, config, _ = transformers_models()["vit"]
    net, x = kind(config).eval(), torch.randn(2, 3, 16, 16)
    fast = tome(net, x, r=3)
    secateur.save(fast, tmp_path / "out")
    assert torch.equal(secateur.load(tmp_path / "out")(x).logits, fast(x).logits)
    assert torch.equal(kind.from_pretrained(tmp_path / "out").eval()(x).logits, net(x).logits)  # stock tools: dense


def test_measured() -> None:
    net = vit()
    fast = tome(net, images(1), r=8)
    batches = [(images(4, seed), torch.arange(4)) for seed in range(3)]
    found = measured(fast, batches, repeats=1)
    assert found["inputs"] == 12
    assert found["gated"]["flops"]["p99"] == flops(fast, images(4)).total < found["dense"]["flops"]["p50"]
    logits = [(net(x).argmax(1), fast(x).argmax(1)) for x, _ in batches]
    assert found["agreement"] == sum(int((a == b).sum()) for a, b in logits) / 12
    assert found["dense"]["accuracy"] == sum(int((a == torch.arange(4)).sum()) for a, _ in logits) / 12


FILE = """
import torch
from secateur.tasks.nets import VisionTransformer

def vit():
    torch.manual_seed(0)
    return VisionTransformer(16, 2)

def images():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 1, 28, 28, generator=g), torch.tensor([1, 2])) for _ in range(2)]

def named():
    return [{"x": x, "labels": y} for x, y in images()]
"""


def test_command(tmp_path: Path) -> None:
    from secateur.cli import app

    (tmp_path / "own.py").write_text(FILE)
    own, out = str(tmp_path / "own.py"), tmp_path / "out"
    words = ["prune", f"{own}:vit", "--method", "tome", "--target", "flops 30%", "--data", f"{own}:images"]
    made = CliRunner().invoke(app, [*words, "--out", str(out)], catch_exceptions=False)
    assert made.exit_code == 0 and "times as fast here, on 4 inputs" in made.output
    run = json.loads((out / "run.json").read_text())
    assert run["measured"]["gated"]["flops"]["mean"] <= 0.7 * run["measured"]["dense"]["flops"]["mean"]
    assert isinstance(secateur.load(out, vit(16, 2)), TokenGates)
    for more, match in ((["--sparsity", "0.5"], "has no sparsity"), (["--set", "solver.damp=1"], "no part 'solver'")):
        with pytest.raises(RecipeError, match=match):
            CliRunner().invoke(app, [*words, "--out", str(tmp_path / "b"), *more], catch_exceptions=False)
    words[-1] = f"{own}:named"  # labels are not an input
    made = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "c")], catch_exceptions=False)
    assert made.exit_code == 0
    with pytest.raises(ModelError, match="does not run on the example"):
        CliRunner().invoke(
            app, [*words, "--out", str(tmp_path / "b"), "--example", "1x3x28x28"], catch_exceptions=False
        )
    listed = CliRunner().invoke(app, ["methods", "--when", "runtime", "--json"], catch_exceptions=False)
    assert {row["name"] for row in json.loads(listed.output)} >= {"tome", "evit", "power-bert"}
    words[1] = "fashion-vit"
    with pytest.raises(RecipeError, match="trained already"):
        CliRunner().invoke(app, [*words, "--out", str(tmp_path / "b")], catch_exceptions=False)
