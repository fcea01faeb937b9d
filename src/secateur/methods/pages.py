"""The generated pages: one for each kind of part, an index, and the survey's tree with what implements it.

``python -m secateur.methods.pages`` writes them; ``--check`` writes nothing and fails when they are not current.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..registry import Part, parts
from .survey import EXAMPLES, NODES, SOURCE, nodes_of, parts_of

#: Kinds in the order of the pipeline: title, and the question that the axis answers.
KINDS = {
    "method": ("Methods", "Named points in the product of the axes: each is a recipe, and any axis may be overridden."),
    "criterion": ("Criteria", "What is a weight worth? Higher scores stay."),
    "granularity": ("Granularities", "What goes together, and what competes?"),
    "allocation": ("Allocations", "How much of each pool stays?"),
    "schedule": ("Schedules", "How fast is the target approached?"),
    "driver": ("Drivers", "When does the mask change?"),
    "hold": ("Holds", "What becomes of weights that are gone, while training goes on?"),
    "solver": ("Solvers", "Do the survivors move?"),
    "recovery": ("Recovery", "How does the model heal?"),
    "gate": ("Gates", "What is learned beside the weights, and says which stay?"),
    "penalty": ("Penalties", "What is added to the loss while the model trains?"),
    "transform": ("Transforms", "What makes another model of a model, beside the axes?"),
    "search": ("Searches", "Who proposes what each layer keeps, where an evaluation decides?"),
}

_HEADER = "<!-- Generated from the cards by `python -m secateur.methods.pages`; edit the docstrings instead. -->"
_EMPTY = "—"


def _anchor(name: str) -> str:
    """What code hosts make of a heading."""
    return re.sub(r"[^\w-]", "", name)


def pages() -> dict[str, str]:
    """Every generated page: its path below the documentation folder, and its text."""
    shelves = {kind: sorted(parts(kind).values(), key=lambda part: part.name) for kind in KINDS}
    shelves = {kind: shelf for kind, shelf in shelves.items() if shelf}
    made = {f"methods/{kind}.md": _kind_page(kind, shelf) for kind, shelf in shelves.items()}
    made["methods/index.md"] = _index(shelves)
    made["survey.md"] = _survey(shelves)
    return made


def _page(*blocks: str) -> str:
    return "\n\n".join([_HEADER, *(block for block in blocks if block)]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _codes(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or _EMPTY


def _value(value: Any) -> str:
    if isinstance(value, (str, int, float, bool, type(None), tuple)):
        return repr(value)
    return getattr(value, "__name__", type(value).__name__)


def _knobs(knobs: Mapping[str, Any]) -> list[str]:
    given = inspect.Parameter.empty
    return [name if value is given else f"{name}={_value(value)}" for name, value in knobs.items()]


def _needs(part: Part) -> list[str]:
    """The facts a part asks for; for a method, the evidence that data must supply."""
    recipe = part.facts.get("recipe")
    return list(part.needs) if recipe is None else sorted(recipe.needs())


def _axes(method: Part) -> list[str]:
    """A line for each axis of a method's recipe, in the order of the pipeline."""
    used = parts_of(method)
    lines = []
    for axis in KINDS:
        if axis in used:
            text = method.facts["recipe"].granularity if axis == "granularity" else used[axis].name
            lines.append(f"{axis.capitalize()}: [`{text}`]({axis}.md#{_anchor(used[axis].name)})")
    return lines


def _kind_page(kind: str, shelf: Sequence[Part]) -> str:
    title, question = KINDS[kind]
    return _page(f"# {title}", question, *(block for part in shelf for block in _part(part)))


def _part(part: Part) -> list[str]:
    card, recipe = part.card, part.facts.get("recipe")
    facts = [*_axes(part), f"Needs: {_codes(_needs(part))}"]
    if recipe is None:
        facts.append(f"Knobs: {_codes(_knobs(part.knobs))}")
    else:
        own = [f"{axis}.{knob}" for axis, knobs in recipe.knobs.items() for knob in _knobs(knobs)]
        facts.append(f"Knobs set: {_codes(own)}")
    places = [f"{id} {NODES[id].title}" for id in nodes_of(part)]
    facts.append(f"In the [survey](../survey.md): {'; '.join(places) or _EMPTY}")
    if paper := part.facts.get("paper"):
        facts.append(f"Paper: [arXiv {paper}](https://arxiv.org/abs/{paper})")
    return [
        f"## {part.name}",
        card.summary,
        f"```text\n{card.formula}\n```" if card.formula else "",
        card.choose,
        f"**Beware:** {card.beware}" if card.beware else "",
        "\n".join(f"- {fact}" for fact in facts),
        f"Source: {card.source}" if card.source else "",
    ]


