"""Methods by which a decoder leaves out what does not count for a token, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calibrate import batches_of, run_model
from ..errors import ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..registry import register
from ..stream import find_blocks
from .decoder import ids_of
from .sparse import Gated, Inputs, Scored, SparseDecoder, thresholds

WHERE = ("A3.1", "B3.6", "B4", "E4")


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparseDecoder:
    made, found = saved["record"], saved["saved"]
    ids = torch.tensor(made["example"], device=next(model.parameters()).device)
    sites = {"teal": linears, "cats": gated}[made["method"]](model, ids)
    known = {site.path: site for site in sites}
    if missing := sorted(set(found["thresholds"]) - set(known)):
        raise ModelError(f"runtime.json does not fit the model: it has no {missing[0]}")
    for path, threshold in found["thresholds"].items():
        known[path].threshold = float(threshold)
    return SparseDecoder(model, [known[path] for path in found["thresholds"]], bool(found["prompt"]), made)


@register("transform", paper="2408.14690", survey=WHERE, when="runtime", restore=_restored, decodes=True)
def teal(
    model: nn.Module, example: Any, data: Any, *, sparsity: float = 0.5, greedy: bool = False, prompt: bool = False
) -> SparseDecoder:
    """Leave out the small features of what every linear layer of a decoder reads, token by token.

    :: y = sum over i with |x_i| > t of x_i W_:,i

    Each linear layer in a block has a threshold t below which, on the data, exactly the fraction ``sparsity`` of its
    inputs lies; with ``greedy``, fractions differ between the layers of a block such that its output changes least, and
    their mean over weights is ``sparsity``. Columns of the weight for the others are not read when a token is decoded.

    Choose it to generate faster where reading weights takes the time: one text at a time, wide layers.

    Beware: it keeps the linear layers' weights a second time, by columns. A prompt takes as long as ever; with
    ``prompt`` its features are set to zero too, which saves nothing and shows what it would lose.

    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> ids = torch.arange(20)[None]
    >>> teal(transformers.LlamaForCausalLM(config), ids, ids, sparsity=0.5).told()
    'teal: 50 % of the features of 14 sites, prompts in full'

    Source: Liu et al., TEAL, arXiv 2408.14690, sections 4 and 5 (algorithm 1 for greedy) and the official code.
    Thresholds are order statistics of the data here, where its code reads them from a histogram.
    """
    refuse_sparsity(sparsity)
    sites = linears(model, ids_of(example))
    batches = batches_of(data)
    fractions = {site.path: sparsity for site in sites}
    if greedy:
        from .shares import shares

        fractions = shares(model, cast("list[Inputs]", sites), batches[0], sparsity)
    return _made(model, example, sites, batches, fractions, sparsity, prompt, {"method": "teal", "greedy": greedy})


@register("transform", paper="2404.08763", survey=WHERE, when="runtime", restore=_restored, decodes=True)
def cats(model: nn.Module, example: Any, data: Any, *, sparsity: float = 0.5, prompt: bool = False) -> SparseDecoder:
    """Leave out the neurons of a decoder's feed-forward parts whose gates are nearly shut, token by token.

    :: y = sum over j with |act(W_gate x)_j| > t of act(W_gate x)_j (W_up x)_j W_down,:,j

    Each feed-forward part has a threshold t below which, on the data, exactly the fraction ``sparsity`` of the gates
    lies. The gate is computed in full; rows of the second and columns of the third weight for the others are not read
    when a token is decoded.

    Choose it before teal where feed-forward parts hold most weights and are gated (SiLU, GELU): it loses less there.

    Beware: at most two thirds of a feed-forward part can be saved. It keeps the third weight a second time, by columns.
    A prompt takes as long as ever; with ``prompt`` its neurons are set to zero too, which saves nothing.

    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> ids = torch.arange(20)[None]
    >>> cats(transformers.LlamaForCausalLM(config), ids, ids, sparsity=0.5).told()
    'cats: 50 % of the features of 2 sites, prompts in full'

    Source: Lee et al., CATS, arXiv 2404.08763, equations 2 and 3 and section 4, from the paper's description; without
    the fine-tuning that it offers.
    """
    refuse_sparsity(sparsity)
    sites = gated(model, ids_of(example))
    fractions = {site.path: sparsity for site in sites}
    return _made(model, example, sites, batches_of(data), fractions, sparsity, prompt, {"method": "cats"})


def refuse_sparsity(sparsity: float) -> None:
    """Refuse what is no fraction."""
    if not 0 <= sparsity < 1:
        raise RecipeError(f"sparsity is {sparsity}: it is the fraction that is left out, 0 or more and below 1")


#: Path, module, first input and output of a call of a module.
Call = tuple[str, nn.Module, Tensor, Tensor]


def watched(model: nn.Module, ids: Tensor) -> list[Call]:
    """The first calls of modules in blocks, in the order in which they end."""
    blocks = find_blocks(model)
    if blocks is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks: give a decoder")
    calls: list[Call] = []
    ran: set[str] = set()

    def hook(path: str, module: nn.Module, args: Any, out: Any) -> None:
        if path not in ran and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            ran.add(path)
            calls.append((path, module, args[0], out))

    handles = []
    for path, module in model.named_modules():
        if path.startswith(f"{blocks.path}."):
            handles.append(module.register_forward_hook(partial(hook, path)))
    try:
        with evaluating(model), torch.no_grad():
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def linears(model: nn.Module, ids: Tensor) -> list[Scored]:
    """All linear layers of the blocks that read tokens one by one.

    Raises:
        ModelError: there are none.
    """
    recent: dict[str, Any] = {}
    found: list[Scored] = [
        Inputs(path, module, recent)
        for path, module, x, _ in watched(model, ids)
        if type(module) is nn.Linear and x.dim() == 3
    ]
    if not found:
        raise ModelError(f"the blocks of {type(model).__name__} have no nn.Linear that could leave out features")
    return found


@dataclass(frozen=True, eq=False)
class Three:
    """Paths and modules of a feed-forward part ``down(act(gate(x)) * up(x))``."""

    path: str
    gate: tuple[str, nn.Linear]
    act: nn.Module
    up: tuple[str, nn.Linear]
    down: tuple[str, nn.Linear]


def threes(calls: list[Call]) -> list[Three]:
    """All feed-forward parts with a gate that are modules, found by what their layers read and give."""
    found = []
    layers = [c for c in calls if type(c[1]) is nn.Linear and c[2].dim() == 3]
    for path, module, x, out in calls:
        inner = [c for c in layers if c[0].startswith(f"{path}.")]
        if len(inner) != 3 or isinstance(module, nn.Linear):
            continue
        for gate in inner:
            act = next((c for c in calls if c[2] is gate[3] and c[3].shape == gate[3].shape), None)
            others = [c for c in inner if c is not gate]
            up = next((c for c in others if c[2] is x and gate[2] is x), None)
            if act is None or up is None:
                continue
            down = next(c for c in others if c is not up)
            if down[3] is out and torch.allclose(act[3] * up[3], down[2], rtol=1e-3, atol=1e-6):
                one, two, three = (cast("tuple[str, nn.Linear]", c[:2]) for c in (gate, up, down))
                found.append(Three(path, one, act[1], two, three))
    return found


def gated(model: nn.Module, ids: Tensor) -> list[Scored]:
    """All feed-forward parts ``down(act(gate(x)) * up(x))``.

    Raises:
        ModelError: there are none.
    """
    found = threes(watched(model, ids))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no feed-forward part down(act(gate(x)) * up(x)) of three nn.Linear: take teal"
        )
    return [Gated(f.path, f.gate[1], f.act, f.up[1], f.down[1]) for f in found]


def _made(
    model: nn.Module,
    example: Any,
    sites: list[Scored],
    batches: list[Any],
    fractions: Mapping[str, float],
    sparsity: float,
    prompt: bool,
    record: dict[str, Any],
) -> SparseDecoder:
    ids = ids_of(example)
    with evaluating(model), torch.no_grad():
        thresholds(model, sites, batches, fractions, run_model)
    before = flops(model, input_ids=ids[:1, :1]).total
    record |= {
        "fraction": sparsity, "prompt": prompt, "fractions": dict(fractions), "example": ids[:1, :16].tolist(),
        "flops": {"before": before, "after": before - sum(site.flops(fractions[site.path]) for site in sites)},
    }  # fmt: skip
    return SparseDecoder(model, sites, prompt, record)
