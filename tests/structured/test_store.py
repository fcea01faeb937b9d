"""Smaller models on disk: back bit by bit, and refused where a file, the plan or the model does not fit."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import nets, tiny
from torch import Tensor, nn

from secateur import Recipe
from secateur.errors import ModelError, OutputError
from secateur.structured import load, plan_structured, save

FUSED = "net.qkv.weight"


class Model(nn.Module):
    """Fused attention with numbers of every kind beside it, some of them never to be touched."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.FusedAttention(heads=4, dim=3)
        self.width, self.sizes, self._hidden = 8, [8, 3], 8
        self.register_buffer("steps", torch.arange(4))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)

    @property
    def fixed(self) -> int:
        return 8

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.passing


def smaller(model: nn.Module, example: Any) -> nn.Module:
    plan = plan_structured(model, Recipe.of("magnitude"), target="params 40%", multiple=1, example=example)
    return plan.shrink().eval()


def run(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A directory, and the model in it."""
    torch.manual_seed(0)
    model = Model()
    model.passing.add_(1)
    small = smaller(model, nets.noise(2, 6, 5))
    return save(small, tmp_path_factory.mktemp("store") / "small"), small


@pytest.mark.parametrize("name", ["residual", "fused-qkv", "tied", "lstm", "gru", "unet", "depthwise", "keyword"])
def test_back_bit_by_bit_on_a_fresh_model(name: str, tmp_path: Path) -> None:
    model, example = nets.build(name)
    small = smaller(model, example)
    save(small, tmp_path / "out")
    torch.manual_seed(7)
    fresh = nets.NETS[name][0]().eval()
    assert not nets.same(nets.snapshot(small), fresh)
    again = load(tmp_path / "out", fresh)
    assert again is fresh and nets.same(nets.snapshot(small), again)
    assert str(again) == str(small) and again.secateur_surgery == small.secateur_surgery
    for a, b in zip(run(small, example), run(again, example), strict=True):
        assert torch.equal(a, b)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.safetensors", "surgery.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    save(again, tmp_path / "twice")
    assert (tmp_path / "out/surgery.json").read_bytes() == (tmp_path / "twice/surgery.json").read_bytes()


def test_back_in_another_process(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, small = saved
    script = (
        "import sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from tests.structured.test_store import Model\n"
        "from secateur.structured import load\n"
        "torch.manual_seed(3)\n"
        "model = load(sys.argv[1], Model()).eval()\n"
        "with torch.no_grad():\n"
        "    result = model(torch.linspace(-1, 1, 60).view(2, 6, 5))\n"
        "save_file({'result': result, 'passing': model.passing}, sys.argv[2])\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "result")]
    subprocess.run(command, check=True, cwd=root, capture_output=True, timeout=120)
    found = load_file(tmp_path / "result")
    assert torch.equal(found["result"], run(small, torch.linspace(-1, 1, 60).view(2, 6, 5))[0])
    assert torch.equal(found["passing"], small.passing)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model, example = nets.build("tied")
    save(smaller(model, example), tmp_path / "out")
    assert "out.weight" not in load_file(tmp_path / "out/model.safetensors")
    again = load(tmp_path / "out", nets.Tied())
    assert again.out.weight is again.e.weight
    assert again.out.weight.untyped_storage().data_ptr() == again.e.weight.untyped_storage().data_ptr()


def test_what_is_not_saved(tmp_path: Path, saved: tuple[Path, nn.Module]) -> None:
    folder, small = saved
    with pytest.raises(OutputError, match="exists"):
        save(small, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        save(small, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(ModelError, match="no surgery"):
        save(Model(), tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    assert save(small, tmp_path / "empty") == tmp_path / "empty"
    assert save(small, tmp_path / "a/b/c").is_dir()
    for path in tmp_path.rglob("*"):  # a pickle begins with 0x80, a torch archive with PK
        assert path.is_dir() or path.read_bytes()[:1] not in (b"\x80", b"P")


def test_a_place_below_a_file_is_no_place(tmp_path: Path, saved: tuple[Path, nn.Module]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        save(saved[1], tmp_path / "file/below")


def test_saving_removes_nothing(tmp_path: Path, saved: tuple[Path, nn.Module]) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/notes").write_text("mine")
    save(saved[1], tmp_path / "out")
    assert (tmp_path / "out.partial/notes").read_text() == "mine"


def refused(folder: Path, model: nn.Module | None = None) -> str:
    """The message with which a directory is refused, after which the model is as it was."""
    model = Model() if model is None else model
    before, shown, numbers = nets.snapshot(model), str(model), copy.deepcopy(getattr(model, "sizes", None))
    try:
        with pytest.raises(ModelError) as caught:
            load(folder, model)
    finally:
        assert nets.same(before, model) and str(model) == shown and getattr(model, "sizes", None) == numbers
        assert not hasattr(model, "secateur_surgery")
    return str(caught.value)


@pytest.fixture
def copied(saved: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The directory with another plan."""
    record = json.loads((folder / "surgery.json").read_text())
    changed = edit(record)
    text = changed if isinstance(changed, str) else json.dumps(record)
    (folder / "surgery.json").write_text(text)
    return folder


def mend(**change: Any) -> Callable[[dict[str, Any]], Any]:
    """Append a mend of ``width`` with something else in it."""
    whole = {"module": "", "attribute": "width", "item": None, "old": 8, "new": 4, **change}
    return lambda record: record["mends"].append(whole)


def keeps(value: Any, axis: str = "0") -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["kept"][FUSED].update({axis: {"of": 36, "keep": value}})


def kept_of(record: dict[str, Any]) -> int:
    return sum(b - a for a, b in record["kept"][FUSED]["0"]["keep"])


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another axis": keeps([[0, 30]], "1"),
    "no such axis": keeps([[0, 30]], "7"),
    "no axis": keeps([[0, 30]], "x"),
    "out of range": keeps([[0, 400]]),
    "as many, out of range": lambda r: r["kept"][FUSED]["0"].update(keep=[[36, 36 + kept_of(r)]]),
    "as many, negative": lambda r: r["kept"][FUSED]["0"].update(keep=[[-kept_of(r), 0]]),
    "far out of range": keeps([[0, 10**30]]),
    "negative": keeps([[-3, 4]]),
    "backwards": keeps([[9, 2]]),
    "overlapping": keeps([[0, 20], [10, 36]]),
    "nothing": keeps([]),
    "nothing of it": keeps([[0, 0]]),
    "three numbers": keeps([[1, 2, 3]]),
    "no number": keeps([["a", "b"]]),
    "another count": keeps([[0, 5]]),
    "unknown tensor": lambda r: r["kept"].update(nothing=r["kept"][FUSED]),
    "kept as a list": lambda r: r.update(kept=[]),
    "no kept": lambda r: r.pop("kept"),
    "unknown attribute": mend(attribute="nothing"),
    "unknown module": mend(module="nothing"),
    "private attribute": mend(attribute="_hidden"),
    "special attribute": mend(attribute="__class__"),
    "a parameter": mend(module="net.i", attribute="weight", item=0),
    "a method": mend(attribute="forward"),
    "another value": mend(old=9),
    "negative size": mend(new=-4),
    "size of nothing": mend(new=0),
    "enormous size": mend(new=1 << 40),
    "item out of range": mend(attribute="sizes", item=9),
    "item of a number": mend(item=0),
    "mend without module": lambda r: r["mends"].append({"attribute": "width"}),
    "mends as a dict": lambda r: r.update(mends={"a": 1}),
    "no mends": lambda r: r.pop("mends"),
    "tied to nothing": lambda r: r["tied"].update({"net.i.bias": "nothing"}),
    "tied to another shape": lambda r: r["tied"].update({"net.i.bias": FUSED}),
    "no tied": lambda r: r.pop("tied"),
    "no shapes": lambda r: r.pop("shapes"),
    "another version": lambda r: r.update(version=2),
    "no version": lambda r: r.pop("version"),
    "another digest": lambda r: r.update(sha256="0" * 64),
    "no digest": lambda r: r.pop("sha256"),
    "no JSON": lambda r: "{",
    "another JSON": lambda r: "[1]",
    "null": lambda r: "null",
}
#: What once got past the checks -> what happened then.
LEAKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "negative axis": (keeps([[0, 36]], "-2"), "IndexError, half way through the model"),
    "item as text": (mend(attribute="sizes", item="0"), "TypeError, after all tensors became smaller"),
    "item as a fraction": (mend(attribute="sizes", item=0.5), "TypeError, after all tensors became smaller"),
    "a property": (mend(attribute="fixed"), "AttributeError, after all tensors became smaller"),
    "tied to a list": (lambda r: r["tied"].update({"net.i.bias": ["x"]}), "TypeError"),
    "infinite": (lambda r: json.dumps(r).replace('"of": 36', '"of": Infinity'), "OverflowError"),
    "deep JSON": (lambda r: "[" * 100_000, "RecursionError"),
    "another format": (lambda r: r.update(format="transformers"), "OSError of transformers"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_plan_is_refused(edit: str, copied: Path) -> None:
    assert str(copied) in refused(edited(copied, EDITS[edit]))


@pytest.mark.parametrize("edit", LEAKS)
def test_a_changed_plan_that_leaks_is_refused(edit: str, copied: Path) -> None:
    refused(edited(copied, LEAKS[edit][0]))


def reweighed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The directory with other weights, and the digest that fits them."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return edited(folder, lambda record: record.update(sha256=digest))


def test_changed_weights_are_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\0\0\0\1")
    assert "changed or cut off" in refused(copied)
    weights.write_bytes(whole[:-10])
    assert "changed or cut off" in refused(copied)
    for content in (whole[:-10], b"x" * 50, b""):
        weights.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        assert "cannot be read" in refused(edited(copied, lambda record, d=digest: record.update(sha256=d)))
    weights.unlink()
    assert "is not a model" in refused(copied)


def test_weights_of_other_shapes_are_refused(copied: Path) -> None:
    assert "holds nothing for net.i.bias" in refused(reweighed(copied, lambda s: s.pop("net.i.bias")))
    assert "holds [3]" in refused(reweighed(copied, lambda s: s.update({"net.i.bias": torch.ones(3)})))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_weights_of_another_dtype_are_refused(dtype: torch.dtype, copied: Path) -> None:
    refused(reweighed(copied, lambda s: s.update({k: x.to(dtype) for k, x in s.items()})))


def test_weights_of_a_larger_model_are_refused(copied: Path) -> None:
    refused(reweighed(copied, lambda s: s.update(more=torch.ones(3))))


def test_another_model_is_refused(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, small = saved
    wider = Model()
    wider.extra = nn.Linear(2, 2)
    again = copy.deepcopy(small)
    del again.secateur_surgery
    for model in (nn.Linear(3, 4), nets.FusedAttention(), wider, again):
        assert str(folder) in refused(folder, model)
    assert "is not a model" in refused(tmp_path / "nothing")
    with pytest.raises(ModelError, match="fresh model"):
        load(folder)


def test_a_language_model_comes_back(tmp_path: Path) -> None:
    ids = {"input_ids": tiny.ids(2, 8), "use_cache": False}
    model = tiny.build("opt", num_hidden_layers=1)
    plan = plan_structured(model, Recipe.of("magnitude", only=["*.fc1"]), target="params 10%", multiple=1, example=ids)
    small = plan.shrink()
    save(small, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix not in (".json", ".safetensors")]
    again = load(tmp_path / "out", tiny.build("opt", num_hidden_layers=1))
    with torch.no_grad():
        assert torch.equal(small(**ids).logits, again.eval()(**ids).logits)
    assert nets.parameters(again) == plan.after["params"]
