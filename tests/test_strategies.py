import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies import (
    DeepSpeedStrategy as LightningDeepSpeedStrategy,
)
from lightning.pytorch.trainer.states import TrainerFn

from lightning_kd.callbacks import LossNormalizationDiagnostics, TimeoutReport
from lightning_kd.models import LoRA, StudentSpec
from lightning_kd.models.sharding import is_sharded
from lightning_kd.modules import SFT
from lightning_kd.named_checkpoints import find_checkpoint
from lightning_kd.strategies import (
    DeepSpeedStrategy,
    FSDP1Strategy,
    FSDP2Strategy,
    StrategyAdapter,
    adapter_of,
    check_trainer,
    register_adapter,
)
from lightning_kd.strategies.adapter import _ADAPTERS
from lightning_kd.strategies.deepspeed import DeepSpeedAdapter
from lightning_kd.strategies.directories import read_safely, replacing
from lightning_kd.strategies.fsdp1 import FSDP1Adapter
from lightning_kd.strategies.fsdp2 import FSDP2Adapter, ModelParallelAdapter
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama


def with_strategy(strategy, **settings):
    defaults = {"accumulate_grad_batches": 1, "log_every_n_steps": 1, "callbacks": []}
    defaults |= {"lightning_module": None}
    return SimpleNamespace(strategy=strategy, **(defaults | settings))


def test_fsdp2_is_a_name_for_all_processes_in_shards():
    found = StrategyRegistry.get("fsdp2")
    assert isinstance(found, FSDP2Strategy)
    assert isinstance(found, ModelParallelStrategy)


