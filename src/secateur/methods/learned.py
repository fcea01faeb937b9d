"""Methods whose masks are learned, or prepared by a penalty: each a line of data."""

from __future__ import annotations

from typing import Any

from .oneshot import method

#: The target falls at every step, and the last quarter of the run is for the weights that stay.
_STEADILY = {"every": 1}
_UNITS = ("coupled", "filter", "channel")
_SMALLER = " After session.finish(), secateur.plan(net, '{}', example=x, target=...).shrink() is the smaller model."


def gated(name: str, summary: str, *, knobs: dict[str, dict[str, Any]] | None = None, **card: Any) -> None:
    """A method by a gate whose target density comes down while the model trains."""
    settings: dict[str, Any] = {
        "criterion": None, "allocation": "global", "driver": "gradual", "schedule": "linear", "when": "during",
        "gate": name, "family": "learned", "granularities": ("element", "row"),
    }  # fmt: skip
    if card.get("driver", "gradual") == "gradual":
        knobs = {"driver": _STEADILY, **(knobs or {})}
    method(name, summary, **{**settings, **card, "knobs": knobs or {}})


gated(
    "str",
    "Soft thresholds, one learned for each layer, under a density that comes down to the target.",
    choose="Choose it to learn how much each layer keeps.",
    beware="the paper has no target, only weight decay on the thresholds: penalty none and the gate's decay.",
    source="Kusupati et al., Soft threshold weight reparameterization (STR), arXiv 2002.03231.",
    paper="2002.03231",
    penalty="lagrangian",
    knobs={"penalty": {"gain": 0.3, "stiffness": 100.0}},  # few gates, against the loss of all weights of a layer
)
gated(
    "dst",
    "A threshold learned for each output row, under a density that comes down to the target.",
    choose="Choose it where rows should differ in how many weights they keep.",
    beware="the paper has no target, but a penalty on small thresholds: penalty regularizer.",
    source="Liu et al., Dynamic sparse training with trainable masked layers, arXiv 2005.06870.",
    paper="2005.06870",
    penalty="lagrangian",
    granularities=("element",),
)
gated(
    "pdp",
    "A soft mask by the weights' own size, whose threshold rises to the target.",
    choose="Choose it in place of gmp; nothing is learned beside the weights.",
    source="Cho et al., PDP: parameter-free differentiable pruning, arXiv 2305.11203.",
    paper="2305.11203",
    granularities=("element", "row", "N:M"),
)
gated(
    "l0",
    "Hard concrete gates of single weights, under an expected count that comes down to the target.",
    choose="Choose it to learn by gradient which weights go.",
    beware="wants Adam; gates have a learning rate of their own: knobs={'gate': {'lr': ...}}.",
    source="Louizos et al., L0 regularization, arXiv 1712.01312; the target as in Xia et al., CoFi, arXiv 2204.00408.",
    paper="1712.01312",
    penalty="lagrangian",
    granularities=("element", "row", "N:M", "block"),
)
method(
    "l0-units",
    "Hard concrete gates of channels, neurons and heads, under an expected size that comes down to the target.",
    choose="Choose it to learn by gradient which units go." + _SMALLER.format("group-norm"),
    beware="the expected size counts the weights that the granularity counts of each unit, not what two units that go "
    "have in common: the smaller model's size is set by plan's target.",
    source="Louizos et al., L0 regularization, arXiv 1712.01312; the target as in Xia et al., CoFi, arXiv 2204.00408.",
    paper="1712.01312",
    family="learned",
    when="during",
    granularities=_UNITS,
    criterion=None,
    granularity="coupled",
    driver="gradual",
    schedule="linear",
    gate="l0",
    penalty="lagrangian",
    knobs={"driver": _STEADILY},
)
method(
    "tas",
    "A distribution over the widths of each layer, learned with the weights, under an expected size.",
    choose="Choose it to learn by gradient how wide each layer is to be." + _SMALLER.format("group-norm"),
    beware="without a recovery its batch norms are measured anew, and nothing else. In the paper the widths found are "
    "trained anew, with the dense network as a teacher (0.9 of the loss at temperature 4, as recovery distill has it); "
    "here distill goes on with the weights, and scratch has no teacher. The expected size counts the weights that the "
    "granularity counts of each unit, not FLOPs.",
    source="Dong and Yang, Network pruning via transformable architecture search, arXiv 1905.09717.",
    paper="1905.09717",
    family="learned",
    when="during",
    granularities=_UNITS,
    criterion=None,
    granularity="coupled",
    driver="gradual",
    schedule="linear",
    gate="tas",
    penalty="lagrangian",
    knobs={"driver": _STEADILY},
)
gated(
    "continuous-sparsification",
    "Sigmoid gates that harden over the run, under a target density.",
    choose="Choose it in place of l0 where nothing should be drawn.",
    source="Savarese et al., Winning the lottery with continuous sparsification, arXiv 1912.04427.",
    paper="1912.04427",
    penalty="lagrangian",
    driver="once",
    schedule="one-shot",
    granularities=("element", "row", "N:M", "block"),
)
gated(
    "variational-dropout",
    "A noise level learned for each weight; the noisiest go.",
    choose="Choose it to compare with a Bayesian view of pruning.",
    beware="the penalty's strength stands for one over the number of training examples: set it.",
    source="Molchanov et al., Variational dropout sparsifies deep neural networks, arXiv 1701.05369.",
    paper="1701.05369",
    penalty="regularizer",
    knobs={"penalty": {"warmup": 0.3}},
)
gated(
    "edge-popup",
    "The best subnetwork of an untrained network: scores are learned, weights are not.",
    choose="Choose it to study what a random network holds.",
    source="Ramanujan et al., What's hidden in a randomly weighted neural network?, arXiv 1911.13299.",
    paper="1911.13299",
    when="before",
    driver="once",
    schedule="one-shot",
    allocation="uniform",
    granularities=("element", "row", "N:M", "block"),
)
gated(
    "maskllm",
    "N:M masks learned as a choice among all candidates, for weights that stay as they are.",
    choose="Choose it for 2:4 language models when a few thousand steps of training are affordable.",
    source="Fang et al., MaskLLM, arXiv 2409.17481.",
    paper="2409.17481",
    gate="gumbel-nm",
    penalty="regularizer",
    granularity="2:4",
    driver="once",
    schedule="one-shot",
    allocation="uniform",
    granularities=("N:M",),
    knobs={"penalty": {"strength": 1e-5}},
)

