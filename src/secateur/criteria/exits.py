"""Criteria of one input between two blocks of a model: how far from its answer it still is. What is not, may leave."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..registry import register


@register("criterion", name="exit-entropy", family="activation", paper="1709.01686", of="exit", survey="A3.8")
def exit_entropy(exit_logits: Tensor) -> Tensor:
    """The entropy of the answer that an exit gives, in nats: 0 where it is certain.

    :: s = - sum_c p_c log p_c, p = softmax(z)

    Choose it for exits of classifiers (early-exit): an input whose entropy is below a threshold leaves.

    Beware: networks are surer than they are right; thresholds are calibrated on data that they were not trained on.

    >>> [round(x, 4) for x in exit_entropy(torch.tensor([[0.0, 0.0], [50.0, 0.0]])).tolist()]
    [0.6931, 0.0]

    Source: Teerapittayanon et al., BranchyNet, arXiv 1709.01686, section III.
    """
    log = exit_logits.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1).clamp_max(0.0)


@register("criterion", name="softmax-response", family="activation", paper="2207.07061", of="exit", survey="A3.8")
def softmax_response(exit_logits: Tensor) -> Tensor:
    """How near the second answer is to the first: one minus the difference of the two largest probabilities.

    :: s = 1 - (p_(1) - p_(2)), p = softmax(z)

    Choose it for tokens of a language model (exit-decoding): the paper finds it the best of its three measures.

    Beware: it takes the whole output layer at each exit, which in a small model costs as much as several blocks.

    >>> softmax_response(torch.tensor([[0.0, 0.0, -50.0]])).tolist()
    [1.0]

    Source: Schuster et al., CALM, arXiv 2207.07061, from descriptions of the paper; one minus its confidence.
    """
    top = exit_logits.float().softmax(-1).topk(2, -1).values
    return 1 - (top[..., 0] - top[..., 1])


@register("criterion", name="state-saturation", family="activation", paper="2207.07061", of="exit", survey="A3.8")
def state_saturation(state_before: Tensor, state_after: Tensor) -> Tensor:
    """How much a block turns the hidden state of an input: one minus the cosine between what enters and what leaves it.

    :: s = 1 - cos(h_l, h_{l+1})

    Choose it where an exit must cost nothing (exit-decoding), or to see which blocks do little for an input
    (skip-decoding).

    Beware: in pre-norm transformers the state grows with depth, so later blocks turn it less whether
    they matter or not.

    >>> state_saturation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).tolist()
    [1.0]

    Source: Schuster et al., CALM, arXiv 2207.07061 (hidden-state saturation), from descriptions of the paper; He et
    al., AdaSkip, arXiv 2501.02336 (similarity of input and output), for the same measure as a reason to skip.
    """
    return (1 - cosine_similarity(state_before.float(), state_after.float(), dim=-1)).clamp_min(0)
