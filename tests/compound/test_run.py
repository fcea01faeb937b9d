"""A compound is its steps, one after the other: the same as by hand, zeros held, and back from disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur
from secateur.compound import Compound
from secateur.coupled import example_inputs
from secateur.errors import ModelError, SecateurError
from secateur.layers import find_layers
from secateur.models import next_token_loss
from tests import tiny
from tests.runtime.models import images, vit


def tokens() -> list[Tensor]:
    return [torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(k)) for k in range(4)]


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


STEPS: list[dict[str, Any]] = [
    {"prune": {"method": "llm-pruner", "target": "params 15%", "multiple": 1}},
    {"decompose": {"method": "low-rank", "target": "params 10%"}},
    {"prune": {"method": "sparsegpt", "sparsity": 0.5}},
    {"quantize": "int8"},
]


def test_it_is_the_same_as_by_hand(tmp_path: Path) -> None:
    model = tiny.build("llama")
    made = secateur.prune(copy.deepcopy(model), Compound.of(STEPS), data=tokens())

    hand = copy.deepcopy(model)
    plan = secateur.prune(
        hand, "llm-pruner", target="params 15%", multiple=1, data=tokens(), loss=next_token_loss,
        example=example_inputs(None, hand),
    )  # fmt: skip
    hand = plan.shrink()
    secateur.decompose(hand, "low-rank", target="params 10%", data=tokens())
    pruned = secateur.prune(hand, "sparsegpt", sparsity=0.5, data=tokens())
    secateur.prune(hand, secateur.Recipe.of("gptq", sparsity=0.0).quantized("int8"), data=tokens(), masks=pruned.masks)

    assert same(made.model, hand)
    assert {n: int(m.sum()) for n, m in made.masks.items()} == {n: int(m.sum()) for n, m in pruned.masks.items()}
    layers = {x.name: x for x in find_layers(made.model)[0]}
    for name, mask in made.masks.items():
        assert not bool((layers[name].weight() != 0)[~mask].any())
    counts = [made.run["before"], *(s["after"] for s in made.run["steps"])]
    assert counts[0]["params"] > counts[1]["params"] > counts[2]["params"] == counts[3]["params"]
    assert counts[3]["nonzero"] < counts[2]["nonzero"] and counts[4]["bytes"] < counts[3]["bytes"]

    made.save(tmp_path / "out")
    again = secateur.load(tmp_path / "out")
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made.model(ids).logits)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [s["title"] for s in run["steps"]] == [str(s) for s in made.compound.steps]
    assert run["digest"] == Compound.load(tmp_path / "out" / "recipe.yaml").digest
    size = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values())
    assert size == counts[4]["bytes"] < counts[3]["bytes"]


def test_a_stock_model_stays_one(tmp_path: Path) -> None:
    model = tiny.build("llama")
    made = secateur.prune(model, Compound.of([{"prune": {"method": "wanda", "sparsity": 0.5}}, {"quantize": "int8"}]), data=tokens())  # fmt: skip  # noqa: E501
    made.save(tmp_path / "out")
    size = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values())
    assert size == made.run["after"]["bytes"]
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "surgery.json").exists()
    again = secateur.load(tmp_path / "out")
    ids = tokens()[0]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, made.model(ids).logits)
    assert secateur.Masks.load(tmp_path / "out" / "masks.safetensors").sparsity == pytest.approx(0.5, abs=0.01)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator)) for _ in range(3)]  # fmt: skip  # noqa: E501


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_units_after_weights_keep_their_zeros(tmp_path: Path) -> None:
    """The masks are cut where the units are."""
    steps = [
        {"prune": {"method": "magnitude", "sparsity": 0.6}},
        {"prune": {"method": "l1-norm", "target": "params 30%", "recovery": "none", "multiple": 1}},
        {"recover": {"method": "finetune", "epochs": 2}},
        {"quantize": {"as": "int8", "method": "round"}},
    ]
    model = net()
    first = secateur.prune(net(), "magnitude", sparsity=0.6)
    made = secateur.prune(model, Compound.of(steps), data=batches(), loss=loss, example=batches()[0][0])
    layers = {x.name: x for x in find_layers(made.model)[0]}
    assert set(made.masks) == set(first.masks) == set(layers)
    smaller = 0
    for name, mask in made.masks.items():
        weight = layers[name].weight()
        assert mask.shape == weight.shape and not bool((weight != 0)[~mask].any())
        smaller += mask.numel() < first.masks[name].numel()
    assert smaller and 0.4 < made.sparsity < 0.8
    assert made.run["curves"] and made.run["steps"][2]["after"]["nonzero"] <= made.run["steps"][1]["after"]["nonzero"]
    made.save(tmp_path / "out")
    again = secateur.load(tmp_path / "out", net())
    x = batches()[0][0]
    assert torch.equal(again(x), made.model(x))


def test_zeros_stay_through_a_second_pruning_and_a_sweep() -> None:
    """SparseGPT takes more of what wanda left, and brings nothing back, though it moves what stays."""
    steps = [{"prune": {"method": "wanda", "sparsity": 0.3}}, {"prune": {"method": "sparsegpt", "sparsity": 0.6}}]
    model = tiny.build("llama")
    made = secateur.prune(copy.deepcopy(model), Compound.of(steps), data=tokens())
    first = secateur.prune(copy.deepcopy(model), "wanda", sparsity=0.3, data=tokens())
    layers = {x.name: x for x in find_layers(made.model)[0]}
    for name, mask in first.masks.items():
        assert int(made.masks[name].sum()) == round(0.4 * mask.numel())
        assert not bool((layers[name].weight() != 0)[~mask].any()) and not bool((made.masks[name] & ~mask).any())


def test_sparse_terms_of_a_decomposition_hold() -> None:
    steps = [
        {"decompose": {"method": "low-rank+sparse", "sparsity": 0.4, "shares": [0.25, 0.5], "fit": 0}},
        {"prune": {"method": "magnitude", "sparsity": 0.7}},
    ]
    model = net()
    made = secateur.prune(model, Compound.of(steps), data=batches(), example=batches()[0][0])
    terms = [n for n in made.masks if n.endswith(".sparse")]
    assert terms and all(float(made.masks[n].float().mean()) < 0.5 for n in terms)


def test_a_language_model_is_trained_on_its_integers_and_stays_a_stock_one(tmp_path: Path) -> None:
    steps = [
        {"prune": {"method": "wanda", "sparsity": 0.5}},
        {"quantize": "int4:16"},
        {"recover": {"method": "qat", "epochs": 4, "rate": 1.0, "activations": 8}},
    ]
    ids = torch.cat(tokens())

    def loss_of(model: nn.Module) -> float:
        with torch.no_grad():
            return float(next_token_loss(model, ids))

    model = tiny.build("llama")
    plain = secateur.prune(copy.deepcopy(model), Compound.of(steps[:2]), data=tokens())
    made = secateur.prune(copy.deepcopy(model), Compound.of(steps), data=tokens())
    assert loss_of(made.model) < loss_of(plain.model) - 0.01
    assert not any(m._forward_pre_hooks for m in made.model.modules())
    layers = {x.name: x for x in find_layers(made.model)[0]}
    for name, mask in made.masks.items():
        weight, found = layers[name].weight(), made.grids[name]
        assert torch.equal(found.round(weight), weight) and not bool(weight[~mask].any())
        assert torch.equal(found.scale, plain.grids[name].scale)  # type: ignore[union-attr]
    made.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = config["config_groups"]["group_0"]["weights"]
    assert (told["num_bits"], told["group_size"], told["symmetric"]) == (4, 16, True)
    with torch.no_grad():
        assert torch.equal(secateur.load(tmp_path / "out")(ids).logits, made.model(ids).logits)


@pytest.mark.parametrize("how", ["int4:16", "shared:3"])
def test_the_smallest_form_of_a_compound(how: str, tmp_path: Path) -> None:
    """Bytes are as told, by the plan too, and what is loaded is what was made."""
    compound = Compound.of([{"prune": {"method": "wanda", "sparsity": 0.5}}, {"quantize": how}])
    told = secateur.plan(tiny.build("llama"), compound, data=tokens(), storage="smallest")
    made = secateur.prune(tiny.build("llama"), compound, data=tokens(), storage="smallest")
    made.save(tmp_path / "out")
    files = list((tmp_path / "out").glob("stored-*.safetensors"))
    size = sum(x.nbytes for f in files for x in load_file(f).values())
    assert size == made.run["after"]["bytes"] < made.run["steps"][0]["after"]["bytes"] < made.run["before"]["bytes"]
    if how.startswith("int"):
        assert told.steps[-1]["after"]["bytes"] == size
        stock = secateur.prune(tiny.build("llama"), compound, data=tokens())
        assert stock.run["after"]["bytes"] > size
    assert not (tmp_path / "out" / "masks.safetensors").exists()
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.equal(secateur.load(tmp_path / "out")(ids).logits, made.model(ids).logits)


def test_shared_values_are_trained_as_a_step(tmp_path: Path) -> None:
    steps: list[Any] = [HALF, {"quantize": "shared:3"}, {"recover": {"method": "codebooks", "epochs": 2}}]
    plain = secateur.prune(net(), Compound.of(steps[:2]), data=batches(), loss=loss, example=batches()[0][0])
    made = secateur.prune(net(), Compound.of(steps), data=batches(), loss=loss, example=batches()[0][0])
    assert made.run["after"] == plain.run["after"] and made.run["steps"][1]["title"] == "quantize shared:3"
    old, new = plain.model.state_dict(), made.model.state_dict()
    for name in made.masks:
        a, b = old[f"{name}.weight"], new[f"{name}.weight"]
        assert not torch.equal(a, b) and torch.equal(a == 0, b == 0)
        assert all(len(b[a == value].unique()) == 1 for value in a.unique())
    made.save(tmp_path / "out")
    x = batches()[0][0]
    assert torch.equal(secateur.load(tmp_path / "out", net())(x), made.model(x))


@pytest.mark.parametrize(
    "steps, storage, said",
    [
        ([{"quantize": "shared:3"}], "stock", "no stock tool reads shared values"),
        ([{"decompose": {"method": "svd", "sparsity": 0.2}}, {"quantize": "shared:3"}], None, "no smallest form"),
        ([{"quantize": "int8"}], "tiny", "storage is stock or smallest, not 'tiny'"),
    ],
)
def test_storages_that_cannot_be(steps: list[Any], storage: str | None, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        secateur.prune(net(), Compound.of(steps), data=batches(), example=batches()[0][0], storage=storage)


def test_a_plan_counts_grids_that_are_not_symmetric() -> None:
    knobs = {"solver": {"symmetric": False}}
    for steps in (
        [{"quantize": {"as": "int4:16", "knobs": knobs}}],
        [{"prune": {"method": "sparsegpt", "sparsity": 0.5, "quantize": "int4:16", "knobs": knobs}}],
    ):
        told = secateur.plan(tiny.build("llama"), Compound.of(steps))
        made = secateur.prune(tiny.build("llama"), Compound.of(steps), data=tokens())
        assert told.steps[-1]["after"]["bytes"] == made.run["after"]["bytes"]


def test_distilled(tmp_path: Path) -> None:
    """The dense model, as it was before the first step, teaches."""
    model = tiny.build("llama")
    steps = [{"prune": {"method": "magnitude", "sparsity": 0.5}}, {"recover": {"method": "distill", "epochs": 8, "rate": 2.0, "logits": 1.0}}]  # fmt: skip  # noqa: E501
    ids = torch.cat(tokens())
    with torch.no_grad():
        target = model(ids).logits.softmax(-1)

    def away(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(ids).logits.log_softmax(-1).exp() - target).abs().mean())

    pruned = secateur.prune(copy.deepcopy(model), Compound.of(steps[:1]))
    made = secateur.prune(copy.deepcopy(model), Compound.of(steps), data=tokens())
    assert away(made.model) < 0.8 * away(pruned.model)
    assert made.sparsity == pytest.approx(0.5, abs=0.01)


def test_tokens_leave_a_smaller_model(tmp_path: Path) -> None:
    """Heads and neurons go, weights become integers, and then tokens leave at run time."""
    steps = [
        {"prune": {"method": "l1-norm", "target": "params 20%"}},
        {"quantize": {"as": "int8", "method": "round"}},
        {"runtime": {"method": "tome", "target": "flops 30%"}},
    ]
    made = secateur.prune(vit(), Compound.of(steps), example=images())
    flops = [made.run["before"]["flops"], *(s["after"]["flops"] for s in made.run["steps"])]
    assert flops[3] <= 0.7 * flops[2] and flops[1] < flops[0]
    made.save(tmp_path / "out")
    again = secateur.load(tmp_path / "out", vit())
    with torch.no_grad():
        torch.testing.assert_close(again(images()), made.model(images()))
    assert any(n.endswith(".weight_packed") for n in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_plan_touches_nothing_and_counts_what_comes() -> None:
    model = tiny.build("llama")
    before = copy.deepcopy(model.state_dict())
    plan = secateur.plan(model, Compound.of(STEPS))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    made = secateur.prune(copy.deepcopy(model), Compound.of(STEPS), data=tokens())
    for told, done in zip(plan.steps, made.run["steps"], strict=True):
        for count in ("params", "nonzero", "bytes"):
            assert told["after"][count] == pytest.approx(done["after"][count], rel=0.03), (told["title"], count)
    text = str(plan)
    assert "ranks are shown for svd, until data are given" in text and "what goes is shown for magnitude" in text
    assert [s["needs"] for s in plan.steps] == [["data", "example", "loss"], ["data"], ["data"], ["data"]]
    real = secateur.plan(model, Compound.of(STEPS[:1]), data=tokens())
    assert real.steps[0]["after"] == made.run["steps"][0]["after"] and real.steps[0]["stands"] == ""


HALF: dict[str, Any] = {"prune": {"method": "magnitude", "sparsity": 0.5}}


@pytest.mark.parametrize(
    "steps, given, said",
    [
        ([{"prune": "wanda"}], {}, r"step 1 \(prune wanda\) needs data: pass data="),
        ([{"prune": {"method": "l1-norm", "sparsity": 0.2}}], {}, "needs an example: pass example="),
        ([{"recover": "finetune"}], {"data": batches()}, "needs a loss: pass loss="),
        ([{"prune": {"method": "magnitude", "granularity": "2:4"}}], {"sparsity": 0.5}, "'sparsity' belongs to one"),
        ([HALF, {"prune": {"method": "obc", "sparsity": 0.6}}], {"data": batches()}, "knows of no earlier ones"),
        ([HALF, {"prune": {"method": "magnitude", "granularity": "row", "sparsity": 0.4}}], {}, "earlier steps left"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before(steps: Any, given: Any, said: str) -> None:
    model = net()
    with pytest.raises(SecateurError, match=said):
        secateur.prune(model, Compound.of(steps), **given)


def test_what_stands_beside_a_compound_is_refused() -> None:
    model, compound = net(), Compound.of([HALF])
    for given in ({"target": "params 30%"}, {"masks": {}}, {"exported": True}, {"sparsity": 0.5}):
        with pytest.raises(SecateurError, match=f"'{next(iter(given))}' belongs to one of them"):
            secateur.prune(model, compound, **given)  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="'target' belongs to one of them"):
        secateur.plan(model, compound, target="params 30%")
    with pytest.raises(SecateurError, match="no knob 'masks'"):
        secateur.prune(model, "svd", sparsity=0.5, masks={})


@pytest.mark.parametrize("middle", [[], [{"decompose": {"method": "svd", "sparsity": 0.2}}]], ids=["", "factors"])
def test_cut_twice(middle: list[Any], tmp_path: Path) -> None:
    """What a model went through is repeated on a fresh one, in its order."""
    cuts = [{"prune": {"method": "l1-norm", "target": f"params {n}%", "multiple": 1}} for n in (20, 15)]
    made = secateur.prune(net(), Compound.of([cuts[0], *middle, cuts[1]]), example=batches()[0][0])
    counts = [s["after"]["params"] for s in made.run["steps"]]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    made.save(tmp_path / "out")
    x = batches()[0][0]
    assert torch.equal(secateur.load(tmp_path / "out", net())(x), made.model(x))
    other = net()
    other[6] = nn.Linear(16, 31)
    shapes = [p.shape for p in other.parameters()]
    with pytest.raises(ModelError, match="expects"):
        secateur.load(tmp_path / "out", other)
    assert [p.shape for p in other.parameters()] == shapes


def test_blocks_and_then_width(tmp_path: Path) -> None:
    steps = [{"prune": {"method": "shortgpt", "target": "params 20%"}}, {"prune": {"method": "llm-pruner", "target": "params 10%", "multiple": 1}}]  # fmt: skip  # noqa: E501
    model = tiny.build("llama")
    made = secateur.prune(model, Compound.of(steps), data=tokens())
    made.save(tmp_path / "out")
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.equal(secateur.load(tmp_path / "out")(ids).logits, made.model(ids).logits)


def test_a_model_that_is_saved_again_has_its_weights_as_they_are(tmp_path: Path) -> None:
    """The grid is of what the compound made: what moves afterwards is not rounded."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    made = secateur.prune(net, Compound.of([{"quantize": {"as": "int8", "method": "round"}}]))
    made.save(tmp_path / "a")
    with torch.no_grad():
        made.model[0].weight.add_(1e-3)
    secateur.save(made.model, tmp_path / "b")
    again = secateur.load(tmp_path / "b", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    assert same(made.model, again)
