"""Methods before and during training: each a line of data."""

from __future__ import annotations

from .oneshot import method

_RIGL = "Evci et al., Rigging the lottery (RigL), arXiv 1911.11134."

method(
    "random-erk",
    "A random mask before training, larger layers sparser (Erdos-Renyi-Kernel): static sparse training.",
    choose="Choose it as the control of every method that trains sparse models.",
    source=_RIGL,
    paper="1911.11134",
    family="baseline",
    when="before",
    criterion="random",
    allocation="erk",
)
method(
    "gmp",
    "Gradual magnitude pruning: from dense to sparse while the model trains, by a cubic schedule.",
    choose="Choose it when a dense training run is affordable.",
    source="Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878.",
    paper="1710.01878",
    family="magnitude",
    when="during",
    criterion="magnitude",
    schedule="cubic",
    driver="gradual",
)
method(
    "global-gmp",
    "Gradual magnitude pruning with all layers ranked together.",
    choose="Choose it in place of gmp for networks whose layers differ in how much they can lose.",
    beware="can empty a whole layer at high sparsity.",
    source="Zhu and Gupta, arXiv 1710.01878; ranked over the network as in Gale et al., arXiv 1902.09574.",
    paper="1902.09574",
    family="magnitude",
    when="during",
    criterion="magnitude",
    allocation="global",
    schedule="cubic",
    driver="gradual",
)
method(
    "set",
    "Sparse evolutionary training: drop the smallest weights, grow random ones, as long as training lasts.",
    choose="Choose it for sparse training without dense gradients.",
    source="Mocanu et al., Scalable training of artificial neural networks (SET), arXiv 1707.04780.",
    paper="1707.04780",
    family="magnitude",
    when="during",
    criterion="magnitude",
    allocation="erk",
    driver="regrow",
    knobs={"driver": {"grow": "random", "decay": "none", "until": 1.0}},
)
method(
    "rigl",
    "Drop the smallest weights and grow those with the largest gradient, less and less often.",
    choose="Choose it for sparse training from scratch at the cost of the sparse model.",
    source=_RIGL,
    paper="1911.11134",
    family="magnitude",
    when="during",
    criterion="magnitude",
    allocation="erk",
    driver="regrow",
)
method(
    "granet",
    "Gradual magnitude pruning in which weights that were cut too early may come back.",
    choose="Choose it in place of gmp at high sparsity.",
    source="Liu et al., Sparse training via boosting pruning plasticity (GraNet), arXiv 2106.10404.",
    paper="2106.10404",
    family="magnitude",
    when="during",
    criterion="magnitude",
    allocation="global",
    schedule="cubic",
    driver="gradual-regrow",
)

# -- sparse to sparse ---------------------------------------------------------------------------------------------

_ITOP = "Liu et al., Do we actually need dense over-parameterization? (ITOP), arXiv 2102.02887, and its official code."
_SINGLE = ("element", "block")
_DSR = {"drop": "all", "spread": "count", "grow": "random", "fraction": 0.1, "decay": "none", "until": 0.8}

