"""Compounds as data: read, written, named by a digest, and refused where the order cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur import Recipe
from secateur.compound import Compound, is_compound, read
from secateur.errors import RecipeError, SecateurError

TEXT = """
name: small
seed: 3
steps:
  - prune: {method: llm-pruner, target: "params 20%"}
  - decompose: {method: low-rank, target: params 10%}
  - prune: {method: sparsegpt, granularity: 2:4}
  - recover: {method: distill, epochs: 2}
  - quantize: int4:32
"""


def test_it_is_read_and_written() -> None:
    made = Compound.load(TEXT)
    assert str(made) == (
        "small: prune llm-pruner, params 20% > decompose low-rank, params 10% > prune sparsegpt, 2:4 > recover distill "
        "> quantize int4:32"
    )
    assert Compound.load(made.dump()) == made and Compound.of(made.to_dict()).digest == made.digest
    assert made.needs() == {"data", "loss", "example"} and made.teaches and not made.open
    assert len(made.cite()) >= 4


def test_recipes_of_one_step_stay_recipes(tmp_path: Path) -> None:
    assert is_compound(TEXT) and not is_compound("method: wanda\nsteps: 3")
    assert isinstance(read("method: wanda\nsparsity: 0.5"), Recipe) and isinstance(read(TEXT), Compound)
    (tmp_path / "c.yaml").write_text("- prune: wanda\n- quantize: int8\n")
    assert len(Compound.load(tmp_path / "c.yaml").steps) == 2


def test_a_digest_is_of_what_is_done() -> None:
    base = Compound.of([{"prune": {"method": "wanda", "sparsity": 0.5}}])
    spelled = Compound.of([{"prune": {"method": "wanda", "sparsity": 0.5, "solver": "rank"}}])
    assert base.digest == spelled.digest == Compound(base.steps, "another name").digest
    assert base.digest != Compound(base.steps, seed=1).digest != base.at("0.6").digest
    code = f"import secateur; print(secateur.Compound.load({TEXT!r}).digest)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == Compound.load(TEXT).digest


@given(st.permutations([0, 1, 2]), st.integers(1, 3))
def test_a_step_is_switched_off(order: list[int], gone: int) -> None:
    steps = [{"prune": {"method": "magnitude", "sparsity": 0.1 * (k + 1)}} for k in order]
    made = Compound.of(steps)
    left = made.without(gone)
    assert [s.to_dict() for s in left.steps] == [s for k, s in enumerate(made.to_dict()["steps"], 1) if k != gone]
    with pytest.raises(RecipeError, match="cannot be switched off"):
        made.without(4)


def test_what_is_left_open_takes_the_target() -> None:
    made = Compound.of([{"prune": "wanda"}, {"quantize": "int8"}])
    assert made.open and not made.at("2:4").open
    assert str(made.at("0.7").steps[0]) == "prune wanda, 0.7" and str(made.at("2:4").steps[0]) == "prune wanda, 2:4"
    assert str(Compound.of([{"decompose": "svd"}]).at("params 20%").steps[0]) == "decompose svd, params 20%"
    assert not Compound.of([{"prune": "gptq"}]).open


@pytest.mark.parametrize(
    "steps, said",
    [
        ([], "at least one step"),
        ([{"quantize": "int8"}, {"recover": "finetune"}], "would train weights off what they were rounded to"),
        ([{"quantize": "shared:4"}, {"recover": "finetune"}], "or {recover: codebooks}"),
        ([{"quantize": "shared:4"}, {"recover": "qat"}], "weights are quantized once; {recover: codebooks} trains"),
        ([{"quantize": "int8"}, {"recover": "codebooks"}], "weights are quantized once; {recover: qat} trains"),
        ([{"recover": "codebooks"}], "write {quantize: shared:5} before it"),
        ([{"quantize": "int4"}, {"recover": {"method": "qat", "bits": 4}}], "leave bits out"),
        ([{"quantize": {"as": "shared:4", "method": "gptq"}}], "leave the method out"),
        ([{"quantize": "int8"}, {"prune": "wanda"}], "quantize last"),
        ([{"quantize": "int8"}, {"quantize": "int4"}], "quantized once"),
        ([{"prune": {"method": "sparsegpt", "quantize": "int4"}}, {"quantize": "int8"}], "quantized once"),
        ([{"prune": "wanda"}, {"prune": "llm-pruner"}], "give it recovery: none, or put it first"),
        ([{"prune": "wanda"}, {"prune": "shortgpt"}], "whole depth go before single weights"),
        ([{"prune": "wanda"}, {"decompose": "svd"}], "decompose first"),
        ([{"decompose": "low-rank+sparse"}, {"decompose": "svd"}], "decompose first"),
        ([{"prune": "wanda"}, {"prune": "magnitude-finetune"}], "knows of no earlier masks"),
        ([{"runtime": "tome"}, {"quantize": "int8"}], "let that be the last step"),
        ([{"prune": "low-rank"}], "write {decompose: {method: low-rank, ...}}"),
        ([{"prune": "tome"}], "write {runtime: {method: tome, ...}}"),
        ([{"prun": "wanda"}], "did you mean 'prune'"),
        ([{"prune": {"method": "wanda", "sparsty": 0.5}}], "named 'sparsty'; did you mean 'sparsity'"),
        ([{"prune": {"method": "llm-pruner", "quantize": "int8"}}], "no coupled units"),
        ([{"recover": "refit"}], "belongs to a step that prunes"),
        ([{"recover": {"method": "distill", "epochs": 0}}], "epochs is a number above 0"),
        ([{"quantize": {"method": "gptq"}}], "says which integers"),
        ([{"quantize": "int33"}], "int33"),
        ([{"decompose": {"method": "svd", "granularity": "2:4"}}], "no knob 'granularity'"),
        ("wanda", "a list of steps"),
        ([{"prune": {"sparsity": 0.5}}], "needs a method"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(steps: Any, said: str) -> None:
    with pytest.raises(SecateurError) as error:
        Compound.of(steps)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_knobs_are_of_the_solver_that_rounds() -> None:
    """Of a grid around no zero, as a plan counts it too."""
    odd = {"solver": {"symmetric": False}}
    made = Compound.of([{"prune": {"method": "sparsegpt", "sparsity": 0.5, "quantize": "int4:0", "knobs": odd}}])
    assert made.steps[0].recipe().knobs_of("solver")["symmetric"] is False
    assert made.steps[0].recipe().knobs_of("solver")["bits"] == 4
    for method, more in (("round", {}), ("gptq", {"damp": 0.02})):
        own = {"solver": {**odd["solver"], **more}}
        only = Compound.of([{"quantize": {"as": "int4:0", "method": method, "knobs": own}}])
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        # 4 bits a weight, a scale and a zero for each row, and 16 bytes for the shape
        layers = sum(o * 32 + 2 * o + 16 + 4 * (-(-o * 4 // 32)) for o in (64, 8))
        assert only.preview(net).steps[0]["after"]["bytes"] == layers + 4 * (64 + 8)


def test_what_has_no_form_on_disk_is_refused() -> None:
    with pytest.raises(RecipeError, match="no form on disk"):
        Compound.of([{"prune": {"method": "magnitude", "sparsity": 0.5, "embeddings": "int8"}}])


@pytest.mark.parametrize(
    "step",
    [
        {"prune": {"method": "magnitude", "quantize": "shared:4"}},
        {"prune": "deep-compression"},
        {"quantize": "shared:4"},
    ],
)
def test_shared_values_are_a_step(step: dict[str, Any]) -> None:
    made = Compound.of([step])
    assert made.shares and Compound.of(made.to_dict()) == made
    assert str(Compound.of([{"quantize": "shared:4"}]).steps[0]) == "quantize shared:4"
