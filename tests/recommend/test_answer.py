"""Answers: always one, every method accounted for, the same each time; and what is true beyond methods is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur import Recipe
from secateur.errors import RecipeError
from secateur.recommend import Answer, Goal, Hardware, Retraining, Situation
from secateur.recommend.evidence import Run
from secateur.recommend.page import told
from secateur.recommend.situation import DATA, KINDS, QUANTITIES, WEIGHTS
from secateur.recommend.subject import Subject
from secateur.registry import parts
from tests.recommend.rows import METHODS, study

CPU, AMPERE, EDGE = Hardware.parse("cpu avx512"), Hardware.parse("nvidia ampere"), Hardware.parse("edge")
NOTHING: list[Run] = []

situations = st.builds(
    Situation,
    kind=st.sampled_from(sorted(KINDS)),
    parameters=st.none() | st.integers(1, 10**12),
    model=st.sampled_from(["", "demo", "timm:resnet50", "net-0"]),
    hardware=st.sampled_from([Hardware.parse(t) for t in ("any", "cpu avx2", "h100", "t4", "edge", "amd")]),
    goal=st.just(Goal()) | st.builds(Goal, st.sampled_from(QUANTITIES), st.floats(0.001, 0.999), st.just(False)),
    data=st.sampled_from(DATA),
    retraining=st.sampled_from([Retraining.parse(t) for t in ("no", "2h", "any", "3 epochs")]),
    weights=st.sampled_from(WEIGHTS),
    max_drop=st.none() | st.floats(0, 0.5),
)
RUNS = [
    run
    for k, kind in enumerate(("cnn", "decoder"))
    for run in study(f"study {k}", Subject(f"net-{k}", kind, 10**6), {m: 0.01 * (i + k) for i, m in enumerate(METHODS)})
]


@given(situations, st.sampled_from([NOTHING, RUNS]))
def test_there_is_always_an_answer_and_every_method_is_accounted_for(situation: Situation, runs: list[Run]) -> None:
    answer = secateur.recommend(situation, runs=runs)
    assert sorted(e.name for e in answer.entries) == sorted(parts("method"))
    for entry in answer.entries:
        assert entry.reasons
        assert (entry.status == "dropped") == any(v.action == "drop" for v in entry.verdicts)
        assert entry.status != "ranked" or runs
        assert entry.loss.low is None or entry.loss.low <= (entry.loss.value or 0) <= (entry.loss.high or 0)
        if entry.status != "dropped":
            assert entry.effect is not None
            assert Recipe.from_dict(entry.candidate.recipe.to_dict()) == entry.candidate.recipe
    assert answer.usable or answer.advice
    assert sum(answer.dropped.values()) + len(answer.usable) == len(answer.entries)
    again = secateur.recommend(situation, runs=list(reversed(runs)))
    assert json.dumps(answer.to_dict(), allow_nan=False) == json.dumps(again.to_dict(), allow_nan=False)
    for everything in (False, True):
        text = told(answer, everything=everything)
        assert str(situation) in text
        assert not everything or all(e.name in text for e in answer.entries)
    answer.study()


def ask(*, runs: list[Run] = NOTHING, **given: object) -> Answer:
    return secateur.recommend(Situation(**given), runs=runs)  # type: ignore[arg-type]


def test_zeros_for_a_cpu_and_two_of_four_for_ampere() -> None:
    wanted = {"kind": "decoder", "data": "unlabeled", "goal": Goal.parse("latency 1.5x")}
    on_cpu = next(e for e in ask(hardware=CPU, **wanted).entries if e.name == "wanda")
    assert (on_cpu.status, on_cpu.candidate.recipe.granularity) == ("kept", "row")
    assert 0.3 < on_cpu.candidate.recipe.sparsity < 0.7
    assert (on_cpu.speed.value or 0) >= 1.5
    assert "AVX512" in on_cpu.speed.source
    on_gpu = next(e for e in ask(hardware=AMPERE, **wanted).entries if e.name == "wanda")
    assert on_gpu.candidate.recipe.granularity == "2:4"
    assert on_gpu.speed.value is None
    for nowhere in (EDGE, Hardware.parse("t4"), Hardware.parse("any")):
        assert next(e for e in ask(hardware=nowhere, **wanted).entries if e.name == "wanda").status == "dropped"


def test_a_goal_beyond_what_was_measured_is_not_promised() -> None:
    answer = ask(kind="decoder", data="unlabeled", hardware=CPU, goal=Goal.parse("latency 8x"))
    entry = next(e for e in answer.entries if e.name == "sparsegpt")
    assert entry.status == "dropped"
    assert "times as fast with 90 % zeros" in entry.reasons[0]


def test_runs_move_the_answer() -> None:
    given = {"kind": "cnn", "parameters": 10**6, "data": "unlabeled", "goal": Goal.parse("sparsity 0.5")}
    lost = dict.fromkeys(METHODS, 0.1) | {"ria": 0.001}
    runs = [r for k in range(3) for r in study(f"s{k}", Subject(f"n{k}", "cnn", 10**6), lost, targets=("0.5",))]
    before, after = ask(**given), ask(runs=runs, **given)
    assert before.first is not None
    assert before.first.name != "ria"
    assert all(e.status == "kept" for e in before.usable)
    assert after.first is not None
    assert (after.first.name, after.first.status) == ("ria", "ranked")
    assert after.studies == ("s0", "s1", "s2")
    assert "in 6 runs of 3 studies (n0, n1, n2)" in after.first.reasons[-1]
    assert not any("nothing is known" in text for text in after.advice)


def test_what_costs_less_comes_first_across_structures() -> None:
    given = {
        "kind": "cnn",
        "parameters": 10**6,
        "data": "unlabeled",
        "hardware": CPU,
        "goal": Goal.parse("sparsity 0.5"),
    }
    subject = Subject("net", "cnn", 10**6)
    zeros = study("zeros", subject, {"obc": 0.01, "magnitude": 0.02, "random": 0.03}, targets=("0.5",), noise=0)
    units = study("units", subject, {"flap": 0.20, "fpgm": 0.30, "l1-norm": 0.40}, targets=("params 50%",), noise=0)
    names = [e.name for e in ask(runs=zeros + units, **given).usable]
    assert names.index("magnitude") < names.index("flap") < names.index("l1-norm")


def test_what_is_expected_not_to_hold_comes_behind_and_is_said() -> None:
    given = {"kind": "cnn", "parameters": 10**6, "data": "unlabeled", "goal": Goal.parse("sparsity 0.5")}
    runs = study("s", Subject("net", "cnn", 10**6), dict.fromkeys(METHODS, 0.2), targets=("0.5",), noise=0)
    answer = ask(runs=runs, max_drop=0.01, **given)
    assert any("expected to hold a drop of 1 %" in text for text in answer.advice)
    assert "more is lost than is allowed" in str(answer)
    assert not any("hold a drop" in text for text in ask(runs=runs, max_drop=0.3, **given).advice)


@pytest.mark.parametrize("hardware", ["cpu avx512", "h100"])
@pytest.mark.parametrize("goal", ["memory 50%", "size 75%"])
def test_language_models_are_quantized_for_memory(hardware: str, goal: str) -> None:
    given = {"kind": "decoder", "data": "unlabeled", "hardware": Hardware.parse(hardware), "goal": Goal.parse(goal)}
    said = ask(**given).advice[0]
    assert said.startswith("do not prune: quantize. Eight bits")
    # Runs that held both to one number of bytes stand in place of what is commonly known.
    net = Subject("net", "decoder", 10**8)
    for bits, weights, begins in ((0.05, 0.6, "do not prune: quantize. Held"), (0.6, 0.1, "whether to prune or to")):
        drops = {"gptq": bits, "sparsegpt": weights, "wanda": weights + 0.1}
        runs = study("equal bytes", net, drops, targets=("bytes 60%",), noise=0)
        said = ask(runs=runs, **given).advice[0]
        assert (
            said.startswith(begins) and f"on net at bytes 60% gptq lost {100 * bits:.2g} % of the score; 2 runs" in said
        )
        assert f"the best that only prunes sparsegpt lost {100 * weights:.2g} %" in said
        # What quantizing lost says nothing of what pruning would.
        assert all(
            e.effect is None or e.effect.direct is None for e in ask(runs=runs, **given).entries if e.name == "gptq"
        )


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("do not prune: quantize", {"kind": "cnn", "data": "unlabeled", "goal": Goal.parse("size 50%")}),
        ("quantize it, which needs none", {"kind": "decoder"}),
        ("do not prune first: quantize", {"kind": "decoder", "data": "unlabeled", "hardware": CPU,
                                          "goal": Goal.parse("latency 1.5x")}),
        ("no method is known to hold that", {"kind": "decoder", "goal": Goal.parse("sparsity 0.8")}),
        ("no method fits", {"weights": "init"}),
        ("nothing is known for this", {"kind": "cnn"}),
    ],
)  # fmt: skip
def test_advice(said: str, given: dict[str, object]) -> None:
    assert any(said in text for text in ask(**given).advice)
    training = {"weights": "pretrained", "data": "training", "retraining": Retraining.parse("any")}
    if not said.startswith("nothing"):
        assert not any(said in text for text in ask(**{**given, **training}).advice)


def test_no_recipe_where_nothing_fits() -> None:
    answer = ask(kind="cnn", weights="init")
    assert answer.first is None
    with pytest.raises(RecipeError, match="no method fits"):
        answer.recipe()
    assert "train" in answer.advice[0]


def test_the_recipe_and_the_study_can_be_read_back() -> None:
    from ruamel.yaml import YAML

    answer = ask(kind="decoder", model="demo", data="unlabeled", hardware=AMPERE)
    assert answer.first is not None
    assert Recipe.load(answer.recipe()) == answer.first.candidate.recipe
    assert answer.recipe().startswith("# secateur prune demo --recipe recipe.yaml")
    made = YAML(typ="safe").load(answer.study())
    assert (made["models"], made["targets"], made["seeds"]) == (["demo"], ["2:4"], 3)
    assert made["methods"][0] == answer.first.name


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "decoder", "model": "demo", "data": "unlabeled", "hardware": AMPERE},
        {"kind": "cnn", "goal": Goal.parse("flops 50%"), "hardware": EDGE},
        {"kind": "cnn", "goal": Goal.parse("sparsity 0.9"), "data": "training", "retraining": Retraining.parse("any")},
    ],
)
def test_the_study_is_one_that_compare_reads(given: dict[str, object]) -> None:
    study = pytest.importorskip("secateur.compare.study").Study.load(ask(**given).study())
    assert study.contenders
    for contender in study.contenders:
        for target in study.targets:
            assert study.leaves_out(contender, study.subjects[0], target) is None


def test_commands_are_ready_to_run() -> None:
    import shlex

    from typer.main import get_command

    from secateur.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    trained = {"data": "training", "retraining": Retraining.parse("any"), "weights": "init"}
    for had in ({"kind": "cnn", "hardware": CPU, "data": "labels"}, {"kind": "cnn", **trained}, {"kind": "decoder"}):
        answer = ask(**had)
        for entry in answer.usable:
            words = shlex.split(answer.command(entry))
            options = {o for p in known[words[1]].params for o in p.opts}
            assert {w for w in words if w.startswith("--")} <= options, words
            assert entry.candidate.trains == (words[1] == "train")


def test_a_drop_allowed_of_a_situation_is_no_part_of_another() -> None:
    given = Situation("cnn", data="unlabeled")
    assert secateur.recommend(given, runs=RUNS).to_dict() == secateur.recommend(replace(given), runs=RUNS).to_dict()
