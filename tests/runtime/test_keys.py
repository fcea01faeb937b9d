"""Entries that leave the cache: which ones, against plain loops; attention over the others against masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.runtime.measured import measured
from secateur.runtime.policy import Policy

from .. import tiny

transformers = pytest.importorskip("transformers")
from secateur.runtime.cache import PrunedLayer, nbytes, others  # noqa: E402

KNOBS: dict[str, dict[str, Any]] = {
    "streaming": {"budget": 8, "sinks": 3},
    "h2o": {"budget": 8},
    "snapkv": {"budget": 8, "window": 3},
}


def model(family: str = "llama", **overrides: Any) -> Any:
    return tiny.build(family, **overrides).double()


@dataclass
class Reference:
    """Attention over all keys, of which those that left are masked with -inf; what leaves is found by plain loops."""

    method: str
    knobs: dict[str, Any]
    base: float = 10000.0
    kept: dict[Any, list[int]] = field(default_factory=dict)
    score: dict[Any, dict[int, float]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        batch, heads, new, _ = query.shape
        group, seen = heads // key.shape[1], key.shape[2]
        out = torch.zeros_like(query)
        for b in range(batch):
            for kv in range(key.shape[1]):
                here = (module.layer_idx, b, kv)
                old = self.kept.setdefault(here, [])
                kept = old + list(range(seen - new, seen))
                score = self.score.setdefault(here, {})
                for t in range(new):
                    for h in range(kv * group, (kv + 1) * group):
                        at = seen - new + t
                        weight = self.weights(query[b, h, t], key[b, kv], kept, at)
                        out[b, h, t] = weight @ value[b, kv]
                        if self.method == "snapkv" and t < new - self.knobs["window"]:
                            continue
                        for i, got in enumerate(weight.tolist()):
                            score[i] = score.get(i, 0.0) + got
                self.kept[here] = self.stays(kept, score, seen, new)
        return out.transpose(1, 2), None

    def weights(self, query: Tensor, key: Tensor, kept: list[int], at: int) -> Tensor:
        if self.method == "streaming":  # every key and the query are turned to their places in the cache
            place = {i: n for n, i in enumerate(kept)}
            key = self.turn(key, torch.tensor([place.get(i, i) - i for i in range(len(key))]))
            query = self.turn(query[None], torch.tensor([place[at] - at]))[0]
        logits = key @ query / key.shape[1] ** 0.5
        gone = [i not in kept or i > at for i in range(len(key))]
        return logits.masked_fill(torch.tensor(gone), -torch.inf).softmax(0)

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """As the first equations of RoPE: features k and k + n/2 are a point that turns by its own angle."""
        half = x.shape[1] // 2
        angle = by[:, None] * self.base ** (-torch.arange(half, dtype=x.dtype) / half)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], 1)

    def stays(self, kept: list[int], score: dict[int, float], seen: int, new: int) -> list[int]:
        budget = self.knobs["budget"]
        if len(kept) <= budget:
            return kept
        if self.method == "streaming":
            sinks = self.knobs["sinks"]
            return kept[:sinks] + kept[sinks - budget :]
        if self.method == "h2o":
            late, last = kept[-budget // 2 :], kept[: -budget // 2]
            return sorted(sorted(last, key=lambda i: -score[i])[: budget - budget // 2]) + late
        if seen > new:
            return kept
        window = self.knobs["window"]
        front = seen - window
        smooth = [sum(score[j] for j in range(i - 2, i + 3) if 0 <= j < front) / 5 for i in range(front)]
        return sorted(sorted(range(front), key=lambda i: -smooth[i])[: budget - window]) + list(range(front, seen))


def positions(cache: Any) -> list[list[list[list[int]]]]:
    return [layer.position.sort(2).values.tolist() for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", KNOBS)
def test_against_masked_attention_and_plain_loops(method: str, family: str) -> None:
    net, ids = model(family, num_hidden_layers=2), tiny.ids(2, 15)
    fast = secateur.prune(net, method, example=ids, **KNOBS[method])
    base = net.config.rope_parameters["rope_theta"]
    reference = Reference(method, KNOBS[method], base)
    transformers.AttentionInterface.register("reference", reference)
    transformers.AttentionMaskInterface.register("reference", transformers.masking_utils.sdpa_mask)
    ours, theirs = fast.cache(), transformers.DynamicCache(config=net.config)
    for piece in (ids[:, :11], *ids[:, 11:].split(1, 1)):
        out = fast(piece, cache=ours).logits
        net.config._attn_implementation = "reference"
        wanted = net(piece, cache=theirs).logits
        net.config._attn_implementation = "sdpa"
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
        for number, layer in enumerate(ours.layers):
            for b, heads in enumerate(layer.position.sort(2).values.tolist()):
                assert heads == [reference.kept[number, b, kv] for kv in range(2)]
    assert ours.get_seq_length() == 15
    assert ours.entries == ([12] * 2 if method == "snapkv" else [8] * 2)


@pytest.mark.parametrize("method", KNOBS)
def test_pieces_of_any_size_are_right(method: str) -> None:
    """Several tokens at once, behind entries that left: each sees what stayed, and those of its piece before it."""
    if method == "snapkv":
        pytest.skip("prunes once, behind the prompt")
    net, ids = model(num_hidden_layers=2), tiny.ids(2, 19)
    fast = secateur.prune(net, method, example=ids, chunk=5, **KNOBS[method])
    reference = Reference(method, KNOBS[method], net.config.rope_parameters["rope_theta"])
    transformers.AttentionInterface.register("reference", reference)
    transformers.AttentionMaskInterface.register("reference", transformers.masking_utils.sdpa_mask)
    theirs = transformers.DynamicCache(config=net.config)
    net.config._attn_implementation = "reference"
    wanted = torch.cat([net(piece, cache=theirs).logits for piece in ids.split(5, 1)], 1)
    net.config._attn_implementation = "sdpa"
    torch.testing.assert_close(fast(ids).logits, wanted, rtol=0, atol=1e-6)
    assert fast.used.entries == [8, 8]


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi3", "mixtral"])
@pytest.mark.parametrize("method", KNOBS)
def test_with_room_for_all_it_is_the_dense_model(method: str, family: str) -> None:
    net, ids = tiny.build(family), tiny.ids(2, 12)
    if method == "streaming" and family == "gpt2":
        with pytest.raises(ModelError, match="do not turn with positions as rotary embeddings"):
            secateur.prune(net, method, example=ids, budget=40)
        return
    fast = secateur.prune(net, method, example=ids, **{"budget": 40} | ({"window": 3} if method == "snapkv" else {}))
    same = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **same), net.generate(ids, **same))
    assert torch.equal(fast.generate(ids, num_beams=2, **same), net.generate(ids, num_beams=2, **same))
    torch.testing.assert_close(fast(ids).logits, net(ids).logits)
    assert net.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("method", KNOBS)
def test_a_batch_is_its_texts_one_at_a_time(method: str, chunk: int | None) -> None:
    """Also where they are padded to one length, and some have fewer tokens than the budget, or than sinks."""
    if method == "snapkv" and chunk:
        pytest.skip("prunes once, behind the prompt")
    net = model()
    lengths = [12, 9, 2]
    texts = [tiny.ids(1, n) for n in lengths]
    fast = secateur.prune(net, method, example=texts[0], **KNOBS[method], **({"chunk": chunk} if chunk else {}))
    padded = torch.cat([nn.functional.pad(t, (12 - t.shape[1], 0)) for t in texts])
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    more = tiny.ids(3, 7, 60) + 2
    cache, place = fast.cache(), (mask.cumsum(1) - 1).clamp(min=0)
    out = [fast(padded, attention_mask=mask, position_ids=place, cache=cache).logits[:, -1]]
    for k in range(7):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        place = place[:, -1:] + 1
        out.append(fast(more[:, k : k + 1], attention_mask=mask, position_ids=place, cache=cache).logits[:, -1])
    for b, text in enumerate(texts):
        alone = fast.cache()
        single = [fast(text, cache=alone).logits[0, -1]]
        single += [fast(more[b : b + 1, k : k + 1], cache=alone).logits[0, -1] for k in range(7)]
        torch.testing.assert_close(torch.stack([o[b] for o in out]), torch.stack(single), rtol=0, atol=1e-6)


def test_bytes_do_not_grow_with_the_text() -> None:
    net, ids = tiny.build(num_hidden_layers=1), tiny.ids(2, 30)
    dense = net(ids, use_cache=True).cache
    for method, most in (("streaming", 0.7), ("h2o", 0.7)):
        fast = secateur.prune(net, method, example=ids, budget=15, chunk=1)
        cache = fast.cache()
        fast(ids[:, :20], cache=cache)
        before = nbytes(cache)
        fast(ids[:, 20:], cache=cache)
        assert nbytes(cache) == before <= most * nbytes(dense)
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
        assert held == 16 / 30 * nbytes(dense)  # one place is for the token that comes
        assert fast.record["bytes"]["after"] < fast.record["bytes"]["before"]
        assert fast.record["flops"]["after"] < fast.record["flops"]["before"]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(5, 12),
    st.sampled_from(["token-recency", "attention-received"]), st.integers(0, 4), st.integers(0, 1000),
)  # fmt: skip
def test_counts_are_exact(
    batch: int, heads: int, pieces: list[int], budget: int, criterion: str, sinks: int, seed: int
) -> None:
    """After any pieces: the entries that the budget allows, all different, with the first and the last ones."""
    g = torch.Generator().manual_seed(seed)
    layer = PrunedLayer(Policy(criterion, budget, sinks=sinks, recent=0.25), None)
    seen = 0
    for new in pieces:
        seen += new
        keys = torch.arange(seen - new, seen).float()[:, None].expand(batch, heads, new, 4)
        key, _ = layer.update(keys, -keys)
        got = torch.rand(key.shape[:3], generator=g) if criterion == "attention-received" else None
        layer.settle(got, None)
        assert layer.keys.shape == (batch, heads, min(seen, budget), 4) and layer.get_seq_length() == seen
        assert torch.equal(layer.keys[..., 0], layer.position.float()) and torch.equal(layer.values, -layer.keys)
        last = max(1, int(0.25 * min(seen, budget) + 0.5)) if criterion == "token-recency" else int(budget * 0.25 + 0.5)
        must = {*range(min(sinks, seen)), *range(max(0, seen - last), seen)}
        for entries in layer.position.flatten(0, 1).tolist():
            assert len(set(entries)) == len(entries) and must <= set(entries)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 9), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 2), st.integers(0, 99)
)
def test_the_least_is_the_one_that_is_not_chosen(heads: int, budget: int, recent: float, sinks: int, seed: int) -> None:
    """One too many, found without a sort: also of scores that are equal, and wherever entries stand."""
    g = torch.Generator().manual_seed(seed)
    policy = Policy("attention-received", max(budget, sinks + 1), recent=recent, sinks=sinks)
    n = policy.count(10**6) + 1
    order = torch.rand(2, heads, 3 * n, generator=g).argsort(2)[..., :n]
    order[..., 0] = 3 * n  # the last of all is there
    score, first = torch.randint(0, 3, order.shape, generator=g).float(), torch.zeros(2, dtype=torch.long)
    stays = policy.chosen(order, first, 3 * n + 1, score, None)
    one = policy.least_of(order, first, 3 * n + 1, score)
    assert torch.equal((~stays).sum(2), torch.ones(2, heads, dtype=torch.long))
    assert bool((~stays).gather(2, one).all())


@pytest.mark.parametrize("method", ["streaming", "h2o"])
@pytest.mark.parametrize("padded", [False, True])
def test_short_ways_change_nothing(method: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries leave in the ring, or by the least score, as they do when all of them are looked at."""
    net, ids = model(num_hidden_layers=1), tiny.ids(3, 30)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9] = mask[2, :4] = 0
    more = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    short = PrunedLayer._one_leaves
    for knobs in ({"budget": 9}, {"keep": 0.3}):
        fast = secateur.prune(net, method, example=ids, **knobs)
        calls: list[bool] = []

        def noted(layer: PrunedLayer, count: int, calls: list[bool] = calls) -> bool:
            calls.append(short(layer, count))
            return calls[-1]

        monkeypatch.setattr(PrunedLayer, "_one_leaves", noted)
        one, used = fast.generate(ids, do_sample=False, **more), fast.used
        assert any(calls)
        monkeypatch.setattr(PrunedLayer, "_one_leaves", lambda s, c: False)
        assert torch.equal(one, fast.generate(ids, do_sample=False, **more))
        assert positions(used) == positions(fast.used)
        for x, y in zip(used.layers, fast.used.layers, strict=True):
            at, to = (layer.position.argsort(2)[..., None].expand_as(layer.keys) for layer in (x, y))
            torch.testing.assert_close(x.keys.gather(2, at), y.keys.gather(2, to))
            torch.testing.assert_close(x.values.gather(2, at), y.values.gather(2, to))


