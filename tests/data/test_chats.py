"""Conversations as families of models read them: what is trained on, and what is refused."""

import json
import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.data import ChatData
from lightning_kd.data.collate import Collator
from tests.support.templates import CHATML, family_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


ASK, FOUR, MORE, FIVE = (
    user("what is 2+2?"),
    assistant("it is 4."),
    user("and 2+3 ?"),
    assistant("5"),
)
TWO_TURNS = [ASK, FOUR, MORE, FIVE]
THINKING = [ASK, assistant("<think>\n2, 2\n</think>\n\nit is 4."), MORE, assistant("5")]


def rows(family, row, name="chats.jsonl", split="train", **options):
    listed = row if isinstance(row, list) else [row]
    Path(name).write_text("\n".join(json.dumps(each) for each in listed))
    tokenizer = family if not isinstance(family, str) else family_tokenizer(family)
    data = ChatData(tokenizer=tokenizer, **{split: name}, **options)
    return data.rows(split), data.tokenizer


def marked(example, tokenizer):
    """The text of a row, what is trained on in [[ ]]."""
    batch = Collator(0)([(0, 0, example)])
    text, inside = "", False
    for token, label in zip(batch["input_ids"][0], batch["labels"][0], strict=True):
        if (label != IGNORE_INDEX) != inside:
            text, inside = text + ("]]" if inside else "[["), not inside
        text += tokenizer.decode([token])
    return text + ("]]" if inside else "")


LAST = {
    "chatml": (
        "<|im_start|>user\nwhat is 2+2?<|im_end|>\n<|im_start|>assistant\nit is 4.<|im_end|>\n"
        "<|im_start|>user\nand 2+3 ?<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>]]"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nwhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nit is 4.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nand 2+3 ?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[5<|eot_id|>]]"
    ),
    "mistral": "<s>[INST] what is 2+2?[/INST] it is 4.</s>[INST] and 2+3 ?[/INST][[ 5</s>]]",
    "gemma": (
        "<bos><start_of_turn>user\nwhat is 2+2?<end_of_turn>\n<start_of_turn>model\nit is 4."
        "<end_of_turn>\n<start_of_turn>user\nand 2+3 ?<end_of_turn>\n<start_of_turn>model\n"
        "[[5<end_of_turn>]]"
    ),
    "qwen3": (
        "<|im_start|>user\nwhat is 2+2?<|im_end|>\n<|im_start|>assistant\nit is 4.<|im_end|>\n"
        "<|im_start|>user\nand 2+3 ?<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\n5<|im_end|>]]"
    ),
}
LAST["chatml marked"] = LAST["chatml"]
OPTIONS = {"gemma": {"eos_token": "<end_of_turn>"}}
FIRST = {
    "chatml": "it is 4.<|im_end|>",
    "chatml marked": "it is 4.<|im_end|>",
    "llama3": "it is 4.<|eot_id|>",
    "mistral": " it is 4.</s>",
    "gemma": "it is 4.<end_of_turn>",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", LAST)
def test_the_last_answer_and_its_end_are_trained_on(family):
    found, tokenizer = rows(family, {"messages": TWO_TURNS}, **OPTIONS.get(family, {}))
    example = found.example(0, 0)
    assert marked(example, tokenizer) == LAST[family]
    assert (example.completion, example.prompt) == ("5", LAST[family].split("[[")[0])
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == example.prompt


@pytest.mark.slow
@pytest.mark.parametrize("family", FIRST)
def test_every_answer_and_its_end_is_trained_on(family):
    options = OPTIONS.get(family, {})
    found, tokenizer = rows(family, {"messages": TWO_TURNS}, train_on="all", **options)
    expected = LAST[family].replace(FIRST[family], f"[[{FIRST[family]}]]")
    assert marked(found.example(0, 0), tokenizer) == expected
    assert found.example(0, 0).prompt == LAST[family].split("[[")[0]


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_marks_of_a_template_are_those_of_transformers(train_on):
    found, tokenizer = rows("chatml marked", {"messages": TWO_TURNS}, train_on=train_on)
    example = found.example(0, 0)
    theirs = tokenizer.apply_chat_template(
        TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(example.input_ids)
    assert example.input_ids == theirs["input_ids"][:length]  # which go on with a line break
    mask = theirs["assistant_masks"][:length]
    assert sum(theirs["assistant_masks"]) == sum(mask)
    if train_on == "last":
        mask = [0] * example.prompt_length + mask[example.prompt_length :]
    assert list(map(int, example.trained)) == mask


def test_marks_that_leave_out_the_end_of_a_turn_are_completed():
    tokenizer = family_tokenizer("chatml marked")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )
    found, _ = rows(tokenizer, {"messages": TWO_TURNS}, train_on="all")
    expected = LAST["chatml"].replace(FIRST["chatml"], f"[[{FIRST['chatml']}]]")
    assert marked(found.example(0, 0), tokenizer) == expected
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}{% endgeneration %}", "{% endgeneration %}{{ m.content }}"
    )
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: .* marks nothing of message 4"):
        rows(tokenizer, {"messages": TWO_TURNS})


