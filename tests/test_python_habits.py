"""What users of Lightning, Hugging Face and TRL type in Python, each checked for its result."""

import csv
import json
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.tuner import Tuner
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
)

from lightning_kd import (
    GKD,
    SFT,
    BabyLlama,
    DocumentData,
    GenerationOptions,
    LocalTeacher,
    LoRA,
    MiniLLM,
    OnPolicyDistillation,
    PackedTextData,
    PromptCompletionData,
    RoutedTeacher,
    SequenceKD,
    StudentSpec,
    SupervisedKD,
    TeacherEnsemble,
    TopKTeacher,
    WarmupCosine,
)
from lightning_kd.callbacks import CompletionSamples, JsonlPredictions, OnPolicyGeneration
from lightning_kd.divergences import GeneralizedJSD
from lightning_kd.generation import SamplingOptions
from lightning_kd.teachers import CachedTeacher
from tests.support.caches import Losses, written
from tests.support.command_line import fit
from tests.support.harness import Letters, trainer
from tests.support.toys import letter_tokenizer, tiny_llama

ROWS = [{"prompt": "abc"[: 1 + i % 3], "completion": "defghij"[i % 4 :]} for i in range(12)]
"""Prompts and completions of several lengths."""


@pytest.fixture
def saved(tmp_path):
    """A directory with a model and its tokenizer."""
    tiny_llama(3).save_pretrained(tmp_path / "saved")
    letter_tokenizer().save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.fixture
def other(tmp_path):
    """A second one."""
    tiny_llama(4).save_pretrained(tmp_path / "other")
    letter_tokenizer().save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def losses(module, data=None, *, callbacks=(), **settings):
    """The loss of each of three steps."""
    seen = Losses()
    run = trainer(callbacks=[*callbacks, seen], **{"max_steps": 3} | settings)
    run.fit(module, datamodule=data or Letters(12, batch_size=2))
    return seen.values


def rows_data(train=ROWS, **options):
    return PromptCompletionData(
        **{"train": train, "tokenizer": letter_tokenizer(), "batch_size": 2} | options
    )


