"""Gates and penalties in a training loop: what the model looks like meanwhile, and what is left of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur import Recipe, attach
from secateur.errors import ModelError, RecipeError

GATES = (
    "str", "dst", "pdp", "l0", "continuous-sparsification", "variational-dropout", "edge-popup", "maskllm",
)  # fmt: skip
PENALTIES = ("l1", "admm-training")
STEPS = 12


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 25, 16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(8, 4, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def one(model: nn.Module, optimizer: torch.optim.Optimizer, session: secateur.Session, k: int) -> Tensor:
    x, y = batch(k)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y) + session.penalty()
    loss.backward()
    optimizer.step()
    session.step()
    return loss.detach()


def axes(method: str) -> dict[str, Any]:
    return {"skip": ["0"]} if method == "maskllm" else {"sparsity": 0.7}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("method", [*GATES, *PENALTIES])
def test_a_plain_model_with_exact_counts_is_left(method: str, make: Callable[[nn.Module], Any]) -> None:
    model = net()
    keys, before = list(model.state_dict()), dict(model.named_parameters())
    classes = [type(m) for m in model.modules()]
    optimizer = make(model)
    with attach(model, method, optimizer=optimizer, steps=STEPS, **axes(method)) as session:
        for k in range(STEPS):
            assert torch.isfinite(one(model, optimizer, session, k))
            assert list(model.state_dict()) == keys
        promised = session.masks
    masks = session.masks
    assert all(torch.equal(promised[n], masks[n]) for n in masks)
    total = sum(m.numel() for m in masks.values())
    kept = sum(int(m.sum()) for m in masks.values())
    assert abs(kept - (0.5 if method == "maskllm" else 0.3) * total) <= len(masks)
    left = sum(int(x.weight().count_nonzero()) for x in session.layers)
    assert left == kept and session.sparsity == pytest.approx(1 - kept / total)
    if method == "maskllm":
        assert all(bool((m.reshape(-1, 4).sum(1) == 2).all()) for m in masks.values())
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    for module in model.modules():
        assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks and not module._forward_hooks
        assert not hasattr(module, "parametrizations")
    assert len(optimizer.param_groups) == 1 and set(optimizer.state) <= set(model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ModelError, match="finished"):
        session.step()
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("method", GATES)
def test_evaluation_is_what_is_left(method: str) -> None:
    """Where the gates have come to the target, taking them out changes nothing; here a layer at a time."""
    model = net()
    optimizer = adam(model)
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **axes(method))
    for k in range(STEPS):
        one(model, optimizer, session, k)
    model.eval()
    seen = {x.name: x.weight().clone() for x in session.layers}
    masks = session.finish()
    for layer in session.layers:
        mask, now, was = masks[layer.name], layer.weight(), seen[layer.name]
        assert not bool(now[~mask].any())
        if method not in ("str", "pdp"):  # whose weights shift a little with the threshold, or are soft
            open_ = mask & (was != 0)
            assert torch.allclose(now[open_], was[open_], rtol=1e-4, atol=1e-6)
        if method in ("edge-popup", "maskllm"):
            assert torch.equal(mask, was != 0)


@pytest.mark.parametrize("method", ["edge-popup", "maskllm"])
def test_weights_are_untouched_where_only_scores_are_learned(method: str) -> None:
    model = net()
    optimizer = sgd(model)
    one_step = nn.functional.cross_entropy(model(batch(9)[0]), batch(9)[1])
    one_step.backward()
    optimizer.step()  # momentum and gradients from before must not move them either
    before = {n: w.clone() for n, w in weights(model).items()}
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **axes(method))
    for k in range(STEPS):
        one(model, optimizer, session, k)
    session.finish()
    touched = {x.name: x for x in session.layers}
    for name, weight in weights(model).items():
        if name.removesuffix(".weight") in touched:
            kept = weight != 0
            assert torch.equal(weight[kept], before[name][kept])
    assert not torch.equal(model[4].bias, torch.zeros(16))


@pytest.mark.parametrize("method", [*GATES, *PENALTIES])
def test_a_resumed_run_is_the_same_run(method: str) -> None:
    model = net()
    optimizer = adam(model)
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **axes(method))
    for k in range(STEPS):
        if k == 8:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
        one(model, optimizer, session, k)
    again = net(seed=5)
    other = adam(again)
    resumed = attach(again, method, optimizer=other, steps=STEPS, **axes(method))
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    resumed.load_state_dict(kept[2])
    for k in range(8, STEPS):
        one(again, other, resumed, k)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    one_, two = session.finish(), resumed.finish()
    assert all(torch.equal(one_[n], two[n]) for n in one_)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", GATES)
def test_a_copy_and_checkpoints_of_the_dense_model(method: str) -> None:
    model = net()
    optimizer = adam(model)
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **axes(method))
    for k in range(3):
        one(model, optimizer, session, k)
    x, _ = batch(0)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(twin(x), model(x))
    dense = net(seed=3)
    dense.load_state_dict(model.state_dict())  # strict: the keys are those of the dense model
    model.load_state_dict(net(seed=4).state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(net(seed=4).state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(RuntimeError, match=r'Missing key.*"4\.parametrizations|Missing key.*"4\.weight'):
        model.load_state_dict({k: v for k, v in dense.state_dict().items() if k != "4.weight"})


@pytest.mark.parametrize("method", GATES)
def test_draws_and_thresholds_hold_for_a_step(method: str) -> None:
    model = net()
    optimizer = sgd(model)
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **axes(method))
    x, _ = batch(0)
    first = model(x)
    assert torch.equal(first, model(x))
    optimizer.zero_grad()  # nothing moves but the moment
    session.step()
    assert torch.equal(first, model(x)) == (method in ("str", "dst", "edge-popup", "continuous-sparsification"))


@pytest.mark.parametrize("method", ["dst", "l0", "pdp", "maskllm"])
def test_a_compiled_model_is_compiled_once(method: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 4))
    compiled = torch.compile(model, backend=counter)
    optimizer = adam(model)
    more = {} if method == "maskllm" else {"sparsity": 0.7}
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **more)
    for k in range(5):
        one(compiled, optimizer, session, k)
    assert counter.frame_count == 1
    x, _ = batch(0)
    assert torch.allclose(compiled(x), model(x))
    session.finish()
    assert torch.allclose(compiled(x), model(x))


@pytest.mark.parametrize("method", GATES)
def test_accumulated_clipped_and_autocast_gradients(method: str) -> None:
    model = net()
    optimizer = adam(model)
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **axes(method))
    for k in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            x, y = batch(2 * k + part)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y) + session.penalty()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        session.step()
    assert session.finish().sparsity == pytest.approx(0.5 if method == "maskllm" else 0.7, abs=0.01)


@pytest.mark.parametrize("method", ["str", "l0", "pdp", "edge-popup"])
def test_half_precision_and_experts(method: str) -> None:
    """Weights in bfloat16, stacked in one parameter: gates work in float32, the model stays what it is."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts_weight = nn.Parameter(torch.randn(3, 8, 8) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eoi->bo", x, self.experts_weight)

    torch.manual_seed(0)
    model = nn.Sequential(Experts(), nn.Linear(8, 4)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = attach(model, method, optimizer=optimizer, steps=4, sparsity=0.5, skip=["*.1"])
    assert [x.kind for x in session.layers] == ["expert", "expert", "linear"]
    for k in range(4):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(k)).to(torch.bfloat16)
        optimizer.zero_grad()
        (model(x).float().square().mean() + session.penalty()).backward()
        optimizer.step()
        session.step()
        assert model(x).dtype == torch.bfloat16
    masks = session.finish()
    assert model[0].experts_weight.dtype == torch.bfloat16
    assert abs(masks.sparsity - 0.5) < 0.01 and bool(model[0].experts_weight[1].all())


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(["str", "l0", "continuous-sparsification", "edge-popup", "pdp"]),
    st.sampled_from(["element", "row", "2:4", "1:4", "block(2,2)"]), st.sampled_from([0.25, 0.5, 0.8]),
    st.sampled_from(["uniform", "global", "erk"]), st.integers(0, 5),
)  # fmt: skip
def test_any_granularity_and_allocation_ends_with_its_count(
    method: str, granularity: str, sparsity: float, allocation: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    optimizer = sgd(model)
    fixed = {"2:4": 0.5, "1:4": 0.75}.get(granularity)
    more = {} if fixed else {"sparsity": sparsity}
    call = {"granularity": granularity, "allocation": allocation, "optimizer": optimizer, "steps": 2, **more}
    if method == "pdp" and granularity.startswith("block"):
        with pytest.raises(RecipeError, match="masks single weights"):
            attach(model, method, **call)
        return
    session = attach(model, method, **call)
    for k in range(2):
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(k))
        (model(x).square().mean() + session.penalty()).backward()
        optimizer.step()
        session.step()
    pattern = secateur.granularity.parse(session.recipe.granularity)
    masks = session.finish()
    total = sum(m.numel() for m in masks.values())
    if allocation == "uniform":  # others may give a layer 3 of 4 and another 1
        for name, mask in masks.items():
            keep = 1 - session.recipe.sparsity
            assert int(mask.sum()) == pattern.kept((mask.shape[0], mask.shape[1]), keep), name
    elif granularity == "element":
        assert abs(sum(int(m.sum()) for m in masks.values()) - (1 - sparsity) * total) <= len(masks)
    for mask in masks.values():
        cut = pattern.split(mask)
        assert bool((cut == cut[..., :1]).all()) and len(set(cut[..., 0].sum(1).tolist())) == 1


