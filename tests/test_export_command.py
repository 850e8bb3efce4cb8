"""``lightning-kd export``: the student of a checkpoint, without its teacher and its data."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_kd.cli.export import with_run_config
from lightning_kd.data import arithmetic_tokenizer
from tests.support.command_line import CONFIGS, DEBUG, EXPECTED_WARNINGS, QUIET, SMALL, fit, run
from tests.support.toys import tiny_llama

pytestmark = EXPECTED_WARNINGS

CHECKPOINTS = Path("runs/version_0/checkpoints")


def saving(*more, **options):
    """A ModelCheckpoint of each of the two steps, and the last and the best."""
    keep = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "save_last": True}
    name = "lightning.pytorch.callbacks.ModelCheckpoint"
    callback = {"class_path": name, "init_args": keep | options}
    listed = json.dumps([callback, *more])
    return ["--trainer.enable_checkpointing", "true", "--trainer.callbacks", listed]


def weights(directory):
    return load_file(Path(directory, "model.safetensors"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def of_checkpoint(path):
    """The student's weights in a checkpoint, as torch reads them."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {n.removeprefix("student."): w for n, w in state.items()}


def holds(directory, checkpoint):
    """Whether a directory holds a checkpoint's weights, read by transformers."""
    own = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return same(own, of_checkpoint(checkpoint))


def test_a_checkpoint_is_exported_by_its_path_alone(cli, teacher, caplog):
    cli(
        *fit("supervised_kd", "--model.teacher.name_or_path", teacher, *saving()),
        *("--model.divergence", "reverse_kl", "--data.validation_size", 20),
        *("--trainer.val_check_interval", 1),
    )
    first = weights("runs/version_0/student")
    shutil.rmtree(teacher)
    cli("export", "--ckpt_path", CHECKPOINTS / "step=1.ckpt", "--export.dirpath", "one")
    assert holds("one", CHECKPOINTS / "step=1.ckpt")
    assert not same(weights("one"), first)
    assert AutoTokenizer.from_pretrained("one").eos_token_id is not None
    text = Path("one/README.md").read_text()
    assert "reverse_kl" in text or "ReverseKL" in text
    assert "lightning-kd export" not in text  # but the command that trained
    assert "the weights after 1 optimizer steps" in text
    # By default where fit has put its own, which is the same run's.
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        cli("export", "--ckpt_path", CHECKPOINTS / "last.ckpt")
    assert same(weights("runs/version_0/student"), first)
    assert f"The student is in {Path('runs/version_0/student').resolve()}: " in caplog.text
    assert sorted(path.name for path in Path("runs").iterdir()) == ["version_0"]
    assert not Path("predictions.jsonl").exists()


def test_a_students_own_average_is_not_asked_for(cli):
    """Also of a checkpoint that does not name it, where a resume says to export."""
    cli(*fit("sdft", *saving(), "--model.student.name_or_path", "null"))
    saved = torch.load(CHECKPOINTS / "last.ckpt", weights_only=True)
    assert saved.pop("self_teacher_kinds") == ["EMAStudent"]
    torch.save(saved, CHECKPOINTS / "last.ckpt")
    cli("export", "--ckpt_path", CHECKPOINTS / "last.ckpt", "--export.dirpath", "one")
    assert holds("one", CHECKPOINTS / "last.ckpt")


@pytest.mark.parametrize("command", ["export", "validate", "predict"])
def test_another_tokenizer_than_that_of_the_run_is_said(cli, command):
    cli(*fit("sft", *saving()))
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained("other")
    config = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "last"]
    with pytest.warns(UserWarning, match="other is another tokenizer than that of the run which"):
        cli(command, *config, "--model.tokenizer", "other")


def test_last_and_best_of_a_run_and_a_run_that_never_exported(cli, fails):
    monitored = {"monitor": "val/loss", "save_top_k": 1, "every_n_train_steps": None}
    cli(
        *fit("sft", *saving(**monitored), "--data.validation_size", 20),
        *("--trainer.val_check_interval", 1, "--model.optimizer.lr", 5),  # gets worse at once
    )
    shutil.rmtree("runs/version_0/student")
    config = ["--config", "runs/version_0/config.yaml"]
    cli("export", *config, "--ckpt_path", "best")
    (best,) = CHECKPOINTS.glob("step=*.ckpt")
    assert holds("runs/version_0/student", best)
    assert "of which run?" in fails("export", "--ckpt_path", "best")
    said = fails("export", *config, "--ckpt_path", "last", "--export.weights", "best")
    assert "--ckpt_path says which weights" in said


def test_what_is_missing_is_said(cli, fails):
    cli(*fit("sft", *saving(dirpath="elsewhere"), "--data.validation_size", 20))
    config = ["--config", "runs/version_0/config.yaml"]
    assert "export needs the checkpoint" in fails("export", *config)
    assert "'nowhere.ckpt' does not exist" in fails(
        "export", *config, "--ckpt_path", "nowhere.ckpt"
    )
    said = fails("export", "--ckpt_path", "elsewhere/last.ckpt")
    assert "config.yaml of the run that saved elsewhere/last.ckpt; give --config" in said
    Path("other").mkdir()
    tiny_llama(3, vocab_size=14).save_pretrained("other")
    to_other = ["--ckpt_path", "elsewhere/last.ckpt", "--export.dirpath", "other"]
    assert "model in" in fails("export", *config, *to_other)
    cli("export", *config, *to_other, "--export.overwrite", "true")
    assert holds("other", "elsewhere/last.ckpt")


