"""What a decoder reads of its weights, token by token: against masks, exact on the data, and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.errors import DataError, ModelError, RecipeError
from secateur.runtime.sparse import Kept, columns_product, rows_product

from .. import tiny

pytest.importorskip("transformers")
METHODS = ("teal", "cats")
ALL = (*METHODS, "deja-vu")


def decoded(net: Any, ids: Tensor, cache: Any, prompt: int = 8) -> Tensor:
    """Logits of what comes behind the prompt, token by token."""
    with torch.no_grad():
        net(ids[:, :prompt], cache=cache, use_cache=True)
        return torch.cat([net(one, cache=cache, use_cache=True).logits for one in ids[:, prompt:].split(1, 1)], 1)


def scores(net: Any, method: str, data: Tensor) -> dict[str, Tensor]:
    """By plain hooks: what thresholds are compared with, of all tokens of the data, in the dense model."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for path, module in net.named_modules():
        if method == "teal" and isinstance(module, nn.Linear) and "layers." in path:
            handles.append(module.register_forward_pre_hook(lambda m, a, p=path: found.setdefault(p, []).append(a[0])))
        if method == "cats" and path.endswith("act_fn"):
            name = path.removesuffix(".act_fn")
            handles.append(module.register_forward_hook(lambda m, a, o, p=name: found.setdefault(p, []).append(o)))
    with torch.no_grad():
        net(data)
    for handle in handles:
        handle.remove()
    return {path: torch.cat([x.abs().flatten() for x in seen]) for path, seen in found.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("method", METHODS)
def test_the_fraction_on_the_data_is_exact(method: str, sparsity: float) -> None:
    net, data = tiny.build(), tiny.ids(3, 11)
    fast = secateur.prune(net, method, example=data[:1], data=list(data.split(1)), sparsity=sparsity)
    plain = scores(net, method, data)
    assert {site.path for site in fast.sites} == set(plain) and len(plain) == (21 if method == "teal" else 3)
    for site in fast.sites:
        x = plain[site.path]
        # batches of one text and all at once differ in the last bits: at most the value at the edge falls over
        assert abs(int((x <= site.threshold).sum()) - int(sparsity * len(x) + 0.5)) <= 1


def masked(net: Any, fast: Any, ids: Tensor) -> Tensor:
    """The same with zeros in place of what is left out, by hooks in the stock model."""
    known = {site.path: site.threshold for site in fast.sites}
    handles = []
    for path, module in net.named_modules():
        key = path.removesuffix(".act_fn")
        if path in known and isinstance(module, nn.Linear):
            t = known[path]
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, t=t: (a[0] * (a[0].abs() > t),) if a[0].shape[1] == 1 else None
                )
            )
        elif path != key and key in known:
            t = known[key]
            handles.append(
                module.register_forward_hook(lambda m, a, o, t=t: o * (o.abs() > t) if o.shape[1] == 1 else None)
            )
    try:
        return decoded(net, ids, fast.cache())
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_read_counts_as_zero(method: str, bias: bool) -> None:
    """Texts of a batch leave out what is their own; a text alone gives what it gives in a batch."""
    net, ids = tiny.build(attention_bias=bias, mlp_bias=bias), tiny.ids(3, 12)
    if bias:
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    fast = secateur.prune(net, method, example=ids, data=ids, sparsity=0.6)
    out = decoded(fast, ids, fast.cache())
    assert 0.4 < fast.left_out < 0.8
    torch.testing.assert_close(out, masked(net, fast, ids), rtol=1e-4, atol=1e-5)
    single = [decoded(fast, one, fast.cache()) for one in ids.split(1)]
    torch.testing.assert_close(out, torch.cat(single), rtol=1e-4, atol=1e-5)
    dense = decoded(net, ids, fast.cache())
    assert (out - dense).norm() > 1e-3 * dense.norm()
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, net(ids).logits)  # a prompt is computed in full
    assert all("forward" not in vars(m) for m in net.modules())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_left_out_is_the_dense_model(method: str) -> None:
    net, ids = tiny.build("qwen3"), tiny.ids(2, 12)
    fast = secateur.prune(net, method, example=ids, data=ids, sparsity=0.0)
    torch.testing.assert_close(decoded(fast, ids, fast.cache()), decoded(net, ids, fast.cache()), rtol=1e-4, atol=1e-5)
    assert fast.left_out == 0.0 and fast.record["flops"]["before"] == fast.record["flops"]["after"]
    more = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fast.generate(ids, **more), net.generate(ids, **more))


def test_prompts_can_be_masked() -> None:
    net, ids = tiny.build(), tiny.ids(2, 10)
    for method in METHODS:
        fast = secateur.prune(net, method, example=ids, data=ids, sparsity=0.5, prompt=True)
        assert "zeros in prompts too" in fast.told()
        with torch.no_grad():
            assert (fast(ids).logits - net(ids).logits).norm() > 1e-3 * net(ids).logits.norm()
    fast(ids).logits.sum().backward()  # masked, and so differentiable
    assert net.model.layers[0].mlp.up_proj.weight.grad is not None


