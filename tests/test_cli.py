"""The command line as a user types it: in this process where possible, in its own where needed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_kd.data import PromptCompletionData, arithmetic_tokenizer, train_tokenizer
from tests.support.command_line import (
    CONFIGS,
    DEBUG,
    EXPECTED_WARNINGS,
    QUIET,
    SMALL,
    assert_equal_runs,
    fit,
    run,
    scalars,
)
from tests.support.toys import tiny_llama

pytestmark = EXPECTED_WARNINGS


def test_fit_export_validate_test_predict_and_fit_again(cli, tmp_path, capsys):
    callbacks = [
        {"class_path": "CompletionSamples", "init_args": {"max_new_tokens": 6}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"every_n_train_steps": 2, "save_last": True, "dirpath": "checkpoints"},
        },
    ]
    small = ["--data.validation_size", 20, "--data.test_size", 20]
    cli(
        *fit("sft", *small, "--trainer.enable_checkpointing", "true"),
        *("--trainer.callbacks", json.dumps(callbacks), "--export.dirpath", "student"),
    )
    seen = scalars("runs")
    assert {"train/loss", "val/loss", "val/exact_match", "train/tokens_per_second"} <= set(
        seen.Tags()["scalars"]
    )
    model = AutoModelForCausalLM.from_pretrained("student")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained("student")) == 14
    saved = "runs/version_0/config.yaml"
    assert yaml.safe_load(Path(saved).read_text())["trainer"]["max_steps"] == 2
    for command in ("validate", "test", "predict"):
        cli(command, "--config", saved, "--ckpt_path", "checkpoints/last.ckpt")
    assert "test/exact_match" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(20))
    assert all(row["prompt"].endswith("=") for row in rows)
    # The old config.yaml and the old checkpoint are no obstacle, and a longer run goes on.
    cli(
        *("fit", "--config", saved, "--ckpt_path", "checkpoints/last.ckpt"),
        *("--trainer.max_steps", 4, "--trainer.logger.init_args.version", "version_0"),
    )
    assert torch.load("checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_the_exported_student_teaches_the_next_run_and_the_divergence_is_chosen_by_flags(
    cli, teacher
):
    cli(
        *fit("supervised_kd", "--model.teacher.name_or_path", teacher),
        *("--model.divergence", "GeneralizedJSD", "--model.divergence.beta", 0.1),
    )
    saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    divergence = saved["model"]["init_args"]["divergence"]
    assert divergence["class_path"].endswith("GeneralizedJSD")
    assert divergence["init_args"]["beta"] == 0.1
    names = set(scalars("runs").Tags()["scalars"])
    assert {"train/divergence", "val/forward_kl", "val/reverse_kl", "val/top1_agreement"} <= names


def test_print_config_and_registered_names(cli, capsys, teacher):
    with pytest.raises(SystemExit):
        cli(*fit("supervised_kd", "--model.divergence", "skew_kl", "--print_config"))
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["divergence"] == "skew_kl"
    assert printed["trainer"]["max_steps"] == 2


def test_a_divergence_of_ones_own_from_yaml(cli, teacher, tmp_path, monkeypatch):
    (tmp_path / "my_divergences.py").write_text(
        "import torch\n"
        "from lightning_kd import Divergence\n"
        "class ScaledL2(Divergence):\n"
        "    def __init__(self, scale: float = 1.0) -> None:\n"
        "        self.scale = scale\n"
        "    def value(self, student_log_probs, teacher_log_probs):\n"
        "        gap = student_log_probs.exp() - teacher_log_probs.exp()\n"
        "        return self.scale * gap.square().sum(-1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cli(
        *fit("supervised_kd", "--model.teacher.name_or_path", teacher, "--model.alpha", 0),
        *("--model.divergence", "my_divergences.ScaledL2", "--model.divergence.scale", 0),
    )
    # Scaled by 0 the divergence is 0, and so is the loss: it is this class that was used.
    assert all(event.value == 0 for event in scalars("runs").Scalars("train/loss"))


def test_the_command_line_wins_over_a_checkpoint_or_is_refused(cli, fails, teacher):
    arguments = fit("supervised_kd", "--model.teacher.name_or_path", teacher)
    arguments += ["--trainer.log_every_n_steps", 1, "--trainer.enable_checkpointing", "true"]
    save = {"every_n_train_steps": 2, "save_last": True, "dirpath": "c"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}
    arguments += ["--trainer.callbacks", json.dumps([callback])]
    cli(*arguments, "--model.alpha", 0.1)
    resume = [*arguments, "--ckpt_path", "c/last.ckpt", "--trainer.max_steps", 3]
    said = fails(*resume, "--model.alpha", 0.9)
    assert "model.alpha: 0.1 -> 0.9" in said
    cli(
        *(*resume, "--model.alpha", 0.1, "--model.optimizer.lr", 0.5),
        *("--model.lr_scheduler", "null", "--trainer.logger.save_dir", "resumed"),
    )
    # The row of the step before, which was to come when the checkpoint was saved, is the first.
    rates = {event.step: event.value for event in scalars("resumed").Scalars("train/lr")}
    assert rates.keys() == {1, 2}
    assert rates[2] == 0.5


@pytest.mark.parametrize("template", ["Q: {prompt}", "[{prompt}]", "# {prompt}"])
def test_a_template_is_text_whatever_yaml_would_take_it_for(cli, capsys, template):
    common = ["fit", "--config", CONFIGS / "sft.yaml", "--data", "PromptCompletionData"]
    for given in (["--data.prompt_template", template], [f"--data.prompt_template={template}"]):
        with pytest.raises(SystemExit):
            cli(*common, "--data.tokenizer", "x", *given, "--print_config")
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["data"]["init_args"]["prompt_template"] == template


def test_a_template_of_the_command_line_reaches_the_rows_and_the_saved_config(cli, teacher):
    Path("rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2"}))
    data = ["--data", "PromptCompletionData", "--data.tokenizer", teacher]
    data += ["--data.train", "rows.jsonl", "--data.validation", "rows.jsonl"]
    samples = [{"class_path": "CompletionSamples", "init_args": {"max_new_tokens": 2}}]
    cli(
        *fit("sft", *data, "--data.prompt_template", "2+{prompt}"),
        *("--trainer.callbacks", json.dumps(samples), "--data.batch_size", 1),
    )
    saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    assert saved["data"]["init_args"]["prompt_template"] == "2+{prompt}"
    (run,) = Path("runs").glob("version_*")
    seen = EventAccumulator(str(run), size_guidance={"tensors": 0})
    seen.Reload()
    text = seen.Tensors("val/samples/text_summary")[-1].tensor_proto.string_val[0]
    assert b"2+1+1=" in text


def test_baby_llama_on_ones_own_text(cli, tmp_path):
    Path("corpus.txt").write_text("to be or not to be that is the question " * 200)
    cli("tokenizer", "--files", '["corpus.txt"]', "--vocab_size", 280, "--output", "runs/tokenizer")
    size = len(AutoTokenizer.from_pretrained("runs/tokenizer"))
    for seed, name in enumerate(("teacher_llama", "teacher_gpt2")):
        tiny_llama(seed, vocab_size=size, pad_token_id=0).save_pretrained(f"runs/{name}")
    cli(
        *fit("baby_llama", "--data.tokenizer", "runs/tokenizer", "--data.block_length", 16),
        *("--data.validation", "corpus.txt", "--data.batch_size", 4),
        *("--trainer.precision", "32-true"),
    )
    assert {"val/forward_kl", "val/perplexity"} <= set(scalars("runs").Tags()["scalars"])


@pytest.mark.parametrize("num_beams", [5, 1])
def test_sequence_kd_in_two_commands(cli, teacher, num_beams):
    """What is trained on is what transformers writes by itself, with no end that it did not write."""
    prompts = [{"prompt": f"{a}{b}1+654="} for a in range(9) for b in range(3)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    config = ["--config", CONFIGS / "sequence_kd.yaml", *DEBUG, *QUIET]
    config += ["--data.tokenizer", teacher, "--model.teacher.name_or_path", teacher]
    config += ["--model.student.config", SMALL, "--model.generation.max_new_tokens", 4]
    config += ["--model.generation.num_beams", num_beams]
    cli("predict", *config, "--data.predict", "prompts.jsonl", "--predictions.path", "w.jsonl")
    written = [json.loads(line) for line in Path("w.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in prompts]
    tokenizer, model = arithmetic_tokenizer(), AutoModelForCausalLM.from_pretrained(teacher)
    data = PromptCompletionData(tokenizer=tokenizer, train="w.jsonl").rows("train")
    ended = []
    for number, row in enumerate(prompts):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False}
        by_itself = model.generate(ids, **options, eos_token_id=1, pad_token_id=0)[0].tolist()
        end = by_itself.index(1) + 1 if 1 in by_itself else len(by_itself)
        assert data.example(number, 0).input_ids == by_itself[:end]
        ended.append(1 in by_itself)
    assert [row["ended"] for row in written] == ended
    assert set(ended) == {True, False}
    if num_beams == 5:
        cli("fit", *config, "--data.train", "w.jsonl")
        assert Path("runs/version_0/student/model.safetensors").exists()


ON_POLICY = {
    "gkd": ["--model.student.config", SMALL],
    "on_policy_distillation": [],
    "minillm": [],
    "rl_distillation": [],
}


@pytest.mark.parametrize("config", ON_POLICY)
def test_on_policy_methods_run_from_their_configs(cli, teacher, config):
    tiny_llama(2, vocab_size=14).save_pretrained("runs/student")
    arithmetic_tokenizer().save_pretrained("runs/student")
    fit_ = ["fit", "--config", CONFIGS / f"{config}.yaml", *DEBUG, *QUIET, *ON_POLICY[config]]
    fit_ += ["--model.teacher.name_or_path", teacher, "--data.validation_size", 20]
    fit_ += ["--trainer.max_steps", 16, "--trainer.val_check_interval", 16]
    fit_ += ["--data.batch_size", 8, "--on_policy.path", "rollouts.jsonl"]
    cli(*fit_, "--on_policy.health.overlap_k", 8)
    names = set(scalars("runs").Tags()["scalars"])
    assert {"train/loss", "rollout/on_policy", "rollout/length_mean", "rollout/eos_rate"} <= names
    assert {"train/top_k_overlap", "train/entropy_gap", "rollout/empty_rate"} <= names
    assert {"val/loss", "val/reverse_kl"} <= names
    assert len(Path("rollouts.jsonl").read_text().splitlines()) >= 32
    if not ON_POLICY[config]:  # with a student that was trained before
        cli("validate", "--config", "runs/version_0/config.yaml")


@pytest.mark.parametrize("config", ["opsd", "sdft", "sdpo"])
def test_self_distillation_runs_from_its_configs(cli, config):
    tiny_llama(2, vocab_size=14).save_pretrained("runs/student")
    arithmetic_tokenizer().save_pretrained("runs/student")
    cli(
        *("fit", "--config", CONFIGS / f"{config}.yaml", *DEBUG, *QUIET),
        *("--data.validation_size", 20, "--data.batch_size", 8),
        *("--trainer.max_steps", 4, "--trainer.val_check_interval", 4),
        *("--trainer.log_every_n_steps", 1),
    )
    seen = scalars("runs")
    name = {"sdft": "val/forward_kl", "sdpo": "val/reverse_kl"}.get(config, "val/loss")
    assert {"train/loss", "rollout/on_policy", "val/loss", name} <= set(seen.Tags()["scalars"])
    # At the start teacher and student are one model, and what it is told makes the difference.
    assert seen.Scalars("train/divergence")[0].value > 1e-3


def test_a_teacher_with_another_tokenizer(cli, capsys):
    """From its config; with the student's own completions and as other methods, by flags alone."""
    tokenizer = train_tokenizer(["123+456=", "12", "45", "0="] * 3, 270)
    tiny_llama(1, vocab_size=len(tokenizer)).save_pretrained("runs/other_teacher")
    tokenizer.save_pretrained("runs/other_teacher")
    capsys.readouterr()
    # All rows are looked at before the first step, and the default is a million.
    small = ["--data.train_size", 100, "--data.validation_size", 20, "--data.batch_size", 8]
    small += ["--trainer.log_every_n_steps", 1]
    cli(*fit("chunk_likelihood_kd", *small))
    names = set(scalars("runs").Tags()["scalars"])
    assert {"train/bits_per_byte", "val/bits_per_byte", "val/label_log_ratio"} <= names
    assert {"train/divergence", "val/divergence"} <= names
    sampled = ["--on_policy.lmbda", 1, "--on_policy.generation.max_new_tokens", 8]
    cli(*fit("chunk_likelihood_kd", *small, *sampled, "--trainer.logger.save_dir", "own"))
    names = set(scalars("own").Tags()["scalars"])
    assert {"train/bits_per_byte", "rollout/on_policy", "train/divergence"} <= names
    cli(*fit("chunk_likelihood_kd", *small, "--model", "ULD", "--trainer.logger.save_dir", "uld"))
    assert "val/sorted_distance" in scalars("uld").Tags()["scalars"]
    other = ["--model.teacher", "RetokenizingTeacher"]
    other += ["--model.teacher.teacher.name_or_path", "runs/other_teacher"]
    said = fit("gkd", *small, *other, "--trainer.logger.save_dir", "gkd")
    cli(*said, "--model", "ChunkLikelihoodKD", "--model.divergence", "GeneralizedJSD")


