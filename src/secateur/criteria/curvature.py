"""Criteria that look at second derivatives: of the loss, or of a layer's output error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..registry import register
from ..symmetric import among, factor, in_blocks

if TYPE_CHECKING:
    from ..granularity import Granularity
    from ..solvers.curvature import Curvature


@register("criterion", family="curvature", paper="1801.05787", scales={"weight": 2, "fisher": 1})
def fisher(weight: Tensor, fisher: Tensor) -> Tensor:
    """The rise of the loss, to second order, with the empirical Fisher's diagonal as the Hessian.

    :: s = F w^2 / 2,  F = mean (dL/dw)^2

    Choose it for trained networks, and for ranking weights of all layers together.

    Beware: the Fisher is that of the batches given: use small ones, for gradients cancel within a batch.

    >>> import torch
    >>> fisher(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, 4.0]])).tolist()
    [[1.0, 2.0]]

    Source: Theis et al., Faster gaze prediction with dense networks and Fisher pruning, arXiv 1801.05787;
    for groups Liu et al., arXiv 2108.00708.
    """
    return 0.5 * fisher * weight.square()


@register("criterion", family="curvature", scales={"weight": 2, "hessian": 1})
def obd(weight: Tensor, hessian: Tensor, *, probes: int = 4) -> Tensor:
    """Optimal brain damage: the rise of the loss, to second order, with the Hessian's own diagonal.

    :: s = max(h, 0) w^2 / 2

    Choose it for small trained networks where a second derivative can be paid for.

    Beware: it assumes a minimum, where h >= 0. A negative estimate (noise, or a model not trained out)
    counts as flat, so those weights tie at zero and go first; draw more probes on each batch if they are many.

    >>> import torch
    >>> obd(torch.tensor([[-2.0, 1.0, 3.0]]), torch.tensor([[0.5, 4.0, -1.0]])).tolist()
    [[1.0, 2.0, 0.0]]

    Source: LeCun, Denker and Solla, Optimal brain damage, NIPS 1989.
    """
    return 0.5 * hessian.clamp_min(0) * weight.square()


@register(
    "criterion",
    name="unit-hessian",
    family="curvature",
    paper="1906.10771",
    of="unit",
    scales={"unit_change": 1, "unit_curvature": 1},
)
def unit_hessian(unit_change: Tensor, unit_curvature: Tensor, *, probes: int = 16) -> Tensor:
    """The size of the loss change without the unit, to second order, with all of the Hessian between its weights.

    :: s_u = |mean over batches of w_u^T H w_u / 2 - sum over its weights of w dL/dw|

    Choose it when a loss is at hand and a dozen more backward passes on each batch can be paid for: it is exact where
    the loss is quadratic in a unit's weights, as a squared error is in those that read it (granularity channel).

    Beware: w^T H w is estimated with random signs of units, probes of them on each batch, and what units share is its
    noise, which ranks worse than first order where probes and batches are few: draw more. Biases and the scales of
    normalizations do not count.

    >>> import torch
    >>> unit_hessian(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 4.0], [4.0, 0.0]])).tolist()
    [1.0, 1.0]

    Source: Molchanov et al., Importance estimation, arXiv 1906.10771, second-order Taylor: their official code squares
    this sum for gates, whose Hessian it computes; here the gate is a factor on the unit's weights.
    """
    return (unit_curvature.mean(0) / 2 - unit_change.mean(0)).abs()


@register(
    "criterion",
    family="curvature",
    paper="2101.08940",
    of="unit",
    scales={"unit_trace": 1, "unit_square": 1, "unit_size": -1},
)
def hap(unit_trace: Tensor, unit_square: Tensor, unit_size: Tensor, *, probes: int = 4) -> Tensor:
    """Hessian-aware pruning: the mean curvature of a unit's weights times their squared norm.

    :: s_u = max(Tr H_u, 0) / (2 p) |w_u|^2,  p weights in the unit

    Choose it with granularity filter for trained convolutional networks, when second derivatives can be paid for:
    the trace of a unit is far less noisy than its single entries.

    Beware: it assumes a minimum; a negative trace counts as flat.

    >>> import torch
    >>> hap(torch.tensor([4.0, -1.0]), torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0])).tolist()
    [3.0, 0.0]

    Source: Yu et al., Hessian-aware pruning and optimal neural implant, arXiv 2101.08940; the official code takes
    the trace of a filter's block by Hutchinson's estimate, without the half and without the maximum.
    """
    return unit_trace.clamp_min(0) * unit_square / (2 * unit_size)


@register("criterion", family="curvature", paper="2004.14340", scales={"weight": 2, "fisher_inverse": -1})
def woodfisher(weight: Tensor, fisher_inverse: Tensor) -> Tensor:
    """The rise of the loss when the weight goes and its block makes up for it, with the inverse Fisher.

    :: s = w^2 / (2 [F^-1]_qq),  F = damp I + mean g g^T in blocks

    Choose it for trained networks at high sparsity where weights are correlated and data is at hand.

    Beware: memory is the block size (50) times the weights; the rank of a block is the number of batches, so
    give at least as many.

    >>> import torch
    >>> woodfisher(torch.tensor([[-2.0, 1.0]]), torch.tensor([[2.0, 0.25]])).tolist()
    [[1.0, 2.0]]

    Source: Singh and Alistarh, WoodFisher, arXiv 2004.14340; blocks of 50 as in Kurtic et al.,
    oBERT, arXiv 2203.07259.
    """
    return weight.square() / (2 * fisher_inverse)


@register("criterion", family="curvature", paper="2203.07259", scales={"weight": 2})
def obert(
    weight: Tensor,
    fisher_blocks: Tensor,
    mask: Tensor,
    granularity: Granularity,
    *,
    fisher_block: int = 50,
    fisher_damp: float = 1e-7,
) -> Tensor:
    """The rise of the loss when a weight, or a group of them, goes and the rest of its block makes up for it.

    :: s_Q = w_Q^T ([F_SS^-1]_QQ)^-1 w_Q / 2,  F = damp I + mean g g^T in blocks, S what earlier rounds left

    A single weight has w^2 / (2 [F_SS^-1]_qq). A group has the score of the whole, shared evenly by its weights.

    Choose it with solver obs, in rounds with training between them; unlike woodfisher it knows groups, and that what
    earlier rounds took does not come back to help.

    Beware: memory is the block size times the weights; the rank of a block is the number of batches, so give at least
    as many (1,024 in the official recipe). A group that lies in several blocks of the Fisher is the sum of its parts.

    >>> import torch
    >>> from secateur.granularity import parse
    >>> w, f, all_ = torch.tensor([[2.0, 1.0]]), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.ones(1, 2).bool()
    >>> obert(w, f, all_, parse("element")).tolist(), obert(w, f, all_, parse("block(1,2)")).tolist()
    ([[3.0, 0.75]], [[3.5, 3.5]])

    Source: Kurtic et al., The optimal BERT surgeon, arXiv 2203.07259, section 3, with the block size and the damping
    of its official code, where the gradients of pruned weights are left out too. Groups are of four in a row there.
    """
    shape = (weight.shape[0], weight.shape[1])
    pools, units, elements = granularity.pool_shape(*shape)
    number = torch.arange(1, pools * units + 1, device=weight.device).view(pools, units)
    parts = []
    for (w, left, unit), fisher in in_blocks(fisher_blocks, weight.double(), mask, granularity.unpool(number, shape)):
        inverse = torch.cholesky_inverse(factor(among(fisher, left)))
        if elements == 1:
            parts.append(w.square() / (2 * inverse.diagonal(dim1=1, dim2=2)))
            continue
        own = inverse * (unit[:, :, None] == unit[:, None, :])
        parts.append(w * torch.cholesky_solve(w[..., None], factor(own))[..., 0] / 2)
    score = torch.cat(parts).reshape(-1)[: weight.numel()].reshape(shape)
    return granularity.unpool(granularity.pool(score) / elements, shape).float()


@register("criterion", family="curvature", scales={"weight": 2, "curvature": 1})
def obs(weight: Tensor, curvature: Curvature, *, damp: float = 0.01) -> Tensor:
    """Layer-wise optimal brain surgeon: the output error when the weight goes and its row makes up for it.

    :: s = w^2 / (2 [H^-1]_qq),  H = X X^T + damp mean(diag X X^T) I

    Choose it for one-shot pruning with calibration data, with a solver that moves the survivors.

    Beware: with the rank solver nothing makes up for the loss, and wanda is the better score. Weights that
    read an input which is always zero score zero.

    >>> import torch
    >>> from secateur.solvers.curvature import Curvature
    >>> obs(torch.tensor([[-2.0, 1.0]]), Curvature(torch.diag(torch.tensor([4.0, 1.0]))), damp=0.0).tolist()
    [[8.0, 0.5]]

    Source: Hassibi and Stork, Optimal brain surgeon, NIPS 1992; layer by layer as in Dong et al.,
    arXiv 1705.07565.
    """
    # H^-1 = U^T U, so its diagonal is the sum of squares of each column of U.
    inverse_diagonal = curvature.inverse_factor(damp).square().sum(0)
    return (weight.square() / (2 * inverse_diagonal)).masked_fill(curvature.dead, 0.0)