def without_package(kind):
    """A strategy of DeepSpeed, whose constructor wants the package."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("strategy", "own"),
    [
        (FSDPStrategy(), "FSDP1Strategy"),
        (without_package(LightningDeepSpeedStrategy), "DeepSpeedStrategy"),
    ],
)
def test_lightnings_own_are_refused_with_a_way_out(strategy, own):
    with pytest.raises(ValueError, match=f"use {own} of lightning_kd"):
        check_trainer(with_strategy(strategy))


def test_lightnings_own_fsdp2_does_not_go_on():
    strategy = ModelParallelStrategy()
    check_trainer(with_strategy(strategy))
    with pytest.raises(ValueError, match=r"go on from last\.ckpt with --trainer\.strategy fsdp2"):
        strategy.load_checkpoint("last.ckpt")


def test_deepspeed_takes_one_micro_batch_per_step():
    check_trainer(with_strategy(without_package(DeepSpeedStrategy)))
    with pytest.raises(
        ValueError, match="accumulate_grad_batches is 2: DeepSpeed divides by it twice"
    ):
        check_trainer(with_strategy(without_package(DeepSpeedStrategy), accumulate_grad_batches=2))


def test_lightnings_names_are_ours():
    known = StrategyRegistry.available_strategies()
    kinds = {name: StrategyRegistry[name]["strategy"] for name in known}
    ours = {FSDP1Strategy: "fsdp", DeepSpeedStrategy: "deepspeed", FSDP2Strategy: "fsdp2"}
    for name, kind in kinds.items():
        assert kind in ours if name.startswith(("fsdp", "deepspeed")) else kind not in ours
    assert kinds["fsdp_cpu_offload"] is FSDP1Strategy
    assert StrategyRegistry["deepspeed_stage_3"]["init_params"] == {"stage": 3}
    assert StrategyRegistry.get("fsdp_cpu_offload").cpu_offload.offload_params


@pytest.mark.parametrize("kind", ["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"])
def test_every_kind_of_flat_shards_can_be_had(kind):
    strategy = FSDP1Strategy(sharding_strategy=kind)
    assert strategy.sharding_strategy.name == kind
    strategy._precision_plugin = FSDPPrecision("bf16-mixed")
    assert strategy.mixed_precision_config.param_dtype == torch.bfloat16
    assert strategy.mixed_precision_config.buffer_dtype == torch.float32


def test_lora_of_a_model_that_was_handed_over_is_refused_before_it_is_in_shards(monkeypatch):
    monkeypatch.setattr(StrategyAdapter, "shards_weights", True)
    student = StudentSpec.of(tiny_llama(0))
    student.lora = LoRA(r=2)
    with pytest.raises(ValueError, match="adapters of a model that was handed over"):
        trainer(max_steps=1).fit(
            SFT(student=student), datamodule=BatchList([ragged_batch([(2, 5)])])
        )


WRITTEN = {"strategy": "deepspeed", "stage": 2, "processes": 4}


def write_directory(path, steps=1, **checkpoint):
    """What every strategy does around the writing of its shards."""
    strategy = SingleDeviceStrategy("cpu")
    strategy._lightning_module = SFT(student=StudentSpec.of(tiny_llama(0)))
    strategy._lightning_module.trainer = trainer(max_steps=1)
    state = {"global_step": steps, "callbacks": {}} | checkpoint
    with replacing(strategy, path, WRITTEN, state) as fresh:
        fresh.mkdir()
        (fresh / "shard").write_bytes(bytes(range(256)))
    os.utime(path, (steps, steps))
    return strategy


def read_directory(strategy, path, saved_strategy=WRITTEN):
    """What every strategy does around the reading of them."""
    with read_safely(strategy, path, saved_strategy, True):
        return True


def test_a_directory_is_read_as_it_was_written(tmp_path):
    strategy = write_directory(tmp_path / "last.ckpt")
    assert read_directory(strategy, tmp_path / "last.ckpt")
    said = "written with strategy deepspeed, stage 2, processes 4, and this run has strategy fsdp;"
    with pytest.raises(ValueError, match=said):
        read_directory(strategy, tmp_path / "last.ckpt", {"strategy": "fsdp"})


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 7)  # stays text
    path.write_bytes(content)


DAMAGES = {
    "missing": (Path.unlink, "it is incomplete: about.json, which is written last, is missing"),
    "empty": (lambda about: os.truncate(about, 0), "about.json is cut short or damaged"),
    "truncated": (lambda about: os.truncate(about, 900), "about.json is cut short or damaged"),
    "a list": (lambda about: about.write_text("[]"), "about.json has no checksum"),
    "nothing": (lambda about: about.write_text("{}"), "about.json has no checksum"),
    "a shard": (lambda about: flip(about.with_name("shard"), 100), r"not those .* \(shard\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_and_the_newest_complete_one_named(tmp_path, damage):
    for steps in (1, 2, 3, 4):
        strategy = write_directory(tmp_path / f"step={steps}.ckpt", steps)
    hurt, said = DAMAGES[damage]
    for steps in (3, 4):
        hurt(tmp_path / f"step={steps}.ckpt" / "about.json")
    with pytest.raises(ValueError, match=said) as refused:
        read_directory(strategy, tmp_path / "step=4.ckpt")
    assert str(refused.value).startswith(f"{tmp_path / 'step=4.ckpt'} is no checkpoint that")
    assert f"newest complete one beside it is {tmp_path / 'step=2.ckpt'}" in str(refused.value)


def test_a_flipped_bit_in_what_a_directory_says_of_itself_is_found(tmp_path):
    """Wherever it is: also in a name, a shape or a number, which would only mean something else."""
    path = tmp_path / "last.ckpt"
    strategy = write_directory(path, best="step=1.ckpt")
    about = path / "about.json"
    text = about.read_bytes()
    for place in range(0, len(text), 11):
        flip(about, place)
        with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint .*about\.json"):
            read_directory(strategy, path)
        about.write_bytes(text)
    assert read_directory(strategy, path)


def test_last_and_best_are_looked_for_among_undamaged_directories(tmp_path):
    write_directory(tmp_path / "step=2.ckpt", 2)
    write_directory(tmp_path / "step=4.ckpt", 4)
    assert find_checkpoint("last", [tmp_path]) == tmp_path / "step=4.ckpt"
    (tmp_path / "step=4.ckpt" / "about.json").unlink()
    with pytest.raises(ValueError, match=r"incomplete.* beside it is .*step=2\.ckpt"):
        find_checkpoint("last", [tmp_path])


def test_weights_alone_in_a_directory_are_evaluated_and_not_trained_on(tmp_path):
    path = tmp_path / "last.ckpt"
    strategy = write_directory(path)
    with replacing(strategy, path, WRITTEN, {"global_step": 1}) as fresh:  # save_weights_only
        fresh.mkdir()
    state = strategy.lightning_module.trainer.state
    state.fn = TrainerFn.VALIDATING
    assert read_directory(strategy, path)
    state.fn = TrainerFn.FITTING
    with pytest.raises(ValueError, match=r"holds weights alone .* Resume from another checkpoint"):
        read_directory(strategy, path)


def test_what_lightning_lets_pass():
    with pytest.raises(ValueError, match=r"trainer.log_every_n_steps is -1; it must be"):
        check_trainer(with_strategy(SingleDeviceStrategy("cpu"), log_every_n_steps=-1))


def test_tensors_are_not_split():
    strategy = ModelParallelStrategy()
    sizes = {"tensor_parallel": SimpleNamespace(size=lambda: 2), "data_parallel": None}
    strategy._device_mesh = sizes
    with pytest.raises(ValueError, match="tensor_parallel_size is 2"):
        adapter_of(with_strategy(strategy)).shard_mesh()
    assert adapter_of(with_strategy(SingleDeviceStrategy("cpu"))).shard_mesh() is None


def test_gradients_in_shards_are_not_audited(monkeypatch):
    monkeypatch.setattr("lightning_kd.callbacks.audit.step_audit.is_sharded", lambda part: True)
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    assert not is_sharded(module)
    fit = trainer(max_steps=1, callbacks=[LossNormalizationDiagnostics(audit="first")])
    with pytest.raises(ValueError, match="audit with ddp or one process"):
        fit.fit(module, datamodule=BatchList([ragged_batch([(2, 5)])]))


class Silence(Callback):
    """What a process sees when another one does not answer."""

    def __init__(self, message):
        self.message = message

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            pl_module.training_step = self.training_step

    def training_step(self, *_):
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "noted"),
    [
        ("Timed out waiting 8000ms for recv", True),
        ("Connection closed by peer", True),
        ("shapes do not match", False),
    ],
)
def test_silence_is_named_by_step_and_phase(message, noted):
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    fit = trainer(max_steps=3, callbacks=[Silence(message), TimeoutReport()])
    with pytest.raises(RuntimeError, match=message) as raised:
        fit.fit(module, datamodule=BatchList([ragged_batch([(2, 5)])] * 3))
    notes = "".join(getattr(raised.value, "__notes__", ()))
    assert ("in optimizer step 2, while the forward pass" in notes) == noted


def test_an_adapter_is_that_of_the_nearest_class():
    kinds = {
        DDPStrategy(): StrategyAdapter,
        SingleDeviceStrategy("cpu"): StrategyAdapter,
        ModelParallelStrategy(): ModelParallelAdapter,
        FSDP2Strategy(): FSDP2Adapter,
        FSDP1Strategy(): FSDP1Adapter,
        without_package(DeepSpeedStrategy): DeepSpeedAdapter,
    }
    for strategy, kind in kinds.items():
        assert type(adapter_of(with_strategy(strategy))) is kind


@pytest.mark.parametrize(
    ("strategy", "flattens"),
    [(DDPStrategy(), False), (FSDP2Strategy(), False), (FSDP1Strategy(), True)],
)
def test_weights_are_flat_under_fsdp1_alone(strategy, flattens):
    assert adapter_of(with_strategy(strategy)).flattens_weights is flattens


def test_a_strategy_of_ones_own_brings_its_adapter(monkeypatch):
    monkeypatch.setattr("lightning_kd.strategies.adapter._ADAPTERS", dict(_ADAPTERS))

    class Elastic(DDPStrategy):
        pass

    class Derived(Elastic):
        pass

    @register_adapter(Elastic)
    class ElasticAdapter(StrategyAdapter[Elastic]):
        pass

    assert isinstance(adapter_of(with_strategy(Derived())), ElasticAdapter)
    assert type(adapter_of(with_strategy(DDPStrategy()))) is StrategyAdapter


@pytest.mark.parametrize(
    ("strategy", "loss", "gradient"),
    [(SingleDeviceStrategy("cpu"), 3.0, 5.0), (without_package(DeepSpeedStrategy), 30.0, 0.5)],
    ids=["replicated", "deepspeed"],
)
def test_a_step_is_divided_once(strategy, loss, gradient):
    """On the gradients where they are seen, and on the loss where they are not."""
    adapter = adapter_of(with_strategy(strategy))
    closed = []

    def step_scale():
        closed.append(True)
        return torch.tensor(10.0, dtype=torch.float64)

    gradients = [torch.tensor([0.5])]
    assert adapter.scale_loss(torch.tensor(3.0), lambda: 1.0, step_scale) == loss
    adapter.scale_gradients(gradients, step_scale)
    assert gradients[0] == gradient
    assert len(closed) == 1


def test_a_step_without_gradients_is_closed():
    closed = []
    adapter = adapter_of(with_strategy(SingleDeviceStrategy("cpu")))
    adapter.scale_gradients([], lambda: closed.append(True) or torch.ones(()))
    assert closed == [True]


@pytest.mark.parametrize(
    ("strategy", "directories"),
    [
        (SingleDeviceStrategy("cpu"), False),
        (FSDP2Strategy(), False),
        (FSDP2Strategy(save_distributed_checkpoint=True), True),
        (FSDP1Strategy(), True),
        (without_package(DeepSpeedStrategy), True),
    ],
)
def test_checkpoints_are_files_or_directories(strategy, directories):
    assert adapter_of(with_strategy(strategy)).writes_directories is directories