def test_lmbda_and_schedules_by_flags(cli, teacher):
    arguments = fit("gkd", "--model.teacher.name_or_path", teacher)
    cli(*arguments, "--on_policy.lmbda", 0)
    cli(
        *(*arguments, "--on_policy.lmbda", "Linear", "--on_policy.lmbda.start", 1),
        *("--on_policy.lmbda.end", 1, "--on_policy.lmbda.steps", 5),
    )


def test_prompts_and_text_through_minillm(cli, teacher):
    tiny_llama(2, vocab_size=14).save_pretrained("runs/student")
    Path("text.txt").write_text("123+456=975" * 50)
    data = {
        "class_path": "PromptsAndText",
        "init_args": {
            "prompts": {"class_path": "ArithmeticData", "init_args": {"batch_size": 4}},
            "text": {
                "class_path": "PackedTextData",
                "init_args": {
                    "tokenizer": str(teacher),
                    "train": "text.txt",
                    "block_length": 8,
                    "batch_size": 4,
                },
            },
        },
    }
    Path("data.yaml").write_text(yaml.safe_dump({"data": data}))
    config = yaml.safe_load((CONFIGS / "minillm.yaml").read_text())
    del config["data"]
    Path("minillm.yaml").write_text(yaml.safe_dump(config))
    cli(
        *("fit", "--config", "minillm.yaml", "--config", "data.yaml", *DEBUG, *QUIET),
        *("--model.teacher.name_or_path", teacher, "--model.objective", "OfficialCode"),
    )
    losses = [event.value for event in scalars("runs").Scalars("train/language_modeling")]
    assert all(1 < value < 20 for value in losses)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["demo", "--out", "x"], "--out: did you mean --output?"),
        (["tokenizer", "--file", '["x"]'], "--file: did you mean --files?"),
    ],
)
def test_the_other_commands_take_no_abbreviations_either(fails, command, said):
    assert said in fails(*command)


