"""Teachers with other tokens: one tokenizer on both sides, formulas written out, and all texts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lightning_kd.callbacks import LossNormalizationDiagnostics, OnPolicyGeneration
from lightning_kd.data import PromptCompletionData
from lightning_kd.divergences import available_divergences
from lightning_kd.fused import TopK
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import (
    GKD,
    ULD,
    ChunkLikelihoodKD,
    CorrectedTopK,
    MiniLLM,
    OnPolicyDistillation,
)
from lightning_kd.resuming import describe
from lightning_kd.teachers import (
    LocalTeacher,
    RetokenizingTeacher,
    RoutedTeacher,
    Teacher,
    TeacherEnsemble,
)
from tests.modules.partition_grid import OTHER_TOKENS, build
from tests.support.harness import BatchList, GradientProbe, Letters, fit_one_step, trainer
from tests.support.tabular import Expectation, Prepared
from tests.support.tokenizers import SPACE, byte_level, tokenizer_of_kind
from tests.support.toys import fused_letter_tokenizer, ragged_batch, tiny_llama
from tests.support.written_texts import (
    OF_A_NAME,
    STUDENT_TOKENIZER,
    TEACHER_TOKENIZER,
    Bytes,
    ByteTeacher,
    TokenTable,
    Words,
    everything_written,
    rollout_of_everything,
)

BATCH = ragged_batch([(2, 5), (1, 3), (3, 7), (2, 0)])
DOUBLE = {"precision": "64-true"}


def student(**settings):
    return StudentSpec.of(tiny_llama(0, **settings).double())


def teacher(**settings):
    return LocalTeacher.of(tiny_llama(1, **settings).double())


def same_tokens():
    """A teacher with the student's tokenizer, asked as if it had another."""
    return RetokenizingTeacher(teacher(), tokenizer=fused_letter_tokenizer())


def same_step(first, second, batch=BATCH, rtol=1e-12):
    losses, gradients = zip(
        *(fit_one_step(m, [batch], **DOUBLE) for m in (first, second)), strict=True
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # logged in float32
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= rtol * gradients[1].norm()


# One tokenizer on both sides: every chunk is a token.


class LabelAlone(Teacher):
    """The log-probability of the label, and one event for all other tokens."""

    answers = frozenset({"top_k"})
    vocabulary_size = 18

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_probs = logits[positions.mask].log_softmax(-1)
        label = positions.targets[:, None]
        own = log_probs.gather(-1, label)
        others = log_probs.scatter(-1, label, -torch.inf).logsumexp(-1)
        return TopK(label, own, {1.0: others})


@pytest.mark.slow
@pytest.mark.parametrize("name", available_divergences())
def test_at_temperature_1_a_chunk_of_one_token_is_that_token_and_a_tail(name):
    chunks = ChunkLikelihoodKD(
        student=student(),
        teacher=same_tokens(),
        tokenizer=fused_letter_tokenizer(),
        divergence=name,
        temperature=1.0,
        epsilon=1e-16,
    )
    tokens = GKD(student=student(), teacher=LabelAlone(tiny_llama(1).double()), divergence=name)
    same_step(chunks, tokens)


def on_policy_step(module, data=None, **options):
    writing = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=6), table_every=0, **options
    )
    probe = GradientProbe()
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[writing, probe], **DOUBLE)
    fit.fit(module, datamodule=data or Letters(batch_size=6))
    return fit, probe.gradient


class AnyText(RetokenizingTeacher):
    """As if its letters were all there are."""

    answers_any_text = True


