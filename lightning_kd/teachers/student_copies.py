"""Copies of the student that teach it: as it was at the start, or averaged over its steps."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lightning_kd.models.adapters import has_adapters
from lightning_kd.models.sharding import is_sharded, reshard, shard
from lightning_kd.resuming import digest
from lightning_kd.teachers.itself import Convert, SelfTeacher


class CopyOfStudent(SelfTeacher):
    """A teacher with weights of its own, in shards where the student is in shards.

    Of a student with adapters, one process or ddp copy these alone, and share the weights that they
    adapt; shards of FSDP2 have no shared weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trained: Sequence[str] = ()

    def weights_of(self, student: PreTrainedModel, convert: Convert) -> PreTrainedModel:
        """Return a copy of the student.

        Raises:
            ValueError: If the student is quantized, or its weights are in shards already.
        """
        if getattr(student, "hf_quantizer", None) is not None:
            raise ValueError(
                f"{type(self).__name__} copies the student, and quantized weights cannot be copied; "
                "take LiveStudent, or a student without quantization"
            )
        if is_sharded(student):
            raise ValueError(
                f"{type(self).__name__} copies the student before it is sharded, and this one was "
                "sharded in an earlier run, without a teacher; build the module anew"
            )
        shares = self._mesh is None and has_adapters(student)
        frozen = [p for p in student.parameters() if not p.requires_grad] if shares else []
        model = deepcopy(student, {id(parameter): parameter for parameter in frozen})
        self._trained = [name for name, p in student.named_parameters() if p.requires_grad]
        for parameter in model.parameters():
            parameter.grad = None
        model.requires_grad_(False)
        model.eval()
        self.examine(model)
        convert(model)
        self.retype(model, shares=shares)
        if self._mesh is None:
            model.to(self._device)
        else:
            shard(model, self._mesh)
        return model

    def examine(self, model: PreTrainedModel) -> None:
        """Look at a copy while it is whole; does nothing by default."""

    def retype(self, model: PreTrainedModel, *, shares: bool) -> None:
        """Give a copy's weights another type than the student's; does nothing by default.

        Args:
            model: The copy.
            shares: Whether the weights that do not train are the student's own.
        """

    def copy_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Return the student's type."""
        return dtype


class FrozenStudent(CopyOfStudent):
    """The student as it was when the run started.

    With LoRA from a configuration that is the model without its adapters. A checkpoint has no more of
    it than a digest: a resumed run begins with the same student.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start, self._saved = "", ""

    def examine(self, model: PreTrainedModel) -> None:
        """Note a digest of the start."""
        parameters = dict(model.named_parameters())
        # An adapter whose second factor is 0 changes nothing, whatever its first is drawn to be.
        idle = {n.replace("lora_B", "lora_A") for n in parameters if "lora_B" in n}
        idle = {n for n in idle if not parameters[n.replace("lora_A", "lora_B")].any()}
        self._start = digest((name, p) for name, p in parameters.items() if name not in idle)
        self._compare()

    def resume_settings(self) -> dict[str, Any]:
        """Return a digest of the student as it started, once it is known."""
        return super().resume_settings() | ({"start": self._start} if self._start else {})

    def state(self, *, wanted: bool) -> dict[str, Tensor]:
        """Return the digest of the start."""
        return {"start": torch.tensor(list(self._start.encode()))} if self._start else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Compare the start with that of a checkpoint, now or when there is one.

        Raises:
            ValueError: If it was another one.
        """
        self._saved = bytes(state["start"].tolist()).decode()
        self._compare()

    def _compare(self) -> None:
        if self._start and self._saved not in {"", self._start}:
            raise ValueError(
                "FrozenStudent is the student as its run started, and the student here starts with "
                "other weights than that of the checkpoint. Build the module as the run did, and give "
                "ckpt_path to the trainer; for a run that starts from the checkpoint's weights, export "
                "them and give that directory as model.student.name_or_path"
            )


