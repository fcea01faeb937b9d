"""Neurons that are foreseen: against masks by hooks, perfect foresight, exact counts, and what is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur
from secateur.errors import DataError, ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime.decoder import dense_cache
from secateur.runtime.dejavu import parts, start
from secateur.runtime.foreseen import Foreseen, Opens
from secateur.runtime.sparse import SparseDecoder
from secateur.select import select

from .. import tiny

pytest.importorskip("transformers")
FAMILIES = ("llama", "opt", "neox")


def decoded(net: Any, ids: Tensor, prompt: int = 8) -> Tensor:
    """Logits of what comes behind the prompt, token by token."""
    cache = dense_cache(net.model if isinstance(net, SparseDecoder) else net)
    with torch.no_grad():
        net(ids[:, :prompt], cache=cache, use_cache=True)
        return torch.cat([net(one, cache=cache, use_cache=True).logits for one in ids[:, prompt:].split(1, 1)], 1)


def foresights(fast: Any) -> list[Any]:
    return [site.foresight for site in fast.sites if isinstance(site, (Foreseen, Opens))]


def masked(net: Any, fast: Any, ids: Tensor, kept: dict[str, Any]) -> Tensor:
    """The same by hooks in the stock model: zeros in what the last layers read; ``kept[path](x)`` says which stay."""
    given: dict[str, Tensor] = {}
    handles = []
    for part in parts(net, ids):
        first, down = net.get_submodule(part.reads), net.get_submodule(part.closes)
        handles.append(first.register_forward_pre_hook(lambda m, a, p=part.path: given.update({p: a[0]})))

        def zero(m: Any, a: Any, p: str = part.path) -> Any:
            x = given[p].flatten(0, -2)
            return (a[0] * kept[p](x).view(a[0].shape),) if len(x) == len(ids) else None

        handles.append(down.register_forward_pre_hook(zero))
    try:
        return decoded(net, ids)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_foreseen_counts_as_zero(family: str) -> None:
    """Texts of a batch have neurons of their own; a text alone gives what it gives in a batch."""
    net, ids = tiny.build(family), tiny.ids(3, 14)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    fast = secateur.prune(net, "deja-vu", example=ids, data=ids, rank=4, sparsity=0.6)
    out = decoded(fast, ids)
    assert fast.left_out == 1 - 19 / 48  # round(0.4 x 48) of each part stay, for every token
    known = {f.path: lambda x, f=f: select(f.predict(x), f.count) for f in foresights(fast)}
    assert len(known) == 3
    torch.testing.assert_close(out, masked(net, fast, ids, known), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, torch.cat([decoded(fast, one) for one in ids.split(1)]), rtol=1e-4, atol=1e-5)
    dense = decoded(net, ids)
    assert (out - dense).norm() > 1e-3 * dense.norm()
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, net(ids).logits)  # a prompt is computed in full
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_perfect_foresight_is_exact_top_k(family: str) -> None:
    """With the scores themselves in place of a predictor; by a full sort in the stock model."""
    net, ids = tiny.build(family), tiny.ids(2, 14)
    fast = secateur.prune(net, "deja-vu", example=ids, data=ids, rank=1, epochs=0, sparsity=0.75)
    found = {part.path: part for part in parts(net, ids)}

    class Perfect(nn.Module):
        def __init__(self, part: Any) -> None:
            super().__init__()
            self.part = [part]

        def forward(self, x: Tensor) -> Tensor:
            return values(self.part[0], x).abs()

    def values(part: Any, x: Tensor) -> Tensor:
        found = part.act(nn.functional.linear(x, part.first.weight, part.first.bias))
        return found if part.up is None else found * nn.functional.linear(x, part.up.weight)

    def largest(x: Tensor, part: Any) -> Tensor:
        score = values(part, x).abs()
        order = score.argsort(dim=1, descending=True, stable=True)[:, :12]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)

    for foresight in foresights(fast):
        foresight.predict = Perfect(found[foresight.path])
    known = {path: lambda x, p=part: largest(x, p) for path, part in found.items()}
    torch.testing.assert_close(decoded(fast, ids), masked(net, fast, ids, known), rtol=1e-4, atol=1e-5)


def test_full_rank_foresees_what_is_linear() -> None:
    """Neurons that count when a feature is positive, as many as there are features: least squares tells them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g)
    turn = torch.randn(6, 6, generator=g)
    counts = x @ turn.T > 0
    predictor = start(x[:300], counts[:300], 6)
    wrong = (predictor(x[300:]) > 0) != counts[300:]
    assert wrong.float().mean() < 0.06
    low = start(x[:300], counts[:300], 2)
    assert low.narrow.shape == (2, 6) and ((low(x[300:]) > 0) != counts[300:]).float().mean() > 0.1
    # of all of one rank it is the nearest: no other pair of factors, found by gradients, is nearer
    apart, wanted = x[:300] - x[:300].mean(0), counts[:300].float() - counts[:300].float().mean(0)
    ours = (apart @ (low.widen @ low.narrow).T / 4 - wanted).norm()
    a, b = torch.randn(2, 6, generator=g).requires_grad_(), torch.randn(6, 2, generator=g).requires_grad_()
    optimizer = torch.optim.Adam([a, b], 0.03)
    for _ in range(300):
        theirs = (apart @ (b @ a).T - wanted).norm()
        optimizer.zero_grad()
        theirs.backward()
        optimizer.step()
    assert ours.item() <= theirs.item() * 1.001 and theirs.item() <= ours.item() * 1.02