def single_bytes():
    """A tokenizer with a token for each byte, all of whose tokens stand for what they are."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(261, texts=["a"]).backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_chunk_advantages_of_one_tokenizer_are_those_of_its_tokens(gamma):
    tokenizer = single_bytes()
    size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    chunks = RetokenizingTeacher(teacher(**size), tokenizer=tokenizer)
    rows = [{"prompt": text, "completion": "a"} for text in ("ab", "b", "aab", "ba", "a", "c")]
    gradients = [
        on_policy_step(
            OnPolicyDistillation(student=student(**size), teacher=each, gamma=gamma),
            PromptCompletionData(train=rows, tokenizer=tokenizer, batch_size=6),
        )[1]
        for each in (chunks, teacher(**size))
    ]
    assert (gradients[0] - gradients[1]).norm() <= 1e-12 * gradients[1].norm()


# Two tokenizers, and all that can be written.


def has_gradient_of_tokens_less_text(make, taught, other, rollout, probabilities, of_text, written):
    """Whether the step has that of E_q[log q(tokens) - log p(text)], where all is written once."""
    model, fresh, total = make(), make(), 0.0
    module = OnPolicyDistillation(
        gamma=1.0,
        student=StudentSpec.of(model),
        teacher=RetokenizingTeacher(taught, tokenizer=other),
        tokenizer=model.tokenizer,
        logits_backend=DenseLogits(),  # a table has no output head to take apart
        normalization=Expectation(probabilities),
    )
    probe = GradientProbe()
    fit = trainer(max_steps=1, callbacks=[Prepared(), probe], **DOUBLE)
    fit.fit(module, datamodule=BatchList([rollout]))
    assert probabilities.sum().item() == pytest.approx(1)
    for tokens, text in zip(written, of_text, strict=True):
        own = fresh.log_probs(fresh.tokens[0], tokens).sum()
        total = total + own.exp() * (own - text)
    (expected,) = torch.autograd.grad(total, fresh.rows)
    expected = expected.flatten()
    assert expected.norm() > 1e-2
    return (probe.gradient - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("tokenizer", [STUDENT_TOKENIZER, OF_A_NAME], ids=["words", "name"])
def test_with_discount_1_chunks_have_the_gradient_of_tokens_less_text(tokenizer):
    """With a teacher that is a table of bytes."""
    rollout, probabilities, of_text, completions = everything_written(Words(0, tokenizer))
    assert has_gradient_of_tokens_less_text(
        lambda: Words(0, tokenizer),
        ByteTeacher(),
        TEACHER_TOKENIZER,
        *(rollout, probabilities, of_text, completions),
    )
    several = [len(tokens) for tokens in completions if len(tokens) > 1]
    assert several, "chunks of one token each would prove less"


LLAMA = tokenizer_of_kind("SentencePiece BPE with byte fallback")
UNIGRAM = tokenizer_of_kind("Unigram with byte fallback")


def in_bytes(names):
    """What Llama's tokenizer makes of a letter without a token, or of a part of one without a space."""
    is_whole = len(names) == 3 and names[:2] == ["<0xE0>", "<0xA4>"] and names[2] != names[0]
    return LLAMA.convert_tokens_to_ids([SPACE] * is_whole + names)


def as_text(other):
    """What a tokenizer makes of a text that SentencePiece's tokens say, names of special ones too."""
    state = other.backend_tokenizer.to_str().replace('"<unk>"', '"<other>"')
    bare = Tokenizer.from_str(state)
    bare.encode_special_tokens = True

    def ids(names):
        text = "".join(names).replace(SPACE, " ")
        return bare.encode(text.removeprefix(" "), add_special_tokens=False).ids if text else []

    return ids


ADDED_SPACE = {
    "half a character": (LLAMA, ["<0xE0>", "<0xA4>", "<0x80>"], in_bytes),
    "a space alone": (LLAMA, [SPACE, f"{SPACE}t", "t"], as_text(LLAMA)),
    "a name": (UNIGRAM, [f"{SPACE}t", "<unk>", "h"], as_text(UNIGRAM)),
    "a name of a letter": (UNIGRAM, ["e", "<unk>", "r"], as_text(UNIGRAM)),
}


