"""FLOPs against formulas by hand, for every kind of layer and on all paths that reach a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.measure.flops import Flops, flops


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def of(function: Callable[..., Any], *args: Any) -> Flops:
    return flops(Call(function), *args)


def check(found: Flops, expected: int) -> None:
    """The total, and what holds of every count."""
    assert found.total == expected
    assert found.by_module[""] == found.total == sum(found.by_op.values())
    assert found.macs * 2 == found.total
    assert not found.unknown


def test_linear_counts_every_row_and_no_bias() -> None:
    found = flops(nn.Linear(8, 3), torch.randn(4, 5, 8))
    check(found, 2 * 4 * 5 * 8 * 3)
    assert found.by_op == {"aten.addmm": found.total}
    check(flops(nn.Linear(8, 3, bias=False), torch.randn(8)), 2 * 8 * 3)


@pytest.mark.parametrize(
    "layer, shape, macs",
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8 * 6 * 4 * 3),
        (nn.Conv1d(4, 6, 3), (4, 10), 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7), 2 * 5 * 4 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (1, 4, 9, 7), 9 * 7 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 9, 7), 9 * 7 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (1, 3), groups=2), (2, 4, 9, 7), 2 * 9 * 5 * 6 * 2 * 3),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 9, 7), 7 * 5 * 8 * 9),
        (nn.Conv3d(2, 3, (1, 2, 3)), (2, 2, 4, 5, 6), 2 * 4 * 4 * 4 * 3 * 2 * 6),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 10), 2 * 10 * 4 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 7), 2 * 35 * 4 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 7), 2 * 35 * 4 * 3 * 9),
        (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 4, 5), 60 * 2 * 3 * 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_convolution(layer: nn.Module, shape: Sequence[int], macs: int) -> None:
    check(flops(layer, torch.randn(shape)), 2 * macs)
    check(flops(layer.to("meta"), torch.empty(shape, device="meta")), 2 * macs)


@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    batch=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_convolution_is_the_matmul_of_its_unfolded_input(
    groups: int,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    size: tuple[int, int],
    batch: int,
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    layer = nn.Conv2d(
        channels[0] * groups, channels[1] * groups, kernel, stride, padding, dilation, groups, bias=False
    ).double()
    images = torch.randn(batch, channels[0] * groups, *size, dtype=torch.float64)
    columns = F.unfold(images, kernel, dilation, padding, stride).unflatten(1, (groups, -1))
    macs = 0
    outputs = []
    for image in columns:
        for weight, column in zip(layer.weight.detach().flatten(1).chunk(groups), image, strict=True):
            outputs.append(weight @ column)
            macs += weight.shape[0] * weight.shape[1] * column.shape[1]
    expected = layer(images)
    torch.testing.assert_close(torch.cat(outputs).reshape(expected.shape), expected.detach())
    check(flops(layer, images), 2 * macs)

    # The transposed layer does the same multiplications, from output to input.
    back = nn.ConvTranspose2d(
        layer.out_channels, layer.in_channels, kernel, stride, padding, groups=groups, dilation=dilation
    )
    check(flops(back, expected.detach().float()), 2 * macs)


@pytest.mark.parametrize(
    "function, shapes, macs",
    [
        (torch.mm, [(3, 4), (4, 5)], 3 * 4 * 5),
        (torch.mv, [(3, 4), (4,)], 3 * 4),
        (torch.dot, [(4,), (4,)], 4),
        (torch.bmm, [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (torch.matmul, [(6, 1, 3, 4), (2, 4, 5)], 6 * 2 * 3 * 4 * 5),
        (torch.addmm, [(5,), (3, 4), (4, 5)], 3 * 4 * 5),
        (torch.addmv, [(3,), (3, 4), (4,)], 3 * 4),
        (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (lambda c, a, b: c.clone().addmm_(a, b), [(3, 5), (3, 4), (4, 5)], 3 * 4 * 5),
        (lambda c, a, b: torch.mm(a, b, out=c), [(3, 5), (3, 4), (4, 5)], 3 * 4 * 5),
        (F.bilinear, [(2, 3), (2, 4), (5, 3, 4)], 2 * 5 * (3 * 4 + 4)),
        (lambda a, b: torch.einsum("bij,kj->bik", a, b), [(2, 3, 4), (5, 4)], 2 * 3 * 4 * 5),
        (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), [(2, 3, 4, 5), (2, 3, 6, 5)], 2 * 3 * 4 * 6 * 5),
        (lambda a, b: torch.einsum("ij,ij->ij", a, b), [(3, 4), (3, 4)], 0),
        (torch.outer, [(3,), (4,)], 0),
        (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), [(9, 2), (2, 8), (8, 3)], 2 * 8 * 3 + 9 * 2 * 3),
        (lambda a, b: a.relu().to_sparse_coo() @ b, [(3, 4), (4, 5)], 3 * 4 * 5),
    ],
)
def test_products(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], macs: int) -> None:
    check(of(function, *map(torch.randn, shapes)), 2 * macs)


def test_grouped_products() -> None:
    ends = torch.tensor([4, 12, 16], dtype=torch.int32)
    left, experts = torch.randn(16, 8).bfloat16(), torch.randn(3, 8, 24).bfloat16()
    right = torch.randn(16, 24).bfloat16()
    check(of(lambda: torch._grouped_mm(left, experts, offs=ends)), 2 * 16 * 8 * 24)
    check(of(lambda: torch._grouped_mm(left.t(), right, offs=ends)), 2 * 16 * 8 * 24)
    check(of(lambda: torch._grouped_mm(torch.stack([left] * 3), experts)), 2 * 3 * 16 * 8 * 24)


QUERY, KEY, VALUE = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)
BATCH_HEADS_PAIRS = 2 * 4 * 5 * 7


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention(backend: SDPBackend, causal: bool, heads: int) -> None:
    """In full when causal, and over all query heads when they share keys."""
    query, key = torch.randn(QUERY), torch.randn(2, heads, 7, 8)
    with sdpa_kernel(backend):
        found = of(
            lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=heads != 4), query, key
        )
    check(found, 2 * BATCH_HEADS_PAIRS * (8 + 8))
    expected = "aten.bmm" if backend == SDPBackend.MATH else "aten._scaled_dot_product_flash_attention_for_cpu"
    assert list(found.by_op) == [expected]


def test_attention_with_a_mask_and_narrower_values() -> None:
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    tensors = [torch.randn(shape) for shape in (QUERY, KEY, VALUE)]
    check(of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), *tensors), 2 * BATCH_HEADS_PAIRS * (8 + 6))


@pytest.mark.parametrize(
    "name, further",
    [
        ("_scaled_dot_product_flash_attention", ()),
        ("_scaled_dot_product_efficient_attention", (None, False)),
        ("_scaled_dot_product_cudnn_attention", (None, False)),
        ("_scaled_dot_product_fused_attention_overrideable", ()),
        ("_scaled_dot_product_attention_math_for_mps", ()),
    ],
)
def test_attention_of_other_devices(name: str, further: tuple[Any, ...]) -> None:
    operator = getattr(torch.ops.aten, name, None)
    if operator is None:
        pytest.skip("this torch has no such kernel")
    query, key = torch.empty(QUERY, device="meta"), torch.empty(KEY, device="meta")
    found = of(lambda q, k: operator(q, k, k, *further), query, key)
    check(found, 2 * BATCH_HEADS_PAIRS * (8 + 8))
    assert list(found.by_op) == [f"aten.{name}"]


def test_packed_attention() -> None:
    """Sequences end to end meet themselves only; their lengths are unknown on the meta device, where all are long."""
    module = sys.modules[flops.__module__]  # where the package has the function of the same name
    packed = torch.empty(9, 4, 8, device="meta")
    starts = torch.tensor([0, 4, 9])
    flash, efficient = torch.ops.aten._flash_attention_forward, torch.ops.aten._efficient_attention_forward
    found = of(lambda: flash(packed, packed, packed, starts.to("meta"), starts.to("meta"), 5, 5, 0.0, False, False))
    check(found, 2 * 4 * (8 + 8) * 2 * 5 * 5)
    formula = vars(module)["_FORMULAS"]["aten._flash_attention_forward"]
    real = torch.empty(9, 4, 8)
    assert formula((real, real, real, starts, None, 5, 5), None) == 4 * (8 + 8) * (4 * 4 + 5 * 5)
    dense = torch.empty(3, 5, 4, 8, device="meta")
    keys = torch.empty(3, 7, 4, 8, device="meta")
    found = of(lambda: flash(dense, keys, keys, None, None, 5, 7, 0.0, False, False))
    check(found, 2 * 4 * (8 + 8) * 3 * 5 * 7)
    found = of(lambda: efficient(dense, keys, keys, None, None, None, None, None, 0.0, 0))
    check(found, 2 * 4 * (8 + 8) * 3 * 5 * 7)


def test_attention_of_variable_length() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    packed = torch.empty(9, 4, 8, device="meta")
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    found = of(lambda x: torch.ops.torch_attn._varlen_attn(x, x, x, starts, starts, 5, 5), packed)
    check(found, 2 * 4 * (8 + 8) * 2 * 5 * 5)


def test_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    switch = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    module = sys.modules["torch.nn.attention.flex_attention"]
    before = getattr(module, switch)
    query, key = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8)
    check(of(lambda q, k: flex_attention(q, k, k, enable_gqa=True), query, key), 2 * 4 * 16 * 16 * (8 + 8))
    assert getattr(module, switch) is before


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention(need_weights: bool, training: bool) -> None:
    """Both ways of its forward pass, and never the kernel that hides what it does."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    tokens = torch.randn(3, 5, 8)
    found = flops(layer, tokens, tokens, tokens, need_weights=need_weights)
    check(found, 2 * 3 * 5 * 4 * 8 * 8 + 2 * 3 * 5 * 5 * (8 + 8))
    assert "out_proj" not in found.by_module
    assert torch.backends.mha.get_fastpath_enabled()
    wide = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    found = flops(wide, torch.randn(5, 3, 8), torch.randn(7, 3, 6), torch.randn(7, 3, 4))
    check(found, 2 * 3 * (2 * 5 * 8 * 8 + 7 * 8 * 6 + 7 * 8 * 4 + 5 * 7 * (8 + 8)))


