"""One-shot methods after training: each a line of data."""

from __future__ import annotations

from typing import Any

from ..recipe import DERIVED, Recipe
from ..registry import Card, Part, _parts

_ALL = ("element", "row", "N:M", "block")


def method(
    name: str,
    summary: str,
    *,
    choose: str,
    source: str,
    family: str,
    beware: str = "",
    paper: str | None = None,
    when: str = "after",
    granularities: tuple[str, ...] = _ALL,
    survey: tuple[str, ...] = (),
    **recipe: Any,
) -> None:
    """Register a named method: a recipe with a card."""
    built = Recipe(method=name, **recipe)
    facts = {"recipe": built, "family": family, "paper": paper, "when": when, "granularities": granularities}
    if survey:
        facts["survey"] = survey
    card = Card(summary=summary, choose=choose, beware=beware, source=source)
    shelf = _parts.setdefault("method", {})
    shelf[name] = Part("method", name, lambda: built, tuple(sorted(built.needs() - DERIVED)), {}, card, facts)


_WANDA = "Sun et al., A simple and effective pruning approach for LLMs, arXiv 2306.11695."
_SPARSEGPT = "Frantar and Alistarh, SparseGPT, arXiv 2301.00774."
_OWL = "Yin et al., Outlier weighed layerwise sparsity (OWL), arXiv 2310.05175."

