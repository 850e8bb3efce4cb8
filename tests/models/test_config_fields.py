"""Fields of a configuration that nothing reads, and sizes of which no model can be."""

import json
from pathlib import Path

import pytest

from lightning_kd.models import StudentSpec, vocabulary_size
from lightning_kd.teachers import LocalTeacher
from tests.models.test_model_spec import CONFIG
from tests.support.toys import tiny_llama

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}

WRONG = {
    "misspelt": (
        CONFIG | {"num_hidden_layer": 1},
        "'num_hidden_layer'; did you mean num_hidden_lay",
    ),
    "of another type": (
        CONFIG | {"n_layer": 1},
        "'n_layer'; llama has attention_bias, .*vocab_size",
    ),
    "nested": (
        {"model_type": "gemma3", "text_config": {"hidden_sizes": 16}},
        "'text_config.hidden_sizes'; did you mean hidden_size",
    ),
    "of generation": (
        CONFIG | {"temperature": 0.5},
        "'temperature'; how completions are generated",
    ),
    "no layers": (
        CONFIG | {"num_hidden_layers": 0},
        "num_hidden_layers is 0; it must be 1 or more",
    ),
    "no width": (CONFIG | {"hidden_size": 0}, "hidden_size is 0"),
    "no heads": (CONFIG | {"num_attention_heads": 0}, "num_attention_heads is 0"),
    "no layers by its own name": (GPT2 | {"n_layer": 0}, "n_layer is 0"),
    "no layers by its common name": (GPT2 | {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "no number": (CONFIG | {"hidden_size": "wide"}, "not understood"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", [StudentSpec, LocalTeacher])
def test_a_field_that_nothing_reads_is_refused(tokenizer, kind, case):
    config, message = WRONG[case]
    with pytest.raises(ValueError, match=f"config of the student.*{message}"):
        kind(config=config).load(tokenizer, "student")


def test_a_file_is_held_to_the_same(tokenizer):
    Path("config.json").write_text(json.dumps(CONFIG | {"num_hidden_layer": 1}))
    with pytest.raises(ValueError, match="did you mean num_hidden_layers"):
        StudentSpec(config="config.json").load(tokenizer, "student")


@pytest.mark.parametrize(
    ("config", "attribute", "value"),
    [
        (GPT2 | {"n_positions": 24}, "max_position_embeddings", 24),
        (
            {
                "model_type": "gpt2",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "n_layer",
            1,
        ),
        (
            CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "use_cache",
            True,
        ),
        # What older versions wrote.
        (
            CONFIG | {"rope_theta": 5.0, "torch_dtype": "float32", "_name_or_path": "x"},
            "mlp_bias",
            False,
        ),
        (CONFIG | {"num_labels": 3, "output_attentions": False, "auto_map": {}}, "num_labels", 3),
    ],
)
def test_other_names_and_common_fields_are_read(tokenizer, config, attribute, value):
    model = StudentSpec(config=config).load(tokenizer, "student")
    assert getattr(model.config, attribute) == value
    if "rope_theta" in config:
        assert model.config.rope_parameters["rope_theta"] == 5.0


def test_a_language_model_that_is_part_of_another_has_the_vocabulary_of_the_tokenizer(tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "gemma3", "text_config": sizes, "vision_config": vision}
    model = StudentSpec(config=config).load(tokenizer, "student")
    assert vocabulary_size(model) == len(tokenizer)


def test_what_save_pretrained_writes_is_a_config(tokenizer):
    tiny_llama().save_pretrained("saved")
    model = StudentSpec(config="saved/config.json").load(tokenizer, "student")
    assert model.config.num_hidden_layers == 2


def test_a_saved_model_without_layers_is_refused(tokenizer):
    tiny_llama(num_hidden_layers=0).save_pretrained("saved")
    with pytest.raises(ValueError, match="the student has 0 layers"):
        StudentSpec("saved").load(tokenizer, "student")
