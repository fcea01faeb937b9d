"""Write what a compound made, in stock formats where they can say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..errors import RecipeError
from ..formats import Grid
from ..record import dumps
from ..runtime import Dynamic
from ..runtime.store import write as write_gates
from ..store import save_module
from ..stream import integers
from ..stream.storage import seal_model
from ..structured import save as save_smaller
from .run import Compounded


def write(made: Compounded, part: Path, smallest: bool = False) -> None:
    """The model and everything that is known of it, in an empty directory.

    A transformers model whose config says its sizes is written for stock loaders, integers in the layout of
    compressed-tensors; any other as weights and a plan that `secateur.load` replays on a fresh model.

    Args:
        smallest: each matrix in the fewest bytes, for `secateur.load` alone; zeros say what masks would.

    Raises:
        RecipeError: a model that has its own format has no smallest one.
    """
    net = made.model.model if isinstance(made.model, Dynamic) else made.model
    own: Any = net
    surgery = getattr(net, "secateur_surgery", None)
    stock = hasattr(net, "save_pretrained") and (surgery is None or surgery.get("format") == "transformers")
    if smallest:
        if isinstance(surgery, dict) and surgery.get("format") != "transformers":
            raise RecipeError(
                "a model that lost units has a format of its own, and no smallest form: leave storage out"
            )
        save_smaller(net, part) if surgery is not None else save_module(net, part)
        seal_model(part, made.grids, net, str(made.run["model"]["source"]))
        _told(made, part)
        return
    if made.grids and (not stock or net is not made.model):
        own.secateur_grids = dict(made.grids)
        stock = False
    if not stock:
        plan = surgery if isinstance(surgery, dict) else {"version": 1, "kept": {}, "mends": []}
        own.secateur_surgery = {**plan, "format": "secateur"}
    if isinstance(made.model, Dynamic):
        write_gates(made.model, part)
    elif getattr(net, "secateur_surgery", None) is not None:
        save_smaller(net, part)
    else:
        save_module(net, part)
    vars(net).pop("secateur_grids", None)  # a later save has weights of its own, which may have moved
    if made.grids and stock:
        integers.rewrite(part, made.grids, net)
        _enter(part / "config.json", part, made, net)
    if made.masks:
        made.masks.save(part / "masks.safetensors")
    _told(made, part)


def _told(made: Compounded, part: Path) -> None:
    (part / "recipe.yaml").write_text(made.compound.dump(), encoding="utf-8")
    (part / "run.json").write_text(dumps(made.run), encoding="utf-8")


def _enter(file: Path, part: Path, made: Compounded, net: nn.Module) -> None:
    """Say in the config what is packed."""
    names: dict[str, str] = {}
    for shard in sorted(part.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as f:
            names |= dict.fromkeys(f.keys(), shard.name)
    layers = integers.packed_layers(names)
    grids = [g for n, g in made.grids.items() if n in layers and isinstance(g, Grid)]
    rows = all(g.scale.shape[1] == 1 for g in grids)
    told = {(g.bits, 0 if rows else g.group, g.zero is None) for g in grids}
    integers.enter_config(file, *next(iter(told), (8, 0, True)), names, net)
