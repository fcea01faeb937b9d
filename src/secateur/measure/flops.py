"""Floating-point operations of a forward pass, counted while it runs.

Conventions, which are those of the papers that report a model's FLOPs:

- Only the multiply-adds of linear maps count: matrix products, convolutions, attention, recurrent layers. Lookups,
  pointwise operations, normalization, softmax, pooling, interpolation, reductions and copies are zero.
- A multiply-add is two operations; a bias is none.
- Shapes decide, not values: a zero weight, a masked or causal position and a padded border count like any other.
  Attention is its two products over all pairs of positions. A sparse tensor counts as the dense one of its shape,
  and so does a packed weight. What a mask saves does not show in `flops`; what is cut out of the shapes does.
  `effective_flops` leaves out the multiply-adds with weights that are zero.
- What runs is what counts: an expert that no token is sent to costs nothing, and a kernel that is given padded
  tensors (flash attention on CUDA rounds the head size up to a multiple of 8) counts the padding.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass; the conventions stand at the head of this module.

    Attributes:
        total: all operations, two per multiply-add.
        by_module: qualified module name -> operations while it ran, those of the modules that it called included;
            the whole model is ``""``. A module that runs more than once adds up. One that was not called has no
            entry: an expert without tokens, a container, or a layer whose weight another module reads (``out_proj``
            of ``nn.MultiheadAttention``). A module under two names goes by the first.
        by_op: operator, such as ``aten.addmm`` -> operations. Its values sum to ``total``.
        unknown: operator -> calls, for those that are neither counted nor known to be free, such as custom kernels.
            While it is not empty, ``total`` is a lower bound.
    """

    total: int
    by_module: dict[str, int]
    by_op: dict[str, int]
    unknown: dict[str, int]

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.total // 2


def flops(model: nn.Module, *args: Any, **kwargs: Any) -> Flops:
    """Count the floating-point operations of ``model(*args, **kwargs)``.

    The model runs once, in eval mode and without gradients. Its modes and hooks are as before afterwards, also when
    it raises. On the meta device nothing is computed or allocated, and the count is the same. A compiled model runs
    uncompiled, because fused kernels cannot be seen into.

    >>> flops(nn.Linear(3, 4), torch.zeros(2, 3)).total  # 2 rows x 4 outputs x 3 inputs, twice
    48
    """
    return _count(_Counter(), model, args, kwargs)


def effective_flops(model: nn.Module, *args: Any, **kwargs: Any) -> Flops:
    """The floating-point operations of ``model(*args, **kwargs)`` that no zero weight takes part in.

    As `flops`, but each product and convolution with a parameter counts for the share of its elements that are not
    zero: of a linear layer ``2 x rows x non-zero weights``. Products of activations, attention among them, count in
    full. So do weights on the meta device, which have no values, and weights that are computed or converted anew in
    each pass. It says what a kernel that skipped every zero would have to do, not what any kernel saves.

    >>> layer = nn.Linear(3, 4)
    >>> _ = nn.init.zeros_(layer.weight[1:])
    >>> effective_flops(layer, torch.zeros(2, 3)).total  # one of the four rows is left
    12
    """
    return _count(_Counter(_Kept(model)), model, args, kwargs)


def _count(counter: _Counter, model: nn.Module, args: Any, kwargs: Any) -> Flops:
    with ExitStack() as stack:
        for name, module in model.named_modules():
            # Set without train(): a model may override it, to merge weights for instance, and that need not undo.
            stack.callback(setattr, module, "training", module.training)
            module.training = False
            # Scripted modules take no hooks; the root needs none.
            if not name or isinstance(module, torch.jit.ScriptModule):
                continue
            # First of all hooks, and also on errors: what is entered is left, whatever other hooks and callers do.
            before = module.register_forward_pre_hook(partial(counter.enter, name), prepend=True)
            stack.callback(before.remove)
            after = module.register_forward_hook(partial(counter.leave, name), always_call=True)
            stack.callback(after.remove)
        stack.enter_context(_visible_attention())
        with torch.no_grad(), counter:
            model(*args, **kwargs)
    return Flops(counter.by_module[""], dict(counter.by_module), dict(counter.by_op), dict(counter.unknown))


