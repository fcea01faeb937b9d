"""Encoders with padding: a batch gives what its inputs give alone, each keeps its own exact number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.criteria.tokens import attention_received
from secateur.errors import ModelError
from secateur.runtime import Pace, TokenGates, evit, power_bert, tome
from secateur.runtime.act import Fuse, Merge, Seen
from secateur.runtime.padding import padding
from secateur.select import keep_count

from .models import Block, classifier, vectors

METHODS = {"tome": tome, "evit": evit, "power-bert": power_bert}


class Padded(Block):
    """A block whose attention has the mask of padding, as transformers makes it: True attends."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Embedder(nn.Module):
    """Token ids and a mask to the mean of the tokens that are none of the padding, as sentence embeddings are made."""

    def __init__(self, depth: int = 3, adds: bool = False, front: bool = False) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(40, 16), nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Padded(16, 2) for _ in range(depth))
        self.adds, self.front = adds, front

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        seen = attention_mask[:, None, None].bool().expand(-1, 1, ids.shape[1], -1)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if self.adds else seen
        for block in self.blocks:
            x = block(x, mask)
        if self.front:
            return x[:, 0]
        m = attention_mask.unsqueeze(-1).expand(x.size()).float()
        return torch.sum(x * m, 1) / torch.clamp(m.sum(1), min=1e-9)


def embedder(adds: bool = False, front: bool = False) -> Embedder:
    torch.manual_seed(0)
    return Embedder(adds=adds, front=front).eval()


def texts(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (len(lengths), max(lengths)), generator=g)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"ids": ids * mask, "attention_mask": mask}