@pytest.mark.parametrize("case", ADDED_SPACE)
def test_it_is_the_gradient_also_where_spaces_are_added(case):
    """Where the answer is a text of its own, with a table of the teacher's tokens."""
    other, words, read = ADDED_SPACE[case]
    model = Words(0, LLAMA, words)
    rollout, probabilities, completions = rollout_of_everything(model)
    rollout["tokenized_apart"] = torch.ones(len(completions), dtype=torch.bool)
    before, of_text = other("a", add_special_tokens=False)["input_ids"], []
    for tokens in completions:
        ended = tokens[-1] == LLAMA.eos_token_id
        names = LLAMA.convert_ids_to_tokens(tokens[: len(tokens) - ended])
        ids = [*before, *read(names), *[other.eos_token_id] * ended]
        of_text.append(sum(TokenTable.log_prob(ids[: n + 1]) for n in range(len(before), len(ids))))
    assert has_gradient_of_tokens_less_text(
        lambda: Words(0, LLAMA, words),
        TokenTable(),
        other,
        *(rollout, probabilities, of_text, completions),
    )


def chunks_by_prefix(tokens):
    """Log-probability under the table of bytes of each chunk of a completion, and its tokens."""
    ends = [0]
    eos = STUDENT_TOKENIZER.eos_token_id
    words = [STUDENT_TOKENIZER.decode([t]).encode() for t in tokens if t != eos]
    theirs = TEACHER_TOKENIZER(b"".join(words).decode())["input_ids"]
    theirs = np.cumsum([len(TEACHER_TOKENIZER.decode([token])) for token in theirs])
    own = np.cumsum([len(word) for word in words])
    ends += sorted({*own.tolist()} & {*theirs.tolist()})
    text, table, chunks = b"".join(words), Bytes(), []
    for start, end in pairwise(ends):
        group = [k for k, place in enumerate(own) if start < place <= end]
        chunks.append((group, table.of_text(text[start:end], text[:start], ended=False)))
    if tokens[-1] == eos:
        chunks.append(([len(words)], table.log_prob(None, text)))
    return chunks


def test_what_nothing_predicts_is_learned_for_what_comes_later():
    """Without a prompt, the reward of a text is that of all chunks but the first, which has none."""
    model = Words(0)
    rollout, probabilities, _, completions = everything_written(model)
    rollout["extra"] = {"teacher_prompt": [""] * len(completions)}
    module = OnPolicyDistillation(
        gamma=1.0,
        student=StudentSpec.of(model),
        teacher=RetokenizingTeacher(ByteTeacher(), tokenizer=TEACHER_TOKENIZER),
        tokenizer=STUDENT_TOKENIZER,
        logits_backend=DenseLogits(),
        normalization=Expectation(probabilities),
    )
    probe = GradientProbe()
    fit = trainer(max_steps=1, callbacks=[Prepared(), probe], **DOUBLE)
    fit.fit(module, datamodule=BatchList([rollout]))
    fresh, total, several = Words(0), 0.0, 0
    for tokens in completions:
        own = fresh.log_probs(fresh.tokens[0], tokens)
        rest = chunks_by_prefix(tokens)[1:]
        several += len(rest) > 0
        cost = sum((own[group].sum().detach() - told for group, told in rest), torch.zeros(()))
        total = total + own.sum().exp() * cost
    assert several > 10
    (expected,) = torch.autograd.grad(total, fresh.rows)
    expected = expected.flatten()
    assert expected.norm() > 1e-2
    assert (probe.gradient - expected).norm() <= 1e-10 * expected.norm()


# Two tokenizers, against formulas written out.

TEXT = "two and two were four, the student reads"


def row_batch(ids, prompt):
    row = torch.tensor([ids])
    labels = row.clone()
    labels[:, :prompt] = -100
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "labels": labels,
        "row": torch.tensor([0]),
    }


