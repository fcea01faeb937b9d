"""Resident pruning: exact, repeatable, and harmless to everything that is not pruned."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import Masks, Pruned, Recipe, prune, registry
from secateur.allocation import LayerFacts
from secateur.data import windows
from secateur.errors import DataError, NumericalError, OutputError, RecipeError
from secateur.granularity import parse
from secateur.layers import find_layers
from secateur.select import keep_count
from secateur.solve import allocate


class Cnn(nn.Module):
    """One layer of every kind that holds a convolution, and a normalization that must not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 16, 3, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(self.up(F.relu(self.depth(x))))
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def llama(layers: int = 2) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def ids(count: int = 6, length: int = 16) -> Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(1))


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(5, 8, generator=g), torch.randint(0, 4, (5,), generator=g)) for _ in range(count)]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def check_exact(pruned: Pruned, before: dict[str, Tensor], moves: bool = False) -> None:
    """Masks, records and zeros agree; what is kept has not moved; nothing else has changed."""
    layers = {x.name: x for x in find_layers(pruned.model, only=("*",))[0]}
    touched = set()
    for record in pruned.records:
        layer, mask = layers[record.name], pruned.masks[record.name]
        weight = layer.weight()
        assert not weight[~mask].any(), record.name
        assert int(mask.sum()) == record.kept and mask.numel() == record.parameters == layer.numel
        assert record.shape == layer.shape
        key = next(k for k in before if k in (record.name, f"{record.name}.weight"))
        touched.add(key)
        if not moves:
            assert torch.equal(weight[mask], layer.to_oi(before[key])[mask]), record.name
    after = pruned.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before.keys() - touched)
    assert set(pruned.masks) == {r.name for r in pruned.records}
    total = sum(r.parameters for r in pruned.records)
    assert pruned.sparsity == pytest.approx(1 - sum(r.kept for r in pruned.records) / total)
    assert pruned.masks.sparsity == pytest.approx(pruned.sparsity)


# -- exact counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["element", "row", "block(2,1)"])
@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_cnn_has_the_exact_sparsity_in_every_pool(method: str, granularity: str, sparsity: float) -> None:
    net = Cnn()
    skip = ["head"] if "block" in granularity else []
    before = state(net)
    pruned = prune(net, method, sparsity=sparsity, granularity=granularity, skip=skip)
    check_exact(pruned, before)
    assert {r.name for r in pruned.records} == {"conv", "depth", "up", "head"} - set(skip)
    pattern = parse(granularity)
    for record in pruned.records:
        _, units, _ = pattern.pool_shape(*record.shape)
        in_pool = pattern.split(pruned.masks[record.name])[..., 0].sum(1)
        assert (in_pool == keep_count(1 - sparsity, units)).all()


def test_n_m_on_a_cnn_names_the_layer_that_does_not_divide() -> None:
    net = Cnn()
    before = state(net)
    with pytest.raises(RecipeError, match=r"multiple of 4; conv has 27 \(skip it with --skip conv\)"):
        prune(net, "magnitude", granularity="2:4")
    assert same(state(net), before)
    only = ["depth"]  # 8 / 4 groups * 9 positions = 18
    with pytest.raises(RecipeError, match="depth has 18"):
        prune(net, "magnitude", granularity="2:4", only=only)
    pruned = prune(net, "magnitude", granularity="2:4", only=["up", "head"])
    check_exact(pruned, before)
    for name in ("up", "head"):
        assert (pruned.masks[name].reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "wanda-lsq", "admm", "obc", "dsnot"])
def test_a_cnn_by_its_inputs(method: str) -> None:
    net = Cnn()
    before = state(net)
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    pruned = prune(net, method, data=data, sparsity=0.5, skip=["up"])
    check_exact(pruned, before, moves=method not in ("wanda", "ria", "dsnot"))
    assert all(r.kept == parse(pruned.recipe.granularity).kept(r.shape, 0.5) for r in pruned.records)


def test_a_transposed_convolution_has_no_input_statistics() -> None:
    net = Cnn()
    before = state(net)
    with pytest.raises(RecipeError, match="up: input statistics of a transposed convolution"):
        prune(net, "wanda", data=[torch.randn(2, 3, 8, 8)])
    assert same(state(net), before)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "owl-wanda", "lamp"])
def test_a_language_model(make: Callable[[], Any], method: str) -> None:
    model = make().eval()
    before = state(model)
    pruned = prune(model, method, sparsity=0.6, data=ids())
    check_exact(pruned, before, moves=method == "sparsegpt")
    assert len(pruned.records) == (14 if make is llama else 8)
    assert pruned.sparsity == pytest.approx(0.6, abs=0.02)
    assert torch.isfinite(model(input_ids=ids()).logits).all()