def alone(batch: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    n = int(batch["attention_mask"][k].sum())
    return {name: x[k : k + 1, :n] for name, x in batch.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("adds", "front"), [(False, False), (True, False), (False, True)])
def test_a_batch_with_padding_is_its_inputs_alone(method: str, adds: bool, front: bool) -> None:
    net, batch = embedder(adds, front), texts([19, 12, 3, 1, 19])
    fast = METHODS[method](net, batch, keep=0.7)
    assert fast.structure.protected == int(front)
    together, tokens = fast.run(**batch)
    each = [fast.run(**alone(batch, k)) for k in range(5)]
    torch.testing.assert_close(together, torch.cat([out for out, _ in each]), rtol=1e-4, atol=1e-5)
    assert tokens[-1] >= max(t[-1] for _, t in each) and tokens[-1] < 19
    same = TokenGates(net, fast.structure, fast.act, Pace(r=0), {})
    torch.testing.assert_close(same(**batch), net(**batch))


def test_each_input_keeps_its_own_number() -> None:
    net, batch = embedder(), texts([20, 10, 5])
    fast = power_bert(net, batch, keep=0.5, at=(0,))
    tokens = fast.run(**batch)[1]
    assert tokens == [10, 10, 10]
    for k, n in enumerate((20, 10, 5)):
        assert fast.run(**alone(batch, k))[1] == [keep_count(0.5, n)] * 3


def test_the_mean_is_that_of_the_tokens_that_remain() -> None:
    """By hand: tokens that are merged count twice, in the sum and in its divisor."""
    net, batch = embedder(), texts([8, 6])
    fast = tome(net, batch, r=3, at=(2,))
    seen: list[Tensor] = []
    net.blocks[2].register_forward_hook(lambda m, a, out: seen.append(out))
    out = fast(**batch)
    assert seen[0].shape[1] == 5
    by_hand = TokenGates(net, fast.structure, Merge(weighs=False), fast.pace, {})(**batch)
    assert not torch.allclose(by_hand, out)  # sizes 1 in place of those
    twice = {name: x.repeat_interleave(2, 1) for name, x in texts([5]).items()}
    net.position = nn.Embedding.from_pretrained(torch.zeros(32, 16))
    pairs = TokenGates(net, fast.structure, Merge(), Pace(r=5, at=(0,)), {})
    torch.testing.assert_close(pairs(**twice), net(**twice), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), keep=st.floats(0.1, 1.0), seed=st.integers(0, 10**6),
    merge=st.booleans(), fuse=st.booleans(),
)  # fmt: skip
def test_acts_on_padding(lengths: list[int], keep: float, seed: int, merge: bool, fuse: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    n, batch = max(lengths), len(lengths)
    real = torch.arange(n) < torch.tensor(lengths)[:, None]
    x, key = torch.randn(batch, n, 3, generator=g), torch.randn(batch, n, 2, generator=g)
    attention = torch.rand(batch, 2, n, n, generator=g) * real[:, None, None] * real[:, None, :, None]
    act = Merge() if merge else Fuse(fuse, every=True)
    leave = [min(k - keep_count(keep, k), act.most(k, 0)) for k in lengths]
    scaled = attention * (n / torch.tensor(lengths))[:, None, None, None]  # as gates do: the mean is over real queries
    out, size = act(x * real[..., None], Seen(key, scaled, real.float(), 0, lengths), leave)
    for b, k in enumerate(lengths):
        one = Seen(key[b : b + 1, :k], attention[b : b + 1, :, :k, :k], torch.ones(1, k), 0)
        wanted, sizes = act(x[b : b + 1, :k], one, leave[b])
        there = size[b] > 0
        found = torch.cat([out[b][there], size[b][there, None]], 1)
        own = torch.cat([wanted[0], sizes[0, :, None]], 1)
        if not leave[b]:  # alone it is not touched; in a batch it is sorted as the others are
            found, own = found[found[:, 0].argsort()], own[own[:, 0].argsort()]
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_significance_by_a_plain_loop() -> None:
    a = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = attention_received(a, own=False)
    for b in range(2):
        wanted = [sum(float(a[b, h, j, i]) for h in range(3) for j in range(5) if j != i) / 15 for i in range(5)]
        assert found[b].tolist() == pytest.approx(wanted)


def test_what_is_padding_and_what_is_not() -> None:
    valid = torch.tensor([[True, True, False], [True, False, False]])
    never = torch.finfo(torch.float32).min
    added = torch.zeros(2, 1, 1, 3).masked_fill(~valid[:, None, None], never)
    for mask in (valid[:, None, None], valid[:, None, None].expand(2, 4, 3, 3), added, added.expand(2, 1, 3, 3)):
        found = padding(mask, 2, 3)
        assert found is not None and torch.equal(found, valid)
    for mask in (torch.ones(3, 3).tril().bool(), added + 0.5, torch.randn(2, 4, 3, 3), valid[:, None, None, :2]):
        assert padding(mask, 2, 3) is None


def test_masks_of_torch_modules() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.encoder(x, src_key_padding_mask=mask == 0)
            return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    torch.manual_seed(0)
    net, x, mask = Encoder().eval(), vectors(2, 9), texts([9, 5])["attention_mask"]
    for method in METHODS.values():
        fast = method(net, (x, mask), keep=0.6)
        assert fast.run(x, mask)[1][-1] < 9
        short = fast(x[1:, :5], mask[1:, :5])
        torch.testing.assert_close(fast(x, mask)[1:], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_no_padding_after_all(method: str) -> None:
    """A mask that hides nothing, also where it is given to every block: the same as none."""
    net, batch = embedder(), texts([9, 9])
    fast = METHODS[method](net, batch, keep=0.6)
    alone_too = torch.cat([fast(**alone(batch, k)) for k in range(2)])
    torch.testing.assert_close(fast(**batch), alone_too, rtol=1e-4, atol=1e-5)
    assert fast.run(**batch)[1][-1] < 9


def test_refused() -> None:
    net, batch = embedder(), texts([9, 5])
    fast: Any = tome(net, batch, r=2)
    empty = {**batch, "attention_mask": batch["attention_mask"] * torch.tensor([[1], [0]])}
    with pytest.raises(ModelError, match="input 1 of the batch is all padding"):
        fast(**empty)
    with pytest.raises(ModelError, match="as integers"):
        fast(batch["ids"], batch["attention_mask"].bool())
    front: Any = power_bert(embedder(front=True), batch, keep=0.5)
    with pytest.raises(ModelError, match="pad behind"):
        front(**{name: x.flip(1) for name, x in batch.items()})
    with pytest.raises(ModelError, match="an entry for each token"):
        power_bert(classifier(1).blocks, vectors(), keep=0.5)
