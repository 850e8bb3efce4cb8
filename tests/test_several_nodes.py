"""Two agents of torchrun on loopback are two nodes, which share no folder."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.support.command_line import EXPECTED_WARNINGS, assert_equal_runs, fit
from tests.support.scripts import ROOT, free_port

pytestmark = [pytest.mark.processes, pytest.mark.slow, *EXPECTED_WARNINGS]


def documented(strategy, port):
    """The command of docs/scaling.md on two nodes of one process each."""
    (block,) = re.findall(
        r"```bash\n(torchrun .*?)```", (ROOT / "docs/scaling.md").read_text(), re.S
    )
    command = block.replace("\\\n", " ").replace("$MASTER_ADDR", "127.0.0.1")
    for shown, here in (
        ("--nproc_per_node 8", "--nproc_per_node 1"),
        ("--trainer.devices 8", "--trainer.devices 1"),
        ("--master_port 29500", f"--master_port {port}"),
        ("overlays/fsdp2.yaml", f"overlays/{strategy}.yaml"),
        ("configs/", f"{ROOT}/configs/"),
    ):
        assert shown in command
        command = command.replace(shown, here)
    return command


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_give_the_losses_of_one_process(teacher, cli, strategy, tmp_path):
    common = [
        *fit("gkd", "--model.teacher.name_or_path", teacher, "--on_policy.lmbda", 1)[3:],
        *("--data.validation_size", 21, "--trainer.log_every_n_steps", 1),
    ]
    command, nodes = documented(strategy, free_port()), []
    for number in range(2):
        folder = tmp_path / f"node_{number}"
        folder.mkdir()
        words = shlex.split(command.replace("$NODE_RANK", str(number)))
        more = [*common, "--data.batch_size", 4, "--trainer.logger.save_dir", "."]
        more += ["--export.dirpath", "student"]
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words[1:], *map(str, more)],
                cwd=folder,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        for node in nodes:
            said, _ = node.communicate(timeout=300)
            assert node.returncode == 0, said
    finally:
        for node in nodes:
            node.kill()
    assert not list((tmp_path / "node_1").iterdir())

    one = ["--trainer.logger.save_dir", "one", "--export.dirpath", "one/student"]
    cli("fit", "--config", ROOT / "configs/gkd.yaml", *common, "--data.batch_size", 8, *one)
    assert_equal_runs("one", tmp_path / "node_0")
