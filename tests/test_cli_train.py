"""``secateur train``, ``tasks``, and ``prune`` of a task, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur import Masks, Recipe
from secateur.measure import count_parameters
from secateur.tasks import find
from secateur.when.healing import fresh_model
from tests.conftest import Run
from tests.tasks.conftest import _one_thread  # noqa: F401  each test on one thread

SMALL = ("--set", "task.images=200", "--set", "task.width=4", "--epochs", "1")
CHARS = ("--set", "task.characters=4000", "--set", "task.width=16", "--set", "task.depth=1", "--epochs", "1")


def test_tasks(run: Run) -> None:
    status, out, _ = run("tasks")
    assert status == 0 and "fashion-resnet" in out and "width=16" in out
    status, out, _ = run("tasks", "--json")
    assert {row["name"] for row in json.loads(out)} >= {"digits", "char-lm", "text-encoder", "fashion-vit"}
    status, out, _ = run("explain", "digits")
    assert status == 0 and "Digits that are drawn here" in out


def test_train_with_a_method(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, text, _ = run(
        "train", "digits", "-m", "gmp", "--sparsity", "0.8", "--seed", "3", *SMALL, "--set", "driver.every=1", "-o", out
    )
    assert status == 0 and "accuracy, test" in text and "0.8" in text
    assert Masks.load(out / "masks.safetensors").sparsity == pytest.approx(0.8, abs=0.01)
    recipe = Recipe.load(out / "recipe.yaml")
    assert (recipe.method, recipe.seed, recipe.knobs["driver"]["every"]) == ("gmp", 3, 1)
    record = json.loads((out / "run.json").read_text())
    assert record["task"]["options"]["width"] == 4 and record["curves"][0]["leg"] == "train"
    assert record["command"].startswith("secateur train digits")
    page = (out / "report.html").read_text()
    assert "accuracy on the test data" in page and "perplexity after pruning was not measured" not in page
    status, _, err = run("train", "digits", *SMALL, "-o", out)
    assert status == 2 and "exists: choose another directory" in err
    status, _, _ = run("train", "digits", *SMALL, "-o", out, "--force")
    assert status == 0 and not (out / "masks.safetensors").exists()  # dense


def test_prune_in_rounds_then_train_the_ticket(run: Run, tmp_path: Path) -> None:
    out, again = tmp_path / "ticket", tmp_path / "again"
    status, text, _ = run(
        "prune", "char-lm", "--method", "lth", "--sparsity", "0.5", "--rounds", "2", *CHARS, "-o", out, "--json"
    )
    record = json.loads(text)
    assert status == 0 and len(record["rounds"]) == 2 and record["when"] == "after"
    assert record["rounds"][0]["sparsity"] == pytest.approx(1 - 0.5**0.5, abs=1e-2)
    assert record["before"]["metric"]["name"] == "bits per character"
    status, text, _ = run("train", "char-lm", "--masks", out / "masks.safetensors", *CHARS, "-o", again)
    assert status == 0 and "given masks" in text
    first, second = (Masks.load(folder / "masks.safetensors") for folder in (out, again))
    assert all((first[n] == second[n]).all() for n in first)


def test_a_target_of_units_scored_on_the_validation_data(run: Run, tmp_path: Path) -> None:
    words = ("--target", "params 30%", "--multiple", "2", *SMALL, "--json", "-o")
    status, text, _ = run("train", "digits", "-m", "sfp", "--score", "valid", *words, tmp_path / "a")
    record = json.loads(text)
    assert status == 0 and (record["target"], record["score"]) == ("params 30%", "valid")
    dense = count_parameters(fresh_model(find("digits", images=200, width=4), 0))[0]
    assert 0.5 * dense < record["after"]["parameters"] <= 0.7 * dense
    page = (tmp_path / "a" / "report.html").read_text()
    assert "accuracy on the validation data" in page and "on the test data" not in page
    status, text, _ = run("prune", "digits", "-m", "l1-norm", *words, tmp_path / "b")
    record = json.loads(text)
    assert status == 0 and record["after"]["parameters"] <= 0.7 * record["before"]["parameters"]


def test_a_recipe_file_and_prunes_default(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe.of("magnitude-finetune", sparsity=0.6).dump())
    status, _, _ = run("prune", "digits", "--recipe", file, *SMALL, "-o", tmp_path / "a")
    assert status == 0 and Recipe.load(tmp_path / "a" / "recipe.yaml").sparsity == 0.6
    status, text, _ = run("prune", "digits", *SMALL, "-o", tmp_path / "b")
    assert status == 0 and text.startswith("magnitude on task digits")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("train", "digts"), "no task named 'digts'; did you mean 'digits'?"),
        (("train", "digits", "-m", "riggl"), "no method named 'riggl'; did you mean 'rigl'?"),
        (("train", "digits", "--set", "driver.every=3"), "--set driver.every=3 belongs to a method, and none is named"),
        (("train", "digits", "--sparsity", "0.5"), "sparsity belongs to a method, and none is named"),
        (("train", "digits", "--masks", "none.safetensors"), "there is no file none.safetensors"),
        (("train", "digits", "--set", "task.size=3"), "task 'digits' has no knob 'size'"),
        (("train", "digits", "-m", "gmp", "--target", "flops 50%"), "a target is for units of the whole model"),
        (("train", "digits", "-m", "gmp", "--recovery", "refit"), "heals a smaller model"),
        (("train", "digits", "-m", "wanda", "--when", "during", "--solver", "sparsegpt"), "attach() masks"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    status, out, err = run(*words, "-o", tmp_path / "out")
    assert status == 2 and sentence in err.replace("\n", " ") and not out
    assert not (tmp_path / "out").exists()


def test_force_removes_only_what_was_made_here(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    status, _, err = run("train", "digits", *SMALL, "-o", tmp_path / "mine", "--force")
    assert status == 2 and "was not written by secateur" in err and (tmp_path / "mine" / "thesis.tex").exists()


def test_interrupted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur import cli_train

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_train, "run", stop)
    status, _, err = run("train", "digits", "-o", tmp_path / "out")
    assert status == 130 and "the same command goes on where it was" in err.replace("\n", " ")
