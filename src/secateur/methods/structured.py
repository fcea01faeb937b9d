"""Structured methods after training: recipes over coupled units."""

from __future__ import annotations

from typing import Any

from .oneshot import method


def units(name: str, summary: str, **card: Any) -> None:
    """A method over coupled units, whose survivors are refitted where data is given."""
    method(name, summary, granularities=("coupled", "filter", "channel"), recovery="refit", **card)


def pieces(name: str, summary: str, **card: Any) -> None:
    """A method over whole blocks, or experts."""
    method(name, summary, granularities=(card["granularity"],), **card)


units(
    "l1-norm",
    "Remove the filters, neurons and heads with the smallest weights, the same share everywhere.",
    choose="Choose it as the data-free baseline of structured pruning.",
    beware="the same share in every layer spares no sensitive one.",
    source="Li et al., Pruning filters for efficient ConvNets, arXiv 1608.08710.",
    paper="1608.08710",
    family="magnitude",
    criterion="magnitude",
    granularity="filter",
)
units(
    "group-norm",
    "Remove the coupled units whose weights, in every layer that they touch, are smallest together.",
    choose="Choose it for a smaller model without data, on any architecture.",
    source="Fang et al., DepGraph: towards any structural pruning, arXiv 2301.12900, the group norm without its "
    "sparse training.",
    paper="2301.12900",
    family="magnitude",
    criterion="magnitude",
    granularity="coupled",
    allocation="global",
    knobs={"criterion": {"p": 2.0}},
)
units(
    "taylor",
    "Remove the coupled units whose removal changes the loss least, to first order, weight by weight.",
    choose="Choose it when there are labels and a loss.",
    beware="the sizes of the single terms are summed, as in LLM-Pruner's element-wise score; Molchanov et al. sum "
    "a unit's terms first and square the sum.",
    source="Molchanov et al., Importance estimation for neural network pruning, arXiv 1906.10771; Ma et al., "
    "LLM-Pruner, arXiv 2305.11627.",
    paper="1906.10771",
    family="saliency",
    criterion="saliency",
    granularity="coupled",
    allocation="global",
)
units(
    "diff-pruning",
    "Remove the coupled units of a denoiser whose removal changes its loss least, over the steps that still say much.",
    choose="Choose it for diffusion models: give families.diffusion_steps(...) as data and families.denoising as loss.",
    beware="it is taylor on those steps; what it is given decides. Samples want fine-tuning afterwards.",
    source="Fang et al., Structural pruning for diffusion models, arXiv 2305.10924, and the official code, whose score "
    "is the size of each weight times its gradient summed over the steps.",
    paper="2305.10924",
    family="diffusion",
    criterion="saliency",
    granularity="coupled",
    allocation="global",
)
units(
    "flap",
    "Remove the heads and neurons whose output, on its way to the next layer, hardly varies.",
    choose="Choose it for a smaller language model in one shot, from calibration text alone.",
    beware="a bias that is not there is not added: where the layers have none, as in Llama, the least-squares "
    "refit takes its place. The hidden width stays as it is, as in the paper.",
    source="An et al., Fluctuation-based adaptive structured pruning for LLMs (FLAP), arXiv 2312.11983.",
    paper="2312.11983",
    family="activation",
    criterion="fluctuation",
    granularity="channel",
    allocation="standardized",
    skip=("@residual",),
)
units(
    "wanda-sp",
    "Remove the heads and neurons whose outgoing weights, times the norm of what they carry, are smallest.",
    choose="Choose it as the simplest structured method that looks at activations.",
    source="An et al., FLAP, arXiv 2312.11983, where wanda is summed over structures as a baseline (Wanda-sp); "
    "the criterion is of Sun et al., arXiv 2306.11695.",
    paper="2306.11695",
    family="activation",
    criterion="wanda",
    granularity="channel",
    allocation="uniform",
    skip=("@residual",),
)
units(
    "llm-pruner",
    "Remove the heads and neurons whose coupled weights change the loss least, to first order.",
    choose="Choose it for language models when gradients fit in memory.",
    beware="the paper keeps the first and last blocks whole (use --skip) and trains a LoRA afterwards; here the "
    "survivors are refitted by least squares.",
    source="Ma et al., LLM-Pruner, arXiv 2305.11627, element-wise Taylor score summed over a group, uniform blocks.",
    paper="2305.11627",
    family="saliency",
    criterion="saliency",
    granularity="coupled",
    allocation="uniform",
    skip=("@residual",),
)
units(
    "isomorphic",
    "Remove the coupled units whose removal changes the loss least, ranked among those of the same shape.",
    choose="Choose it for vision transformers and mixed networks when there are labels and a loss.",
    source="Fang et al., Isomorphic pruning for vision models, arXiv 2407.04616.",
    paper="2407.04616",
    family="saliency",
    criterion="saliency",
    granularity="coupled",
    allocation="isomorphic",
)
units(
    "fpgm",
    "Remove the filters nearest to the geometric median of their layer.",
    choose="Choose it for convolutional networks whose filters have norms alike.",
    beware="the paper prunes softly while it trains; this is its ranking, in one shot.",
    source="He et al., Filter pruning via geometric median, arXiv 1811.00250.",
    paper="1811.00250",
    family="redundancy",
    criterion="fpgm",
    granularity="filter",
)
units(
    "network-slimming",
    "Remove the channels whose batch norm scales are smallest in the whole network.",
    choose="Choose it after training with a penalty on the scales.",
    beware="the penalty is part of the training, not of this recipe.",
    source="Liu et al., Network slimming, arXiv 1708.06519.",
    paper="1708.06519",
    family="norm",
    criterion="norm-scale",
    granularity="coupled",
    allocation="global",
)
units(
    "apoz",
    "Remove the channels and neurons that are most often zero.",
    choose="Choose it for networks with ReLU and data without labels.",
    source="Hu et al., Network trimming, arXiv 1607.03250.",
    paper="1607.03250",
    family="activation",
    criterion="apoz",
    granularity="channel",
)
units(
    "minitron",
    "Remove the heads, neurons and hidden features with the smallest mean activation.",
    choose="Choose it for language models that will be distilled afterwards.",
    beware="depth is taken out by granularity depth; the distillation, to which the paper owes its quality, is not "
    "part of this recipe.",
    source="Muralidharan et al., Minitron, arXiv 2407.14679, width pruning.",
    paper="2407.14679",
    family="activation",
    criterion="activation-mean",
    granularity="channel",
)
method(
    "slicegpt",
    "Keep the principal directions of the hidden state, in place of single features.",
    choose="Choose it for pre-norm language models and vision transformers whose output layer is not tied.",
    beware="an output layer that is tied to the embedding is untied, so a small model with a large vocabulary gains "
    "little. The paper turns each block by its own matrix, and keeps those matrices on the residual connections; "
    "here one serves all, and the result is a plain model of the same class.",
    source="Ashkboos et al., SliceGPT, arXiv 2401.15024.",
    paper="2401.15024",
    family="decomposition",
    granularities=("coupled", "channel"),
    criterion="activation-mean",
    granularity="channel",
    recovery="project",
    only=("@residual",),
)
units(
    "group-fisher",
    "Remove the channels whose masks carry least Fisher information, all coupled layers together.",
    choose="Choose it for convolutional networks when there are labels.",
    beware="the paper divides by the memory that goes and prunes while it trains; this is its ranking, in one shot.",
    source="Liu et al., Group Fisher pruning, arXiv 2108.00708.",
    paper="2108.00708",
    family="saliency",
    criterion="group-fisher",
    granularity="channel",
    allocation="global",
)
units(
    "kwon",
    "Remove the heads and neurons whose masks carry least Fisher information for their FLOPs, exchange some for others "
    "that go better together, and fit what reads them.",
    choose="Choose it for trained transformers, with minutes and some labelled data at hand, and no training.",
    beware="give it a target in FLOPs and hundreds of small batches. The last step of the paper scales heads and "
    "neurons by least squares; here recovery refit fits all weights that read them. Widths of heads compete too where "
    "the model lets them go, and a tenth of each layer stays.",
    source="Kwon et al., A fast post-training pruning framework for transformers, arXiv 2204.09656, and its official "
    "code.",
    paper="2204.09656",
    family="saliency",
    criterion="mask-fisher",
    granularity="channel",
    allocation="raw",
    skip=("@residual",),
)
units(
    "unit-hessian",
    "Remove the coupled units without which the loss changes least, to second order.",
    choose="Choose it for trained networks with a loss, when first order says too little: near a minimum.",
    beware="it takes second derivatives, and its estimate is noisy with few batches: raise the criterion's probes.",
    source="Molchanov et al., Importance estimation for neural network pruning, arXiv 1906.10771, second-order Taylor "
    "score, in one shot.",
    paper="1906.10771",
    family="curvature",
    criterion="unit-hessian",
    granularity="coupled",
    allocation="global",
)
units(
    "group-hessian",
    "Remove the coupled units whose weights, one by one, curve the loss least: optimal brain damage of groups.",
    choose="Choose it for small trained networks where a second derivative can be paid for.",
    beware="torch-pruning's importance of that name takes mean squared gradients for the Hessian's diagonal: that is "
    "criterion fisher.",
    source="LeCun, Denker and Solla, Optimal brain damage, NIPS 1989, summed over coupled weights as in Fang et al., "
    "DepGraph, arXiv 2301.12900.",
    paper="2301.12900",
    family="curvature",
    criterion="obd",
    granularity="coupled",
    allocation="global",
)
units(
    "hap",
    "Remove the filters with the smallest mean curvature times squared norm.",
    choose="Choose it for trained convolutional networks with a loss.",
    beware="the neural implant, a low-rank stand-in for filters of middling score, is not part of this recipe, and the "
    "official code ranks raw scores.",
    source="Yu et al., Hessian-aware pruning and optimal neural implant, arXiv 2101.08940, in one shot.",
    paper="2101.08940",
    family="curvature",
    criterion="hap",
    granularity="filter",
    allocation="global",
)
units(
    "nvit",
    "Remove embedding dimensions, heads, their dimensions and neurons of a transformer in one ranking of Hessian-aware "
    "saliency.",
    choose="Choose it for vision transformers when there are labels, with a target in latency or FLOPs.",
    beware="its saliency, the mean squared sum of weight times gradient over a group, is criterion group-fisher but "
    "for the half. The official code sums a neuron or head dimension over the weights that compute it, ranks raw sums "
    "after fixed divisors (12 for the embedding, 6 for a head, 2 for a dimension in one), subtracts what a table of "
    "latencies says that a group saves, and trains meanwhile; here sums are over all coupled weights, allocation "
    "global divides by the family's mean, and latency is a target.",
    source="Yang et al., Global vision transformer pruning with Hessian-aware saliency (NViT), arXiv 2110.04869, and "
    "its official code, in one shot.",
    paper="2110.04869",
    family="saliency",
    criterion="group-fisher",
    granularity="coupled",
    allocation="global",
)
units(
    "hrank",
    "Remove the channels whose feature maps have the lowest rank.",
    choose="Choose it for convolutional networks and data without labels.",
    source="Lin et al., HRank, arXiv 2002.10179, in one shot.",
    paper="2002.10179",
    family="redundancy",
    criterion="hrank",
    granularity="channel",
)
units(
    "chip",
    "Remove the channels whose feature maps the others span.",
    choose="Choose it for convolutional networks, when a few dozen images are at hand.",
    source="Sui et al., CHIP, arXiv 2110.13981, in one shot.",
    paper="2110.13981",
    family="redundancy",
    criterion="chip",
    granularity="channel",
)
pieces(
    "shortgpt",
    "Take out the blocks that turn the hidden state least.",
    choose="Choose it for a shorter language model from one forward pass.",
    source="Men et al., ShortGPT, arXiv 2403.03853.",
    paper="2403.03853",
    family="activation",
    criterion="block-influence",
    granularity="depth",
)
pieces(
    "sleb",
    "Take out one block after the other: each time the one without which the loss is lowest.",
    choose="Choose it for the best shorter language model without training; it costs many forward passes.",
    source="Song et al., SLEB, arXiv 2402.09025.",
    paper="2402.09025",
    family="loss",
    criterion="loss-without",
    granularity="depth",
)
pieces(
    "angular-depth",
    "Take out the run of successive blocks between whose ends the hidden state turns least.",
    choose="Choose it for taking much depth out of a large language model, before a short healing.",
    beware="the paper never takes out the last block, which this does where it turns little; keep it with --skip.",
    source="Gromov et al., The unreasonable ineffectiveness of the deeper layers, arXiv 2403.17887.",
    paper="2403.17887",
    family="activation",
    criterion="angular",
    granularity="depth",
)
pieces(
    "reap",
    "Take out the experts that add least to the hidden state where the router chooses them.",
    choose="Choose it to halve the memory of a mixture-of-experts language model from one forward pass.",
    beware="weights are those that the model gives its experts; the official code can renormalize them.",
    source="Lasby et al., REAP the experts, arXiv 2510.13999.",
    paper="2510.13999",
    family="activation",
    criterion="reap",
    granularity="experts",
)
pieces(
    "expert-frequency",
    "Take out the experts that the router chooses least.",
    choose="Choose it as the baseline of expert pruning.",
    source="Li et al., MC-SMoE, arXiv 2310.01334, usage frequency; a baseline of REAP, arXiv 2510.13999.",
    paper="2310.01334",
    family="activation",
    criterion="expert-frequency",
    granularity="experts",
)
