"""Layers for GPUs: what they compute, how they are chosen by a clock that is made up, files; on a GPU, all of it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.compression import (
    GpuLinear,
    Installed,
    SemiLinear,
    compress,
    dense_again,
    load_compressed,
    save_compressed,
)
from secateur.compression import gpu as of_gpu
from secateur.compression import make as of_make
from secateur.compression.candidates import Site, Table
from secateur.compression.choose import choose
from secateur.compression.gpu import Times, beside, compress_gpu, converted, event_times, gpu_sites, onto_gpu
from secateur.compression.gpu_layers import gpu_for, packed_for_gpu
from secateur.errors import ModelError, RecipeError, SecateurError
from secateur.formats import pack
from secateur.kernels import gpu
from secateur.measure.flops import effective_flops, flops
from secateur.models import load_model
from tests.kernels.test_gpu import DEVICE, needs_triton, two_of_four

DTYPE = torch.float16


def mlp(dtype: torch.dtype = DTYPE) -> nn.Module:
    """Half zeros anywhere, two of four zero, and no zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(70, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3), nn.Conv1d(1, 1, 1)
    )[:5]
    with torch.no_grad():
        model[0].weight *= torch.rand(128, 70) < 0.5
        model[2].weight.copy_(two_of_four(64, 128).float() / 8)
    return model.eval().to(dtype)


def layer(form: str, dtype: torch.dtype = DTYPE) -> tuple[Any, nn.Linear]:
    """One of the layers on the tests' device, and the dense one."""
    dense: Any = mlp(dtype)[2 if form == "2:4" else 0]
    dense = dense.to(DEVICE).requires_grad_(False)
    if form == "2:4":
        return SemiLinear(dense.weight, dense.bias).eval(), dense
    made = GpuLinear(packed_for_gpu(dense.weight), dense.bias).to(DEVICE)
    return GpuLinear(made.packed, dense.bias, whole=form == "bits+dense").to(DEVICE).eval(), dense


FORMS = pytest.mark.parametrize("form", ["bits", "bits+dense", "2:4"])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_outputs(form: str, dtype: torch.dtype) -> None:
    made, dense = layer(form, dtype)
    assert made.form == form and torch.equal(made.weight, dense.weight)
    assert torch.equal(made.packed.dense(), dense.weight.cpu())
    assert made.packed.density < 0.6 and made.stored < 0.6 * dense.weight.numel() + made.rows
    for tokens in ((1,), (2, 2), (9,), (0,), ()):
        x = torch.randn(*tokens, dense.in_features, device=DEVICE).to(dtype)
        y = made(x)
        assert y.shape == (*tokens, dense.out_features) and y.dtype == dtype
        torch.testing.assert_close(y, dense(x), rtol=2e-2, atol=2e-2)
    assert made(torch.randn(2, dense.in_features, device=DEVICE)).dtype == torch.float32


@FORMS
def test_relu_and_no_bias(form: str) -> None:
    made, dense = layer(form)
    x = torch.randn(6, dense.in_features, device=DEVICE, dtype=DTYPE)
    weight: Any = dense.weight
    bare = SemiLinear(weight, None, "relu") if form == "2:4" else GpuLinear(made.packed, None, "relu").to(DEVICE)
    right = nn.functional.linear(x, weight).relu()
    torch.testing.assert_close(bare(x), right, rtol=1e-2, atol=1e-2)
    assert float((bare(x) == 0).float().mean()) > 0.2 and "relu" in repr(bare)


@FORMS
def test_compiled_and_exported(form: str) -> None:
    made, dense = layer(form)
    x = torch.randn(3, dense.in_features, device=DEVICE, dtype=DTYPE)
    right = made(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), right)
    sizes = ({0: torch.export.Dim("tokens", min=2, max=512)},)
    program = torch.export.export(nn.Sequential(made), (x,), dynamic_shapes=sizes)
    more = torch.cat([x, x + 1, x])
    assert torch.equal(program.module()(more), made(more))
    found = torch.func.vmap(made, in_dims=1)(torch.stack([x, x + 1], 1))
    torch.testing.assert_close(found, torch.stack([made(x), made(x + 1)]))
    with pytest.raises(SecateurError, match="not over its weights"):
        torch.func.vmap(lambda b: torch.ops.secateur.semi_linear(x, b, None, None, 64, 128, 0))(made.bias[None])


