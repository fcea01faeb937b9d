"""Criteria of whole blocks: what is lost when one is taken out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


@register("criterion", name="block-influence", family="activation", paper="2403.03853", of="block")
def block_influence(block_cosine: Tensor) -> Tensor:
    """How far a block turns the hidden state.

    :: BI = 1 - E[cos(x_in, x_out)]

    Choose it for removing blocks of a language model from one forward pass.

    Beware: blocks are scored as if each went alone.

    >>> block_influence(torch.tensor([0.5, 1.0])).tolist()
    [0.5, 0.0]

    Source: Men et al., ShortGPT, arXiv 2403.03853, equation 1.
    """
    return 1 - block_cosine


@register("criterion", name="angular", family="activation", paper="2403.17887", of="block")
def angular(block_path: Tensor, block_free: Tensor, count: int) -> Tensor:
    """The run of ``count`` successive blocks between whose ends the last token's hidden state turns least.

    :: d(l, l + n) = E[arccos(cos(x_l, x_{l+n}))] / pi

    ``block_path`` is ``(blocks + 1, windows, width)``: the state of the last token in front of each block and after
    the last. Blocks of the best run score 0, others 1; a run goes around blocks that may not go, where one can.

    Choose it for taking much depth out of a large language model.

    Beware: one run goes, wherever it is; on small models single blocks cost less.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 1.0]])
    >>> angular(x[:, None], torch.tensor([True, True, True]), 2).tolist()
    [1.0, 0.0, 0.0]

    Source: Gromov et al., The unreasonable ineffectiveness of the deeper layers, arXiv 2403.17887, section 3.2.
    """
    blocks = block_path.shape[0] - 1
    ends = torch.nn.functional.cosine_similarity(block_path[: blocks + 1 - count], block_path[count:], dim=-1)
    distance = ends.clamp(-1, 1).arccos().mean(1) / torch.pi
    held = (~block_free).float().unfold(0, count, 1).sum(1)  # in each run; one costs more than any turn
    start = int((distance + 2 * held).argmin())
    score = torch.ones(blocks)
    score[start : start + count] = 0
    return score


@register("criterion", name="loss-without", family="loss", paper="2402.09025", of="block", again=True)
def loss_without(block_loss: Tensor) -> Tensor:
    """The loss of the model without the block, measured anew after each removal.

    :: s_k = L(model without block k)

    Choose it where the passes can be afforded: it looks at what matters.

    Beware: blocks times removals forward passes over the data.

    >>> loss_without(torch.tensor([2.5, 2.25])).tolist()
    [2.5, 2.25]

    Source: Song et al., SLEB, arXiv 2402.09025, metric 3 and algorithm 1.
    """
    return block_loss
