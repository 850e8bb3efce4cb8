"""Models that are told positions, and models that count columns, against each row alone."""

import pytest
import torch
import transformers
from transformers.models.rwkv import modeling_rwkv

from lightning_kd import (
    CachedSampler,
    ContinuousBatchingSampler,
    GenerationOptions,
    Prompts,
    SamplingOptions,
    TransformersContinuousBatching,
    TransformersEngine,
)
from lightning_kd.generation import decoder, slots, transformers_batching, transformers_engine
from lightning_kd.generation.token_positions import check_cache

SMALL = {"vocab_size": 18, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
PLAIN = {"hidden_size": 16, "intermediate_size": 32, **LAYERS}
DECODER = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2}
TOLD = {
    "Llama": PLAIN,
    "GPTNeoX": PLAIN,
    "Phi": PLAIN,
    "OPT": {**LAYERS, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "GPTBigCode": GPT,
    "CodeGen": {**GPT, "rotary_dim": 4, "n_head": 4},
    "XGLM": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32},
    "BioGpt": PLAIN,
    "Falcon": {**LAYERS, "hidden_size": 16, "alibi": True},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2},
}
COUNTING = {"Bart": DECODER, "Pegasus": DECODER, "TrOCR": DECODER}
DISTANCES = {"RoFormer": {**PLAIN, "embedding_size": 16, "is_decoder": True}}
STATE = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
HEADS = {"expand": 2, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 4}
MASKED_STATES = {"Mamba": STATE, "FalconMamba": STATE, "Mamba2": STATE | HEADS}
GRIFFIN = {**PLAIN, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8}
OTHERS = {
    "Rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    "Roberta": {**PLAIN, "is_decoder": True},
}
OPTIONS = GenerationOptions(max_new_tokens=9)
SAMPLERS = [CachedSampler(), ContinuousBatchingSampler(3)]


