"""What pruning single weights gives: the model, its masks, and the record of what was done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .disk import beside
from .formats import OnGrid
from .layers import Skipped
from .masks import Masks
from .recipe import Recipe
from .solve import LayerRecord
from .stream.storage import Smallest, layout, seal_model


@dataclass(eq=False)
class Pruned:
    """A pruned model with the record of what was done. Prints as a before and after table.

    ``grids`` says what values weights were rounded to: by layer, and by the parameter's name for embedding tables.
    """

    model: nn.Module
    recipe: Recipe
    masks: Masks
    records: list[LayerRecord]
    skipped: list[Skipped]
    run: dict[str, Any] = field(repr=False)
    grids: dict[str, OnGrid] = field(default_factory=dict, repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the pruned layers that is zero."""
        return float(self.run["sparsity"]["pruned_layers"])

    def save(self, out: str | Path, tokenizer: Any = None, storage: str | None = None) -> Path:
        """Write the model, ``masks.safetensors``, ``recipe.yaml``, ``run.json`` and ``report.html``.

        A transformers model is saved by its own ``save_pretrained``, so stock tools load it.

        Args:
            storage: ``stock`` as said; or ``smallest``: each matrix in the fewest bytes, without masks, for `load`
                alone. The latter without being asked where survivors share values.

        Raises:
            OutputError: the directory exists and is not empty.
        """
        from .report import write_run
        from .store import save_module

        form = layout(self.recipe, storage)
        with beside(out) as part:
            save_module(self.model, part)
            if isinstance(form, Smallest):
                seal_model(part, self.grids, self.model, str(self.run["model"]["source"]))
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            masks = Masks() if isinstance(form, Smallest) else self.masks  # zeros say it, and they would weigh the more
            write_run(part, self.recipe, masks, self.run)
        return Path(out)

    def __str__(self) -> str:
        total = sum(r.parameters for r in self.records)
        kept = sum(r.kept for r in self.records)
        errors = [r.error for r in self.records if r.error is not None]
        lines = [
            f"{self.recipe.method}: {len(self.records)} layers pruned, {len(self.skipped)} parameters left alone",
            f"{'':24}{'before':>16}{'after':>16}",
            f"{'weights in those layers':24}{total:>16,}{kept:>16,}",
            f"{'sparsity':24}{0:>16.4f}{1 - kept / total:>16.4f}",
        ]
        if errors:
            lines.append(f"{'mean output error':24}{'':>16}{sum(errors) / len(errors):>16.4f}")
        return "\n".join(lines)
