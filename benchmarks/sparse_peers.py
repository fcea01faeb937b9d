"""Dense engines, and DeepSparse, beside the sparse kernels of `sparse.py`.

Every engine gets the same weights and the same input: one layer, or a stack of linear layers that all read it, as one
model with as many outputs. An engine that is not there or does not run here is `Absent`, with the reason.

Threads that spin while they wait would take cores from whoever runs next. ONNX Runtime is told not to. OpenVINO (whose
threads are oneTBB's) and DeepSparse (in a process of its own) document no switch, and torch's OpenMP has none once it
runs: `sparse.py --pause` lets them fall asleep between turns, and its part ``idle`` measures whether they do.
"""

from __future__ import annotations

import atexit
import copy
import json
import logging
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

SERVER = Path(__file__).resolve().parent / "peer_deepsparse.py"


class Absent(Exception):
    """Why an engine takes no part."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that ONNX Runtime logs with every quantization."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass
class Engine:
    """``run`` runs once, and returns its seconds where it has measured them itself."""

    run: Callable[[], Any]
    outputs: Callable[[], Sequence[Any]]
    note: str = ""
    waits: Callable[[], float] | None = None

    def waiting(self) -> float:
        """Seconds of processor time that its process uses in the 200 ms after a run, when it has nothing to do."""
        if self.waits is not None:
            return self.waits()
        self.run()
        begun = time.process_time()
        time.sleep(0.2)
        return time.process_time() - begun


@dataclass
class Case:
    """What all engines are given: layers that read the same input, the input and the threads."""

    layers: Sequence[Any]
    x: Any
    threads: int
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sparse-peers-")))

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @cached_property
    def array(self) -> Any:
        return self.x.numpy()

    @property
    def convolution(self) -> bool:
        return hasattr(self.layers[0], "kernel_size")

    @cached_property
    def onnx(self) -> Path:
        """The model in float32, written with few operators, so that old engines read it too."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        nodes, weights, outputs = [], [], []
        for i, m in enumerate(self.layers):
            if m.bias is not None:
                raise Absent("a bias is not written to ONNX here")
            weight = m.weight.detach().numpy()
            if self.convolution:
                sides = {"pads": [*m.padding, *m.padding], "strides": list(m.stride), "dilations": list(m.dilation)}
                nodes.append(helper.make_node("Conv", ["x", f"w{i}"], [f"y{i}"], kernel_shape=m.kernel_size, **sides))
            else:
                weight = weight.T.copy()
                nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
            nodes[-1].name = f"n{i}"
            weights.append(numpy_helper.from_array(weight, f"w{i}"))
            shape = list(m(self.x).shape)
            outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, shape))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(self.x.shape))]
        graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.save(model, str(self.folder / "float32.onnx"))
        return self.folder / "float32.onnx"

    @cached_property
    def dynamic(self) -> Path:
        """int8 weights, one scale a row or channel; activations become int8 as the model runs."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        file = self.folder / "dynamic.onnx"
        # ConvInteger of ONNX Runtime takes weights without a sign only, and one scale for all channels
        kind, each = (QuantType.QUInt8, False) if self.convolution else (QuantType.QInt8, True)
        with quiet():
            quantize_dynamic(self.onnx, file, weight_type=kind, per_channel=each)
        return file

    @cached_property
    def static(self) -> Path:
        """int8 weights and activations with scales found beforehand, on this input and random ones (QDQ)."""
        import numpy
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        random = numpy.random.default_rng(0)
        given = [self.array, *(random.standard_normal(self.array.shape, numpy.float32) for _ in range(2))]

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Any:
                return {"x": given.pop()} if given else None

        file = self.folder / "static.onnx"
        # outputs of a matrix product stay float32, as those of all others; of convolutions ONNX Runtime wants them int8
        extra = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        with quiet():
            quantize_static(self.onnx, file, Reader(), quant_format=QuantFormat.QDQ, **kinds, extra_options=extra)
        return file


def _onnxruntime(file: Path, case: Case) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {"x": case.array}
    return Engine(lambda: session.run(None, given), lambda: session.run(None, given))


def _openvino(file: Path, case: Case, precision: str) -> Engine:
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Absent("the processor has no bfloat16 arithmetic, which OpenVINO asks for")
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": case.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # nor is anybody else bound to a core
    }
    compiled = core.compile_model(str(file), "CPU", hints)
    # what is multiplied in, as the compiled model itself says
    work = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    done = {
        f"{info['layerType'].astype(str)} {info['runtimePrecision'].astype(str)} {info['primitiveType'].astype(str)}"
        for info in work
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
    }
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(case.array, shared_memory=True))
    order = [f"y{i}" for i in range(len(case.layers))]

    def outputs() -> list[Any]:
        request.infer()
        return [request.get_tensor(name).data.copy() for name in order]

    return Engine(lambda: request.infer(share_outputs=True), outputs, ", ".join(sorted(done)))


def _torch(layers: Sequence[Any], x: Any) -> Engine:
    def run() -> list[Any]:
        return [m(x) for m in layers]

    return Engine(run, lambda: [y.float().numpy() for y in run()])


def torch_bfloat16(case: Case) -> Engine:
    import torch

    return _torch([copy.deepcopy(m).to(torch.bfloat16) for m in case.layers], case.x.to(torch.bfloat16))


def torch_int8(case: Case) -> Engine:
    import torch

    if case.convolution:
        raise Absent("torch quantizes no convolutions dynamically")
    if "x86" not in torch.backends.quantized.supported_engines:
        raise Absent("torch's int8 engine for x86 is not there")
    found = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if found is None:
        raise Absent("this torch has no quantize_dynamic")
    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        return _torch(list(found(torch.nn.Sequential(*case.layers), each)), case.x)


class Server:
    """DeepSparse in its own interpreter, asked over a pipe."""

    def __init__(self, python: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="sparse-peers-"))
        self.log = (self.folder / "log.txt").open("w")
        command = [str(python), str(SERVER)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        atexit.register(self.close)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
            raise Absent(f"DeepSparse's process ended: {said[-1] if said else 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Absent(answer["error"])
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


#: The interpreter that has DeepSparse, by `sparse.py --deepsparse-python`; and its processes once they were asked.
deepsparse_python: Path | None = None
_servers: dict[str, Server] = {}


def _deepsparse(file: Path, case: Case, precision: str) -> Engine:
    import numpy

    if deepsparse_python is None:
        raise Absent("--deepsparse-python was not given")
    if precision not in _servers or _servers[precision].process.poll() is not None:
        _servers[precision] = Server(deepsparse_python)
    server = _servers[precision]
    numpy.save(case.folder / "x.npy", case.array)
    made = server.ask(model=str(file), input=str(case.folder / "x.npy"), cores=case.threads)

    def outputs() -> list[Any]:
        server.ask(outputs=str(case.folder / "outputs.npz"))
        with numpy.load(case.folder / "outputs.npz") as found:
            return [found[name] for name in found.files]

    note = f"{made['version']}, {made['cores']} cores, {made['supported']:.0%} of the operators its own"
    return Engine(lambda: server.ask(run=True)["seconds"], outputs, note, lambda: server.ask(waits=True)["seconds"])


#: By name: the precision it computes in, and how it is made.
DENSE: dict[str, tuple[str, Callable[[Case], Engine]]] = {
    "onnxruntime": ("float32", lambda c: _onnxruntime(c.onnx, c)),
    "openvino": ("float32", lambda c: _openvino(c.onnx, c, "f32")),
    "torch.bfloat16": ("bfloat16", torch_bfloat16),
    "openvino.bfloat16": ("bfloat16", lambda c: _openvino(c.onnx, c, "bf16")),
    "torch.int8": ("int8", torch_int8),
    "onnxruntime.int8": ("int8", lambda c: _onnxruntime(c.dynamic, c)),
    "onnxruntime.int8.static": ("int8", lambda c: _onnxruntime(c.static, c)),
    "openvino.int8": ("int8", lambda c: _openvino(c.static, c, "f32")),
}
#: It knows zeros, so it is no dense engine: it stands beside them.
SPARSE: dict[str, tuple[str, Callable[[Case], Engine]]] = {
    "deepsparse": ("float32", lambda c: _deepsparse(c.onnx, c, "float32")),
    "deepsparse.int8": ("int8", lambda c: _deepsparse(c.static, c, "int8")),
}
PEERS = {**DENSE, **SPARSE}
#: Relative errors that the arithmetic explains. An engine with more computes something else, and is no peer.
ALLOWED = {"float32": 1e-4, "bfloat16": 1e-2, "int8": 5e-2}


def engines(names: Sequence[str], case: Case) -> tuple[dict[str, Engine], dict[str, str]]:
    """Those that run here, and why the others do not."""
    found, absent = {}, {}
    for name in names:
        try:
            found[name] = PEERS[name][1](case)
        except ImportError as error:
            absent[name] = f"not installed: {error}"
        except Exception as error:  # an engine that fails is none, whatever it raises
            absent[name] = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"[:300]
    return found, absent


def errors(outputs: Sequence[Any], reference: Sequence[Any]) -> float:
    """The largest relative error among a model's outputs."""
    from numpy.linalg import norm

    if [y.shape for y in outputs] != [r.shape for r in reference]:
        return float("inf")
    found = [float(norm(y - r) / norm(r)) for y, r in zip(outputs, reference, strict=True)]
    return max(found) if all(e == e for e in found) else float("inf")


def versions(*names: str) -> dict[str, str]:
    """Of packages, where they are installed. DeepSparse says its own in the notes of a row."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
