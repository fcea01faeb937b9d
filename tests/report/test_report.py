"""The report as text: what it says, that it loads nothing, that no record can break or inject."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from secateur.report import charts, render, values, write_report

_spec = importlib.util.spec_from_file_location("report_sample", Path(__file__).with_name("sample.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sample = _module.sample

LOADS = {"src", "srcset", "poster", "action", "formaction", "data", "background", "manifest"}
VOID = {"meta", "input", "br", "hr", "img", "link", "use", "path", "circle", "rect"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; complains about tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

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


def record_in(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="record">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def html() -> str:
    return render(sample())


def test_says_the_answer_first(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert "wanda at 49.3 % sparsity raises perplexity from 27.9 to 45.1 (1.62×)." in page.text
    for part in (
        "Before and after",
        "Sparsity of each layer",
        "Output error",
        "Layers",
        "Skipped",
        "Notes",
        "Reproduce",
        "Cite",
    ):
        assert part in page.text
    for fact in ("ab12ab12", "text:corpus.txt", "arXiv 2306.11695", "an embedding, tied to lm_head", "damping raised"):
        assert fact in page.text
    assert "asked for 50 % sparsity; the pruned layers reached 49.3 %" in page.text
    assert page.text.count("self_attn.k_proj") >= 30


def test_is_small_and_loads_nothing() -> None:
    run = sample()
    alone, beside = render(run), render(run, compare=[sample("magnitude"), run, sample("sparsegpt")])
    for html in (alone, beside):
        assert len(html.encode()) < 300_000
        for tag, attrs in Page(html).tags:
            assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
            assert not LOADS & set(attrs), (tag, attrs)
            assert (attrs.get("href") or "#").startswith("#")
        assert "http://" not in html and "https://" not in html
        assert not re.search(r"@import|url\(", html)
        assert "default-src 'none'" in unescape(html) and "script-src 'sha256-" in unescape(html)


def test_record_in_the_page_is_the_record(html: str) -> None:
    run = sample()
    held = record_in(html)["run"]
    packed = held.pop("layers")
    layers = run.pop("layers")
    assert held == json.loads(json.dumps(run))
    assert [dict(zip(packed["columns"], row, strict=True)) for row in packed["rows"]] == layers


EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\'"&<!--\u2028'


def poisoned(value: Any) -> Any:
    """The same record with every text and every key's value spoilt."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return EVIL + value if isinstance(value, str) else value


def test_nothing_in_the_record_becomes_markup() -> None:
    run = poisoned(sample(blocks=2))
    run["versions"][EVIL] = EVIL
    run["machine"][EVIL] = EVIL
    run["recipe"][EVIL] = {EVIL: [EVIL]}
    run["timings"][EVIL] = 3.0
    other = poisoned(sample("sparsegpt", blocks=2))
    html = render(run, compare=[other])
    tags = Page(html).tags
    assert [attrs.get("type") for tag, attrs in tags if tag == "script"] == ["application/json", None]
    assert not any(tag == "img" for tag, _ in tags)
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert record_in(html)["run"]["notes"] == run["notes"]
    assert "\u2028" not in re.search(r'id="record">(.*?)</script>', html, re.S)[1]  # type: ignore[index]


