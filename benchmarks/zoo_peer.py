"""torch-pruning's side of the zoo, used as its README and its examples say. What it computes is not checked.

Half of the channels of every group, by `GroupMagnitudeImportance`; the head is ignored. Attention gets `num_heads` as
in its examples for timm, transformers' encoders and language models, and their attributes are set afterwards as there:
whole heads go in language models and text encoders, dimensions of every head in vision models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from zoo_models import Case

os.environ["TIMM_FUSED_ATTN"] = "0"  # as its timm example does, before timm is imported

SPLIT = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
FUSED = ("qkv", "qkv_proj", "query_key_value")


def run(case: Case, say: Callable[..., None]) -> dict[str, Any]:
    import torch_pruning as tp

    say(stage="build")
    model = case.build(0)
    example = case.inputs(0)
    shape = first_shape(model, example)
    before = sum(p.numel() for p in model.parameters())
    say(stage="prune", params=[before, before])
    begun = time.perf_counter()
    attentions = {m: found for m in model.modules() if (found := projections(m, model))}
    heads = {layer: n for found in attentions.values() for layer, n in found.items()}
    text = case.kind not in ("vision", "none", "segmentation")
    options: dict[str, Any] = {"num_heads": heads}
    if text:
        options |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    if case.kind == "decoder":
        pairs = [getattr(m, "gate_up_proj", None) for m in model.modules()]
        options |= {"round_to": 4, "out_channel_groups": {m: 2 for m in pairs if isinstance(m, nn.Linear)}}
    elif isinstance(example, Mapping):
        options["output_transform"] = lambda out: out.logits.sum() if "logits" in out else out
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[m for m in model.modules() if is_head(m, case.classes)],
        **options,
    )
    pruner.step()
    for module, found in attentions.items():
        follow(module, list(found), pruner.num_heads)
    seconds = {"prune": time.perf_counter() - begun}
    after = sum(p.numel() for p in model.parameters())
    known = {"params": [before, after], "seconds": seconds}
    say(stage="run", **known)
    changed = first_shape(model, example) != shape
    outcome = "wrong" if changed else "smaller" if 1 - after / before >= 0.25 else "little"
    reason = "its output has another shape" if changed else "left as it was, silently" if after == before else ""
    return {**known, "outcome": outcome, "reason": reason}


def is_head(module: nn.Module, classes: tuple[int, ...]) -> bool:
    size = getattr(module, "out_features", getattr(module, "out_channels", None))
    return isinstance(module, (nn.Linear, nn.Conv2d)) and size in classes


def projections(module: nn.Module, model: nn.Module) -> dict[nn.Module, int]:
    """The projections of an attention module -> their heads."""
    config = getattr(module, "config", None) or getattr(model, "config", None)
    names = ("num_heads", "num_attention_heads", "n_heads")
    found = next((n for x in (module, config) for a in names if type(n := getattr(x, a, None)) is int), None)
    if found is None:
        return {}
    groups = getattr(config, "num_key_value_heads", None) or found
    for q, k, v in SPLIT:
        layers = [getattr(module, x, None) for x in (q, k, v)]
        if all(isinstance(x, nn.Linear) for x in layers):
            return dict(zip(layers, (found, groups, groups), strict=True))  # type: ignore[arg-type]
    return {x: found for n in FUSED if isinstance(x := getattr(module, n, None), nn.Linear)}


def follow(module: nn.Module, layers: list[nn.Module], heads: Mapping[nn.Module, int]) -> None:
    """Set the sizes that an attention module keeps, as the examples do after pruning."""
    width, left = int(layers[0].out_features) // (1 if len(layers) > 1 else 3), heads[layers[0]]  # type: ignore[arg-type]
    values = {
        "num_heads": left,
        "num_attention_heads": left,
        "n_heads": left,
        "head_dim": width // left,
        "attention_head_size": width // left,
        "attn_dim": width,
        "all_head_size": width,
        "inner_dim": width,
    }
    if len(layers) > 1:
        values["num_key_value_groups"] = left // max(heads[layers[1]], 1)
    for name, value in values.items():
        if type(getattr(module, name, None)) is int:
            setattr(module, name, value)


@torch.no_grad()
def first_shape(model: nn.Module, example: Any) -> tuple[int, ...]:
    """The shape of the first output."""
    out = model(**example) if isinstance(example, Mapping) else model(example)
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return tuple(out.shape)
