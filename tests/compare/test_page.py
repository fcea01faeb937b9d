"""The report of a study as text: the answer first, every figure with its interval, nothing that breaks or injects."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from secateur.compare import Row
from secateur.compare.answers import Side, Statement, answer
from secateur.compare.page import render, write_study_report
from secateur.compare.page_again import commands, recipes
from secateur.compare.page_data import frames
from secateur.compare.page_plots import close, tradeoffs
from secateur.compare.page_words import answers_table, headline, leaders_of
from secateur.recipe import Recipe
from secateur.report import scatter
from tests import studies

VOID = {"meta", "input", "br", "use", "path", "circle", "rect"}
LOADS = {"src", "srcset", "poster", "action", "formaction", "data", "background", "manifest"}


class Page(HTMLParser):
    """Tags and visible words of a page; complains about tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return studies.rows()


@pytest.fixture(scope="module")
def html(rows: list[Row]) -> str:
    return render(studies.study(rows), rows)


def test_says_the_answer_first(html: str) -> None:
    text = Page(html).text
    assert "sparsegpt has the best mean in 7 of 8 tables of a subject and a target." in text
    order = [
        "h-answer",
        "h-asked",
        "h-subject-0",
        "h-subject-1",
        "h-ranks",
        "h-failed",
        "h-runs",
        "h-recipes",
        "h-study",
    ]
    assert [x["id"] for tag, x in Page(html).tags if tag == "h2"] == order
    for part in (
        "Score against effective FLOPs", "Score against bytes", "Score against latency", "Score against the cost",
        "the loss is not a finite number at step 12", "lamp on fashion-resnet: target 2:4",
        "ria on demo: target 0.9 with seeds 1 and 2", "magnitude at 0.9 keeps nothing of blocks.0.part3",
        "no knob was tuned", "torch 2.8.0", "samples or tokens", "critical difference", "Not shown to be worse",
        "Brackets are 95 % intervals", "Every method at every target", "What was lost", "Where masks agree",
        "Where weights are kept", "How much the seed matters", "Friedman test",
    ):  # fmt: skip
        assert part in text, part


def test_names_no_winner_without_an_interval(rows: list[Row]) -> None:
    one_seed = [r for r in rows if r.seed == 0]
    text = Page(render(studies.study(one_seed), one_seed)).text
    assert "No method can be named on any subject." in text
    assert "not enough seeds (n = 1)" in text and "shown to be best" not in text
    assert "has the best mean" not in text
    (frame, _) = frames(rows)
    found = leaders_of(frame)
    lines = {line["target"]: line for line in answers_table(frame, found, {})}
    assert "[" in lines["0.9"]["score"]
    assert {x["label"] for x in lines["0.9"]["open"]} == {"dsnot", "ria"}
    for target, line in lines.items():
        named = [line["leader"], *line["members"], *(b["label"] for b in line["beaten"])]
        named += [x["label"] for x in line["open"]]
        assert sorted(named) == sorted(label for label in frame.labels if frame.runs(label, target))
        assert line["alone"] == (not line["members"] and bool(line["beaten"]))