# -- reaching a target ------------------------------------------------------------------------------------------


def clusters() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    centers = 0.6 * torch.randn(6, 24, generator=generator)
    y = torch.randint(6, (1500,), generator=generator)
    return centers[y] + 0.7 * torch.randn(1500, 24, generator=generator), y


@pytest.mark.parametrize("method", ["str", "dst", "l0", "continuous-sparsification"])
def test_multipliers_bring_the_density_to_the_target(method: str) -> None:
    x, y = clusters()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    steps = 400
    session = attach(model, method, optimizer=optimizer, sparsity=0.8, steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(1000, (64,), generator=generator)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x[rows]), y[rows]) + session.penalty()).backward()
        optimizer.step()
        session.step()
    assert session.sparsity == pytest.approx(0.8, abs=0.05)  # as expected by the gates, before anything is cut

    def accuracy() -> float:
        return float((model.eval()(x[1000:]).argmax(1) == y[1000:]).double().mean())

    before = accuracy()
    masks = session.finish()
    assert sum(int(m.sum()) for m in masks.values()) == round(0.2 * (24 * 40 + 40 * 6))
    assert accuracy() > 0.75 and abs(accuracy() - before) < 0.08


# -- the optimizer, other processes, bad input ------------------------------------------------------------------


def test_what_gates_learn_is_a_group_of_its_own() -> None:
    model = net()
    optimizer = sgd(model)
    session = attach(
        model, "str", optimizer=optimizer, sparsity=0.5, steps=5, knobs={"gate": {"lr": 0.7, "decay": 0.01}}
    )
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(list(net().parameters())), 4]
    group = optimizer.param_groups[1]
    assert group["lr"] == 0.7 and group["weight_decay"] == 0.01 and group["momentum"] == 0.9
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for k in range(5):
        one(model, optimizer, session, k)
        scheduler.step()
    assert group["lr"] == pytest.approx(0.7 / 32)
    session.finish()
    assert [len(g["params"]) for g in optimizer.param_groups] == [8, 0]  # a scheduler counts groups
    optimizer.step()
    scheduler.step()
    with pytest.raises(ModelError, match="attach first.*then make the scheduler"):
        attach(model, "str", optimizer=optimizer, sparsity=0.5, steps=5)