@contextmanager
def _visible_attention() -> Iterator[None]:
    """Attention as operators that a dispatch mode can see."""
    # One kernel for a whole encoder layer otherwise; with padding it also drops positions, as no other path does.
    fast = torch.backends.mha.get_fastpath_enabled()
    # Outside of a compiled model, flex attention compiles itself, which torch refuses under a dispatch mode. Its
    # own debugging switch calls the operator directly. Not imported yet means that no model uses it.
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    switch = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    direct = getattr(flex, switch, None)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if direct is not None:
            setattr(flex, switch, True)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if direct is not None:
            setattr(flex, switch, direct)


class _Kept:
    """How much of the parameters and buffers that an operator multiplies with is not zero."""

    def __init__(self, model: nn.Module) -> None:
        real = [t for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"]
        self._held = {p.untyped_storage().data_ptr() for p in real}
        self._known: dict[tuple[Any, ...], int] = {}

    def __call__(self, name: str, args: Sequence[Any]) -> tuple[int, int]:
        """Elements that are not zero, and all: both 1 where nothing is known to be a weight."""
        if name in _PACKED:
            rows, cols = args[_PACKED[name] : _PACKED[name] + 2]
            if name == "secateur.semi_linear":
                return 1, 2  # two of four, whatever they hold
            return int(args[2][-1]), rows * cols  # where the last run ends
        operands = args[1:] if _ADDS.match(name) else args
        weights = [x for x in tree_iter(operands) if isinstance(x, Tensor) and x.dim() > 1 and self._is_weight(x)]
        found = [self._nonzero(w) for w in weights], [w.numel() for w in weights]
        return (sum(found[0]), sum(found[1])) if any(found[1]) else (1, 1)

    def _is_weight(self, x: Tensor) -> bool:
        plain = x.layout == torch.strided and x.device.type != "meta" and type(x) in (Tensor, nn.Parameter)
        return plain and x.untyped_storage().data_ptr() in self._held

    def _nonzero(self, x: Tensor) -> int:
        key = (x.data_ptr(), x.dtype, x.shape, x.stride())
        if key not in self._known:
            self._known[key] = int(torch.count_nonzero(x))
        return self._known[key]


class _Counter(TorchDispatchMode):
    """Counts the operators that run inside it, for each module on the stack."""

    # Flex attention and control flow: torch refuses to run them under a mode that does not say so.
    supports_higher_order_operators = True

    def __init__(self, kept: _Kept | None = None) -> None:
        TorchDispatchMode.__init__(self)
        self.kept = kept
        self.stack = [""]
        self.by_module: dict[str, int] = {"": 0}
        self.by_op: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()

    def enter(self, name: str, *_: Any) -> None:
        self.stack.append(name)
        self.by_module.setdefault(name, 0)

    def leave(self, name: str, *_: Any) -> None:
        if name in self.stack:
            while self.stack.pop() != name:
                pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, formula, free = _look_up(func)
        if formula is None and not free:
            if isinstance(func, OpOverload):
                # Between tensors that were made in inference mode, composite operators arrive whole.
                with self:
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            self.unknown[name] += 1
        out = func(*args, **kwargs)  # the mode is off in here: what a kernel calls is not counted again
        if formula is not None:
            count = 2 * int(formula(args, out))
            if self.kept is not None:
                nonzero, all_of_them = self.kept(name, args)
                count = count * nonzero // all_of_them  # exact: every element takes part equally often
            self.by_op[name] += count
            for module in set(self.stack):  # a set: a module that calls itself counts once
                self.by_module[module] += count
        return out


def _numel(tensor: Tensor) -> int:
    """Elements; of a jagged tensor, which cannot tell, those of all its rows."""
    return tensor.values().numel() if tensor.layout == torch.jagged else tensor.numel()


# Formulas: positional arguments (torch passes all that have a position so) and result -> multiply-adds.
_Formula = Callable[[Sequence[Any], Any], int]


def _product(args: Sequence[Any], out: Tensor, *, left: int = 0) -> int:
    """Each element of the result is a dot product over the last dimension of the left factor."""
    factor: Tensor = args[left]
    return _numel(out) * factor.size(-1)


def _summed_product(args: Sequence[Any], out: Tensor) -> int:
    """``addbmm``: a product for each of a batch, and their sum."""
    left: Tensor = args[1]
    return left.numel() * out.size(-1)


def _grouped_product(args: Sequence[Any], out: Tensor) -> int:
    """Every row meets the matrix of its group alone; between two matrices the groups split the inner dimension."""
    left: Tensor = args[0]
    right: Tensor = args[1]
    return left.numel() * right.size(-1) if left.dim() == right.dim() == 2 else _product(args, out)


def _bilinear(args: Sequence[Any], out: Tensor) -> int:
    """``x W y`` for each row and output: first ``x W``, then the product of that with ``y``."""
    weight: Tensor = args[1]
    return out.numel() * (weight.size(1) * weight.size(2) + weight.size(2))


def _convolution(args: Sequence[Any], out: Tensor) -> int:
    """Each output reads one kernel; each input of a transposed convolution writes one."""
    weight: Tensor = args[1]
    transposed: bool = args[6]
    positions: Tensor = args[0] if transposed else out
    return positions.numel() * prod(weight.shape[1:])


def _attention(args: Sequence[Any], out: Any) -> int:
    """Scores and their product with the values: (batch, query heads, queries, size) against all keys."""
    query, key, value = args[:3]
    return int(prod(query.shape[:-1]) * key.size(-2) * (query.size(-1) + value.size(-1)))


def _packed_attention(args: Sequence[Any], out: Any, *, first: int) -> int:
    """(batch, queries, heads, size), or sequences end to end, and at ``first`` where each of them starts."""
    query, key, value = args[:3]
    starts, key_starts = args[first : first + 2]
    if starts is None:
        pairs = prod(query.shape[:-2]) * key.size(-3)
    elif starts.is_meta:  # the lengths are not known: all the longest
        pairs = (starts.numel() - 1) * args[first + 2] * args[first + 3]
    else:
        pairs = int((starts.diff() * (starts if key_starts is None else key_starts).diff()).sum())
    return int(pairs * query.size(-2) * (query.size(-1) + value.size(-1)))


def _recurrent(args: Sequence[Any], out: Any, *, weights: Callable[[Sequence[Any]], Sequence[Tensor]]) -> int:
    """Each position meets every matrix of the layers once; that steps come one after the other does not matter."""
    positions: Tensor = args[0]
    return prod(positions.shape[:-1]) * sum(w.numel() for w in weights(args) if w.dim() == 2)


def _packed(args: Sequence[Any], out: Tensor, *, rows: int) -> int:
    """A layer whose weight is packed without its zeros: the columns stand behind the rows."""
    return out.numel() * int(args[rows + 1])


def _bag(args: Sequence[Any], out: Any) -> int:
    """A sum of rows is free; one of rows that are weighted is a product with those rows."""
    weight, indices = args[:2]
    return int(indices.numel() * weight.size(1)) if len(args) > 6 and args[6] is not None else 0


def _bag_weights(args: Sequence[Any], out: Tensor) -> int:
    """The gradient of such weights: a product of two rows for each."""
    weight: Tensor = args[1]
    return out.numel() * weight.size(1)


#: The operators of packed layers: where the rows stand among their arguments.
_PACKED = {
    "secateur.sparse_linear": 8, "secateur.sparse_conv2d": 8, "secateur.bits_linear": 6, "secateur.semi_linear": 4,
}  # fmt: skip
#: Operators whose first operand is added to the product of the others.
_ADDS = re.compile(r"aten\._?(sparse_)?b?add(b?mm|mv)")

_FORMULAS: Mapping[str, _Formula] = {
    f"aten.{name}": formula
    for formula, names in (
        (_product, ("mm", "bmm", "mv", "dot", "vdot", "linear", "mkldnn_linear", "_int_mm", "_scaled_mm")),
        (_product, ("_scaled_mm_v2", "_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu")),
        (partial(_product, left=1), ("addmm", "addmv", "baddbmm", "_addmm_activation", "_sparse_addmm")),
        (_summed_product, ("addbmm",)),
        (_grouped_product, ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2")),
        (_bilinear, ("_trilinear",)),
        (_bag, ("_embedding_bag", "_embedding_bag_forward_only")),
        (_bag_weights, ("_embedding_bag_per_sample_weights_backward",)),
        # What a backend makes of a convolution happens below these.
        (_convolution, ("convolution", "_convolution", "convolution_overrideable")),
        (_attention, ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")),
        (_attention, ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")),
        (_attention, ("_scaled_dot_product_fused_attention_overrideable",)),
        (_attention, ("_scaled_dot_product_attention_math_for_mps",)),
        (partial(_packed_attention, first=3), ("_flash_attention_forward",)),
        (partial(_packed_attention, first=4), ("_efficient_attention_forward",)),
        # CUDA, ROCm, Metal; then one layer in one direction on the CPU. Elsewhere recurrent layers decompose.
        (partial(_recurrent, weights=itemgetter(1)), ("_cudnn_rnn", "miopen_rnn")),
        (partial(_recurrent, weights=itemgetter(2)), ("_lstm_mps",)),
        (partial(_recurrent, weights=itemgetter(1, 2)), ("mkldnn_rnn_layer",)),
    )
    for name in names
} | {
    "flex_attention": _attention,
    "secateur.dense_int8": _product,
    "torch_attn._varlen_attn": partial(_packed_attention, first=3),
    **{name: partial(_packed, rows=at) for name, at in _PACKED.items()},
}

#: Bookkeeping, and communication between devices.
_FREE_NAMESPACES = frozenset(("prim", "profiler", "c10d", "_c10d_functional"))

#: Free by convention, of ``aten``, by family. Pointwise operators say so by a tag, views by their schema, and what
#: works in place by its name: none of these is listed.
_FREE = re.compile(
    r"""
    # creation, random numbers
    (new_)?(empty|full|ones|zeros)(_like|_permuted|_strided)? | arange | complex | eye | (lin|log)space | polar | range
    | scalar_tensor | \w+_window | tri[lu]_indices | rand(int|n)?(_like)? | randperm | bernoulli | multinomial | normal
    | poisson | uniform | exponential | \w+_dropout
    # copies, rearrangement, lookups
    | (\w+_)?copy | clone | lift(_fresh)? | _to_(dense|sparse\w*) | _unsafe_view | _lazy_clone | _pin_memory | _?stack
    | cat | repeat(_interleave)? | roll | rot90 | flip | tri[lu] | diag_embed | block_diag | fill | zero | put | take
    | gather | scatter(_add|_reduce)? | (as_strided|diagonal|select|slice)_scatter | masked_(fill|scatter|select)
    | (_unsafe_|_unsafe_masked_)?index(_add|_fill|_put|_reduce|_select)? | unsafe_split(_with_sizes)? | im2col | col2im
    | channel_shuffle | pixel_(un)?shuffle | (constant|reflection|replication)_pad(_nd|[123]d) | _pack_padded_sequence
    | to_padded_tensor | _jagged_to_padded_dense_forward | _padded_dense_to_jagged_forward | dequantize
    | (fake_)?quantize_per_\w+ | embedding
    # reductions, scans, order
    | all | any | count_nonzero | sum | nansum | mean | prod | trace | (var|std)(_mean)? | (arg|a)?(max|min) | _?aminmax
    | cum(max|min|prod|sum) | logcumsumexp | logsumexp | (nan)?median | mode | kthvalue | m?sort | argsort | topk
    | norm | native_norm | linalg_vector_norm | bincount | histc | bucketize | searchsorted | isin | nonzero(_static)?
    | _?unique\w* | allclose | equal | segment_reduce
    # normalization, activations, losses
    | \w*batch_norm\w* | native_(layer|group)_norm | _fused_rms_norm | renorm | _weight_norm_interface | glu | hardswish
    | floor_divide | _?(log_|masked_|safe_)?softmax | _prelu_kernel | log_sigmoid_forward | rrelu_with_noise
    | \w+_loss(2d)?(_forward)? | binary_cross_entropy(_with_logits)? | _thnn_fused_(gru|lstm)_cell
    # pooling, interpolation; questions and assertions
    | _?(adaptive_|fractional_)?(avg|max)_(un)?pool[23]d(_with_indices)? | _?upsample_\w+ | \w*grid_sampler\w*
    | affine_grid_generator | (_functional)?_assert_\w+ | _linalg_check_errors | _fused_sdp_choice | _local_scalar_dense
    | _has_same_storage_numel | _is_(all|any)_true | _nested_\w+ | record_stream | is_\w+ | sym_\w+ | dim | numel | size
    | storage_offset | stride
    """,
    re.VERBOSE,
)


@cache
def _look_up(func: Any) -> tuple[str, _Formula | None, bool]:
    """The name of an operator, its formula, and whether it is free."""
    if not isinstance(func, OpOverload):
        name = str(func)
        return name, _FORMULAS.get(name), False
    packet = func.overloadpacket
    name = str(packet)
    formula = _FORMULAS.get(name.removesuffix("_"))  # baddbmm_ computes what baddbmm does
    namespace, _, operator = name.partition(".")
    free = (
        namespace in _FREE_NAMESPACES
        or (namespace == "aten" and (_FREE.fullmatch(operator) is not None or operator.endswith("_")))
        or any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
        or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    )
    return name, formula, free