method(
    "random",
    "Remove weights at random: the baseline that every method must beat.",
    choose="Choose it as the baseline of a comparison.",
    source="Common practice.",
    family="baseline",
    criterion="random",
)
method(
    "magnitude",
    "Remove the smallest weights of each layer.",
    choose="Choose it when there is no data, or before long fine-tuning.",
    beware="in one shot it breaks language models from about 50 % on.",
    source="Han et al., Learning both weights and connections, arXiv 1506.02626.",
    paper="1506.02626",
    family="magnitude",
    criterion="magnitude",
)
method(
    "global-magnitude",
    "Remove the smallest weights of the whole model.",
    choose="Choose it for convolutional networks before fine-tuning.",
    beware="can empty a whole layer at high sparsity.",
    source="Han et al., Learning both weights and connections, arXiv 1506.02626.",
    paper="1506.02626",
    family="magnitude",
    criterion="magnitude",
    allocation="global",
)
method(
    "kernel-patterns",
    "Every kernel of 3 x 3 keeps four weights, in one of the eight patterns that its layer has.",
    choose="Choose it for 3 x 3 convolutions on processors whose compiler knows the patterns.",
    beware="name the layers that have such kernels with only; nothing here is faster for it.",
    source="Niu et al., PatDNN, arXiv 2001.00138, section 4.1, without its training and its removal of kernels.",
    paper="2001.00138",
    family="magnitude",
    criterion="magnitude",
    granularity="4:9",
    granularities=("N:M",),
    solver="kernel-patterns",
    sparsity=5 / 9,
)
method(
    "lamp",
    "Magnitude with the layer-adaptive global allocation.",
    choose="Choose it for a data-free allocation over layers of different scale.",
    source="Lee et al., Layer-adaptive sparsity, arXiv 2010.07611.",
    paper="2010.07611",
    family="magnitude",
    criterion="magnitude",
    allocation="lamp",
)
method(
    "snip",
    "Remove the weights whose gate changes the loss least, over the whole model (first-order Taylor).",
    choose="Choose it before training, or with labels after it.",
    beware="one batch decides; at extreme sparsity a layer can be emptied. Batch norms that have seen no batch "
    "normalize by the batch, as in training; those that have, by their statistics.",
    source="Lee et al., SNIP, arXiv 1810.02340; Molchanov et al., arXiv 1906.10771 for the Taylor reading.",
    paper="1810.02340",
    family="saliency",
    when="before",
    criterion="saliency",
    allocation="global",
    propagate="off",
)
method(
    "fisher",
    "Remove the weights with the smallest diagonal-Fisher loss change, over the whole model.",
    choose="Choose it with labels and no Hessian.",
    source="Theis et al., Faster gaze prediction, arXiv 1801.05787.",
    paper="1801.05787",
    family="loss change",
    criterion="fisher",
    allocation="global",
    propagate="off",
)
method(
    "obd",
    "Optimal brain damage: second-order loss change with a diagonal Hessian.",
    choose="Choose it with labels on a small, converged model.",
    source="LeCun et al., Optimal brain damage, NeurIPS 1989.",
    family="loss change",
    criterion="obd",
    allocation="global",
    propagate="off",
)
method(
    "woodfisher",
    "Second-order loss change with a block-diagonal inverse of the empirical Fisher.",
    choose="Choose it with labels when accuracy matters more than minutes.",
    source="Singh and Alistarh, WoodFisher, arXiv 2004.14340.",
    paper="2004.14340",
    family="loss change",
    criterion="woodfisher",
    allocation="global",
    propagate="off",
)
method(
    "wanda",
    "Weight magnitude times input norm, compared within each output row; the weights do not move.",
    choose="Choose it for the fastest data-driven pruning of a language model.",
    beware="above 60 % its perplexity climbs fast: use owl-sparsegpt or admm.",
    source=_WANDA,
    paper="2306.11695",
    family="llm",
    criterion="wanda",
    granularity="row",
)
method(
    "ria",
    "Relative importance of a weight in its row and column, times activations.",
    choose="Choose it as wanda's alternative when N:M patterns hurt whole channels.",
    source="Zhang et al., Plug-and-play (RIA), ICLR 2024, and its official code.",
    family="llm",
    criterion="ria",
    granularity="row",
)
method(
    "sparsegpt",
    "Column sweep with optimal brain surgeon updates of the weights that stay.",
    choose="Choose it for one-shot pruning with lower error than wanda, most of all with N:M.",
    source=_SPARSEGPT,
    paper="2301.00774",
    family="llm",
    criterion=None,
    solver="sparsegpt",
)
method(
    "gptq",
    "Quantize column by column: later columns make up for what rounding cost the ones before; nothing is removed.",
    choose="Choose it to quantize a language model to 4 bits, also one that was pruned before (--sparsity as it has).",
    beware="zeros are kept as integers, not skipped: pruning on top makes files no smaller in this layout.",
    source="Frantar et al., GPTQ, arXiv 2210.17323.",
    paper="2210.17323",
    family="llm",
    survey=("B3.6", "D1", "E4"),
    criterion="magnitude",
    solver="gptq",
    sparsity=0.0,
)
method(
    "obc",
    "Exact optimal brain surgeon, row by row: the reference for small layers.",
    choose="Choose it for small layers, or to judge a faster solver.",
    beware="cubic in the input size for every row.",
    source="Frantar et al., Optimal brain compression, arXiv 2208.11580.",
    paper="2208.11580",
    family="loss change",
    granularities=("element", "row", "N:M"),
    criterion=None,
    solver="obc",
)
method(
    "obq",
    "Optimal brain surgeon for integers: weights go, then survivors are rounded, the cheapest of each row first.",
    choose="Choose it for small layers at 2 to 4 bits, or to judge a faster solver.",
    beware="cubic in the input size for every row.",
    source="Frantar et al., Optimal brain compression, arXiv 2208.11580.",
    paper="2208.11580",
    family="loss change",
    granularities=("element", "row", "N:M"),
    criterion=None,
    solver="obq",
)
method(
    "deep-compression",
    "Remove the smallest weights, let the others share a few values, and write Huffman codes of what is left.",
    choose="Choose it for the smallest file of a convolutional network, after training it sparse.",
    beware="for storage: weights are decoded before they are used, and no stock tool reads the file.",
    source="Han, Mao and Dally, Deep compression, arXiv 1510.00149.",
    paper="1510.00149",
    family="magnitude",
    survey=("B3.6", "D1", "E4"),
    criterion="magnitude",
    solver="share",
)
method(
    "owl-wanda",
    "Wanda with more weights kept in the blocks that have more outliers.",
    choose="Choose it for language models from 60 % on.",
    source=_OWL,
    paper="2310.05175",
    family="llm",
    criterion="wanda",
    granularity="row",
    allocation="owl",
)
method(
    "owl-sparsegpt",
    "SparseGPT with more weights kept in the blocks that have more outliers.",
    choose="Choose it for language models from 60 % on.",
    source=_OWL,
    paper="2310.05175",
    family="llm",
    criterion=None,
    solver="sparsegpt",
    allocation="owl",
)
method(
    "dsnot",
    "Start from wanda's mask, then swap weights until the expected output error of each row is small.",
    choose="Choose it to improve a mask without moving weights.",
    source="Zhang et al., Dynamic sparse no training (DSnoT), arXiv 2310.08915.",
    paper="2310.08915",
    family="llm",
    granularities=("row", "N:M"),
    criterion="wanda",
    granularity="row",
    solver="dsnot",
)
method(
    "wanda-lsq",
    "Wanda's mask, then the survivors re-fitted by least squares to the layer's output.",
    choose="Choose it when the mask is given and the weights may move.",
    source="Boza, Fast and effective weight update for pruned LLMs, arXiv 2401.02938; the mask is wanda's.",
    paper="2401.02938",
    family="llm",
    criterion="wanda",
    granularity="row",
    solver="least-squares",
)
method(
    "admm",
    "Mask and weights together by ADMM on the layer's output error, then a re-fit (ALPS).",
    choose="Choose it for one-shot pruning at 60 % and more, without fine-tuning.",
    source="Meng et al., ALPS, arXiv 2406.07831.",
    paper="2406.07831",
    family="llm",
    criterion=None,
    solver="admm",
)
method(
    "ebft",
    "Wanda, then block-wise fine-tuning of the survivors against the dense block on the same input.",
    choose="Choose it to see what fine-tuning adds to wanda.",
    source="Guo et al., EBFT, arXiv 2402.12419.",
    paper="2402.12419",
    family="llm",
    criterion="wanda",
    granularity="row",
    recovery="blockwise",
    knobs={"recovery": {"teacher": "input"}},
)
method(
    "sparsegpt-blockwise",
    "SparseGPT, then block-wise fine-tuning of the survivors against the dense model's own activations.",
    choose="Choose it for the lowest perplexity from calibration data alone.",
    beware="several times sparsegpt's cost, and a buffer of dense activations.",
    source=_SPARSEGPT + " Fine-tuning after Guo et al., EBFT, arXiv 2402.12419, with the dense model as teacher.",
    paper="2402.12419",
    family="llm",
    criterion=None,
    solver="sparsegpt",
    recovery="blockwise",
)
