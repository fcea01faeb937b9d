"""From directory to directory: stock tools load the result, streaming equals residency, a kill is survived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur import Recipe, prune_directory
from secateur.errors import DataError, ModelError, NumericalError, OutputError, RecipeError
from secateur.stream import Tick


def masks_of(path: Path, run: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path)
    masks = secateur.Masks.of_zeros(model, [r["name"] for r in run["layers"]])
    return {name: masks[name] for name in masks}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_streams_and_loads_in_stock_transformers(family: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", family)
    run = prune_directory(
        source, Recipe.of("sparsegpt", sparsity=0.5), tmp_path / "out", data=tiny.ids(), windows_count=None
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert run["sparsity"]["pruned_layers"] == pytest.approx(0.5, abs=2e-3)
    zeros = {r["name"]: r["parameters"] - r["kept"] for r in run["layers"]}
    found = secateur.Masks.of_zeros(model, list(zeros))
    for name, gone in zeros.items():
        assert int((~found[name]).sum()) == gone, name
    dense = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        a, b = dense(input_ids=tiny.ids()).logits, model(input_ids=tiny.ids()).logits
    assert torch.isfinite(b).all()
    assert 0 < float((a - b).norm() / a.norm()) < 1.0
    # every parameter is pruned or named as skipped
    named = sum(r["parameters"] for r in run["layers"]) + sum(s["parameters"] for s in run["skipped"])
    assert named == sum(p.numel() for p in dense.parameters())


def test_config_is_unchanged_but_for_the_note(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    prune_directory(source, Recipe.of("magnitude"), tmp_path / "out")
    before, after = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "out"))
    note = after.pop("secateur")
    assert before == after
    assert note["method"] == "magnitude"
    assert note["sparsity"] == 0.5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ria"])
def test_streamed_equals_resident_without_propagation(method: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    recipe = Recipe.of(method, sparsity=0.5, propagate="off")
    run = prune_directory(source, recipe, tmp_path / "out", data=tiny.ids(), windows_count=None)
    model = tiny.build()
    pruned = secateur.prune(model, recipe, data=tiny.ids())
    streamed = masks_of(tmp_path / "out", run)
    for name, mask in streamed.items():
        assert torch.equal(mask, pruned.masks[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
@pytest.mark.parametrize("propagate", ["layer", "block", "off"])
def test_chunks_change_nothing_but_rounding(family: str, propagate: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", family)
    recipe = Recipe.of("wanda", sparsity=0.5, propagate=propagate)
    records = {}
    for memory in (1 << 30, 1):  # all at once; one window at a time
        out = tmp_path / f"out{memory}"
        prune_directory(source, recipe, out, data=tiny.ids(), windows_count=None, memory=memory)
        records[memory] = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, a in records[1 << 30].items():
        differing = int(((a == 0) != (records[1][name] == 0)).sum())
        assert differing <= 0.01 * a.numel(), name


def test_propagation_sees_pruned_layers(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    found = {}
    for propagate in ("layer", "block", "off"):
        out = tmp_path / propagate
        run = prune_directory(
            source, Recipe.of("wanda", sparsity=0.7, propagate=propagate), out, data=tiny.ids(), windows_count=None
        )
        found[propagate] = masks_of(out, run)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(found["layer"][first], found["off"][first])  # nothing was pruned before it
    down, later = "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"
    assert torch.equal(found["block"][down], found["off"][down])
    assert not torch.equal(found["layer"][down], found["off"][down])
    assert not torch.equal(found["block"][later], found["off"][later])


@pytest.mark.parametrize("method", ["wanda", "owl-sparsegpt", "ebft"])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_killed_run_goes_on_and_ends_the_same(method: str, stop_at: int, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    recipe = Recipe.of(method, sparsity=0.6)
    kwargs: dict[str, Any] = {"data": tiny.ids(), "windows_count": None}
    prune_directory(source, recipe, tmp_path / "whole", **kwargs)
    seen: list[int] = []

    def kill(tick: Tick) -> None:
        seen.append(tick.index)
        if tick.index == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_directory(source, recipe, tmp_path / "out", progress=kill, **kwargs)
    assert not (tmp_path / "out").exists()
    solved: list[int] = []
    run = prune_directory(source, recipe, tmp_path / "out", progress=lambda t: solved.append(len(t.records)), **kwargs)
    assert [n > 0 for n in solved] == [k >= stop_at for k in range(3)]  # finished blocks are not done again
    assert len(run["layers"]) == 21
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "out"))
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert not (tmp_path / "out.partial").exists()
    assert not list((tmp_path / "out").glob("activations*"))


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")

    def kill(tick: Tick) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_directory(source, Recipe.of("magnitude", sparsity=0.9), tmp_path / "out", progress=kill)
    run = prune_directory(source, Recipe.of("magnitude", sparsity=0.5), tmp_path / "out")
    assert {round(r["sparsity"], 3) for r in run["layers"]} == {0.5}


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", dtype=torch.bfloat16)
    prune_directory(
        source, Recipe.of("sparsegpt", granularity="2:4"), tmp_path / "out", data=tiny.ids(), windows_count=None
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_one_block_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live bytes of parameters never exceed the prelude and one block."""
    source = tiny.save(tmp_path / "dense", num_hidden_layers=6)
    from secateur.stream import shards

    original = shards.Shards.load
    live: list[int] = []

    def load(self: shards.Shards, index: int) -> torch.nn.Module:
        block = original(self, index)
        live.append(sum(p.numel() for p in self.model.parameters() if p.device.type != "meta"))
        return block

    monkeypatch.setattr(shards.Shards, "load", load)
    prune_directory(source, Recipe.of("wanda", sparsity=0.5), tmp_path / "out", data=tiny.ids(), windows_count=None)
    model = tiny.build(num_hidden_layers=6)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    prelude = model.model.embed_tokens.weight.numel()  # the untied head is never loaded
    assert len(live) == 6
    assert max(live) == block + prelude + model.model.norm.weight.numel()