@pytest.mark.parametrize(
    ("family", "chat"), [("qwen3", THINKING), ("mistral", [user("be kind"), *TWO_TURNS])]
)
def test_a_template_that_changes_earlier_turns_is_refused_with_ways_out(family, chat):
    chat = [{"role": "system", "content": "be kind"}, *chat[1:]] if family == "mistral" else chat
    with pytest.raises(
        ValueError, match=r"chats\.jsonl:1: .* renders message \d otherwise once another follows"
    ) as error:
        rows(family, {"messages": chat}, train_on="all")
    assert "data.train_on: each" in str(error.value)


def test_each_answer_is_a_row_as_the_model_would_give_it():
    row = {"messages": [*THINKING, user("thanks")], "source": "x"}
    found, tokenizer = rows("qwen3", row, train_on="each", extra_columns=["source"])
    begin = "<|im_start|>user\nwhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert [marked(found.example(k, 0), tokenizer) for k in range(len(found))] == [
        begin + "[[<think>\n2, 2\n</think>\n\nit is 4.<|im_end|>]]",
        LAST["qwen3"],  # where the template has taken the earlier thinking out
    ]
    assert list(found.column("source")) == [
        ("chats.jsonl:1, message 2", "x"),
        ("chats.jsonl:1, message 4", "x"),
    ]


def test_arguments_of_a_template():
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    found, tokenizer = rows("qwen3", {"messages": [ASK, FOUR]}, **options)
    assert marked(found.example(0, 0), tokenizer).endswith(
        "assistant\n<think>\n\n</think>\n\n[[it is 4.<|im_end|>]]"
    )
    with pytest.raises(
        ValueError, match="has 'tools', which is given to the template for each row"
    ):
        rows("qwen3", {"messages": [ASK, FOUR]}, chat_template_kwargs={"tools": []})
    with pytest.raises(ValueError, match="unknown train_on 'first'; choose one of"):
        rows("qwen3", {"messages": [ASK, FOUR]}, train_on="first")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
WITH_TOOLS = [
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": None},
    FOUR,
]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_their_calls_reach_the_template(tools):
    found, tokenizer = rows("qwen3", {"messages": WITH_TOOLS, "tools": tools}, train_on="each")
    theirs = tokenizer.apply_chat_template(
        WITH_TOOLS[:1], tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert '"name": "add", "parameters"' in theirs
    first = marked(found.example(0, 0), tokenizer)
    assert first.startswith(theirs + "[[")
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>' in first
    assert "<tool_response>\n4\n</tool_response>" in found.example(1, 0).prompt


def test_parts_are_given_as_the_template_takes_them():
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "2+2?"}]
    found, tokenizer = rows("chatml", {"messages": [user(parts), FOUR]})
    assert "user\nwhat is 2+2?<|im_end|>" in found.example(0, 0).prompt
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text | trim }}/{% endfor %}{% endif %}",
    )
    found, _ = rows(tokenizer, {"messages": [user(parts), FOUR]})
    assert "user\nwhat is/2+2?/<|im_end|>" in found.example(0, 0).prompt
    image = [{"type": "image", "url": "x"}]
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: a part of a message's content must be"):
        rows("chatml", {"messages": [user(image), FOUR]})


DEVELOPER = {"role": "developer", "content": "be kind"}


def test_a_role_is_refused_where_the_template_leaves_it_out():
    found, _ = rows("chatml", {"messages": [DEVELOPER, ASK, FOUR]})
    assert found.example(0, 0).prompt.startswith("<|im_start|>developer\nbe kind<|im_end|>")
    with pytest.raises(ValueError, match=r"leaves out message 1, of role 'developer'"):
        rows("qwen3", {"messages": [DEVELOPER, ASK, FOUR]})
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: .* refuses .*System role not supported"):
        rows("gemma", {"messages": [DEVELOPER | {"role": "system"}, ASK, FOUR]})


