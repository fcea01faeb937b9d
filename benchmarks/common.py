"""What the scripts share: where results go, what they were measured on, and how a child process is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PEER_SCRIPT = HERE / "peer_llmcompressor.py"


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def environment(threads: int | None = None) -> dict[str, Any]:
    """The machine, the threads and the versions that the numbers belong to."""
    from secateur.measure import machine, versions

    found = machine()
    return {
        **found,
        "threads": threads or found["threads"],
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }


def start(command: Sequence[str], threads: int | None, file: Path) -> subprocess.Popen[bytes]:
    """Start a child process with its number of threads, all its output in ``file``."""
    env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if threads:
        env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    with file.open("wb") as stream:
        return subprocess.Popen([str(c) for c in command], stdout=stream, stderr=subprocess.STDOUT, env=env)


def child(command: Sequence[str], threads: int | None = None) -> dict[str, Any]:
    """Run a script in a process of its own; returns the JSON object on the last line that it prints.

    ``max_rss`` (bytes, of the whole life of the process) and ``wall`` are what the operating system says.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "output.txt"
        begun = time.perf_counter()
        process = start(command, threads, file)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        lines = [x for x in file.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
    answers = [x for x in lines if x.startswith("{")]
    if process.returncode or not answers:
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise SystemExit(f"a child process failed (exit code {process.returncode}): {' '.join(map(str, command))}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {**json.loads(answers[-1]), "max_rss": usage.ru_maxrss * scale, "wall": time.perf_counter() - begun}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with aligned columns; the first is text, the others are numbers."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f"{'-' * (w + 2)}" if i == 0 else f"{'-' * (w + 1)}:" for i, w in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def axes(target: str) -> dict[str, Any]:
    """A target as fields of a recipe: ``0.5`` is a sparsity, ``2:4`` a granularity."""
    return {"granularity": target} if ":" in target else {"sparsity": float(target)}


def peer_axes(target: str) -> list[str]:
    """A target as arguments of the peer script. It counts the N of N:M as what goes, `secateur` as what stays."""
    if ":" not in target:
        return ["--sparsity", target, "--pattern", "0:0"]
    n, m = (int(x) for x in target.split(":"))
    return ["--sparsity", str(1 - n / m), "--pattern", f"{m - n}:{m}"]
