"""Two processes of which one loses its server: ``python two_ranks.py OUT``.

Each has a server in a thread of its own; that of the second answers nothing after some steps.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_kd.callbacks import SaveOnTermination
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher, ServedTeacher, TeacherUnavailableError
from tests.serving.conftest import served
from tests.serving.faults import FAULTS, after
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

RANK = int(os.environ.get("LOCAL_RANK", "0"))
HANDSHAKE = 3


def fit(teacher, folder, checkpoint=None):
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    run = trainer(
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=2)),
        max_steps=6,
        max_epochs=-1,
        callbacks=[SaveOnTermination(str(folder))],
    )
    run.fit(module, datamodule=Letters(batch_size=2), ckpt_path=checkpoint, weights_only=True)
    return [p.detach().clone() for p in module.student.parameters()]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    folder = out.parent / "checkpoints"
    message = ""
    with served() as server:
        if RANK == 1:
            after(server, HANDSHAKE + 3, FAULTS["nothing"][0])
        try:
            fit(ServedTeacher([server.url], timeout=30.0, retries=0), folder)
        except TeacherUnavailableError as error:
            message = str(error)
    saved = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    with served() as server:
        rest = fit(ServedTeacher([server.url]), folder, folder / "last.ckpt")
    whole = fit(LocalTeacher.of(tiny_llama(1)), out.parent / "other")
    same = all(map(torch.equal, whole, rest))
    if RANK == 0:
        torch.save({"message": message, "saved": saved, "same": same}, out)