def test_embeddings_on_request() -> None:
    model = llama()
    before = state(model)
    pruned = prune(model, "magnitude", only=["*.embed_tokens", "lm_head"], granularity="row")
    check_exact(pruned, before)
    table = dict(pruned.masks)["model.embed_tokens"]
    assert table.shape == (32, 64) and (table.sum(1) == 32).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_global_pruning_may_empty_a_layer_and_is_counted(sparsity: float) -> None:
    net = mlp()
    with torch.no_grad():
        net[0].weight.mul_(1e-3)
    before = state(net)
    pruned = prune(net, "global-magnitude", sparsity=sparsity)
    check_exact(pruned, before)
    everything = torch.cat([before[f"{k}.weight"].abs().reshape(-1) for k in (0, 2, 4)])
    kept = round((1 - sparsity) * everything.numel())
    assert sum(r.kept for r in pruned.records) == kept
    edge = everything.sort(descending=True).values[kept - 1]
    assert all(torch.equal(pruned.masks[str(k)], before[f"{k}.weight"].abs() >= edge) for k in (0, 2, 4))
    assert pruned.records[0].kept == 0


# -- repeatable ---------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_layers_differ() -> None:
    def masks(seed: int) -> Masks:
        torch.manual_seed(seed + 7)  # the global generator does not matter
        return prune(mlp(), "random", seed=seed).masks

    a, b, c = masks(3), masks(3), masks(4)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a)
    square = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "random").masks
    assert not torch.equal(square["0"], square["1"])
    for seed in (-1, 2**40):
        masks(seed)


def test_pruning_draws_nothing_from_the_global_generator() -> None:
    net = mlp()
    before = torch.get_rng_state()
    prune(net, "random")
    prune(net, "obd", data=batches(), loss=cross_entropy)
    assert torch.equal(torch.get_rng_state(), before)


# -- rounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(criterion="magnitude", allocation="global"),
        Recipe(criterion="random", allocation="global"),
        Recipe(criterion="saliency", allocation="global"),
        Recipe(criterion="gradient", allocation="global"),  # does not look at the weight: zeros may score high
        Recipe(criterion="wanda", granularity="row"),
        Recipe(criterion="magnitude", allocation="lamp"),
        Recipe(criterion="magnitude", allocation="erk"),
        Recipe(criterion="activation-norm"),
        Recipe(criterion="gradient", granularity="block(2,2)"),
    ],
    ids=lambda r: f"{r.criterion}-{r.allocation}-{r.granularity}",
)
def test_a_schedule_gives_nested_masks_and_the_exact_end(recipe: Recipe) -> None:
    net = mlp()
    earlier: Masks | None = None
    data, total = batches(), sum(p.numel() for p in net.parameters() if p.dim() == 2)
    for steps in (1, 2, 3, 4):  # the first `steps` of four rounds: each prefix ends at its own sparsity
        part = copy.deepcopy(net)
        sparsity = 0.8 * (1 - (1 - steps / 4) ** 3)
        pruned = _prefix(part, recipe, steps, data)
        if earlier is not None:
            assert all(not (pruned.masks[n] & ~earlier[n]).any() for n in earlier)
        for record in pruned.records:
            kept = pruned.masks[record.name]
            weight = dict(part.named_parameters())[f"{record.name}.weight"]
            assert int((weight != 0).sum()) == int(kept.sum())  # no weight that is gone counts as kept
        slack = sum(parse(recipe.granularity).pool_shape(*r.shape)[0] for r in pruned.records)
        slack *= parse(recipe.granularity).pool_shape(4, 4)[2]
        assert abs(sum(r.kept for r in pruned.records) - (1 - sparsity) * total) <= slack / 2 + 1
        earlier = pruned.masks


def _prefix(net: nn.Module, recipe: Recipe, steps: int, data: Any) -> Pruned:
    """The first ``steps`` of four cubic rounds to 0.8, by stopping the schedule early."""
    shelf = registry._parts["schedule"]
    cubic = shelf["cubic"]
    shelf["cubic"] = dataclasses.replace(cubic, function=lambda t: 1 - (1 - t * steps / 4) ** 3)
    try:
        return prune(net, recipe.override(schedule="cubic", steps=steps, sparsity=0.8), data=data, loss=cross_entropy)
    finally:
        shelf["cubic"] = cubic


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["snip", "fisher", "obd", "woodfisher"])
def test_methods_with_a_loss(method: str) -> None:
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[2].weight.grad = torch.ones_like(net[2].weight)
    before = state(net)
    pruned = prune(net, method, data=batches(), loss=cross_entropy, sparsity=0.7)
    check_exact(pruned, before)
    assert pruned.sparsity == pytest.approx(0.7, abs=0.005)
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert torch.equal(net[2].weight.grad, torch.ones(16, 16)) and net[4].weight.grad is None


