"""How much flows through each weight of the linear network of absolute values: what SynFlow looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelError, NumericalError
from ..layers import Layer, evaluating
from .stand_ins import Run, call_with, names_of, part_of, reshaped, total
from .watch import _undispatched

#: Smooth functions of one tensor. Those that are linear on positive numbers, such as ReLU, are left as they are.
_ACTIVATIONS = {
    F.gelu, F.silu, F.elu, F.selu, F.celu, F.mish, F.softplus, F.softsign, F.logsigmoid, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.relu6, F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.tanh, Tensor.tanh, F.tanh,
    torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.erf, Tensor.erf,
}  # fmt: skip
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
#: Normalizations by groups of positions of one sample: function -> (position of the weight, whether it lies on axis 1).
_NORMS = {F.layer_norm: (2, False), F.rms_norm: (2, False), F.group_norm: (2, True), F.instance_norm: (3, True)}


def gather_flow(model: nn.Module, layers: Sequence[Layer], batch: Any, run: Run) -> dict[str, dict[str, Tensor]]:
    """The fact ``flow`` of every layer: the gradient of ``log R`` by ``|w|``, in float64.

    ``R`` is the sum of the outputs for one input of ones, of the shape of the batch's first row, of the linear network
    that has the absolute values of the weights: biases are zero; normalizations only scale (batch norms by their
    running variance too); smooth activations let everything pass; attention spreads by the positive parts of its
    logits, divided by their sum, which counts as a constant, so that the flow passes queries, keys and values alike;
    embeddings give ones. Then the sums of ``|w| flow`` over layers that all of the flow passes are all 1.

    The model itself is not touched.

    Raises:
        ModelError: the flow passes none of the layers.
        NumericalError: nothing flows, or more than a float can hold.
    """
    names = names_of(model, layers)
    wanted = set(names.values())
    values: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            values[name] = tensor.detach().clone()
            continue
        wide = tensor.detach().to(_wide(tensor), copy=True)
        if isinstance(tensor, nn.Parameter):
            wide = wide.zero_() if name.endswith("bias") else wide.abs_()
        values[name] = wide.requires_grad_(name in wanted)
    hooks = [m.register_forward_hook(_scaled) for m in model.modules() if _own_norm(m)]
    try:
        with evaluating(model), torch.enable_grad(), _Linear({id(values[n]) for n in wanted}):
            flow = total(call_with(model, values, run, reshaped(batch, _ones))).sum()
    finally:
        for hook in hooks:
            hook.remove()
    if not flow.requires_grad:
        raise ModelError("nothing that is pruned lies between the input and the output: flow has nothing to pass")
    if not bool(torch.isfinite(flow)) or float(flow.detach()) == 0.0:
        what = "nothing flows from the input to the output" if float(flow.detach()) == 0.0 else "the flow overflows"
        raise NumericalError(f"{what} of the network of absolute weights: SynFlow cannot rank its weights")
    order = sorted(wanted)
    gradients = torch.autograd.grad(flow.log(), [values[n] for n in order], allow_unused=True)
    found = dict(zip(order, gradients, strict=True))
    return {x.name: {"flow": part_of(x, found[names[x.name]])} for x in layers}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _ones(tensor: Tensor) -> Tensor:
    row = tensor[:1] if tensor.dim() > 1 else tensor
    return torch.ones_like(row, dtype=_wide(tensor)) if tensor.is_floating_point() else row


def _own_norm(module: nn.Module) -> bool:
    """A normalization that its own code computes, as transformers' RMSNorms do."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.lower().endswith("norm") and not type(module).__module__.startswith("torch.")
    return named and isinstance(weight, Tensor) and weight.dim() == 1 and not list(module.children())


def _scaled(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    weight: Any = module.weight
    x = args[0] if args else None
    return x * weight if isinstance(x, Tensor) and x.shape[-1] == weight.shape[0] else output


class _Linear(TorchFunctionMode):
    """Every function as that of the linear network. ``pruned``: ids of the weights that are differentiated."""

    def __init__(self, pruned: set[int]) -> None:
        super().__init__()
        self._pruned = pruned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with _undispatched(), self:  # a mode is off while it handles a call; look inside this one
                return func(*args, **kwargs)
        if func in _ACTIVATIONS:
            return args[0] if args else kwargs["input"]
        if func in _SOFTMAX:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            return _shares(args[0] if args else kwargs["input"], -1 if dim is None else dim)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func in _NORMS:
            place, second = _NORMS[func]
            weight = args[place] if len(args) > place else kwargs.get("weight")
            return _times(args[0] if args else kwargs["input"], weight, second)
        if func is F.embedding:
            return self._embedding(func, args, kwargs)
        return func(*args, **kwargs)

    def _embedding(self, func: Any, args: Any, kwargs: Any) -> Any:
        ids = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if id(weight) in self._pruned:
            return func(*args, **kwargs)
        return torch.ones(*ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)


def _times(x: Tensor, weight: Tensor | None, second: bool) -> Tensor:
    if weight is None:
        return x
    return x * (weight.reshape(-1, *[1] * (x.dim() - 2)) if second else weight)


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    scaled = input if running_var is None else _times(input, (running_var + eps).rsqrt(), True)
    return _times(scaled, weight, True)


def _shares(x: Tensor, dim: int) -> Tensor:
    """Positive parts over their sum, which is a constant to derivatives."""
    positive = x.clamp(min=0)
    whole = positive.detach().sum(dim, keepdim=True)
    return positive / torch.where(whole > 0, whole, 1.0)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    logits = query @ key.mT
    if is_causal:
        logits = logits.tril()
    if attn_mask is not None:  # biases of attention are sources, as others are; what forbids stays forbidden
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4
        logits = logits.masked_fill(~allowed, 0.0)
    return _shares(logits, -1) @ value