def test_greedy_moves_what_is_left_out_where_it_hurts_least() -> None:
    from secateur.layers import evaluating

    net, ids = tiny.build(num_hidden_layers=2), tiny.ids(2, 12)
    with torch.no_grad():
        net.model.layers[0].self_attn.v_proj.weight.zero_()  # what the queries and keys see does not matter
    uniform = secateur.prune(net, "teal", example=ids, data=ids, sparsity=0.4)
    greedy = secateur.prune(net, "teal", example=ids, data=ids, sparsity=0.4, greedy=True)
    fractions, path = greedy.record["fractions"], "model.layers.0.self_attn"
    assert fractions[f"{path}.q_proj"] == pytest.approx(1) and fractions[f"{path}.o_proj"] == pytest.approx(1)
    sizes = {p: m.weight.numel() for p, m in net.named_modules() if p in fractions}
    for number in range(2):
        mine = [p for p in fractions if f"layers.{number}." in p]
        mean = sum(fractions[p] * sizes[p] for p in mine) / sum(sizes[p] for p in mine)
        assert mean == pytest.approx(0.4)
    assert greedy.record["flops"]["after"] == pytest.approx(uniform.record["flops"]["after"], rel=1e-4)

    def error(fast: Any) -> float:
        fast.prompt = True
        with evaluating(net), torch.no_grad():
            return float((fast.model.model(ids).last_hidden_state - run(fast, ids)).norm())

    def run(fast: Any, ids: Tensor) -> Tensor:
        with fast._sparse():
            return fast.model.model(ids).last_hidden_state

    assert error(greedy) < error(uniform)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 1000))
def test_products(tokens: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    """Also of tokens that keep nothing, or everything."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(tokens, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    b = torch.randn(outputs, generator=g) if bias else None
    keep = torch.rand(tokens, inputs, generator=g) < torch.rand(tokens, 1, generator=g).round(decimals=1)
    kept = Kept.of(keep)
    out = columns_product(kept.of_rows(x), kept, w.T.contiguous(), b)
    torch.testing.assert_close(out, nn.functional.linear(x * keep, w, b), rtol=1e-4, atol=1e-5)
    rows = torch.rand(tokens, outputs, generator=g) < 0.5
    found = rows_product(x, Kept.of(rows), w, b)
    torch.testing.assert_close(found, nn.functional.linear(x, w, b)[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 300, 301])
def test_the_sum_for_one_token_is_made_in_pieces(count: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 400, generator=g), torch.randn(7, 400, generator=g)
    keep = torch.zeros(1, 400, dtype=torch.bool)
    keep[0, torch.randperm(400, generator=g)[:count]] = True
    kept = Kept.of(keep)
    out = columns_product(kept.of_rows(x), kept, w.T.contiguous(), torch.ones(7))
    torch.testing.assert_close(out, nn.functional.linear(x * keep, w, torch.ones(7)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(method: str, tmp_path: Path) -> None:
    net, ids = tiny.build(), tiny.ids(2, 12)
    fast = secateur.prune(net, method, example=ids, data=ids, sparsity=0.5)
    secateur.save(fast, tmp_path / "out")
    again = secateur.load(tmp_path / "out")
    assert again.record == fast.record and again.told() == fast.told()
    one, other = decoded(again, ids, again.cache()), decoded(fast, ids, fast.cache())
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ALL)
def test_any_precision_and_a_copy(method: str, dtype: torch.dtype) -> None:
    net, ids = tiny.build(num_hidden_layers=2).to(dtype), tiny.ids(2, 12)
    fast = secateur.prune(net, method, example=ids, data=ids, sparsity=0.25)
    out = decoded(fast, ids, fast.cache())
    assert out.dtype == dtype and bool(out.isfinite().all())
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    torch.testing.assert_close(decoded(other, ids, other.cache()), out, rtol=1e-2, atol=1e-2)


def test_a_block_that_runs_twice_is_one_site() -> None:
    net, ids = tiny.build(num_hidden_layers=2), tiny.ids(2, 12)
    net.model.layers[1] = net.model.layers[0]
    for method in ALL:
        fast = secateur.prune(net, method, example=ids, data=ids, sparsity=0.0)
        paths = [site.path for site in fast.sites]
        assert len(paths) == len(set(paths))


def test_weights_that_change_are_read_anew() -> None:
    net, ids = tiny.build(), tiny.ids(1, 12)
    for method in METHODS:
        fast = secateur.prune(net, method, example=ids, data=ids, sparsity=0.0)
        before = decoded(fast, ids, fast.cache())
        with torch.no_grad():
            net.model.layers[1].mlp.down_proj.weight.mul_(2)
        after = decoded(fast, ids, fast.cache())
        torch.testing.assert_close(after, decoded(net, ids, fast.cache()), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after)


def test_refused() -> None:
    net, ids = tiny.build(), tiny.ids(1, 12)
    with pytest.raises(RecipeError, match=r"sparsity is 1\.0: it is the fraction that is left out"):
        secateur.prune(net, "teal", example=ids, data=ids, sparsity=1.0)
    with pytest.raises(RecipeError, match="measures on data what can be left out"):
        secateur.prune(net, "cats", example=ids)
    with pytest.raises(ModelError, match="no feed-forward part down"):
        secateur.prune(tiny.build("neox"), "cats", example=ids, data=ids)
    with pytest.raises(ModelError, match="have no nn.Linear"):
        secateur.prune(tiny.build("gpt2"), "teal", example=ids, data=ids)
    with pytest.raises(ModelError, match="an example of token ids"):
        secateur.prune(nn.Linear(3, 3), "teal", example=torch.zeros(2, 3), data=[torch.zeros(2, 3)])
    with pytest.raises(DataError, match="is empty"):
        secateur.prune(net, "teal", example=ids, data=[])
