"""What becomes of weights that are gone while training goes on, and what the optimizer is given for all of them.

A hold that names facts is called before each step of the optimizer and returns the weight and the gradient that the
optimizer works on. Its other facts, in the decorator, say how the parameter is held between the steps:

``weight``: ``zero``, what is gone is zero; ``free``, it is zeroed when masks change and at the end, and goes on
training in between; ``dense``, the model reads the masked weight, and the session keeps the dense one for the
optimizer, which is one more copy of each pruned parameter. ``state``: whether the optimizer's memory of what is gone
is zero too. ``backward``: for which weights training needs gradients, which the count of operations asks.
``rounds``: the model reads the nearest values of a grid with the hold's ``bits`` and ``group``, or of one that it had.
``ties``: weights that have the same value when training begins have the same one from then on.
``first``: masks change before the optimizer steps, with this step's gradients, and not after it. ``finish``: the
criterion of the last mask. ``decays``: nothing works without the optimizer's weight decay, or this knob of the hold's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .registry import register


@register("hold", weight="zero", state="zero", backward="sparse")
def zero() -> None:
    """What is gone is zero, and so is what the optimizer remembers of it.

    Choose it wherever a method says nothing else: it keeps no copy of the model.

    Source: common practice; momentum alone would revive what is gone.
    """


@register("hold", name="zero-weight", weight="zero", state="free", backward="sparse")
def zero_weight() -> None:
    """What is gone is zero, but the optimizer goes on remembering it.

    Choose it for methods that read the optimizer's memory of weights that are not there, as SNFS does.

    Beware: a weight that comes back moves at once by what was remembered.

    Source: Dettmers and Zettlemoyer, SNFS, arXiv 1907.04840, and its official code, which masks weights alone.
    """


@register("hold", weight="free", state="free", backward="dense", paper="1808.06866", survey="B2.3")
def free() -> None:
    """What goes is zeroed once, when masks change, and goes on training until they change again.

    Choose it for soft pruning: a unit that was cut too early grows back by itself.

    Beware: between two changes the model is dense; nothing is saved while it trains.

    Source: He et al., Soft filter pruning, arXiv 1808.06866, section 3.3.
    """


@register(
    "hold", weight="free", state="free", backward="dense", first=True, finish="magnitude", decays="fade",
    paper="1909.12778", survey="B2.1",
)  # fmt: skip
def active(
    weight: Tensor, gradient: Tensor, mask: Tensor, steps: int, *, fade: float = 0.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Only chosen weights get the gradient of the loss; the others shrink by weight decay alone.

    :: g' = mask g, with the mask of this very step; with fade: w <- w exp(- fade / steps) where the mask is 0

    ``steps`` is how long the run is, so that a weight that is never chosen fades by exp(- fade) in it, whatever the
    learning rate; beside that the optimizer's own decay goes on.

    Choose it for global sparse momentum (GSM): what is never chosen is nearly nothing before it is cut.

    Beware: fade is ours. The paper's weights shrink by the optimizer's decay alone, which takes runs in which
    rate decay steps / (1 - momentum) reaches 8 or so, hundreds of thousands of steps; in hundreds, weights would be cut
    that are as large as ever.

    >>> active(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]), torch.tensor([[True, False]]), 100)[1].tolist()
    [[2.0, 0.0]]
    >>> mask = torch.tensor([[True, False]])
    >>> active(torch.ones(1, 2), torch.ones(1, 2), mask, 2, fade=math.log(4.0))[0].tolist()
    [[1.0, 0.5]]

    Source: Ding et al., Global sparse momentum SGD, arXiv 1909.12778, and its official code (rate 5e-3, decay 1e-4,
    momentum 0.98, 600 epochs of 782 steps).
    """
    if fade:
        weight = torch.where(mask, weight, weight * math.exp(-fade / steps))
    return weight, gradient * mask


