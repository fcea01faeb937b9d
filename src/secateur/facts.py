"""What a part may name as a positional parameter: every fact, what it is, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: ``engine``: made without data. ``inputs``: statistics of what each layer reads. ``gradients``: of each weight.
#: ``unrolled``: gradients of each weight that take all batches together. ``shape``: of each weight, for which the shape
#: of an input is enough. ``maps``: of the feature maps that a convolution reads. ``blocks`` and ``experts``: of whole
#: pieces of the model. ``tokens``, ``channels`` and ``exits``: of those of one input, and of one input between two
#: blocks, as the model runs. ``training``: what only a training run shows (`secateur.attach`), which shows the gradient
#: too.
Source = Literal[
    "engine",
    "inputs",
    "gradients",
    "unrolled",
    "shape",
    "maps",
    "blocks",
    "experts",
    "tokens",
    "channels",
    "exits",
    "training",
]


@dataclass(frozen=True)
class Fact:
    """One fact: what it is, with its shape, where it comes from, and whether measuring it takes a loss."""

    text: str
    source: Source
    loss: bool = False


FACTS: dict[str, Fact] = {
    "weight": Fact("the weight matrix, (o, i)", "engine"),
    "stored": Fact("the weight as its layer stores it, (o, i, ...)", "engine"),
    "budget": Fact("how many values the layer may keep", "engine"),
    "mask_size": Fact("what a mask of the layer takes, in values", "engine"),
    "score": Fact("the criterion's score, (o, i)", "engine"),
    "keep": Fact("the fraction of the layer that stays", "engine"),
    "granularity": Fact("how the matrix is cut into units", "engine"),
    "generator": Fact("a random generator of the layer's own", "engine"),
    "pool_shape": Fact("how many pools, and units in each, the granularity cuts the matrix into", "engine"),
    "mask": Fact("what is left, by earlier rounds, bool, (o, i)", "engine"),
    "curvature": Fact("the damped Gram matrix of the input and its factors", "engine"),
    "count": Fact("how many pieces go", "engine"),
    "block_free": Fact("which blocks of a list may go, bool, (blocks,)", "engine"),
    "unit_square": Fact("sum of the squares of a unit's weights that the granularity counts, (units,)", "engine"),
    "unit_size": Fact("how many of a unit's weights the granularity counts, (units,)", "engine"),
    "unit_flops": Fact("operations of one forward pass that go with a unit, (units,)", "engine"),
    "scale": Fact("the scales of one normalization, (units,)", "engine"),
    "input_norm": Fact("l2 norm of each input feature over all tokens, (i,)", "inputs"),
    "input_mean": Fact("mean of each input feature, (i,)", "inputs"),
    "input_var": Fact("variance of each input feature over tokens, (i,)", "inputs"),
    "input_abs": Fact("mean absolute value of each input feature, (i,)", "inputs"),
    "input_nonzero": Fact("share of rows in which each input feature is not zero, (i,)", "inputs"),
    "gram": Fact("sum over tokens of x x^T, (i, i), float32", "inputs"),
    "tokens": Fact("how many rows were seen", "inputs"),
    "gradient": Fact("mean over batches of the loss gradient, (o, i)", "gradients", loss=True),
    "fisher": Fact(
        "mean over batches of the squared gradient: the diagonal of the empirical Fisher, (o, i)",
        "gradients",
        loss=True,
    ),
    "fisher_inverse": Fact(
        "diagonal of the inverse of the damped, block-wise empirical Fisher, (o, i)", "gradients", loss=True
    ),
    "fisher_blocks": Fact(
        "the damped empirical Fisher in blocks of successive weights, row after row, (blocks, b, b), float64",
        "gradients",
        loss=True,
    ),
    "hessian": Fact("diagonal of the Hessian of the loss, estimated with random signs, (o, i)", "gradients", loss=True),
    "hessian_gradient": Fact(
        "the Hessian of the loss times its gradient, both summed over batches, (o, i)", "unrolled", loss=True
    ),
    "meta_gradient": Fact(
        "gradient of the loss after a few steps of SGD, by the weight before them, (o, i)", "unrolled", loss=True
    ),
    "flow": Fact(
        "gradient of log R by |w|, where R sums the outputs of the linear network of absolute weights on an input of "
        "ones, (o, i), float64",
        "shape",
    ),
    "tangent": Fact(
        "gradient, by a gate on the weight, of how far outputs move when weights drawn anew are perturbed: the nuclear "
        "norm of the neural tangent kernel, (o, i)",
        "shape",
    ),
    "unit_change": Fact(
        "weight times gradient in each batch, summed over those of a unit's weights that the granularity counts, "
        "(batches, units)",
        "gradients",
        loss=True,
    ),
    "unit_curvature": Fact(
        "w^T H w over the same weights, one estimate for each batch and draw of signs, (batches x probes, units)",
        "gradients",
        loss=True,
    ),
    "unit_trace": Fact("sum of the Hessian's diagonal over the same weights, (units,)", "gradients", loss=True),
    "map_rank": Fact("mean rank of each feature map that a convolution reads, (channels,)", "maps"),
    "map_independence": Fact(
        "nuclear norm lost with each of the feature maps that a convolution reads, mean over images, (channels,)",
        "maps",
    ),
    "block_cosine": Fact("mean cosine between the input and the output of each block, (blocks,)", "blocks"),
    "block_path": Fact(
        "last token's hidden state in front of each block and after the last, (blocks + 1, windows, width)", "blocks"
    ),
    "block_loss": Fact("loss of the model without each block, (blocks,)", "blocks", loss=True),
    "token_key": Fact("the key of each token, mean over heads, (..., tokens, width)", "tokens"),
    "token_free": Fact("which tokens may go and may receive others, bool, (tokens,)", "tokens"),
    "token_attention": Fact(
        "attention of the queries that count to each token, (..., heads, queries, tokens)", "tokens"
    ),
    "channel_size": Fact("mean absolute value of each channel that a convolution reads, (batch, inputs)", "channels"),
    "channel_map": Fact("what a convolution and its norm made, (..., outputs, positions)", "channels"),
    "gate_weight": Fact("weight of what predicts channels, learned, (outputs, inputs)", "channels"),
    "gate_bias": Fact("bias of what predicts channels, learned, (outputs,)", "channels"),
    "exit_logits": Fact("logits of what an exit answers, (..., classes)", "exits"),
    "state_before": Fact("the hidden state that a block is given, (..., width)", "exits"),
    "state_after": Fact("the hidden state that a block gives, (..., width)", "exits"),
    "token_position": Fact("where each token stands in its text, (..., tokens)", "tokens"),
    "activation": Fact("what a token's features are as a layer reads them, (..., features)", "tokens"),
    "expert_weight": Fact("routing weights of the experts that a token is sent to, (..., experts)", "tokens"),
    "momentum": Fact("the optimizer's momentum; of Adam over the root of its second moment, (o, i)", "training"),
    "movement": Fact("minus the sum over steps of weight times gradient, (o, i)", "training"),
    "sensitivity": Fact("exponential mean over steps of |weight times gradient|, (o, i)", "training"),
    "uncertainty": Fact("exponential mean over steps of how far that is from its mean, (o, i)", "training"),
    "sign": Fact("the sign that a weight was born with, True for plus, bool, (o, i)", "training"),
    "cluster": Fact("which of the values that survivors share a weight has, -1 for none, (o, i)", "training"),
    "expert_tokens": Fact("how many tokens the router sends to each expert, (experts,)", "experts"),
    "expert_gain": Fact(
        "mean over an expert's tokens of its routing weight times the l2 norm of its output, (experts,)", "experts"
    ),
}


def of_source(*sources: Source) -> dict[str, str]:
    """The facts of these sources: name -> what it is.

    >>> sorted(of_source("experts"))
    ['expert_gain', 'expert_tokens']
    """
    return {name: fact.text for name, fact in FACTS.items() if fact.source in sources}