def test_prompts_alone_are_for_models_to_answer():
    for split, options in (("predict", {}), ("train", {"train_on": "none"})):
        found, tokenizer = rows(
            "llama3", [{"messages": [ASK]}, {"messages": [ASK, FOUR]}], split=split, **options
        )
        for row, reference in enumerate(["", "it is 4."]):
            example = found.example(row, 0)
            theirs = tokenizer.apply_chat_template([ASK], add_generation_prompt=True)["input_ids"]
            assert example.input_ids == theirs
            assert (example.prompt_length, example.completion) == (len(theirs), reference)
            assert "[[" not in marked(example, tokenizer)
    with pytest.raises(ValueError, match=r"ends with the user's\. .* set data.train_on: none"):
        rows("llama3", {"messages": [ASK]})


SHAREGPT = [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": FOUR["content"]}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "completion": [FOUR]},
        {"prompt": [ASK], "completion": "it is 4."},
        {"conversations": SHAREGPT},
        {"conversations": [ASK, FOUR], "prompt": "some-id"},
        {"messages": [ASK, FOUR], "prompt": "what is 2+2?", "completion": 7},
    ],
)
def test_forms_of_trl_and_sharegpt_are_the_same_chat(row):
    found, tokenizer = rows("chatml", row)
    expected, _ = rows("chatml", {"messages": [ASK, FOUR]}, name="same.jsonl")
    assert marked(found.example(0, 0), tokenizer) == marked(expected.example(0, 0), tokenizer)


def test_the_answers_of_a_prompt_are_not_trained_on():
    row = {"prompt": [ASK, FOUR, MORE], "completion": [FIVE]}
    found, tokenizer = rows("chatml", row, train_on="all")
    assert marked(found.example(0, 0), tokenizer) == LAST["chatml"]
    found, tokenizer = rows("chatml", {"prompt": [ASK]}, train_on="none")
    assert found.example(0, 0).prompt.endswith("assistant\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "there is no column 'messages' with a chat, and none of 'prompt'"),
        ({"prompt": "a", "completion": "b"}, "the prompt is text .* with PromptCompletionData"),
        (
            {"prompt": [ASK], "completion": [FOUR, MORE, FIVE]},
            "must be one message of the assistant",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "unknown speaker 'bot'"),
        ({"messages": [ASK, FOUR], "tools": "add("}, "'tools' is not valid JSON"),
        ({"messages": [ASK, FOUR], "tools": ["add"]}, "a list of schemas of functions"),
        ({"messages": []}, "a chat is a list of messages, got"),
        ({"messages": [FOUR]}, "a chat needs a prompt"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user"}]}, "needs role and content"),
        ({"messages": ["hello"]}, "needs role and content"),
        ({"messages": [user(3), FOUR]}, "content, which is text or a list of parts"),
    ],
)
def test_what_holds_no_chat_says_what_to_do(row, message):
    with pytest.raises(ValueError, match=rf"chats\.jsonl:1: .*{message}"):
        rows("chatml", row)


def test_an_end_of_turn_that_is_not_the_eos_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        found, tokenizer = rows("gemma", [{"messages": [ASK, FOUR]}] * 2)
    assert marked(found.example(0, 0), tokenizer).endswith("[[it is 4.<end_of_turn>\n<eos>]]")
    assert caplog.text.count("of 2 rows, 2 end with <end_of_turn>") == 1
    assert "data.eos_token: '<end_of_turn>' ends completions there" in caplog.text
    with pytest.raises(ValueError, match=r"data\.eos_token is '<end>', which is no token"):
        rows("gemma", {"messages": [ASK, FOUR]}, eos_token="<end>")
    kept = family_tokenizer("gemma")
    data = ChatData(tokenizer=kept, eos_token="<end_of_turn>")
    assert (data.tokenizer.eos_token, kept.eos_token) == ("<end_of_turn>", "<eos>")


def test_answers_that_a_template_changes_or_does_not_end_are_counted(caplog):
    plain = family_tokenizer("chatml")
    plain.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    )
    plain.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    with caplog.at_level(logging.WARNING):
        found, _ = rows(plain, [{"messages": TWO_TURNS}], train_on="all")
    assert "of 1 rows, 1 have answers before the last one that end without an EOS" in caplog.text
    assert marked(found.example(0, 0), plain).endswith(
        "[[it is 4.\n]]user: and 2+3 ?\nassistant: [[5\n<|im_end|>]]"
    )
    caplog.clear()
    squeezed = assistant("<think>2, 2</think>it is 4.")
    with caplog.at_level(logging.WARNING):
        rows("qwen3", [{"messages": [ASK, FOUR]}, {"messages": [ASK, squeezed]}])
    assert "of 2 rows, 1 have an answer that the chat template changes" in caplog.text
    assert "The first is chats.jsonl:2" in caplog.text