def written_out():
    """Both sides' log-probabilities of the completion's tokens, and the bytes of each token."""
    own = byte_level(300, texts=["wered fourt reads, there two studs and", "fou we stu"] * 3)
    other = byte_level(310, prefix_space=True, texts=["two we re, fou rea ds the stude nt"] * 3)
    ids = [*own(TEXT, add_special_tokens=False)["input_ids"], own.eos_token_id]
    prompt = next(k for k in range(2, len(ids)) if own.decode(ids[k]).startswith(" "))
    before = own.decode(ids[:prompt])
    theirs = other(before, add_special_tokens=False)["input_ids"]
    start = len(theirs)
    # It begins with a space, which is no added one where a text goes on.
    theirs += other(TEXT[len(before) :], add_special_tokens=False)["input_ids"]
    theirs.append(other.eos_token_id)
    sizes = [
        [len(tokenizer.decode(token)) if token != tokenizer.eos_token_id else 0 for token in tokens]
        for tokenizer, tokens in ((own, ids[prompt:]), (other, theirs[start:]))
    ]
    return own, other, ids, prompt, theirs, start, sizes


def log_probs_of(model, ids, start):
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0], logits


def cuts_of(sizes):
    """Where both sides end, by comparing all prefixes; and the EOS of both."""
    ends = [np.cumsum(side[:-1]).tolist() for side in sizes]
    shared = sorted(set(ends[0]) & set(ends[1]))
    groups = []
    for side, places in zip(sizes, ends, strict=True):
        cuts = [places.index(end) + 1 for end in shared]
        groups.append([*map(range, [0, *cuts[:-1]], cuts), range(len(side) - 1, len(side))])
    return groups


def modules_on(method, own, other, **options):
    return method(
        student=student(vocab_size=len(own)),
        teacher=RetokenizingTeacher(teacher(vocab_size=len(other)), tokenizer=other),
        tokenizer=own,
        **options,
    )


def chunk_surprisals():
    """Both sides' surprisals of each chunk, the student's with a gradient, and how to fit."""
    own, other, ids, prompt, theirs, start, sizes = written_out()
    model, teaching = (tiny_llama(n, vocab_size=len(t)).double() for n, t in ((0, own), (1, other)))
    mine, _ = log_probs_of(model, ids, prompt)
    taught, _ = log_probs_of(teaching, theirs, start)
    of_student, of_teacher = cuts_of(sizes)
    assert max(map(len, of_student)) > 1
    assert max(map(len, of_teacher)) > 1
    surprisals = torch.stack([-mine[list(group)].sum() for group in of_student])
    theirs = torch.stack([-taught[list(group)].sum() for group in of_teacher]).detach()
    return own, other, model, row_batch(ids, prompt), surprisals, theirs, len(ids) - prompt


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("backend", [FusedLogits, DenseLogits])
@pytest.mark.parametrize(("temperature", "epsilon"), [(100.0, 1e-6), (2.0, 1e-3)])
def test_likelihoods_of_chunks_are_matched_as_the_paper_has_it(temperature, epsilon, backend):
    own, other, model, batch, surprisals, theirs, tokens = chunk_surprisals()
    a = np.exp(-theirs.numpy() / temperature - epsilon)
    b = np.exp(-surprisals.detach().numpy() / temperature - epsilon)
    cross_entropy = -(a * np.log(b) + (1 - a) * np.log(1 - b))
    entropy = -(a * np.log(a) + (1 - a) * np.log(1 - a))
    options = {"temperature": temperature, "epsilon": epsilon, "logits_backend": backend()}
    module = modules_on(ChunkLikelihoodKD, own, other, **options)
    loss, gradient = fit_one_step(module, [batch], **DOUBLE)
    assert loss == pytest.approx(temperature * (cross_entropy - entropy).sum() / tokens, rel=1e-5)
    # Of the cross-entropy by hand: d/db = (b - a) / (b (1 - b)), and db = -b ds / tau.
    slopes = torch.tensor((a - b) / (1 - b) / tokens)
    (slopes * surprisals).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).norm() <= 1e-9 * expected.norm()


def test_a_large_temperature_leaves_its_limit():
    own, other, _, batch, surprisals, theirs, tokens = chunk_surprisals()
    s_q, s_p = surprisals.detach(), theirs
    limit = (s_q - s_p + s_p * (s_p / s_q).log()).sum().item() / tokens
    module = modules_on(ChunkLikelihoodKD, own, other, temperature=1e5, epsilon=1e-14)
    loss, _ = fit_one_step(module, [batch], **DOUBLE)
    assert loss == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("backend", [FusedLogits, DenseLogits])
