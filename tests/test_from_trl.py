"""What docs/from_trl.md says of TRL and of this library is so."""

import dataclasses
import inspect
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from scipy.special import log_softmax

from lightning_kd import GKD, OnPolicyDistillation
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.cli.habits import ELSEWHERE, TYPED_ALONE
from lightning_kd.divergences import GeneralizedJSD
from tests.support.command_line import EXPECTED_WARNINGS, QUIET
from tests.support.options import is_option
from tests.support.toys import letter_tokenizer, tiny_llama

pytestmark = EXPECTED_WARNINGS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "from_trl.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.S)


def table(title):
    """Cells of the table of a section, without its head."""
    section = PROSE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def trl():
    """Classes of the peer."""
    with warnings.catch_warnings():
        # What TRL and its dependencies warn of while they are imported is not ours to fix.
        warnings.simplefilter("ignore")
        from trl import DistillationConfig, GRPOConfig, SFTConfig
        from trl.experimental.gkd import GKDConfig, GKDTrainer
        from trl.experimental.utils import DataCollatorForChatML
    classes = (DistillationConfig, GRPOConfig, SFTConfig, GKDConfig, GKDTrainer)
    return SimpleNamespace(**{c.__name__: c for c in (*classes, DataCollatorForChatML)})


def default(cls, name):
    (field,) = [field for field in dataclasses.fields(cls) if field.name == name]
    return field.default


def test_every_option_of_ours_exists():
    named = re.findall(r"`(--[a-z_][\w.]*)", PROSE)
    assert len(set(named)) > 50
    assert {name for name in named if not is_option(name)} == set()


def test_the_page_and_the_command_line_send_to_the_same_options(fails):
    rows = {row[0].strip("`"): row[2].strip("`") for row in reversed(table("Arguments"))}
    named = {name: option for name, option in rows.items() if option != "-" and name != "model"}
    assert len(named) > 50
    flags = [word for name in named for word in (f"--{name}", "1")]
    said = fails("fit", "--config", "gkd", *flags).splitlines()
    for name, option in named.items():
        (line,) = [line.strip() for line in said if line.strip().startswith(f"--{name}: ")]
        assert line == f"--{name}: did you mean {option}?"
    assert TYPED_ALONE.keys() <= named.keys()
    assert not TYPED_ALONE.keys() & ELSEWHERE.keys()


@pytest.mark.slow
def test_every_argument_of_theirs_exists(trl):
    rows = table("Arguments")
    assert len(rows) > 50
    for name, of, _, _ in rows:
        cls = getattr(trl, of.strip("`"))
        assert name.strip("`") in inspect.signature(cls.__init__).parameters, (name, of)


@pytest.mark.slow
def test_their_defaults_are_those_of_the_page(trl):
    assert default(trl.GKDConfig, "temperature") == 0.9
    assert default(trl.GKDConfig, "beta") == 0.5
    assert default(trl.DistillationConfig, "beta") == 1.0
    assert default(trl.GKDConfig, "learning_rate") == 2e-5
    assert default(trl.GKDConfig, "weight_decay") == 0.0
    assert default(trl.GKDConfig, "max_grad_norm") == 1.0
    assert default(trl.GKDConfig, "gradient_checkpointing") is True
    assert str(default(trl.GKDConfig, "lr_scheduler_type")) in {"linear", "SchedulerType.LINEAR"}
    assert default(trl.SFTConfig, "truncation_mode") == "keep_start"
    assert 'use_cache": False if args.gradient_checkpointing' in inspect.getsource(trl.GKDTrainer)


@pytest.mark.slow
def test_the_schedule_of_the_page_is_theirs():
    (options,) = re.findall(r"LinearLR, init_args: ({.*?})}", " ".join(PAGE.split()))
    options = yaml.safe_load(options.replace("N}", "7}"))
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5) for _ in "ab")
    schedules = (
        torch.optim.lr_scheduler.LinearLR(ours, **options),
        transformers.get_scheduler("linear", theirs, num_warmup_steps=0, num_training_steps=7),
    )
    for _ in range(7):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_beta_is_the_weight_of_the_teacher_in_both(trl, beta):
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 3, 5)) * 2
    log_q, log_p = log_softmax(student, -1), log_softmax(teacher, -1)
    q, p = np.exp(log_q), np.exp(log_p)
    log_m = np.log(beta * p + (1 - beta) * q)
    expected = {
        0: (p * (log_p - log_q)).sum(-1),
        1: (q * (log_q - log_p)).sum(-1),
    }.get(
        beta,
        beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1),
    )
    ours = GeneralizedJSD(beta)(torch.from_numpy(log_q), torch.from_numpy(log_p))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9)
    theirs = trl.GKDTrainer.generalized_jsd_loss(
        torch.from_numpy(student), torch.from_numpy(teacher), beta=beta, reduction="none"
    )
    np.testing.assert_allclose(theirs.sum(-1).numpy(), expected, rtol=1e-6)
    if beta != 0.5:
        mirrored = GeneralizedJSD(1 - beta)(torch.from_numpy(log_q), torch.from_numpy(log_p))
        assert (abs(mirrored.numpy() - expected) > 1e-3).all()