def test_what_is_cut_keeps_its_labels(caplog):
    row = {"messages": TWO_TURNS}
    whole = rows("llama3", row, train_on="all")[0]
    whole = whole.example(0, 0)
    length = len(whole.input_ids)
    left, _ = rows("llama3", row, train_on="all", max_length=length - 20, truncation="left")
    assert left.example(0, 0).input_ids == whole.input_ids[20:]
    assert list(left.example(0, 0).trained) == list(whole.trained[20:])
    right, _ = rows("llama3", row, train_on="all", max_length=length - 1, truncation="right")
    assert list(right.example(0, 0).trained) == list(whole.trained[:-1])
    # The last answer is gone, the first is still there; trained on alone, it leaves nothing.
    short = {"max_length": whole.prompt_length, "truncation": "right"}
    assert any(rows("llama3", row, train_on="all", **short)[0].example(0, 0).trained)
    with pytest.raises(ValueError, match="all 1 rows are longer"):
        rows("llama3", row, **short)


def test_a_template_that_rewrites_the_past_is_refused():
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: .*cannot be told apart"):
        rows(tokenizer, {"messages": [ASK, FOUR]})
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        rows(tokenizer, {"messages": [ASK, FOUR]})


def metaspace():
    """A tokenizer that puts a space before every text, as Llama 2's does."""
    letters = [
        *"\u2581abcdefghijklmnopqrstuvwxyz.?:+0123456789",
        "\u2581it",
        "\u2581is",
        "it",
        "is",
    ]
    vocabulary = {"<eos>": 0, "<unk>": 1} | {t: i + 2 for i, t in enumerate(letters)}
    merges = [("i", "t"), ("i", "s"), ("\u2581", "it"), ("\u2581", "is")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}q: {{ m.content }} a:"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def test_pieces_have_the_tokens_of_the_whole_where_a_tokenizer_begins_each_text_with_a_space():
    found, tokenizer = rows(metaspace(), {"messages": TWO_TURNS}, train_on="all")
    example = found.example(0, 0)
    theirs = tokenizer.apply_chat_template(TWO_TURNS)["input_ids"]
    assert example.input_ids == theirs
    own = [t for t, trained in zip(example.input_ids, example.trained, strict=True) if trained]
    assert tokenizer.convert_ids_to_tokens(own) == [
        *("\u2581it", "\u2581is", "\u2581", "4", ".", "<eos>", "\u2581", "5", "<eos>")
    ]


def test_a_token_across_the_border_is_none_of_the_answer():
    """Byte-level tokens merge over a line break; a model answers the prompt's own tokens."""
    tokenizer = family_tokenizer("chatml")
    answer = assistant("\n\nit is 4.")
    found, _ = rows(tokenizer, {"messages": [ASK, answer]})
    example = found.example(0, 0)
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True)["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    whole = tokenizer.apply_chat_template([ASK, answer])["input_ids"]
    assert whole[: len(prompt)] != prompt  # the merge is there
    assert marked(example, tokenizer).endswith("assistant\n[[\n\nit is 4.<|im_end|>]]")


SILENT = CHATML.replace("{{ m.content }}", "{{ m.content or '' }}")
ONLY = "{% for m in messages if m.role != 'tool' %}"


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (SILENT, {"messages": WITH_TOOLS}, "tool_calls of message 2, of role 'assistant'"),
        (SILENT, {"messages": [ASK, FOUR], "tools": [TOOL]}, "the column 'tools'"),
        (SILENT, {"messages": WITH_TOOLS[:2]}, "tool_calls of message 2"),
        (
            SILENT.replace("{% for m in messages %}", ONLY),
            {"messages": [ASK, FOUR, {"role": "tool", "content": "4"}, FIVE]},
            "message 3, of role 'tool'",
        ),
        (
            SILENT.replace("{% for m in messages %}", ONLY.replace("tool", "developer")),
            {"messages": [{"role": "developer", "content": "hi"}, user("hi there"), FOUR]},
            "message 1, of role 'developer'",
        ),
    ],
)
@pytest.mark.parametrize("train_on", ["last", "all", "each"])
def test_what_a_template_does_not_read_is_named(template, row, lost, train_on):
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"chats\.jsonl:2.* leaves out {lost}"):
        rows(tokenizer, [{"messages": [ASK, FOUR]}, row], train_on=train_on)


