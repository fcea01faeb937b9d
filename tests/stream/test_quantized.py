"""Quantized model directories: small on disk, and the same model under every loader."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.conftest import Run
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import RecipeError
from secateur.formats.integers import is_packed
from secateur.measure.size import bytes_on_disk
from secateur.models import load_model
from secateur.stream import Tick

JOINT = ("--method", "sparsegpt", "--sparsity", "0.5")


def names(path: Path) -> set[str]:
    found: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            found |= set(f.keys())
    return found


@pytest.mark.parametrize("resident", [False, True])
def test_joint_from_the_command_line(model: Path, text: Path, tmp_path: Path, run: Run, resident: bool) -> None:
    out = tmp_path / "out"
    words = (*JOINT, "--quantize", "int4:16", "--data", f"text:{text}", "--windows", 4, "--length", 16, "--out", out)
    status, _, error = run("prune", model, *words, *(["--resident"] if resident else []))
    assert status == 0, error
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["solver"] == "sparsegpt-gptq" and record["recipe"]["knobs"]["solver"]["bits"] == 4
    assert record["sparsity"]["pruned_layers"] == pytest.approx(0.5, abs=1e-3)
    assert is_packed(out) and not any(n.endswith("_proj.weight") for n in names(out))
    ids = torch.arange(16)[None] % 60
    loaded = load_model(out)
    again = secateur.load(out)
    assert torch.equal(loaded(ids).logits, again(ids).logits)
    weight = loaded.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.float32 and type(loaded.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert 0.4 < float((weight == 0).float().mean()) < 0.7
    assert all(len(group.unique()) <= 16 for row in weight for group in row.split(16))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integers", ["int4:16", "int8"])
def test_stock_transformers_loads_it(model: Path, tmp_path: Path, integers: str, stored: torch.dtype) -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed, which transformers needs to read its layout")
    load_model(model).to(stored).save_pretrained(model)
    recipe = secateur.Recipe.of("magnitude", sparsity=0.5).quantized(integers)
    secateur.prune_directory(model, recipe, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(16)[None] % 60
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, load_model(tmp_path / "out")(ids).logits)


def test_bytes_on_disk(model: Path, tmp_path: Path) -> None:
    secateur.prune_directory(model, secateur.Recipe.of("magnitude").quantized("int4:16"), tmp_path / "four")
    tensors = {k: t for f in (tmp_path / "four").glob("*.safetensors") for k, t in load_file(f).items()}
    for name, words in tensors.items():
        if name.endswith(".weight_packed"):
            rows, columns = tensors[name.replace("_packed", "_shape")].tolist()
            scale = tensors[name.replace("_packed", "_scale")]
            held = sum(t.numel() * t.element_size() for t in (words, scale))
            assert held == rows * columns * (4 + 16 / 16) / 8


def test_an_interrupted_run_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = secateur.Recipe.of("magnitude").quantized("int8")
    secateur.prune_directory(model, recipe, tmp_path / "whole")

    def stop(tick: Tick) -> None:
        if tick.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.prune_directory(model, recipe, tmp_path / "parts", progress=stop)
    secateur.prune_directory(model, recipe, tmp_path / "parts")
    for part in ("config.json", *(f.name for f in (tmp_path / "whole").glob("*.safetensors"))):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "parts" / part).read_bytes()


def test_what_does_not_fit_is_said(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    few = ("--data", f"text:{text}", "--windows", 2, "--length", 16, "--out", tmp_path / "o")
    status, _, error = run("prune", model, *JOINT, "--quantize", "int4", *few)
    assert status == 2 and "a group of 64 inputs is not a divisor of the 32 inputs of model.layers.0" in error
    assert "choose a group of 32, or 0" in error and not (tmp_path / "o").exists()
    status, _, error = run("prune", model, *JOINT, "--quantize", "fp4", "--out", tmp_path / "o")
    assert status == 2 and "write int4, int8" in error


@pytest.mark.parametrize("resident", [False, True])
def test_smallest_from_the_command_line(model: Path, text: Path, tmp_path: Path, run: Run, resident: bool) -> None:
    """A bit mask and codes of survivors: the same model as in the stock layout, in the bytes that were predicted."""
    words = (*JOINT, "--quantize", "int4:16", "--data", f"text:{text}", "--windows", 4, "--length", 16)
    more = ["--resident"] if resident else []
    for storage in ("stock", "smallest"):
        status, _, error = run("prune", model, *words, "--storage", storage, "--out", tmp_path / storage, *more)
        assert status == 0, error
    stock, small = load_model(tmp_path / "stock"), secateur.load(tmp_path / "smallest")
    for (name, a), b in zip(stock.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(a, b), name
    told = json.loads((tmp_path / "smallest" / "stored.json").read_text())["weights"]
    tensors = {k: t for f in (tmp_path / "smallest").glob("*.safetensors") for k, t in load_file(f).items()}
    forms = {facts["form"] for name, facts in told.items() if name.endswith("_proj.weight")}
    assert forms == {"bitmask+integers"}
    for name, facts in told.items():
        held = sum(tensors[f"{name}:{part}"].nbytes for part in facts["parts"])
        kept = int(small.get_parameter(name).count_nonzero())
        given = {k: facts[k] for k in ("bits", "group", "symmetric") if k in facts}
        assert held == secateur.formats.bytes_of(
            facts["form"], tuple(facts["shape"]), nonzeros=kept, itemsize=4, **given
        )
    with pytest.raises(OSError, match="no file named model.safetensors"):  # stock tools refuse it
        AutoModelForCausalLM.from_pretrained(tmp_path / "smallest")


def test_what_is_stored_is_measured_and_pruned_again(model: Path, tmp_path: Path, run: Run) -> None:
    """Shared values, then integers, then floats: each directory is read as float layers, and nothing stale stays."""
    words = ("--method", "magnitude", "--sparsity", 0.6, "--quantize", "shared:5")
    status, _, error = run("prune", model, *words, "--out", tmp_path / "a")
    assert status == 0, error
    weight = load_model(tmp_path / "a").model.layers[0].mlp.down_proj.weight
    assert len(weight.unique()) <= 33 and float((weight == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
    found = secateur.measure(tmp_path / "a", None)
    assert found["bytes"] == sum(f.stat().st_size for f in (tmp_path / "a").glob("stored-*.safetensors"))
    assert found["bytes"] == bytes_on_disk(tmp_path / "a") < bytes_on_disk(model) / 1.5
    recipe = secateur.Recipe.of("magnitude", sparsity=0.7)
    secateur.prune_directory(tmp_path / "a", recipe.quantized("int4:16"), tmp_path / "b")
    assert is_packed(tmp_path / "b") and not (tmp_path / "b" / "stored.json").exists()
    again = load_model(tmp_path / "b").model.layers[0].mlp.down_proj.weight
    assert bool(((weight == 0) <= (again == 0)).all()) and not torch.equal(weight, again)
    secateur.prune_directory(tmp_path / "b", recipe, tmp_path / "c")
    assert not is_packed(tmp_path / "c")
    assert torch.equal(load_model(tmp_path / "c").model.layers[0].mlp.down_proj.weight, again)


def test_storages_that_cannot_be(model: Path, tmp_path: Path) -> None:
    recipe = secateur.Recipe.of("magnitude")
    with pytest.raises(RecipeError, match="write shared:5"):
        recipe.quantized("shared:9")
    with pytest.raises(RecipeError, match="no stock tool reads shared values"):
        secateur.prune_directory(model, recipe.quantized("shared"), tmp_path / "o", storage="stock")
    with pytest.raises(RecipeError, match="storage is stock or smallest"):
        secateur.prune_directory(model, recipe, tmp_path / "o", storage="zip")


def test_an_interrupted_run_keeps_its_forms(model: Path, tmp_path: Path) -> None:
    recipe = secateur.Recipe.of("magnitude").quantized("int8")
    secateur.prune_directory(model, recipe, tmp_path / "whole", storage="smallest")

    def stop(tick: Tick) -> None:
        if tick.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.prune_directory(model, recipe, tmp_path / "parts", storage="smallest", progress=stop)
    secateur.prune_directory(model, recipe, tmp_path / "parts", storage="smallest")
    for part in ("stored.json", *(f.name for f in (tmp_path / "whole").glob("*.safetensors"))):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "parts" / part).read_bytes()