method(
    "rigl-itop",
    "RigL with updates so far apart that weights are explored reliably before they are judged.",
    choose="Choose it in place of rigl for long runs: session.explored tells how much of the model has been tried.",
    beware="every is for runs of some 100,000 steps at batch 128 (25 updates); in a shorter run keep the number of "
    "updates, and the batch small, since more steps explore more.",
    source=_ITOP,
    paper="2102.02887",
    family="magnitude",
    when="during",
    criterion="magnitude",
    allocation="erk",
    driver="regrow",
    knobs={"driver": {"every": 4000, "fraction": 0.5, "until": 1.0}},
)
method(
    "set-itop",
    "SET with updates so far apart that weights are explored reliably before they are judged.",
    choose="Choose it in place of set for long runs: session.explored tells how much of the model has been tried.",
    beware="every is for runs of some 100,000 steps at batch 128 (65 updates); see rigl-itop.",
    source=_ITOP,
    paper="2102.02887",
    family="magnitude",
    when="during",
    criterion="magnitude",
    allocation="erk",
    driver="regrow",
    knobs={"driver": {"grow": "random", "every": 1500, "fraction": 0.5, "until": 1.0}},
)
method(
    "snfs",
    "Drop the smallest weights; grow where the momentum is largest, more in layers whose momentum is large.",
    choose="Choose it when layers should compete for the weights and dense gradients are affordable.",
    beware="exchange rarely (an epoch in the paper): what grows moves at once by its momentum, and exchanges in quick "
    "succession undo the training. Gradients and momentum are dense in every step: it saves operations at inference, "
    "few in training. The official code refills the momentum of absent weights after each exchange; here it goes on.",
    source="Dettmers and Zettlemoyer, Sparse networks from scratch (SNFS), arXiv 1907.04840, and its official code.",
    paper="1907.04840",
    family="magnitude",
    when="during",
    granularities=_SINGLE,
    criterion="magnitude",
    driver="regrow",
    hold="zero-weight",
    knobs={"driver": {"grow": "momentum", "spread": "momentum", "fraction": 0.5, "until": 1.0}},
)
method(
    "dsr",
    "Drop the smallest weights of all layers; grow random ones, in proportion to what is left of each layer.",
    choose="Choose it when layers should compete for the weights, without dense gradients.",
    beware="exactly a fraction goes, which the paper's threshold reaches by doubling and halving; a layer that loses "
    "all its weights gets none again.",
    source="Mostafa and Wang, Parameter efficient training by dynamic sparse reparameterization, arXiv 1902.05967, "
    "algorithm 1, and its official code.",
    paper="1902.05967",
    family="magnitude",
    when="during",
    granularities=_SINGLE,
    criterion="magnitude",
    driver="regrow",
    knobs={"driver": _DSR},
)
method(
    "deep-r",
    "A random walk: a weight whose sign flips is gone, and a random one is born in its layer.",
    choose="Choose it for very sparse networks, and as the ancestor of sparse-to-sparse training.",
    beware="meant for plain SGD; the noise scales with the learning rate.",
    source="Bellec et al., Deep rewiring, arXiv 1711.05136, algorithm 1, by layer as in its official code.",
    paper="1711.05136",
    family="magnitude",
    when="during",
    granularities=_SINGLE,
    criterion="kept-sign",
    allocation="erk",
    driver="regrow",
    hold="walk",
    knobs={"driver": {"drop": "negative", "grow": "random", "every": 1, "decay": "none", "until": 1.0}},
)
method(
    "mest",
    "Drop what is small and hardly moves, grow at random; new weights come on top, and the extra shrinks to nothing.",
    choose="Choose it for sparse training in little memory.",
    beware="between exchanges more weights are there than the sparsity says, by the share that is exchanged; at the "
    "end of the exchanges the count is exact.",
    source="Yuan et al., MEST, arXiv 2110.14032, with elastic mutation and soft memory bound (EM&S), after the paper's "
    "description.",
    paper="2110.14032",
    family="saliency",
    when="during",
    criterion="mest",
    allocation="erk",
    driver="regrow",
    knobs={"driver": {"grow": "random", "soft": True}},
)
method(
    "top-kast",
    "The largest weights compute the model, and a set twice as large is trained; a penalty makes them compete.",
    choose="Choose it where the backward pass must be sparse too.",
    beware="dense weights are behind the masks, as in the paper; the set is found anew every 10 steps.",
    source="Jayakumar et al., Top-KAST, arXiv 2106.03517.",
    paper="2106.03517",
    family="magnitude",
    when="during",
    criterion="magnitude",
    driver="renew",
    hold="top-kast",
    knobs={"driver": {"every": 10}},
)
method(
    "sr-ste",
    "N:M masks from scratch: gradients go straight through to all weights, and those that are gone decay.",
    choose="Choose it to train for hardware with sparse matrix units.",
    beware="dense weights are behind the masks, and gradients are dense.",
    source="Zhou et al., Learning N:M fine-grained structured sparse neural networks from scratch (SR-STE), "
    "arXiv 2102.04010.",
    paper="2102.04010",
    family="magnitude",
    when="during",
    criterion="magnitude",
    granularity="2:4",
    driver="renew",
    hold="sr-ste",
)
method(
    "srigl",
    "RigL with the same number of inputs for every neuron, and without neurons that matter little.",
    choose="Choose it for sparse layers that are fast without a general sparse kernel.",
    beware="the paper counts as salient the K largest weights and gradients; here, what an exchange without the "
    "constraint would keep or grow. The last layer keeps all its neurons.",
    source="Lasby et al., Dynamic sparse training with structured sparsity (SRigL), arXiv 2305.02299.",
    paper="2305.02299",
    family="magnitude",
    when="during",
    granularities=("row",),
    criterion="magnitude",
    granularity="row",
    allocation="erk",
    driver="fan-in",
)

# -- from dense ---------------------------------------------------------------------------------------------------

_UNITS = ("coupled", "filter", "channel")