class TestModels:
    """Students and teachers by name, by configuration and as objects."""

    def test_by_name(self, saved, other):
        named = losses(SupervisedKD(student=saved, teacher=other, optimizer=sgd))
        spelled = SupervisedKD(
            student=StudentSpec(saved), teacher=LocalTeacher(other), optimizer=sgd
        )
        assert named == losses(spelled)

    def test_as_objects(self, saved):
        loaded = losses(SupervisedKD(student=saved, teacher=tiny_llama(1), optimizer=sgd))
        built = losses(SupervisedKD(student=tiny_llama(3), teacher=tiny_llama(1), optimizer=sgd))
        assert loaded == built

    @pytest.mark.parametrize("as_mapping", [False, True], ids=["an object", "a dict"])
    def test_by_configuration(self, as_mapping):
        config = LlamaConfig(
            vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        module = SFT(student=config.to_dict() if as_mapping else config, optimizer=sgd)
        trainer(max_steps=1).fit(module, datamodule=Letters(4, batch_size=2))
        assert module.student.get_input_embeddings().weight.shape == (40, 8)
        assert module.student.lm_head.weight is module.student.model.embed_tokens.weight

    def test_a_model_of_peft_trains_its_adapters_alone(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
        student = peft.get_peft_model(tiny_llama(0), config)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        losses(SFT(student=student, optimizer=sgd))
        changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
        assert changed
        assert all("lora_" in name for name in changed)

    def test_the_averaged_teachers_of_baby_llama_in_a_list(self, saved):
        teachers = [tiny_llama(1), saved, LocalTeacher.of(tiny_llama(2))]
        listed = losses(BabyLlama(student=tiny_llama(0), teacher=teachers, optimizer=sgd))
        members = [LocalTeacher.of(tiny_llama(seed)) for seed in (1, 3, 2)]
        ensemble = TeacherEnsemble(members)
        spelled = BabyLlama(student=StudentSpec.of(tiny_llama(0)), teacher=ensemble, optimizer=sgd)
        assert listed == losses(spelled)

    @pytest.mark.parametrize(
        "composed",
        [
            lambda a, b: TeacherEnsemble([a, b]),
            lambda a, b: RoutedTeacher({"x": a, "y": b}),
            lambda a, b: TopKTeacher(a, k=2),
        ],
        ids=["ensemble", "routed", "top k"],
    )
    def test_models_in_teachers_of_teachers(self, composed, saved):
        members = composed(tiny_llama(1), saved).named_members.values()
        assert all(isinstance(member, LocalTeacher) for member in members)

    @pytest.mark.parametrize(
        ("method", "options"),
        [(GKD, {}), (OnPolicyDistillation, {}), (MiniLLM, {"objective": None})],
        ids=["GKD", "OnPolicyDistillation", "MiniLLM"],
    )
    @pytest.mark.slow
    def test_objects_on_policy(self, method, options):
        options = {k: v for k, v in options.items() if v is not None}
        rollouts = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=3))
        module = method(student=tiny_llama(0), teacher=tiny_llama(1), optimizer=sgd, **options)
        values = losses(module, callbacks=[rollouts])
        spelled = method(
            student=StudentSpec.of(tiny_llama(0)),
            teacher=LocalTeacher.of(tiny_llama(1)),
            optimizer=sgd,
            **options,
        )
        again = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=3))
        assert values == losses(spelled, callbacks=[again])

    def test_a_teacher_object_that_generates(self):
        options = GenerationOptions(max_new_tokens=4)
        module = SequenceKD(student=tiny_llama(0), teacher=tiny_llama(1), generation=options)
        (first, *_) = trainer().predict(module, datamodule=rows_data(predict=ROWS))
        ids = torch.tensor([letter_tokenizer()(ROWS[1]["prompt"])["input_ids"]])
        theirs = tiny_llama(1).generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert first.ids[1][first.mask[1]].tolist() == theirs.tolist()

    @pytest.mark.slow
    def test_a_run_with_objects_goes_on_bit_for_bit(self, tmp_path):
        def module():
            teachers = [tiny_llama(1), tiny_llama(2)]
            return BabyLlama(student=tiny_llama(0), teacher=teachers, tokenizer=letter_tokenizer())

        whole = losses(module(), rows_data(), max_steps=5)
        first = trainer(max_steps=2)
        first.fit(module(), datamodule=rows_data())
        first.save_checkpoint(tmp_path / "half.ckpt")
        rest = trainer(max_steps=5)
        resumed = module()
        rest.fit(
            resumed, datamodule=rows_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
        assert rest.callback_metrics["train/loss"].item() == whole[-1]

    def test_a_resumed_run_refuses_another_teacher_object(self, tmp_path):
        first = trainer(max_steps=2)
        first.fit(SupervisedKD(student=tiny_llama(0), teacher=tiny_llama(1)), datamodule=Letters())
        first.save_checkpoint(tmp_path / "half.ckpt")
        other = SupervisedKD(student=tiny_llama(0), teacher=tiny_llama(2))
        with pytest.raises(ValueError, match=r"model\.teacher\.model\.weights"):
            trainer(max_steps=5).fit(
                other, datamodule=Letters(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
            )

    def test_the_tokenizer_beside_a_named_student_is_taken(self, saved):
        module = SFT(student=saved)
        assert module.tokenizer.get_vocab() == letter_tokenizer().get_vocab()

    def test_by_path_and_by_the_options_of_a_file(self, saved, other):
        named = losses(SupervisedKD(student=saved, teacher=other, optimizer=sgd))
        paths = SupervisedKD(
            student=Path(saved), teacher=Path(other), tokenizer=Path(saved), optimizer=sgd
        )
        options = SupervisedKD(
            student={"name_or_path": saved, "gradient_checkpointing": True},
            teacher={"name_or_path": other},
            optimizer=sgd,
        )
        data = rows_data(tokenizer=Path(saved))
        assert losses(paths) == named == losses(options)
        assert losses(SFT(student=saved, optimizer=sgd), data) == losses(
            SFT(student=saved, optimizer=sgd), rows_data()
        )
        assert options.student.is_gradient_checkpointing

    def test_a_tokenizer_that_is_none_is_refused(self):
        for given in (3, letter_tokenizer().backend_tokenizer):
            with pytest.raises(ValueError, match=r"tokenizer is a .*; give a directory"):
                _ = SFT(student=tiny_llama(0), tokenizer=given).tokenizer
        for given in (None, 3, letter_tokenizer().backend_tokenizer):
            with pytest.raises(ValueError, match=r"tokenizer is a .*; give a directory"):
                rows_data(tokenizer=given).setup("fit")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"student": {"name_or_path": "x", "lorra": 1}},
                "student has the options .'lorra'.; th",
            ),
            ({"student": {"hidden_size": 8}}, r"student is a dict; give .* \(with model_type\)"),
            (
                {"student": tiny_llama(0).model},
                "the student is a LlamaModel, which has no output he",
            ),
            (
                {"teacher": tiny_llama(0).model},
                "the teacher is a LlamaModel, which has no output he",
            ),
        ],
    )
    def test_what_is_no_language_model_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            SupervisedKD(**{"student": tiny_llama(0), "teacher": tiny_llama(1)} | arguments)

    def test_float16_weights_come_with_a_warning(self):
        module = SFT(student=tiny_llama(0).half())
        with pytest.warns(UserWarning, match="weights that are trained are float16"):
            trainer(max_steps=2).fit(module, datamodule=Letters())
        assert module.student.lm_head.weight.isnan().any()

    @pytest.mark.parametrize("optimizer", ["AdamW", 1e-4, {"class_path": "torch.optim.SGD"}])
    def test_an_optimizer_is_what_makes_one(self, optimizer):
        module = SFT(student=tiny_llama(0), optimizer=optimizer)
        with pytest.raises(ValueError, match=r"optimizer is a .*; give a class of torch.optim"):
            trainer(max_steps=1).fit(module, datamodule=Letters())


def batches(data, loader="train_dataloader"):
    """The tokens of all batches."""
    return [batch["input_ids"].tolist() for batch in getattr(data, loader)()]


