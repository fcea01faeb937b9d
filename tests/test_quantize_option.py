"""`--quantize` with knobs of the solver that rounds."""

from __future__ import annotations

import pytest

from secateur.errors import RecipeError
from secateur.options import read_recipe


def test_knobs_are_of_the_solver_that_rounds() -> None:
    made = read_recipe("sparsegpt", None, {}, ["solver.symmetric=false", "solver.damp=0.1"], "int4")
    assert made.solver == "sparsegpt-gptq"
    assert made.knobs_of("solver") | {"symmetric": False, "damp": 0.1, "bits": 4, "group": 64} == made.knobs_of(
        "solver"
    )
    with pytest.raises(RecipeError, match="no knob 'symmetry'"):
        read_recipe("sparsegpt", None, {}, ["solver.symmetry=false"], "int4")