@register("hold", weight="dense", state="free", backward="dense", paper="2006.07253", survey="B2.3")
def dense(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The model is the masked one; its gradient, taken there, moves the dense weights behind it (straight-through).

    :: w <- w - rate grad L(mask w)

    Choose it where weights that were cut too early are to come back with the values they had.

    Beware: the session keeps the dense weights.

    >>> dense(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]))[1].tolist()
    [[2.0, 3.0]]

    Source: Lin et al., Dynamic model pruning with feedback, arXiv 2006.07253, equation 3 and algorithm 1.
    """
    return weight, gradient


@register("hold", weight="dense", state="zero", backward="sparse", rounds=True, paper="1712.05877", survey="D1")
def integers(
    weight: Tensor, gradient: Tensor, mask: Tensor, *, bits: int = 8, group: int = 0, activations: int = 0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The model reads weights rounded to integers times a scale; its gradient moves the floats behind them.

    :: q = mask s round(w / s),  s = max |w| of a group / (2^(bits-1) - 1/2);  g = mask grad L(q)

    The straight-through estimator: rounding counts as the identity in the backward pass. Grids are found anew after
    each step; those that a model has been quantized on, and that the session is given, stay, and codes alone move.
    ``group`` is the number of inputs that share a scale, 0 for all of an output's. With ``activations`` 8 what linear
    layers read is rounded too while the session lasts, with one scale for each token, max |x| / 127, as the kernels of
    kind int8-dynamic do it. At the end the model has the rounded weights, and what is gone is zero.

    Choose it to heal a pruned model that is to be stored as integers (recovery qat).

    Beware: the session keeps the floats. Convolutions read floats, as they do when int8-dynamic runs.

    >>> integers(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]), torch.tensor([[True, False]]))[1].tolist()
    [[2.0, 0.0]]

    Source: Jacob et al., Quantization and training, arXiv 1712.05877, section 3, from the paper's description, with the
    straight-through gradient of Bengio et al., arXiv 1308.3432; symmetric, without biases and batch norms, activations
    with a scale for each token, where the paper has one for each layer.
    """
    return weight, gradient * mask


@register("hold", weight="zero", state="zero", backward="sparse", ties=True, paper="1510.00149", survey="D1")
def shared(
    weight: Tensor, gradient: Tensor, mask: Tensor, cluster: Tensor, *, average: bool = False
) -> tuple[Tensor, Tensor]:
    """Weights that share a value go on sharing it: the gradient moves the value, and which weights have it stays.

    :: dL/dc_k = sum over weights w with value c_k of dL/dw;  each of them moves by the optimizer's step for c_k

    With ``average`` it is the mean over these weights instead of the sum: the step that comes nearest to what they
    would do apart, at learning rates that are made for single weights.

    Choose it to train the codebooks of a model whose survivors share values (recovery codebooks).

    Beware: a value that thousands share has a sum of thousands of gradients; with plain SGD give a rate as much
    smaller, or average. At most 256 values in a layer.

    >>> mask, cluster = torch.ones(1, 3).bool(), torch.tensor([[0, 1, 0]])
    >>> shared(torch.ones(1, 3), torch.tensor([[1.0, 2.0, 3.0]]), mask, cluster)[1].tolist()
    [[4.0, 2.0, 4.0]]

    Source: Han, Mao and Dally, Deep compression, arXiv 1510.00149, section 3.3 (equation 3); average is ours.
    """
    there = mask & (cluster >= 0)
    which = cluster[there].long()
    total = torch.zeros(int(cluster.max()) + 1, dtype=torch.float32, device=gradient.device)
    total.index_add_(0, which, gradient[there].float())
    if average:
        total = total / torch.bincount(which, minlength=total.numel()).clamp_min(1)
    new = torch.zeros_like(gradient)
    new[there] = total[which].to(gradient.dtype)
    return weight, new