def test_a_saved_student_takes_the_place_of_a_configs_random_one(cli, teacher):
    shutil.copytree(teacher, "student")
    of_models = ("--model.teacher.name_or_path", teacher, "--model.student.name_or_path=student")
    cli(*fit("supervised_kd", *of_models, "--model.student.config", "null"))
    config = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    student = config["model"]["init_args"]["student"]["init_args"]
    assert student["name_or_path"] == "student"
    assert student["config"] is None


def test_epochs_are_passes_over_the_data(cli):
    cli(
        *fit("sft", "--trainer.max_steps", -1, "--trainer.max_epochs", 3, "--data.train_size", 10),
        *("--data.batch_size", 4, "--trainer.check_val_every_n_epoch", 1),
        *("--trainer.val_check_interval", 1.0),
    )
    seen = scalars("runs")
    assert [event.step for event in seen.Scalars("val/loss")] == [2, 4, 7]
    assert [event.value for event in seen.Scalars("epoch")][-1] == 2
    assert len(seen.Scalars("train/loss")) == 8


@pytest.mark.processes
def test_the_console_script_and_the_module_are_the_same_command():
    script = run(Path(sys.executable).with_name("lightning-kd"), "--help")
    module = run(sys.executable, "-m", "lightning_kd", "--help")
    assert script.returncode == module.returncode == 0
    assert script.stdout == module.stdout
    assert "Distill language models" in script.stdout
    for command in ("fit", "validate", "test", "predict", "demo", "tokenizer"):
        assert command in script.stdout


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(teacher, cli, strategy):
    """From the overlays, with an odd number of rows; the exported students are the same too."""
    common = [
        *fit("gkd", "--model.teacher.name_or_path", teacher, "--on_policy.lmbda", 1),
        *("--data.validation_size", 21, "--trainer.log_every_n_steps", 1),
    ]
    overlay = ["--config", CONFIGS / "overlays" / f"{strategy}.yaml", "--trainer.devices", 2]
    two = run(
        *(sys.executable, "-m", "lightning_kd", *common, *overlay, "--data.batch_size", 4),
        *("--trainer.logger.save_dir", "two", "--export.dirpath", "two/student"),
    )
    assert two.returncode == 0, two.stderr
    one_process = ["--trainer.logger.save_dir", "one", "--export.dirpath", "one/student"]
    cli(*common, "--data.batch_size", 8, *one_process)
    assert_equal_runs("one", "two")