@pytest.mark.slow
def test_their_temperature_is_of_sampling_alone_and_the_loss_is_not_multiplied(trl):
    loss, step = (
        inspect.getsource(f) for f in (trl.GKDTrainer.compute_loss, trl.GKDTrainer.training_step)
    )
    assert "temperature" not in loss
    assert "num_processes" not in loss + step
    assert "num_processes" in inspect.getsource(transformers.Trainer.compute_loss)
    assert "random.random() <= self.lmbda" in step


@pytest.mark.slow
def test_their_loss_is_divided_by_the_count_that_it_is_given(trl):
    logits = torch.randn(2, 1, 4, 5)
    labels = torch.tensor([[1, 2, 3, -100]])
    once, longer = (
        trl.GKDTrainer.generalized_jsd_loss(*logits, labels=labels, num_items_in_batch=count)
        for count in (3, 12)  # the same scored tokens, and a reference four times as long
    )
    assert longer.item() == pytest.approx(once.item() / 4)


@pytest.mark.slow
def test_their_collator_keeps_the_last_tokens(trl):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    collate = trl.DataCollatorForChatML(tokenizer=tokenizer, max_length=4)
    turns = ({"role": "user", "content": "abcd"}, {"role": "assistant", "content": "efg"})
    batch = collate([{"messages": list(turns)}])
    assert tokenizer.batch_decode(batch["input_ids"])[0].replace(" ", "") == "defg"


def test_what_is_said_of_our_methods():
    assert "divergence" in inspect.signature(GKD).parameters
    assert "single_step" not in OnPolicyDistillation.terms


def test_the_yaml_is_a_config(cli, capsys):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    Path("gkd.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        cli("fit", "--config", "gkd.yaml", *QUIET, "--print_config")
    assert exit_.value.code in {0, None}
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["on_policy"]["init_args"]["generation"]["temperature"] == 0.9
    assert printed["model"]["init_args"]["divergence"]["init_args"]["beta"] == 0.1


def check_same_run(trainer, module, data):
    """The Python says what the YAML says, by what the objects have become."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    given = yaml.safe_load(text)
    model, run = given["model"]["init_args"], given["trainer"]
    assert type(module).__name__ == given["model"]["class_path"]
    assert module.vocabulary == model["vocabulary"]
    assert model["student"]["gradient_checkpointing"] is module.student.is_gradient_checkpointing
    (teacher,) = module.teacher.local_models.values()
    assert str(teacher.dtype) == f"torch.{model['teacher']['dtype']}"
    assert type(module.divergence).__name__ == model["divergence"]["class_path"]
    assert vars(module.divergence).items() >= model["divergence"]["init_args"].items()
    optimizer, options = trainer.optimizers[0], model["optimizer"]["init_args"]
    assert type(optimizer) is torch.optim.AdamW
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert {name: group[name] for name in options} == options
    assert not trainer.lr_scheduler_configs
    for name in ("max_epochs", "accumulate_grad_batches", "gradient_clip_val", "limit_val_batches"):
        assert getattr(trainer, name) == run[name], name
    assert trainer.precision == run["precision"]
    (rollouts,) = [c for c in trainer.callbacks if isinstance(c, OnPolicyGeneration)]
    assert rollouts.lmbda(0) == given["on_policy"]["lmbda"]
    sampling = vars(rollouts.generation)
    assert sampling.items() >= given["on_policy"]["generation"].items()
    assert type(data).__name__ == given["data"]["class_path"]
    for name in ("max_length", "truncation", "batch_size"):
        assert data.constructor_arguments()[name] == given["data"]["init_args"][name], name


@pytest.mark.slow
def test_the_python_trains_and_exports():
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    for seed, name in enumerate(("student", "teacher")):
        tiny_llama(seed, max_position_embeddings=512).save_pretrained(name)
        tokenizer.save_pretrained(name)
    turns = ({"role": "user", "content": "abcd"}, {"role": "assistant", "content": "efg"})
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    names: dict = {}
    exec(compile(program, "from_trl.md", "exec"), names)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer, module, data = names["build"](
        "student",
        "teacher",
        [{"messages": list(turns)}] * 16,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    check_same_run(trainer, module, data)
    assert transformers.AutoModelForCausalLM.from_pretrained("out").num_parameters() > 0