def test_uld_is_the_l1_distance_of_sorted_probabilities(backend):
    """Where both have read the same text, with NumPy's sort; the narrower side filled up with zeros."""
    own, other, ids, prompt, theirs, start, sizes = written_out()
    mine, logits = log_probs_of(tiny_llama(0, vocab_size=len(own)).double(), ids, prompt)
    _, taught = log_probs_of(tiny_llama(1, vocab_size=len(other)).double(), theirs, start)
    total = -mine.sum().item()
    for own_group, other_group in zip(*cuts_of(sizes), strict=True):
        q, p = (
            np.sort(side[group[0]].exp().detach().numpy())[::-1]
            for side, group in ((logits, own_group), (taught, other_group))
        )
        width = max(len(q), len(p))
        q, p = (np.pad(side, (0, width - len(side))) for side in (q, p))
        total += 1.5 * np.abs(q - p).sum()
    module = modules_on(ULD, own, other, logits_backend=backend())
    loss, _ = fit_one_step(module, [row_batch(ids, prompt)], **DOUBLE)
    assert loss == pytest.approx(total / (len(ids) - prompt), rel=1e-5)


def test_uld_of_permuted_tokens_is_0_which_is_not_equality():
    own, _, ids, prompt, *_ = written_out()
    permuted = tiny_llama(0, vocab_size=len(own)).double()
    with torch.no_grad():
        permuted.lm_head.weight.copy_(permuted.lm_head.weight.flip(0))
    module = ULD(
        student=student(vocab_size=len(own)),
        teacher=RetokenizingTeacher(LocalTeacher.of(permuted), tokenizer=own),
        tokenizer=own,
    )
    fit = trainer(max_steps=1, **DOUBLE)
    fit.fit(module, datamodule=BatchList([row_batch(ids, prompt)]))
    assert fit.callback_metrics["train/sorted_distance"] == pytest.approx(0, abs=1e-12)
    assert fit.callback_metrics["train/cross_entropy"] > 1


# In runs.


@pytest.mark.parametrize("method", [*OTHER_TOKENS, "chunk_opd", "chunk_gkd"])
def test_bits_per_byte_are_logged_in_training_and_validation(method):
    """On the same rows by the same weights; letters are of one byte."""
    module = build(method, "token")
    module._optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    if method in OTHER_TOKENS:
        fit = trainer(max_steps=1, limit_val_batches=1, **DOUBLE)
        fit.fit(module, datamodule=BatchList([BATCH], [BATCH]))
    else:
        fit, _ = on_policy_step(module)
    values = fit.callback_metrics
    assert values["train/bits_per_byte"] > 0
    if method in OTHER_TOKENS:
        assert values["train/bits_per_byte"] == pytest.approx(values["val/bits_per_byte"].item())
        nats = values["val/perplexity"].log().item()
        assert values["val/bits_per_byte"].item() == pytest.approx(nats / np.log(2), rel=1e-5)


