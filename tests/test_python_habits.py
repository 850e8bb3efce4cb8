"""What users of Lightning, Hugging Face and TRL type in Python, each checked for its result."""

import datasets
import pytest
import torch
from transformers import LlamaConfig

from lightning_kd import (
    GKD,
    SFT,
    BabyLlama,
    DocumentData,
    LocalTeacher,
    MiniLLM,
    OnPolicyDistillation,
    PackedTextData,
    PromptCompletionData,
    RoutedTeacher,
    StudentSpec,
    SupervisedKD,
    TeacherEnsemble,
    TopKTeacher,
)
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from tests.support.caches import Losses
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
    fit = trainer(callbacks=[*callbacks, seen], **{"max_steps": 3} | settings)
    fit.fit(module, datamodule=data or Letters(12, batch_size=2))
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

    def test_a_tokenizer_that_is_none_is_refused(self):
        with pytest.raises(ValueError, match="tokenizer is a int; give a directory"):
            _ = SFT(student=tiny_llama(0), tokenizer=3).tokenizer


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
        for rows in (ROWS, tuple(ROWS), table, splits["train"], back, tmp_path / "rows.jsonl"):
            data = rows_data(rows if not hasattr(rows, "suffix") else str(rows))
            data.setup("fit")
            seen.append(batches(data))
        assert all(each == seen[0] for each in seen)
        assert len(seen[0]) == 6

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
