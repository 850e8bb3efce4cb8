"""The module's own hooks, called before the callbacks that save."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn

_HOOKS = ("on_train_batch_end", "on_validation_end")


class ModuleHooks(Callback):
    """Callback that calls the module's own hooks before those of callbacks that save.

    Lightning calls it behind all callbacks: a checkpoint would not hold what it has changed, and the
    run that goes on from there would not do it again. The call that Lightning makes later is left out.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        """Restore the hooks, also if an exception came between the two calls."""
        _forget(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Call the module's hook after a micro-batch."""
        _call_now(trainer, pl_module, "on_train_batch_end", *args)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Call the module's hook after a validation while training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            _call_now(trainer, pl_module, "on_validation_end")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the module's hooks."""
        _forget(pl_module)


class _Called:
    """Placeholder of a hook that has been called, until Lightning would call it."""

    def __init__(self, module: L.LightningModule, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *_: Any, **__: Any) -> None:
        del self.module.__dict__[self.name]


def _call_now(trainer: L.Trainer, module: L.LightningModule, name: str, *args: Any) -> None:
    if getattr(type(module), name) is getattr(L.LightningModule, name) or name in vars(module):
        return
    call._call_lightning_module_hook(trainer, name, *args)
    module.__dict__[name] = _Called(module, name)


def _forget(module: L.LightningModule) -> None:
    for name in _HOOKS:
        if isinstance(vars(module).get(name), _Called):
            del module.__dict__[name]
