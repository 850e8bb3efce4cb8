"""What is compared: rows all over the data, tokenizers by what the data asks of them."""

from itertools import pairwise

import pytest
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from lightning_kd import (
    GKD,
    SFT,
    ChatData,
    LocalTeacher,
    PackedTextData,
    PromptCompletionData,
    PromptsAndText,
    StudentSpec,
    SupervisedKD,
    check,
)
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.modules import MiniLLM
from lightning_kd.preflight.rows import spread
from tests.preflight.places import TEMPLATE, chat_tokenizer, save_model
from tests.support.harness import trainer
from tests.support.toys import LETTERS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ROWS = [{"prompt": LETTERS[n % 5 :][:3], "completion": LETTERS[n % 7 :][:5]} for n in range(16)]
DOCUMENTS = [{"text": LETTERS[n % 3 :] * 4} for n in range(8)]


def named(report):
    return [finding.name for finding in report.findings]


def distilled(teacher, data):
    module = SupervisedKD(
        student=StudentSpec(config=CONFIG), teacher=LocalTeacher(str(teacher)), vocabulary="shared"
    )
    return named(check(module, data))


@pytest.mark.parametrize("size", [3, 256, 257, 400, 511, 512, 1000, 100_000])
def test_rows_are_looked_at_from_the_first_to_the_last(size):
    found = spread(size, 256)
    steps = {after - before for before, after in pairwise(found)}
    assert (found[0], found[-1], len(found)) == (0, size - 1, min(size, 256))
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("size", [400, 511, 1000])
def test_rows_that_differ_from_the_middle_on_are_seen(size):
    rows = [dict(ROWS[n % 16], ended=n >= size * 0.8) for n in range(size)]
    data = PromptCompletionData(tokenizer=chat_tokenizer(), train=rows)
    facts = check(SFT(student=StudentSpec(config=CONFIG)), data).facts.rows
    assert facts.ended / facts.looked_at == pytest.approx(0.2, abs=0.01)


def test_the_words_of_completions_that_never_end():
    rows = [dict(row, ended=False) for row in ROWS]
    data = PromptCompletionData(tokenizer=chat_tokenizer(), train=rows)
    (found,) = check(SFT(student=StudentSpec(config=CONFIG)), data).findings
    assert "their labels are without the EOS, '<end>' (4). The student" in found.says


def test_short_completions_are_no_matter_where_nothing_is_generated():
    module = GKD(student=StudentSpec(config=CONFIG), teacher=LocalTeacher(config=CONFIG))
    for lmbda, expected in ((0.0, []), (0.5, ["endless"])):
        generation = OnPolicyGeneration(lmbda=lmbda, generation=SamplingOptions(max_new_tokens=2))
        data = PromptCompletionData(tokenizer=chat_tokenizer(), train=ROWS)
        assert named(check(module, data, trainer(callbacks=[generation]))) == expected


@pytest.mark.slow
@pytest.mark.parametrize("system", [False, True])
def test_templates_are_compared_on_the_roles_that_the_data_has(tmp_path, system):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    save_model(tmp_path, chat_tokenizer(template=refusing + TEMPLATE))
    said = [
        *([{"role": "system", "content": "c"}] if system else []),
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    data = ChatData(tokenizer=chat_tokenizer(), train=[{"messages": said}] * 8)
    assert distilled(tmp_path, data) == (["template"] if system else [])


def test_text_without_prompts_is_tokenized_by_both_too(tmp_path):
    letters = LETTERS[:10] + LETTERS[:10].upper()
    own, other = chat_tokenizer(letters), chat_tokenizer(letters)
    text = [{"text": letters * 4}] * 8
    data = PackedTextData(tokenizer=own, train=text, block_length=16)
    size = len(own.get_vocab())
    save_model(tmp_path / "same", other, vocab_size=size)
    assert distilled(tmp_path / "same", data) == []
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    save_model(tmp_path / "lower", other, vocab_size=size)
    assert distilled(tmp_path / "lower", data) == ["tokenizer"]


@pytest.mark.parametrize("form", ["prompts", "text", "chats"])
def test_a_token_that_only_one_tokenizer_begins_texts_with_is_named(tmp_path, form):
    other = chat_tokenizer()
    start = TemplateProcessing(single="<bot> $A", special_tokens=[("<bot>", 3)])
    other.backend_tokenizer.post_processor = start
    save_model(tmp_path, other)
    own = chat_tokenizer()
    if form == "prompts":
        data = PromptCompletionData(tokenizer=own, train=ROWS)
    elif form == "text":
        data = PackedTextData(tokenizer=own, train=DOCUMENTS, block_length=16)
    else:  # framed by the template
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        data = ChatData(tokenizer=own, train=[{"messages": said}] * 8)
    assert distilled(tmp_path, data) == ([] if form == "chats" else ["tokenizer"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_two_streams_with_two_tokenizers_are_refused():
    letters = LETTERS[::-1]
    prompts = PromptCompletionData(tokenizer=chat_tokenizer(), train=ROWS)
    text = PackedTextData(tokenizer=chat_tokenizer(letters), train=DOCUMENTS, block_length=16)
    module = MiniLLM(student=StudentSpec(config=CONFIG), teacher=LocalTeacher(config=CONFIG))
    rollouts = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=8))
    with pytest.raises(ValueError, match=r"tokenizer of data\.text .* that of data\.prompts"):
        trainer(callbacks=[rollouts]).fit(module, datamodule=PromptsAndText(prompts, text))
