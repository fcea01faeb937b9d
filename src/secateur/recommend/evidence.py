"""Measured evidence: runs of studies, the user's own and those that ship with the package, and what they were made on.

A shipped file is JSON lines, compressed where its name ends with ``.gz``: a first line that names the study, its format
and its subjects, then rows without layers, sketches and groups. `export` makes one of a study directory.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..compare import Row, read_rows
from ..errors import DataError
from .subject import Subject, known

#: What the first line of a shipped file says.
FORMAT = "secateur evidence 1"
#: What of a row's result goes into a shipped file.
_KEPT = (
    "metric", "higher_is_better", "valid", "test", "test_count", "parameters", "nonzero", "sparsity", "flops",
    "effective_flops", "bytes", "sparse_bytes", "latency", "cost", "protocol", "recipe_digest",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A row, and what it was made on.

    Attributes:
        row: the run.
        study: its name.
        subject: what was pruned.
        own: whether the user named the study, or it shipped with the package.
    """

    row: Row
    study: str
    subject: Subject
    own: bool = False


def slim(row: Row) -> Row:
    """The row without what only its own study needs: layers, sketches, groups, and of the environment all but the
    machine.
    """
    result = {key: row.result[key] for key in _KEPT if key in row.result}
    environment = row.result.get("environment")
    if isinstance(environment, Mapping):
        result["environment"] = {k: environment[k] for k in ("machine", "threads") if k in environment}
    return Row.from_dict({**row.to_dict(), "result": result})


def export(directory: Path, target: Path, subjects: Mapping[str, Subject] | None = None) -> int:
    """Write a study as a file that ships; returns the number of rows. Runs that chose a knob are left out.

    Args:
        directory: of the study.
        target: the file to write; compressed where it ends with ``.gz``.
        subjects: what each subject is, where its name does not say so.

    Raises:
        DataError: the study cannot be read, or nobody says what a subject is.
    """
    rows = [slim(row) for row in read_rows(_rows_file(directory)) if row.role == "final"]
    names = sorted({row.subject for row in rows})
    described = {name: (subjects or {}).get(name) or known(name) for name in names}
    if unknown := [n for n, s in described.items() if s.kind == "other" and s.parameters is None]:
        raise DataError(f"nobody says what {', '.join(unknown)} is: give its kind and its parameters with subjects=")
    head = {
        "format": FORMAT, "study": _name(directory),
        "subjects": {n: {"kind": s.kind, "parameters": s.parameters} for n, s in described.items()},
    }  # fmt: skip
    lines = [json.dumps(x, sort_keys=True, ensure_ascii=False) for x in (head, *(row.to_dict() for row in rows))]
    text = "".join(line + "\n" for line in lines).encode()
    part = target.with_name(target.name + ".partial")
    part.write_bytes(gzip.compress(text, 9, mtime=0) if target.suffix == ".gz" else text)
    part.replace(target)
    return len(rows)


def read(path: Path, *, own: bool = True) -> list[Run]:
    """The runs of a study directory, of its ``rows.jsonl``, or of a file that `export` wrote.

    Raises:
        DataError: nothing is there, or it is not what it should be.
    """
    if path.is_dir() or (path.suffix == ".jsonl" and not _is_exported(path)):
        file = _rows_file(path) if path.is_dir() else path
        name = _name(path if path.is_dir() else path.parent)
        rows = _rows(file)
        subjects = {subject: _described(subject, rows) for subject in {row.subject for row in rows}}
        return [Run(slim(row), name, subjects[row.subject], own) for row in rows if row.role == "final"]
    return _exported(path, own)


def _described(name: str, rows: Iterable[Row]) -> Subject:
    """A subject by its name, its size by its dense runs; the metric tells that of one that is not known."""
    subject = known(name)
    own = [row for row in rows if row.subject == name]
    size = next((int(n) for row in own if row.dense and (n := row.figure("parameters"))), subject.parameters)
    language = any(row.metric.startswith(("perplexity", "bits")) for row in own)
    kind = "decoder" if subject.kind == "other" and language else subject.kind
    return Subject(name, kind, size)


def _rows(file: Path) -> list[Row]:
    try:
        return read_rows(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _rows_file(path: Path) -> Path:
    file = path / "rows.jsonl"
    if not file.is_file():
        raise DataError(f"{path} has no rows.jsonl: give a directory that secateur compare wrote")
    return file


def _name(directory: Path) -> str:
    """The study's name by its ``study.yaml``, or that of the directory."""
    file = directory / "study.yaml"
    if file.is_file():
        try:
            found = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
        except (YAMLError, OSError, UnicodeDecodeError):
            found = None  # the rows are what counts
        if isinstance(found, dict) and isinstance(found.get("study"), str):
            return str(found["study"])
    return directory.resolve().name


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _is_exported(path: Path) -> bool:
    return path.is_file() and FORMAT in _text(path).partition("\n")[0]


def _exported(path: Path, own: bool) -> list[Run]:
    if not path.is_file():
        raise DataError(f"there is no study at {path}: give a directory that secateur compare wrote")
    lines = [line for line in _text(path).split("\n") if line.strip()]
    try:
        head, *rest = (json.loads(line) for line in lines)
        if head["format"] != FORMAT:
            raise ValueError(head["format"])
        subjects = {n: Subject(n, s["kind"], s["parameters"]) for n, s in head["subjects"].items()}
        rows = [Row.from_dict(x) for x in rest]
        return [Run(row, str(head["study"]), subjects[row.subject], own) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, DataError):
        raise DataError(f"{path} is not a study that was exported for the recommender ({FORMAT})") from None


def shipped() -> list[Run]:
    """The studies that ship with the package, as far as there are any."""
    folder = Path(str(resources.files("secateur").joinpath("recommend", "evidence")))
    files = sorted(f for f in folder.glob("*.jsonl*") if f.name.endswith((".jsonl", ".jsonl.gz")))
    return [run for file in files for run in read(file, own=False)]


def gather(studies: Iterable[str | Path] = (), *, with_shipped: bool = True) -> list[Run]:
    """The user's own studies, then those that ship; a run that is in both counts once, as the user's."""
    runs = [run for path in studies for run in read(Path(path))]
    seen = {run.row.digest for run in runs}
    return runs + [run for run in (shipped() if with_shipped else []) if run.row.digest not in seen]