@FORMS
def test_gradients_are_refused(form: str) -> None:
    made, dense = layer(form)
    x = torch.randn(3, dense.in_features, device=DEVICE, dtype=DTYPE, requires_grad=True)
    with pytest.raises(SecateurError, match="for inference"):
        made(x).sum().backward()
    with torch.no_grad():
        assert not made(x).requires_grad


@FORMS
def test_conversions_are_refused(form: str) -> None:
    made, dense = layer(form)
    x = torch.randn(3, dense.in_features, device=DEVICE, dtype=DTYPE)
    model = nn.Sequential(made)
    right = model(x)
    for convert in (model.float, model.bfloat16, lambda: model.to("meta")):
        with pytest.raises(ModelError, match="convert the dense model"):
            convert()
    assert torch.equal(model.half().to(DEVICE)(x), right)
    with pytest.raises(SecateurError, match="takes floats"):
        model(x.int())
    with pytest.raises(SecateurError, match="given the shape"):
        model(x[:, :5])


@FORMS
def test_copied_and_loaded(form: str) -> None:
    made, dense = layer(form)
    x = torch.randn(9, dense.in_features, device=DEVICE, dtype=DTYPE)
    right, twin = made(x), copy.deepcopy(made)
    assert torch.equal(twin(x), right) and "dense" not in made.state_dict()
    for name in ("values", "kept", "bias"):
        if hasattr(twin, name):
            getattr(twin, name).zero_()
    assert not twin(x).any() and torch.equal(made(x), right)
    for assign in (False, True):
        twin.load_state_dict(made.state_dict(), assign=assign)
        assert torch.equal(twin(x), right)


def test_a_changed_index_is_refused() -> None:
    for part in ("start", "bits"):
        made, _ = layer("bits")
        x = torch.randn(2, 70, device=DEVICE, dtype=DTYPE)
        made(x)
        getattr(made, part).view(-1)[3] += 1
        for _ in range(2):
            with pytest.raises(ModelError, match="damaged"):
                made(x)


def test_what_is_packed_in_another_way() -> None:
    weight = torch.eye(70)
    for packed in (pack(weight), pack(weight, "int8", panel=64), pack(weight, panel=64).indexed(True, False)):
        with pytest.raises(ModelError, match="read bit masks"):
            GpuLinear(packed, None)


# Choosing, with a clock that is made up; the layers then compute on the CPU.


