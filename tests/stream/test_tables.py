"""Embedding tables and output heads as integers, tied and not, streamed and resident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.conftest import Run
from torch import nn

import secateur
from secateur.errors import RecipeError
from secateur.formats import bytes_of, grid
from secateur.measure.size import bytes_on_disk
from secateur.models import load_model


@pytest.mark.parametrize("tied", [True, False])
def test_tables_from_the_command_line(tmp_path: Path, run: Run, tied: bool) -> None:
    source = tiny.save(tmp_path / "dense", "llama", tie_word_embeddings=tied)
    words = ("--method", "magnitude", "--sparsity", 0.5, "--quantize", "int4:16", "--embeddings", "int8")
    for name, more in (("streamed", []), ("resident", ["--resident"])):
        status, _, error = run("prune", source, *words, "--out", tmp_path / name, *more)
        assert status == 0, error
    dense, made, other = load_model(source), load_model(tmp_path / "streamed"), load_model(tmp_path / "resident")
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    tables = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    for (name, a), b in zip(made.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    told = json.loads((tmp_path / "streamed" / "stored.json").read_text())["weights"]
    for name in tables:
        before, after = dense.get_parameter(name), made.get_parameter(name)
        assert torch.equal(after, grid(before.detach(), 8, 0).round(before.detach())), "a scale for each row"
        assert told[name]["bits"] == 8 and told[name]["form"] == "integers"
    less = 4 * 64 * 32 - bytes_of("integers", (64, 32), bits=8, group=0)
    plain = ("--method", "magnitude", "--sparsity", 0.5, "--quantize", "int4:16", "--storage", "smallest")
    assert run("prune", source, *plain, "--out", tmp_path / "floats")[0] == 0
    saved = bytes_on_disk(tmp_path / "floats") - bytes_on_disk(tmp_path / "streamed")
    assert abs(saved - less * len(tables)) < 200 * len(tables), "but for the header"


def test_layers_are_calibrated_on_rounded_tables(tmp_path: Path) -> None:
    """Streamed and resident see the same inputs: those that the rounded table gives."""
    source = tiny.save(tmp_path / "dense", "llama")
    recipe = secateur.Recipe.of("wanda", sparsity=0.5, embeddings="int4:8")
    for name, resident in (("a", False), ("b", True)):
        secateur.prune_directory(source, recipe, tmp_path / name, data=tiny.ids(), resident=resident)
    secateur.prune_directory(source, recipe.override(embeddings="none"), tmp_path / "c", data=tiny.ids())
    a, b, c = (load_model(tmp_path / n).model.layers[0].self_attn.q_proj.weight for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_module_and_what_cannot_be() -> None:
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    made = secateur.prune(net, "magnitude", sparsity=0.5, embeddings="int8")
    assert torch.equal(made.grids["0.weight"].round(net[0].weight.detach()), net[0].weight)
    assert secateur.Recipe.load(made.recipe.dump()) == made.recipe
    assert secateur.Recipe.of("wanda").digest != secateur.Recipe.of("wanda", embeddings="int8").digest
    with pytest.raises(RecipeError, match="stock layout keeps embeddings as floats"):
        made.save("/nowhere", storage="stock")
    with pytest.raises(RecipeError, match="has no embedding tables"):
        secateur.prune(nn.Sequential(nn.Linear(8, 4)), "magnitude", embeddings="int8")
    with pytest.raises(RecipeError, match="a group of 64 inputs is not a divisor of the 8 inputs of 0.weight"):
        secateur.prune(net, "magnitude", embeddings="int4")
    with pytest.raises(RecipeError, match="would be pruned and rounded as a table"):
        secateur.prune(net, "magnitude", embeddings="int8", only=("0",))
    with pytest.raises(RecipeError, match="which no later step may move"):
        secateur.Recipe.of("gmp", embeddings="int8")
    with pytest.raises(RecipeError, match="write int4, int8"):
        secateur.Recipe.of("magnitude", embeddings="fp8")
