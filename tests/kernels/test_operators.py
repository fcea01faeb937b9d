"""The operators, the layers above them, and which kernels are chosen."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.compression.modules import Sparse, SparseConv2d, SparseLinear
from secateur.errors import ModelError, SecateurError
from secateur.formats import KINDS, Packed, pack
from secateur.kernels import build, library, ops
from secateur.kernels.library import BUILT, supported
from tests.kernels.sample import LAYERS, layers

OPERATORS = {
    SparseLinear: torch.ops.secateur.sparse_linear.default,
    SparseConv2d: torch.ops.secateur.sparse_conv2d.default,
}


def arguments(layer: Sparse) -> tuple[Any, ...]:
    """What the operator of a layer takes behind its input."""
    how = (layer.kernel, layer.stride, layer.padding, layer.dilation) if isinstance(layer, SparseConv2d) else ()
    return (*layer._arguments(), *how)


@LAYERS
def test_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        like, _, x = layers()[name]
        layer = other(like, kind)
        fast = layer(x.contiguous(memory_format=torch.channels_last) if name == "image" else x)
        monkeypatch.setattr(ops, "library", lambda: None)
        slow = layer(x.contiguous(memory_format=torch.channels_last) if name == "image" else x)
        monkeypatch.undo()
        assert slow.is_contiguous()
        close = {"rtol": 0.0, "atol": 0.2} if kind == "int8-dynamic" else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(slow, fast, **close)  # without kernels, activations stay as they are


def other(layer: Any, kind: str) -> nn.Module:
    """The same layer with other values."""
    quad = layer.quad is not None and kind == "int8-dynamic"
    packed: Packed = pack(layer.packed.dense(), kind).indexed(layer.col is not None, layer.bits is not None, quad)
    if isinstance(layer, SparseConv2d):
        return SparseConv2d(packed, layer.bias, layer.kernel, layer.stride, layer.padding, layer.dilation)
    return SparseLinear(packed, layer.bias)


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_type_of_the_input_comes_back(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense, x = layers()[name]
    x = x.to(dtype)
    right = dense(x.float()).to(dtype)
    for _ in range(2):
        assert layer(x).dtype == dtype
        torch.testing.assert_close(layer(x), right, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)
        monkeypatch.setattr(ops, "library", lambda: None)


@LAYERS
def test_any_strides(name: str) -> None:
    layer, dense, x = layers()[name]
    for strided in (
        torch.stack([x, x + 1], -1)[..., 0], x[:1].expand(3, *x.shape[1:]), x.flip(0)[1:], x[:0],
        x.transpose(0, -1).contiguous().transpose(0, -1),
    ):  # fmt: skip
        torch.testing.assert_close(layer(strided), dense(strided), rtol=1e-4, atol=1e-4)
    with torch.device("meta"):  # what is made inside is still made here
        layer(torch.cat([x, x, x]))


@LAYERS
def test_what_is_no_input(name: str) -> None:
    layer, _, x = layers()[name]
    narrow = x[:, :5] if name == "image" else x[..., :5]
    for wrong in (narrow, x.int(), x.bool(), x.to(torch.complex64), torch.tensor(1.0)):
        with pytest.raises(SecateurError, match="a (compressed|sparse)"):
            layer(wrong)
    if name == "image":
        with pytest.raises(SecateurError, match="batch, channels"):
            layer(x[0])
    assert layer(x.to("meta")).shape == layer(x).shape
    with pytest.raises(NotImplementedError):
        layer(x.to_sparse())


@LAYERS
def test_parts_of_other_sizes_are_refused(name: str) -> None:
    """A kernel would read past them."""
    layer, _, x = layers()[name]
    whole, operator = arguments(layer), OPERATORS[type(layer)]
    assert torch.equal(operator(x, *whole), layer(x))
    facts: dict[int, list[int]] = {7: [0, 32, 34], 8: [0, 107, 12], 9: [-1, 0, 65], 10: [-64, 0, 32, 100, 192, 320]}
    tried = 0
    for k, part in enumerate(whole):
        changes: list[Any] = facts.get(k, [])
        if isinstance(part, Tensor):
            longer, strided = torch.cat([part, part[:1]]), torch.stack([part, part], -1)[..., 0]
            changes = [part[:-1], longer, part[:0], strided, part.to(torch.float64)]
        for change in changes:
            with pytest.raises(SecateurError):
                operator(x, *whole[:k], change, *whole[k + 1 :])
            tried += 1
    assert tried >= 30
    with pytest.raises(SecateurError, match="fit together"):
        operator(x, *whole[:2], None, None, *whole[4:])


@LAYERS
def test_a_part_that_has_moved(name: str) -> None:
    """``t.data = other`` leaves the tensor and changes where it lies."""
    layer, _, x = layers()[name]
    before = layer(x)
    assert layer.bias is not None
    layer.bias.data = layer.bias + 1
    torch.testing.assert_close(layer(x), before + 1)
    if name == "quad":  # which holds the values once more
        layer.values.data = layer.values // 2
        with pytest.raises(ModelError, match="quads"):
            layer(x)
        return
    layer.values.data, layer.bias.data = 2 * layer.values, 2 * layer.bias
    torch.testing.assert_close(layer(x), 2 * (before + 1))
    layer.bias.data = torch.ones(3)
    with pytest.raises(SecateurError, match="fit together"):
        layer(x)


@LAYERS
def test_compiled_and_exported(name: str) -> None:
    layer, _, x = layers()[name]
    right = layer(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), right)
    more = torch.cat([x, x + 1, x])
    sizes = ({0: torch.export.Dim("tokens", min=2, max=512)},)
    # torch counts a buffer that is None where it belongs to the outermost module itself.
    program = torch.export.export(nn.Sequential(layer), (x,), dynamic_shapes=sizes)
    assert torch.equal(program.module()(more), layer(more))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(more), layer(more))


@LAYERS
def test_the_operators_keep_the_rules(name: str) -> None:
    layer, _, x = layers()[name]
    for given in (x, x.bfloat16(), x[:0]):
        torch.library.opcheck(OPERATORS[type(layer)], (given, *arguments(layer)))


@LAYERS
def test_gradients_are_refused(name: str) -> None:
    layer, _, x = layers()[name]
    x.requires_grad_()
    y = layer(x)
    assert y.requires_grad
    with pytest.raises(SecateurError, match="for inference"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(x), y) and not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


@LAYERS
def test_each_of_several(name: str, recwarn: pytest.WarningsRecorder) -> None:
    layer, _, x = layers()[name]
    several = torch.stack([x, x + 1, x - 1], dim=1)
    found = torch.func.vmap(layer, in_dims=1)(several)
    assert torch.equal(found, torch.stack([layer(several[:, k]) for k in range(3)])) and not recwarn.list
    values = torch.stack([layer.values, layer.values])
    with pytest.raises(SecateurError, match="not over its weights"):
        torch.func.vmap(lambda v: OPERATORS[type(layer)](x, v, *arguments(layer)[1:]))(values)


@LAYERS
def test_copied_and_loaded(name: str) -> None:
    for kind in KINDS:
        layer = other(layers()[name][0], kind)
        x = layers()[name][2]
        right = layer(x)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), right)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(layer.buffers(), twin.buffers(), strict=True))
        assert twin.bias is not None
        twin.values.zero_()
        twin.bias.zero_()
        if twin.quad is None:
            assert not twin(x).any()
        else:  # it holds the values once more
            with pytest.raises(ModelError, match="quads"):
                twin(x)
        assert torch.equal(layer(x), right)
        for assign in (False, True):
            twin.load_state_dict(layer.state_dict(), assign=assign)
            assert torch.equal(twin(x), right)
        assert set(layer.state_dict()) == {name for name, _ in layer.named_buffers()}


@LAYERS
def test_a_changed_index_is_refused(name: str) -> None:
    for part in ("start", "col", "bits", "quad"):
        layer, _, x = layers()[name]
        index = getattr(layer, part)
        if index is None:
            continue
        kept = index.clone()
        layer(x)
        index.view(-1)[3] += 1
        for _ in range(2):
            with pytest.raises(ModelError):
                layer(x)
        state = copy.deepcopy(layer.state_dict())
        index.copy_(kept)
        right = layer(x)
        with pytest.raises(ModelError):
            layer.load_state_dict(state)
        index.copy_(kept)
        assert torch.equal(layer(x), right)


@LAYERS
def test_conversions_are_refused(name: str) -> None:
    layer, _, x = layers()[name]
    right = layer(x)
    model = nn.Sequential(layer)
    for convert in (model.half, model.bfloat16, model.double, lambda: model.to("meta")):
        with pytest.raises(ModelError, match="convert the dense model"):
            convert()
        assert torch.equal(model(x), right)
    assert torch.equal(model.float().to("cpu")(x), right)
    assert torch.equal(model.share_memory()(x), right)
    layer.values = layer.values.half()
    with pytest.raises(SecateurError, match="damaged" if name == "quad" else "converted"):
        model(x)


SCRIPT = """
import os, sys
import torch
from secateur.formats import pack
from secateur.kernels import described, library, ops
p = pack(torch.eye(70))
for asked in sys.argv[1:]:
    os.environ["SECATEUR_KERNELS"] = asked
    library.cache_clear()
    try:
        facts = (70, 70, p.group, p.panel, 0, False)
        y = ops.linear(torch.ones(6, 70), p.values, p.start, p.col, p.bits, None, None, None, *facts)
        assert torch.equal(y, torch.ones(6, 70))
        print(asked, described())
    except Exception as error:
        print(asked, type(error).__name__, error)