def clock(seconds: Mapping[str, float], refuse: bool = False) -> Callable[..., dict[str, list[float]]]:
    """A clock that reads so much for each candidate, after it has run."""

    def read(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        for run in runs.values():
            run()
        return {name: [seconds[name]] * repeats for name in runs}

    return read


def site(tokens: tuple[int, ...], name: str = "2") -> Site:
    found = Site(name, mlp().get_submodule(name).to(DEVICE))
    found.inputs = {(w, (n,)): 1 for w, n in enumerate(tokens)}
    return found


def row(dense: float, bits: float | None = None, semi: float | None = None) -> dict[str, float]:
    found = {"dense": dense, "bits": bits, "2:4": semi}
    return {name: s for name, s in found.items() if s is not None}


@pytest.mark.parametrize(
    "many, one, chosen",
    [
        (row(1.0, 3.0, 0.6), row(1.0, 0.7, 0.9), "2:4"),  # the best of both together
        (row(1.0, 3.0, 1.2), row(1.0, 0.5, 1.2), "bits+dense"),  # a prompt stays dense, a token does not
        (row(1.0, 0.98), row(1.0, 0.5), "bits"),  # a dense weight must pay for its memory
        (row(1.0, 3.0), row(1.0, 0.99), ""),  # too little is won
        (row(1.0), row(1.0), ""),  # nothing else is there
    ],
)
def test_what_is_chosen(many: dict[str, float], one: dict[str, float], chosen: str) -> None:
    times = Times(Table(None), "made up", clock({}))
    times.seconds = lambda site, shape: {128: many, 1: one}[shape[0]]  # type: ignore[method-assign]
    found = choose([site((128, 1))], times, (), True, 2, None, of_gpu.options)[0]
    assert (found.index, found.kind) == (chosen, "float16" if chosen else "dense"), found


def test_candidates_are_run_and_remembered(tmp_path: Path) -> None:
    table = Table(tmp_path / "layers.json")
    read = Times(table, "made up", clock({"dense": 1.0, "bits": 0.5, "2:4": 0.25}))
    bits = {"bits"} if gpu.kernels() is not None else set()
    assert set(read.seconds(site((3,)), (3,))) == {"dense", "2:4", *bits}
    assert set(read.seconds(site((3,), "0"), (3,))) == {"dense", *bits}
    assert len(table.rows) == 2 and all("made up" in key and "float16 on 3" in key for key in table.rows)
    table.save()
    again = Times(Table(tmp_path / "layers.json"), "made up", lambda *_: pytest.fail("measured again"))
    assert again.seconds(site((3,)), (3,)) == read.seconds(site((3,)), (3,))
    other = Times(Table(tmp_path / "layers.json"), "another", clock({"dense": 2.0, "bits": 2.0, "2:4": 2.0}))
    assert other.seconds(site((3,)), (3,))["dense"] == 2.0


def test_a_gpu_without_two_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: Tensor) -> None:
        raise SecateurError("2:4 products are not available on this GPU: too old")

    monkeypatch.setattr(gpu, "compress_semi", refuse)
    read = Times(Table(None), "made up", clock({"dense": 1.0, "bits": 2.0}))
    assert "2:4" not in read.seconds(site((3,)), (3,)) and "too old" in read.refused
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    fast = compress_gpu(mlp().to(DEVICE), loads(), cache=False, clock=clock({"dense": 1.0, "bits": 2.0}), device=DEVICE)
    note = fast.compression.note
    assert "too old" in note and "need triton" in note and "nothing is packed" in note


