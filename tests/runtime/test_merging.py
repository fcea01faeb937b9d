"""ToMe's matching against a plain loop, sizes against tokens that are really there twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.runtime import tome
from secateur.runtime.act import Merge, Seen

from .models import classifier, images, vectors, vit


def merged_by_hand(x: Tensor, key: Tensor, size: list[float], protected: int, r: int) -> tuple[Tensor, list[float]]:
    """One image: the r even tokens most like an odd one go into it."""
    n = len(x)
    even = [i for i in range(0, n, 2) if i >= protected]
    odd = [j for j in range(1, n, 2) if j >= protected]
    best = {i: max(odd, key=lambda j: float(torch.cosine_similarity(key[i], key[j], dim=0))) for i in even}
    like = {i: float(torch.cosine_similarity(key[i], key[best[i]], dim=0)) for i in even}
    gone = sorted(even, key=lambda i: -like[i])[:r]
    total, weight = {j: x[j] * size[j] for j in range(n)}, list(size)
    for i in gone:
        total[best[i]] = total[best[i]] + x[i] * size[i]
        weight[best[i]] += size[i]
    order = [*range(protected), *(i for i in even if i not in gone), *odd]
    return torch.stack([total[j] / weight[j] for j in order]), [weight[j] for j in order]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(3, 17), protected=st.integers(0, 3), batch=st.integers(1, 3), seed=st.integers(0, 10**6),
    share=st.floats(0, 1),
)  # fmt: skip
def test_matching_is_that_of_a_plain_loop(tokens: int, protected: int, batch: int, seed: int, share: float) -> None:
    act = Merge()
    r = round(share * act.most(tokens, min(protected, tokens)))
    if r < 1:
        return
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 5, generator=g, dtype=torch.float64)
    key = torch.randn(batch, tokens, 4, generator=g)
    size = torch.randint(1, 5, (batch, tokens), generator=g).float()
    out, sizes = act(x.float(), Seen(key, None, size, protected), r)
    assert out.shape == (batch, tokens - r, 5)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))  # nothing is lost
    torch.testing.assert_close((out * sizes[..., None]).sum(1), (x.float() * size[..., None]).sum(1))
    for b in range(batch):
        wanted, weight = merged_by_hand(x[b].float(), key[b], size[b].tolist(), protected, r)
        torch.testing.assert_close(out[b], wanted)
        assert sizes[b].tolist() == weight
        exact = act(x, Seen(key, None, size, protected), r)[0]
        torch.testing.assert_close(exact[b], merged_by_hand(x[b], key[b], size[b].tolist(), protected, r)[0])


@pytest.mark.parametrize("special", [0, 1])
def test_tokens_that_are_there_twice_can_be_merged_without_a_trace(special: int) -> None:
    """Equal tokens merge first; then attention by size, and the mean by size, are those over the tokens apart."""
    net = classifier(special, pool=True)
    x = vectors().repeat_interleave(2, dim=1)
    fast = tome(net, x, r=20)
    assert fast.run(x)[1][0] == 20 + special
    pace = secateur.runtime.Pace(r=20, at=(0,))  # only the first gate, where the two are really equal
    once = secateur.runtime.TokenGates(net, fast.structure, fast.act, pace, {})
    torch.testing.assert_close(once(x), net(x), rtol=1e-4, atol=1e-5)
    plain = secateur.runtime.TokenGates(net, fast.structure, Merge(weighs=False), pace, {})
    assert not torch.allclose(plain.run(x[:, :39])[0], net(x[:, :39]), rtol=1e-3, atol=1e-3)  # one is there once


def test_attention_by_size_is_attention_over_the_tokens_apart() -> None:
    """Two equal tokens that are one by now: the class token sees no difference."""
    net = classifier(1)
    x = vectors(2, 9)
    x[:, 1] = x[:, 2]  # positions 2 and 3 behind the class token: an even and an odd one
    fast = tome(net, x, r=1)
    once = secateur.runtime.TokenGates(net, fast.structure, fast.act, secateur.runtime.Pace(r=1, at=(0,)), {})
    out, tokens = once.run(x)
    assert tokens == [9, 9, 9]
    torch.testing.assert_close(out, net(x), rtol=1e-4, atol=1e-5)


def test_nothing_leaves_and_nothing_changes() -> None:
    net, x = vit(), images()
    assert torch.equal(tome(net, x, r=0)(x), net(x))
    assert torch.equal(tome(net, x, keep=1.0)(x), net(x))


def test_images_of_a_batch_decide_for_themselves() -> None:
    net, x = vit(), images(6)
    fast = tome(net, x[:1], r=9)
    together = fast(x)
    torch.testing.assert_close(together, torch.cat([fast(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, net(x), atol=1e-4)


def test_the_model_is_as_it_was() -> None:
    net, x = vit(), images()
    before = net(x)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    fast = secateur.prune(net, "tome", target="flops 40%", example=x)
    fast(x)
    assert torch.equal(net(x), before)
    assert net.state_dict().keys() == state.keys() and all(
        torch.equal(v, net.state_dict()[k]) for k, v in state.items()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_gradients_flow() -> None:
    net, x = vit(), images()
    fast = tome(net, x, r=6)
    fast(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_half_precision() -> None:
    net, x = vit().bfloat16(), images().bfloat16()
    fast = tome(net, x, r=6)
    assert fast(x).dtype == torch.bfloat16 and torch.isfinite(fast(x)).all()
