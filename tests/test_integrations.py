"""The callbacks: steps of the optimizer, accumulation, checkpoints, penalties; the real trainers where they are."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import integrations
from secateur.errors import ModelError
from secateur.integrations import lightning_callback, transformers_callback
from tests import tiny

GMP = {"method": "gmp", "sparsity": 0.75, "knobs": {"driver": {"every": 2}}}
RIGL = {"method": "rigl", "sparsity": 0.75, "knobs": {"driver": {"every": 2}}}


def kept(masks: secateur.Masks, model: nn.Module) -> None:
    """Masks of three quarters, and zeros under them."""
    assert masks.sparsity == pytest.approx(0.75, abs=1e-3)
    for name, mask in masks.items():
        assert not bool(model.get_submodule(name).weight.detach()[~mask].any())


class Hooks:
    """What the Trainer does around its callbacks, on a linear layer."""

    def __init__(self, callback: Any, folder: Path, steps: int = 6, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(8, 8)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.callback, self.folder = callback, folder
        self.args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=None)
        self.state = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=True)

    def say(self, event: str) -> None:
        more = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        getattr(self.callback, event)(self.args, self.state, SimpleNamespace(), **more)

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.state.global_step)
        for _ in range(2):  # accumulated
            (self.model(torch.randn(4, 8, generator=generator)).square().mean() / 2).backward()
        self.say("on_pre_optimizer_step")
        self.optimizer.step()
        self.say("on_optimizer_step")
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1


@pytest.mark.parametrize("given", [GMP, RIGL], ids=["gmp", "rigl"])
def test_a_callback_resumes_from_its_checkpoint(given: dict[str, Any], tmp_path: Path) -> None:
    whole = Hooks(transformers_callback(**given), tmp_path)
    whole.say("on_train_begin")
    for _ in range(3):
        whole.step()
    (tmp_path / "checkpoint-3").mkdir()
    whole.say("on_save")
    model, optimizer = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    other = Hooks(transformers_callback(**given), tmp_path, seed=1)
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)
    other.state.global_step = 3
    other.say("on_train_begin")
    for run in (whole, other):
        for _ in range(3):
            run.step()
        run.say("on_train_end")
    assert torch.equal(whole.model.weight, other.model.weight)
    assert torch.equal(whole.callback.masks["weight"], other.callback.masks["weight"])
    assert int(other.model.weight.count_nonzero()) == 16


def test_a_checkpoint_without_a_session_is_refused(tmp_path: Path) -> None:
    hooks = Hooks(transformers_callback(**GMP), tmp_path)
    hooks.state.global_step = 2
    with pytest.raises(ModelError, match="checkpoint of step 2 has no secateur.safetensors"):
        hooks.say("on_train_begin")


class _Learned:
    """A session that adds a parameter to the optimizer and asks for a penalty."""

    def __init__(self, model: nn.Module, method: str, *, optimizer: Any, **_: Any) -> None:
        self.gate = nn.Parameter(torch.ones(2))
        optimizer.add_param_group({"params": [self.gate], "lr": 0.5})

    def penalty(self) -> Tensor:
        return 3 * self.gate.sum()

    def step(self) -> None: ...


def test_penalties_and_new_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "attach", _Learned)
    hooks = Hooks(transformers_callback("gmp"), tmp_path)
    hooks.say("on_train_begin")
    hooks.step()
    gate = hooks.callback.session.gate
    assert torch.allclose(gate, torch.full((2,), 1 - 0.5 * 3.0))  # one step of 0.5, though two batches were accumulated
    assert hooks.scheduler.get_last_lr() == [0.1, 0.5]


def test_nothing_is_imported_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match="pip install lightning"):
        lightning_callback("gmp")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="pip install 'secateur"):
        transformers_callback("gmp")


def trainer(folder: Path, callback: Any, seed: int = 0) -> Any:
    from transformers import Trainer, TrainingArguments

    model = tiny.build(num_hidden_layers=1)
    ids = tiny.ids(32, 8)
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=8,
        save_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100, seed=seed,
        dataloader_pin_memory=False, save_only_model=False,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_transformers_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install accelerate")
    whole = transformers_callback(**GMP)
    first = trainer(tmp_path, whole)
    first.train()
    kept(whole.masks, first.model)
    assert whole.session.at == 8  # updates, not batches
    again = transformers_callback(**GMP)
    second = trainer(tmp_path, again)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    kept(again.masks, second.model)
    state = first.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in second.model.state_dict().items())
    assert all(torch.equal(again.masks[n], whole.masks[n]) for n in whole.masks)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trainer(tmp_path: Path) -> None:
    reason = "lightning is not installed"
    pytest.importorskip("pytorch_lightning", reason=reason)
    try:
        from lightning import pytorch as pl
    except ImportError:
        import pytorch_lightning as pl

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(8, 8)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.body(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    class Save(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(callback: Any, *others: Any, **more: Any) -> Any:
        made = pl.Trainer(
            max_epochs=4, accumulate_grad_batches=2, callbacks=[callback, *others], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            enable_checkpointing=False,
        )  # fmt: skip
        net = Net()
        rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        made.fit(net, torch.utils.data.DataLoader(rows, batch_size=4), **more)
        return net

    for given in (GMP, RIGL):
        whole, rest = lightning_callback(**given), lightning_callback(**given)
        net = fit(whole, Save())
        assert whole.session.at == 16  # 4 epochs of 8 batches, two to a step
        kept(whole.masks, net)
        other = fit(rest, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        assert rest.session.at == 16
        assert torch.equal(net.body.weight, other.body.weight)
