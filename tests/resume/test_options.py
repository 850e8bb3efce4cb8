"""What a resumed run is told anew: it takes effect, or it is refused by name."""

import math
import re
import shutil
from contextlib import chdir
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredPlateau
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    SequentialLR,
)

from lightning_kd import (
    GKD,
    ArithmeticData,
    CorrectedTopK,
    Divergence,
    FusedLogits,
    LocalTeacher,
    LoRA,
    OnPolicyDistillation,
    PPOClip,
    PromptCompletionData,
    Resumable,
    StudentSpec,
    SupervisedKD,
    TeacherEnsemble,
    WarmupCosine,
)
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.data import arithmetic_tokenizer
from lightning_kd.divergences import ForwardKL, GeneralizedJSD
from lightning_kd.generation import SamplingOptions
from lightning_kd.named_checkpoints import find_checkpoint
from lightning_kd.resuming import describe, digest
from lightning_kd.schedules import Linear
from tests.support.command_line import EXPECTED_WARNINGS
from tests.support.toys import tiny_llama

pytestmark = [
    pytest.mark.slow,
    *EXPECTED_WARNINGS,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
STEPS, SAVED_AT = 6, 4


class Recorder(Callback):
    """The hyperparameters and the loss of every step."""

    def __init__(self):
        self.groups, self.losses, self.validations = {}, {}, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self.groups[trainer.global_step] = groups

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step - 1] = outputs["loss"].item()

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validations.append(trainer.global_step)

    def rates(self):
        return {step: groups[0]["lr"] for step, groups in self.groups.items()}


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, **({"lr": 0.01} | options))


def cosine(**options):
    return lambda optimizer: WarmupCosine(optimizer, **({"warmup_steps": 2} | options))


def kd(**changes):
    student = changes.pop("student", {})
    teacher = {"name_or_path": "teacher"} | changes.pop("teacher", {})
    options = {"optimizer": adamw(), "lr_scheduler": cosine()} | changes
    if isinstance(teacher, dict):
        options.setdefault("teacher_object", LocalTeacher(**teacher))
    spec = StudentSpec(**({"config": LLAMA | student.pop("config", {})} | student))
    teacher_object = options.pop("teacher_object")
    return options.pop("method", SupervisedKD)(student=spec, teacher=teacher_object, **options)