class TestData:
    """Rows as data sets and lists; batches without a trainer."""

    def test_rows_of_every_origin_are_the_same_batches(self, tmp_path):
        table = datasets.Dataset.from_list(ROWS)
        table.to_json(tmp_path / "rows.jsonl")
        splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
        shuffled = table.shuffle(seed=1)
        back = shuffled.select(sorted(range(12), key=lambda i: ROWS.index(shuffled[i])))
        seen = []
        path = tmp_path / "rows.jsonl"
        for rows in (ROWS, tuple(ROWS), table, splits["train"], back, path, str(path)):
            data = rows_data(rows)
            data.setup("fit")
            seen.append(batches(data))
        assert all(each == seen[0] for each in seen)
        assert len(seen[0]) == 6

    @pytest.mark.parametrize("size", ["8", 2.5, None])
    def test_a_batch_size_is_a_number(self, size):
        with pytest.raises(ValueError, match=f"batch_size is {size} and"):
            rows_data(batch_size=size)

    def test_plain_text_as_rows(self):
        texts = [{"text": "abcdefgh"}, {"text": "ijklmnop"}]
        alone = DocumentData(validation=texts, tokenizer=letter_tokenizer(), batch_size=2)
        alone.setup("validate")
        (rows,) = batches(alone, "val_dataloader")
        assert [letter_tokenizer().decode(row, skip_special_tokens=True) for row in rows] == [
            "a b c d e f g h",
            "i j k l m n o p",
        ]
        packed = PackedTextData(
            validation=datasets.Dataset.from_list(texts),
            tokenizer=letter_tokenizer(),
            block_length=6,
        )
        packed.setup("validate")
        assert [len(row) for row in batches(packed, "val_dataloader")[0]] == [6, 6, 6]

    def test_a_data_set_keeps_the_format_of_its_owner(self):
        table = datasets.Dataset.from_list(ROWS).with_format("torch")
        data = rows_data(table)
        data.setup("fit")
        assert len(batches(data)) == 6
        assert table.format["type"] == "torch"

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
                r"train is a DatasetDict with the splits train; .* train=dataset\[",
            ),
            (
                datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
                "train is a IterableDataset; give a file, .* a datasets.Dataset, or a list of dicts",
            ),
            (["ab", "cd"], "train is a list whose row 0 is a str"),
            ({"prompt": ["a"], "completion": ["b"]}, "train is a dict"),
        ],
        ids=["all splits", "iterable", "texts", "columns"],
    )
    def test_other_objects_are_refused(self, rows, message):
        with pytest.raises(ValueError, match=message):
            rows_data(rows)

    @pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
    def test_a_wrong_row_is_named(self, kind):
        rows = [*ROWS[:2], {"prompt": None, "completion": "a"}]
        with pytest.raises(ValueError, match=r"train\[2\]: column 'prompt' must be text"):
            rows_data(kind(rows)).setup("fit")
        with pytest.raises(ValueError, match="column 'completion' is missing"):
            rows_data(kind([{"prompt": "a"}])).setup("fit")
        with pytest.raises(ValueError, match="train has no rows"):
            rows_data([]).setup("fit")

    def test_a_resumed_run_compares_what_rows_hold(self, tmp_path):
        def module():
            return SFT(student=tiny_llama(0))

        first = trainer(max_steps=2)
        first.fit(module(), datamodule=rows_data())
        first.save_checkpoint(tmp_path / "half.ckpt")
        given = {"ckpt_path": tmp_path / "half.ckpt", "weights_only": True}
        same = [dict(row) for row in ROWS]
        trainer(max_steps=3).fit(module(), datamodule=rows_data(same), **given)
        other = [*ROWS[:-1], ROWS[-1] | {"completion": "ab"}]
        with pytest.raises(ValueError, match=r"the data has changed .*: train"):
            trainer(max_steps=3).fit(module(), datamodule=rows_data(other), **given)

    @pytest.mark.slow
    def test_a_cache_of_rows_serves_the_same_rows(self, tmp_path):
        module = SupervisedKD(student=tiny_llama(0), teacher=tiny_llama(1), optimizer=sgd)
        written(tmp_path / "cache", module, rows_data(datasets.Dataset.from_list(ROWS)))
        cached = {"teacher": CachedTeacher(str(tmp_path / "cache")), "optimizer": sgd}
        own = losses(SupervisedKD(student=tiny_llama(0), **cached), rows_data())
        assert own == pytest.approx(losses(method(), rows_data()), rel=1e-5)
        other = [*ROWS[:-1], ROWS[-1] | {"completion": "ab"}]
        with pytest.raises(ValueError, match="cache"):
            losses(SupervisedKD(student=tiny_llama(0), **cached), rows_data(other))

    def test_batches_can_be_looked_at_without_a_trainer(self):
        data = Letters(5, batch_size=2)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert batch["input_ids"].shape == batch["labels"].shape
        assert len(data.val_dataloader()) == 3

    def test_setup_without_a_stage_reads_what_was_given(self):
        data = rows_data(test=ROWS[:3])
        data.setup()
        assert len(data.test_dataloader()) == 2
        assert data.has("train")
        with pytest.raises(ValueError, match="there are no validation rows"):
            data.val_dataloader()

    def test_having_looked_changes_nothing_of_the_run(self):
        looked = rows_data()
        looked.setup("fit")
        next(iter(looked.train_dataloader()))
        module = {"student": tiny_llama(0), "optimizer": sgd}
        again = {"student": tiny_llama(0), "optimizer": sgd}
        assert losses(SFT(**module), looked) == losses(SFT(**again), rows_data())


def trained(module, tmp_path, **settings):
    """A module after two steps, and its checkpoint."""
    run = trainer(**{"max_steps": 2} | settings)
    run.fit(module, datamodule=Letters(8, batch_size=2))
    run.save_checkpoint(tmp_path / "it.ckpt")
    return module, tmp_path / "it.ckpt"


def assert_same_student(one, other):
    ours, theirs = one.student.state_dict(), other.student.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def measured(module):
    data = Letters(8, batch_size=2)
    return trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)


LORA = LoRA(r=2)


