"""What a model is, is found by its structure and its headers; weights are not loaded where they need not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from secateur.errors import ModelError, RecipeError, SecateurError
from secateur.recommend import subject
from secateur.recommend.subject import Subject, known, look, of_module
from tests import tiny


@pytest.mark.parametrize(
    ("task", "kind"),
    [("fashion-resnet", "cnn"), ("fashion-vit", "vit"), ("text-encoder", "encoder"), ("char-lm", "decoder")],
)
def test_tasks(task: str, kind: str) -> None:
    assert known(task) == look(task)
    assert look(task).kind == kind
    assert (look(task).parameters or 0) > 10_000


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "decoder"), ("gpt2", "decoder"), ("qwen3-moe", "moe"), ("mixtral", "moe")]
)
def test_directories_are_read_by_their_headers(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(subject, "load_module", lambda *_, **__: pytest.fail("the weights were loaded"))
    found = look(str(tmp_path))
    assert found.kind == kind
    stored = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert found.parameters == sum(stored.values())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["BertModel"], "num_attention_heads": 2, "vocab_size": 9}, "encoder"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["ViTModel"], "patch_size": 4, "num_attention_heads": 2}, "vit"),
        ({"architectures": ["ResNetModel"], "num_channels": 3}, "cnn"),
        ({"architectures": ["X"], "text_config": {"num_experts": 8}}, "moe"), ({}, "other"),
    ],
)  # fmt: skip
def test_configs(config: dict[str, object], kind: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert look(f"hf-config:{file}").kind == kind


def test_modules() -> None:
    assert of_module("x", nn.Linear(3, 3)) == Subject("x", "other", 12)
    assert of_module("x", nn.ReLU()) == Subject("x", "other", 0)
    assert of_module("x", nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 2))).kind == "cnn"


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "nets_of_mine.py"
    file.write_text("from torch import nn\ndef net():\n    return nn.Conv2d(3, 4, 3)\n")
    assert look(f"{file}:net") == Subject(f"{file}:net", "cnn", 112)


def test_the_demo_is_known_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    assert look("demo") == Subject("demo", "decoder", 134_515_008)


def test_what_the_user_says_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_look", lambda _: pytest.fail("nothing needs to be found out"))
    assert look("timm:anything", "cnn", 25) == Subject("timm:anything", "cnn", 25)
    assert look("", "moe", 7) == Subject("", "moe", 7)


def test_mistakes_say_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> Subject:
        raise ModelError("timm models need timm: pip install 'secateur[vision]'")

    for source in ("nothing-here", str(tmp_path), "./missing"):
        with pytest.raises(SecateurError, match="--kind cnn --parameters 25M"):
            look(source)
    monkeypatch.setattr(subject, "_look", fails)
    with pytest.raises(ModelError, match=r"pip install .* or say what it is: --kind cnn --parameters 25M"):
        look("timm:resnet50")
    assert look("timm:resnet50", "cnn").parameters is None
    with pytest.raises(RecipeError, match="--model"):
        look("")
    with pytest.raises(RecipeError, match="kind 'rnn'"):
        look("x", "rnn", 3)


def test_a_study_names_nothing_that_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "load_module", lambda *_, **__: pytest.fail("a study's file was run"))
    assert known("mine.py:net") == Subject("mine.py:net")
    assert known("owner/model") == Subject("owner/model")