def model_of(kind, fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # large, so that a token in another place is another one; sines stay
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model


def prompts_of(lengths):
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(row)
        ids[row, -length:] = torch.randint(2, 18, (length,), generator=generator)
        mask[row, -length:] = 1
    return Prompts(ids, mask, eos_ids=frozenset({1, 3, 6, 9, 12, 15}), pad_id=0)


EQUAL, PADDED = prompts_of([3] * 12), prompts_of([3, 5, 1, 6, 2, 4, 3, 2, 5, 1, 4, 3])
FEW_EQUAL, FEW_PADDED = prompts_of([3] * 4), prompts_of([3, 5, 1, 6])


def alone(model, prompts):
    """Greedy completions of each row by itself, by forward passes over all that it has."""
    texts = []
    for ids, mask in zip(prompts.ids, prompts.mask, strict=True):
        text, start = ids[mask.bool()], int(mask.sum())
        while len(text) - start < OPTIONS.max_new_tokens and not (
            len(text) > start and int(text[-1]) in prompts.eos_ids
        ):
            with torch.no_grad():
                scores = model(text[None], use_cache=False).logits[0, -1]
            text = torch.cat([text, scores.argmax()[None]])
        texts.append(text[start:].tolist())
    return texts


def texts_of(engine, model, prompts):
    got = engine.generate(prompts, OPTIONS, seeds=range(len(prompts.ids)), models=[(model, 1.0)])
    return [ids[mask].tolist() for ids, mask in zip(got.ids, got.mask, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [CachedSampler(), ContinuousBatchingSampler(3)], ids=["all", "slots"]
)
@pytest.mark.parametrize(("kind", "fields"), TOLD.items(), ids=TOLD)
def test_what_is_accepted_is_right(engine, kind, fields):
    model = model_of(kind, fields)
    engine.check_models([model])
    for prompts in (EQUAL, PADDED):
        assert texts_of(engine, model, prompts) == alone(model, prompts)


@pytest.mark.parametrize(
    ("kind", "fields"), (COUNTING | DISTANCES).items(), ids=COUNTING | DISTANCES
)
def test_rows_that_would_be_completed_wrongly_are_refused_by_name(monkeypatch, kind, fields):
    model, engine = model_of(kind, fields), ContinuousBatchingSampler(3)
    said = f"{kind}ForCausalLM takes no position_ids.*engine: CachedSampler"
    with pytest.raises(ValueError, match=said):
        engine.check_models([model])
    with pytest.raises(ValueError, match=said):
        texts_of(engine, model, EQUAL)
    assert texts_of(CachedSampler(), model, EQUAL) == alone(model, EQUAL)
    monkeypatch.setattr(slots, "check_late_rows", lambda model: None)
    assert texts_of(engine, model, EQUAL) != alone(model, EQUAL)


@pytest.mark.parametrize(
    ("engine", "module"),
    [(CachedSampler(), decoder), (TransformersEngine(), transformers_engine)],
    ids=["cached", "transformers"],
)
@pytest.mark.parametrize(("kind", "fields"), COUNTING.items(), ids=COUNTING)
def test_padding_that_would_be_counted_is_refused_by_name(
    monkeypatch, engine, module, kind, fields
):
    model = model_of(kind, fields)
    said = f"{kind}ForCausalLM takes no position_ids.*prompts of one length"
    with pytest.raises(ValueError, match=said):
        texts_of(engine, model, PADDED)
    monkeypatch.setattr(module, "check_padding", lambda model: None)
    assert texts_of(engine, model, PADDED) != alone(model, PADDED)


def test_a_state_that_padding_gets_into_is_refused_by_name(monkeypatch):
    model, engine = model_of("RecurrentGemma", GRIFFIN), TransformersEngine()
    engine.check_models([model])
    assert texts_of(engine, model, FEW_EQUAL) == alone(model, FEW_EQUAL)
    said = "RecurrentGemmaForCausalLM reads padding as tokens.*prompts of one length"
    with pytest.raises(ValueError, match=said):
        texts_of(engine, model, FEW_PADDED)
    monkeypatch.setattr(transformers_engine, "check_padding", lambda model: None)
    assert texts_of(engine, model, FEW_PADDED) != alone(model, FEW_PADDED)


@pytest.mark.parametrize(("kind", "fields"), MASKED_STATES.items(), ids=MASKED_STATES)
def test_a_state_that_passes_over_padding_may_be_padded(kind, fields):
    model, engine = model_of(kind, fields), TransformersEngine()
    engine.check_models([model])
    assert texts_of(engine, model, FEW_PADDED) == alone(model, FEW_PADDED)


@pytest.mark.parametrize(("kind", "fields"), OTHERS.items(), ids=OTHERS)
def test_what_generates_by_other_scores_than_it_trains_by_is_refused_by_name(
    monkeypatch, kind, fields
):
    # It would start a process to look for a compiler.
    monkeypatch.setattr(modeling_rwkv, "is_ninja_available", lambda: False)
    model = model_of(kind, fields)
    engines = [TransformersEngine(), *SAMPLERS, TransformersContinuousBatching()]
    for engine in engines:
        with pytest.raises(ValueError, match=f"{kind}ForCausalLM gives other scores"):
            engine.check_models([model])
        with pytest.raises(ValueError, match=f"{kind}ForCausalLM gives other scores"):
            texts_of(engine, model, FEW_EQUAL)
    monkeypatch.setattr(transformers_engine, "check_steps", lambda model: None)
    assert texts_of(engines[0], model, EQUAL) != alone(model, EQUAL)


@pytest.mark.parametrize("options", [OPTIONS, SamplingOptions(max_new_tokens=9)], ids=["0", "1"])
def test_padding_that_makes_nan_in_float64_is_refused_by_transformers_too(options):
    model = model_of("Llama", PLAIN | {"attn_implementation": "eager"}).double()
    engine, weighted = TransformersEngine(), [(model, 1.0)]
    with pytest.raises(
        ValueError, match=r"is in float64 and gives NaN.*attn_implementation: eager"
    ):
        engine.generate(PADDED, options, seeds=range(12), models=weighted)
    got = engine.generate(EQUAL, options, seeds=range(12), models=weighted)
    assert got.log_probs.isfinite().all()


# Pages of transformers.

PAGED = {"GPTNeoX": PLAIN, "OPT": TOLD["OPT"], "BioGpt": PLAIN, "Cohere": PLAIN}
UNPAGED = {
    **{name: TOLD[name] for name in ("Bloom", "Mpt", "XGLM")},
    **DISTANCES,
    "Bart": {**DECODER, "encoder_layers": 2, "encoder_attention_heads": 2},
    "DiffLlama": PLAIN,
}
FAILING = {
    "Falcon": {**LAYERS, "hidden_size": 16},
    "GPTBigCode": GPT,
    "Jamba": {**PLAIN, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "mamba_d_conv": 2},
    "DeepseekV2": {**PLAIN, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    "MiniMax": {**PLAIN, "num_local_experts": 2, "head_dim": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), PAGED.items(), ids=PAGED)
def test_attention_that_reads_pages_gives_the_text_of_each_row_alone(kind, fields):
    model, engine = model_of(kind, fields), TransformersContinuousBatching(2)
    engine.check_models([model])
    assert texts_of(engine, model, FEW_PADDED) == alone(model, FEW_PADDED)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), UNPAGED.items(), ids=UNPAGED)
def test_attention_that_passes_over_pages_is_refused_by_name(monkeypatch, kind, fields):
    model, engine = model_of(kind, fields), TransformersContinuousBatching(2)
    said = f"{kind}ForCausalLM cannot generate with Transf.*: its attention.*engine: CachedSampler"
    with pytest.raises(ValueError, match=said):
        engine.check_models([model])
    with pytest.raises(ValueError, match=said):
        texts_of(engine, model, FEW_EQUAL)
    monkeypatch.setattr(transformers_batching, "check_pages", lambda model: None)
    assert texts_of(engine, model, FEW_EQUAL) != alone(model, FEW_EQUAL)


@pytest.mark.parametrize(("kind", "fields"), FAILING.items(), ids=FAILING)
def test_what_would_fail_in_the_first_window_is_refused_before_it(kind, fields):
    with pytest.raises(ValueError, match=f"{kind}ForCausalLM cannot generate with Transformers"):
        TransformersContinuousBatching().check_models([model_of(kind, fields)])


@pytest.mark.parametrize(("attribute", "value"), [("multi_query", False), ("kv_lora_rank", None)])
def test_what_config_fields_say_of_keys_is_read_by_value(attribute, value):
    model = model_of("Llama", PLAIN)
    setattr(model.config, attribute, value)
    TransformersContinuousBatching().check_models([model])


def test_distances_alone_may_be_padded():
    ((kind, fields),) = DISTANCES.items()
    model = model_of(kind, fields)
    assert texts_of(CachedSampler(), model, FEW_PADDED) == alone(model, FEW_PADDED)


def test_a_model_without_a_cache_is_known_before_it_reads():
    config = transformers.MambaConfig(vocab_size=18, hidden_size=16, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match="MambaForCausalLM keeps no key-value cache"):
        check_cache(model)
    for engine in (CachedSampler(), ContinuousBatchingSampler()):
        with pytest.raises(ValueError, match=r"keeps no key-value cache.*TransformersEngine"):
            engine.check_models([model])


@pytest.mark.parametrize(
    "engine", [CachedSampler(), ContinuousBatchingSampler(2)], ids=["all", "slots"]
)
def test_what_fails_midway_leaves_a_model_that_can_be_trained(engine):
    """Frequencies that follow the length are made anew in inference mode."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = model_of("Llama", {**PLAIN, "max_position_embeddings": 6, "rope_parameters": rope})
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 8:
            raise RuntimeError("out of memory")

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    endless = Prompts(EQUAL.ids, EQUAL.mask, frozenset({17}), 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(endless, GenerationOptions(20), seeds=range(12), models=[(model, 1.0)])
    handle.remove()
    assert not any(buffer.is_inference() for buffer in model.buffers())
    model(EQUAL.ids.repeat(1, 3)).logits.sum().backward()


@pytest.mark.parametrize(
    "engine", [CachedSampler(), ContinuousBatchingSampler(2)], ids=["all", "slots"]
)
def test_rotary_embeddings_that_follow_the_length_are_those_of_the_longest_row(engine):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = model_of("Llama", {**PLAIN, "max_position_embeddings": 6, "rope_parameters": rope})
    short, beside = prompts_of([2]), prompts_of([2, 12])
    weighted = {"models": [(model, 1.0)]}
    own = engine.generate(short, GenerationOptions(1), seeds=[0], **weighted)
    both = engine.generate(beside, GenerationOptions(1), seeds=[0, 1], **weighted)
    assert (own.log_probs[0, 0] - both.log_probs[0, 0]).abs() > 1e-4