def test_gsm8k_end_to_end(cli, shared_data):
    """Both models from configurations; both KLs fall; everything works from what fit wrote."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()
    Path("gsm8k").mkdir()
    Path("gsm8k/fit.jsonl").write_text("\n".join(lines[:400]))
    Path("gsm8k/validation.jsonl").write_text("\n".join(lines[400:420]))
    cli(
        *("tokenizer", "--files", "gsm8k/fit.jsonl", "--columns", '["question","answer"]'),
        *("--vocab_size", 400, "--output", "runs/gsm8k_tokenizer"),
    )
    config = ["--config", CONFIGS / "supervised_kd.yaml", "--config"]
    config += [CONFIGS / "overlays" / "gsm8k.yaml", *QUIET, "--model.student.config", SMALL]
    larger = SMALL.replace("hidden_size: 16", "hidden_size: 32, initializer_range: 0.3")
    random_teacher = {"name_or_path": None, "config": yaml.safe_load(larger)}
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 20, "save_last": True, "dirpath": "checkpoints"},
    }
    cli(
        *(
            "fit",
            *config,
            "--model.teacher",
            json.dumps(random_teacher),
        ),
        *("--model.optimizer.lr", 0.01, "--model.alpha", 0, "--trainer.max_steps", 60),
        *("--trainer.val_check_interval", 30, "--data.test", "gsm8k/validation.jsonl"),
        *(
            "--data.predict",
            "gsm8k/validation.jsonl",
            "--trainer.callbacks",
            json.dumps([checkpoint]),
        ),
        *("--model.generation.max_new_tokens", 8, "--trainer.log_every_n_steps", 5),
    )
    seen = scalars("runs")
    for direction in ("forward_kl", "reverse_kl"):
        first, last = seen.Scalars(f"val/{direction}")
        assert last.value < first.value
        assert seen.Scalars(f"train/{direction}")[0].value > 1.1 * last.value
    for command in ("validate", "test", "predict"):
        cli(
            *(command, "--config", "runs/version_0/config.yaml"),
            *("--ckpt_path", "checkpoints/last.ckpt"),
        )
    assert len(Path("predictions.jsonl").read_text().splitlines()) == 20
    AutoModelForCausalLM.from_pretrained("runs/version_0/student")


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("gkd", ["--on_policy.lmbda", 1]),
        ("minillm", ["--on_policy.steps_per_window", 1, "--on_policy.passes", 2]),
        (
            "rl_distillation",
            ["--model.rewards", "[lightning_kd.rewards.final_answer]", "--on_policy.group_size", 2],
        ),
    ],
)
def test_gsm8k_on_policy(cli, shared_data, config, more):
    """Prompts and answers of real length, by nothing but the overlay that names the data."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()
    Path("gsm8k").mkdir()
    Path("gsm8k/fit.jsonl").write_text("\n".join(lines[:200]))
    Path("gsm8k/validation.jsonl").write_text("\n".join(lines[200:204]))
    cli(
        *("tokenizer", "--files", "gsm8k/fit.jsonl", "--columns", '["question","answer"]'),
        *("--vocab_size", 400, "--output", "runs/gsm8k_tokenizer"),
    )
    for seed, name in enumerate(("student", "teacher")):
        long = {"vocab_size": 400, "max_position_embeddings": 1024, "pad_token_id": None}
        tiny_llama(seed, **long).save_pretrained(f"runs/{name}")
        AutoTokenizer.from_pretrained("runs/gsm8k_tokenizer").save_pretrained(f"runs/{name}")
    own = ["--model.student.name_or_path", "runs/student"]
    if config == "gkd":
        own = ["--model.student.config", SMALL]
    cli(
        *("fit", "--config", CONFIGS / f"{config}.yaml"),
        *("--config", CONFIGS / "overlays" / "gsm8k.yaml", *DEBUG, *QUIET, *own, *more),
        *("--model.teacher.name_or_path", "runs/teacher", "--data.batch_size", 4),
        *("--on_policy.generation.max_new_tokens", 256, "--trainer.max_steps", 2),
        *("--trainer.log_every_n_steps", 1, "--on_policy.path", "rollouts.jsonl"),
    )
    seen = scalars("runs")
    assert seen.Scalars("rollout/length_max")[0].value > 64
    assert all(abs(event.value) < 100 for event in seen.Scalars("train/loss"))
    assert all(event.value > 0 for event in seen.Scalars("train/grad_norm"))


