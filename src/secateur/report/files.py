"""What lies beside the weights of a model that was pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.masks import Masks
from secateur.recipe import Recipe
from secateur.record import dumps
from secateur.report.page import write_report


def write_run(folder: Path, recipe: Recipe, masks: Masks, run: dict[str, Any]) -> None:
    """Write ``recipe.yaml``, ``run.json``, ``report.html``, and ``masks.safetensors`` where there are some."""
    if masks:
        masks.save(folder / "masks.safetensors")
    (folder / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    (folder / "run.json").write_text(dumps(run), encoding="utf-8")
    write_report(folder / "report.html", run)