class EMAStudent(CopyOfStudent):
    r"""An exponential moving average of the student's weights over its optimizer steps.

    .. math:: \bar w_0 = w_0, \qquad \bar w_k = d\, \bar w_{k-1} + (1 - d)\, w_k
        = d^k w_0 + (1 - d) \sum_{i=1}^{k} d^{k-i} w_i

    with :math:`w_k` the weights after :math:`k` steps and :math:`d` the decay. A step that was skipped
    (an overflow in fp16, a non-finite gradient) is none. Of the weights those that train are averaged:
    of a student with LoRA, its adapters. The average is in float32 or wider, as one in bfloat16 would
    stand still; it is in the run's checkpoints.

    Args:
        decay: :math:`d`, above 0 and below 1.

    Raises:
        ValueError: If the decay is out of its range.

    Example:
        >>> EMAStudent(decay=0.5).decay
        0.5

    References:
        *Self-Distillation Enables Continual Learning*, 2026. https://arxiv.org/abs/2601.19897
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(
                f"decay is {decay}; it must lie between 0 and 1: without any the teacher is "
                "LiveStudent, and with 1 FrozenStudent"
            )
        self.decay = decay
        self._saved: Mapping[str, Tensor] | None = None

    def follow(self, student: PreTrainedModel, convert: Convert) -> None:
        """Copy the student, or go on with the average of a checkpoint."""
        super().follow(student, convert)
        if self._saved is not None:
            self.load_state(self._saved)

    def retype(self, model: PreTrainedModel, *, shares: bool) -> None:
        """Widen weights of 16 bits, in which an average would stand still."""
        parameters = dict(model.named_parameters())
        narrow = [parameters[n] for n in self._trained if parameters[n].dtype.itemsize < 4]
        if narrow and not shares:
            model.float()
        for parameter in narrow:
            parameter.data = parameter.data.float()

    def copy_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Return float32 for a narrower type."""
        return torch.float32 if dtype.itemsize < 4 else dtype

    @torch.no_grad()
    def after_step(self) -> None:
        """Average in the student's weights."""
        assert self._student is not None  # a step has trained it
        averages, weights = self._averages(), self._whole_or_shares(self._student)
        torch._foreach_lerp_(
            [_local(averages[name]) for name in self._trained],
            [_local(weights[name]).to(averages[name].dtype) for name in self._trained],
            1 - self.decay,
        )

    def state(self, *, wanted: bool) -> dict[str, Tensor]:
        """Return the averages, whole and in CPU memory."""
        if self._model is None:
            return dict(self._saved or {})
        found = {}
        for name, average in self._averages().items():
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if wanted:
                found[name] = whole.detach().to("cpu", copy=True)
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages; before there is a student, they are kept for it.

        Raises:
            ValueError: If they are another student's.
        """
        if self._model is None:
            self._saved = state
            return
        self._saved, averages = None, self._averages()
        expected = {name: tuple(average.shape) for name, average in averages.items()}
        found = {name: tuple(average.shape) for name, average in state.items()}
        if found != expected:
            other = sorted(name for name, _ in found.items() ^ expected.items())
            raise ValueError(
                f"the checkpoint averages other weights than this student trains, {other[0]} for one; "
                "give the model, and the lora, that it was trained with"
            )
        for name, average in averages.items():
            whole = state[name].to(average.device, average.dtype)
            if isinstance(average, DTensor):
                whole = distribute_tensor(whole, average.device_mesh, average.placements)
            _local(average).copy_(_local(whole))

    def _averages(self) -> dict[str, Tensor]:
        parameters = self._whole_or_shares(self.model)
        return {name: parameters[name] for name in self._trained}

    def _whole_or_shares(self, model: PreTrainedModel) -> dict[str, Tensor]:
        reshard(model)  # a forward pass has left some of it gathered
        return dict(model.named_parameters())


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