"""


def test_another_library_is_asked_for() -> None:
    root, environment = Path(__file__).parents[2], {**os.environ, "SECATEUR_KERNELS": "nonsense"}
    command = [sys.executable, "-c", SCRIPT, "none", "portable", "nonsense", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, env=environment, check=False)
    assert not done.returncode, done.stderr
    none, portable, nonsense, again = done.stdout.splitlines()
    assert none == again == "none {'active': None, 'reason': \"SECATEUR_KERNELS is 'none'\"}"
    assert (
        nonsense
        == f"nonsense SecateurError SECATEUR_KERNELS is 'nonsense': this machine runs {', '.join(supported())} or none"
    )
    if (BUILT / "sparse_portable.so").exists():
        assert portable.startswith("portable {'active': 'portable'") or "neon" in portable
    else:
        assert portable.startswith("portable SecateurError") and "not built" in portable


def test_the_widest_that_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_library = sys.modules["secateur.kernels.library"]
    monkeypatch.setattr(of_library, "BUILT", tmp_path)
    monkeypatch.delenv("SECATEUR_KERNELS", raising=False)
    try:
        library.cache_clear()
        assert library() is None
        library.cache_clear()
        monkeypatch.setenv("SECATEUR_KERNELS", "portable")
        with pytest.raises(SecateurError, match="not built"):
            library()
        (tmp_path / "sparse_portable.so").write_text("no library")
        with pytest.raises(SecateurError, match="cannot be used"):
            library()
    finally:
        monkeypatch.undo()
        library.cache_clear()


@pytest.mark.parametrize("cxx, said", [("/nonexistent", "/nonexistent"), ("false", "ended with 1")])
def test_a_compiler_that_is_missing(cxx: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", cxx)
    results = build.build(tmp_path / "built")
    assert list(results) == build.targets() and all(said in str(problem) for problem in results.values())
    assert not list((tmp_path / "built").iterdir())
    (tmp_path / "file").touch()
    assert all("cannot be written" in str(problem) for problem in build.build(tmp_path / "file" / "built").values())


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(build.build(tmp_path).values()) == {"no C++ compiler was found"}


def test_targets_of_machines() -> None:
    assert build.targets("x86_64") == build.targets("AMD64") == ["avx512vnni", "avx512", "avx2", "portable"]
    assert build.targets("aarch64") == build.targets("arm64") == ["portable"]
