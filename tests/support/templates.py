"""Chat templates as model families have them, written anew and short."""

from lightning_kd.data import train_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# The system message stands before the last question, so that earlier turns change with each new one.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}<s>"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] "
    "{% if system is defined and loop.index0 >= turns | length - 2 + turns | length % 2 %}"
    "{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)

GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Thinking stays in answers to the last question alone, tool calls are written, parts are not read.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role in ('user', 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set content = m.content or '' %}{% set thinking = '' %}"
    "{% if '</think>' in content %}"
    "{% set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last and (loop.last or thinking) %}"
    "<think>\n{{ thinking }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

_SPECIAL = {
    "chatml": (CHATML, "<|im_end|>", ["<|im_start|>"]),
    "chatml marked": (CHATML_MARKED, "<|im_end|>", ["<|im_start|>"]),
    "llama3": (
        LLAMA3,
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    ),
    "mistral": (MISTRAL, "</s>", ["<s>", "[INST]", "[/INST]"]),
    "gemma": (GEMMA, "<eos>", ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "qwen3": (QWEN3, "<|im_end|>", ["<|im_start|>"]),
}
FAMILIES = sorted(_SPECIAL)


def family_tokenizer(family):
    """A small byte-level tokenizer with a family's template, EOS and special tokens."""
    template, eos, others = _SPECIAL[family]
    texts = ["what is two and two ? it is four ."] * 3 + ["a\n\n\na"] * 9
    tokenizer = train_tokenizer(texts, vocab_size=300)
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": others})
    tokenizer.chat_template = template
    return tokenizer
