"""Sessions in other people's training loops: a callback for transformers' Trainer, one for Lightning.

Neither library is imported before its callback is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .calibrate import Loss
from .errors import ModelError
from .masks import Masks
from .recipe import Recipe
from .tasks import Checkpoint
from .when import Session, attach

_FILE = "secateur.safetensors"


class Follower:
    """Attaches a session when training begins, and takes its steps; what both callbacks share.

    Attributes:
        session: None before training begins.
        masks: of the session when training has ended.
    """

    def __init__(
        self, method: str | Recipe, *, data: Any = None, loss: Loss | None = None,
        masks: Mapping[str, Tensor] | None = None, **axes: Any,
    ) -> None:  # fmt: skip
        self._method, self._given, self._axes = method, {"data": data, "loss": loss, "masks": masks}, axes
        self.session: Session | None = None
        self.masks: Masks | None = None

    def begin(
        self, model: nn.Module, optimizer: Any, steps: int, state: Mapping[str, Any] | None,
        schedulers: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """Attach, or go on from ``state``."""
        before = len(optimizer.param_groups)
        self.session = attach(
            model, self._method, optimizer=optimizer, steps=steps, state=state, **self._given, **self._axes
        )
        for group in optimizer.param_groups[before:]:  # of what the method learns: the schedulers were made before
            group.setdefault("initial_lr", group["lr"])
            for one in schedulers:
                _extend(getattr(one, "scheduler", one), group)

    def before(self) -> None:
        """The gradients of a step are there: those of the penalty join them."""
        if self.session is not None:
            penalty = self.session.penalty()
            if penalty.requires_grad:
                penalty.backward()

    def after(self) -> None:
        """The optimizer has stepped."""
        if self.session is not None:
            self.session.step()

    def end(self) -> None:
        if self.session is not None:
            self.masks = self.session.finish()


def _extend(scheduler: Any, group: Mapping[str, Any]) -> None:
    """Let a scheduler of the learning rate treat a new group of parameters as it does the first."""
    scheduler.base_lrs.append(group["initial_lr"])
    if hasattr(scheduler, "lr_lambdas"):
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])


def transformers_callback(method: str | Recipe = "gmp", **given: Any) -> Any:
    """A ``transformers.TrainerCallback`` that prunes while a Trainer trains.

    ``Trainer(..., callbacks=[transformers_callback("gmp", sparsity=0.9)])``. Its arguments are those of `attach`, less
    what the Trainer knows itself. A step is one of the optimizer, whatever is accumulated; the session's state lies in
    each checkpoint of the Trainer, and ``train(resume_from_checkpoint=...)`` goes on with it. Afterwards ``masks`` has
    the masks.

    The gradients of a penalty are added after clipping. With ``load_best_model_at_end`` the masks of the last step are
    put on the best model.

    Raises:
        ModelError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise ModelError("the callback is for transformers' Trainer: pip install 'secateur[llm]' accelerate") from None

    class SecateurCallback(TrainerCallback):  # type: ignore[misc]
        """See `transformers_callback`."""

        def __init__(self) -> None:
            self.follower = Follower(method, **given)

        @property
        def session(self) -> Session | None:
            return self.follower.session

        @property
        def masks(self) -> Masks | None:
            return self.follower.masks

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = None
            if state.global_step:
                saved = _saved(args, state.global_step)
            self.follower.begin(
                kwargs["model"], kwargs["optimizer"], int(state.max_steps), saved, [kwargs["lr_scheduler"]]
            )

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.follower.before()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.follower.after()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = _folder(args, state.global_step)
            if self.session is not None and state.is_world_process_zero and folder.is_dir():
                Checkpoint(folder / _FILE).write(self.session.state_dict())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.follower.end()

    return SecateurCallback()


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


def _saved(args: Any, step: int) -> dict[str, Any]:
    """The session's state in the checkpoint that the Trainer goes on from."""
    given = args.resume_from_checkpoint
    for folder in ([Path(given)] if isinstance(given, str) else []) + [_folder(args, step)]:
        if (folder / _FILE).is_file():
            return Checkpoint(folder / _FILE).read()
    raise ModelError(
        f"the checkpoint of step {step} has no {_FILE}: it was written without this callback, or lies elsewhere "
        f"than in {args.output_dir}; begin anew, or set args.resume_from_checkpoint to its directory"
    )


def lightning_callback(method: str | Recipe = "gmp", **given: Any) -> Any:
    """A Lightning ``Callback`` that prunes while a ``Trainer`` fits a module with automatic optimization.

    ``Trainer(callbacks=[lightning_callback("rigl", sparsity=0.9)])``. Its arguments are those of `attach`, less what
    Lightning knows itself. A step is one of the optimizer, whatever is accumulated; the session's state lies in
    Lightning's checkpoints, and ``fit(ckpt_path=...)`` goes on with it. Afterwards ``masks`` has the masks.

    Raises:
        ModelError: Lightning is not installed; the module has several optimizers.
    """
    base = _lightning()

    class SecateurCallback(base):  # type: ignore[misc, valid-type]
        """See `lightning_callback`."""

        def __init__(self) -> None:
            super().__init__()
            self.follower = Follower(method, **given)
            self._saved: Mapping[str, Any] | None = None
            self._seen = 0

        @property
        def session(self) -> Session | None:
            return self.follower.session

        @property
        def masks(self) -> Masks | None:
            return self.follower.masks

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if len(trainer.optimizers) != 1:
                raise ModelError(f"the callback works with one optimizer, and the module has {len(trainer.optimizers)}")
            self._seen = trainer.global_step
            steps = int(trainer.estimated_stepping_batches)
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self.follower.begin(pl_module, trainer.optimizers[0], steps, self._saved, schedulers)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.follower.before()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step > self._seen:  # not for each batch where batches are accumulated
                self._seen = trainer.global_step
                self.follower.after()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.follower.end()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.session is None else dict(self.session.state_dict())

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self._saved = state or None

    return SecateurCallback()


def _lightning() -> Any:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            raise ModelError("the callback is for Lightning's Trainer: pip install lightning") from None
    return Callback
