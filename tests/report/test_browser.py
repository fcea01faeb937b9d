"""The report in a real browser: its script ends without an error, it sorts, filters, draws and is not blank."""

from __future__ import annotations

import importlib.util
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tests.browser import browse, needs_browser, pixels, root_of

from secateur.report import render

_spec = importlib.util.spec_from_file_location("report_sample", Path(__file__).with_name("sample.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sample = _module.sample

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = sample()
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(run, compare=[sample("magnitude"), run, sample("sparsegpt")]), encoding="utf-8")
    return path


def test_script_runs_to_its_end(page: Path) -> None:
    root = root_of(browse(page.parent, page.as_uri(), "--dump-dom"))
    assert 'data-ready="1"' in root
    assert "data-errors" not in root


def test_empty_record_runs_too(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render({}), encoding="utf-8")
    root = root_of(browse(tmp_path, path.as_uri(), "--dump-dom"))
    assert 'data-ready="1"' in root and "data-errors" not in root


def test_a_script_that_is_not_ours_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    foreign = '<script>document.documentElement.dataset.foreign = "1"</script></body>'
    path.write_text(render(sample(blocks=1)).replace("</body>", foreign), encoding="utf-8")
    root = root_of(browse(tmp_path, path.as_uri(), "--dump-dom"))
    assert 'data-ready="1"' in root and "data-foreign" not in root


PROBE = """
const out = {}, $ = (s) => [...document.querySelectorAll(s)];
const names = () => $('#layers tbody tr:not([hidden]) th').map((e) => e.textContent);
const head = (k) => $(`#layers thead button[data-k=${k}]`)[0];
head('error').click();
out.sorted = head('error').parentNode.getAttribute('aria-sort');
out.errors = $('#layers tbody tr').slice(0, 5).map((r) => parseFloat(r.cells[6].textContent));
head('error').click();
out.least = parseFloat($('#layers tbody tr')[0].cells[6].textContent);
head('name').click();
out.first = names().slice(0, 2);
const filter = document.getElementById('filter');
filter.value = 'down 3';
filter.dispatchEvent(new Event('input'));
out.found = names();
out.shown = document.getElementById('shown').textContent;
const box = $('.chart').find((b) => b.querySelector('use'));
const press = (key) => box.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
press('ArrowRight'); press('ArrowRight');
out.tip = document.getElementById('tip').textContent;
out.said = document.getElementById('say').textContent;
press('ArrowDown');
out.down = document.getElementById('say').textContent;
const key = box.parentNode.querySelector('.key');
key.click();
out.pressed = key.getAttribute('aria-pressed');
out.gone = getComputedStyle(box.querySelector('g.s')).display;
out.links = [];
let blob = null;
URL.createObjectURL = (b) => { blob = b; return '#'; };
HTMLAnchorElement.prototype.click = function () { out.links.push(this.download); };
document.getElementById('json').click();
document.getElementById('csv').click();
out.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
blob.text().then((t) => { out.csv = t; document.documentElement.dataset.probe = JSON.stringify(out); });
"""


def test_sorts_filters_reads_points_and_saves(tmp_path: Path) -> None:
    run = sample()
    run["layers"][0]["notes"] = ["=1+1", 'a "quoted", note']
    html = render(run, compare=[run, sample("sparsegpt")])
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)  # the probe is a script of its own
    path = tmp_path / "probe.html"
    path.write_text(html.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    root = root_of(browse(tmp_path, path.as_uri(), "--dump-dom", "--virtual-time-budget=2000", "--window-size=500,900"))
    found = re.search(r'data-probe="([^"]*)"', root)
    assert found is not None and "data-errors" not in root, root
    out: dict[str, Any] = json.loads(unescape(found[1]))
    assert out["sorted"] == "descending" and out["errors"] == sorted(out["errors"], reverse=True)
    assert out["least"] < out["errors"][-1]
    assert out["first"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert out["found"] == ["model.layers.3.mlp.down_proj"] and out["shown"] == "1 of 210 layers"
    assert out["tip"].startswith("wanda, block 1") and out["said"].startswith("wanda, block 1, error")
    assert out["down"].startswith("sparsegpt, block 1")
    assert out["pressed"] == "false" and out["gone"] == "none"
    assert out["links"] == ["run.json", "layers.csv"]
    lines = out["csv"].split("\r\n")
    assert lines[0] == "name,block,shape,parameters,kept,sparsity,error,seconds,notes" and len(lines) == 212
    assert lines[1].endswith('"\'=1+1; a ""quoted"", note"') and "576x576" in lines[1]
    assert out["wide"] <= 0, "the page itself scrolls sideways on a narrow screen"


@pytest.mark.parametrize(("theme", "size"), [("light", (1000, 700)), ("dark", (1000, 700)), ("light", (500, 700))])
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
    dark = sum(1 for row in rows for value in row[::3] if value < 128) / (width * height)
    assert (0.01 < dark < 0.3) if theme == "light" else (dark > 0.7)


def test_prints(page: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.pdf"
    browse(tmp_path, page.as_uri(), f"--print-to-pdf={out}")
    assert out.read_bytes()[:4] == b"%PDF" and out.stat().st_size > 20_000