def learnable() -> Any:
    """Neurons of different sizes, by features of very different sizes: what counts can be foreseen."""
    net = tiny.build("opt", num_hidden_layers=2)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in net.model.decoder.layers:
            layer.fc1.weight.copy_(torch.randn(48, 3, generator=g) @ torch.randn(3, 32, generator=g))
    return net


@pytest.mark.parametrize("ahead", [False, True])
def test_what_it_learns(ahead: bool) -> None:
    net, data = learnable(), list(tiny.ids(16, 24).split(4))
    kwargs = {"example": data[0], "data": data, "sparsity": 0.75, "rank": 8, "ahead": ahead}
    fast = secateur.prune(net, "deja-vu", **kwargs)
    one, same = (sum(x) / len(x) for x in fast.record["recall"].values())
    assert one > same + 0.1
    assert f"find {100 * one:.1f} % of what counts in held-out text" in fast.told()
    again = secateur.prune(net, "deja-vu", **kwargs)
    for x, y in zip(fast.predictors.parameters(), again.predictors.parameters(), strict=True):
        assert torch.equal(x, y)
    other = secateur.prune(net, "deja-vu", **kwargs, seed=1)
    assert not torch.equal(fast.predictors[0].widen, other.predictors[0].widen)
    before = secateur.prune(net, "deja-vu", **kwargs, epochs=0)
    assert one >= sum(before.record["recall"]["predicted"]) / 2 - 0.02


def test_looking_ahead_reads_what_the_part_before_read() -> None:
    net, ids = tiny.build(), tiny.ids(2, 14)
    fast = secateur.prune(net, "deja-vu", example=ids, data=ids, rank=4, ahead=True)
    paths = [f.path for f in foresights(fast)]
    assert [f.source for f in foresights(fast)] == [None, *paths[:-1]]
    given: dict[str, Tensor] = {}
    reads = {p.path: p.reads for p in parts(net, ids)}
    known = {}
    for number, f in enumerate(foresights(fast)):

        def keep(x: Tensor, f: Any = f, number: int = number) -> Tensor:
            given[f.path] = x
            return select(f.predict(x if number == 0 else given[paths[number - 1]]), f.count)

        known[f.path] = keep
    assert set(reads) == set(known)
    out = decoded(fast, ids)
    torch.testing.assert_close(out, masked(net, fast, ids, known), rtol=1e-4, atol=1e-5)
    fast.prompt = True
    with torch.no_grad():
        assert (fast(ids).logits - net(ids).logits).norm() > 1e-4 * net(ids).logits.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_left_out_is_the_dense_model(family: str) -> None:
    net, ids = tiny.build(family), tiny.ids(2, 14)
    fast = secateur.prune(net, "deja-vu", example=ids, data=ids, sparsity=0.0)
    assert torch.equal(decoded(fast, ids), decoded(net, ids))
    assert fast.record["flops"]["before"] == fast.record["flops"]["after"] and fast.left_out == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_counted_where_they_run(family: str) -> None:
    """What is recorded is what is executed: products with chosen rows and columns, and the predictors'."""
    net, ids = tiny.build(family), tiny.ids(2, 14)
    fast = secateur.prune(net, "deja-vu", example=ids, data=ids, rank=4, sparsity=0.75)
    mats = 3 if family == "llama" else 2
    cost = 3 * 2 * 4 * (32 + 48)
    record = fast.record
    assert record["flops"]["before"] - record["flops"]["after"] == 3 * mats * 2 * 32 * 36 - cost
    assert record["predictors"] == {"parameters": 3 * (4 * (32 + 48) + 48), "flops": cost}
    assert flops(fast, input_ids=ids[:1, :1]).total == record["flops"]["after"]
    assert sum(p.numel() for p in fast.predictors.parameters()) == record["predictors"]["parameters"]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    net, ids = tiny.build(family), tiny.ids(2, 14)
    fast = secateur.prune(net, "deja-vu", example=ids, data=ids, rank=4, ahead=True)
    secateur.save(fast, tmp_path / "out")
    again = secateur.load(tmp_path / "out")
    assert again.record == fast.record and again.told() == fast.told()
    torch.testing.assert_close(decoded(again, ids), decoded(fast, ids), rtol=1e-5, atol=1e-6)
    assert all(not p.requires_grad for p in again.predictors.parameters())