method(
    "sfp",
    "Soft filter pruning: the filters of smallest l2 norm are zeroed now and then, and go on training.",
    choose="Choose it for a smaller network from one training run; session.shrink() gives it.",
    beware="every is an epoch in the paper: set it. In the last tenth of the run what is gone stays gone, with its "
    "normalization, which the paper leaves; until=1 leaves that to finish(). The paper cuts the same share of each "
    "layer; here it is the same share of each family of units, until the target is met.",
    source="He et al., Soft filter pruning, arXiv 1808.06866, and its official code.",
    paper="1808.06866",
    family="magnitude",
    when="during",
    granularities=_UNITS,
    criterion="magnitude",
    granularity="filter",
    driver="renew",
    hold="free",
    knobs={"criterion": {"p": 2.0}, "driver": {"every": 100, "until": 0.9}},
)
method(
    "fpgm-soft",
    "The filters nearest to the geometric median of their layer are zeroed now and then, and go on training.",
    choose="Choose it in place of sfp where the norms of filters are alike.",
    beware="see sfp; the paper mixes a share of filters of small norm in, this does not.",
    source="He et al., Filter pruning via geometric median, arXiv 1811.00250, algorithm 1.",
    paper="1811.00250",
    family="redundancy",
    when="during",
    granularities=_UNITS,
    criterion="fpgm",
    granularity="filter",
    driver="renew",
    hold="free",
    knobs={"driver": {"every": 100, "until": 0.9}},
)
method(
    "gradual-structured",
    "Channels, neurons and heads go step by step while the model trains, with all that hangs on them.",
    choose="Choose it for a really smaller model without a training run of its own; session.shrink() gives it, proven.",
    beware="a unit that is gone does not come back.",
    source="Zhu and Gupta, arXiv 1710.01878, for the schedule; Fang et al., DepGraph, arXiv 2301.12900, for the group "
    "norm; together ours.",
    paper="1710.01878",
    family="magnitude",
    when="during",
    granularities=_UNITS,
    criterion="magnitude",
    granularity="coupled",
    allocation="global",
    schedule="cubic",
    driver="gradual",
    knobs={"criterion": {"p": 2.0}},
)
method(
    "dpf",
    "Gradual pruning with feedback: gradients at the pruned model move the dense weights behind it.",
    choose="Choose it in place of gmp when a second copy of the weights is affordable: cuts are mended as it trains.",
    beware="when the schedule ends is ours; masks are renewed until the end of the run.",
    source="Lin et al., Dynamic model pruning with feedback (DPF), arXiv 2006.07253, algorithm 1 (masks every 16 "
    "steps), after the paper's description.",
    paper="2006.07253",
    family="magnitude",
    when="during",
    criterion="magnitude",
    allocation="global",
    schedule="cubic",
    driver="renew",
    hold="dense",
    knobs={"driver": {"every": 16, "end": 0.75}},
)
method(
    "gsm",
    "In each step the most salient weights of the network get their gradient; all others only decay.",
    choose="Choose it to press a trained model's weights to zero before they are cut, by global ranking.",
    beware="begin with a trained model, as the paper does; the model is cut at finish(). That what is never chosen "
    "fades by exp(-8) over the run, however short, is ours: hold.fade=0 is the paper's, for momentum near 0.98 and "
    "runs of hundreds of thousands of steps.",
    source="Ding et al., Global sparse momentum SGD (GSM), arXiv 1909.12778, and its official code.",
    paper="1909.12778",
    family="saliency",
    when="during",
    criterion="saliency",
    allocation="global",
    driver="renew",
    hold="active",
    knobs={"hold": {"fade": 8.0}},
)
method(
    "movement",
    "Keep what training moves away from zero: scores gather while the model trains, and each matrix keeps its best.",
    choose="Choose it to fine-tune a pretrained transformer at high sparsity.",
    beware="dense weights are behind the masks. The official code trains the scores with Adam; here they gather as "
    "the paper's equation says.",
    source="Sanh et al., Movement pruning, arXiv 2005.07683.",
    paper="2005.07683",
    family="movement",
    when="during",
    criterion="movement",
    schedule="cubic",
    driver="renew",
    hold="frozen",
    knobs={"driver": {"begin": 0.1, "end": 0.7}},
)
method(
    "soft-movement",
    "Movement pruning with one ranking of all matrices.",
    choose="Choose it in place of movement where matrices may differ in how much they lose.",
    beware="the paper sets a threshold and lets a penalty on the scores decide how many stay; here the threshold lies "
    "where the count is exact, and there is no penalty.",
    source="Sanh et al., Movement pruning, arXiv 2005.07683, soft version.",
    paper="2005.07683",
    family="movement",
    when="during",
    criterion="movement",
    allocation="global",
    schedule="cubic",
    driver="renew",
    hold="frozen",
    knobs={"driver": {"begin": 0.1, "end": 0.7}},
)
method(
    "platon",
    "Keep what is sensitive, or not yet known well: smoothed sensitivity times its uncertainty, all matrices ranked.",
    choose="Choose it to fine-tune transformers, where movement and magnitude are too noisy.",
    beware="begin with a trained model. Two more numbers for each weight; a weight that is gone comes back by the one "
    "step that it is given. All matrices are ranked together, which suits transformers, whose matrices are alike: in "
    "small convolutional networks whole layers go above 80 % (allocation uniform then). The official code masks every "
    "tenth step and lets all weights train in between: hold free, driver.every=10.",
    source="Zhang et al., PLATON, arXiv 2206.12562, algorithm 1.",
    paper="2206.12562",
    family="movement",
    when="during",
    criterion="platon",
    allocation="global",
    schedule="cubic",
    driver="renew",
    hold="zero-weight",
    knobs={"driver": {"begin": 0.1, "end": 0.7}},
)