def test_a_fraction_of_a_text_leaves_by_age() -> None:
    layer, keep = PrunedLayer(Policy("token-recency", keep=0.4, sinks=2), None), []
    for seen in range(1, 41):
        key = torch.full((2, 2, 1, 4), float(seen - 1))
        layer.update(key, -key)
        layer.settle(None, None)
        count = max(3, int(0.4 * seen + 0.5))
        keep = sorted([*keep, seen - 1], key=lambda i: (i >= 2, -i if i >= 2 else i))[: min(count, len(keep) + 1)]
        assert layer.position.sort(2).values.tolist() == [[sorted(keep)] * 2] * 2
        assert torch.equal(layer.keys[..., 0], layer.position.float())


def test_pieces_and_what_is_asked_of_them() -> None:
    net, ids = tiny.build(), tiny.ids(2, 20)
    fast = secateur.prune(net, "h2o", example=ids, budget=8, chunk=6)
    whole = fast(ids).logits
    assert torch.equal(fast(ids, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(fast(ids, logits_to_keep=torch.tensor([2, 9])).logits, whole[:, [2, 9]])
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(RecipeError, match=f"leave out {name}"):
            fast(ids, **{name: True})
    with pytest.raises(RecipeError, match="leave out return_dict"):
        fast(ids, return_dict=False)
    with pytest.raises(RecipeError, match="is a DynamicCache, which entries do not leave: give what cache"):
        fast(ids, cache=transformers.DynamicCache(config=net.config))


def test_half_precision_and_a_window_alone() -> None:
    net, ids = tiny.build().bfloat16(), tiny.ids(1, 20)
    for method in KNOBS:
        fast = secateur.prune(net, method, example=ids, **KNOBS[method])
        assert fast.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)
    plain = secateur.prune(tiny.build("gpt2"), "streaming", example=ids, budget=5, sinks=0)
    plain(ids)
    assert plain.used.layers[1].position[0, 0].tolist() == [15, 16, 17, 18, 19]


def test_saved_and_loaded(tmp_path: Path) -> None:
    net, ids = tiny.build(num_hidden_layers=2), tiny.ids(2, 20)
    for method, knobs in KNOBS.items():
        fast = secateur.prune(net, method, example=ids, **knobs)
        secateur.save(fast, tmp_path / method)
        again = secateur.load(tmp_path / method)
        assert again.record == fast.record and again.policy == fast.policy
        more = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(again.generate(ids, **more), fast.generate(ids, **more))
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / method)
        torch.testing.assert_close(stock(ids).logits, net(ids).logits)