def test_bad_input_is_one_sentence() -> None:
    def call(method: str, **more: Any) -> Callable[[], Any]:
        model = net()
        return lambda: attach(model, method, **{"optimizer": sgd(model), "sparsity": 0.5, "steps": 5, **more})

    lone = nn.Sequential(nn.Linear(4, 4))
    for said, wrong in {
        "say how long it is": call("l0", steps=0),
        "pass optimizer=": call("l0", optimizer=None),
        "itself learns what stays": call("l0", criterion="magnitude"),
        "acts on a gate, and this recipe has none": call("gmp", penalty="lagrangian"),
        "sets the count itself: leave penalty 'lagrangian' out": call("pdp", penalty="lagrangian"),
        "has no regularizer of its own": call("str", penalty="regularizer"),
        "choose granularity coupled": call("gmp", penalty="hesso"),
        "give inputs for it with example=": call("group-lasso"),
        "works on matrices, not on units": call("str", granularity="coupled", example=batch(0)[0]),
        "does not act on whole depth": call("group-lasso", granularity="depth", example=batch(0)[0]),
        "follows the optimizer's steps": call("l1", optimizer=None, knobs={"penalty": {"proximal": True}}),
        "needs input_norm, which a training run": call("l0", allocation="owl"),
        "no gate named 'l1'": call("gmp", gate="l1"),
        "no penalty named 'l0'": call("gmp", penalty="l0"),
        "gate 'l0' has no knob 'rate'": call("l0", knobs={"gate": {"rate": 1}}),
        "use secateur.attach": lambda: secateur.prune(lone, "edge-popup", sparsity=0.5),
    }.items():
        with pytest.raises(secateur.SecateurError, match=said):
            wrong()
    with pytest.raises(ModelError, match="batch normalizations, and this model has none"):
        call("slimming", example=batch(0)[0])()


