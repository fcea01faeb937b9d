"""Methods before training: each a line of data. ``snip`` is among the one-shot ones, ``random-erk`` in training."""

from __future__ import annotations

from typing import Any

from .oneshot import method


def initial(name: str, summary: str, *, family: str = "saliency", **card: Any) -> None:
    """A method that ranks the weights of a whole untrained network."""
    method(name, summary, family=family, when="before", allocation="global", propagate="off", **card)


initial(
    "iterative-snip",
    "SNIP in rounds: score what is left, cut the same share of it, and score again.",
    choose="Choose it in place of snip from 95 % on.",
    beware="the official code draws new batches for each round; here all rounds see the same ones.",
    source="de Jorge et al., Progressive skeletonization (FORCE), arXiv 2006.09081, Iter SNIP in the official code; "
    "Verdenius et al., SNIP-it, arXiv 2006.00896, has the same rounds on another schedule.",
    paper="2006.09081",
    criterion="saliency",
    schedule="geometric",
    steps=60,
)
initial(
    "force",
    "SNIP in rounds that rank all weights by what the pruned network's gradient says: weights may come back.",
    choose="Choose it in place of snip from 95 % on, for networks that are initialized to keep the scale (Kaiming).",
    beware="with torch's default initialization, biases included, and batch norms the masks can swing from round to "
    "round and empty a layer: look at them, or take iterative-snip. The official code draws new batches for each "
    "round; here all rounds see the same ones.",
    source="de Jorge et al., Progressive skeletonization (FORCE), arXiv 2006.09081, and its official code.",
    paper="2006.09081",
    criterion="saliency",
    schedule="geometric",
    steps=60,
    nested=False,
)
initial(
    "grasp",
    "Remove the weights without which the gradient of the pruned network is largest.",
    choose="Choose it before training at 90 to 98 %, with a batch in which the classes are balanced.",
    beware="the class-balanced batch is for you to draw: ten examples of each class in the official code.",
    source="Wang et al., Picking winning tickets before training by preserving gradient flow (GraSP), "
    "arXiv 2002.07376, and its official code.",
    paper="2002.07376",
    criterion="grasp",
)
initial(
    "synflow",
    "Remove the weights through which the least of the flow from input to output passes; no data, 100 rounds.",
    choose="Choose it before training at 99 % and more: it empties no layer while another choice exists.",
    beware="it looks at the shape of an input and at no data; give one as example or data. Branches beside residual "
    "connections may go as a whole.",
    source="Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, "
    "arXiv 2006.05467, and its official code.",
    paper="2006.05467",
    criterion="synflow",
    schedule="geometric",
    steps=100,
)
initial(
    "prospr",
    "Remove the weights whose gate changes the loss least after a few steps of training.",
    choose="Choose it in place of snip when the memory for a few steps of training at once is there.",
    source="Alizadeh et al., Prospect pruning, arXiv 2202.08132, and its official code.",
    paper="2202.08132",
    criterion="prospr",
)
initial(
    "ntk-sap",
    "Remove the weights whose gates change the neural tangent kernel least, for weights and inputs drawn anew.",
    choose="Choose it before training without data, when how the network trains is to stay as it is.",
    source="Wang et al., NTK-SAP, arXiv 2304.02840, and its official code: 20 rounds as in its script.",
    paper="2304.02840",
    criterion="ntk-sap",
    schedule="geometric",
    steps=20,
)


def gated(name: str, summary: str, **card: Any) -> None:
    """A method over channels, neurons and heads of a whole untrained network."""
    granularities = ("coupled", "filter", "channel")
    method(name, summary, family="saliency", when="before", granularities=granularities, granularity="channel", **card)


gated(
    "snap",
    "SNIP for channels, neurons and heads: remove those whose gate changes the loss least.",
    choose="Choose it for a smaller dense network before training.",
    beware="the official code puts a gate at a node's input and output, which doubles every score, leaves the first "
    "and the last layer whole, and ranks raw scores over the network; so does this, but for groups of channels that "
    "are tied by residual connections, which go together.",
    source="Verdenius et al., Pruning via iterative ranking of sensitivity statistics (SNAP), arXiv 2006.00896, and "
    "its official code.",
    paper="2006.00896",
    criterion="sensitivity-per-flop",
    allocation="raw",
    knobs={"criterion": {"power": 0.0}},
)
gated(
    "3sp",
    "Remove the channels, neurons and heads whose gate changes the loss least for each operation that goes with it.",
    choose="Choose it for a faster dense network before training, with a target in FLOPs.",
    beware="written from the paper's description, not from its equations or code, which were not at hand.",
    source="van Amersfoort et al., Single shot structured pruning before training (3SP), arXiv 2007.00389.",
    paper="2007.00389",
    criterion="sensitivity-per-flop",
    allocation="raw",
)
