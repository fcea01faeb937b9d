"""Which units a recipe may take, by its globs and by what stock loaders need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..graph import Dependencies
from ..recipe import Recipe

#: What ``--only`` and ``--skip`` call units that several blocks share: the hidden width of a transformer.
RESIDUAL = "@residual"


def layer_globs(globs: Sequence[str]) -> tuple[str, ...]:
    """The globs that name layers, not units of several blocks."""
    return tuple(g for g in globs if g != RESIDUAL)


def chosen(
    found: Dependencies, recipe: Recipe, model: nn.Module, remade: Collection[str] = (), stock: bool = True
) -> tuple[list[int], dict[int, str]]:
    """Families that may be cut, and why others may not.

    Args:
        remade: buffers that the model makes as it runs.
        stock: a transformers model is to stay one that stock loaders build.
    """
    made, block_of = _made_by_config(model) if stock else set[str](), _block_of(model)
    active, left = [], {}
    for i, family in enumerate(found.families):
        names = [n for s in family.slots for n in found.slots[s].names]
        own = [*names, *(n.rpartition(".")[0] for n in names)]
        paths = [*own, RESIDUAL] if _shared(names, block_of) else own
        if why := globbed(recipe, paths):
            left[i] = why
        elif made_anew := sorted(set(remade) & set(names)):
            left[i] = f"{made_anew[0]} is made by the model as it runs"
        elif made & set(names) and not (recipe.only and _matches(own, recipe.only)):
            left[i] = f"{sorted(made & set(names))[0]} is not saved: stock loaders would compute it anew (use --only)"
        else:
            active.append(i)
    return active, left


def keep_divisible(found: Dependencies, model: nn.Module) -> None:
    """Widths that several blocks share stay multiples of the number of heads: transformers' configs refuse others."""
    heads: Any = getattr(getattr(model, "config", None), "num_attention_heads", None)
    made, block_of = _made_by_config(model), _block_of(model)
    for family in found.families if isinstance(heads, int) else ():
        names = [n for s in family.slots for n in found.slots[s].names]
        if _shared(names, block_of) and not made & set(names):
            family.multiple = heads


def _shared(names: Sequence[str], block_of: Callable[[str], str | None]) -> bool:
    """Whether tensors of these names lie in several repeated blocks."""
    return len({b for n in names if (b := block_of(n))}) > 1


def globbed(recipe: Recipe, names: Sequence[str]) -> str:
    """Why the recipe's globs leave alone what has these names; empty when they do not."""
    if recipe.only and not _matches(names, recipe.only):
        return "not chosen by --only"
    return "chosen by --skip" if _matches(names, recipe.skip) else ""


def _matches(names: Iterable[str], globs: Iterable[str]) -> bool:
    return any(fnmatchcase(n, g) for n in names for g in globs)


def _block_of(model: nn.Module) -> Callable[[str], str | None]:
    """Which repeated block the tensor of a name lies in, by path; None outside of all."""
    paths = [
        f"{path}.{k}."
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(m) for m in module}) == 1 < len(module)
        for k, member in enumerate(module)
        if next(member.children(), None) is not None
    ]
    return lambda name: next((p for p in paths if name.startswith(p)), None)


def _made_by_config(model: nn.Module) -> set[str]:
    """Buffers of a transformers model that are computed when it is built, such as rotary frequencies."""
    if not hasattr(model, "save_pretrained"):
        return set()
    return {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
    }
