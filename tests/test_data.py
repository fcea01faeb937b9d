"""Calibration data: windows of tokens from many sources, and what cannot be used is said in one sentence."""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.data import CALIBRATION, EVALUATION, digest, read_text, windows
from secateur.errors import DataError


class Letters:
    """A tokenizer: one token for each character."""

    name_or_path = "letters"

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(c) for c in text])


def letters(path: Path, count: int) -> str:
    path.write_text("".join(chr(97 + k % 26) for k in range(count)), encoding="utf-8")
    return f"text:{path}"


# -- windows ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 12), st.data())
def test_windows_are_cut_from_the_text_and_spread_over_it(total: int, length: int, data: st.DataObject) -> None:
    from secateur.data import _cut

    fit = total // length
    count = data.draw(st.none() | st.integers(1, max(fit, 1)))
    ids = torch.arange(total)
    if fit == 0:
        with pytest.raises(DataError, match=f"has {total} tokens, less than one window of {length}"):
            _cut(ids, "x", "", count, length)
        return
    cut = _cut(ids, "x", "", count, length)
    assert (len(cut), cut.length) == (count or fit, length) and cut.tokens == cut.ids.numel()
    starts = cut.ids[:, 0]
    assert torch.equal(cut.ids, starts[:, None] + torch.arange(length))  # consecutive tokens
    assert (starts.diff() >= length).all()  # no token twice
    if len(cut) > 1:
        assert starts[0] == 0 and starts[-1] == (fit - 1) * length
        gaps = starts.diff() // length
        assert int(gaps.max() - gaps.min()) <= 1  # evenly


def test_text_is_described(tmp_path: Path) -> None:
    cut = windows(letters(tmp_path / "t.txt", 100), Letters(), count=3, length=20)
    assert cut.describe() == {
        "source": f"text:{tmp_path / 't.txt'}",
        "sha256": digest(cut.ids),
        "windows": 3,
        "length": 20,
        "tokens": 60,
        "tokenizer": "letters",
        "available_tokens": 100,
    }
    assert cut.ids.dtype == torch.int64 and windows(cut) is cut


def test_the_hash_is_that_of_little_endian_int64() -> None:
    ids = torch.tensor([[1, 2], [3, 70000]])
    expected = hashlib.sha256(np.array([1, 2, 3, 70000], dtype="<i8").tobytes()).hexdigest()
    assert digest(ids) == windows(ids).sha256 == windows(ids.int()).sha256 == expected
    assert windows(ids.flip(0)).sha256 != expected


IDS = torch.arange(12).reshape(4, 3)


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        [IDS],
        [IDS[:1], IDS[1:]],
        list(IDS),
        IDS.tolist(),
        [IDS.tolist()],
        iter(IDS),
        IDS.int(),
        {"input_ids": IDS},
        [{"input_ids": IDS[:2], "attention_mask": None}, {"input_ids": IDS[2:]}],
        [UserDict(input_ids=IDS)],  # what tokenizers of transformers return is one
        [(IDS[:2], IDS[:2]), (IDS[2:],)],
        [[IDS[:2], None], [IDS[2:], None]],
        [{"input_ids": IDS[0]}, *IDS[1:]],
    ],
    ids=str,
)
def test_batches_of_many_kinds(given: Any) -> None:
    cut = windows(given)
    assert torch.equal(cut.ids, IDS) and cut.source == "tensors" and cut.available == 12


def test_one_sequence_is_one_window() -> None:
    assert torch.equal(windows(torch.arange(5)).ids, torch.arange(5)[None])


def test_only_as_many_as_asked_for_are_drawn() -> None:
    drawn = []

    def source() -> Any:
        for k in range(10):
            drawn.append(k)
            yield IDS

    assert len(windows(source(), count=6)) == 6 and drawn == [0, 1]