method(
    "l1",
    "Train with an l1 penalty, cut the smallest weights at three quarters of the run, train on.",
    choose="Choose it as the baseline of sparsity regularization.",
    source="Han et al., Learning both weights and connections, arXiv 1506.02626.",
    paper="1506.02626",
    family="regularization",
    when="during",
    criterion="magnitude",
    allocation="global",
    driver="gradual",
    penalty="l1",
    knobs={"driver": {"begin": 0.75, "end": 0.75}},
)
method(
    "admm-training",
    "Train toward the nearest sparse weights, cut at three quarters of the run, train on.",
    choose="Choose it from a trained network, under any granularity.",
    source="Zhang et al., A systematic DNN weight pruning framework using ADMM, arXiv 1804.03294.",
    paper="1804.03294",
    family="regularization",
    criterion="magnitude",
    driver="gradual",
    penalty="admm-training",
    knobs={"driver": {"begin": 0.75, "end": 0.75}},
)


def penalized(name: str, summary: str, *, choose: str, **card: Any) -> None:
    """A method that penalizes units while the model trains; the same recipe plans the smaller model."""
    settings: dict[str, Any] = {
        "family": "regularization", "when": "during", "granularities": _UNITS, "granularity": "coupled",
        "criterion": "magnitude", "allocation": "global", "penalty": name,
    }  # fmt: skip
    settings.update(card)
    if settings["criterion"] == "magnitude":
        settings["knobs"] = {"criterion": {"p": 2.0}}
    method(name, summary, choose=choose + _SMALLER.format(name), **settings)


penalized(
    "group-lasso",
    "Train with a group lasso on channels, neurons and heads, which makes whole ones small.",
    choose="Choose it to train a network that is to be made smaller.",
    source="Wen et al., Learning structured sparsity in deep neural networks (SSL), arXiv 1608.03665; over coupled "
    "units as in Fang et al., DepGraph, arXiv 2301.12900.",
    paper="1608.03665",
)
penalized(
    "slimming",
    "Train with an l1 penalty on the scales of batch normalizations, then rank channels by them.",
    choose="Choose it for convolutional networks with batch normalization.",
    source="Liu et al., Network slimming, arXiv 1708.06519.",
    paper="1708.06519",
    criterion="norm-scale",
)
penalized(
    "ista-bn",
    "Shrink the scales of batch normalizations to exact zeros, then rank channels by them.",
    choose="Choose it in place of slimming where exact zeros should show what is needed.",
    source="Ye et al., Rethinking the smaller-norm-less-informative assumption, arXiv 1802.00124.",
    paper="1802.00124",
    criterion="norm-scale",
)
penalized(
    "greg",
    "A weight decay that grows on the filters that are to go, until they have faded.",
    choose="Choose it from a trained network.",
    source="Wang et al., Neural pruning via growing regularization (GReg-1), arXiv 2012.09243.",
    paper="2012.09243",
    when="after",
    granularity="filter",
    allocation="uniform",
)
penalized(
    "oto",
    "Zero-invariant groups, shrunk and projected on zero while the network trains.",
    choose="Choose it to train and prune in one run.",
    source="Chen et al., Only train once (OTO), arXiv 2107.07467.",
    paper="2107.07467",
)
penalized(
    "hesso",
    "Zero-invariant groups, scaled to zero in periods, by count.",
    choose="Choose it to train and prune in one run, without a strength to be searched for.",
    source="Chen et al., HESSO, arXiv 2409.09085.",
    paper="2409.09085",
)
