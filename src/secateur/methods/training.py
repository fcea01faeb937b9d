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
