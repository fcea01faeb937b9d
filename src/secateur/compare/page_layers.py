"""What pruning did inside a model: how dense each layer is, where masks agree, and layers that are gone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..report import charts
from ..report import values as v
from .layerwise import Layer, Profile, collapses, overlaps, profiles
from .page_data import Frame
from .page_groups import losses
from .page_plots import plain
from .page_words import listed

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
#: Layers beyond which a profile is drawn by block.
_LAYERS = 48


def density(frame: Frame, name: str) -> list[dict[str, Any]]:
    """The density of each layer, or of each block where layers are many: one plot a target."""
    made = []
    by_target: dict[str, list[Profile]] = {}
    for profile in profiles(frame.rows):
        by_target.setdefault(profile.target, []).append(profile)
    for target in frame.targets:
        own = sorted(by_target.get(target, []), key=lambda p: frame.slots[p.label])
        own = [p for p in own if min(layer.low for layer in p.layers) < 1]  # a smaller model has what it keeps
        if own and (panel := _density(frame, target, own)) is not None:
            made.append({**panel, **tab(target), "table": None, "file": f"{name}-density-{charts_name(target)}"})
    return made


def tab(target: str) -> dict[str, str]:
    """What a panel of one target is called."""
    return {"tab": target, "head": f"at target {target}"}


def charts_name(text: str) -> str:
    """A target inside a file's name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def _density(frame: Frame, target: str, own: Sequence[Profile]) -> dict[str, Any] | None:
    names = list(dict.fromkeys(layer.name for p in own for layer in p.layers))
    blocks = {name: int(found[1]) for name in names if (found := _BLOCK.search(name)) is not None}
    coarse = len(names) > _LAYERS and len(set(blocks.values())) > 2
    places = [str(b) for b in sorted(set(blocks.values()))] if coarse else [str(k + 1) for k in range(len(names))]
    slot = {name: k for k, name in enumerate(places)} if coarse else {name: k for k, name in enumerate(names)}
    series = []
    for p in own:
        one = charts.Series(p.label, slot=frame.slots[p.label])
        cells: dict[int, list[Layer]] = {}
        for layer in p.layers:
            if coarse and layer.name not in blocks:
                continue
            cells.setdefault(slot[str(blocks[layer.name])] if coarse else slot[layer.name], []).append(layer)
        for k, layers in sorted(cells.items()):
            total = sum(layer.parameters for layer in layers) or 1
            kept = sum(layer.density * layer.parameters for layer in layers) / total
            where = f"block {places[k]}" if coarse else plain(layers[0].name)
            varies = not coarse and v.percent(layers[0].low) != v.percent(layers[0].high)
            range_ = f", {v.percent(layers[0].low)} to {v.percent(layers[0].high)} over seeds" if varies else ""
            one.points.append(charts.Point(k, kept, f"{plain(p.label)}, {where}|keeps {v.percent(kept)}{range_}"))
        series.append(one)
    values = [p.y for s in series for p in s.points]
    if not values:
        return None
    least = min((p.y, s.label, places[int(p.x)]) for s in series for p in s.points)
    what = "block" if coarse else "layer"
    shown = least[2] if coarse else names[int(least[2]) - 1]
    spoken = f"Fraction kept in each {what} at target {target}, for {listed([s.label for s in series])}."
    chart = charts.lines(
        series, y_label="Weights kept", x_label="Block" if coarse else "Layer, in model order", slots=places,
        alt=f"{spoken} From {v.percent(min(values))} to {v.percent(max(values))}.",
        bounds=(0.0, charts.padded(values)[1]), text=lambda t: v.percent(t),
    )  # fmt: skip
    even = max(values) - min(values) < 0.005
    caption = (
        f"Every method keeps {v.percent(values[0])} of each {what}."
        if even
        else f"Mean over seeds. The least is {v.percent(least[0])}: {least[1]} in {what} {shown}."
    )
    return {"chart": chart, "caption": caption}


def agreement(frame: Frame) -> list[dict[str, Any]]:
    """Where the masks of two methods agree: one table a target."""
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for one in overlaps(frame.rows):
        found.setdefault(one.target, {})[one.left, one.right] = one
        found[one.target][one.right, one.left] = one
    made = []
    for target in frame.targets:
        pairs = found.get(target, {})
        labels = [label for label in frame.labels if any(label in key for key in pairs)]
        if len(labels) < 2:
            continue
        lines = [(a, [_agreement(pairs.get((a, b)), a, b) for b in labels]) for a in labels]
        chance = sorted(one.expected for (a, b), one in pairs.items() if a != b)
        by_chance = ""
        if chance:
            low, high = v.small(round(chance[0], 3)), v.small(round(chance[-1], 3))
            by_chance = f" Masks that know nothing of each other would have {low}" + (
                "." if low == high else f" to {high}."
            )
        caption = (
            "Weights that both keep, as a share of those that either keeps, at the same sampled positions and seeds; on"
            f" the diagonal one method under two seeds.{by_chance}"
        )
        table = {"corner": "", "heads": labels, "rows": lines, "caption": caption, "tone": ""}
        made.append({**tab(target), "chart": None, "table": table})
    return made


def _agreement(one: Any, a: str, b: str) -> tuple[str, float | None, str]:
    if one is None or one.jaccard.value is None:
        return v.NONE, None, ""
    value = one.jaccard.value
    who = f"{a} under two seeds" if a == b else f"{a} and {b}"
    return f"{value:.2f}", round(100 * value, 1), f"{who}: {value:.3f}, by chance {one.expected:.3f}, {one.n} pairs"


def gone(frame: Frame) -> list[str]:
    """Layers that a method takes whole, in words."""
    said = []
    for one in collapses(frame.rows):
        for found in one.targets:
            layers = found.gone or found.almost
            few = listed(list(layers[:3])) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
            what = "nothing" if found.gone else "almost nothing"
            said.append(f"{one.label} at {found.target} keeps {what} of {few}, in {found.seeds} of {found.n} runs.")
            break
    return said


def panels(frame: Frame, name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """What is shown by target, with its title."""
    found = [
        ("What was lost", losses(frame)),
        ("Where weights are kept", density(frame, name)),
        ("Where masks agree", agreement(frame)),
    ]
    return [(title, own) for title, own in found if own]
