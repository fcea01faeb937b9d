"""Ready tasks and the user's: splits, orders, sizes, and what is said of wrong ones."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur import Task, registry
from secateur.errors import DataError, ModelError, OutputError, RecipeError, UnknownName
from secateur.tasks import Checkpoint, as_task, find, names_a_task
from secateur.tasks.arrays import batched, hold_out
from secateur.tasks.base import accuracy, triangle
from secateur.tasks.images import VARIABLE, drawn_digits, fashion_mnist
from secateur.tasks.text import bits_per_character
from tests.tasks.tiny import TASK

SMALL: dict[str, dict[str, int]] = {
    "digits": {"images": 200, "width": 4},
    "text-encoder": {"words": 50, "width": 16, "depth": 1},
    "char-lm": {"characters": 4000, "width": 16, "depth": 1},
}

FILE = """
import torch
from torch import nn

class Mine:
    epochs = 1

    def model(self, seed):
        return nn.Linear(2, 2)

    def batches(self, split, seed, epoch):
        generator = torch.Generator().manual_seed({"train": epoch, "valid": 1000, "test": 1001}[split])
        for _ in range(3):
            x = torch.rand(8, 2, generator=generator)
            yield x, (x[:, 0] > x[:, 1]).long()

made = Mine()
number = 3
"""


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the format of Fashion-MNIST, with a few random images."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 300), ("t10k", 50)):
        images = torch.randint(256, (count, 784), generator=generator).to(torch.uint8).numpy().tobytes()
        labels = torch.randint(10, (count,), generator=generator).to(torch.uint8).numpy().tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", registry.parts("task"))
def test_a_ready_task_works(name: str, fashion: Path) -> None:
    """Its model takes its batches, its loss has gradients, its metric is a number, its splits are its own."""
    options = SMALL.get(name, {"images": 200, "batch": 20, "width": 4 if "vit" not in name else 16})
    task = find(name, **options)
    torch.manual_seed(0)
    model = task.model(0)
    batch = next(iter(task.batches("train", 0, 0)))
    task.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert task.optimizer(model).param_groups[0]["lr"] > 0
    value = task.measure(model)
    assert value > 0 if not task.higher_is_better else 0 <= value <= 1
    first, again = (torch.cat([b[0] for b in task.batches("train", 3, 1)]) for _ in range(2))
    other = torch.cat([b[0] for b in task.batches("train", 3, 2)])
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.no_grad():
        model.eval()(task.example_input())
    assert task.name == name and task.options["width"] == options["width"]


def test_validation_comes_out_of_the_training_data() -> None:
    rows = torch.arange(100)
    batches = batched([rows], [torch.arange(1000, 1010)], size=9)
    train, valid, test = ({int(x) for (b,) in batches(s, 0, 0) for x in b} for s in ("train", "valid", "test"))
    assert train | valid == set(range(100)) and not train & valid and len(valid) == 10
    assert test == set(range(1000, 1010))
    assert {int(x) for (b,) in batches("valid", 7, 3) for x in b} == valid  # whatever the seed
    with pytest.raises(DataError, match="train, valid and test data, not 'dev'"):
        batches("dev", 0, 0)
    with pytest.raises(DataError, match="90 training examples are less than one batch of 91"):
        batched([rows], [rows], size=91)
    with pytest.raises(DataError, match="cannot be cut"):
        hold_out([torch.arange(1)])


def test_passages_for_testing_are_not_trained_on() -> None:
    task = find("text-encoder", words=5000)
    train, valid, test = (
        {tuple(row.tolist()) for x, _ in task.batches(s, 0, 0) for row in x} for s in ("train", "valid", "test")
    )
    assert not train & test and not train & valid and len(test) > 100


def test_the_metric_of_characters() -> None:
    """A model that knows nothing takes log2 of the number of characters."""

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*x.shape, 32)

    ids = torch.zeros(2, 5, dtype=torch.long)
    assert bits_per_character(Nothing(), [(ids, ids)]) == pytest.approx(5.0)
    for metric in (bits_per_character, accuracy):
        with pytest.raises(DataError, match="at least one batch"):
            metric(Nothing(), [])


@given(st.floats(0, 1))
def test_the_schedule_stays_in_its_bounds(t: float) -> None:
    assert 0 <= triangle(t) <= 1
    assert triangle(1.0) == 0 and triangle(0.2) == 1


def test_digits_are_drawn_the_same_everywhere() -> None:
    images, labels = drawn_digits(50, 0, noise=0.0)
    assert torch.equal(images, drawn_digits(50, 0, noise=0.0)[0])
    one = images[labels == 1]
    assert {float(x) for x in one.sum((1, 2, 3))} == {20.0}  # the ten points of a one, twice each


# -- finding them ----------------------------------------------------------------------------------------


def test_a_task_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    for name in ("Mine", "made"):
        task = find(f"{file}:{name}")
        assert task.epochs == 1 and task.metric_name == "accuracy" and names_a_task(f"{file}:{name}")
    assert not names_a_task(f"{file}:number") and not names_a_task("demo") and names_a_task("digits")
    assert find(TASK) is TASK
    assert as_task(find(f"{file}:made"), "x").measure(nn.Linear(2, 2)) >= 0


@pytest.mark.parametrize(
    ("source", "options", "error", "sentence"),
    [
        ("digit", {}, UnknownName, r"no task named 'digit'; did you mean 'digits'\? \(secateur tasks"),
        (
            "digits",
            {"wide": 3},
            RecipeError,
            "task 'digits' has no knob 'wide'; its knobs: batch, epochs, images, width",
        ),
        ("digits", {"width": "x"}, RecipeError, "task 'digits': width is a number like 8, not 'x'"),
        ("digits", {"width": 0}, RecipeError, "task 'digits': width is 0, and must be above 0"),
        ("digits", {"images": 20}, DataError, "18 training examples are less than one batch of 50"),
        ("char-lm", {"characters": 30}, DataError, "30 characters are less than one window of 64"),
        ("text-encoder", {"length": 5000}, DataError, "no address has a passage of 5000 words"),
        ("nowhere.py:task", {}, ModelError, "there is no file nowhere.py"),
        (TASK, {"width": 3}, RecipeError, r"a task that you wrote has no options \['width'\]"),
        (nn.Linear(2, 2), {}, ModelError, "'Linear' is not a task: it needs model"),
        (find, {}, ModelError, r"'find' is a function, and a task is an object.*as in TASK = find\(\)"),
    ],
)
def test_sentences(source: Any, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        find(source, **options)


def test_names_that_a_file_lacks(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    with pytest.raises(ModelError, match="has nothing named 'Yours'"):
        find(f"{file}:Yours")
    with pytest.raises(ModelError, match="'number' is not a task"):
        find(f"{file}:number")


def test_a_task_without_validation_data() -> None:
    with pytest.raises(DataError, match="task 'task' has no validation batch"):
        Task(lambda seed: nn.Linear(1, 1), lambda *_: []).example_input()


# -- Fashion-MNIST ---------------------------------------------------------------------------------------


def test_fashion_mnist_is_read(fashion: Path) -> None:
    images, labels = fashion_mnist("train")
    assert images.shape == (300, 1, 28, 28) and labels.dtype == torch.long
    assert float(images.min()) == -1 and float(images.max()) == 1
    for file in fashion.glob("*.gz"):  # unpacked files do as well
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert torch.equal(images, fashion_mnist("train")[0])


def test_fashion_mnist_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    task = find("fashion-resnet")  # made without data
    with pytest.raises(
        DataError, match="install the package dataset-fashion-mnist .* set SECATEUR_FASHION_MNIST to it"
    ):
        task.batches("train", 0, 0)


def test_fashion_mnist_that_is_damaged(fashion: Path) -> None:
    file = fashion / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        fashion_mnist("train")
    file.write_bytes(gzip.compress(bytes(16) + bytes(784)))
    with pytest.raises(DataError, match="are damaged: train has not as many images as labels"):
        fashion_mnist("train")


# -- checkpoints -----------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=PLAIN)
def test_what_is_written_is_read(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = Checkpoint(tmp_path_factory.mktemp("c") / "a.safetensors")
    tensor = torch.arange(3, dtype=torch.bfloat16)
    file.write({"value": value, "of": {0: [tensor, {"x": tensor}]}, "none": torch.zeros(0, 2)})
    found = file.read()
    assert found["value"] == value and repr(found["value"]) == repr(value)
    assert torch.equal(found["of"][0][0], tensor) and found["of"][0][1]["x"].dtype == torch.bfloat16
    assert found["none"].shape == (0, 2)


def test_what_a_checkpoint_cannot_hold(tmp_path: Path) -> None:
    file = Checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match=r"cannot hold optimizer/f, a builtin_function_or_method"):
        file.write({"optimizer": {"f": print}})
    with pytest.raises(OutputError, match="whose keys are like 1.5"):
        file.write({"x": {1.5: 2}})
    assert not file.exists()