@pytest.mark.parametrize("place", ["runs/version_0", "runs/version_0/checkpoints"])
@pytest.mark.parametrize("command", [["export"], ["validate", "--config", CONFIGS / "sft.yaml"]])
def test_the_directory_of_a_run_is_answered_with_its_checkpoints(place, command, fails):
    CHECKPOINTS.mkdir(parents=True)
    (CHECKPOINTS.parent / "config.yaml").write_text("")
    said = fails(*command, "--ckpt_path", place)
    assert f"'{place}' is the directory of a run without a checkpoint" in said
    for time, name in enumerate(["step=2.ckpt", "last.ckpt"]):
        (CHECKPOINTS / name).write_text("")
        os.utime(CHECKPOINTS / name, (time, time))
    said = fails(*command, "--ckpt_path", place)
    both = f"{CHECKPOINTS / 'last.ckpt'} or {CHECKPOINTS / 'step=2.ckpt'}"
    assert f"'{place}' is the directory of a run; give a checkpoint in it: {both}" in said


def test_the_configuration_of_a_run_is_looked_for_only_where_none_is_given():
    place = Path("runs/version_7/checkpoints")
    place.mkdir(parents=True)
    (place / "last.ckpt").write_text("")
    (place.parent / "config.yaml").write_text("")
    config = str((place.parent / "config.yaml").absolute())
    for given in (["--ckpt_path", str(place / "last.ckpt")], [f"--ckpt_path={place}/last.ckpt"]):
        assert with_run_config(["export", *given]) == ["export", "--config", config, *given]
        assert with_run_config(["test", *given]) == ["test", *given]
        for other in ("--config=x.yaml", "-c", "--help"):
            assert with_run_config(["export", other, *given]) == ["export", other, *given]


def test_help_explains(cli, capsys):
    with pytest.raises(SystemExit):
        cli("export", "--help")
    said = capsys.readouterr().out
    assert "Write the student of a checkpoint as a Hugging Face directory" in said
    assert "--export.push_to_hub" in said


@pytest.mark.filterwarnings("error:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_merged_and_what_they_started_from_stays(cli, fails):
    tiny_llama(2, vocab_size=14).save_pretrained("before")
    student = {"config": None, "name_or_path": "./before", "lora": {"r": 2}}
    Path("lora.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"student": student}}}))
    config = ["--config", CONFIGS / "sft.yaml", *DEBUG, *QUIET, "--config", "lora.yaml"]
    cli("fit", *config, *saving(), "--data.validation_size", 20)
    cli("export", "--ckpt_path", CHECKPOINTS / "last.ckpt", "--export.dirpath", "merged")
    assert {path.name for path in Path("merged").glob("*.safetensors")} == {"model.safetensors"}
    assert same(weights("merged"), weights("runs/version_0/student"))
    assert not same(weights("merged"), weights("before"))
    over = ["--export.dirpath", "before", "--export.overwrite", "true"]
    said = fails("export", "--ckpt_path", CHECKPOINTS / "last.ckpt", *over)
    assert "is the student of this run" in said


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that")
def test_averaged_weights_are_those_that_are_exported(cli):
    ema = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.5}}
    cli(*fit("sft", *saving(ema), "--data.validation_size", 20, "--model.optimizer.lr", 0.1))
    cli("export", "--ckpt_path", CHECKPOINTS / "last.ckpt", "--export.dirpath", "averaged")
    assert holds("averaged", CHECKPOINTS / "last.ckpt")
    trained = torch.load(CHECKPOINTS / "last.ckpt", weights_only=True)["current_model_state"]
    exported = weights("averaged")
    assert not torch.equal(exported["model.norm.weight"], trained["student.model.norm.weight"])
    assert same(exported, weights("runs/version_0/student"))


def test_a_method_whose_teacher_generates_needs_neither_it_nor_the_data(cli, teacher):
    rows = [{"prompt": f"{a}1+654=", "completion": "765"} for a in range(9)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(teacher, "tokenizer")
    config = ["--config", CONFIGS / "sequence_kd.yaml", *DEBUG, *QUIET, *saving()]
    config += ["--data.tokenizer", "tokenizer", "--model.teacher.name_or_path", teacher]
    cli("fit", *config, "--model.student.config", SMALL, "--data.train", "rows.jsonl")
    shutil.rmtree(teacher)
    Path("rows.jsonl").unlink()
    cli("export", "--ckpt_path", CHECKPOINTS / "last.ckpt", "--export.dirpath", "exported")
    assert same(weights("exported"), weights("runs/version_0/student"))


def test_weights_alone_are_exported_too(cli):
    cli(*fit("sft", *saving(save_weights_only=True), "--data.validation_size", 20))
    cli("export", "--ckpt_path", CHECKPOINTS / "step=2.ckpt", "--export.dirpath", "alone")
    assert holds("alone", CHECKPOINTS / "step=2.ckpt")
    card = Path("alone/README.md").read_text()
    assert "| method | SFT |" in card
    assert "## Command" not in card  # it is not known


@pytest.mark.processes
def test_shards_are_read_by_the_strategy_that_wrote_them():
    """Written by two processes, exported by one and by two."""
    strategy = {"class_path": "FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}
    command = [sys.executable, "-m", "lightning_kd"]
    written = run(
        *(*command, *fit("sft", *saving(), "--data.validation_size", 8)),
        *("--trainer.strategy", json.dumps(strategy), "--trainer.devices", 2),
    )
    assert written.returncode == 0, written.stderr[-3000:]
    assert (CHECKPOINTS / "last.ckpt").is_dir()
    trained = weights("runs/version_0/student")
    for devices in (1, 2):
        done = run(
            *(*command, "export", "--ckpt_path", CHECKPOINTS / "last.ckpt"),
            *("--trainer.devices", devices, "--export.dirpath", f"of_{devices}"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert same(weights(f"of_{devices}"), trained)
        assert "after 2 optimizer steps" in Path(f"of_{devices}/README.md").read_text()
