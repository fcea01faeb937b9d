"""The report of a study in a real browser: it sorts, filters, switches, reads its points aloud, and prints."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from secateur.compare.page import render
from tests import studies
from tests.browser import browse, needs_browser, pixels, root_of

pytestmark = needs_browser


@pytest.fixture(scope="module")
def html() -> str:
    rows = studies.rows(methods=("random", "magnitude", "wanda", "sparsegpt"), targets=("0.5", "0.9"))
    return render(studies.study(rows), rows)


@pytest.fixture(scope="module")
def page(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def test_script_runs_to_its_end(page: Path) -> None:
    root = root_of(browse(page.parent, page.as_uri(), "--dump-dom"))
    assert 'data-ready="1"' in root and "data-errors" not in root


def test_an_empty_study_runs_too(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render({}, []), encoding="utf-8")
    root = root_of(browse(tmp_path, path.as_uri(), "--dump-dom"))
    assert 'data-ready="1"' in root and "data-errors" not in root


PROBE = """
const out = {}, $ = (s) => [...document.querySelectorAll(s)];
const table = document.getElementById('subject-0-results'), heads = [...table.tHead.rows[0].cells];
const column = (name) => heads.findIndex((h) => h.textContent === name);
const values = (name) => [...table.tBodies[0].rows].map((r) => r.cells[column(name)].dataset.v).filter((x) => x);
heads[column('Accuracy')].querySelector('button').click();
out.sorted = heads[column('Accuracy')].getAttribute('aria-sort');
out.down = values('Accuracy').map(Number);
const again = heads[column('Accuracy')].querySelector('button');
again.focus();
out.focus = document.activeElement === again && again.tagName === 'BUTTON';
again.click();
out.up = values('Accuracy').map(Number);
heads[column('Method')].querySelector('button').click();
out.first = table.tBodies[0].rows[0].cells[0].textContent;
const filter = document.querySelector('[data-filter=runs]');
filter.value = 'wanda 0.9';
filter.dispatchEvent(new Event('input'));
out.found = $('#runs tbody tr:not([hidden])').length;
out.shown = filter.parentNode.querySelector('output').textContent;
const box = $('.panel:not(.away) .chart').find((b) => b.querySelector('use'));
const press = (key) => box.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
press('ArrowRight');
out.said = document.getElementById('say').textContent;
out.tip = document.getElementById('tip').textContent;
press('ArrowDown');
out.next = document.getElementById('say').textContent;
const use = box.querySelector('use[data-t]'), svg = box.querySelector('svg'), m = svg.getScreenCTM();
press('Escape');
svg.dispatchEvent(new PointerEvent('pointermove', { clientX: m.a * use.getAttribute('x') + m.e,
  clientY: m.d * use.getAttribute('y') + m.f, bubbles: true }));
out.hover = document.getElementById('tip').textContent;
const bar = $('.tabs')[0], tabs = [...bar.children];
out.tabs = tabs.map((t) => t.textContent + ' ' + t.getAttribute('aria-selected'));
tabs[tabs.length - 1].focus();
bar.dispatchEvent(new KeyboardEvent('keydown', { key: 'Home', bubbles: true }));
out.home = tabs.map((t) => t.getAttribute('aria-selected'));
out.panels = [...bar.parentNode.querySelectorAll('.panel')].map((p) => getComputedStyle(p).display);
window.dispatchEvent(new Event('beforeprint'));
out.folded = $('details:not([open])').length;
window.dispatchEvent(new Event('afterprint'));
out.unlabelled = $('button, input').filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim()
  || (e.id && document.querySelector(`label[for="${e.id}"]`)))).length;