def test_loads_nothing_and_is_small(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img")
        assert not LOADS & attributes.keys() - ({"data"} if tag == "object" else set()), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert "default-src &#39;none&#39;" in html
    many = studies.rows((("fashion-resnet", "task"), ("demo", "model")), seeds=8, holes=False)
    assert len(many) > 500
    assert len(render(studies.study(many), many).encode()) < 1_500_000


HOSTILE = '<script>alert("1")</script>|&\'{{ 123 * 457 }} </script> =1+1'


def hostile(rows: Sequence[Row]) -> list[Row]:
    made = []
    for row in rows:
        result = dict(row.result)
        if result:
            result["groups"] = {HOSTILE + str(k): x for k, x in enumerate(result["groups"].values())}
            result["layers"] = [{**layer, "name": layer["name"] + HOSTILE} for layer in result["layers"]]
            result["environment"] = {"machine": {"cpu": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
        label = row.label if row.dense else row.label + HOSTILE
        reason = row.reason and HOSTILE
        subject = row.subject + HOSTILE
        made.append(
            replace(row, label=label, subject=subject, reason=reason, result=result, digest=row.digest + HOSTILE)
        )
    return made


def test_nothing_in_a_row_becomes_markup(rows: list[Row]) -> None:
    given = hostile([r for r in rows if r.seed < 2 and r.label in ("dense", "wanda", "sparsegpt", "dsnot")])
    html = render({**studies.study(given), "question": HOSTILE, "study": HOSTILE}, given)
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert HOSTILE in page.text and "56211" not in html
    found = re.search(r'<script type="application/json" id="record">(.*?)</script>', html, re.S)
    assert found is not None
    record = json.loads(found[1])
    assert record["study"]["study"] == HOSTILE and len(record["rows"]) == len(given)


def test_every_study_gets_a_page(rows: list[Row]) -> None:
    assert "Nothing has been run yet." in Page(render({}, [])).text
    failed = [replace(r, status="failed", reason="out of memory", result={}) for r in rows if not r.dense]
    text = Page(render(studies.study(failed), failed)).text
    assert "No method can be named" in text and "out of memory" in text
    dense = [r for r in rows if r.dense][:1]
    assert "no method can be named: none has run" in Page(render(studies.study(dense), dense)).text
    one = [r for r in rows if r.label == "wanda"][:1]
    text = Page(render(studies.study(one), one)).text
    assert "The dense model was not measured" in text and "n = 1, no interval" not in text.split("The answer")[0]
    bare = [Row("d", "s", "task", "x", {}, "0.5", k, result={"test": 0.5 + k}) for k in range(2)]
    assert "Results on s" in Page(render({"methods": 3, "targets": None, "budget": "none"}, bare)).text


def test_scores_that_are_not_finite_are_failures(rows: list[Row]) -> None:
    given = [
        replace(r, result={**r.result, "test": math.inf}) if (r.label, r.target) == ("random", "0.9") else r
        for r in rows
    ]
    text = Page(render(studies.study(given), given)).text
    assert "the score is not a finite number (inf)" in text
    assert "random: 3 of 3 runs failed" in text


def test_runs_that_cannot_be_compared_say_so(rows: list[Row]) -> None:
    twice = [r for r in rows if r.subject == "demo"] + [
        replace(r, digest="other") for r in rows if r.label == "wanda" and r.subject == "demo"
    ]
    text = Page(render(studies.study(twice), twice)).text
    assert "the runs cannot be compared: two runs of 'wanda'" in text and "All runs" in text


def test_a_study_that_is_not_finished_says_so(rows: list[Row]) -> None:
    demo = [r for r in rows if r.subject == "demo" and r.label in ("dense", "wanda", "magnitude")]
    study = {**studies.study(demo), "seeds": [0, 1, 2, 3]}
    text = Page(render(study, demo)).text
    assert "8 runs of this study are not there: what follows may change with them." in text
    why = {("demo", "magnitude", t): "it <is> left out" for t in studies.TARGETS}
    given = [r for r in demo if r.label != "magnitude"]
    text = Page(render(study, given, left_out=why)).text
    assert "4 runs of this study are not there" in text and "Left out by the study:" in text
    assert "magnitude on demo at 0.5, 0.7, 0.9 and 2:4 : it <is> left out".replace(" :", ":") in text
    assert "nothing to compare with" in text and "has the best mean" not in text


def test_a_score_without_spread_has_no_interval_to_show(rows: list[Row]) -> None:
    same = [
        replace(r, result={**r.result, "test": 0.5 if r.label == "wanda" else 0.9}) for r in rows if r.kind == "task"
    ]
    text = Page(render(studies.study(same), [r for r in same if r.label in ("dense", "wanda", "magnitude")])).text
    assert "90.00 %, the same at every seed" in text and "[90.00" not in text


def test_tuning_runs_are_told_and_not_compared(rows: list[Row]) -> None:
    tune = [
        replace(r, role="tune", digest=r.digest + "t", result={**r.result, "test": None})
        for r in rows
        if r.label == "wanda" and r.seed == 0 and r.target == "0.5"
    ]
    text = Page(render(studies.study(rows), [*rows, *tune])).text
    assert "knobs were chosen in 2 runs on validation data" in text
    assert "sparsegpt has the best mean in 7 of 8 tables" in text


def test_several_seeds_of_headlines(rows: list[Row]) -> None:
    alone = frames([r for r in rows if r.subject == "demo"])
    said, clauses = headline(alone, [leaders_of(f) for f in alone])
    assert said.startswith("On demo sparsegpt has the best mean at every target") and clauses == []


def test_commands_make_the_recipe_again(rows: list[Row]) -> None:
    study = studies.study(rows)
    for row, command in zip(rows, commands(study, rows), strict=True):
        words = shlex.split(command)
        if row.dense and row.kind == "model":
            assert words == []
            continue
        assert words[:3] == ["secateur", "train" if row.kind == "task" else "prune", row.subject]
        options = dict(zip(words[3::2], words[4::2], strict=True))
        assert options["--seed"] == str(row.seed)
        if row.dense:
            assert "--method" not in options
            continue
        given: dict[str, Any] = {
            k[2:]: float(x) if k == "--sparsity" else x
            for k, x in options.items()
            if k in ("--sparsity", "--granularity", "--allocation", "--solver")
        }
        assert Recipe.of(options["--method"], seed=row.seed, **given).to_dict() == row.recipe
    task = next(c for r, c in zip(rows, commands(study, rows), strict=True) if r.label == "wanda" and r.kind == "task")
    assert "--epochs 5" in task and "--data" not in task


def test_a_recipe_that_no_option_says_is_given_as_a_file(rows: list[Row]) -> None:
    row = next(r for r in rows if r.label == "wanda")
    assert row.recipe is not None
    knobs = replace(row, recipe=Recipe.of("sparsegpt", knobs={"solver": {"damp": 0.02}}, seed=row.seed).to_dict())
    control = replace(row, recipe={**row.recipe, "control": "shuffle"})
    foreign = replace(row, recipe={**row.recipe, "from_another_version": 1}, label="a b/c")
    sized = replace(row, subject="digits (images=200)", kind="task", target="flops 50%")
    study = {
        "tasks": [{"task": "digits", "options": {"images": 200}}],
        "methods": [{"method": "wanda", "when": "after"}],
    }
    first, second, third, fourth = commands(study, [knobs, control, foreign, sized])
    assert "--set solver.damp=0.02" in first
    assert "--recipe wanda.yaml" in second and "--recipe a-b-c.yaml" in third
    assert fourth.startswith("secateur train digits --method wanda") and "--set task.images=200" in fourth
    assert "--target 'flops 50%'" in fourth and "--when after" in fourth


def test_recipes_stand_once(rows: list[Row]) -> None:
    found = recipes(rows)
    assert [one["label"] for one in found].count("magnitude") == 2  # of single weights, and of 2:4
    for one in found:
        assert Recipe.load(one["yaml"]).method == one["label"]


def test_front_is_marked_and_outliers_do_not_flatten_the_rest(rows: list[Row]) -> None:
    (frame, _) = frames(rows, [*studies.METHODS], ["fashion-resnet"])
    assert frame.subject == "fashion-resnet"
    found = {one["title"]: one["views"] for one in tradeoffs(frame, "x")}
    assert set(found) == {
        "Score against sparsity", "Score against effective FLOPs", "Score against bytes", "Score against latency",
        "Score against the cost of pruning",
    }  # fmt: skip
    whole, near = found["Score against sparsity"]
    assert "sparsegpt at 0.9" in whole["caption"] and whole["chart"].svg.count('class="on"') >= 3
    assert near["caption"].startswith("Out of view: random at 0.5") and "random at 0.9 (32" in near["caption"]
    assert close(frame, [scatter.Spot(0, y, "") for y in (0.9, 0.89, 0.88, 0.87)]) is None
    assert whole["chart"].svg.count("<use") == sum(
        frame.score(x, t) is not None for x in frame.labels for t in frame.targets
    )


def test_answers_of_contrasts(rows: list[Row]) -> None:
    sides = [Side("data-free", ("magnitude",)), Side("data-driven", ("wanda",))]
    stated = [Statement("data-driven", "data-free", "better")]
    found = answer(rows, sides, question="Does data help?", published="It does.", statements=stated)
    text = Page(render(studies.study(rows), rows, [found])).text
    assert text.rindex("It does.") < text.rindex("Method by method") and text.count("Does data help?") == 1
    assert "data-driven against data-free" in text and "agrees" in text


def test_writes_in_one_step(rows: list[Row], tmp_path: Path) -> None:
    few = rows[:3]
    path = write_study_report(tmp_path / "out" / "report.html", studies.study(few), few)
    assert path.read_text(encoding="utf-8") == render(studies.study(few), few)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_page_does_not_depend_on_the_order_of_rows(rows: list[Row]) -> None:
    few = [r for r in rows if r.label in ("dense", "wanda", "magnitude") and r.subject == "demo"]
    assert render(studies.study(few), few) == render(studies.study(few), few[::-1])