@pytest.mark.parametrize(
    "given,count,message",
    [
        ([], None, "the calibration data is empty"),
        (torch.zeros(0, 3, dtype=torch.long), None, "not single or no ids"),
        (torch.rand(2, 3), None, "token ids are expected, not floating point"),
        ([{"labels": IDS}], None, r"no 'input_ids'; it has \['labels'\]"),
        ([IDS, torch.ones(1, 4).long()], None, "different lengths"),
        ([1, 2, 3], None, "not single or no ids"),
        (["a b c"], None, "a batch is not a tensor of token ids"),
        (IDS, 5, "has 4 token sequences, and 5 were asked for"),
    ],
)
def test_what_batches_cannot_be(given: Any, count: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        windows(given, count=count)


# -- text ---------------------------------------------------------------------------------------------------------


def test_the_two_texts_of_the_package() -> None:
    texts = [read_text(s) for s in (CALIBRATION, EVALUATION)]
    assert all(len(t) > 10_000 for t in texts) and texts[0] != texts[1]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"text": "one\u2028two\x85", "body": "B"}, {"text": "three", "body": "C"}]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8")
    assert read_text(f"jsonl:{path}") == "one\u2028two\x85\n\nthree"
    assert read_text(f"jsonl:{path}#body") == "B\n\nC"
    with pytest.raises(DataError, match="line 1 has no field 'title': name one with jsonl:FILE#field"):
        read_text(f"jsonl:{path}#title")
    path.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_text(f"jsonl:{path}")
    path.write_text('{"text": "a"}\n["text"]\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2 has no field 'text'"):
        read_text(f"jsonl:{path}")


def test_what_text_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.txt: give --data text:FILE"):
        read_text(f"text:{tmp_path / 'none.txt'}")
    with pytest.raises(DataError, match="is a directory"):
        read_text(f"text:{tmp_path}")
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"empty\.txt is empty: give a text"):
        read_text(f"text:{tmp_path / 'empty.txt'}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 3\)"):
        read_text(f"text:{tmp_path / 'latin.txt'}")
    for unknown in ("wikitext", "csv:x", ""):
        with pytest.raises(DataError, match=f"data '{unknown}' is not understood: write text:FILE"):
            read_text(unknown)


def test_windows_of_text_that_cannot_be(tmp_path: Path) -> None:
    source = letters(tmp_path / "t.txt", 30)
    with pytest.raises(DataError, match="has no tokenizer: give token tensors"):
        windows(source)
    with pytest.raises(DataError, match="30 tokens, less than one window of 31: give more text"):
        windows(source, Letters(), length=31)
    with pytest.raises(DataError, match="3 windows of 10, and 4 were asked for"):
        windows(source, Letters(), count=4, length=10)
    for count, length in ((0, 10), (-1, 10), (1, 0), (None, -5)):
        with pytest.raises(DataError, match="ask for at least one"):
            windows(source, Letters(), count=count, length=length)


def test_hub_data_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'secateur\[data\]'"):
        read_text("hf:some/dataset#body")


def _datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load))


def test_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    _datasets(monkeypatch, lambda name, split, streaming: [{"body": name}, {"body": "b"}])
    assert read_text("hf:some/dataset#body") == "some/dataset\n\nb"
    with pytest.raises(DataError, match=r"dataset some/dataset has no field 'text'; it has \['body'\]"):
        read_text("hf:some/dataset")

    def fails(name: str, split: str, streaming: bool) -> Any:
        raise ConnectionError("offline")

    _datasets(monkeypatch, fails)
    with pytest.raises(DataError, match="dataset some/dataset cannot be read: offline"):
        read_text("hf:some/dataset")


def test_padding_is_refused() -> None:
    mask = torch.ones_like(IDS)
    assert len(windows([{"input_ids": IDS, "attention_mask": mask}])) == len(IDS)
    mask[0, -1] = 0
    with pytest.raises(DataError, match="padding"):
        windows([{"input_ids": IDS, "attention_mask": mask}])
