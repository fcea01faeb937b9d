"""Generation with fewer blocks: the same answers step by step, all at once, in a batch and alone; caches stay right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.errors import DataError, ModelError, RecipeError
from secateur.runtime.between import in_place_of
from secateur.runtime.lm_exit import ExitDecoding, exit_decoding
from secateur.runtime.lm_pass import continued, measured_tokens, step, step_flops
from secateur.runtime.lm_skip import SkipDecoding, skip_decoding

transformers = pytest.importorskip("transformers")

BLOCKS = 5
LENGTH = 12


def llama(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def windows(count: int = 1, rows: int = 3, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 50, (rows, LENGTH), generator=g) for _ in range(count)]


def skipping(skip: int = 2, **knobs: Any) -> SkipDecoding:
    data = windows()
    return skip_decoding(llama(), data[0], data, **(knobs or {"skip": skip}))


def exiting(share: float = 0.5, **knobs: Any) -> ExitDecoding:
    """One with a threshold at which about such a share of tokens has left behind the first exit."""
    data = windows()
    made = exit_decoding(llama(), data[0], data, **({"threshold": 1e-6} | knobs))
    doubts: list[Tensor] = []

    def listen(place: int, doubt: Tensor) -> Tensor:
        doubts.append(doubt)
        return torch.zeros_like(doubt, dtype=torch.bool)

    made.decide = listen
    with torch.no_grad():
        continued(made, data[0])
    made.decide = made._below
    made.threshold = float(torch.cat(doubts).quantile(share))
    return made


def whole(model: Any, ids: Tensor, act: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """All tokens at once and without a cache; ``act(block, before, after)`` says what becomes of the state."""

    def forward(k: int) -> Callable[..., Tensor]:
        return lambda own, x, **kwargs: act(k, x, own(x, **kwargs))

    with torch.no_grad(), in_place_of(model, {f"model.layers.{k}": forward(k) for k in range(BLOCKS)}):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, LENGTH // 2 :]
    return logits


def behind(x: Tensor) -> Tensor:
    return (torch.arange(LENGTH) >= LENGTH // 2)[None, :, None].expand(len(x), -1, 1)


def test_skipping_against_a_plain_loop() -> None:
    gates, ids = skipping(), windows(1, rows=5, seed=7)[0]
    cosine: list[Tensor] = []

    def look(k: int, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(x[:, : LENGTH // 2].flatten(0, 1), y[:, : LENGTH // 2].flatten(0, 1), strict=True)
        each = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in pairs])
        cosine.append(each.view(5, -1).mean(1))
        return y

    whole(gates.model, ids, look)
    order = [sorted(range(1, BLOCKS), key=lambda k, i=i: -float(cosine[k][i]))[:2] for i in range(5)]
    gone = torch.tensor([[k in o for k in range(BLOCKS)] for o in order])
    assert len({tuple(o) for o in order}) > 1  # they decide differently

    def act(k: int, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(behind(x) & gone[:, k, None, None], x, y)

    wanted = whole(gates.model, ids, act)
    with torch.no_grad():
        torch.testing.assert_close(continued(gates, ids), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(continued(gates, ids, one_at_a_time=True), wanted, rtol=1e-4, atol=1e-4)
        alone = torch.cat([continued(gates, row, one_at_a_time=True) for row in ids.split(1)])
        torch.testing.assert_close(alone, wanted, rtol=1e-4, atol=1e-4)
        cache = step(gates, ids[:, :6])[1]
        assert torch.equal(gates.runs(cache), ~gone)
        step(gates, ids[:, 6:7], cache)
    for k, runs in enumerate((~gone).sum(0).tolist()):  # of what a sequence leaves out nothing is kept
        assert runs in (0, len(cache.layers[k].keys))


@pytest.mark.parametrize("measure", ["state", "softmax"])
def test_exits_against_a_plain_loop(measure: str) -> None:
    gates, ids = exiting(measure=measure, at=(1, 3)), windows(1, rows=5, seed=7)[0]
    left = torch.zeros(5, LENGTH, dtype=torch.bool)
    model = gates.model

    def act(k: int, x: Tensor, y: Tensor) -> Tensor:
        y = torch.where(left[..., None], x, y)
        if k in (1, 3):
            if measure == "state":
                doubt = 1 - nn.functional.cosine_similarity(x, y, dim=-1)
            else:
                top = model.lm_head(model.model.norm(y)).softmax(-1).sort(-1, descending=True).values
                doubt = 1 - top[..., 0] + top[..., 1]
            left.logical_or_((doubt < gates.threshold) & behind(x)[..., 0])
        return y

    wanted = whole(model, ids, act)
    share = float(left[:, LENGTH // 2 :].double().mean())
    assert 0 < share < 1
    with torch.no_grad():
        torch.testing.assert_close(continued(gates, ids), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(continued(gates, ids, one_at_a_time=True), wanted, rtol=1e-4, atol=1e-4)
        for row, known in zip(ids.split(1), wanted.split(1), strict=True):
            torch.testing.assert_close(continued(gates, row, one_at_a_time=True), known, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [skipping, exiting])
def test_generation_is_the_loop_by_hand(make: Callable[..., Any]) -> None:
    gates, ids = make(), windows(1)[0][:, :6]
    with torch.no_grad():
        made = gates.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        logits, cache = step(gates, ids)
        said = [logits[:, -1:].argmax(-1)]
        for _ in range(4):
            logits, cache = step(gates, said[-1], cache)
            said.append(logits.argmax(-1))
    assert torch.equal(made[:, 6:], torch.cat(said, 1))
    dense = gates.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert dense.shape == made.shape and "forward" not in gates.model.model.layers[3].__dict__


def test_left_padding_changes_nothing() -> None:
    gates, ids = skipping(), windows(1, rows=2, seed=3)[0]
    mask = torch.ones_like(ids)
    padded, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1), nn.functional.pad(mask, (3, 0))
    call = {"max_new_tokens": 4, "do_sample": False}
    plain = gates.generate(ids, attention_mask=torch.ones_like(ids), **call)[:, LENGTH:]
    assert torch.equal(plain, gates.generate(padded, attention_mask=mask, **call)[:, LENGTH + 3 :])


def test_what_is_left_out_is_not_computed() -> None:
    gates, ids = skipping(skip=3), windows()[0]
    dense = step_flops(gates.model, ids)
    block = dense.by_module["model.model.layers.1"]
    assert step_flops(gates, ids).total == dense.total - 3 * block == gates.record["flops"]["after"]
    early = exiting(at=(1, 3))
    early.decide = lambda place, doubt: torch.ones_like(doubt, dtype=torch.bool)
    found = step_flops(early, ids[:1])
    assert found.total == early.record["costs"][0]
    attention = "model.model.model.layers.4.self_attn"  # keys and values are still made of what has left
    by = found.by_module
    assert by[f"{attention}.k_proj"] == 2 * 16 * 8 and by[f"{attention}.v_proj"] == 2 * 16 * 8
    assert "model.model.model.layers.4.mlp" not in by and f"{attention}.o_proj" not in by
    softmax = exiting(measure="softmax", at=(1,))
    head = 2 * 16 * 50
    costs, plain = softmax.record["costs"], dense.total
    assert costs[1] == plain + head and costs[0] == early.record["costs"][0]  # what the exit said is not said again


def test_targets_and_drops() -> None:
    data = windows()
    gates = skipping(target="flops 30%")
    record = gates.record["flops"]
    assert (
        record["after"] <= 0.7 * record["before"] < record["after"] + (record["before"] - record["after"]) / gates.skip
    )
    assert set(gates.record["quality"]) == {"dense", "gated", "agreement"}
    none_out = skipping(drop=0.0)
    assert none_out.skip == 0 and "no block is left out" in none_out.told()
    model = llama()
    found = exit_decoding(model, data[0], data, target="flops 25%", at=(1, 2, 3))
    assert found.record["flops"]["after"] <= 0.75 * found.record["flops"]["before"]
    kept = exit_decoding(model, data[0], data, drop=0.2)
    assert kept.record["quality"]["agreement"] >= 0.8
    none = exit_decoding(model, data[0], data, threshold=1e-7)
    assert "no token leaves" in none.told() and none.record["quality"]["agreement"] == 1.0
    every = exit_decoding(model, data[0], data, threshold=2.0)
    assert "every token leaves at the first exit" in every.told()


def test_measured_in_turns() -> None:
    gates = skipping(skip=3)
    found = measured_tokens(gates, windows())
    assert found["gated"]["flops"]["mean"] < found["dense"]["flops"]["mean"]
    assert found["dense"]["perplexity"] == pytest.approx(gates.record["quality"]["dense"], rel=1e-4)
    assert found["gated"]["perplexity"] == pytest.approx(gates.record["quality"]["gated"], rel=1e-4)
    assert found["agreement"] == pytest.approx(gates.record["quality"]["agreement"])


def test_refusals() -> None:
    data, model = windows(), llama()
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
    ).eval()
    for make in (skip_decoding, exit_decoding):
        with pytest.raises(ModelError, match=r"keeps no cache|is not given the cache|are not given the cache"):
            make(bert, data[0], data)
        with pytest.raises(ModelError, match="has no blocks"):
            make(_Bare(), data[0], data)
        with pytest.raises(DataError, match="token ids"):
            make(model, torch.zeros(2, 4), data)
        with pytest.raises(DataError, match="at least four tokens"):
            make(model, data[0], [data[0][:, :3]])
        with pytest.raises(RecipeError, match="in FLOPs"):
            make(model, data[0], data, target="params 20%")
        with pytest.raises(RecipeError, match="out of reach"):
            make(model, data[0], data, target="flops 99%")
        with pytest.raises(RecipeError, match="drop is 1"):
            make(model, data[0], data, drop=1.0)
    with pytest.raises(RecipeError, match="skip is 4: of 5 blocks 0 to 3"):
        skipping(skip=4)
    for knobs, words in (
        ({"threshold": 0.0}, "no token would leave"),
        ({"threshold": 3.0}, "every one would leave"),
        ({"measure": "entropy"}, "one of state, softmax"),
        ({"at": (4,)}, "blocks 0 to 3"),
        ({"threshold": 0.1, "drop": 0.1}, "one of target, drop, threshold"),
    ):
        with pytest.raises(RecipeError, match=words):
            exit_decoding(model, data[0], data, **knobs)  # type: ignore[arg-type]
    gates = skipping()
    with pytest.raises(RecipeError, match="beam search"):
        gates.generate(data[0], num_beams=2)
    cache = step(gates, data[0])[1]
    with pytest.raises(ModelError, match="3 sequences and its continuation has 2"):
        step(gates, data[0][:2, :1], cache)


class _Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 4), nn.Linear(4, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.embedding(input_ids))
        return found


def test_a_cache_of_the_dense_model_is_continued_densely() -> None:
    gates, ids = skipping(), windows()[0]
    with torch.no_grad():
        cache = step(gates.model, ids[:, :6])[1]
        known = step(gates.model, ids[:, 6:7], copy.deepcopy(cache))[0]
        torch.testing.assert_close(step(gates, ids[:, 6:7], cache)[0], known)


def test_from_the_command_line_and_back(tmp_path: Path) -> None:
    here, out = tmp_path / "tiny.py", tmp_path / "out"
    here.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.runtime.test_decoding import llama as model\n"
        "from tests.runtime.test_decoding import windows as texts\n"
    )
    words = ["prune", f"{here}:model", "--method", "skip-decoding", "--set", "skip-decoding.skip=2"]
    done = CliRunner().invoke(app, [*words, "--data", f"{here}:texts", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "MFLOPs a token, mean" in done.output and "perplexity" in done.output
    ids = windows()[0]
    with torch.no_grad():
        torch.testing.assert_close(continued(secateur.load(out), ids), continued(skipping(), ids))


def test_saved_and_loaded(tmp_path: Path) -> None:
    gates, ids = exiting(measure="softmax", at=(1, 3)), windows()[0]
    secateur.save(gates, tmp_path / "out")
    again: Any = secateur.load(tmp_path / "out")
    assert isinstance(again, ExitDecoding) and again.threshold == gates.threshold and again.places == (1, 3)
    with torch.no_grad():
        found, known = (continued(m, ids, one_at_a_time=True) for m in (again, gates))
    torch.testing.assert_close(found, known)


def test_one_block_is_named_by_its_number() -> None:
    """As --set exit-decoding.at=1 does."""
    assert exiting(at=1).places == (1,)


def test_a_mask_may_be_given_by_position() -> None:
    gates, ids = skipping(), windows(1, rows=2, seed=3)[0]
    padded, mask = nn.functional.pad(ids, (3, 0)), nn.functional.pad(torch.ones_like(ids), (3, 0))
    with torch.no_grad():
        caches = [gates(padded, mask).past_key_values, gates(input_ids=padded, attention_mask=mask).past_key_values]
    assert torch.equal(*(torch.stack(gates.plans[c].doubts) for c in caches))


def test_one_tensor_of_ids_is_one_batch() -> None:
    ids = windows()[0]
    assert skip_decoding(llama(), ids, ids, skip=1).record == skip_decoding(llama(), ids, [ids], skip=1).record


def test_padded_texts_are_refused() -> None:
    from secateur.runtime.decoding import decoded

    ids = windows()[0]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    for make in (skip_decoding, exit_decoding):
        with pytest.raises(DataError, match="texts of the data are padded"):
            make(llama(), ids, [{"input_ids": ids, "attention_mask": mask}])
    fast: Any = secateur.prune(llama(), "h2o", budget=6, example=ids)
    with pytest.raises(DataError, match="texts of the data are padded"):
        decoded(fast, [{"input_ids": ids, "attention_mask": mask}])


@pytest.mark.parametrize(("method", "given", "length"), [
    ("skip-decoding", [], 128), ("skip-decoding", ["--length", "40"], 40), ("skip-decoding", ["--length", "512"], 512),
    ("cats", [], 512), ("cats", ["--length", "40"], 40),
])  # fmt: skip
def test_length_is_what_was_asked_for(
    method: str, given: list[str], length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def batches(source: str, data: Any, net: Any, count: int, tokens: int) -> tuple[list[Any], None]:
        asked.append(tokens)
        raise DataError("enough")

    monkeypatch.setattr("secateur.cli_runtime.batches_of", batches)
    llama().save_pretrained(tmp_path / "net")
    words = ["prune", str(tmp_path / "net"), "--method", method, "--data", "text:some", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, [*words, *given]).exit_code != 0
    assert asked == [length]
