"""Criteria for networks that have not been trained."""

from __future__ import annotations

from torch import Tensor

from ..registry import register


@register("criterion", family="saliency", paper="2002.07376", scales={"weight": 1, "hessian_gradient": 1})
def grasp(weight: Tensor, hessian_gradient: Tensor, *, temperature: float = 200.0) -> Tensor:
    """How much the weight does for the norm of the gradient, to first order: what goes is what holds it back.

    :: s = w (H g),  g and H of the loss with the model's outputs divided by the temperature

    Choose it before training, with a batch in which the classes are balanced.

    Beware: weights with the largest -w (H g) go, by sign, as in the official code; the paper's text ranks the same
    way, and by size it would be another method. Give the temperature 1 for losses that are not cross-entropies.
    Batch norms that have seen no batch normalize by the batch, as there.

    >>> import torch
    >>> grasp(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, 3.0]])).tolist()
    [[-1.0, 3.0]]

    Source: Wang et al., Picking winning tickets before training by preserving gradient flow (GraSP),
    arXiv 2002.07376, equation 8 and its official code.
    """
    return weight * hessian_gradient


@register("criterion", family="saliency", paper="2006.05467", scales={"flow": 1})
def synflow(weight: Tensor, flow: Tensor) -> Tensor:
    """The share of the flow from input to output that passes the weight, with all signs removed: no data.

    :: s = |w| dR/d|w| / R,  R = 1^T (prod_l |W_l|) 1

    Choose it before training for very high sparsity, in many rounds (schedule geometric).

    Beware: the linear network of absolute weights is looked at, as in the paper's equation 2: biases and smooth
    activations are left out, normalizations only scale. In one round it can empty a layer too. For transformers it is
    an extension of the paper: attention lets queries, keys and values pass the flow alike, embeddings give ones.

    >>> import torch
    >>> synflow(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.25, 0.5]])).tolist()
    [[0.5, 0.5]]

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow,
    arXiv 2006.05467, equation 2 and algorithm 1, and its official code, in float64.
    """
    return (weight * flow).abs()


@register(
    "criterion", family="saliency", paper="2202.08132", survey=("C1.3", "C2.2"),
    scales={"weight": 1, "meta_gradient": 1},
)  # fmt: skip
def prospr(
    weight: Tensor, meta_gradient: Tensor, *, unroll: int = 3, rate: float = 0.1, momentum: float = 0.0
) -> Tensor:  # fmt: skip
    """How much the loss after a few steps of SGD moves, to first order, when the weight is gone from the start.

    :: s = |w dL(w_k)/dw_0|,  w_{t+1} = w_t - rate (momentum v_t + dL/dw_t)

    Choose it before training, with one batch for each of the ``unroll`` steps and one more.

    Beware: the graph of all steps is kept in memory. Batches are taken in turn, the last one for the final loss.

    >>> import torch
    >>> prospr(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, 3.0]])).tolist()
    [[1.0, 3.0]]

    Source: Alizadeh et al., Prospect pruning, arXiv 2202.08132, and its official code, full meta-gradients.
    """
    return (weight * meta_gradient).abs()


@register("criterion", name="ntk-sap", family="saliency", paper="2304.02840", scales={"tangent": 1})
def ntk_sap(tangent: Tensor, *, draws: int = 1, epsilon: float = 0.01, samples: int = 64) -> Tensor:
    """How much a gate on the weight moves the nuclear norm of the neural tangent kernel, for weights drawn anew.

    :: s = |d/dm sum ||f(m w) - f(m (w + e))||^2|,  e ~ N(0, epsilon^2), inputs ~ N(0, 1)

    Choose it before training, without data, in rounds (schedule geometric).

    Beware: weights are redrawn normally with each layer's own spread, where the official code calls the network's
    initialization. Token ids cannot be drawn: those of the example are used.

    >>> import torch
    >>> ntk_sap(torch.tensor([[-2.0, 1.0]])).tolist()
    [[2.0, 1.0]]

    Source: Wang et al., NTK-SAP, arXiv 2304.02840, and its official code.
    """
    return tangent.abs()


@register(
    "criterion", name="sensitivity-per-flop", family="saliency", paper="2007.00389", of="unit",
    scales={"unit_change": 1},
)  # fmt: skip
def sensitivity_per_flop(unit_change: Tensor, unit_flops: Tensor, *, power: float = 1.0) -> Tensor:
    """How much the loss moves with a gate on the unit, for each operation that goes with it.

    :: s_u = |mean over batches of sum over its weights of w dL/dw| / FLOPs^power

    Choose it before training, with granularity channel and a target in FLOPs; power 0 is SNAP's score.

    Beware: operations are those that go with one unit of the dense model; later cuts next door make them fewer.

    >>> import torch
    >>> sensitivity_per_flop(torch.tensor([[1.0, 2.0], [-3.0, 0.0]]), torch.tensor([2.0, 1.0])).tolist()
    [0.5, 1.0]

    Source: van Amersfoort et al., Single shot structured pruning before training (3SP), arXiv 2007.00389, from its
    abstract and introduction ("sensitivity per FLOP removed"); Verdenius et al., SNAP, arXiv 2006.00896.
    """
    return unit_change.mean(0).abs() / unit_flops.to(unit_change.dtype) ** power
