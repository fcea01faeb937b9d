"""Optimal brain surgeon on the loss: its Fisher in blocks says what a weight is worth, and how the others make up."""

from __future__ import annotations

import torch
from torch import Tensor

from ..granularity import Granularity
from ..registry import register
from ..select import select
from ..symmetric import among, factor, in_blocks
from .base import Solved


@register("solver", paper="2203.07259", rounds=True)
def obs(weight: Tensor, score: Tensor, fisher_blocks: Tensor, keep: float, granularity: Granularity) -> Solved:
    """Choose the mask by score; within each block of the Fisher the survivors make up for the loss.

    :: min over d of d^T F d / 2  subject to  d_Q = -w_Q;  d_S = F_SS^-1 F_SQ w_Q

    Q are the weights of a block that go, S those that stay. What earlier rounds took stays at zero.

    Choose it with criterion obert, in rounds with fine-tuning between them.

    Beware: the loss is taken for a quadratic with its minimum here: go in steps, from a trained model. Directions in
    which no batch has a gradient cost nothing but the damping, so few batches let the survivors move far.

    Source: Kurtic et al., The optimal BERT surgeon, arXiv 2203.07259, the update for groups, with Q all weights of a
    block that go in this round; the official code adds up the updates of single weights, or of groups, instead.
    """
    shape = (weight.shape[0], weight.shape[1])
    kept = granularity.unpool(select(granularity.pool(score), keep), shape)
    moved = []
    for (w, stays), fisher in in_blocks(fisher_blocks, weight.double(), kept):
        s = stays.to(w.dtype)
        pull = torch.einsum("pbc,pc->pb", fisher, w * (1 - s)) * s
        moved.append(w * s + torch.cholesky_solve(pull[..., None], factor(among(fisher, stays)))[..., 0])
    changed = torch.cat(moved).reshape(-1)[: weight.numel()].reshape(shape).float()
    return Solved(torch.where(kept, changed, 0.0), kept)