def test_rows_in_which_a_student_wrote_an_unknown_token_are_not_in_bits_per_byte():
    """The letters' padding stands for unknown text too; every letter is a byte, and an EOS none."""
    batch = {name: tensor.clone() for name, tensor in ragged_batch([(2, 5), (1, 4)]).items()}
    batch["completion_mask"] = batch["labels"] != -100
    batch["input_ids"][0, 4] = batch["labels"][0, 4] = 0
    fit = trainer(max_steps=1, **DOUBLE)
    module = ChunkLikelihoodKD(**apart(tokenizer=fused_letter_tokenizer()))
    fit.fit(module, datamodule=BatchList([batch]))
    ids = batch["input_ids"][1, batch["attention_mask"][1] > 0].tolist()
    nats, _ = log_probs_of(tiny_llama(0).double(), ids, 1)
    letters = sum(token != fused_letter_tokenizer().eos_token_id for token in ids[1:])
    expected = -nats.sum().item() / letters / np.log(2)
    assert fit.callback_metrics["train/bits_per_byte"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("method", [*OTHER_TOKENS, "chunk_opd", "chunk_gkd"])
def test_the_normalization_of_every_method_is_audited(method):
    module = build(method, "sequence")
    diagnostics = LossNormalizationDiagnostics(audit="first", on_fault="raise", tolerance=1e-9)
    callbacks, data = [diagnostics], BatchList([BATCH, ragged_batch([(1, 4), (2, 2)])])
    if method not in OTHER_TOKENS:
        writing = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=6), table_every=0)
        callbacks, data = [writing, diagnostics], Letters(batch_size=2)
    fit = trainer(
        max_steps=1, accumulate_grad_batches=2, max_epochs=-1, callbacks=callbacks, **DOUBLE
    )
    fit.fit(module, datamodule=data)
    audited = {name for name in fit.callback_metrics if name.startswith("norm/audit/")}
    assert audited
    term = {"uld": "sorted_distance", "chunk_opd": "policy_gradient"}.get(method, "divergence")
    weight = {"uld": 1.5, "chunk_opd": 1.0}.get(method, 0.7)
    assert fit.callback_metrics[f"norm/{term}/weight"].item() == pytest.approx(weight)


def run(module, batch=BATCH, **settings):
    trainer(max_steps=1, **DOUBLE, **settings).fit(module, datamodule=BatchList([batch]))


def apart(**options):
    return {"student": student(), "teacher": same_tokens()} | options


