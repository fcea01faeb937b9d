"""Choosing, installing, saving and loading packed layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.compression import (
    Sparse,
    SparseConv2d,
    SparseLinear,
    compress,
    dense_again,
    load_compressed,
    save_compressed,
)
from secateur.compression import candidates as of_candidates
from secateur.compression import make as of_make
from secateur.compression.candidates import Site, Table, is_cold, sites, watch
from secateur.compression.choose import choose
from secateur.compression.store import _of_record
from secateur.disk import digest
from secateur.errors import ModelError, OutputError, RecipeError
from secateur.kernels import library

needs_kernels = pytest.mark.skipif(library() is None, reason="the sparse kernels are not built")


def sparse(model: nn.Module, share: float = 0.8) -> nn.Module:
    """The same model with so many zeros in every matrix and convolution."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand(parameter.shape, generator=generator) >= share
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return sparse(nn.Sequential(nn.Linear(70, 130), nn.ReLU(), nn.Linear(130, 40), nn.ReLU(), nn.Linear(40, 3)), 0.7)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return sparse(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1, bias=False),
            nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 5),
        )
    )  # fmt: skip


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the first kind of values always wins."""

    def seconds(_: Table, site: Site, shape: tuple[int, ...], kinds: Sequence[str], cold: bool) -> dict[str, float]:
        few = site.linear and shape[0] <= 4
        rows = {f"{k}.{i}": 0.5 + 0.1 * n for n, k in enumerate(kinds) for i in (("col", "bits") if few else ("col",))}
        return {"dense": 1.0, **rows}

    monkeypatch.setattr(Table, "seconds", seconds)
    monkeypatch.setattr(of_make, "latency", lambda models, *_: {name: {"dense": 1.0}.get(name, 0.5) for name in models})


@needs_kernels
@pytest.mark.parametrize("make, example", [(mlp, torch.randn(9, 70)), (cnn, torch.randn(2, 3, 8, 8))])
def test_the_same_outputs(sparse_wins: None, make: Any, example: torch.Tensor, tmp_path: Path) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    fast = compress(model, example, cache=False)
    assert any(isinstance(m, Sparse) for m in fast.modules())
    assert not any(isinstance(m, Sparse) for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(fast(example), model(example), rtol=1e-5, atol=1e-6)
    assert fast.compression.error < 1e-6 and fast.compression.bytes[1] < fast.compression.bytes[0]
    loaded = secateur.load(secateur.save(fast, tmp_path / "fast"), make())
    assert torch.equal(loaded(example), fast(example))
    again = dense_again(copy.deepcopy(fast))
    assert not any(isinstance(m, Sparse) for m in again.modules())
    torch.testing.assert_close(again(example), model(example), rtol=1e-5, atol=1e-6)


@needs_kernels
def test_what_cannot_be_packed_says_why(sparse_wins: None) -> None:
    fast = compress(cnn(), torch.randn(1, 3, 8, 8), cache=False)
    kinds = {c.name: (c.kind, c.reason) for c in fast.compression.choices}
    assert kinds["4"] == ("dense", "grouped, or padded in a way that the kernels do not know")
    assert [kinds[n][0] for n in ("0", "3", "5", "7")] == ["float32"] * 4
    full = compress(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), cache=False)
    assert full.compression.choices[0].reason == "0% zeros" and "nothing is packed" in full.compression.note


def test_reasons_of_sites() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4, bias=False) for _ in range(4))
            self.b.weight = self.a.weight
            self.c.register_forward_hook(lambda *_: None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(self.c(x))) + x @ self.d.weight

    model = sparse(Tied())
    found = list(sites(model))
    watch(model, [s for s in found if not s.reason], [((torch.randn(3, 4),), {})])
    assert {s.name: s.reason for s in found} == {
        "a": "its weight is shared with b.weight",
        "b": "its weight is shared with a.weight",
        "c": "hooks are attached to it",
        "d": "the model does not call it as a layer",
    }


def test_layers_are_watched_for_what_they_are_given() -> None:
    model = mlp()
    found = list(sites(model))
    watch(model, found, [((torch.randn(2, 3, 70),), {}), ((torch.randn(1, 70),), {})])
    assert found[0].inputs == {(0, (6,)): 1, (1, (1,)): 1} and not found[0].module._forward_pre_hooks
    assert not is_cold(model)


class _Rows(Table):
    """Times by name and tokens."""

    def __init__(self, rows: dict[tuple[str, int], dict[str, float]]) -> None:
        super().__init__(None)
        self.known = rows

    def seconds(self, site: Site, shape: tuple[int, ...], kinds: Sequence[str], cold: bool) -> dict[str, float]:
        return self.known[site.name, shape[0]]


def _site(name: str) -> Site:
    site = Site(name, sparse(nn.Linear(4, 4)))
    site.inputs = {(0, (128,)): 1, (1, (1,)): 1}
    return site


def test_a_layer_may_lose_in_one_workload_what_others_win() -> None:
    slow = {"dense": 1.0, "float32.col": 1.2, "float32.bits": 1.3}
    table = _Rows(
        {
            ("a", 128): {"dense": 10.0, "float32.col": 2.0},
            ("a", 1): slow,
            ("b", 128): {"dense": 10.0, "float32.col": 9.0},
            ("b", 1): {"dense": 1.0, "float32.col": 0.7, "float32.bits": 0.6},
        }
    )
    chosen = choose([_site("a"), _site("b")], table, ["float32"], False, 2)
    assert [(c.kind, c.index) for c in chosen] == [("float32", "col"), ("float32", "col+bits")]
    alone = choose([_site("a")], table, ["float32"], False, 2)
    assert (alone[0].kind, alone[0].reason) == ("dense", "it would make a workload slower")
    table.known["c", 128], table.known["c", 1] = {"dense": 10.0, "float32.col": 9.9}, slow
    assert choose([_site("c")], table, ["float32"], False, 2)[0].reason == "not faster without its zeros"


def test_what_is_given_up_for_one_workload_may_be_missed_in_another() -> None:
    table = _Rows(
        {
            ("a", 128): {"dense": 10.0, "float32.col": 1.0},  # wins the first workload, and loses the second
            ("a", 1): {"dense": 1.0, "float32.col": 1.8, "float32.bits": 1.9},
            ("b", 128): {"dense": 10.0, "float32.col": 14.0},  # loses the first, which only the other one bears
            ("b", 1): {"dense": 1.0, "float32.col": 0.5, "float32.bits": 0.5},
        }
    )
    chosen = choose([_site("a"), _site("b")], table, ["float32"], False, 2)
    assert [c.kind for c in chosen] == ["dense", "dense"]
    assert {c.reason for c in chosen} == {"it would make a workload slower"}


def test_layers_that_are_called_in_another_way_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(input=x).view(4, 2, 2))  # by keyword, and one image without a batch

    model = sparse(Odd(), 0.7)
    fast = compress(model, torch.randn(4, 4), cache=False)
    assert fast is model
    if library() is not None:
        assert {c.reason for c in fast.compression.choices} == {"it is not called with one batch of inputs"}


@needs_kernels
def test_a_single_layer_cannot_be_saved(sparse_wins: None, tmp_path: Path) -> None:
    fast = compress(sparse(nn.Linear(70, 30)), torch.randn(9, 70), cache=False)
    with pytest.raises(ModelError, match="Sequential"):
        secateur.save(fast, tmp_path / "fast")
    assert not list(tmp_path.iterdir())


def test_quads_serve_many_tokens_and_bits_few() -> None:
    table = _Rows(
        {
            ("a", 128): {"dense": 10.0, "int8-dynamic.col": 5.0, "int8-dynamic.quad": 3.0},
            ("a", 1): {"dense": 1.0, "int8-dynamic.col": 0.5, "int8-dynamic.bits": 0.3},
        }
    )
    choice = choose([_site("a")], table, ["int8-dynamic"], False, 2)[0]
    assert (choice.kind, choice.index, choice.reason) == ("int8-dynamic", "quad", "3.33 times as fast")
    table.known["a", 128].pop("int8-dynamic.quad")
    assert choose([_site("a")], table, ["int8-dynamic"], False, 2)[0].index == "col+bits"


@needs_kernels
def test_quads_are_tried_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, site, image = library(), _site("a"), Site("b", sparse(nn.Conv2d(4, 4, 3)))
    assert kernels is not None
    for quads in (True, False):
        monkeypatch.setattr(kernels, "quads", quads)
        assert ("int8-dynamic.quad" in site.ways(["float32", "int8-dynamic"], few=False)) == quads
        for ways in (
            site.ways(["int8-dynamic"], True),
            image.ways(["int8-dynamic"], False),
            site.ways(["int8"], False),
        ):
            assert not any("quad" in way for way in ways)


@pytest.mark.parametrize("there", [True, False], ids=["kernels", "none"])
def test_quads_are_not_saved(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not there:
        monkeypatch.setattr("secateur.kernels.ops.library", lambda: None)
    fast, x = mlp(), torch.randn(9, 70)
    for name in ("0", "2"):
        site = Site(name, fast.get_submodule(name))
        fast[int(name)] = site.made("int8-dynamic", "quad", site.matrix(), site.module.bias)
    assert fast[0].quad is not None and fast[0].bits is not None and fast[0].col is None
    folder = save_compressed(fast, tmp_path / "fast")
    stored = load_file(folder / "compressed.safetensors")
    assert {n for n in stored if n.startswith("0.")} == {"0.values", "0.col", "0.counts", "0.scale", "0.bias"}
    if library() is None:
        return
    loaded = secateur.load(folder, mlp())
    assert torch.equal(loaded[0].quad, fast[0].quad) and "by bits and quad" in repr(loaded)
    for tokens in (x, x[:2]):
        assert torch.equal(loaded(tokens), fast(tokens))
        torch.testing.assert_close(fast(tokens), mlp()(tokens), rtol=0.0, atol=0.02)


def test_a_second_index_must_pay_for_its_memory() -> None:
    table = _Rows(
        {
            ("a", 128): {"dense": 10.0, "float32.col": 5.0},
            ("a", 1): {"dense": 1.0, "float32.col": 0.5, "float32.bits": 0.49},
        }
    )
    assert choose([_site("a")], table, ["float32"], False, 2)[0].index == "col"


@needs_kernels
def test_a_model_that_gains_nothing_comes_back(monkeypatch: pytest.MonkeyPatch, sparse_wins: None) -> None:
    monkeypatch.setattr(of_make, "latency", lambda models, *_: {name: 1.0 + (name != "dense") for name in models})
    model = mlp()
    assert compress(model, torch.randn(3, 70), cache=False) is model
    assert "but not together" in str(model.compression) and not model.compression.packed
    monkeypatch.setattr(of_make, "latency", lambda models, *_: dict.fromkeys(models, 1.0))
    monkeypatch.setattr(of_make, "_difference", lambda *_: float("nan"))
    assert "would differ by nan" in compress(model, torch.randn(3, 70), cache=False).compression.note
    monkeypatch.setattr(of_make, "library", lambda: None)
    assert "not built" in compress(mlp(), torch.randn(3, 70), cache=False).compression.note


def test_an_output_that_is_no_number_is_a_difference() -> None:
    """A maximum would pass over it; what is not finite on both sides is none."""

    class Odd(nn.Module):
        def __init__(self, *rows: float) -> None:
            super().__init__()
            self.rows = torch.tensor(rows)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rows * x

    loads = [((torch.ones(1),), {})]
    nan, inf = float("nan"), float("inf")
    assert of_make._difference(Odd(1.0, 2.0), Odd(1.0, nan), loads) == inf
    assert of_make._difference(Odd(3.0, -inf), Odd(3.3, -inf), loads) == pytest.approx(0.1)
    assert of_make._difference(Odd(nan), Odd(nan), loads) == 0.0


@needs_kernels
def test_smaller_values_that_break_a_model_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, sparse_wins: None
) -> None:
    monkeypatch.setattr(of_make, "_difference", lambda *_: float("inf"))
    model = mlp()
    assert compress(model, torch.randn(3, 70), kinds=["int8"], cache=False) is model
    assert "would differ by inf" in model.compression.note


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "layers.json")
    table.rows = {"a": {"dense": 1.0}}
    table.save()
    assert not list(tmp_path.glob("*.new")) and (tmp_path / "file").read_text() == ""


@needs_kernels
def test_real_times_are_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    compress(mlp(), torch.randn(3, 70), kinds=["float32", "int8"])
    rows = json.loads((tmp_path / "layers.json").read_text())
    assert len(rows) == 3 and all(s > 0 for row in rows.values() for s in row.values())
    monkeypatch.setattr(of_candidates, "_measure", lambda *_: pytest.fail("measured again"))
    compress(mlp(), torch.randn(3, 70), kinds=["int8"])
    (tmp_path / "layers.json").write_text("[1")
    with pytest.raises(pytest.fail.Exception):
        compress(mlp(), torch.randn(3, 70))


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match="give inputs"):
        compress(mlp())
    with pytest.raises(RecipeError, match="'float16' are not known"):
        compress(mlp(), torch.randn(3, 70), kinds="float16")  # one kind needs no list
    if library() is not None:
        with pytest.raises(ModelError, match="does not run on the example"):
            compress(mlp(), torch.randn(3, 7))
    broken = mlp()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    chosen = choose(list(sites(broken))[:1], Table(None), ["float32"], False, 1)
    assert chosen[0].reason == "it holds values that are not finite"


def saved(tmp_path: Path) -> Path:
    fast = mlp()
    for name in ("0", "2"):
        site = Site(name, fast.get_submodule(name))
        fast[int(name)] = site.sparse(site.pack("float32").indexed(col=True, bits=True), site.module.bias, "relu")
    return save_compressed(fast, tmp_path / "fast")


def test_files(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    stored = load_file(folder / "compressed.safetensors")
    assert {n for n in stored if n.startswith("0.")} == {"0.values", "0.bits", "0.bias"}
    dense = sum(p.numel() * 4 for p in mlp().parameters())
    assert sum(t.numel() * t.element_size() for t in stored.values()) < 0.5 * dense
    with pytest.raises(OutputError, match="exists"):
        save_compressed(load_compressed(folder, mlp()), folder)
    with pytest.raises(ModelError, match="no layer of this model is packed"):
        save_compressed(mlp(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ModelError, match="fresh model"):
        secateur.load(folder)
    with pytest.raises(ModelError, match="belongs to another model"):
        secateur.load(folder, cnn())
    loaded = secateur.load(folder, mlp())
    assert isinstance(loaded[0], SparseLinear) and loaded[0].activation == "relu"


@pytest.mark.parametrize(
    "change", ["cut", "bits", "values", "rows", "index", "activation", "missing", "version", "facts"]
)
def test_changed_files_are_refused(tmp_path: Path, change: str) -> None:
    folder = saved(tmp_path)
    weights, record = folder / "compressed.safetensors", json.loads((folder / "compressed.json").read_text())
    tensors = load_file(weights)
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    if change == "bits":
        tensors["0.bits"] = tensors["0.bits"].flip(0)
    if change == "values":
        tensors["0.values"] = tensors["0.values"][:-1].clone()
    if change == "rows":
        record["layers"]["0"]["rows"] = 131
    if change == "index":
        record["layers"]["0"]["index"] = []
    if change == "activation":
        record["layers"]["0"]["activation"] = "tanh"
    if change == "missing":
        del tensors["4.weight"]
    if change == "version":
        record["version"] = 2
    if change == "facts":
        record["layers"]["0"]["activation"] = "none"
    if change in ("bits", "values", "missing"):
        save_file(tensors, weights)
        if change != "bits":  # a changed file is refused by its digest; here whoever changed it knew that
            record["sha256"] = digest(weights)
            record["shapes"] = {n: list(t.shape) for n, t in tensors.items()}
    if change != "facts":
        record["record"] = _of_record(record)
    (folder / "compressed.json").write_text(json.dumps(record))
    model = mlp()
    before = model(torch.ones(1, 70))
    with pytest.raises(ModelError):
        secateur.load(folder, model)
    assert torch.equal(model(torch.ones(1, 70)), before)


@needs_kernels
def test_convolutions_are_saved(sparse_wins: None, tmp_path: Path) -> None:
    fast = compress(cnn(), torch.randn(1, 3, 8, 8), cache=False)
    loaded = secateur.load(secateur.save(fast, tmp_path / "fast"), cnn())
    assert isinstance(loaded[3], SparseConv2d) and loaded[3].stride == [2, 2] and loaded[3].bias is None
    other = cnn()
    other[3].stride = (1, 1)
    with pytest.raises(ModelError, match="another kernel, stride"):
        secateur.load(tmp_path / "fast", other)


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_from_the_command_line(sparse_wins: None, tied: bool, tmp_path: Path) -> None:
    """With zeros in the embedding too, the head that shares it is packed, and the embedding stays."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    words = model.lm_head.weight.detach().clone()
    sparse(model)
    if tied:
        model.lm_head.weight.data.copy_(words)
    model.save_pretrained(tmp_path / "dense")
    run = CliRunner().invoke(
        app, ["compress", str(tmp_path / "dense"), "--out", str(tmp_path / "fast"), "--tokens", "9,1"]
    )
    assert run.exit_code == 0 and f"{14 if tied else 15} of 15 layers are packed" in run.output, run.output
    ids = torch.arange(9)[None]
    fast = secateur.load(tmp_path / "fast")
    torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert (fast.lm_head.weight is fast.model.embed_tokens.weight) == tied
    assert torch.equal(fast.lm_head.weight, fast.model.embed_tokens.weight)
    assert fast.generate(ids, max_new_tokens=4, do_sample=False).tolist() == (
        model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    )
    with pytest.raises(OSError, match="model.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    found = CliRunner().invoke(app, ["measure", str(tmp_path / "fast"), "--tokens", "9,1", "--json"])
    rows = json.loads(found.output)
    small, dense = rows, rows["baseline"]
    assert found.exit_code == 0
    assert set(small["latency"]) == {"9 tokens", "1 tokens", "first token", "per token"} == set(dense["latency"])
    assert small["flops"] == dense["flops"] and small["flops_unknown"] == {}
    assert small["effective_flops"] == dense["effective_flops"] < small["flops"]
    head = 0 if tied else fast.lm_head.nonzeros
    assert small["nonzero"] == dense["nonzero"] + head and small["peak_memory"] > 0 and dense["peak_memory"] > 0
    assert small["parameters"] < dense["parameters"] and small["bytes"] < dense["bytes"]
    with pytest.raises(secateur.SecateurError, match="exists"):
        CliRunner().invoke(
            app, ["compress", str(tmp_path / "dense"), "--out", str(tmp_path / "fast")], catch_exceptions=False
        )


@needs_kernels
def test_indexes_that_were_replaced_are_checked(sparse_wins: None) -> None:
    fast = compress(mlp(), torch.randn(9, 70), cache=False)
    fast[0].col = torch.full_like(fast[0].col, 255)
    with pytest.raises(ModelError, match="damaged"):
        fast(torch.randn(9, 70))