def test_command_line(tmp_path: Path) -> None:
    from secateur.cli import app

    tiny.save(tmp_path / "net")
    args = ["prune", str(tmp_path / "net"), "--method", "h2o", "--set", "h2o.budget=6", "--example", "2x24"]
    done = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "h2o: 6 of 24 entries stay" in done.output and "MiB of the cache" in done.output
    assert secateur.load(tmp_path / "out").policy.budget == 6


def test_refused() -> None:
    net, ids = tiny.build(), tiny.ids(1, 20)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        add_pooling_layer=False,
    )
    for weight in bert.parameters():
        weight.data.mul_(20)  # fresh ones attend alike to all, and then it does not show who sees whom
    prune = secateur.prune
    with pytest.raises(ModelError, match="has no key-value cache that can be pruned"):
        prune(nn.Sequential(nn.Conv2d(1, 2, 3)), "h2o", example=torch.zeros(1, 1, 8, 8), budget=4)
    with pytest.raises(ModelError, match="see those behind them|is not the usual one"):
        prune(bert, "h2o", example=ids % 40, budget=4)
    with pytest.raises(ModelError, match="there is nothing to prune in its cache"):
        prune(tiny.build("mistral"), "h2o", example=ids, budget=4)
    with pytest.raises(ModelError, match="a cap on its logits"):
        prune(tiny.build("gemma2"), "h2o", example=ids, budget=4)
    with pytest.raises(ModelError, match="is not the usual one"):
        prune(tiny.build("bloom"), "h2o", example=ids, budget=4)
    with pytest.raises(RecipeError, match="by one of budget"):
        prune(net, "h2o", example=ids, budget=4, keep=0.5)
    with pytest.raises(RecipeError, match="a budget of 4 is too small: 4 entries always stay"):
        prune(net, "streaming", example=ids, budget=4)
    with pytest.raises(RecipeError, match="chunk is 0"):
        prune(net, "streaming", example=ids, budget=8, chunk=0)
    with pytest.raises(ModelError, match="an example of token ids"):
        prune(net, "h2o", example=torch.zeros(1, 20), budget=4)
    with pytest.raises(RecipeError, match="no loss of its own"):
        prune(net, "h2o", example=ids, budget=4, chunk=4)(ids, labels=ids)
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="rotary embeddings of a fixed base"):
        prune(tiny.build(rope_parameters=dynamic), "streaming", example=ids, budget=8)


def test_layers_with_a_state_of_their_own_stay_as_they_are() -> None:
    config = transformers.Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"],
    )  # fmt: skip
    ids = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    fast = secateur.prune(transformers.Lfm2ForCausalLM(config).eval(), "h2o", budget=4, example=ids)
    fast.generate(ids, max_new_tokens=3, do_sample=False)
    assert fast.used.entries == [4]
    assert fast.record["bytes"]["after"] > 0 and others(fast.used)


def test_a_model_without_logits_is_not_measured() -> None:
    ids = torch.arange(12)[None]
    fast = secateur.prune(model().model, "h2o", budget=4, example=ids)
    with pytest.raises(ModelError, match="gives no logits"):
        measured(fast, [ids])