class TestCheckpoints:
    """``load_from_checkpoint`` and ``hparams``."""

    def test_a_checkpoint_alone_is_enough(self, saved, other, tmp_path):
        made = SupervisedKD(
            student=saved,
            teacher=LocalTeacher(other, dtype="float64"),
            divergence=GeneralizedJSD(beta=0.3),
            alpha=0.25,
            optimizer=partial(torch.optim.SGD, lr=0.125),
            generation=GenerationOptions(max_new_tokens=3),
        )
        made, path = trained(made, tmp_path)
        back = SupervisedKD.load_from_checkpoint(path)
        assert_same_student(made, back)
        assert (back.alpha, back.divergence.beta) == (0.25, 0.3)
        assert back.teacher.dtype == "float64"
        assert back.generation == made.generation
        assert measured(back) == measured(made)
        assert back.configure_optimizers().param_groups[0]["lr"] == 0.125

    def test_arguments_take_the_place_of_saved_ones(self, saved, other, tmp_path):
        _, path = trained(SupervisedKD(student=saved, teacher=other, alpha=0.25), tmp_path)
        assert SupervisedKD.load_from_checkpoint(path, alpha=0.75).hparams.alpha == 0.75

    def test_what_it_cannot_hold_is_asked_for_by_name(self, tmp_path):
        made = SupervisedKD(
            student=tiny_llama(0),
            teacher=tiny_llama(1),
            optimizer=sgd,
            tokenizer=letter_tokenizer(),
        )
        made, path = trained(made, tmp_path)
        with pytest.raises(ValueError, match=r"does not hold teacher, .* teacher=\.\.\."):
            SupervisedKD.load_from_checkpoint(path)
        back = SupervisedKD.load_from_checkpoint(path, teacher=tiny_llama(1))
        assert_same_student(made, back)
        assert measured(back) == measured(made)
        with pytest.raises(ValueError, match="optimizer of the saved run was a function without"):
            trainer(max_steps=1).fit(back, datamodule=Letters())
        back = SupervisedKD.load_from_checkpoint(path, teacher=tiny_llama(1), optimizer=sgd)
        trainer(max_steps=1).fit(back, datamodule=Letters())

    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_a_checkpoint_does_not_decide_that_code_is_run(self, saved, other, tmp_path, role):
        _, path = trained(SupervisedKD(student=saved, teacher=other), tmp_path)
        checkpoint = torch.load(path, weights_only=True)
        model = checkpoint["hyper_parameters"][role]
        kind = "StudentSpec" if role == "student" else "LocalTeacher"
        if not isinstance(model, dict):
            module = "models.student_spec" if role == "student" else "teachers.local"
            path_of = f"lightning_kd.{module}.{kind}"
            model = {"class_path": path_of, "init_args": {"name_or_path": model}}
        model["init_args"]["trust_remote_code"] = True
        checkpoint["hyper_parameters"][role] = model
        torch.save(checkpoint, path)
        with pytest.raises(
            ValueError, match=f"has a {kind} with trust_remote_code, which would run"
        ):
            SupervisedKD.load_from_checkpoint(path)
        SupervisedKD.load_from_checkpoint(path, **{role: saved if role == "student" else other})

    def test_the_student_keeps_its_generation_config(self, tmp_path):
        student = tiny_llama(0)
        student.generation_config.eos_token_id = [1, 5]
        _, path = trained(SFT(student=student), tmp_path)
        back = SFT.load_from_checkpoint(path)
        assert back.student.generation_config.eos_token_id == [1, 5]

    def test_adapters(self, saved, tmp_path):
        peft = pytest.importorskip("peft")
        made, path = trained(SFT(student=StudentSpec(saved, lora=LORA)), tmp_path)
        assert_same_student(made, SFT.load_from_checkpoint(path))

        def adapted():
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
            return peft.get_peft_model(tiny_llama(0), config)

        made, path = trained(SFT(student=adapted()), tmp_path)
        with pytest.raises(
            ValueError, match=r"with adapters that was handed over .* student=\.\.\."
        ):
            SFT.load_from_checkpoint(path)
        tokenizer = letter_tokenizer()
        back = SFT.load_from_checkpoint(path, student=adapted(), tokenizer=tokenizer)
        assert_same_student(made, back)

    def test_of_another_method_or_student_it_is_refused(self, saved, other, tmp_path):
        _, path = trained(SupervisedKD(student=saved, teacher=other), tmp_path)
        with pytest.raises(ValueError, match="written by SupervisedKD, this is SFT"):
            SFT.load_from_checkpoint(path)
        with pytest.raises(ValueError, match="the checkpoint is of another student"):
            SupervisedKD.load_from_checkpoint(
                path, student=tiny_llama(0, hidden_size=8), tokenizer=saved
            )

    def test_a_class_of_ones_own(self, saved, other, tmp_path):
        made, path = trained(Mine(bonus=2.0, student=saved, teacher=other), tmp_path)
        back = Mine.load_from_checkpoint(path)
        assert back.bonus == back.hparams.bonus == 2.0
        assert_same_student(made, back)

    def test_nothing_in_a_checkpoint_is_called_or_imported(self, saved, tmp_path):
        _, path = trained(SFT(student=saved), tmp_path)
        checkpoint = torch.load(path, weights_only=True)
        for name in ("os.system", "turtle.Turtle", "subprocess.Popen"):
            harm = {"class_path": name, "init_args": {"args": "touch harmed"}}
            checkpoint["hyper_parameters"]["normalization"] = harm
            torch.save(checkpoint, tmp_path / "bad.ckpt")
            with pytest.raises(ValueError, match=f"written with {name}, which is no class"):
                SFT.load_from_checkpoint(tmp_path / "bad.ckpt")
        assert not (tmp_path / "harmed").exists()
        assert "turtle" not in sys.modules

    def test_loggers_show_the_arguments(self, saved, other, tmp_path):
        logger = CSVLogger(tmp_path)
        made = SupervisedKD(student=saved, teacher=TopKTeacher(tiny_llama(1), k=18), alpha=0.25)
        trained(made, tmp_path, logger=logger)
        logged = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
        assert logged["alpha"] == 0.25
        assert logged["student"] == saved
        assert "teacher" not in logged

    @pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
    @pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
    def test_a_run_of_the_command_line(self, cli, teacher, tmp_path):
        cli(
            *fit("supervised_kd", "--model.teacher.name_or_path", teacher),
            *("--trainer.enable_checkpointing", "true", "--model.optimizer", "torch.optim.SGD"),
            *("--model.optimizer.lr", "0.5", "--export.dirpath", tmp_path / "student"),
        )
        (path,) = tmp_path.rglob("*.ckpt")
        back = SupervisedKD.load_from_checkpoint(path)
        exported = load_file(tmp_path / "student" / "model.safetensors")
        own = back.student.state_dict()
        assert all(torch.equal(own[name], weight) for name, weight in exported.items())
        assert back.configure_optimizers()["optimizer"].defaults["lr"] == 0.5


