"""Deja Vu: small networks learn on the user's text which neurons of a feed-forward part a token needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..calibrate import batches_of, run_model
from ..errors import DataError, ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..registry import register
from ..select import keep_count, select
from ..solve import layer_generator
from .contextual import WHERE, refuse_sparsity, threes, watched
from .decoder import ids_of
from .foreseen import Closes, Foreseen, Foresight, Opens, Part, Predictor
from .sparse import Site, SparseDecoder, tokens_of

#: Tokens of one step of training, its first rate, and the decay of weights.
_BATCH, _RATE, _DECAY = 256, 1e-3, 0.01
#: What the official code adds to the share of neurons that count, in the weight of those that do not.
_FLOOR = 0.005
#: How far a logit moves with a probability, about one half.
_STEEP = 4.0
#: The share of the tokens, at the end of the data, that predictors are proven on; and the fewest there must be.
_HELD, _LEAST = 0.1, 20


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparseDecoder:
    record = saved["record"]
    ids = torch.tensor(record["example"], device=next(model.parameters()).device)
    known = {part.path: part for part in parts(model, ids)}
    found = [known[path] for path in record["parts"] if path in known]
    if len(found) < len(record["parts"]):
        raise ModelError(f"runtime.json does not fit the model: it has no {sorted({*record['parts']} - {*known})[0]}")
    predictors = []
    for number, part in enumerate(found):
        own = {name: tensors[f"{number}.{name}"] for name in ("narrow", "widen", "often")}
        predictor = Predictor(own["narrow"].shape[1], *own["widen"].T.shape).to(part.first.weight)
        predictor.load_state_dict(own)
        predictors.append(predictor)
    return _decoder(model, found, predictors, bool(record["ahead"]), record)


@register(
    "transform", name="deja-vu", paper="2310.17157", survey=WHERE, when="runtime", restore=_restored, decodes=True
)
def deja_vu(
    model: nn.Module,
    example: Any,
    data: Any,
    *,
    sparsity: float = 0.5,
    rank: int = 64,
    ahead: bool = False,
    epochs: int = 5,
    seed: int = 0,
    prompt: bool = False,
) -> SparseDecoder:
    """Compute those neurons of a decoder's feed-forward parts alone that a small learned network foresees for a token.

    :: y = sum over j in top_k(B A x + b) of act(W_gate x)_j (W_up x)_j W_down,:,j

    Each feed-forward part has a predictor of two layers of this rank. It learns, on the data, to tell the 1 - sparsity
    of the neurons with the largest |act(W_gate x) (W_up x)|, or |act(W_1 x)| where there is no gate, from the others.
    When a token is decoded, the neurons that it ranks first are computed, and rows and columns of all weights for the
    others are not read. With ``ahead`` it reads what the part of the block before read, and so could run beside that
    block; here it runs in its turn.

    Choose it where feed-forward parts are wide and few neurons count, behind ReLU above all: it saves of all their
    weights, where cats computes the gate in full.

    Beware: what was not foreseen is lost. Neurons behind SiLU and GELU are seldom near zero, and which ones count is
    hard to foresee; the recall on held-out text is printed, and beside it that of the same neurons for every token.
    Training holds what the parts read of all the data. Attention heads are computed in full. It keeps the last weight a
    second time, by columns. A prompt takes as long as ever; with ``prompt`` its neurons are set to zero too.

    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> ids = torch.arange(40)[None]
    >>> fast = deja_vu(transformers.LlamaForCausalLM(config), ids, ids, rank=4, epochs=1)
    >>> fast.told().split(";")[0]
    'deja-vu: 50 % of the features of 2 sites, prompts in full'

    Source: Liu et al., Deja Vu, arXiv 2310.17157, sections 4.1 and 4.3, and the official code (two layers without a
    function between them, its weighted loss, AdamW, the first k by rank). Ours: the bias; the start, which is the best
    of that rank by least squares in place of a random one; labels where there is no ReLU; that predictors read behind
    the norm, which the code reads in front of; and that no training ends early. Its sparse attention is left out.
    """
    refuse_sparsity(sparsity)
    if rank < 1 or epochs < 0:
        raise RecipeError(f"rank is {rank} and epochs {epochs}: features of a predictor, 1 or more, and 0 or more")
    ids = ids_of(example)
    found = parts(model, ids)
    predictors, recall = _learned(model, found, batches_of(data), sparsity, rank, ahead, epochs, seed)
    before = flops(model, input_ids=ids[:1, :1]).total
    gone = sum(part.weights * (part.down.in_features - _count(part, sparsity)) for part in found)
    cost = sum(p.flops for p, part in zip(predictors, found, strict=True) if _count(part, sparsity) < len(p.often))
    record = {
        "method": "deja-vu", "fraction": sparsity, "rank": rank, "ahead": ahead, "epochs": epochs, "seed": seed,
        "prompt": prompt, "parts": [part.path for part in found], "recall": recall, "example": ids[:1, :16].tolist(),
        "predictors": {"parameters": sum(x.numel() for p in predictors for x in p.parameters()), "flops": cost},
        "flops": {"before": before, "after": before - 2 * gone + cost},
    }  # fmt: skip
    return _decoder(model, found, predictors, ahead, record)


def parts(model: nn.Module, ids: Tensor) -> list[Part]:
    """The feed-forward parts of the blocks, with and without a gate, found by what their layers read and give.

    Raises:
        ModelError: there are none.
    """
    calls = watched(model, ids)
    found = [Part(t.path, t.gate[0], t.down[0], t.gate[1], t.act, t.up[1], t.down[1]) for t in threes(calls)]
    inside = {id(layer) for part in found for layer in (part.first, part.up, part.down)}
    layers = [c for c in calls if type(c[1]) is nn.Linear and id(c[1]) not in inside]
    for path, first, x, made in layers:
        act = next((c for c in calls if c[2] is made and c[3].shape == made.shape and c[1] is not first), None)
        down = next((c for c in layers if act is not None and c[2] is act[3]), None)
        if act is not None and down is not None and x.shape[:-1].numel() == ids.numel():
            found.append(Part(path, path, down[0], cast("nn.Linear", first), act[1], None, cast("nn.Linear", down[1])))
    order = [path for path, *_ in calls]
    found.sort(key=lambda part: order.index(part.reads))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no feed-forward part down(act(up(x))) or down(act(gate(x)) * up(x)) of "
            "nn.Linear: take teal"
        )
    return found


def _count(part: Part, sparsity: float) -> int:
    return keep_count(1 - sparsity, part.down.in_features)


def _decoder(
    model: nn.Module, found: list[Part], predictors: list[Predictor], ahead: bool, record: Mapping[str, Any]
) -> SparseDecoder:
    recent: dict[str, Tensor] = {}
    sites: list[Site] = []
    for number, (part, predictor) in enumerate(zip(found, predictors, strict=True)):
        source = found[number - 1].path if ahead and number else None
        foresight = Foresight(
            part.path, predictor.requires_grad_(False), _count(part, record["fraction"]), source,
            ahead and number + 1 < len(found), recent,
        )  # fmt: skip
        if foresight.count == part.down.in_features:
            continue  # nothing is left out
        if part.path != part.reads:
            sites.append(Foreseen(part, foresight, part.path))
        else:
            opens = Opens(part, foresight, part.path)
            sites += [opens, Closes(opens, part.closes)]
    return SparseDecoder(model, sites, bool(record["prompt"]), record, predictors)


def _learned(
    model: nn.Module,
    found: list[Part],
    batches: list[Any],
    sparsity: float,
    rank: int,
    ahead: bool,
    epochs: int,
    seed: int,
) -> tuple[list[Predictor], dict[str, list[float]]]:
    """A predictor of each part; and of the neurons that count on held-out tokens the share that it finds, by part.

    Beside it that of the same neurons for every token, those that count most often.
    """
    read: dict[str, list[Tensor]] = {part.path: [] for part in found}
    with evaluating(model), torch.no_grad():
        for batch in batches:
            handles = [part.first.register_forward_pre_hook(partial(_keep, read[part.path], batch)) for part in found]
            try:
                run_model(model, batch)
            finally:
                for handle in handles:
                    handle.remove()
    predictors: list[Predictor] = []
    recall: dict[str, list[float]] = {"predicted": [], "constant": []}
    for number, part in enumerate(found):
        own = torch.cat(read[part.path])
        given = torch.cat(read[found[number - 1].path]) if ahead and number else own
        if len(own) < _LEAST:
            raise DataError(f"predictors learn from {len(own)} tokens of the data here: give {_LEAST} or more")
        device = part.first.weight.device
        generator = layer_generator(seed, part.path, torch.device("cpu"))
        predictor, *shares = _trained(part, given.to(device), own.to(device), sparsity, rank, epochs, generator)
        predictors.append(predictor.to(part.first.weight.dtype))
        for name, share in zip(recall, shares, strict=True):
            recall[name].append(share)
    return predictors, recall


def _keep(read: list[Tensor], batch: Any, layer: nn.Module, args: tuple[Any, ...]) -> None:
    read.append(tokens_of(batch, args[0]).detach().cpu())


def _trained(
    part: Part, given: Tensor, own: Tensor, sparsity: float, rank: int, epochs: int, generator: torch.Generator
) -> tuple[Predictor, float, float]:
    """The predictor of one part, and what it and a constant choice find of what counts on the tokens at the end."""
    count, device = _count(part, sparsity), own.device
    with torch.no_grad():
        score = torch.cat([part.score(x) for x in own.split(1024)])
        counts = select(score, count) & (score > 0)
    given = given.float()
    train = len(own) - max(1, round(_HELD * len(own)))
    predictor = start(given[:train], counts[:train], rank)
    steps = max(1, epochs * -(-train // _BATCH))
    optimizer = torch.optim.AdamW(predictor.parameters(), _RATE, weight_decay=_DECAY)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for at in torch.randperm(train, generator=generator).split(_BATCH):
                wanted = counts[:train][at.to(device)].float()
                share = wanted.mean() + _FLOOR
                loss = binary_cross_entropy_with_logits(
                    predictor(given[at.to(device)]), wanted, weight=wanted * (1 - share) + share
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                slower.step()
    with torch.no_grad():
        held = counts[train:]
        often = counts[:train].float().mean(0, keepdim=True).expand(held.shape)
        one, same = (
            float((select(ranks, count) & held).sum() / held.sum().clamp_min(1))
            for ranks in (predictor(given[train:]), often)
        )
    return predictor, one, same


def start(given: Tensor, counts: Tensor, rank: int) -> Predictor:
    """The predictor of this rank that is nearest to what counts by least squares."""
    rank = min(rank, given.shape[1], counts.shape[1])
    predictor = Predictor(given.shape[1], rank, counts.shape[1]).to(given.device)
    middle, share = given.mean(0), counts.float().mean(0)
    apart = given - middle
    size, turn = torch.linalg.eigh(apart.T @ apart / len(apart))
    root = (turn * size.clamp_min(1e-6 * float(size[-1]) + 1e-30).rsqrt()) @ turn.T
    seen = root @ (apart.T @ (counts.float() - share) / len(apart))
    left = torch.linalg.eigh(seen @ seen.T).eigenvectors[:, -rank:]
    with torch.no_grad():
        predictor.narrow.copy_((root @ left).T)
        predictor.widen.copy_(_STEEP * (left.T @ seen).T)
        predictor.often.copy_(share.clamp(0.01, 0.99).logit() - predictor.widen @ (predictor.narrow @ middle))
    return predictor