def _index(shelves: Mapping[str, Sequence[Part]]) -> str:
    blocks = []
    for kind, shelf in shelves.items():
        title, question = KINDS[kind]
        rows = [[f"[{p.name}]({kind}.md#{_anchor(p.name)})", p.card.summary, _codes(_needs(p))] for p in shelf]
        blocks += [f"## [{title}]({kind}.md)", question, _table(["name", "what it does", "needs"], rows)]
    intro = "A method is a recipe over the axes below it. The same text: `secateur explain NAME`."
    return _page("# Methods and their parts", intro, *blocks)


def _survey(shelves: Mapping[str, Sequence[Part]]) -> str:
    here: dict[str, dict[str, list[str]]] = {id: {} for id in NODES}
    outside: list[str] = []
    for kind, shelf in shelves.items():
        for part in shelf:
            link = f"[{part.name}](methods/{kind}.md#{_anchor(part.name)})"
            places = nodes_of(part)
            for id in places:
                here[id].setdefault(kind, []).append(link)
            if not places:
                outside.append(f"{kind} {link}")
    for id, names in EXAMPLES.items():
        here[id]["example"] = [f"[{name}](../examples/{name}.py)" for name in names]
    inner = {node.parent for node in NODES.values()}
    leaves = [id for id in NODES if id not in inner]
    filled = sum(bool(here[id]) for id in leaves)
    rows = []
    for id, node in NODES.items():
        depth = len(_above(id))
        title = node.title + (" (beyond the survey)" if node.beyond else "")
        rows.append([id, "&emsp;" * depth + (f"**{title}**" if id in inner else title), _implementers(here, id, inner)])
    return _page(
        "# The survey's taxonomy, and what implements it",
        f"The axes are those of {SOURCE}; the finer nodes follow the groups of its text and of its list of papers, "
        f"under titles of our own. {filled} of {len(leaves)} leaves have at least one registered part or example; "
        f"{_EMPTY} marks a node that nothing implements yet. Inner nodes list what belongs to them but to none of "
        "their leaves.",
        _table(["node", "title", "implemented by"], rows),
        "## Outside the tree",
        "Parts that every method can use and that the taxonomy gives no node: " + (", ".join(outside) or _EMPTY) + ".",
    )


def _implementers(here: Mapping[str, Mapping[str, Sequence[str]]], id: str, inner: set[str]) -> str:
    text = "; ".join(f"{kind} {', '.join(links)}" for kind, links in here[id].items())
    if text or id not in inner:
        return text or _EMPTY
    return "" if any(here[other] for other in NODES if id in _above(other)) else _EMPTY


def _above(id: str) -> list[str]:
    """The nodes above one, the nearest first."""
    parent = NODES[id].parent
    return [parent, *_above(parent)] if parent else []


def stale(out: Path) -> list[str]:
    """What differs between the folder ``out`` and what the cards say, one line for each file."""
    made = pages()
    found = []
    for path, text in made.items():
        file = out / path
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.read_text(encoding="utf-8") != text:
            found.append(f"{file} is not what the cards say")
    return found + [f"{file} is of a kind that no longer has parts" for file in _left_over(out, made)]


def write(out: Path) -> list[Path]:
    """Write every page below ``out``, remove generated pages that no part stands behind; returns what is there."""
    made = pages()
    for path, text in made.items():
        file = out / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
    for file in _left_over(out, made):
        file.unlink()
    return [out / path for path in made]


def _left_over(out: Path, made: Mapping[str, str]) -> list[Path]:
    """Pages that were generated once and are no longer."""
    here = sorted((out / "methods").glob("*.md"))
    return [f for f in here if f"methods/{f.name}" not in made and f.read_text(encoding="utf-8").startswith(_HEADER)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m secateur.methods.pages", description="Generate the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is not current")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="documentation folder (default: docs)")
    given = parser.parse_args(arguments)

    from . import load

    load()
    if not given.check:
        print(f"{len(write(given.out))} pages written to {given.out}")
        return 0
    if found := stale(given.out):
        print("\n".join([*found, "run 'make docs' and commit what it writes"]), file=sys.stderr)
        return 1
    print(f"the pages in {given.out} are current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