@pytest.mark.parametrize(
    "logits", [["DenseLogits"], ["FusedLogits", "--model.logits_backend.chunk_megabytes", "1"]]
)
def test_how_logits_come_about_by_flags(cli, teacher, logits):
    cli(
        *fit(
            "supervised_kd",
            "--model.teacher.name_or_path",
            teacher,
            "--model.logits_backend",
            *logits,
        )
    )
    saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["logits_backend"]["class_path"].endswith(logits[0])


@pytest.mark.parametrize(
    ("rollouts", "more"),
    [
        ("TransformersEngine", ["--model.engine.cache", "dynamic"]),
        ("TransformersContinuousBatching", ["--on_policy.engine.slots", "3"]),
        ("CachedSampler", ["--on_policy.engine.cache", "static"]),
    ],
)
def test_engines_by_flags(cli, teacher, rollouts, more):
    config = ["gkd", "--model.teacher.name_or_path", teacher]
    engines = [("on_policy", rollouts), ("model", "CachedSampler")]
    flags = [x for name, engine in engines for x in (f"--{name}.engine", engine)]
    cli(*fit(*config, *flags, *more))
    saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    options = {name: saved[name]["init_args"] for name, _ in engines}
    for name, engine in engines:
        assert options[name]["engine"]["class_path"].endswith(engine)


@pytest.mark.processes
def test_adapters_of_a_student_in_shards_are_merged_into_the_export(teacher):
    tiny_llama(2, vocab_size=14).save_pretrained("before")
    student = {"config": None, "name_or_path": "./before", "lora": {"r": 4}}
    Path("adapted.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"student": student}}}))
    config = ["--config", CONFIGS / "gkd.yaml", *DEBUG, *QUIET, "--config"]
    config += [CONFIGS / "overlays" / "fsdp2.yaml", "--config", "adapted.yaml"]
    done = run(
        *(sys.executable, "-m", "lightning_kd", "fit", *config, "--trainer.devices", 2),
        *("--model.teacher.name_or_path", teacher, "--data.validation_size", 8),
        *("--export.dirpath", "student"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained, before = (AutoModelForCausalLM.from_pretrained(n) for n in ("student", "before"))
    moved = [
        not torch.equal(a, b)
        for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert any(moved)
    assert not all(moved)  # embeddings and norms have no adapter