REFUSED = {
    "a divergence over tokens": (
        lambda: GKD(**apart(tokenizer=fused_letter_tokenizer())),
        "GKD needs .* RetokenizingTeacher answers chunk_log_probs, .*ChunkLikelihoodKD",
    ),
    "MiniLLM": (
        lambda: MiniLLM(**apart(tokenizer=fused_letter_tokenizer())),
        "MiniLLM needs .*choose a method that compares chunks",
    ),
    "a corrected estimate": (
        lambda: OnPolicyDistillation(
            **apart(tokenizer=fused_letter_tokenizer()), estimator=CorrectedTopK()
        ),
        "OnPolicyDistillation needs",
    ),
    "a teacher with the student's tokens": (
        lambda: ChunkLikelihoodKD(student=student(), teacher=teacher()),
        "ChunkLikelihoodKD needs .*chunk_log_probs.*RetokenizingTeacher can",
    ),
    "a shared vocabulary": (
        lambda: ULD(**apart(tokenizer=fused_letter_tokenizer()), vocabulary="shared"),
        "vocabulary is shared, which cuts .* leave it out",
    ),
    "a temperature of the policy": (
        lambda: OnPolicyDistillation(
            **apart(teacher=AnyText(teacher(), tokenizer=fused_letter_tokenizer())),
            tokenizer=fused_letter_tokenizer(),
            temperature=2.0,
        ),
        "model.temperature is 2.0, but AnyText answers chunk_log_probs",
    ),
    "a reference": (
        lambda: OnPolicyDistillation(**apart(), reference=teacher()),
        "reference extrapolates the teacher token by token",
    ),
    "a student whose bytes are not known": (
        lambda: ChunkLikelihoodKD(**apart()),
        "the bytes of the tokens of .* are not known",
    ),
    "letters that the teacher lacks": (
        lambda: OnPolicyDistillation(**apart(tokenizer=fused_letter_tokenizer())),
        "RetokenizingTeacher knows only some texts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_before_the_first_step(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be positive"),
        ({"alpha": 1.5}, "alpha is 1.5; it weighs cross-entropy"),
        ({"divergence": "none"}, "none"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChunkLikelihoodKD(**apart(), **options)
    with pytest.raises(ValueError, match="weight is -1"):
        ULD(**apart(), weight=-1)


def test_a_row_that_is_trained_on_in_parts_is_refused():
    batch = {name: tensor.clone() for name, tensor in BATCH.items()}
    batch["labels"][2, 6] = -100
    module = ChunkLikelihoodKD(**apart(tokenizer=fused_letter_tokenizer()))
    with pytest.raises(ValueError, match=r"trained on in several parts.*data.train_on: last"):
        run(module, batch)


def test_a_row_beyond_the_teachers_positions_is_refused():
    short = LocalTeacher.of(tiny_llama(1, max_position_embeddings=6).double())
    module = ChunkLikelihoodKD(
        student=student(),
        teacher=RetokenizingTeacher(short, tokenizer=fused_letter_tokenizer()),
        tokenizer=fused_letter_tokenizer(),
    )
    with pytest.raises(ValueError, match="a row has 10 tokens of the teacher's, which reads 6"):
        run(module)


def test_a_teacher_needs_its_tokenizer():
    with pytest.raises(ValueError, match="needs the tokenizer of its teacher"):
        RetokenizingTeacher(teacher())


def test_a_routed_teacher_tells_likelihoods_of_chunks_and_no_distributions():
    routed = RoutedTeacher({"a": teacher()})
    asked = RetokenizingTeacher(routed, tokenizer=fused_letter_tokenizer())
    assert asked.answers == {"chunk_log_probs"}


def test_another_tokenizer_of_the_teacher_is_another_teacher():
    """A resumed run compares these."""
    first, second = (
        RetokenizingTeacher(LocalTeacher("./teacher"), tokenizer=tokenizer)
        for tokenizer in (fused_letter_tokenizer(), byte_level())
    )
    assert describe(first) != describe(second)
    assert describe(first) == describe(
        RetokenizingTeacher(LocalTeacher("./teacher"), tokenizer=fused_letter_tokenizer())
    )


def test_a_share_of_the_completions_is_the_students_as_in_gkd():
    module = build("chunk_gkd", "token")
    writing = OnPolicyGeneration(
        lmbda=0.5, generation=SamplingOptions(max_new_tokens=6), table_every=1
    )
    seen = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append("completion_mask" in batch)

    fit = trainer(max_steps=6, max_epochs=-1, callbacks=[writing, Seen()], **DOUBLE)
    fit.fit(module, datamodule=Letters(batch_size=4))
    assert set(seen) == {True, False}


@pytest.mark.parametrize(
    "several",
    [TeacherEnsemble, lambda members: RoutedTeacher({"a": members[0], "b": members[1]})],
    ids=["averaged", "routed"],
)
def test_several_teachers_with_one_other_tokenizer_are_asked_about_the_text(several):
    """Of one model twice, they say what it says."""
    own, other, ids, prompt, *_ = written_out()
    batch = row_batch(ids, prompt) | {"extra": {"teacher": ["b"]}}
    one, two = (
        ChunkLikelihoodKD(
            student=student(vocab_size=len(own)),
            teacher=RetokenizingTeacher(asked, tokenizer=other),
            tokenizer=own,
        )
        for asked in (
            teacher(vocab_size=len(other)),
            several([teacher(vocab_size=len(other)), teacher(vocab_size=len(other))]),
        )
    )
    same_step(one, two, batch)


def test_a_run_that_is_resumed_repeats_itself_bit_for_bit(tmp_path):
    """With a share of the student's own completions, from the middle of the run."""

    def fit(steps, folder, **more):
        module = build("chunk_gkd", "token")
        writing = OnPolicyGeneration(
            lmbda=0.5, generation=SamplingOptions(max_new_tokens=6), table_every=0
        )
        save = ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_last=True)
        settings = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True}
        run = trainer(callbacks=[writing, save], **settings, **DOUBLE)
        run.fit(module, datamodule=Letters(batch_size=4), weights_only=True, **more)
        return torch.cat([p.detach().flatten() for p in module.student.parameters()])

    whole = fit(4, "whole")
    assert not torch.equal(whole, fit(2, "half"))
    assert torch.equal(whole, fit(4, "rest", ckpt_path=str(tmp_path / "half" / "last.ckpt")))
