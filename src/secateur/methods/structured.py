"""Structured methods after training: recipes over coupled units."""

from __future__ import annotations

from .oneshot import method

_WHOLE = ("coupled", "filter")

method(
    "l1-norm",
    "Remove the filters, neurons and heads with the smallest weights, the same share everywhere.",
    choose="Choose it as the data-free baseline of structured pruning.",
    beware="the same share in every layer spares no sensitive one.",
    source="Li et al., Pruning filters for efficient ConvNets, arXiv 1608.08710.",
    paper="1608.08710",
    family="magnitude",
    granularities=_WHOLE,
    criterion="magnitude",
    granularity="filter",
)
method(
    "group-norm",
    "Remove the coupled units whose weights, in every layer that they touch, are smallest together.",
    choose="Choose it for a smaller model without data, on any architecture.",
    source="Fang et al., DepGraph: towards any structural pruning, arXiv 2301.12900, the group norm without its "
    "sparse training.",
    paper="2301.12900",
    family="magnitude",
    granularities=_WHOLE,
    criterion="magnitude",
    granularity="coupled",
    allocation="global",
    knobs={"criterion": {"p": 2.0}},
)
method(
    "taylor",
    "Remove the coupled units whose removal changes the loss least, to first order, weight by weight.",
    choose="Choose it when there are labels and a loss.",
    beware="the sizes of the single terms are summed, as in LLM-Pruner's element-wise score; Molchanov et al. sum "
    "a unit's terms first and square the sum.",
    source="Molchanov et al., Importance estimation for neural network pruning, arXiv 1906.10771; Ma et al., "
    "LLM-Pruner, arXiv 2305.11627.",
    paper="1906.10771",
    family="saliency",
    granularities=_WHOLE,
    criterion="saliency",
    granularity="coupled",
    allocation="global",
)
