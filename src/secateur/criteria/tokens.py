"""Criteria of the tokens of one input, scored on what the model computes of them as it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..registry import register

#: What tokens score that receive others, and so stay: above every negative cosine.
_RECEIVES = 2.0


def nearest(key: Tensor, all_key: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The token of odd position whose key is most like each of ``key``: the cosine, and its number among the odd ones.

    Args:
        key: ``(..., some, width)``.
        all_key: of all tokens, ``(..., tokens, width)``.
        free: ``(tokens,)`` or ``(..., tokens)``; what is not free receives nothing.
    """
    others = normalize(all_key[..., 1::2, :].float(), dim=-1)
    cosine = normalize(key.float(), dim=-1) @ others.mT
    found = cosine.masked_fill(~free[..., None, 1::2], -torch.inf).max(-1)
    return found.values, found.indices


@register("criterion", name="token-redundancy", family="redundancy", paper="2210.09461", of="token", survey="A3.6")
def token_redundancy(token_key: Tensor, token_free: Tensor) -> Tensor:
    """How unlike a token is to the one that could take it up: tokens of even position against those of odd position.

    :: s_i = - max_j cos(k_i, k_j), i even, j odd

    Tokens of odd position, which receive, score 2, more than any other. The key is the mean over heads.

    Choose it for merging tokens while a model runs (tome).

    Beware: only half of the tokens can go at once.

    >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> token_redundancy(key, torch.ones(3, dtype=torch.bool)).tolist()
    [-0.0, 2.0, -1.0]

    Source: Bolya et al., ToMe, arXiv 2210.09461, section 3 (bipartite soft matching), and the official code.
    """
    score = torch.full(token_key.shape[:-1], _RECEIVES, dtype=torch.float32, device=token_key.device)
    if token_key.shape[-2] > 1:
        score[..., ::2] = -nearest(token_key[..., ::2, :], token_key, token_free)[0]
    return score


@register("criterion", name="attention-received", family="activation", paper="2202.07800", of="token", survey="A3.6")
def attention_received(token_attention: Tensor, *, own: bool = True) -> Tensor:
    """How much attention a token gets: from the class token, or from all tokens; mean over heads and over those.

    :: s_i = 1/H sum_h softmax(q_class k^T / sqrt(d))_i,  or  1/(H n) sum_h sum_j a_h,ji

    ``token_attention`` is ``(..., heads, queries, tokens)``, with the queries whose attention counts. Without ``own``,
    what a token gives to itself does not count; queries are all tokens then.

    Choose it where one token makes the answer: what it does not look at, it does not need.

    Beware: attention in the first blocks says little about what matters.

    >>> attention_received(torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]])).tolist()
    [0.5, 0.5]
    >>> attention_received(torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]), own=False).tolist()
    [0.25, 0.125]

    Source: Liang et al., EViT, arXiv 2202.07800, section 3.2 (class token); Goyal et al., PoWER-BERT, arXiv 2001.08950,
    section 3.2 (all tokens; the official code leaves out a token's own). Sums there are means here: the same order.
    """
    attention = token_attention.float()
    if not own:
        attention = attention - torch.diag_embed(attention.diagonal(dim1=-2, dim2=-1))
    return attention.mean((-3, -2))