def test_snip_is_the_first_order_taylor_score_by_hand() -> None:
    net = mlp()
    data = batches()
    twin = copy.deepcopy(net)
    (sum(cross_entropy(twin, b) for b in data) / len(data)).backward()
    score = {str(k): (twin[k].weight * twin[k].weight.grad).abs().detach() for k in (0, 2, 4)}
    everything = torch.cat([s.reshape(-1) for s in score.values()])
    kept = round(0.25 * everything.numel())
    edge = everything.sort(descending=True).values[kept - 1]
    pruned = prune(net, "snip", data=data, loss=cross_entropy, sparsity=0.75)
    assert sum(r.kept for r in pruned.records) == kept
    for name, s in score.items():
        differ = pruned.masks[name] != (s >= edge)
        assert int(differ.sum()) == 0 or float(((s[differ] - edge).abs() / edge).max()) < 1e-4  # rounding at the edge


def test_fisher_ranks_by_the_squared_gradient_by_hand() -> None:
    net = mlp()
    data = batches()
    twin = copy.deepcopy(net)
    score = {str(k): torch.zeros_like(twin[k].weight) for k in (0, 2, 4)}
    for b in data:
        twin.zero_grad()
        cross_entropy(twin, b).backward()
        for name in score:
            score[name] += twin[int(name)].weight.grad ** 2 / len(data) / 2
    score = {n: s * twin[int(n)].weight.detach() ** 2 for n, s in score.items()}
    pruned = prune(net, "fisher", data=data, loss=cross_entropy, sparsity=0.5, allocation="uniform")
    for name, s in score.items():
        assert float(s[pruned.masks[name]].min()) >= float(s[~pruned.masks[name]].max()) * (1 - 1e-5)


# -- what is left alone -------------------------------------------------------------------------------------------


def test_modes_of_every_module_are_put_back() -> None:
    net = Cnn()
    net.train()
    net.norm.eval()  # a frozen normalization
    before = state(net)
    prune(net, "wanda", data=[torch.randn(4, 3, 8, 8)], skip=["up"])
    assert net.training and net.drop.training and not net.norm.training
    assert torch.equal(net.norm.running_mean, before["norm.running_mean"])
    assert int(net.norm.num_batches_tracked) == 0
    with pytest.raises(ZeroDivisionError):
        prune(net, "snip", data=[torch.randn(4, 3, 8, 8)], loss=lambda m, b: 1 / 0)
    assert net.training and not net.norm.training and all(p.requires_grad for p in net.parameters())


def test_hooks_and_forwards_are_gone() -> None:
    model = llama()
    prune(model, "wanda", data=ids())
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name
        assert "forward" not in module.__dict__, name
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_deepcopy_of_the_result() -> None:
    pruned = prune(mlp(), "magnitude")
    twin = copy.deepcopy(pruned)
    assert twin.recipe == pruned.recipe and same(state(twin.model), state(pruned.model))
    assert twin.model is not pruned.model


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method,data", [("magnitude", None), ("wanda", True)])
def test_bad_weights_are_named_and_nothing_changes(bad: float, method: str, data: object) -> None:
    net = mlp()
    with torch.no_grad():
        net[4].weight[1, 2] = bad  # the last: the others come first
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(NumericalError, match="^4 has NaN or infinite weights"):
        prune(net, method, data=[torch.randn(3, 8)] if data else None)
    assert all(
        torch.equal(a, b.detach()) or bool(torch.isnan(a).any()) for a, b in zip(before, net.parameters(), strict=True)
    )
    assert all(bool((p != 0).all()) for p in net.parameters())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip"])
def test_bad_inputs_are_named_and_nothing_changes(method: str) -> None:
    net = mlp()
    before = state(net)
    x, y = batches(1)[0]
    x[2, 3] = torch.inf
    with pytest.raises(NumericalError, match="of 0 is NaN or infinite on the calibration data"):
        prune(net, method, data=[(x, y)], loss=cross_entropy)
    assert same(state(net), before)


@pytest.mark.parametrize("method", ["wanda", "snip"])
def test_no_data_at_all_is_refused(method: str) -> None:
    with pytest.raises(DataError, match="calibration data is empty"):
        prune(mlp(), method, data=[], loss=cross_entropy)
    with pytest.raises(DataError, match="calibration data is empty"):
        prune(llama(), "wanda", data=[])
    with pytest.raises(RecipeError, match="measured on data"):
        prune(mlp(), method, loss=cross_entropy)


