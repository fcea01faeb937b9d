"""The generated pages: complete, deterministic, and `--check` notices every difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import RecipeError
from secateur.methods import load, pages, survey
from secateur.registry import Card, Part, parts

load()


def part(kind: str, name: str, **facts: object) -> Part:
    return Part(kind, name, max, (), {}, Card(""), facts)


def test_every_part_has_a_section() -> None:
    made = pages.pages()
    for kind in pages.KINDS:
        for name in parts(kind):
            assert f"\n## {name}\n" in made[f"methods/{kind}.md"]
            anchor = name.replace("+", "")  # as code hosts make them of headings
            assert f"[{name}]({kind}.md#{anchor})" in made["methods/index.md"]
            assert f"[{name}](methods/{kind}.md#{anchor})" in made["survey.md"]


def test_pages_do_not_depend_on_the_order_of_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pages.pages()
    monkeypatch.setattr(pages, "parts", lambda kind: dict(reversed(parts(kind).items())))
    assert pages.pages() == before


def test_check_passes_after_write_and_fails_after_an_edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path)]
    assert pages.main([*arguments, "--check"]) == 1
    assert not list(tmp_path.iterdir()), "--check writes nothing"
    assert "is missing" in capsys.readouterr().err
    assert pages.main(arguments) == 0
    assert pages.main([*arguments, "--check"]) == 0
    page = tmp_path / "methods" / "criterion.md"
    page.write_text(page.read_text(encoding="utf-8") + "by hand\n", encoding="utf-8")
    assert pages.main([*arguments, "--check"]) == 1
    assert "criterion.md is not what the cards say" in capsys.readouterr().err


def test_pages_of_a_kind_that_is_gone_are_removed_and_others_kept(tmp_path: Path) -> None:
    folder = tmp_path / "methods"
    folder.mkdir()
    header = pages.pages()["survey.md"].splitlines()[0]
    (folder / "gone.md").write_text(f"{header}\n\n# Gone\n")
    (folder / "by-hand.md").write_text("# By hand\n")
    assert any("gone.md" in line for line in pages.stale(tmp_path))
    pages.write(tmp_path)
    assert not (folder / "gone.md").exists()
    assert (folder / "by-hand.md").exists()
    assert pages.stale(tmp_path) == []


def test_every_node_is_shown_and_empty_ones_say_so() -> None:
    rows = [line for line in pages.pages()["survey.md"].splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(survey.NODES)
    cells = {row.split(" | ")[0].removeprefix("| "): row for row in rows}
    assert cells["F3"].endswith("| — |")
    assert "criterion.md#wanda" in cells["C1.3"]


def test_the_tree_has_a_parent_for_every_node_but_the_axes() -> None:
    axes = [node.id for node in survey.NODES.values() if not node.parent]
    assert axes == ["A", "B", "C1", "C2", "D", "E", "F"]
    assert all(node.parent in survey.NODES for node in survey.NODES.values() if node.parent)


def test_places_are_derived_or_declared() -> None:
    assert survey.nodes_of(part("granularity", "nm")) == ("A2.1",)
    assert survey.nodes_of(part("criterion", "x", family="curvature")) == ("C1.4",)
    assert survey.nodes_of(part("criterion", "x", family="curvature", survey=("D1", "C1.1"))) == ("C1.1", "D1")
    assert survey.nodes_of(part("method", "x", when="before", family="llm")) == ("B1", "E4")
    assert survey.nodes_of(part("method", "x", when="after", family="llm")) == ("B3.6", "E4")
    assert survey.nodes_of(part("method", "x", when="after", family="any")) == ("B3.2",)
    assert survey.nodes_of(part("schedule", "linear")) == ()
    with pytest.raises(RecipeError, match="criterion 'x' names survey node 'Z9'"):
        survey.nodes_of(part("criterion", "x", survey="Z9"))