class Mine(SupervisedKD):
    """A method of a user, who saves hyperparameters as Lightning's pages say."""

    def __init__(self, bonus=0.1, **base):
        super().__init__(**base)
        self.save_hyperparameters()
        self.bonus = bonus


LETTERS = [{"prompt": "ab", "completion": c} for c in ("cd", "de", "ef", "gh")]


def method(**options):
    """A method with a student and a teacher that are the same in every call."""
    given = {"student": tiny_llama(0), "teacher": tiny_llama(1), "optimizer": sgd}
    return SupervisedKD(**given | options)


def logged(logger):
    """The rows of a CSVLogger."""
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


class Shows(Logger):
    """A logger with one of the methods by which others show tables."""

    name, version = "shows", 0

    def __init__(self, way):
        super().__init__()
        self.tables = {}
        if way:
            setattr(self, way, self.keep)

    def keep(self, key, columns, data, *, step):
        self.tables.setdefault(key, []).append((columns, data, step))

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *_, **__):
        pass


class TestTrainer:
    """What Lightning's trainer can do, on a method of this library."""

    def test_predictions_are_greedy_completions(self):
        module, data = (
            method(generation=GenerationOptions(max_new_tokens=4)),
            rows_data(predict=ROWS),
        )
        completions = trainer().predict(module, datamodule=data)
        for own, batch in zip(completions, data.predict_dataloader(), strict=True):
            ids, mask = batch["prompt_ids"], batch["prompt_mask"]
            theirs = module.student.generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
            )[:, ids.shape[1] :]
            assert own.texts(letter_tokenizer()) == letter_tokenizer().batch_decode(
                theirs, skip_special_tokens=True
            )

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    def test_the_best_checkpoint_is_validated_and_tested(self, tmp_path):
        best = ModelCheckpoint(tmp_path, monitor="val/loss")
        settings = {"enable_checkpointing": True, "limit_val_batches": 1.0, "max_steps": 4}
        run = trainer(callbacks=[best], val_check_interval=2, **settings)
        module, data = method(), Letters(8, batch_size=2)
        run.fit(module, datamodule=data)
        score = best.best_model_score.item()
        (tested,) = run.test(module, datamodule=data, ckpt_path="best", verbose=False)
        (path,) = {best.best_model_path}
        fresh = trainer(limit_val_batches=1.0)
        (validated,) = fresh.validate(method(), datamodule=data, ckpt_path=path, verbose=False)
        assert tested["test/loss"] == validated["val/loss"] == pytest.approx(score, rel=1e-6)

    def test_csv_logger(self, tmp_path):
        logger = CSVLogger(tmp_path)
        run = trainer(logger=logger, max_steps=3)
        run.fit(method(), datamodule=Letters(12, batch_size=2))
        rows = logged(logger)
        assert [float(row["train/loss"]) for row in rows] == pytest.approx(losses(method()))

    @pytest.mark.parametrize("ways", [["log_table"], ["log_text"], ["log_table", None, "log_text"]])
    def test_tables_of_completions_go_to_every_logger_that_shows_them(self, ways):
        loggers = [Shows(way) for way in ways]
        run = trainer(
            logger=loggers,
            callbacks=[
                CompletionSamples(max_new_tokens=3, samples=2),
                OnPolicyGeneration(
                    generation=SamplingOptions(max_new_tokens=3), table_every=1, table_rows=2
                ),
            ],
            limit_val_batches=1.0,
            val_check_interval=1,
            max_steps=1,
        )
        module = GKD(student=tiny_llama(0), teacher=tiny_llama(1), optimizer=sgd)
        run.fit(module, datamodule=rows_data(validation=ROWS))
        for way, logger in zip(ways, loggers, strict=True):
            assert set(logger.tables) == ({"val/samples", "rollout/samples"} if way else set())
        for logger in (x for x in loggers if x.tables):
            ((columns, rows, step),) = logger.tables["val/samples"]
            assert (columns, step, len(rows)) == (["prompt", "completion", "reference"], 1, 2)
            assert [row[::2] for row in rows] == [list(r.values()) for r in ROWS[:2]]
            ((columns, rows, step),) = logger.tables["rollout/samples"]
            assert (columns[:2], step, len(rows)) == (["prompt", "completion"], 0, 2)

    def test_summaries_count_the_student_and_not_the_teacher(self):
        seen = {}

        class Summary(ModelSummary):
            def summarize(self, summary_data, total_parameters, *_, **__):
                seen.update(total=total_parameters, names=dict(summary_data)["Name"])

        module = method()
        trainer(callbacks=[Summary(max_depth=2)], max_steps=1).fit(module, datamodule=Letters())
        assert seen["total"] == sum(p.numel() for p in module.student.parameters())
        assert "student.model" in seen["names"]

    def test_the_rich_progress_bar(self):
        bar = RichProgressBar()
        module = method()
        run = trainer(callbacks=[bar], enable_progress_bar=True, max_steps=3)
        run.fit(module, datamodule=Letters(12, batch_size=2))
        assert bar.train_progress_bar.completed == 3
        assert "train/loss" in bar.get_metrics(run, module)

    def test_early_stopping(self):
        stopping = EarlyStopping("val/loss", patience=1, min_delta=100.0)
        run = trainer(callbacks=[stopping], max_epochs=8, max_steps=-1, limit_val_batches=1.0)
        run.fit(method(), datamodule=Letters(4, batch_size=2))
        assert (run.current_epoch, run.global_step) == (2, 4)

    def test_the_learning_rate_monitor(self, tmp_path):
        logger = CSVLogger(tmp_path)
        monitor = LearningRateMonitor()
        rate = lambda optimizer: WarmupCosine(optimizer, warmup_steps=2)  # noqa: E731
        run = trainer(logger=logger, callbacks=[monitor], max_steps=4)
        run.fit(method(lr_scheduler=rate), datamodule=Letters(8, batch_size=2))
        rows = logged(logger)
        own = [float(row["train/lr"]) for row in rows if row["train/lr"]]
        watched = [float(row["lr-SGD/pg1"]) for row in rows if row.get("lr-SGD/pg1")]
        assert own == pytest.approx(watched)
        assert own[0] == pytest.approx(0.025)

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({"fast_dev_run": True}, 1),
            ({"limit_train_batches": 2, "max_epochs": 3}, 6),
            ({"limit_train_batches": 0.5, "max_epochs": 2}, 4),
            ({"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        ],
    )
    def test_limits(self, settings, steps):
        run = trainer(max_steps=-1, **settings)
        run.fit(method(), datamodule=Letters(8, batch_size=2))
        assert run.global_step == steps

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"overfit_batches": 1}, "Give data.train only the rows to overfit"),
            ({"callbacks": [StochasticWeightAveraging(1e-3)]}, "use WeightAveraging"),
            ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "accumulate_grad_batches"),
        ],
        ids=["overfit_batches", "SWA", "scheduled accumulation"],
    )
    def test_what_cannot_work_is_refused_with_what_does(self, settings, message):
        with pytest.raises(ValueError, match=message):
            trainer(max_steps=4, **settings).fit(method(), datamodule=Letters())

    def test_averaging_of_what_is_not_there_is_refused_with_any_loader(self):
        run = trainer(max_steps=4, callbacks=[StochasticWeightAveraging(1e-3)])
        with pytest.raises(ValueError, match="use WeightAveraging"):
            run.fit(SFT(student=tiny_llama(0), tokenizer=letter_tokenizer()), own_loader(WHOLE))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
    def test_detecting_anomalies_changes_nothing(self):
        assert losses(method(), detect_anomaly=True) == losses(method())

    def test_the_simple_profiler(self):
        run = trainer(profiler="simple", max_steps=3)
        run.fit(method(), datamodule=Letters(12, batch_size=2))
        assert len(run.profiler.recorded_durations["run_training_batch"]) == 3

    @pytest.mark.slow
    def test_the_search_for_a_learning_rate(self):
        module, data = method(), Letters(64, batch_size=4)
        run = trainer(max_steps=4, max_epochs=None)
        finder = Tuner(run).lr_find(
            module, datamodule=data, num_training=40, min_lr=1e-3, max_lr=1.0
        )
        # The first losses are those of a run at the first rates, not sums over tokens.
        first = losses(method(optimizer=partial(torch.optim.SGD, lr=1e-3)), data, max_steps=1)
        assert finder.results["loss"][0] == pytest.approx(first[0] * 0.02 / (1 - 0.98**2), rel=1e-5)
        assert module.lr == finder.suggestion()
        # Nothing else is left of it: the run is that of a module made with this rate.
        seen = Losses()
        run.callbacks.append(seen)
        run.fit(module, datamodule=data)
        fresh = method(optimizer=partial(torch.optim.SGD, lr=module.lr))
        assert seen.values == losses(fresh, Letters(64, batch_size=4), max_steps=4)

    @pytest.mark.slow
    def test_the_search_for_a_batch_size(self):
        module, data = method(), Letters(64, batch_size=2)
        run = trainer(max_steps=3, max_epochs=None)
        found = Tuner(run).scale_batch_size(module, datamodule=data, init_val=2, max_trials=3)
        assert found == data.batch_size == 8
        seen = Losses()
        run.callbacks.append(seen)
        run.fit(module, datamodule=data)
        assert seen.values == losses(method(), Letters(64, batch_size=8), max_steps=3)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "limits", [{"max_steps": 3, "max_epochs": None}, {"max_steps": -1, "max_epochs": 1}]
    )
    @pytest.mark.parametrize("validation", [LETTERS, None])
    def test_the_search_for_a_batch_size_ends_with_the_data(self, limits, validation):
        """As Lightning's own loaders end it; trials of several passes and without validation."""
        data = PromptCompletionData(
            train=LETTERS, validation=validation, tokenizer=letter_tokenizer(), batch_size=2
        )
        module, run = method(), trainer(**limits)
        found = Tuner(run).scale_batch_size(module, datamodule=data, max_trials=9)
        assert found == data.batch_size == 4
        run.fit(module, datamodule=data)
        assert run.global_step == (3 if limits["max_steps"] == 3 else 1)

    @pytest.mark.parametrize(
        ("callback", "function"),
        [(LearningRateFinder, "lr_find"), (BatchSizeFinder, "scale_batch_size")],
    )
    def test_searches_inside_a_run_are_refused(self, callback, function):
        with pytest.raises(ValueError, match=rf"Search before it, .*\)\.{function}"):
            trainer(max_steps=1, callbacks=[callback()]).fit(method(), datamodule=Letters())

    def test_searches_that_would_measure_another_run_are_refused(self):
        run = trainer(max_steps=4, callbacks=[greedy()])
        module = GKD(student=tiny_llama(0), teacher=tiny_llama(1))
        with pytest.raises(ValueError, match="OnPolicyGeneration decides what is trained on"):
            Tuner(run).lr_find(module, datamodule=Letters())
        scaled = BabyLlama(student=tiny_llama(0), teacher=[tiny_llama(1)], kl_scale="batchmean")
        with pytest.raises(ValueError, match="the callback that counts the terms of BabyLlama"):
            Tuner(trainer(max_steps=4)).lr_find(scaled, datamodule=Letters())

    def test_a_compiled_module_is_refused(self):
        with pytest.raises(ValueError, match="compile the layers of its models in place"):
            trainer(max_steps=1).fit(torch.compile(method(), backend="eager"), datamodule=Letters())

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_layers_compiled_in_place(self):
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        student = tiny_llama(0)
        for layer in student.model.layers:
            layer.compile(backend=backend)
        assert losses(method(student=student)) == pytest.approx(losses(method()), rel=1e-6)
        assert graphs