def run(*, resume=None, trainer=None, data=None, callbacks=(), seed=0, folder="saved", **model):
    """Fit, and say what happened."""
    L.seed_everything(seed)
    recorder = Recorder()
    options = {
        "max_steps": STEPS,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | (trainer or {})
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    fitted = L.Trainer(**options, callbacks=[recorder, saving, *callbacks])
    if not isinstance(data, L.LightningDataModule):
        data = ArithmeticData(**({"batch_size": 8, "train_size": 50} | (data or {})))
    fitted.fit(kd(**model), datamodule=data, ckpt_path=resume)
    return recorder, fitted


def saved(folder="saved"):
    return Path(folder) / f"step={SAVED_AT}.ckpt"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two teachers, and the run of all defaults, made once: its folder, and what it recorded."""
    folder = tmp_path_factory.mktemp("made")
    with chdir(folder):
        for seed, name in ((1, "teacher"), (2, "other")):
            tiny_llama(seed, vocab_size=14).save_pretrained(name)
            arithmetic_tokenizer().save_pretrained(name)
        recorder, _ = run()
    return folder, recorder


@pytest.fixture
def teachers(made, tmp_path):
    """Of one's own, which a test may change."""
    for name in ("teacher", "other"):
        shutil.copytree(made[0] / name, tmp_path / name)


@pytest.fixture
def first_run(made, teachers, tmp_path):
    """A run to go on from; that of all defaults is only copied."""

    def start(**settings):
        if settings:
            return run(**settings)[0]
        shutil.copytree(made[0] / "saved", tmp_path / "saved")
        return made[1]

    return start


def retrain_the_teacher():
    tiny_llama(3, vocab_size=14).save_pretrained("teacher")


def on_policy(**options):
    return OnPolicyGeneration(**({"generation": SamplingOptions(max_new_tokens=4)} | options))


class Scaled(Divergence):
    """Somebody's own."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def value(self, student_log_probs, teacher_log_probs):
        return self.scale * (student_log_probs.exp() - teacher_log_probs.exp()).square().sum(-1)


class OwnMethod(SupervisedKD):
    """Somebody's own, with one argument that may change."""

    may_change_on_resume = frozenset({"verbosity"})

    def __init__(self, *, bonus=0.0, verbosity=0, **base):
        super().__init__(**base)
        self.bonus = bonus


class OwnData(ArithmeticData):
    """Somebody's own."""

    def __init__(self, *, flavour="plain", **base):
        super().__init__(**base)


class OwnCallback(Resumable, Callback):
    """Somebody's own, that changes the loss."""

    def __init__(self, strength=1.0):
        pass


GENERATION = {"generation": SamplingOptions(max_new_tokens=4)}
REFUSED = {
    "another method": ({}, {"method": GKD, "alpha": None}, ["written by SupervisedKD"]),
    "divergence": ({}, {"divergence": "reverse_kl"}, ["model.divergence: ForwardKL -> ReverseKL"]),
    "its parameter": (
        {"divergence": GeneralizedJSD(0.5)},
        {"divergence": GeneralizedJSD(0.1)},
        ["model.divergence.beta: 0.5 -> 0.1"],
    ),
    "one's own divergence": (
        {"divergence": Scaled(1.0)},
        {"divergence": Scaled(2.0)},
        ["model.divergence.scale: 1.0 -> 2.0"],
    ),
    "alpha": ({}, {"alpha": 0.9}, ["model.alpha: 0.5 -> 0.9"]),
    "temperature": ({}, {"temperature": 2.0}, ["model.temperature: 1.0 -> 2.0"]),
    "normalization": (
        {},
        {"normalization": "sequence"},
        ["model.normalization: TokenMean -> SequenceMean"],
    ),
    "vocabulary": ({}, {"vocabulary": "shared"}, ["model.vocabulary: equal -> shared"]),
    "teacher": ({}, {"teacher": {"name_or_path": "other"}}, ["model.teacher.model.weights"]),
    "teacher's type": ({}, {"teacher": {"dtype": "bfloat16"}}, ["model.teacher.dtype"]),
    "teacher, trained anew": ({}, {"before": retrain_the_teacher}, ["model.teacher.model"]),
    "ensemble": (
        {},
        {"teacher_object": lambda: TeacherEnsemble([LocalTeacher("teacher")])},
        ["model.teacher: LocalTeacher -> TeacherEnsemble"],
    ),
    "student's dropout": (
        {},
        {"student": {"config": {"attention_dropout": 0.1}}},
        ["model.student.config.attention_dropout: 0.0 -> 0.1"],
    ),
    "student's type": ({}, {"student": {"dtype": "float64"}}, ["model.student.dtype: float32"]),
    "adapters": (
        {"student": {"lora": LoRA(r=2, target_modules=["q_proj"])}},
        {"student": {"lora": LoRA(r=2, alpha=8.0, target_modules=["q_proj"])}},
        ["model.student.lora.alpha: 32.0 -> 8.0"],
    ),
    "one's own method": (
        {"method": OwnMethod},
        {"method": OwnMethod, "bonus": 1.0},
        ["model.bonus: 0.0 -> 1.0"],
    ),
    "optimizer": (
        {},
        {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
        ["model.optimizer: AdamW -> SGD"],
    ),
    "precision": ({}, {"trainer": {"precision": "bf16-mixed"}}, ["trainer.precision: 32-true"]),
    "clipping": (
        {},
        {"trainer": {"gradient_clip_val": 1.0}},
        ["trainer.gradient_clip_val: None -> 1.0"],
    ),
    "way of clipping": (
        {"trainer": {"gradient_clip_val": 1.0}},
        {"trainer": {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}},
        ["trainer.gradient_clip_algorithm: norm -> value"],
    ),
    "global batch": ({}, {"data": {"batch_size": 4}}, ["trainer.global_batch_size", "8 -> 4"]),
    "accumulation": (
        {},
        {"trainer": {"accumulate_grad_batches": 2}},
        ["trainer.global_batch_size", "8 -> 16"],
    ),
    "seed": ({}, {"seed": 1}, ["seed"]),
    "rows": ({}, {"data": {"train_size": 40}}, ["train_size: 50 -> 40"]),
    "shift of the split": ({}, {"data": {"test_size": 900}}, ["data.test_size: 1000 -> 900"]),
    "label noise": ({}, {"data": {"label_noise": 0.5}}, ["data.label_noise: 0.0 -> 0.5"]),
    "one's own data": (
        {"data": lambda: OwnData(batch_size=8)},
        {"data": lambda: OwnData(batch_size=8, flavour="odd")},
        ["data.flavour: plain -> odd"],
    ),
    "one's own callback": (
        {"callbacks": [OwnCallback(1.0)]},
        {"callbacks": [OwnCallback(2.0)]},
        ["OwnCallback.strength: 1.0 -> 2.0"],
    ),
    "estimator": (
        {"method": OnPolicyDistillation, "callbacks": [on_policy()]},
        {
            "method": OnPolicyDistillation,
            "callbacks": [on_policy()],
            "estimator": CorrectedTopK(),
        },
        ["model.estimator: SampledToken -> CorrectedTopK"],
    ),
    "estimator of GKD": (
        {"method": GKD, "divergence": "reverse_kl", "callbacks": [on_policy()]},
        {
            "method": GKD,
            "divergence": "reverse_kl",
            "callbacks": [on_policy()],
            "estimator": CorrectedTopK(),
        },
        ["model.estimator: None -> CorrectedTopK"],
    ),
    "rollouts at all": (
        {"method": GKD},
        {"method": GKD, "callbacks": [on_policy()]},
        ["on_policy: None -> OnPolicyGeneration"],
    ),
    **{
        f"rollouts: {name}": (
            {"method": GKD, "callbacks": [on_policy(**before)]},
            {"method": GKD, "callbacks": [on_policy(**after)]},
            expected,
        )
        for name, before, after, expected in (
            ("lmbda", {"lmbda": 0.5}, {"lmbda": 0.25}, ["on_policy.lmbda.value: 0.5 -> 0.25"]),
            (
                "schedule",
                {"lmbda": Linear(0.0, 1.0, steps=9)},
                {"lmbda": Linear(0.0, 1.0, steps=8)},
                ["on_policy.lmbda.steps: 9 -> 8"],
            ),
            ("mixture", {}, {"mixture_alpha": 0.2}, ["on_policy.mixture_alpha: 0.0 -> 0.2"]),
            ("window", {}, {"steps_per_window": 2}, ["on_policy.steps_per_window: 1 -> 2"]),
            ("passes", {}, {"passes": 2}, ["passes"]),
            ("group", {}, {"group_size": 2}, ["group_size"]),
            ("truncation", {}, {"truncated": "mask"}, ["on_policy.truncated: keep -> mask"]),
            ("off_policy", {"lmbda": 0.5}, {"lmbda": 0.5, "off_policy": "teacher"}, ["off_policy"]),
            (
                "temperature",
                {},
                {"generation": SamplingOptions(max_new_tokens=4, temperature=0.5)},
                ["on_policy.generation.temperature: 1.0 -> 0.5"],
            ),
            (
                "length",
                {},
                {"generation": SamplingOptions(max_new_tokens=5)},
                ["on_policy.generation.max_new_tokens: 4 -> 5"],
            ),
        )
    },
}


def prepared(settings):
    """The arguments of a run; what cannot be used twice is made for each."""
    settings = dict(settings)
    settings.pop("before", lambda: None)()
    for name in ("data", "teacher_object"):
        if callable(settings.get(name)):
            settings[name] = settings[name]()
    return settings


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_loss_data_or_teacher_is_refused_by_name(case, first_run):
    before, after, expected = REFUSED[case]
    first_run(**prepared(before))
    settings = prepared(before | after)
    if settings.get("alpha", 0) is None:
        del settings["alpha"]
    with pytest.raises(ValueError, match=re.escape(expected[0])) as error:
        run(resume=saved(), **settings)
    for text in expected:
        assert text in str(error.value)
    assert "export" in str(error.value)  # the way to do it on purpose


def rate(step, *, lr=0.01, warmup=2, total=STEPS, least=0.0):
    """Linear, then half a cosine, by the formula of the docstring."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / (total - warmup))
    return lr * (least + (1 - least) * (1 + math.cos(math.pi * done)) / 2)


RATES = {
    "learning rate": ({"optimizer": adamw(lr=0.05)}, {"lr": 0.05}),
    "more steps": ({"trainer": {"max_steps": 10}}, {"total": 10}),
    "warm-up": ({"lr_scheduler": cosine(warmup_steps=5)}, {"warmup": 5}),
    "last rate": ({"lr_scheduler": cosine(min_ratio=0.5)}, {"least": 0.5}),
    "length of the schedule": ({"lr_scheduler": cosine(total_steps=9)}, {"total": 9}),
}


@pytest.mark.parametrize("case", RATES)
def test_rates_and_steps_take_effect_from_the_first_resumed_step(case, first_run):
    changes, shape = RATES[case]
    first_run()
    seen, trainer = run(resume=saved(), **changes)
    last = trainer.max_steps
    expected = {step: rate(step, **shape) for step in range(SAVED_AT, last)}
    assert seen.rates() == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("teachers")
def test_a_run_that_has_ended_goes_on_with_the_schedule_of_the_longer_run():
    run(trainer={"max_steps": SAVED_AT})
    seen, _ = run(resume=saved(), trainer={"max_steps": 8})
    assert seen.rates() == pytest.approx({step: rate(step, total=8) for step in range(4, 8)})


@pytest.mark.usefixtures("teachers")
def test_another_schedule_takes_the_place_of_the_saved_one():
    def halving(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    run()
    seen, _ = run(resume=saved(), lr_scheduler=halving)
    assert seen.rates() == pytest.approx({4: 0.0025, 5: 0.0025})
    seen, _ = run(resume=saved(), lr_scheduler=None)
    assert seen.rates() == {4: 0.01, 5: 0.01}
    run(folder="plain", lr_scheduler=None)
    seen, _ = run(resume=saved("plain"), lr_scheduler=halving)
    assert seen.rates() == pytest.approx({4: 0.0025, 5: 0.0025})


class Decay:
    """A curve that is called."""

    def __init__(self, gain):
        self._gain = gain

    def __call__(self, step):
        return self._gain**step

    def of_step(self, step):
        return self._gain**step


def constant(gain):
    return lambda step: gain


def of(kind, make):
    return lambda optimizer, gain: kind(optimizer, make(gain))


def in_turn(optimizer, gain):
    parts = [ConstantLR(optimizer, 0.5, 2), MultiplicativeLR(optimizer, constant(gain))]
    return SequentialLR(optimizer, parts, milestones=[2])


def chained(optimizer, gain):
    parts = [LambdaLR(optimizer, Decay(gain)), ConstantLR(optimizer, 0.5, 99)]
    return ChainedScheduler(parts, optimizer)


def cyclic(optimizer, gain):
    scale = lambda cycle: gain ** (cycle - 1)  # noqa: E731
    return CyclicLR(optimizer, 0.01, 0.02, 1, scale_fn=scale, cycle_momentum=False)


# Each begins with the same rate whatever the gain, and goes on in another way.
CURVES = {
    "lambda": lambda optimizer, gain: LambdaLR(optimizer, lambda step: gain**step),
    "object": of(LambdaLR, Decay),
    "method": of(LambdaLR, lambda gain: Decay(gain).of_step),
    "partial": of(LambdaLR, lambda gain: partial(math.pow, gain)),
    "product": of(MultiplicativeLR, constant),
    "in turn": in_turn,
    "chained": chained,
    "cyclic": cyclic,
}


def rates_of(schedule):
    """The rates under a schedule from the first step on, in torch alone."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler, rates = schedule(optimizer), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.usefixtures("teachers")
@pytest.mark.parametrize("case", CURVES)
def test_a_schedule_of_other_functions_takes_effect_from_the_first_resumed_step(case):
    schedules = [partial(CURVES[case], gain=gain) for gain in (0.5, 0.9)]
    before, after = (rates_of(schedule) for schedule in schedules)
    assert before[0] == after[0]
    assert before[5] != after[5]
    run(lr_scheduler=schedules[0])
    for schedule, rates in zip(schedules, (before, after), strict=True):
        seen, _ = run(resume=saved(), lr_scheduler=schedule, folder="x")
        assert seen.rates() == pytest.approx({step: rates[step] for step in (4, 5)}, rel=1e-12)


def scripted(sign):
    """A schedule of a script."""

    class Curve(LRScheduler):
        def get_lr(self):
            if self.last_epoch == 0:
                return self.base_lrs
            return [group["lr"] + sign() * 0.001 for group in self.optimizer.param_groups]

    return Curve


@pytest.mark.usefixtures("teachers")
def test_a_schedule_of_a_script_is_known_by_its_code():
    run(lr_scheduler=scripted(lambda: 1))
    seen, _ = run(resume=saved(), lr_scheduler=scripted(lambda: -1), folder="x")
    assert seen.rates() == pytest.approx({4: 0.006, 5: 0.005})


@pytest.mark.usefixtures("teachers")
def test_hyperparameters_take_effect_and_what_was_not_said_stays():
    run(optimizer=adamw(weight_decay=0.1, betas=(0.9, 0.95)))
    state = torch.load(saved(), weights_only=True)
    # As a callback of the saved run may have set it: the command says nothing of it.
    state["optimizer_states"][0]["param_groups"][0]["eps"] = 1e-5
    torch.save(state, "edited.ckpt")
    new = adamw(weight_decay=0.3, betas=(0.9, 0.95))
    seen, _ = run(resume="edited.ckpt", optimizer=new)
    matrices, vectors = seen.groups[SAVED_AT]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert (matrices["eps"], matrices["betas"]) == (1e-5, (0.9, 0.95))
    assert seen.rates() == pytest.approx({step: rate(step) for step in (4, 5)})
    seen, _ = run(resume="edited.ckpt", optimizer=adamw(weight_decay=0.1, betas=(0.5, 0.6)))
    assert seen.groups[SAVED_AT][0]["betas"] == (0.5, 0.6)


@pytest.mark.usefixtures("teachers")
def test_a_rate_without_a_schedule_takes_effect():
    run(lr_scheduler=None)
    seen, _ = run(resume=saved(), lr_scheduler=None, optimizer=adamw(lr=0.5))
    assert seen.rates() == {4: 0.5, 5: 0.5}


CHANGED = {
    "nothing": {},
    "validation": {"trainer": {"val_check_interval": 1, "limit_val_batches": 2}},
    "evaluation batches": {"data": {"eval_batch_size": 3}},
    "logging": {"trainer": {"log_every_n_steps": 1}},
    "callbacks": {"callbacks": [Recorder()]},
    "cut of a step": {"data": {"batch_size": 4}, "trainer": {"accumulate_grad_batches": 2}},
    "gradient checkpointing": {"student": {"gradient_checkpointing": True}},
    "logits": {"logits_backend": FusedLogits(chunk_megabytes=1)},
    "where the teacher is": {"teacher": {"placement": "cpu"}},
    "defaults that are said": {"alpha": 0.5, "divergence": ForwardKL(), "temperature": 1.0},
    "one's own argument": {"method": OwnMethod, "verbosity": 3},
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_leaves_the_loss_alone_may_change(case, first_run):
    method = {"method": CHANGED[case]["method"]} if "method" in CHANGED[case] else {}
    uninterrupted = first_run(**method)
    seen, trainer = run(resume=saved(), **CHANGED[case])
    exact = case in {"nothing", "logging", "callbacks", "defaults that are said"}
    accumulated = trainer.accumulate_grad_batches
    for step in (4, 5):
        if accumulated == 1:
            tolerance = 0.0 if exact else 1e-5
            assert seen.losses[step] == pytest.approx(uninterrupted.losses[step], rel=tolerance)
    assert seen.rates() == {step: uninterrupted.rates()[step] for step in (4, 5)}
    if case == "validation":
        assert seen.validations[-2:] == [5, 6]


def test_a_teacher_may_be_moved(first_run):
    first_run()
    Path("teacher").rename("moved")
    run(resume=saved(), teacher={"name_or_path": "moved"})


def test_files_may_be_moved_and_validation_may_be_another(teachers):
    rows = '{"prompt": "1+1=", "completion": "2"}\n' * 40
    for name in ("train.jsonl", "moved.jsonl", "dev.jsonl"):
        Path(name).write_text(rows)

    def data(train, **options):
        options = {"tokenizer": "teacher", "batch_size": 8, "max_length": 8} | options
        return PromptCompletionData(train=train, validation="dev.jsonl", **options)

    run(data=data("train.jsonl"))
    run(resume=saved(), data=data("moved.jsonl"))
    for option, value in (
        ("max_length", 7),
        ("truncation", "left"),
        ("prompt_template", "1{prompt}"),
        ("prompt_column", "completion"),
    ):
        with pytest.raises(ValueError, match=f"data.{option}"):
            run(resume=saved(), data=data("train.jsonl", **{option: value}))


def test_arguments_are_remembered_by_name_with_defaults():
    assert PPOClip(0.1).resume_settings() == {"low": 0.1, "high": 0.2}
    one, two = (ArithmeticData(num_workers=n, batch_size=8) for n in (0, 2))
    assert one.resume_settings().keys() == two.resume_settings().keys()
    assert "num_workers" not in two.resume_settings()
    assert Scaled(scale=3).resume_settings() == {"scale": 3}
    with pytest.raises(TypeError, match="takes no arguments"):
        ForwardKL(3)


@pytest.mark.usefixtures("teachers")
def test_a_later_fit_of_the_same_module_is_not_resumed():
    run()
    module = kd()
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False, "max_steps": STEPS}
    quiet |= {"limit_val_batches": 1, "num_sanity_val_steps": 0}
    data = ArithmeticData(batch_size=8, train_size=50)
    L.seed_everything(0)
    L.Trainer(**quiet).fit(module, data, ckpt_path=saved())
    for train_size in (50, 40):  # other data is no reason to refuse what is not resumed
        recorder = Recorder()
        data = ArithmeticData(batch_size=8, train_size=train_size)
        L.Trainer(**quiet, callbacks=[recorder]).fit(module, data)
        assert recorder.rates() == pytest.approx({step: rate(step) for step in range(STEPS)})


def never_better(patience, min_delta=1000.0, **options):
    """The first validation is the best one."""
    return EarlyStopping("val/loss", patience=patience, min_delta=min_delta, **options)


# Validations are after steps 2, 4 and 6 of an epoch of seven.
STOPPED = {  # settings of the saved run, of the resumed one, where they end
    "lower patience": ({"patience": 99}, {"patience": 1}, 20, 4),
    "higher patience": ({"patience": 2}, {"patience": 4}, 6, 11),
    "higher patience, where it had stopped": ({"patience": 1}, {"patience": 3}, 4, 9),
    "lower patience, where it had stopped": ({"patience": 2}, {"patience": 1}, 6, 6),
    "threshold, where it had stopped": (
        {"patience": 99, "stopping_threshold": 99.0},
        {"patience": 99},
        2,
        12,
    ),
    "patience, where a threshold had stopped": (
        {"patience": 9, "stopping_threshold": 99.0},
        {"patience": 8, "stopping_threshold": 99.0},
        2,
        2,
    ),
    "nothing": ({"patience": 1}, {"patience": 1}, 4, 4),
}


@pytest.mark.usefixtures("teachers")
@pytest.mark.parametrize("case", STOPPED)
def test_early_stopping_obeys_its_new_settings(case):
    before, after, first, expected = STOPPED[case]

    def ended(settings, own, **more):
        at_end = ModelCheckpoint(own, "{step}", monitor="val/loss", save_top_k=-1)
        stopping = never_better(**settings)
        end = 20 if own == "first" else 12
        _, trainer = run(callbacks=[stopping, at_end], trainer={"max_steps": end}, **more)
        assert stopping.patience == settings["patience"]
        return trainer.global_step

    assert ended(before, "first") == first
    where = Path(f"first/step={first}.ckpt") if "had" in case or case == "nothing" else saved()
    assert ended(after, "second", resume=where, folder="x") == expected


def worsening(optimizer):
    """Two steps down, and then up."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 if s < 2 else -50.0)


@pytest.mark.usefixtures("teachers")
@pytest.mark.parametrize("moved", [False, True])
def test_a_run_in_a_new_directory_knows_the_best_checkpoint(moved):
    def best(folder, **options):
        options = {"monitor": "val/loss", "save_top_k": 1} | options
        return ModelCheckpoint(folder, "best-{step}", **options)

    model = {"optimizer": adamw(lr=1e-3), "lr_scheduler": worsening}
    first, again = best("one"), best("two")
    run(callbacks=[first], folder="one", **model)
    assert Path(first.best_model_path).name == "best-step=2.ckpt"
    if moved:
        Path("one").rename("moved")
    source = "moved" if moved else "one"
    run(callbacks=[again], resume=saved(source), folder="y", **model)
    assert Path(again.best_model_path) == Path(source, "best-step=2.ckpt").absolute()
    assert float(again.best_model_score) == float(first.best_model_score)
    assert not list(Path("two").glob("*"))  # nothing was better
    Path(again.best_model_path).unlink()
    other = best("three")
    with pytest.warns(UserWarning, match="no longer among the best"):
        run(callbacks=[other], resume=saved(source), folder="z", **model)
    assert Path(other.best_model_path).parent.name == "three"


@pytest.mark.usefixtures("teachers")
def test_a_lower_save_top_k_takes_effect():
    def run_with(top, **more):
        keeping = ModelCheckpoint(
            "kept", "kept-{step}", monitor="train/loss", save_top_k=top, every_n_train_steps=1
        )
        run(callbacks=[keeping], trainer={"max_steps": 4 if top == 3 else 8}, **more)
        return keeping

    many = run_with(3)
    assert len(many.best_k_models) == 3
    few = run_with(1, resume=saved(), folder="y")
    assert len(few.best_k_models) == 1
    (best,) = few.best_k_models
    assert few.best_model_path == best
    left = {path.name for path in Path("kept").iterdir()}
    assert left <= {Path(p).name for p in [*many.best_k_models, best]}


def plateau(**options):
    options = {"monitor": "val/loss", "patience": 0, "factor": 0.5, "threshold": 1e3} | options
    options |= {"threshold_mode": "abs"}
    return lambda optimizer: MonitoredPlateau(optimizer, **options)


@pytest.mark.usefixtures("teachers")
def test_a_schedule_that_depends_on_validation_is_stepped_with_it_and_resumed():
    # After steps 2 (the best), 4, 6, 9 and 11: halved by each but the first.
    expected = dict(enumerate([0.01] * 4 + [0.005] * 2 + [0.0025] * 3 + [0.00125] * 2 + [0.000625]))
    whole, _ = run(lr_scheduler=plateau(), trainer={"max_steps": 12})
    assert whole.rates() == pytest.approx(expected)
    again, _ = run(
        lr_scheduler=plateau(), trainer={"max_steps": 12}, resume=saved(), folder="again"
    )
    assert again.rates() == {step: whole.rates()[step] for step in range(SAVED_AT, 12)}
    assert again.losses == {step: whole.losses[step] for step in range(SAVED_AT, 12)}
    with pytest.raises(ValueError, match="ReduceLROnPlateau depends on"):
        run(lr_scheduler=plateau(factor=0.1), resume=saved(), folder="x")
    seen, _ = run(resume="saved/step=8.ckpt", trainer={"max_steps": 10}, folder="y")
    assert seen.rates() == pytest.approx({s: rate(s, total=10) for s in (8, 9)})


@pytest.mark.usefixtures("teachers")
def test_a_schedule_may_depend_on_training():
    seen, _ = run(lr_scheduler=plateau(monitor="train/loss"))
    assert seen.rates() == pytest.approx({s: 0.01 * 0.5 ** max(0, s - 1) for s in range(STEPS)})


@pytest.mark.usefixtures("teachers")
def test_a_schedule_that_has_nothing_to_depend_on_is_refused():
    with pytest.raises(ValueError, match="without a monitor"):
        run(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="depends on val/loss, and this run does not validate"):
        run(lr_scheduler=plateau(), trainer={"limit_val_batches": 0})


@pytest.mark.parametrize(
    ("limits", "ends"),
    [
        ({"max_epochs": 2, "max_steps": -1, "check_val_every_n_epoch": 3}, "max_epochs 2"),
        ({"max_steps": 1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}, "max_steps 1"),
    ],
)
@pytest.mark.usefixtures("teachers")
def test_what_depends_on_a_validation_that_never_comes_is_refused(limits, ends):
    limits = {"val_check_interval": 1.0} | limits
    for callback in (EarlyStopping("val/loss"), ModelCheckpoint(monitor="val/loss")):
        name = type(callback).__name__
        with pytest.raises(
            ValueError, match=f"{name} depends on val/loss, .*trainer.{ends}, before"
        ):
            run(trainer=limits, callbacks=[callback], folder=name)
    with pytest.raises(
        ValueError, match=rf"model\.lr_scheduler depends on .*trainer.{ends}, before"
    ):
        run(lr_scheduler=plateau(), trainer=limits)


class ByEpoch(SupervisedKD):
    """A schedule of one's own, stepped each epoch."""

    interval = "epoch"

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval},
        }