def test_a_refused_gate_leaves_the_model_alone() -> None:
    model = net()
    keys = list(model.state_dict())
    with pytest.raises(RecipeError, match="sets the count itself"):
        attach(model, "pdp", penalty="lagrangian", optimizer=sgd(model), sparsity=0.5, steps=5)
    assert list(model.state_dict()) == keys and type(model[0]) is nn.Conv2d
    twin = net()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_refused() -> None:
    model = net()
    session = attach(model, "l0", optimizer=sgd(model), sparsity=0.5, steps=5)
    other = net()
    state = attach(other, "l0", optimizer=sgd(other), sparsity=0.5, steps=5).state_dict()
    learned = state["learning"]["gates"]["learned"]
    learned["4"] = {"log_alpha": torch.zeros(1, 3)}
    with pytest.raises(ModelError, match="log_alpha of 4 is"):
        session.load_state_dict(state)
    del learned["4"]
    with pytest.raises(ModelError, match="gates of other layers"):
        session.load_state_dict(state)


def test_recipes_with_gates_and_penalties_are_data() -> None:
    recipe = Recipe.of("l0", sparsity=0.9, knobs={"gate": {"drop": 0.2}})
    assert Recipe.load(recipe.dump()) == recipe and Recipe.load(recipe.dump()).digest == recipe.digest
    assert recipe.override(gate="continuous-sparsification").knobs_of("gate")["final"] == 200.0
    assert recipe.digest != recipe.override(penalty="none").digest != recipe.override(gate="str").digest
    plain = Recipe.of("gmp")
    assert plain.override(gate="l0").criterion is None  # the gate chooses
    assert "gate" not in plain.parts() and plain.override(penalty="l1").digest != plain.digest
    assert any("1712.01312" in line for line in recipe.cite())
    with pytest.raises(RecipeError, match="knobs for"):
        plain.override(knobs={"gate": {"drop": 0.1}})


def _trained(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for method in ("l0", "str"):
        model = net()
        optimizer = sgd(model)
        session = attach(model, method, optimizer=optimizer, sparsity=0.7, steps=8)
        shared = nn.parallel.DistributedDataParallel(model)
        for k in range(8):
            x, y = batch(k)
            part = slice(rank * 4, rank * 4 + 4)
            optimizer.zero_grad()
            (nn.functional.cross_entropy(shared(x[part]), y[part]) + session.penalty()).backward()
            optimizer.step()
            session.step()
        session.finish().save(Path(folder, f"{method}{rank}.safetensors"))
    try:
        attach(shared, "l0", optimizer=sgd(model), sparsity=0.7, steps=8)
    except ModelError as error:
        Path(folder, f"said{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_processes_are_one_on_the_union_of_the_data(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_trained, (2, str(tmp_path)), nprocs=2)
    for method in ("l0", "str"):
        model = net()
        optimizer = sgd(model)
        session = attach(model, method, optimizer=optimizer, sparsity=0.7, steps=8)
        for k in range(8):
            one(model, optimizer, session, k)
        first, second = (secateur.Masks.load(tmp_path / f"{method}{rank}.safetensors") for rank in range(2))
        for name, mask in session.finish().items():
            assert torch.equal(first[name], second[name])
            assert float((first[name] == mask).double().mean()) > 0.99  # sums in another order
    assert "attach to the model first" in (tmp_path / "said0").read_text()
