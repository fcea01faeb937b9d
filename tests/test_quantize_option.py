"""`--quantize` with knobs of the solver that rounds, and `--storage`: what cannot be done is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import RecipeError
from secateur.formats.stored import decode_all, encode_all
from secateur.options import read_recipe


def test_knobs_are_of_the_solver_that_rounds() -> None:
    made = read_recipe("sparsegpt", None, {}, ["solver.symmetric=false", "solver.damp=0.1"], "int4")
    assert made.solver == "sparsegpt-gptq"
    assert made.knobs_of("solver") | {"symmetric": False, "damp": 0.1, "bits": 4, "group": 64} == made.knobs_of(
        "solver"
    )
    with pytest.raises(RecipeError, match="no knob 'symmetry'"):
        read_recipe("sparsegpt", None, {}, ["solver.symmetry=false"], "int4")


@pytest.mark.parametrize("given", [["--recipe", "c.yaml"], ["--method", "svd"], ["--method", "l1-norm"]])
def test_storage_is_not_left_out_in_silence(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("- decompose: {method: svd, sparsity: 0.3}\n- quantize: int8\n")
    amount = [] if "--recipe" in given else ["--target", "params 30%"]
    found = CliRunner().invoke(app, ["prune", "nowhere", *given, *amount, "--storage", "smallest", "--out", "out"])
    said = "which has no smallest form" if "--recipe" in given else "--storage is for single weights"
    assert isinstance(found.exception, RecipeError) and said in str(found.exception)


def test_a_tensor_without_numbers_is_stored_as_it_is() -> None:
    empty = {"w": torch.zeros(0, 4)}
    tensors, facts = encode_all(empty, {})
    assert facts == {} and torch.equal(decode_all(tensors, facts)["w"], empty["w"])
