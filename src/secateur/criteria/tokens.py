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


@register("criterion", name="token-recency", family="activation", paper="2309.17453", of="token", survey="A3.6")
def token_recency(token_position: Tensor) -> Tensor:
    """How late in its text a token stands.

    :: s_i = i

    Choose it for windows that move along with a text (streaming).

    Beware: it looks at no content at all.

    >>> token_recency(torch.tensor([0, 1, 5])).tolist()
    [0.0, 1.0, 5.0]

    Source: the window of Xiao et al., StreamingLLM, arXiv 2309.17453, section 3.2.
    """
    return token_position.float()


@register("criterion", name="activation-size", family="activation", paper="2408.14690", of="token", survey="A3.1")
def activation_size(activation: Tensor) -> Tensor:
    """How far a feature of one token is from zero.

    :: s_i = |x_i|

    Choose it for leaving out, token by token, the columns of a weight that hardly count (teal, cats).

    Beware: it does not see how large the column is.

    >>> activation_size(torch.tensor([-2.0, 0.5])).tolist()
    [2.0, 0.5]

    Source: Liu et al., TEAL, arXiv 2408.14690, section 4.1.
    """
    return activation.abs().float()


@register("criterion", name="routing-share", family="activation", paper="2402.14800", of="token", survey="A3.9")
def routing_share(expert_weight: Tensor) -> Tensor:
    """What an expert's routing weight is for one token, as a share of the largest that the token has.

    :: s_j = w_j / max_k w_k

    Choose it for skipping experts token by token (expert-skipping).

    Beware: it trusts the router; what the expert would add is not looked at.

    >>> routing_share(torch.tensor([0.5, 0.25])).tolist()
    [1.0, 0.5]

    Source: Lu et al., arXiv 2402.14800, section 3.3 (dynamic skipping), for any number of experts.
    """
    weight = expert_weight.float()
    return weight / weight.amax(-1, keepdim=True)
