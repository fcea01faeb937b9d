"""A model as the program that torch.export makes of it, in which every size is a number that can be mended.

What a model's ``forward`` derives from sizes, such as a head's width as ``C // self.num_heads``, stands in the program
as the number that it came to, and each of these numbers is kept by a small module (`Sized`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from ..errors import ModelError
from ..graph.trace import plain_operations, stored_tensors
from .prove import distance, first_line, outputs
from .sized import Sized, keep_sizes

#: How far a program may be from its model, relative to the largest output: both compute in the model's own dtype.
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-4}


class _Frame:
    """What never changes in a program; its copies share it."""

    def __init__(self, run: Callable[..., Any], specs: tuple[Any, Any], guards: Callable[..., None]) -> None:
        self.run, self.specs, self.guards = run, specs, guards

    def __deepcopy__(self, memo: Any) -> _Frame:
        return self


class Program(nn.Module):
    """The operations of one run of a model, in a row, on the model's own parameters and buffers, by their names.

    It is called as the model was in that run, and computes what the model does in evaluation mode, whatever mode it is
    in itself: dropout is off and batch norms use their running statistics. Gradients flow through it.

    Attributes:
        dynamic: another batch size than the example's may be given.
    """

    def __init__(self, frame: _Frame, dynamic: bool) -> None:
        super().__init__()
        self._frame, self.dynamic = frame, dynamic
        self._exported_in: torch.dtype | None = None

    # The generated code looks these up on the module that it runs as.
    @property
    def _in_spec(self) -> Any:
        return self._frame.specs[0]

    @property
    def _out_spec(self) -> Any:
        return self._frame.specs[1]

    @property
    def _guards_fn(self) -> Any:
        return self._frame.guards

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return self._frame.run(self, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; devices that the program names go along, and in float64 all of it computes in float64.

        Raises:
            ModelError: another dtype is asked for, and the program names dtypes: whether one of them was the model's
                own or a deliberate other cannot be told.
        """
        sized = [m for m in self.modules() if isinstance(m, Sized) and m.holds]
        one = next((p.detach().flatten()[:0] for p in self.parameters() if p.is_floating_point()), None)
        to = None if one is None else fn(one).dtype
        if to not in (None, self._exported_in, torch.float64) and any(m.named is not None for m in sized):
            raise ModelError(
                f"an exported program stays in {self._exported_in}: convert the model to {to} first, then export it"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        wide = self._float() == torch.float64
        where = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        for module in sized:
            module.dtype = torch.float64 if wide and module.named is not None else module.named
            module.device = where if where is not None and module.device is not None else module.device
        return self

    def _float(self) -> torch.dtype | None:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)


def as_program(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: bool | None = None
) -> Program:
    """Export a model as it runs on an example; the program shares the model's parameters and buffers.

    Args:
        dynamic: whether the first axis of the inputs, the batch, may have another length than the example's; by
            default where the export allows it.

    Raises:
        ModelError: the model cannot be exported, or the program computes something else.
    """
    problem: Exception = ModelError("the inputs have no batch in common")
    for free in (True, False) if dynamic is None else (dynamic,):
        try:
            program = _exported(model, tuple(args), dict(kwargs), free)
            if dynamic is None:
                _check(model, program, args, kwargs)
            return program
        except Exception as error:  # of the exporter, or of the model's own code under it
            problem = error
    said = first_line(problem) or type(problem).__name__
    if "data-dependent" in said:
        said = f"the way through its forward depends on values ({said})"
    raise ModelError(f"the model cannot be exported on this example: {said}") from problem


def _check(model: nn.Module, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    wanted, got = outputs(model, args, kwargs), outputs(program, args, kwargs)
    scale = max((float(x.abs().max()) for x in wanted if x.numel()), default=0.0) or 1.0
    error = distance(got, wanted, scale)
    near = max((_NEAR.get(x.dtype, 2e-2) for x in wanted), default=0.0)
    if error is None or error > near:
        raise ModelError("the exported program computes something else than the model")


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Program:
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # takes a while, and few need it

    shapes: Any = None
    if dynamic:
        args, kwargs, batched = _batched(args, kwargs)
        shapes = torch.export.ShapesCollection()
        for x in batched:
            shapes[x] = {0: torch.export.Dim.AUTO}
    with _quiet(), plain_operations(model), _no_cache(model):
        made: Any = torch.export.export(model, args, kwargs, dynamic_shapes=shapes).module()
    firsts = [tuple(n.meta["val"].shape[:1]) for n in made.graph.nodes if n.op == "placeholder" and _shaped(n)]
    if dynamic and all(is_concrete_int(n) for first in firsts for n in first):
        raise ModelError("its batch is fixed")
    stored = stored_tensors(model)
    holder = "sizes"
    while holder in dict(model.named_children()) or hasattr(made, holder):
        holder += "_"
    sized = keep_sizes(made.graph, holder)
    constants = {}
    for node in made.graph.nodes:
        if node.op == "get_attr" and node.target not in stored:
            constants[node.target] = _constant(made, node.target)
    made.recompile()
    frame = _Frame(type(made).forward, (made._in_spec, made._out_spec), _checked(getattr(made, "_guards_fn", None)))
    program = Program(frame, dynamic)
    hidden = {f"{p}.{k}" if p else k for p, m in model.named_modules() for k in m._non_persistent_buffers_set}
    for name, tensor in {**stored, **constants}.items():
        owner, _, leaf = name.rpartition(".")
        module = _place(program, owner)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor, persistent=name not in hidden)
    for name, step in sized.items():
        _place(program, holder).add_module(name, step)
    program._exported_in = program._float()
    return program.train(model.training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter prints of a model that it refuses is in its exception."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _checked(guards: Callable[..., Any] | None) -> Callable[..., None]:
    """The program's own check of its inputs, with a sentence for who calls it otherwise."""

    def check(*inputs: Any) -> None:
        try:
            if guards is not None:
                guards(*inputs)
        except AssertionError as error:
            said = str(error).removeprefix("Guard failed: ")
            raise ValueError(f"the program was exported for inputs of other sizes: {said} does not hold") from None

    return check


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Transformers' language models keep no keys and values meanwhile, which an export would have to return."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in found if getattr(c, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def _shaped(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _constant(made: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found = getattr(made.get_submodule(owner), leaf, None)
    if not isinstance(found, Tensor):
        raise ModelError(f"it holds a branch or a loop of its own ({name})")
    return found


def _place(program: nn.Module, path: str) -> nn.Module:
    """The module of a path, made where there is none."""
    here = program
    for step in path.split(".") if path else ():
        if step not in here._modules:
            here.add_module(step, nn.Module())
        here = here.get_submodule(step)
    return here


def _batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Inputs with a batch of at least two, which an export takes for any number, and those that have the batch."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    if not tensors:
        raise ModelError("no input has a batch")
    count = tensors[0].shape[0]

    def repeated(x: Any) -> Any:
        batch = isinstance(x, Tensor) and x.dim() and x.shape[0] == count == 1
        return torch.cat([x, x]) if batch else x

    args, kwargs = tree_map(repeated, (args, kwargs))
    count = max(count, 2)
    found = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.dim() and x.shape[0] == count]
    return args, kwargs, found