@pytest.mark.parametrize("padding", [False, True])
def test_transformer_encoder(padding: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
    one = 2 * 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * (8 + 8)
    found = flops(encoder, torch.randn(2, 5, 8), src_key_padding_mask=mask)
    check(found, 2 * one)
    assert found.by_module["layers.0"] == found.by_module["layers.1"] == one
    assert "layers" not in found.by_module
    assert torch.backends.mha.get_fastpath_enabled()


LAYERS, DIRECTIONS, HIDDEN, INPUT = 2, 2, 6, 8


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_recurrent(
    kind: type[nn.RNNBase], gates: int, batch_first: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = kind(INPUT, HIDDEN, LAYERS, bidirectional=True, batch_first=batch_first)
    steps, batch = 5, 3
    macs = sum(DIRECTIONS * gates * HIDDEN * (inputs + HIDDEN) for inputs in (INPUT, DIRECTIONS * HIDDEN))
    tokens = torch.randn(batch, steps, INPUT) if batch_first else torch.randn(steps, batch, INPUT)
    enabled = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(enabled and fused)
        found = flops(layer, tokens)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    check(found, 2 * steps * batch * macs)


def test_recurrent_over_packed_sequences_counts_real_steps() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, INPUT), torch.tensor([5, 4, 2]))
    check(flops(nn.LSTM(INPUT, HIDDEN), packed), 2 * (5 + 4 + 2) * 4 * HIDDEN * (INPUT + HIDDEN))


