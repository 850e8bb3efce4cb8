import os
import signal

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_kd.demo import demo


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_the_demo_trains_tests_prints_and_draws(tmp_path, capsys):
    """Too few steps to learn anything: what is shown is that every part is there."""
    results = demo(str(tmp_path / "demo"), teacher_steps=2, student_steps=2, train_size=16)
    names = ["teacher_a", "teacher_b", "SFT", "SupervisedKD", "BabyLlama", "GKD", "MiniLLM"]
    assert [result.name for result in results] == names
    printed = capsys.readouterr().out
    for result in results:
        assert result.name in printed
        assert (tmp_path / "demo" / result.name / "student" / "model.safetensors").exists()
        assert 0 <= result.metrics["test/exact_match"] <= 1
    assert results[0].metrics["test/forward_kl"] == pytest.approx(0, abs=1e-7)
    assert results[1].metrics["test/forward_kl"] > 0
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")


class Terminated(Callback):
    """A scheduler's signal in the middle of training."""

    def on_train_batch_start(self, *_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_demo_that_is_terminated_does_not_end_as_one_that_has_succeeded(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_kd.demo._writing", lambda name: [Terminated()])
    with pytest.raises(SystemExit) as ended:
        demo(str(tmp_path / "demo"), teacher_steps=2, student_steps=2, train_size=16)
    assert ended.value.code == 128 + signal.SIGTERM