def test_other_refusals() -> None:
    with pytest.raises(RecipeError, match="pass loss="):
        prune(mlp(), "snip", data=batches())
    with pytest.raises(RecipeError, match="text data needs a language model"):
        prune(mlp(), "wanda", data="text:calibration")
    with pytest.raises(DataError, match="has no tokenizer"):
        prune(llama(), "wanda", data="text:calibration")
    with pytest.raises(RecipeError, match="recovery 'blockwise' works on repeated blocks"):
        prune(mlp(), "ebft", data=batches())
    with pytest.raises(RecipeError, match="no layer is named 'nothing'"):
        prune(mlp(), "magnitude", only=["nothing"])
    with pytest.raises(ValueError, match="did you mean 'wanda'"):
        prune(mlp(), "wandda")


# -- arguments ----------------------------------------------------------------------------------------------------


def test_fields_override_those_of_a_recipe() -> None:
    mine = Recipe.of("global-magnitude", sparsity=0.75, knobs={"criterion": {"p": 2.0}})
    assert prune(mlp(), mine).recipe == mine
    assert prune(mlp(), mine, seed=3).recipe == mine.override(seed=3)
    assert prune(mlp(), Recipe(sparsity=0.25), seed=3).sparsity == 0.25  # "custom" is no method's name


def test_kinds_of_batches_are_the_same_data() -> None:
    x = torch.randn(6, 8)
    kinds: list[Any] = [x, [x], [(x, None)], [x[:2], x[2:]], iter([x])]
    masks = [prune(_seeded(), "wanda", data=d).masks for d in kinds]
    assert all(torch.equal(m[n], masks[0][n]) for m in masks for n in m)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _seeded()

        def forward(self, *, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    for given in ({"x": x}, [{"x": x}]):
        named = prune(Named(), "wanda", data=given).masks
        assert all(torch.equal(named[f"net.{n}"], masks[0][n]) for n in masks[0])


def _seeded() -> nn.Sequential:
    torch.manual_seed(5)
    return mlp()


def test_windows_serve_losses_too() -> None:
    model = llama()

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = m(input_ids=batch, labels=batch).loss
        return out

    pruned = prune(model, "fisher", data=windows(ids(3)), loss=loss)
    assert pruned.sparsity == pytest.approx(0.5, abs=0.01)


# -- the result ---------------------------------------------------------------------------------------------------


def test_it_prints_as_a_table() -> None:
    text = str(prune(mlp(), "magnitude", sparsity=0.75))
    lines = text.splitlines()
    assert lines[0] == "magnitude: 3 layers pruned, 3 parameters left alone"
    assert lines[1].split() == ["before", "after"]
    assert lines[2].split()[-2:] == ["448", "112"] and lines[3].split() == ["sparsity", "0.0000", "0.7500"]


def test_a_transformers_model_is_saved_for_stock_tools(tmp_path: Path) -> None:
    model = llama().eval()
    pruned = prune(model, "wanda", data=ids(), sparsity=0.5)
    out = pruned.save(tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out.partial").exists()
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "masks.safetensors", "recipe.yaml", "run.json", "report.html"} <= names
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    zeros = Masks.of_zeros(again, list(pruned.masks))
    assert all(not (zeros[n] & ~pruned.masks[n]).any() for n in pruned.masks)
    assert Recipe.load(out / "recipe.yaml") == pruned.recipe
    assert same({**Masks.load(out / "masks.safetensors")}, {**pruned.masks})
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["digest"] == pruned.recipe.digest and len(run["layers"]) == 14
    assert run["sparsity"]["pruned_layers"] == pytest.approx(pruned.sparsity)
    assert run["data"]["sha256"] == windows(ids()).sha256
    with pytest.raises(OutputError, match="exists: choose another directory"):
        pruned.save(out)


def test_any_module_is_saved_without_pickle(tmp_path: Path) -> None:
    from safetensors.torch import load_model

    net = Cnn()
    out = prune(net, "magnitude").save(tmp_path)  # an empty directory may be there
    other = Cnn()
    load_model(other, str(out / "model.safetensors"))
    assert same(state(other), state(net))
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_no_round_gives_back_what_an_earlier_one_took() -> None:
    layers = {n: LayerFacts((size, 10), size * 10) for n, size in (("a", 4), ("b", 8), ("c", 2))}
    recipe = Recipe.of("magnitude")

    def keeps(before: dict[str, float], sparsity: float) -> dict[str, float]:
        return allocate(recipe, layers, sparsity, before)

    found = keeps({"a": 0.3, "b": 0.9, "c": 0.55}, 0.5)  # uniform asks for 0.5 of each
    assert found["a"] == 0.3 and found["c"] <= 0.55 and found["b"] <= 0.9
    assert sum(found[n] * layers[n].numel for n in layers) == pytest.approx(0.5 * 140)
    assert keeps({"a": 0.3, "b": 0.3, "c": 0.3}, 0.5) == {"a": 0.3, "b": 0.3, "c": 0.3}  # nothing left to give
    assert keeps({"a": 0.6, "b": 0.6, "c": 0.6}, 0.5) == keeps({}, 0.5)
