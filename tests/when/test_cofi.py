"""Gates on units after a dense run, with the dense model as teacher; then a smaller model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import Recipe, Task, train
from secateur.errors import RecipeError
from secateur.measure import count_parameters
from secateur.recover.distill import lessons, taught
from secateur.when.course import Course
from secateur.when.healing import Healing
from secateur.when.pools import find_units
from secateur.when.train import recipe_and_moment
from tests.tasks.conftest import _one_thread  # noqa: F401
from tests.tasks.tiny import batches


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(),
        nn.Linear(32, 3),
    )  # fmt: skip


TASK = Task(network, batches, epochs=2, name="gated")
FEATURES: dict[str, Any] = {"knobs": {"recovery": {"features": 0.0}}}  # parts of a network that has no blocks shrink


def test_it_is_a_method_of_after_training() -> None:
    assert recipe_and_moment("cofi", {}, None, None)[1] == "after"
    assert recipe_and_moment("l0-units", {}, None, None)[1] == "during"
    assert recipe_and_moment("l0-units", {}, None, "after")[1] == "after"
    with pytest.raises(RecipeError, match="works while the model trains, not after"):
        recipe_and_moment("l0", {}, None, "after")
    with pytest.raises(RecipeError, match=r"secateur\.train\(task, 'cofi'"):
        secateur.prune(network(0), "cofi", example=torch.zeros(1, 1, 6, 6))


@pytest.mark.parametrize("method", ["cofi", "l0-units"])
def test_a_smaller_model_of_the_size_that_was_asked_for(method: str) -> None:
    made = train(TASK, method, sparsity=0.5, **(FEATURES if method == "cofi" else {}))
    whole, small = count_parameters(network(0))[0], count_parameters(made.model)[0]
    assert 0.3 * whole < small <= 0.5 * whole
    legs = list(dict.fromkeys(row["leg"] for row in made.run["curves"]))
    assert legs == (["dense", "gates", "recovery"] if method == "cofi" else ["train"])
    assert not any("parametrizations" in n for n in made.model.state_dict())


def test_what_gates_close_is_what_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything heals, the smaller model computes what the gated one does at its end."""
    seen: list[nn.Module] = []
    cut = Course._learned

    def spy(self: Any, name: str, model: nn.Module) -> nn.Module:
        small = cut(self, name, model)
        seen.extend([model, small])
        return small

    monkeypatch.setattr(Course, "_learned", spy)
    train(TASK, "l0-units", sparsity=0.5)
    x = next(iter(batches("test")))[0]
    gated, small = (m.eval() for m in seen)
    assert torch.allclose(gated(x), small(x), atol=1e-5)


def test_gates_say_how_much_each_family_keeps() -> None:
    model, x = network(0), torch.zeros(1, 1, 6, 6)
    recipe = Recipe.of("cofi", sparsity=0.5)
    units = find_units(model, recipe, x)
    sizes = [p.read().shape[1] for p in units.pools]

    def kept(favorite: int) -> list[int]:
        scores = [np.linspace(0.1, 0.5, n) + (0.4 if k == favorite else 0.0) for k, n in enumerate(sizes)]
        return units.counts(scores)

    for k, n in enumerate(sizes):
        counts = kept(k)
        assert counts[k] >= max(kept(j)[k] for j in range(len(sizes)) if j != k)
        assert sum(counts) < sum(sizes) and counts[k] <= n
    assert kept(0) != kept(2)
    even = find_units(model, recipe.override(allocation="uniform"), x)
    assert even.counts([np.random.default_rng(1).random(n) for n in sizes]) == [
        round(even.keeps[p.name] * n) for p, n in zip(even.pools, sizes, strict=True)
    ]


def test_no_copy_of_the_model_is_kept_to_count() -> None:
    model = nn.Sequential(nn.Linear(61, 48), nn.ReLU(), nn.Linear(48, 3))
    units = find_units(model, Recipe.of("cofi", sparsity=0.5), torch.zeros(1, 61))
    gc.collect()
    wide = [
        x
        for x in gc.get_objects()
        if type(x) in (Tensor, nn.Parameter) and x.numel() == 61 * 48 and x.device.type == "cpu"
    ]
    assert units.counts([np.arange(48.0)])[0] < 48
    assert [id(x) for x in wide] == [id(model[0].weight)]


def test_the_teacher_teaches_while_gates_are_learned() -> None:
    teacher, student = network(1).eval(), network(2)
    run = Healing(TASK, student, {}, 1.0, 0, lambda *a, **k: None, dense=lambda: teacher)  # type: ignore[arg-type,return-value]
    knobs = Recipe.of("cofi", **FEATURES).knobs_of("recovery")
    batch: tuple[Tensor, Tensor] = next(iter(batches("train")))
    value = lessons(run, **knobs)(student, batch)
    direct = taught(run, 1.0, 2.0, 0.0, 0.0, "")(student, batch)
    p, q = (m(batch[0]).div(2).log_softmax(1) for m in (student, teacher))
    wanted = 4 * (q.exp() * (q - p)).sum(1).mean()
    assert torch.allclose(value, wanted) and torch.allclose(direct, wanted)
    labels = (batch[0], (batch[1] + 1) % 3)
    assert torch.equal(lessons(run, **knobs)(student, labels), value)


class Stopped(Exception):
    """Ends a run."""


def test_a_run_that_was_stopped_while_gates_are_learned_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int) -> None:
        if what == "gates" and done == of // 2:
            raise Stopped

    given: dict[str, Any] = {"sparsity": 0.5, "epochs": 1, "every": 0.0, **FEATURES}
    with pytest.raises(Stopped):
        train(TASK, "cofi", out=tmp_path / "run", progress=stop, **given)
    resumed = train(TASK, "cofi", out=tmp_path / "run", **given).model.state_dict()
    straight = train(TASK, "cofi", **given).model.state_dict()
    assert resumed.keys() == straight.keys() and all(torch.equal(v, straight[k]) for k, v in resumed.items())
