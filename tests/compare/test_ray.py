"""The same study on a Ray cluster of two workers, started here."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from secateur.compare import compare
from secateur.errors import StudyError

from .test_engine import study, timeless

ray = pytest.importorskip("ray", reason="needs ray")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_finds_what_processes_here_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", str(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = compare(study(), tmp_path / "ray", ray="local", workers=2, threads=1)
    here = compare(study(), tmp_path / "here", workers=1, threads=1)
    assert there.missing == 0 and all(r.done for r in there.rows), [r.reason for r in there.rows]
    assert timeless(there.rows) == timeless(here.rows)
    assert not ray.is_initialized()


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no Ray cluster at '127.0.0.1:1'"):
        compare(study(), tmp_path / "s", ray="127.0.0.1:1", threads=1)
