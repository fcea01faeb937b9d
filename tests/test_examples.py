"""Every example runs, at reduced size: one kind of model each."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "common")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "diffusion" and importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small"])
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        sys.modules.pop("common", None)
    assert capsys.readouterr().out.strip()


def test_every_kind_of_model_has_one() -> None:
    kinds = {
        "bert", "classifier", "detector", "diffusion", "experts", "language_model", "speech", "vision_language",
        "vision_transformer",
    }  # fmt: skip
    assert kinds <= set(EXAMPLES)