def test_padding_teaches_nothing() -> None:
    net, ids = tiny.build(), tiny.ids(6, 24)
    padded = {
        "input_ids": nn.functional.pad(ids, (3, 0)),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), (3, 0)),
    }
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for method, knobs in (("deja-vu", {"rank": 4}), ("cats", {}), ("teal", {})):
        plain, with_padding = (secateur.prune(net, method, example=ids, data=[d], **knobs) for d in (ids, padded))
        if method == "deja-vu":
            for one, other in zip(plain.predictors, with_padding.predictors, strict=True):
                torch.testing.assert_close(one.widen @ one.narrow, other.widen @ other.narrow, rtol=1e-2, atol=1e-3)
        else:
            one, other = ({s.path: s.threshold for s in m.sites} for m in (plain, with_padding))
            assert one == pytest.approx(other, rel=1e-3)


def test_half_precision_and_generation() -> None:
    net, ids = tiny.build().bfloat16(), tiny.ids(2, 14)
    fast = secateur.prune(net, "deja-vu", example=ids, data=ids, rank=4)
    assert fast.predictors[0].widen.dtype == torch.bfloat16
    mask = torch.ones_like(ids)
    assert fast.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False).shape == (2, 17)
    masks = secateur.prune(tiny.build("opt"), "deja-vu", example=ids, data=ids, rank=4, prompt=True)
    masks(ids).logits.sum().backward()
    assert masks.model.model.decoder.layers[0].fc1.weight.grad is not None


def test_command_line(tmp_path: Path) -> None:
    from secateur.cli import app

    here = tmp_path / "texts.py"
    here.write_text("import torch\ntexts = list(torch.arange(96).remainder(60).view(4, 1, 24))\n")
    tiny.save(tmp_path / "net")
    args = ["prune", str(tmp_path / "net"), "--method", "deja-vu", "--data", f"{here}:texts"]
    done = CliRunner().invoke(app, [*args, "--set", "deja-vu.rank=4", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "of what counts in held-out text" in done.output
    assert secateur.load(tmp_path / "out").record["rank"] == 4


def test_refused() -> None:
    net, ids = tiny.build(), tiny.ids(1, 14)
    with pytest.raises(RecipeError, match=r"sparsity is 1\.5: it is the fraction that is left out"):
        secateur.prune(net, "deja-vu", example=ids, data=ids, sparsity=1.5)
    with pytest.raises(RecipeError, match="rank is 0"):
        secateur.prune(net, "deja-vu", example=ids, data=ids, rank=0)
    with pytest.raises(ModelError, match="no feed-forward part down"):
        secateur.prune(tiny.build("gpt2"), "deja-vu", example=ids, data=ids)
    with pytest.raises(DataError, match="learn from 14 tokens"):
        secateur.prune(net, "deja-vu", example=ids, data=ids)
