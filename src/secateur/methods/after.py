"""Methods that train after pruning: rounds, rewinding and healing are fields of a recipe over one loop."""

from __future__ import annotations

from typing import Any

from .oneshot import method

_IMP = "Frankle and Carbin, The lottery ticket hypothesis, arXiv 1803.03635"
#: What ten rounds of a fifth leave; another sparsity takes as many rounds of a fifth as it needs.
_TEN: dict[str, Any] = {"steps": 10, "schedule": "geometric", "sparsity": 1 - 0.8**10}

method(
    "magnitude-finetune",
    "Train, remove the smallest weights of the network at once, and fine-tune what stays.",
    choose="Choose it as the baseline of everything that trains after pruning.",
    beware="at high sparsity one cut is too much: take iterative-magnitude.",
    source="Han et al., Learning both weights and connections, arXiv 1506.02626.",
    paper="1506.02626",
    family="magnitude",
    criterion="magnitude",
    allocation="global",
    recovery="finetune",
)
method(
    "iterative-magnitude",
    "Train, then remove a fifth of the weights and fine-tune, round after round.",
    choose="Choose it in place of magnitude-finetune at high sparsity.",
    source="Han et al., Learning both weights and connections, arXiv 1506.02626, with the fifth of arXiv 1803.03635.",
    paper="1506.02626",
    family="magnitude",
    criterion="magnitude",
    allocation="global",
    recovery="finetune",
    **_TEN,
)
method(
    "lth",
    "Iterative magnitude pruning with rewinding: a fifth of the weights goes each round, the others start again.",
    choose="Choose it to find winning tickets of small networks.",
    beware="costs a whole training run a round; networks of some size need late rewinding (lth-rewind).",
    source=f"{_IMP}: iterative, rewound to the initialization, ranked over the network.",
    paper="1803.03635",
    family="magnitude",
    criterion="magnitude",
    allocation="global",
    recovery="rewind",
    **_TEN,
)
method(
    "lth-rewind",
    "As lth, but what stays goes back to the weights of an early step of training, not to the initialization.",
    choose="Choose it for tickets of networks with batch norm and shortcuts, and at large learning rates.",
    source="Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, arXiv 1912.05671.",
    paper="1912.05671",
    family="magnitude",
    criterion="magnitude",
    allocation="global",
    recovery="rewind",
    knobs={"recovery": {"to": 0.05}},
    **_TEN,
)
method(
    "lr-rewind",
    "Iterative magnitude pruning in which weights go on and only the learning rate's schedule starts again.",
    choose="Choose it for the highest accuracy at a sparsity, when each round may cost a training run.",
    source="Renda et al., Comparing rewinding and fine-tuning, arXiv 2003.02389.",
    paper="2003.02389",
    family="magnitude",
    criterion="magnitude",
    allocation="global",
    recovery="rewind",
    knobs={"recovery": {"weights": False}},
    **_TEN,
)
method(
    "magnitude-distill",
    "Train, remove the smallest weights at once, and let the dense model teach what stays.",
    choose="Choose it in place of magnitude-finetune when accuracy matters more than the time of one forward pass.",
    source="Park and No, Prune your model before distill it, arXiv 2109.14960, for the two together; the loss is that "
    "of Hinton et al., arXiv 1503.02531.",
    paper="2109.14960",
    family="magnitude",
    criterion="magnitude",
    allocation="global",
    recovery="distill",
)
method(
    "obert",
    "Train, then remove in rounds the weights without which the loss can be held best, move the others to hold it, and "
    "let the dense model teach what stays.",
    choose="Choose it for transformers and other trained networks at high sparsity, when there is a loss and time for "
    "fine-tuning.",
    beware="the Fisher is that of the calibration batches: raise their number (--calibration) to the block size (50) "
    "or more. The official recipe takes 1,024 batches of 8, prunes the encoder alone (use skip), starts at 70 %, and "
    "trains four epochs after each of seven cuts, with a schedule of the learning rate of their own, as here.",
    source="Kurtic et al., The optimal BERT surgeon, arXiv 2203.07259, and the official code and recipe of 30 epochs: "
    "cuts, cubic schedule, global ranking, distillation from the dense model's outputs alone.",
    paper="2203.07259",
    family="curvature",
    criterion="obert",
    allocation="global",
    solver="obs",
    recovery="distill",
    steps=7,
    schedule="cubic",
    sparsity=0.9,
    knobs={"recovery": {"length": 0.25, "rate": 1.0, "logits": 1.0, "temperature": 2.0}},
)
method(
    "cofi",
    "Train, then learn which heads and neurons go by hard concrete gates under a size that comes down to the target, "
    "with the dense model as teacher, cut them, and let it teach what stays.",
    choose="Choose it for transformers that are to become much smaller, when there is time for two more runs.",
    beware="heads, neurons and widths of heads; the paper also has gates on whole attention and feed-forward layers "
    "and on the hidden width, and matches layers anew while it distills: here blocks are compared one by one, by "
    "relative squared error, and layers weigh as much as the output. Labels are not looked at again, as in the "
    "official code.",
    source="Xia et al., Structured pruning learns compact and accurate models (CoFi), arXiv 2204.00408, and the "
    "settings of its official code.",
    paper="2204.00408",
    family="learned",
    granularities=("coupled", "filter", "channel"),
    criterion=None,
    granularity="coupled",
    allocation="raw",
    driver="gradual",
    schedule="linear",
    gate="l0",
    penalty="lagrangian",
    recovery="distill",
    skip=("@residual",),
    knobs={
        "driver": {"every": 1},
        "recovery": {"logits": 1.0, "temperature": 2.0, "features": 1.0, "length": 0.5, "rate": 0.5},
    },
)
method(
    "early-bird",
    "Draw the mask of channels as soon as it no longer changes, cut them away, and train the smaller network.",
    choose="Choose it to save most of the dense run.",
    beware="sparsity is the share of the channels while the ticket is looked for, and of the parameters when they go; "
    "the penalty on batch-norm scales that the authors also train with is not part of it.",
    source="You et al., Drawing early-bird tickets, arXiv 1909.11957, algorithm 1; coupled units are ours.",
    paper="1909.11957",
    family="cnn",
    granularities=("coupled",),
    criterion="norm-scale",
    granularity="coupled",
    allocation="global",
    driver="early-bird",
    recovery="finetune",
    knobs={"recovery": {"length": 1.0, "rate": 1.0}},
)