def test_reasoning_that_is_not_learned_and_answers_without_a_word_are_counted(caplog):
    thought = assistant("5", reasoning_content="2+3 is 5")
    with caplog.at_level(logging.WARNING):
        rows("chatml", [{"messages": [ASK, FOUR]}, {"messages": [ASK, thought]}])
    assert "of 2 rows, 1 have reasoning_content in an answer" in caplog.text
    assert "The first is chats.jsonl:2" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rows("chatml", [{"messages": [ASK, thought, MORE, FIVE]}, {"messages": [ASK, FOUR]}])
    assert caplog.text == ""  # of an earlier answer it is not learned anyway
    with caplog.at_level(logging.WARNING):
        found, tokenizer = rows(
            "chatml", [{"messages": [ASK, FOUR]}, {"messages": [ASK, assistant("")]}]
        )
    assert "of 2 rows, 1 have an answer without a word, of which its end alone" in caplog.text
    assert marked(found.example(1, 0), tokenizer).endswith("assistant\n[[<|im_end|>]]")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"messages_column": "conversations"}])
def test_the_system_column_of_sharegpt_is_the_system_message(options):
    found, _ = rows("chatml", {"conversations": SHAREGPT, "system": "be kind"}, **options)
    assert found.example(0, 0).prompt.startswith(
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user"
    )
    for none in (None, ""):
        found, _ = rows("chatml", {"conversations": SHAREGPT, "system": none}, **options)
        assert found.example(0, 0).prompt.startswith("<|im_start|>user")
    both = [{"from": "system", "value": "be brief"}, *SHAREGPT]
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: column 'system' .* too; give it"):
        rows("chatml", {"conversations": both, "system": "be kind"}, **options)
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: column 'system' .* no text"):
        rows("chatml", {"conversations": SHAREGPT, "system": ["be kind"]}, **options)


def test_messages_of_weight_0_are_not_trained_on():
    heavy, light = FOUR | {"weight": 1}, FOUR | {"weight": 0}
    found, tokenizer = rows("chatml", {"messages": [ASK, light, MORE, FIVE]}, train_on="all")
    assert marked(found.example(0, 0), tokenizer) == LAST["chatml"]
    found, _ = rows(
        "chatml", {"messages": [ASK, heavy, MORE, FIVE | {"weight": 0}]}, train_on="all"
    )
    assert marked(found.example(0, 0), tokenizer).endswith("assistant\n[[it is 4.<|im_end|>]]")
    with pytest.raises(ValueError, match=r"last message has weight 0, .* set data.train_on: all"):
        rows("chatml", {"messages": [ASK, FOUR, MORE, FIVE | {"weight": 0}]})
    with pytest.raises(ValueError, match="has weight 0, so it is not trained on, and no other is"):
        rows("chatml", {"messages": [ASK, light]}, train_on="each")
    with pytest.raises(ValueError, match=r"weight of a message is 0\.5; it is 1, or 0"):
        rows("chatml", {"messages": [ASK, FOUR | {"weight": 0.5}]})


def test_what_follows_the_last_answer_is_left_off_or_the_way_out_is_said():
    found, tokenizer = rows("chatml", {"messages": [*TWO_TURNS, ASK]}, train_on="all")
    same, _ = rows("chatml", {"messages": TWO_TURNS}, train_on="all", name="same.jsonl")
    assert marked(found.example(0, 0), tokenizer) == marked(same.example(0, 0), tokenizer)
    with pytest.raises(ValueError, match=r"ends with the user's\. To train on the answers before"):
        rows("chatml", {"messages": [*TWO_TURNS, ASK]})


def test_variables_that_a_template_does_not_read_are_refused():
    message = r"'enable_thinkin', which the chat template does not read.* are .*enable_thinking"
    with pytest.raises(ValueError, match=message):
        rows("qwen3", {"messages": [ASK, FOUR]}, chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match=r"'enable_thinking', .* variables that it reads are"):
        rows("chatml", {"messages": [ASK, FOUR]}, chat_template_kwargs={"enable_thinking": False})
    marks = {"chat_template_kwargs": {"m": 1}}  # a template with marks is parsed as well
    rows("chatml marked", {"messages": [ASK, FOUR]}, **marks)