def loads() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [((torch.randn(n, 70, dtype=DTYPE, device=DEVICE),), {}) for n in (9, 1)]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As where bit masks win on single tokens, 2:4 everywhere, and the whole model."""
    monkeypatch.setattr(of_make, "latency", lambda models, *_: {name: {"dense": 1.0}.get(name, 0.5) for name in models})

    def seconds(self: Times, site: Site, shape: tuple[int, ...]) -> dict[str, float]:
        return row(1.0, 0.5 if shape[0] == 1 else 3.0, 0.4 if site.name == "2" else None)

    monkeypatch.setattr(Times, "seconds", seconds)
    model = mlp().to(DEVICE)
    found: Any = compress_gpu(model, loads(), cache=False, device=DEVICE)
    assert not any(isinstance(m, Installed) for m in model.modules())
    monkeypatch.undo()
    return found


def test_a_model_is_compressed_saved_and_loaded(fast: Any, tmp_path: Path) -> None:
    assert [type(m) for m in fast] == [GpuLinear, nn.ReLU, SemiLinear, nn.ReLU, nn.Linear]
    chosen = {c.name: (c.kind, c.index, c.reason) for c in fast.compression.choices}
    assert chosen["0"][:2] == ("float16", "bits+dense") and chosen["2"][:2] == ("float16", "2:4")
    assert chosen["4"] == ("dense", "", "0% zeros")
    assert fast.compression.error < 0.01 and "measured on" in str(fast.compression)
    secateur.save(fast, tmp_path / "fast")
    record = json.loads((tmp_path / "fast" / "compressed.json").read_text())
    assert {n: facts["form"] for n, facts in record["layers"].items()} == {"0": "bits+dense", "2": "2:4"}
    x = loads()[0][0][0]
    if DEVICE == "cuda":
        loaded: Any = secateur.load(tmp_path / "fast", mlp())
        assert [getattr(m, "form", "") for m in loaded] == ["bits+dense", "", "2:4", "", ""]
        assert all(t.is_cuda for t in (*loaded.parameters(), *loaded.buffers())) and torch.equal(loaded(x), fast(x))
    else:
        with pytest.warns(UserWarning, match="made dense: it is for GPUs"):
            loaded = secateur.load(tmp_path / "fast", mlp())
        assert not any(isinstance(m, Installed) for m in loaded.modules())
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), mlp().parameters(), strict=True))
        assert torch.equal(loaded(x), mlp()(x))


def test_a_language_model_from_the_command_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on the CPU: moved, compressed, written; loaded where there is none, it is dense in its dtype."""
    from secateur.compression import command

    out = tmp_path / "fast"
    net = load_model(model, torch.float32)
    secateur.prune(net, "magnitude", sparsity=0.5)
    net.save_pretrained(tmp_path / "pruned")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "pruned")

    def on_cpu(net: nn.Module, examples: list[Any], **_: Any) -> nn.Module:
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        return compress_gpu(net, [((), x) for x in examples], cache=False, device="cpu")

    monkeypatch.setattr(of_gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(command, "onto_gpu", lambda net, d: converted(net, torch.device("cpu"), of_gpu.DTYPES[d]))
    monkeypatch.setattr(command, "compress", on_cpu)
    monkeypatch.setattr(Times, "seconds", lambda self, site, shape: row(1.0, 0.5))
    monkeypatch.setattr(of_make, "latency", lambda models, *_: {name: 1.0 - 0.5 * (name == "fast") for name in models})
    words = ["compress", str(tmp_path / "pruned"), "--out", str(out), "--for", "cuda", "--tokens", "9,1"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0 and "bfloat16 by bits" in run.output, run.output
    monkeypatch.undo()
    record = json.loads((out / "compressed.json").read_text())
    assert {facts["form"] for facts in record["layers"].values()} == {"bits"}
    if DEVICE == "cpu":
        with pytest.warns(UserWarning, match="it is for GPUs"):
            loaded = secateur.load(out)
        right = load_model(tmp_path / "pruned", torch.bfloat16)
        ids = torch.arange(9)[None]
        assert torch.equal(loaded(input_ids=ids).logits, right(input_ids=ids).logits)


def test_files_say_what_gpus_need(fast: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU: layers come back in their form; without triton the model is dense, and says so."""
    folder = save_compressed(fast, tmp_path / "fast")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    assert gpu_for({"a": {"form": "bits"}}) == ("cuda", "its kernels are Triton kernels (pip install triton)")
    assert gpu_for({"a": {}}) == (None, "")
    from secateur.compression import store

    monkeypatch.setattr(store, "gpu_for", lambda _: (DEVICE, ""))
    loaded: Any = load_compressed(folder, mlp())
    assert [getattr(m, "form", "") for m in loaded] == ["bits+dense", "", "2:4", "", ""]
    monkeypatch.undo()
    x = loads()[0][0][0]
    assert torch.equal(loaded(x), fast(x))
    again = dense_again(copy.deepcopy(loaded))
    assert all(torch.equal(a, b.to(DEVICE)) for a, b in zip(again.parameters(), mlp().parameters(), strict=True))


def test_a_damaged_form_is_refused(fast: Any, tmp_path: Path) -> None:
    from secateur.compression.store import _of_record

    folder = save_compressed(fast, tmp_path / "fast")
    record = json.loads((folder / "compressed.json").read_text())
    record["layers"]["0"]["form"] = "2:4"  # which it is not
    for form in ("2:4", "csr"):
        record["layers"]["0"]["form"] = form
        record["record"] = _of_record(record)
        (folder / "compressed.json").write_text(json.dumps(record))
        with pytest.raises(ModelError, match="damaged"):
            load_compressed(folder, mlp())


def test_sites_say_why() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 8).double(), nn.Linear(8, 8))
    with torch.no_grad():
        for m in model:
            m.weight *= 0
    model[3].to("meta")
    reasons = [s.reason for s in gpu_sites(model, "cpu")]
    assert reasons[0] == "" and "convolutions" in reasons[1] and "float64" in reasons[2] and "on meta" in reasons[3]
    assert all("these kernels are for cuda" in s.reason for s in gpu_sites(model, "cuda"))


def test_a_model_is_converted_as_loaders_do() -> None:
    model = mlp(torch.float32)
    model.register_buffer("frequencies", torch.rand(3), persistent=False)
    model.register_buffer("mean", torch.rand(3))
    model.register_buffer("steps", torch.tensor(7))
    model[4].weight = nn.Parameter(torch.zeros(3, 64))
    model.append(nn.Linear(3, 64))
    model[5].weight = model[2].weight  # tied
    found: Any = converted(model, torch.device(DEVICE), torch.bfloat16)
    assert found is model and all(p.dtype == torch.bfloat16 and p.device.type == DEVICE for p in model.parameters())
    dtypes = [found.frequencies.dtype, found.mean.dtype, found.steps.dtype]
    assert dtypes == [torch.float32, torch.bfloat16, torch.int64] and found[5].weight is found[2].weight
    assert beside({"x": torch.ones(2)}, mlp())["x"].dtype == torch.float32  # on the CPU inputs stay as they are


def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="keep the dtype"):
        compress_gpu(mlp(), loads(), kinds=["int8"], device=DEVICE)
    with pytest.raises(ModelError, match="does not run on the example"):
        compress_gpu(mlp().to(DEVICE), [((torch.randn(3, 7),), {})], cache=False, device=DEVICE)
    with pytest.raises(RecipeError, match="'int8' is no dtype"):
        onto_gpu(mlp(), "int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="needs a GPU"):
        onto_gpu(mlp(), "float16")
    words = ["compress", "demo", "--out", str(tmp_path / "fast")]
    with pytest.raises(ModelError, match="--for cuda needs a GPU"):
        CliRunner().invoke(app, [*words, "--for", "cuda"], catch_exceptions=False)
    assert CliRunner().invoke(app, [*words, "--dtype", "float16"]).exit_code == 2
    assert CliRunner().invoke(app, [*words, "--for", "tpu"]).exit_code == 2


# On a GPU.


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 128])
@pytest.mark.parametrize("rows, cols", [(4096, 4096), (11008, 4096), (1000, 1001)])
def test_bit_masks_on_a_gpu(dtype: torch.dtype, tokens: int, rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator) * (torch.rand(rows, cols, generator=generator) < 0.5)
    weight, x = weight.to(dtype), torch.randn(tokens, cols, generator=generator).to(dtype)
    made = GpuLinear(packed_for_gpu(weight), None).to("cuda")
    assert torch.equal(made.weight.cpu(), weight)
    right, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    bound = torch.finfo(dtype).eps * (right.abs() + 0.1 * size) + 1e-5 * size
    assert bool(((made(x.cuda()).cpu().double() - right).abs() <= bound).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 128])
def test_two_of_four_on_a_gpu(dtype: torch.dtype, tokens: int) -> None:
    weight = two_of_four(512, 1024).to(dtype)
    try:
        made = SemiLinear(weight.cuda(), None)
    except SecateurError as error:
        pytest.skip(str(error))
    assert torch.equal(made.weight.cpu(), weight)
    x = torch.randn(tokens, 1024).to(dtype)
    right, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert bool(((made(x.cuda()).cpu().double() - right).abs() <= torch.finfo(dtype).eps * size).all())


@pytest.mark.gpu
def test_a_model_on_a_gpu() -> None:
    """The real clock; whatever it says, the outputs are the same."""
    model = mlp().to("cuda")
    times = event_times({"sum": lambda: torch.ones(1 << 20, device="cuda").sum()}, 3)
    assert len(times["sum"]) == 3 and min(times["sum"]) > 0
    examples = [torch.randn(n, 70, dtype=DTYPE, device="cuda") for n in (128, 1)]
    found: Any = compress(model, examples, cache=False)
    assert len(found.compression.choices) == 3 and "gpu" in found.compression.machine
    for x in examples:
        torch.testing.assert_close(found(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would measure")
def test_the_benchmark_without_a_gpu(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "no GPU here: nothing is measured\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form, kept", [("bits", None), ("bits+dense", None), ("2:4", 64 * 128 // 2)])
def test_operations_are_counted(form: str, kept: int | None) -> None:
    """Dense ones by the shape; effective ones by what is kept, which for 2:4 is two of four."""
    made, dense = layer(form)
    x = torch.randn(3, dense.in_features, dtype=DTYPE, device=DEVICE)
    assert flops(made, x).total == 2 * 3 * dense.weight.numel() and not flops(made, x).unknown
    assert effective_flops(made, x).total == 2 * 3 * (kept or int(dense.weight.count_nonzero()))