@pytest.mark.usefixtures("teachers")
def test_a_schedule_that_is_stepped_otherwise_starts_where_the_run_is(monkeypatch):
    run(method=ByEpoch)
    monkeypatch.setattr(ByEpoch, "interval", "step")
    seen, _ = run(method=ByEpoch, resume=saved(), folder="x")
    assert seen.rates() == pytest.approx({4: 0.01 / 5, 5: 0.01 / 6})


@pytest.mark.usefixtures("teachers")
def test_weights_alone_are_no_run_to_go_on_from():
    weights = ModelCheckpoint(
        "w", "{step}", every_n_train_steps=4, save_weights_only=True, monitor="train/loss"
    )
    run(callbacks=[weights])
    with pytest.raises(ValueError, match="holds weights alone"):
        run(resume=saved("w"), folder="x")
    with pytest.raises(ValueError, match="holds weights alone"):
        find_checkpoint("best", [Path("w")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_digest_sees_every_value(dtype):
    weights = torch.zeros(3, 40, dtype=dtype)
    seen = {digest([("embedding", weights)])}
    for place in range(weights.numel()):
        changed = weights.clone()
        changed.view(-1)[place] = 1
        seen.add(digest([("embedding", changed)]))
    assert len(seen) == 1 + weights.numel()
    turned = weights.t().contiguous().t()
    assert digest([("embedding", turned)]) in seen


def test_a_digest_sees_the_parts_behind_the_first(monkeypatch):
    weights = torch.arange(100)
    whole = digest([("w", weights)])
    monkeypatch.setattr("lightning_kd.resuming._HASHED_TOGETHER", 64)
    assert digest([("w", weights)]) == whole
    weights[99] = 0
    assert digest([("w", weights)]) != whole


def test_buffers_that_are_saved_are_weights_and_others_are_not():
    class Scaled(torch.nn.Module):
        def __init__(self, saved=1.0, passing=1.0):
            super().__init__()
            self.register_buffer("saved", torch.tensor(saved))
            self.register_buffer("passing", torch.tensor(passing), persistent=False)

    def of(**values):
        return describe(torch.nn.Sequential(torch.nn.Flatten(), Scaled(**values)))

    assert of(saved=2.0) != of()
    assert of(passing=2.0) == of()


class Bonus(Resumable, Callback):
    """Stands for whatever is given a function, as RLDistillation is its rewards."""

    def __init__(self, function=None):
        self.function = function


@pytest.mark.usefixtures("teachers")
def test_another_lambda_is_refused_on_a_resume_and_the_same_one_is_not():
    run(callbacks=[Bonus(lambda c: [1.0])])
    run(callbacks=[Bonus(lambda c: [1.0])], resume=saved(), folder="x")
    with pytest.raises(ValueError, match=r"Bonus\.function\.code: "):
        run(callbacks=[Bonus(lambda c: [2.0])], resume=saved(), folder="y")


@pytest.mark.usefixtures("teachers")
def test_what_differs_between_processes_is_compared_as_the_first_one_says(monkeypatch):
    def bonus(rank):
        names = {"__name__": "__main__", "device": f"cuda:{rank}"}
        exec("def reward(c): return [device]", names)
        return [Bonus(names["reward"])]

    said = []

    def by_the_first_process(self, value, src=0):
        if isinstance(value, dict) and "settings" in value:
            said.append(value)
            return said[0]
        if isinstance(value, dict) and "seed_everything" in value and said:
            return said[0]["settings"]
        return value

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", by_the_first_process)
    run(callbacks=bonus(0))
    run(callbacks=bonus(1), resume=saved(), folder="x")
    # Where the first process is told something else, all refuse, with what it says.
    said[0] = said[0] | {"settings": said[0]["settings"] | {"seed_everything": 7}}
    with pytest.raises(ValueError, match="seed_everything: 0 -> 7"):
        run(callbacks=bonus(1), resume=saved(), folder="y")