out.pictures = $('svg[role=img]').filter((e) => !e.getAttribute('aria-label')).length;
const ids = $('[id]').map((e) => e.id);
out.twice = ids.filter((x, i) => ids.indexOf(x) !== i);
out.broken = $('a[href^="#"]').filter((a) => !document.getElementById(a.getAttribute('href').slice(1))).length;
out.asked = performance.getEntriesByType('resource').map((e) => e.name);
out.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const blobs = [];
out.files = [];
URL.createObjectURL = (b) => { blobs.push(b); return '#'; };
HTMLAnchorElement.prototype.click = function () { out.files.push(this.download); };
document.querySelector('[data-csv=runs]').click();
document.getElementById('json').click();
document.querySelector('.panel:not(.away) [data-svg]').click();
Promise.all(blobs.map((b) => b.text())).then(([csv, record, picture]) => {
  out.csv = csv;
  const data = JSON.parse(record);
  out.rows = data.rows.length;
  out.row = data.rows[0];
  const drawn = new DOMParser().parseFromString(picture, 'image/svg+xml');
  out.svg = [drawn.documentElement.tagName, drawn.querySelectorAll('use').length, picture.includes('var(')];
  document.documentElement.dataset.probe = JSON.stringify(out);
});
"""


@pytest.fixture(scope="module")
def out(html: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("probe")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)  # the probe is a script of its own
    path = home / "probe.html"
    path.write_text(html.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    root = root_of(browse(home, path.as_uri(), "--dump-dom", "--virtual-time-budget=2000", "--window-size=500,900"))
    found = re.search(r'data-probe="([^"]*)"', root)
    assert found is not None and "data-errors" not in root, root
    probed: dict[str, Any] = json.loads(unescape(found[1]))
    return probed


def test_sorts_and_filters(out: dict[str, Any]) -> None:
    assert out["sorted"] == "descending" and out["down"] == sorted(out["down"], reverse=True)
    assert out["up"] == sorted(out["down"]) and out["focus"] and len(out["down"]) == 9
    assert out["first"] == "dense"
    assert out["found"] == 6 and out["shown"] == "6 of 54 rows"


def test_reads_points_by_keyboard_and_pointer(out: dict[str, Any]) -> None:
    assert re.match(r"\w+ at 0\.\d, accuracy \d\d\.\d\d.% \[.*\], n = 3", out["said"]), out["said"]
    assert "accuracy" in out["tip"] and "sparsity" in out["tip"]
    assert out["next"] != out["said"] and "accuracy" in out["hover"]


def test_switches_panels_and_opens_all_for_print(out: dict[str, Any]) -> None:
    assert out["tabs"] == ["Whole range false", "Close-up true"]
    assert out["home"] == ["true", "false"] and out["panels"] == ["block", "none"]
    assert out["folded"] == 0


def test_is_labelled_and_fits(out: dict[str, Any]) -> None:
    assert out["unlabelled"] == 0 and out["pictures"] == 0
    assert out["twice"] == [] and out["broken"] == 0
    assert out["asked"] == [], "the page asks for something beside itself"
    assert out["wide"] <= 0, "the page itself scrolls sideways on a narrow screen"


def test_saves_tables_rows_and_plots(out: dict[str, Any]) -> None:
    assert out["files"][:2] == ["runs.csv", "rows.json"] and out["files"][2].endswith(".svg")
    lines = out["csv"].strip().split("\r\n")
    assert lines[0].startswith("Subject,Method,Target,Seed,Status,Test") and len(lines) == 7
    assert "secateur train fashion-resnet --method wanda" in out["csv"] and "Copy" not in out["csv"]
    assert out["rows"] == 54 and out["row"]["cost.samples"] == 128
    assert out["svg"][0] == "svg" and out["svg"][1] > 8 and out["svg"][2] is False


@pytest.mark.parametrize(("theme", "size"), [("light", (1200, 900)), ("dark", (500, 700))])
def test_screenshot_is_not_blank(page: Path, tmp_path: Path, theme: str, size: tuple[int, int]) -> None:
    shot = tmp_path / "shot.png"
    flags = (f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}")
    browse(tmp_path, f"{page.as_uri()}?theme={theme}", *flags)
    width, height, rows = pixels(shot)
    assert (width, height) == size
    corner = rows[-1][:3]
    assert (sum(corner) > 700) if theme == "light" else (sum(corner) < 120)
    drawn = sum(1 for row in rows if len(set(row)) > 8)
    assert drawn > height * 0.2, f"only {drawn} of {height} rows show anything"


def test_prints(page: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.pdf"
    browse(tmp_path, page.as_uri(), f"--print-to-pdf={out}")
    data = out.read_bytes()
    assert data[:4] == b"%PDF" and out.stat().st_size > 50_000
    upright, sideways = b"/MediaBox [0 0 594.95", b"/MediaBox [0 0 841.91"
    assert data.count(upright) > 5 and data.count(sideways) >= 1