def test_part_of_the_blocks(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    run = prune_directory(
        source, Recipe.of("wanda", sparsity=0.5), tmp_path / "out", data=tiny.ids(), windows_count=None, stop=1
    )
    assert {r["block"] for r in run["layers"]} == {0}
    assert "first 1 blocks" in run["notes"][0]
    a, b = (AutoModelForCausalLM.from_pretrained(p).model.layers[2] for p in (source, tmp_path / "out"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# -- bad input: one sentence, and nothing written --------------------------------------------------


def refuses(tmp_path: Path, error: type[Exception], words: str, **kwargs: Any) -> None:
    source = kwargs.pop("source")
    with pytest.raises(error, match=words) as caught:
        prune_directory(source, kwargs.pop("recipe", Recipe.of("wanda")), tmp_path / "out", **kwargs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_shard(tmp_path: Path) -> None:
    model = tiny.build()
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    shard = sorted((tmp_path / "dense").glob("model-*.safetensors"))[1]
    shard.unlink()
    refuses(tmp_path, ModelError, f"{shard.name} is missing", source=tmp_path / "dense", data=tiny.ids())


def test_truncated_shard(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(tmp_path, ModelError, "not a readable safetensors", source=source, data=tiny.ids())


def test_wrong_shape(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refuses(tmp_path, ModelError, r"has shape \[.*the directory is not one model", source=source, data=tiny.ids())


def test_missing_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny.save(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refuses(tmp_path, ModelError, "hold no model.layers.1.mlp.up_proj.weight", source=source, data=tiny.ids())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_name_the_layer(value: float, tmp_path: Path) -> None:
    model = tiny.build()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path / "dense")
    for method in ("magnitude", "wanda", "sparsegpt"):
        refuses(
            tmp_path, NumericalError, r"layers\.1\.mlp\.up_proj has NaN or infinite",
            source=tmp_path / "dense", data=tiny.ids(), recipe=Recipe.of(method),
        )  # fmt: skip


def test_bad_activations_name_the_place(tmp_path: Path) -> None:
    model = tiny.build()
    model.model.layers[0].input_layernorm.weight.data[:] = float("inf")
    model.save_pretrained(tmp_path / "dense")
    refuses(tmp_path, NumericalError, r"layers\.0\.self_attn\.q_proj", source=tmp_path / "dense", data=tiny.ids())


def test_indivisible_pattern(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", intermediate_size=46)
    refuses(
        tmp_path, RecipeError, r"multiple of 4; .*down_proj has 46 \(skip it with --skip",
        source=source, data=tiny.ids(), recipe=Recipe.of("wanda", granularity="2:4"),
    )  # fmt: skip


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    refuses(tmp_path, DataError, "no tokenizer", source=tiny.save(tmp_path / "dense"), data="text:calibration")


def test_no_such_model(tmp_path: Path) -> None:
    refuses(tmp_path, ModelError, "there is no model at", source=tmp_path / "nothing")


def test_existing_output(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        prune_directory(source, Recipe.of("magnitude"), out)
    assert (out / "precious.txt").read_text() == "mine"
    prune_directory(source, Recipe.of("magnitude"), out, force=True)
    assert (out / "model.safetensors.index.json").exists()
    with pytest.raises(OutputError, match="is the model itself"):
        prune_directory(source, Recipe.of("magnitude"), source, force=True)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from secateur.stream import shards

    source = tiny.save(tmp_path / "dense")
    original, calls = shards.save_file, []

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) > 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(shards, "save_file", full)
    kwargs: dict[str, Any] = {"data": tiny.ids(), "windows_count": None}
    refuses(tmp_path, OutputError, "No space left.*goes on where it stopped", source=source, **kwargs)
    assert not list((tmp_path / "out.partial").glob(".*.tmp"))
    monkeypatch.setattr(shards, "save_file", original)
    prune_directory(source, Recipe.of("wanda"), tmp_path / "out", **kwargs)  # and it does


def test_not_positive_definite_is_damped_and_said(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    one_token = torch.full((2, 8), 5)  # every input of a layer is the same: rank one
    recipe = Recipe.of("sparsegpt", sparsity=0.5, knobs={"solver": {"damp": 0.0}})
    run = prune_directory(source, recipe, tmp_path / "out", data=one_token, windows_count=None)
    assert any("Hessian" in note for note in run["notes"]), run["notes"]


def test_index_may_not_leave_the_directory(tmp_path: Path) -> None:
    model = tiny.build()
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    index = tmp_path / "dense" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][next(iter(data["weight_map"]))] = "../../etc/passwd"
    index.write_text(json.dumps(data))
    refuses(tmp_path, ModelError, "not a file name", source=tmp_path / "dense", data=tiny.ids())
