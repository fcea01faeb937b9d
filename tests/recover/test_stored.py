"""A stored teacher: the divergence where all is kept, never above it where not; and layers matched by what they say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor, nn

import secateur
from secateur.errors import DataError, RecipeError
from secateur.recover.distill import aligned, soft, spread, taught
from secateur.recover.stored import Stored


def drawn(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 9), st.integers(1, 12), st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 99))
def test_it_is_the_divergence_of_classes_that_are_merged(classes: int, top: int, temperature: float, seed: int) -> None:
    teacher, student = drawn(3, 4, classes, seed=seed), drawn(3, 4, classes, seed=seed + 1)
    batch = drawn(3, 5, seed=seed)
    stored = Stored(top, temperature)
    stored.add(batch, teacher)
    lesson = stored.look(batch)
    assert lesson is not None
    found = stored.loss(student, lesson)
    whole = soft(student, teacher, temperature)
    q, p = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    order = teacher.argsort(-1, descending=True)
    q, p = q.gather(-1, order), p.gather(-1, order)
    if top < classes:
        q, p = (torch.cat([x[..., :top], x[..., top:].sum(-1, keepdim=True)], -1) for x in (q, p))
    exact = temperature**2 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=1e-4)
    assert found <= whole + 1e-3
    if top >= classes - 1:
        torch.testing.assert_close(found, whole, rtol=2e-3, atol=1e-4)


def test_rows_are_known_in_any_batch(tmp_path: Path) -> None:
    x, z = drawn(6, 4, seed=0), drawn(6, 7, seed=1)
    stored = Stored(3, 2.0)
    stored.add((x, None), z)
    mixed = x[[4, 1]]
    lesson = stored.look(mixed)
    assert lesson is not None and torch.equal(lesson[0], z[[4, 1]].topk(3).values)
    assert stored.look(x[:2] + 1) is None and stored.look("text") is None
    stored.save(tmp_path / "t.safetensors")
    again = Stored.load(tmp_path / "t.safetensors")
    assert len(again) == 6 and (again.top, again.temperature) == (3, 2.0)
    there = again.look(mixed)
    assert there is not None and all(torch.equal(a, b) for a, b in zip(lesson, there, strict=True))
    (tmp_path / "bad").write_text("x")
    with pytest.raises(DataError, match="is not a stored teacher"):
        Stored.load(tmp_path / "bad")
    with pytest.raises(RecipeError, match="at least 1"):
        Stored(0, 1.0)


class Run:
    """What a recovery is given, with a teacher that counts how often it is asked."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        self.model, self.dense, self.asked, self.seed = model, teacher, 0, 0
        teacher.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.asked += 1

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    def teacher(self) -> nn.Module:
        return self.dense


def test_the_teacher_is_asked_once_for_each_batch() -> None:
    torch.manual_seed(0)
    run = Run(nn.Linear(4, 5), nn.Linear(4, 5))
    x = drawn(6, 4, seed=0)
    loss = taught(run, 1.0, 2.0, 0.0, 0.0, "", top=5)  # type: ignore[arg-type]
    first = [loss(run.model, b) for b in x.split(2)]
    again = [loss(run.model, b) for b in x.split(2)]
    assert run.asked == 3 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    live = taught(run, 1.0, 2.0, 0.0, 0.0, "")  # type: ignore[arg-type]
    torch.testing.assert_close(torch.stack(first), torch.stack([live(run.model, b) for b in x.split(2)]))
    for given_, said in (({"top": 3}, "top keeps logits alone"), ({"mapping": "far"}, "same or nearest")):
        with pytest.raises(RecipeError, match=said):
            taught(run, 1.0, 2.0, 1.0, 0.0, "", **given_)  # type: ignore[arg-type]


def test_layers_are_matched_with_the_nearest() -> None:
    """A model that lost its second block learns each layer of the teacher from the block that is nearest."""

    class Blocks(nn.Module):
        def __init__(self, blocks: list[nn.Module]) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    teacher = Blocks([nn.Linear(4, 4) for _ in range(4)])
    student = Blocks([copy.deepcopy(teacher.blocks[k]) for k in (0, 2, 3)])
    run, x = Run(student, teacher), drawn(3, 4, seed=2)
    found = taught(run, 0.0, 1.0, 2.0, 0.0, "", "nearest")(student, x)  # type: ignore[arg-type]
    theirs, own, h, g = [], [], x, x
    for block in teacher.blocks:
        theirs.append(h := block(h))
    for block in student.blocks:
        own.append(g := block(g))
    apart = torch.tensor([[((a - t).square().sum() / t.square().sum()).item() for a in own] for t in theirs])
    expected = apart[torch.arange(4), torch.tensor(aligned(apart))].mean()
    torch.testing.assert_close(found, run.loss(student, x) + 2 * expected)
    assert aligned(apart)[0] == 0 and spread(["a", "b", "c"]) == ["a", "b", "c"]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_matches_are_in_order(teachers: int, students: int, seed: int) -> None:
    apart = drawn(teachers, students, seed=seed).abs()
    found = aligned(apart)
    assert found == sorted(found) and found[-1] == int(apart[-1].argmin())
    assert len(found) == teachers and all(0 <= k < students for k in found)


def test_a_compound_learns_from_what_is_stored(tmp_path: Path) -> None:
    """With all logits kept it ends with the weights that a dense teacher gives; a file is written, and read again."""
    data = [torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    file = str(tmp_path / "teacher.safetensors")

    def made(**more: object) -> nn.Module:
        step = {"recover": {"method": "distill", "epochs": 1, "rate": 1.0, **more}}
        steps = [{"prune": {"method": "magnitude", "sparsity": 0.5}}, step]
        return secateur.prune(tiny.build("llama"), secateur.Compound.of(steps), data=data).model

    live, stored = made(), made(top=64, file=file)
    for (name, a), b in zip(live.named_parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    again = made(top=64, file=file)
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), again.parameters(), strict=True))
    data[0] = data[0] + 0
    data[0][0, 0] = (data[0][0, 0] + 1) % 64
    with pytest.raises(RecipeError, match="was made on other data"):
        made(top=64, file=file)
    with pytest.raises(RecipeError, match="needs top"):
        made(file=file)