def test_recurrent_on_cuda() -> None:
    layer = nn.LSTM(INPUT, HIDDEN, LAYERS, device="meta")
    weights = [w for name, w in layer.named_parameters()]
    state = torch.empty(LAYERS, 3, HIDDEN, device="meta")
    tokens = torch.empty(5, 3, INPUT, device="meta")
    found = of(
        lambda x: torch.ops.aten._cudnn_rnn(
            x, weights, 4, None, state, state, 2, HIDDEN, 0, LAYERS, False, 0.0, False, False, [], None
        ),
        tokens,
    )
    check(found, 2 * 5 * 3 * 4 * HIDDEN * (INPUT + HIDDEN + HIDDEN + HIDDEN))


@pytest.mark.parametrize("cell, gates", [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_recurrent_cells(cell: type[nn.Module], gates: int) -> None:
    check(flops(cell(INPUT, HIDDEN), torch.randn(3, INPUT)), 2 * 3 * gates * HIDDEN * (INPUT + HIDDEN))


def test_what_is_free() -> None:
    layers = nn.Sequential(
        nn.Embedding(10, 8),
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        nn.GELU(),
        nn.GLU(),
        nn.Dropout(),
        nn.Unflatten(0, (2, 1)),
        nn.BatchNorm2d(1),
        nn.GroupNorm(1, 1),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=1.5, mode="bilinear"),
        nn.ReflectionPad2d(1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.PReLU(),
        nn.Hardswish(),
        nn.Softmax(-1),
        nn.Flatten(),
        nn.LogSoftmax(-1),
    )
    found = flops(layers, torch.randint(0, 10, (2, 16)))
    check(found, 0)
    assert set(found.by_module) == {"", *map(str, range(20))}

    def rest(x: Tensor) -> Tensor:
        x = x.cumsum(0).sort().values.topk(3).values.roll(1, 0)[:, torch.tensor([0, 2])].repeat(2, 2)
        x = (
            torch.cat([x, x.flip(0)])
            .masked_fill(x.new_ones(()).bool(), 2.0)
            .clone()
            .tril_()
            .add_(torch.rand_like(x[0]))
        )
        x.index_put_((torch.tensor([0]),), torch.zeros(()))
        picked = x.argmax(-1, keepdim=True)
        return (
            F.cross_entropy(x.gather(1, picked).float(), picked[:, 0] * 0) + x.norm() + x.std() + float(x.max().item())
        )

    check(of(rest, torch.randn(4, 5)), 0)


def test_unknown_operators_are_named() -> None:
    found = of(lambda x: torch.fft.fft(torch.fft.fft(x)) + torch.linalg.inv(x) @ x, torch.eye(4))
    assert found.unknown == {"aten._fft_r2c": 1, "aten._fft_c2c": 1, "aten.linalg_inv_ex": 1}
    assert found.total == 2 * 4 * 4 * 4


def test_custom_operators_are_named() -> None:
    with torch.library._scoped_library("secateur_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x @ x, "CompositeExplicitAutograd")
        found = of(lambda x: torch.ops.secateur_test.twice(x) @ x, torch.eye(4))
    assert found.unknown == {"secateur_test.twice": 1}
    assert found.total == 2 * 4 * 4 * 4


def test_tensors_of_inference_mode() -> None:
    """They bring composite operators whole, which are taken apart here."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(8, 5), nn.GRU(5, 2))

    expected = flops(model(), torch.randn(2, 4, 10))
    attention = Call(lambda q: F.scaled_dot_product_attention(q, q, q).softmax(-1))
    with torch.inference_mode():
        check(flops(model(), torch.randn(2, 4, 10)), expected.total)
        check(flops(attention, torch.randn(QUERY)), 2 * 2 * 4 * 5 * 5 * (8 + 8))


def test_jagged_tensors() -> None:
    rows = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    assert of(lambda x: F.linear(x, torch.ones(6, 8)), rows).total == 2 * (3 + 5) * 6 * 8


def test_autocast_and_low_precision() -> None:
    check(flops(nn.Linear(8, 3).bfloat16(), torch.randn(4, 8).bfloat16()), 2 * 4 * 8 * 3)
    with torch.autocast("cpu", torch.bfloat16):
        check(flops(nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5)), 2 * 9 * 6 * 4 * 9)


class Branches(nn.Module):
    """A module that is called by two others, twice by one of them, one that is never called, and one that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            [nn.Sequential(self.shared, nn.ReLU(), self.shared), nn.Sequential(nn.Linear(8, 4))]
        )
        self.idle = nn.Linear(8, 8)
        self.fails = nn.Sequential(nn.Linear(9, 9))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        for block in self.blocks:
            try:
                self.fails(x)
            except RuntimeError:
                if fail:
                    raise
            x = block(x)
        return x @ x.t()


def state(model: nn.Module) -> list[Any]:
    return [
        (name, m.training, *(list(getattr(m, hooks)) for hooks in vars(m) if "_hooks" in hooks))
        for name, m in model.named_modules()
    ]


def test_by_module() -> None:
    found = flops(Branches(), torch.randn(3, 8))
    shared, last, own = 2 * 2 * 3 * 8 * 8, 2 * 3 * 8 * 4, 2 * 3 * 4 * 3
    check(found, shared + last + own)
    assert found.by_module == {
        "": shared + last + own,
        "shared": shared,
        "blocks.0": shared,
        "blocks.0.1": 0,
        "blocks.1": last,
        "blocks.1.0": last,
        "fails": 0,
        "fails.0": 0,
    }


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_as_before(fail: bool) -> None:
    model = Branches()
    model.blocks[1].eval()
    calls = []
    model.shared.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before = state(model)
    if fail:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            flops(model, torch.randn(3, 8), fail=True)
    else:
        flops(model, torch.randn(3, 8))
        assert calls == [False, False]
    assert state(model) == before
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert model(torch.randn(3, 8)).requires_grad


def test_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    statistics = model[1].running_mean.clone()
    seen = []
    model[2].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    flops(model, torch.randn(4, 8))
    assert seen == [False] and model.training and model[2].training
    torch.testing.assert_close(model[1].running_mean, statistics, rtol=0, atol=0)


def test_a_disabled_fast_path_stays_disabled() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        flops(nn.Linear(2, 2), torch.zeros(2))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_scripted_parts() -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        part = torch.jit.trace(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(3, 8))
    check(flops(part, torch.randn(3, 8)), 2 * 3 * 8 * 4)
    check(flops(nn.Sequential(nn.Linear(8, 8), part), torch.randn(3, 8)), 2 * 3 * 8 * (8 + 4))


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not the matter here
def test_compiled_models_run_uncompiled() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(3, 8))
    check(flops(compiled, torch.randn(3, 8)), 2 * 3 * 8 * 12)
    assert model.training


def test_llama() -> None:
    """A closed formula; rotary angles, one product per position and pair of channels, are left out of it."""
    width, inner, layers, heads, shared, vocabulary = 32, 48, 3, 4, 2, 64
    model = tiny.build("llama")
    ids = tiny.ids(2, 24)
    found = flops(model, input_ids=ids)
    size = width // heads
    projections = width * width * 2 + width * shared * size * 2 + 3 * width * inner
    macs = ids.numel() * (layers * (projections + 2 * 24 * width) + width * vocabulary)
    assert found.total == pytest.approx(2 * macs, rel=1e-3)
    assert found.total - 2 * macs == found.by_module["model.rotary_emb"]
    assert not found.unknown
    assert found.by_module["lm_head"] == 2 * ids.numel() * width * vocabulary
    blocks = [found.by_module[f"model.layers.{i}"] for i in range(layers)]
    assert blocks == [2 * ids.numel() * (projections + 2 * 24 * width)] * layers
    assert found.total == found.by_module["model"] + found.by_module["lm_head"]
    assert found.by_module["model"] == sum(blocks) + found.by_module["model.rotary_emb"]
    eager = tiny.build("llama", attn_implementation="eager")
    assert flops(eager, input_ids=ids).total == found.total


def test_smaller_model_costs_less_and_zeros_do_not() -> None:
    model = tiny.build("llama", num_hidden_layers=2)
    ids = tiny.ids(1, 8)
    dense = flops(model, input_ids=ids).total
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert flops(model, input_ids=ids).total == dense
    narrow = flops(tiny.build("llama", num_hidden_layers=2, intermediate_size=24), input_ids=ids).total
    assert dense - narrow == 2 * 8 * 2 * 3 * 32 * (48 - 24)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_is_known(family: str) -> None:
    ids = tiny.ids(2, 12)
    model = tiny.build(family)
    found = flops(model, input_ids=ids)
    assert not found.unknown
    assert found.by_module[""] == found.total
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert found.total >= 2 * ids.numel() * weights or family == "gpt2"  # whose layers are not nn.Linear


def test_experts_count_where_tokens_go() -> None:
    width, inner, active = 32, 48, 2
    ids = tiny.ids(2, 12)
    found = flops(tiny.build("mixtral", num_experts_per_tok=active), input_ids=ids)
    expected = 2 * ids.numel() * active * 3 * width * inner
    assert found.by_module["model.layers.0.mlp.experts"] == expected


def test_vision_transformer() -> None:
    width, inner, layers, patch, side, labels = 32, 64, 2, 4, 16, 3
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=inner,
        image_size=side,
        patch_size=patch,
        num_labels=labels,
    )
    found = flops(transformers.ViTForImageClassification(config), torch.randn(2, 3, side, side))
    patches = (side // patch) ** 2
    tokens = patches + 1
    block = tokens * (4 * width * width + 2 * width * inner + 2 * tokens * width)
    check(found, 2 * 2 * (patches * 3 * patch * patch * width + layers * block + width * labels))


def test_bert() -> None:
    width, inner, layers, length = 32, 64, 2, 10
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=inner,
        vocab_size=64,
    )
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, 6:] = 0
    found = flops(transformers.BertModel(config), input_ids=tiny.ids(2, length), attention_mask=mask)
    block = length * (4 * width * width + 2 * width * inner + 2 * length * width)
    check(found, 2 * 2 * (layers * block + width * width))  # the pooler reads the first token