def test_every_field_may_be_absent() -> None:
    assert "was not measured" in Page(render({})).text
    whole = sample(blocks=1)

    def without(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(value, dict):
            return [p for k, x in value.items() for p in ((*path, k), *without(x, (*path, k)))]
        return [p for i, x in enumerate(value[:1]) for p in without(x, (*path, i))] if isinstance(value, list) else []

    for path in without(whole):
        for replace in (False, True):
            run = copy.deepcopy(whole)
            at = run
            for step in path[:-1]:
                at = at[step]
            if replace:
                at[path[-1]] = None
            else:
                del at[path[-1]]
            assert Page(render(run, compare=[whole])).open == [], path


@pytest.mark.parametrize("wrong", ["text", 3, math.nan, [], {}, [None], [3], {"a": [1]}])
def test_every_field_may_be_wrong(wrong: Any) -> None:
    for key in sample(blocks=1):
        run = sample(blocks=1)
        run[key] = wrong
        assert Page(render(run)).open == [], key
    for key in ("name", "block", "shape", "parameters", "kept", "sparsity", "error", "seconds", "notes"):
        run = sample(blocks=1)
        run["layers"][0][key] = wrong
        assert Page(render(run)).open == [], key


def test_is_honest_about_what_was_not_measured() -> None:
    run = sample(blocks=1)
    run["after"]["perplexity"] = None
    assert "was not measured, so this run does not say what it costs" in Page(render(run)).text
    run = sample(blocks=1)
    run["before"] = None
    assert "the dense model was not measured" in Page(render(run)).text
    run = sample(blocks=1)
    run["after"]["perplexity"]["value"] = math.inf
    page = render(run)
    assert "not a finite number" in Page(page).text
    assert record_in(page)["run"]["after"]["perplexity"]["value"] == "Infinity"
    run = sample(blocks=1)
    run["after"]["perplexity"]["sha256"] = "00"
    assert "measured on different text, so not comparable" in Page(render(run)).text


def test_compares_runs() -> None:
    run = sample()
    page = Page(render(run, compare=[sample("magnitude"), run, sample("sparsegpt")]))
    assert re.search(r"Measure\s+dense\s+magnitude\s+wanda\s+sparsegpt", page.text)
    assert (
        "Of these 3 runs, sparsegpt keeps the lowest perplexity: 38.4, against 27.9 for the dense model." in page.text
    )
    assert re.search(r"Perplexity\s+27.9\s+214.6\s+45.1\s+lowest\s+38.4", page.text)
    for row in ("Sparsity of the model", "Time, whole run", "Peak memory", "Median layer error"):
        assert row in page.text
    assert "wanda" in page.text.split("Before and after")[0]


def test_an_unfair_comparison_names_no_winner() -> None:
    run, other = sample(blocks=1), sample("sparsegpt", blocks=1)
    other["sparsity"]["pruned_layers"] = 0.3
    text = Page(render(run, compare=[other])).text
    assert "differ in sparsity" in text and "keeps the lowest" not in text
    other = sample("sparsegpt", blocks=1)
    other["after"]["perplexity"]["sha256"] = "00"
    text = Page(render(run, compare=[other])).text
    assert "not measured on the same tokens" in text and "keeps the lowest" not in text


def test_same_method_twice_gets_two_names() -> None:
    run, other = sample(blocks=1), sample(blocks=1)
    other["seed"] = 1
    text = Page(render(run, compare=[other])).text
    assert "#1" in text and "#2" in text


def test_models_of_other_kinds() -> None:
    layers = [
        {
            "name": f"layer{i // 4}.{i % 4}.conv{k}",
            "block": None,
            "parameters": 100,
            "kept": 40 + i,
            "error": 0.01 * (i + 1),
        }
        for i in range(16)
        for k in (1, 2)
    ]
    html = render({"recipe": {"method": "snip"}, "layers": layers})
    assert "Layer, in model order" in html and ">conv1<" in html
    experts = [
        {
            "name": f"model.layers.{b}.mlp.experts.{e}.{w}",
            "block": b,
            "parameters": 9,
            "sparsity": 0.1 + e / 100,
            "error": 0.1,
        }
        for b in range(4)
        for e in range(64)
        for w in ("w1", "w2")
    ]
    experts.append({"name": "lm_head", "block": None, "parameters": 9, "sparsity": 0.5, "error": 0.2})
    html = render({"layers": experts})
    assert "no block" in html and html.count("<use ") < 200


def test_uniform_sparsity_is_one_line() -> None:
    html = render(sample(uniform=True))
    assert "Every layer stands at 50\u00a0%." in unescape(html)


def test_writes_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_report(path, sample(blocks=1)) == path
    before = path.read_text(encoding="utf-8")
    assert before.startswith("<!doctype html>")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(path, {"recipe": {"method": "\udcff"}})
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_quotes_a_pattern_for_every_yaml_reader(html: str) -> None:
    assert 'pattern: "2:4"' in unescape(html)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0008, 0.13), (1e-9, 3.0), (0.5, 0.51), (1.0, 10.0), (27.9, 2e7), (3, 1e300)]
)
def test_log_ticks_cover(low: float, high: float) -> None:
    major, minor = charts.log_ticks(low, high)
    assert major == sorted(major) and 2 <= len(major) <= 12
    assert major[0] <= low * 1.001 and major[-1] >= high * 0.999
    assert all(major[0] < t < major[-1] for t in minor)


def test_linear_ticks_cover() -> None:
    assert charts.linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    ticks = charts.linear_ticks(0.43, 0.57)
    assert ticks[0] <= 0.43 and ticks[-1] >= 0.57 and 4 <= len(ticks) <= 8


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (values.percent(0.5), "50 %"),
        (values.percent(0.3946), "39.5 %"),
        (values.measure(27.94), "27.9"),
        (values.measure(1234567.0), "1.2 × 10⁶"),
        (values.measure(None), "–"),
        (values.small(0.0123456), "0.0123"),
        (values.small(1.5e-6), "1.50 × 10⁻⁶"),
        (values.size(269030016), "257 MiB"),
        (values.duration(0.0384), "38 ms"),
        (values.duration(7.0), "7.0 s"),
        (values.duration(121), "2 min 1 s"),
        (values.duration(7510), "2 h 5 min"),
        (values.change(100, 61), "−39 %"),
        (values.change(100, 100), "unchanged"),
        (values.ratio(27.9, 45.1), "1.62×"),
    ],
)
def test_writes_values_for_a_person(shown: str, text: str) -> None:
    assert shown.replace("\u00a0", " ") == text


def test_an_axis_of_positive_data_begins_no_lower_than_zero() -> None:
    from secateur.report.training import plots

    curve = [{"leg": "dense", "epoch": k + 1.0, "loss": loss} for k, loss in enumerate((1.9, 0.4, 0.02))]
    svg = str(plots({"task": {"metric": "accuracy"}, "curves": curve})[0]["chart"].svg)  # type: ignore[attr-defined]
    ticks = re.findall(r'class="ti" x="50" y="[^"]*" text-anchor="end">([^<]*)<', svg)
    assert ticks[0] == "0" and not any(t.startswith("-") for t in ticks)
    assert charts.padded([-2.0, -1.0])[1] <= 0 and charts.padded([0.2, 0.999])[1] <= 1
    assert charts.padded([5.0, 5.0]) == (4.75, 5.25)