PROMPTS = [letter_tokenizer()(row["prompt"]) for row in ROWS]
PROMPTS = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in PROMPTS]
WHOLE = [
    {
        "input_ids": prompt["input_ids"] + own,
        "attention_mask": [1] * (len(prompt["input_ids"]) + len(own)),
        "labels": [-100] * len(prompt["input_ids"]) + own,
    }
    for row, prompt in zip(ROWS, PROMPTS, strict=True)
    for own in [[*letter_tokenizer()(row["completion"])["input_ids"], 1]]
]
"""The same rows as a Hugging Face user tokenizes them."""


def left_padded():
    tokenizer = letter_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


def own_loader(rows, collate=None, batch_size=2, **options):
    collate = collate or DataCollatorForSeq2Seq(letter_tokenizer())
    return DataLoader(rows, batch_size, collate_fn=collate, **options)


def greedy(**options):
    return OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=4, temperature=0.0), **options
    )


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
class TestOwnLoaders:
    """Loaders of PyTorch with the collators of transformers."""

    def test_prompts_and_completions(self):
        own, seen = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer()), Losses()
        run = trainer(callbacks=[seen], max_steps=1)
        run.fit(own, own_loader(WHOLE, batch_size=12))
        ours = losses(SFT(student=tiny_llama(0)), rows_data(batch_size=12), max_steps=1)
        assert seen.values == pytest.approx(ours, rel=1e-6)

    @pytest.mark.parametrize(
        "collate",
        [
            DataCollatorForSeq2Seq(letter_tokenizer()),
            DataCollatorForLanguageModeling(letter_tokenizer(), mlm=False),
        ],
        ids=["seq2seq", "language modeling"],
    )
    def test_the_loss_is_that_of_transformers(self, collate):
        plain = isinstance(collate, DataCollatorForLanguageModeling)
        rows = [{k: v for k, v in row.items() if not (plain and k == "labels")} for row in WHOLE]
        module = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer())
        loader = own_loader(rows, collate, batch_size=12)
        run = trainer(limit_val_batches=1.0, max_steps=0)
        (shown,) = run.validate(module, loader, verbose=False)
        (batch,) = loader
        theirs = tiny_llama(0)(**batch).loss.item()
        assert shown["val/loss"] == pytest.approx(theirs, rel=1e-5)

    def test_the_eos_that_a_collator_takes_out_of_the_labels(self):
        """What the page on data warns of."""
        tokenizer = letter_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        rows = [{"input_ids": [2, 3, 1], "attention_mask": [1, 1, 1]}]
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
        assert batch["labels"].tolist() == [[2, 3, -100]]

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ({"labels": [3, 4, 1, -100]}, "row 0 has label 3 at token 0, where input_ids has 2"),
            (
                {"labels": [0, 0, 0, 0]},
                r"row 0 has label 0 .* not shifted, and tokens are not masked",
            ),
            ({"attention_mask": [0, 1, 1, 1]}, "rows that are trained on or evaluated are padded"),
            ({"labels": None}, "the batch has no labels, so it is prompts alone"),
        ],
        ids=["shifted", "zero", "left", "none"],
    )
    def test_each_batch_is_checked(self, second, message):
        good = {"input_ids": [2, 3, 4, 1], "attention_mask": [1] * 4, "labels": [2, 3, 4, 1]}
        given = [good, good | second]
        batches = [
            {name: torch.tensor([ids] * 2) for name, ids in batch.items() if ids is not None}
            for batch in given
        ]
        module = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer())
        run = trainer(max_steps=2)
        with pytest.raises(ValueError, match=message):
            run.fit(module, DataLoader(batches, batch_size=None))
        assert run.global_step == 1
        with pytest.raises(ValueError, match=message):
            trainer(limit_val_batches=1.0).validate(module, DataLoader(batches, batch_size=None))

    @pytest.mark.parametrize(
        ("number", "which"), [(3, "all optimizer steps"), (16, "16 optimizer")]
    )
    def test_batches_without_a_single_label_are_refused(self, number, which):
        ids = torch.tensor([[2, 3, 1]])
        nothing = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        nothing |= {"labels": torch.full_like(ids, -100)}
        some = nothing | {"labels": ids}
        module = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer())
        with pytest.raises(ValueError, match=f"{which}.* had no label"):
            trainer(max_steps=20).fit(module, DataLoader([nothing] * number, batch_size=None))
        run = trainer(limit_val_batches=1.0)
        with pytest.raises(ValueError, match=r"all batches of the evaluation had no label"):
            run.validate(module, DataLoader([nothing] * number, batch_size=None), verbose=False)
        module = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer())
        run = trainer(max_steps=number)
        run.fit(module, DataLoader([*[nothing] * (number - 1), some], batch_size=None))
        assert run.global_step == number  # a batch that has none among others is no error

    @pytest.mark.parametrize(
        ("method", "callbacks"), [(OnPolicyDistillation, []), (GKD, [{"lmbda": 0.0}]), (GKD, [])]
    )
    def test_prompts_alone_ask_for_what_completes_them(self, method, callbacks):
        module = method(student=tiny_llama(0), teacher=tiny_llama(1), tokenizer=letter_tokenizer())
        run = trainer(max_steps=1, callbacks=[greedy(**options) for options in callbacks])
        loader = own_loader(PROMPTS, DataCollatorWithPadding(letter_tokenizer()))
        with pytest.raises(ValueError, match=r"prompts alone.* OnPolicyGeneration with lmbda: 1"):
            run.fit(module, loader)

    @pytest.mark.parametrize(
        ("rows", "collate"),
        [
            (PROMPTS, DataCollatorWithPadding(letter_tokenizer())),
            (PROMPTS, DataCollatorWithPadding(left_padded())),
            (WHOLE, DataCollatorForSeq2Seq(letter_tokenizer())),
        ],
        ids=["prompts", "padded on the left", "with completions"],
    )
    def test_on_policy_as_with_a_data_module(self, rows, collate):
        given = {"student": tiny_llama(0), "teacher": tiny_llama(1), "optimizer": sgd}
        module, seen = GKD(**given, tokenizer=letter_tokenizer()), Losses()
        run = trainer(callbacks=[greedy(), seen], max_steps=1)
        run.fit(module, own_loader(rows, collate, batch_size=12))
        again = {"student": tiny_llama(0), "teacher": tiny_llama(1), "optimizer": sgd}
        data = rows_data(batch_size=12)
        assert seen.values == pytest.approx(
            losses(GKD(**again), data, callbacks=[greedy()], max_steps=1), rel=1e-6
        )

    def test_windows_of_several_steps_and_passes(self, tmp_path):
        rollouts = greedy(steps_per_window=3, passes=2, path=str(tmp_path / "rollouts.jsonl"))
        module = GKD(student=tiny_llama(0), teacher=tiny_llama(1), tokenizer=letter_tokenizer())
        run = trainer(callbacks=[rollouts], max_epochs=2, max_steps=-1)
        run.fit(module, own_loader(PROMPTS, DataCollatorWithPadding(letter_tokenizer())))
        assert run.global_step == 2 * 6 * 2
        lines = [
            json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()
        ]
        prompts = [row["prompt_ids"] for row in lines]
        assert prompts == [row["input_ids"] for row in PROMPTS] * 2
        assert len({row["sample"] for row in lines}) == 24
        assert len({row["window"] for row in lines}) == 4

    @pytest.mark.slow
    @pytest.mark.parametrize("passes", [1, 2])
    def test_a_run_goes_on_where_it_stopped(self, tmp_path, passes):
        def started(**settings):
            module = GKD(student=tiny_llama(0), teacher=tiny_llama(1), tokenizer=letter_tokenizer())
            options = SamplingOptions(max_new_tokens=4)
            rollouts = OnPolicyGeneration(generation=options, steps_per_window=2, passes=passes)
            seen = Losses()
            run = trainer(callbacks=[rollouts, seen], max_epochs=3, **settings)
            loader = own_loader(PROMPTS, DataCollatorWithPadding(letter_tokenizer()))
            return run, module, loader, seen

        run, module, loader, whole = started(max_steps=9)
        run.fit(module, loader)
        run, module, loader, _ = started(max_steps=3)
        run.fit(module, loader)
        run.save_checkpoint(tmp_path / "3.ckpt")
        run, module, loader, rest = started(max_steps=9)
        run.fit(module, loader, ckpt_path=tmp_path / "3.ckpt", weights_only=True)
        assert rest.values == whole.values[3:]

    def test_completions_of_prompts(self, tmp_path):
        writer = JsonlPredictions(str(tmp_path / "written.jsonl"))
        module = SFT(
            student=tiny_llama(0),
            tokenizer=letter_tokenizer(),
            generation=GenerationOptions(max_new_tokens=4),
        )
        loader = own_loader(PROMPTS, DataCollatorWithPadding(letter_tokenizer()), batch_size=5)
        trainer(callbacks=[writer]).predict(module, loader)
        lines = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
        assert [row["row"] for row in lines] == list(range(12))
        for row, prompt in zip(lines, PROMPTS, strict=True):
            ids = torch.tensor([prompt["input_ids"]])
            theirs = tiny_llama(0).generate(ids, max_new_tokens=4, do_sample=False)
            assert prompt["input_ids"] + row["completion_ids"] == theirs[0].tolist()

    def test_samples_of_validation(self):
        shows = Shows("log_table")
        samples = CompletionSamples(max_new_tokens=3, samples=12)
        module = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer())
        run = trainer(callbacks=[samples], logger=shows, limit_val_batches=1.0)
        run.validate(module, own_loader(WHOLE), verbose=False)
        ((_, rows, _),) = shows.tables["val/samples"]
        assert [row[2].replace(" ", "") for row in rows] == [row["completion"] for row in ROWS]

    @pytest.mark.parametrize(
        ("rows", "stacked", "message"),
        [
            (
                [{"input_ids": [2, 3]}] * 2,
                True,
                "a batch of prompts needs .* 'attention_mask': 'None",
            ),
            ([{"text": "a"}] * 2, False, "a batch of prompts needs .* got list"),
            (
                [{"input_ids": [2, 3, 4], "attention_mask": [1, 0, 1]}] * 2,
                True,
                "the attention_mask of a prompt has a gap",
            ),
            (
                [{"input_ids": [2, 3], "attention_mask": [1, 1], "labels": [2, 3]}] * 2,
                True,
                "a label on its first token, so that it has no prompt",
            ),
        ],
        ids=["no mask", "texts", "a gap", "no prompt"],
    )
    def test_what_a_batch_of_prompts_lacks_is_named(self, rows, stacked, message):
        def tensors(given):
            return {name: torch.tensor([row[name] for row in given]) for name in given[0]}

        loader = own_loader(rows, tensors if stacked else list)
        module = GKD(student=tiny_llama(0), teacher=tiny_llama(1), tokenizer=letter_tokenizer())
        with pytest.raises(ValueError, match=message):
            trainer(callbacks=[greedy()], max_steps=1).fit(module, loader)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"group_size": 2}, "group_size is 2: with a loader of your own"),
            ({"steps_per_window": 4}, "windows have 4 micro-batches, and the loader gives 6"),
        ],
    )
    def test_plans_that_such_a_loader_cannot_keep_are_refused(self, options, message):
        module = GKD(student=tiny_llama(0), teacher=tiny_llama(1), tokenizer=letter_tokenizer())
        loader = own_loader(PROMPTS, DataCollatorWithPadding(letter_tokenizer()))
        with pytest.raises(ValueError, match=message):
            trainer(callbacks=[greedy(**options)], max_steps=1).fit(module, loader)