@register("hold", weight="dense", state="free", backward="sparse", paper="2005.07683")
def frozen(weight: Tensor, gradient: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The model is the masked one; what is gone keeps the value it had, and gets no gradient.

    :: g' = mask g

    Choose it for criteria with a memory of their own, such as movement, that decide when a weight comes back.

    Beware: the session keeps the dense weights, and the optimizer's momentum and decay still move them.

    >>> frozen(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]), torch.tensor([[True, False]]))[1].tolist()
    [[2.0, 0.0]]

    Source: Sanh et al., Movement pruning, arXiv 2005.07683, section 4: the gradient of a = (w mask) x.
    """
    return weight, gradient * mask


@register("hold", name="sr-ste", weight="dense", state="free", backward="dense", paper="2102.04010", survey="A2.1")
def sr_ste(weight: Tensor, gradient: Tensor, mask: Tensor, *, decay: float = 2e-4) -> tuple[Tensor, Tensor]:
    """Straight-through, and what is gone decays, so that the mask changes less and less.

    :: g' = g + decay (1 - mask) w

    Choose it for training N:M masks from scratch.

    Beware: the session keeps the dense weights. The decay is for plain SGD's scale of gradients.

    >>> sr_ste(torch.tensor([[5.0, 1.0]]), torch.ones(1, 2), torch.tensor([[True, False]]), decay=0.5)[1].tolist()
    [[1.0, 1.5]]

    Source: Zhou et al., Learning N:M fine-grained structured sparse neural networks from scratch, arXiv 2102.04010,
    equation 5, and its official code (decay 2e-4).
    """
    return weight, gradient + decay * (weight * ~mask)


@register("hold", name="top-kast", weight="dense", state="free", backward="reach", paper="2106.03517", survey="B2.2")
def top_kast(
    weight: Tensor, gradient: Tensor, mask: Tensor, reach: Tensor, *, size: float = 2.0, penalty: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """A small set of weights computes the model, a larger one around it gets gradients, and both pay for their size.

    :: g' = reach (g + penalty w (mask + (1 - mask) / density))

    ``reach`` is the ``size`` times larger set of the best weights, and holds the mask. The penalty is the gradient of
    half the sum of squares; what is in reach only pays more, so that a weight must earn its place.

    Choose it for sparse training in which the backward pass is sparse too.

    Beware: the session keeps the dense weights, which the paper keeps on the host. Leave the optimizer's weight decay
    at 0: it would move weights out of reach.

    >>> mask, reach = torch.tensor([[True, False, False, False]]), torch.tensor([[True, True, False, False]])
    >>> top_kast(torch.ones(1, 4), torch.zeros(1, 4), mask, reach, penalty=1.0)[1].tolist()
    [[1.0, 4.0, 0.0, 0.0]]

    Source: Jayakumar et al., Top-KAST, arXiv 2106.03517, sections 2.1 to 2.3: the sets and the 1 / density of the
    exploration penalty; its weight of 1e-4 is ours.
    """
    density = mask.sum() / mask.numel()
    price = torch.where(mask, 1.0, 1.0 / density.clamp_min(1.0 / mask.numel()))
    return weight, (gradient + penalty * price.to(weight.dtype) * weight) * reach


@register("hold", weight="zero", state="zero", backward="sparse", paper="1711.05136", survey="B2.2")
def walk(
    weight: Tensor,
    gradient: Tensor,
    mask: Tensor,
    sign: Tensor,
    rate: float,
    generator: torch.Generator,
    *,
    l1: float = 1e-5,
    temperature: float = 2.5e-11,
) -> tuple[Tensor, Tensor]:
    """Weights that are there take a random step and one toward zero, beside the optimizer's.

    :: w <- w - rate l1 sign + sqrt(2 rate temperature) N(0, 1)

    ``rate`` is the optimizer's learning rate.

    Choose it for deep rewiring, where a weight whose sign flips is gone.

    Beware: a random number for each weight in each step.

    >>> mask, sign = torch.tensor([[True, False]]), torch.tensor([[True, True]])
    >>> w, draws = torch.ones(1, 2), torch.Generator()
    >>> walk(w, torch.zeros(1, 2), mask, sign, 0.5, draws, l1=1.0, temperature=0.0)[0].tolist()
    [[0.5, 1.0]]

    Source: Bellec et al., Deep rewiring, arXiv 1711.05136, algorithm 1, line 4. The temperature gives the noise of the
    official script, 1e-5 times the rate, at its rate of 0.5.
    """
    noise = torch.randn(weight.shape, generator=generator, device=generator.device).to(weight)
    toward = (sign.to(weight.dtype) * 2 - 1) * (rate * l1)
    return weight + mask * ((2 * rate * temperature) ** 0.5 * noise - toward), gradient
