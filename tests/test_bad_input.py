"""Whatever is wrong is said in a few lines, with exit code 2, before the first step."""

import json
import os
import pickle
import shutil
import time
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_kd.data import arithmetic_tokenizer
from tests.support.command_line import EXPECTED_WARNINGS, SMALL, fit
from tests.support.toys import letter_tokenizer, tiny_llama

pytestmark = [
    *EXPECTED_WARNINGS,
    pytest.mark.filterwarnings("ignore:The .train. split"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol 4"),
]

KD = ["--model.teacher.name_or_path", "teacher"]
ENGINES = (
    "choose CachedSampler or ContinuousBatchingSampler or SpeculativeSampler or "
    "TransformersContinuousBatching or TransformersEngine"
)
JSONL = [*KD, "--data", "PromptCompletionData", "--data.tokenizer", "teacher"]
CHAT = [*KD, "--data", "ChatData", "--data.tokenizer", "chat"]
TEXT = [*KD, "--data", "PackedTextData", "--data.tokenizer", "teacher"]
STUDENT = ["--model.student.name_or_path", "start"]
GOOD = {"prompt": "1+1=", "completion": "2"}


def write(name, *rows):
    Path(name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


def saved(name, tokenizer=None, **model):
    tiny_llama(1, **{"vocab_size": 14, **model}).save_pretrained(name)
    (tokenizer or arithmetic_tokenizer()).save_pretrained(name)
    return Path(name)


@pytest.fixture(scope="module")
def made(saved_teacher, tmp_path_factory):
    """A directory with everything that the table names, made once."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(saved_teacher, folder / "teacher")
    with chdir(folder):
        make()
    return folder


@pytest.fixture
def files(made, tmp_path):
    """Everything that the table names, as files of one's own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def make():
    write("good.jsonl", GOOD)
    write("question.jsonl", {"question": "1+1=", "completion": "2"})
    write("empty.jsonl")
    write("broken.jsonl", GOOD, '{"prompt": ')
    write("number.jsonl", GOOD, {"prompt": "1+1=", "completion": 2})
    write("null.jsonl", GOOD, {"prompt": "1+1=", "completion": None})
    write("list.jsonl", GOOD, "[1, 2]")
    write("noprompt.jsonl", GOOD, {"prompt": "", "completion": "2"})
    Path("latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "2"}\n')
    write("data.xyz", "1+1=2")
    write("twice.csv", "prompt,prompt", "1+1=,2")
    write("wide.csv", "prompt,completion", "1+1=,2,3")
    write("bad.parquet", "PAR1")
    write("short.txt", "1+1")
    write("user.jsonl", {"messages": [{"role": "user", "content": "1+1="}]})
    write("nolist.jsonl", {"messages": "1+1="})
    write("roles.jsonl", {"messages": [{"content": "1"}, {"role": "assistant", "content": "2"}]})
    write("broken.yaml", "model: [")
    write("list.yaml", "- 1")
    write("typo.yaml", "data: {init_args: {trian_size: 5}}")
    write("trainer.yaml", "trainer: {max_step: 1}")
    write("no_student.yaml", "model: {init_args: {student: {config: null}}}")
    template = "tokenizer: teacher, train: good.jsonl, prompt_template: {Q: {prompt: null}}"
    write("template.yaml", f"data: {{class_path: PromptCompletionData, init_args: {{{template}}}}}")
    write("broken.json", "{")
    Path("folder").mkdir()
    chat = arithmetic_tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat.save_pretrained("chat")
    endless = arithmetic_tokenizer()
    endless.eos_token = None
    endless.save_pretrained("endless")
    saved("other", letter_tokenizer("9876543210+="))
    saved("start")
    saved("wide", vocab_size=21)
    saved("short", max_position_embeddings=8)
    for name, fields in (("three_layers", {"num_hidden_layers": 3}), ("one_layer", {})):
        config = saved(name) / "config.json"
        fields = {"num_hidden_layers": 1} | fields
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    weights = saved("renamed") / "model.safetensors"
    save_file({f"x.{n}": w for n, w in load_file(weights).items()}, weights, {"format": "pt"})
    write("words.jsonl", {"prompt": "1+1=" * 9, "completion": "2"})
    write("plain.txt", "1+1=2" * 199)
    saved("narrow", vocab_size=9)
    (saved("cut") / "model.safetensors").write_bytes(
        Path("teacher/model.safetensors").read_bytes()[:2000]
    )
    (saved("nothing_in_it") / "model.safetensors").write_bytes(b"")
    (saved("no_json") / "config.json").write_text("{")
    (saved("no_weights") / "model.safetensors").unlink()
    code = json.loads((saved("remote") / "config.json").read_text())
    code |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    Path("remote/config.json").write_text(json.dumps(code))
    Path("remote/mine.py").write_text("open('../executed', 'w').write('remote code')\n")
    checkpoint = {"pytorch-lightning_version": "2.6.0", "loops": {}, "state_dict": {}}
    torch.save(checkpoint | {"lightning_kd": {"method": "SFT"}}, "sft.ckpt")
    torch.save(checkpoint | {"lightning_kd": {"method": "SupervisedKD"}}, "hollow.ckpt")
    write("text.ckpt", "no checkpoint at all")
    Path("cut.ckpt").write_bytes(Path("sft.ckpt").read_bytes()[:300])
    with Path("evil.ckpt").open("wb") as file:
        pickle.dump(Evil(), file)
    torch.save(checkpoint | {"state_dict": Evil()}, "evil_zip.ckpt")
    shutil.copytree("teacher", "directory.ckpt")


class Evil:
    """Runs a command of its own where it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo pickle > executed",)


def gkd(*more):
    return "gkd", [*KD, *more]


def minillm(*more):
    return "minillm", [*KD, *STUDENT, *more]


def rl(*more):
    return "rl_distillation", [*KD, *STUDENT, *more]


TABLE = {
    # What a command line or a config says.
    "unknown divergence": (
        [*KD, "--model.divergence", "jsd"],
        ["unknown divergence 'jsd'", "generalized_jsd"],
    ),
    "beta outside": (
        [*KD, "--model.divergence", "GeneralizedJSD", "--model.divergence.beta", "1.5"],
        ["beta", "1.5", "[0, 1]"],
    ),
    "skew outside": (
        [*KD, "--model.divergence", "SkewKL", "--model.divergence.alpha", "1"],
        ["alpha", "1"],
    ),
    "alpha outside": ([*KD, "--model.alpha", "2"], ["alpha is 2", "[0, 1]"]),
    "temperature zero": ([*KD, "--model.temperature", "0"], ["temperature", "0", "positive"]),
    "unknown option": (
        [*KD, "--model.zzz", "0.5"],
        ["--model.zzz", "choices are", "--model.alpha"],
    ),
    "misspelt option": (
        [*KD, "--data.trian_size", "5"],
        ["--data.trian_size", "did you mean --data.train_size?"],
    ),
    "misspelt class": ([*KD, "--modle.alpha", "0"], ["did you mean --model.alpha?"]),
    "abbreviated option": (
        [*KD, "--trainer.max_step", "1"],
        ["--trainer.max_step", "did you mean --trainer.max_steps?"],
    ),
    "abbreviated export": ([*KD, "--export.dir", "x"], ["did you mean --export.dirpath?"]),
    "abbreviation of several": (
        [*KD, "--trainer.max=1"],
        ["--trainer.max_epochs or --trainer.max_steps or --trainer.max_time?"],
    ),
    "misspelt option of the data in a file": (
        [*KD, "--config", "typo.yaml"],
        ["'trian_size'", "did you mean train_size?", "typo.yaml"],
    ),
    "misspelt option of the trainer in a file": (
        [*KD, "--config", "trainer.yaml"],
        ["max_step'", "did you mean trainer.max_steps?", "trainer.yaml"],
    ),
    "wrong type": ([*KD, "--model.alpha", "much"], ["alpha", "much", "float"]),
    "unknown normalization": ([*KD, "--model.normalization", "mean"], ["'mean'", "token"]),
    "unknown method": (["--model", "SuperKD"], ["SuperKD"]),
    "unknown data": ([*KD, "--data", "SuperData"], ["SuperData"]),
    "unknown logits": ([*KD, "--model.logits_backend", "SparseLogits"], ["SparseLogits"]),
    "no chunk": (
        [
            *KD,
            "--model.logits_backend",
            "FusedLogits",
            "--model.logits_backend.chunk_megabytes",
            "0",
        ],
        ["chunk_megabytes is 0", "a whole number, 1 or more"],
    ),
    "option of a class that is not named": (
        [*KD, "--model.logits_backend.compile", "always"],
        [
            "--model.logits_backend.compile is an option of a class: name it before, "
            "--model.logits_backend CLASS",
            "choose DenseLogits or FusedLogits",
        ],
    ),
    "unknown optimizer": ([*KD, "--model.optimizer", "torch.optim.Adamant"], ["Adamant"]),
    "unknown optimizer option": ([*KD, "--model.optimizer.lr2", "1"], ["lr2"]),
    "negative learning rate": (
        [*KD, "--model.optimizer.lr", "-1"],
        ["optimizer", "Invalid learning rate: -1"],
    ),
    "negative warm-up": ([*KD, "--model.lr_scheduler.warmup_steps", "-1"], ["warmup_steps", "-1"]),
    "unknown action": ([*KD, "--non_finite.action", "ignore"], ["ignore", "skip"]),
    "missing config": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "config is no YAML": (["--config", "broken.yaml"], ["broken.yaml"]),
    "config is a list": (["--config", "list.yaml"], ["list.yaml"]),
    "config is a directory": (["--config", "folder"], ["folder"]),
    # What the trainer is told.
    "no end": (
        [*KD, "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"],
        ["max_steps or trainer.max_epochs"],
    ),
    "negative steps": ([*KD, "--trainer.max_steps", "-5"], ["max_steps", "-5"]),
    "val_check_interval": (
        [*KD, "--trainer.val_check_interval", "9999", "--trainer.check_val_every_n_epoch", "1"],
        ["val_check_interval is 9999", "check_val_every_n_epoch: null"],
    ),
    "no accumulation": ([*KD, "--trainer.accumulate_grad_batches", "0"], ["accumulate", "0"]),
    "unknown strategy": ([*KD, "--trainer.strategy", "dddp"], ["unknown strategy 'dddp'", "fsdp2"]),
    "FSDP1": ([*KD, "--trainer.strategy", "fsdp"], ["fsdp"]),
    "DeepSpeed": ([*KD, "--trainer.strategy", "deepspeed"], ["deepspeed"]),
    "no devices": ([*KD, "--trainer.devices", "0"], ["devices", "0"]),
    "no accelerator": ([*KD, "--trainer.accelerator", "tpu"], ["torch_xla"]),
    "precision": ([*KD, "--trainer.precision", "17-mixed"], ["17-mixed", "bf16-mixed"]),
    "clipping": ([*KD, "--trainer.gradient_clip_algorithm", "cut"], ["cut", "norm"]),
    "logging": ([*KD, "--trainer.log_every_n_steps", "-1"], ["log_every_n_steps", "-1"]),
    "batch size finder": (
        [*KD, "--trainer.callbacks", "[{class_path: BatchSizeFinder}]"],
        ["BatchSizeFinder", "data.batch_size"],
    ),
    "learning rate finder": (
        [*KD, "--trainer.callbacks", "[{class_path: LearningRateFinder}]"],
        ["LearningRateFinder", "model.optimizer.lr"],
    ),
    # What is exported.
    "export over the teacher": (
        [*KD, "--export.dirpath", "./teacher", "--export.overwrite", "true"],
        ["is the teacher of this run"],
    ),
    "export over another model": (
        [*KD, "--export.dirpath", "other"],
        ["a model in", "export.overwrite: true"],
    ),
    "export over a file": ([*KD, "--export.dirpath", "good.jsonl"], ["a file of that name"]),
    "export nowhere": ([*KD, "--export.dirpath", "/proc/student"], ["/proc/student"]),
    "no best weights": ([*KD, "--export.weights", "best"], ["no ModelCheckpoint has a monitor"]),
    # Data.
    "missing file": ([*JSONL, "--data.train", "no.jsonl"], ["'no.jsonl' does not exist"]),
    "no matching file": ([*JSONL, "--data.train", "no*.jsonl.gz"], ["no*.jsonl.gz"]),
    "no data": (JSONL, ["was not given data.train"]),
    "unknown ending": ([*JSONL, "--data.train", "data.xyz"], ["data.xyz"]),
    "folder without data": ([*JSONL, "--data.train", "./folder"], ["folder"]),
    "hub name without network": ([*JSONL, "--data.train", "no/such"], ["'no/such'"]),
    "missing column": (
        [*JSONL, "--data.train", "question.jsonl"],
        ["question.jsonl:1", "'prompt' is missing", "question"],
    ),
    "empty": ([*JSONL, "--data.train", "empty.jsonl"], ["empty.jsonl has no rows"]),
    "invalid JSON": (
        [*JSONL, "--data.train", "broken.jsonl"],
        ["broken.jsonl:2", "not valid JSON"],
    ),
    "wrong row type": (
        [*JSONL, "--data.train", "number.jsonl"],
        ["number.jsonl:2", "'completion' must be text or a list of texts, got int 2"],
    ),
    "null": ([*JSONL, "--data.train", "null.jsonl"], ["null.jsonl:2", "got nothing"]),
    "row is a list": ([*JSONL, "--data.train", "list.jsonl"], ["list.jsonl:2", "object"]),
    "empty prompt": ([*JSONL, "--data.train", "noprompt.jsonl"], ["noprompt.jsonl:2", "no tokens"]),
    "not UTF-8": ([*JSONL, "--data.train", "latin.jsonl"], ["latin.jsonl:1", "UTF-8"]),
    "column twice": ([*JSONL, "--data.train", "twice.csv"], ["twice.csv:1", "twice"]),
    "too many cells": ([*JSONL, "--data.train", "wide.csv"], ["wide.csv:2", "more cells"]),
    "no Parquet": ([*JSONL, "--data.train", "bad.parquet"], ["bad.parquet", "Parquet"]),
    "long prompt": (
        [*JSONL, "--data.train", "good.jsonl", "--data.max_length", "4"],
        ["good.jsonl:1", "prompt has 4 tokens", "truncation: drop"],
    ),
    "all dropped": (
        [
            *JSONL,
            *("--data.train", "good.jsonl", "--data.max_length", "4", "--data.truncation", "drop"),
        ],
        ["all 1 rows", "max_length=4"],
    ),
    "unknown truncation": (
        [*JSONL, "--data.train", "good.jsonl", "--data.truncation", "middle"],
        ["middle", "left"],
    ),
    "no length": ([*JSONL, "--data.train", "good.jsonl", "--data.max_length", "0"], ["max_length"]),
    "template that YAML takes for a mapping": (
        [*KD, "--config", "template.yaml"],
        ["prompt_template", "'Q': {'prompt': None}", "needs quotes"],
    ),
    "template without place": (
        [*JSONL, "--data.train", "good.jsonl", "--data.prompt_template", "Q:"],
        ["'Q:'", "{prompt}"],
    ),
    "batch size": ([*KD, "--data.batch_size", "0"], ["batch_size is 0"]),
    "workers": ([*KD, "--data.num_workers", "-1"], ["num_workers is -1"]),
    "no answer": ([*CHAT, "--data.train", "user.jsonl"], ["user.jsonl:1", "assistant"]),
    "messages no list": ([*CHAT, "--data.train", "nolist.jsonl"], ["nolist.jsonl:1", "a list"]),
    "no role": ([*CHAT, "--data.train", "roles.jsonl"], ["roles.jsonl:1", "role"]),
    "no chat template": (
        [*CHAT, "--data.train", "user.jsonl", "--data.tokenizer", "teacher"],
        ["chat template"],
    ),
    "text too short": (
        [*TEXT, "--data.train", "short.txt", "--data.block_length", "8"],
        ["too few for blocks of 8"],
    ),
    "block of one": (
        [*TEXT, "--data.train", "short.txt", "--data.block_length", "1"],
        ["block_length is 1"],
    ),
    "no tokenizer": (
        [*JSONL, "--data.train", "good.jsonl", "--data.tokenizer", "./nowhere"],
        ["tokenizer", "'./nowhere'"],
    ),
    "no EOS": (
        [*JSONL, "--data.train", "good.jsonl", "--data.tokenizer", "endless"],
        ["no EOS"],
    ),
    # Models.
    "missing teacher": (
        ["--model.teacher.name_or_path", "./nowhere"],
        ["model directory './nowhere' does not exist"],
    ),
    "hub model without network": (["--model.teacher.name_or_path", "no/such"], ["'no/such'"]),
    "folder without a model": (["--model.teacher.name_or_path", "./folder"], ["'./folder'"]),
    "weights cut short": (["--model.teacher.name_or_path", "cut"], ["'cut'"]),
    "weights of no bytes": (["--model.teacher.name_or_path", "nothing_in_it"], ["nothing_in_it"]),
    "no weights": (["--model.teacher.name_or_path", "no_weights"], ["'no_weights'"]),
    "config.json is no JSON": (["--model.teacher.name_or_path", "no_json"], ["no_json"]),
    "code in a model": (["--model.teacher.name_or_path", "remote"], ["trust_remote_code"]),
    "tokenizer mismatch": (
        ["--model.teacher.name_or_path", "other"],
        ["tokenizer mismatch", "'0' is"],
    ),
    "vocabulary mismatch": (
        ["--model.teacher.name_or_path", "wide"],
        ["student has 14 logits", "teacher 21", "vocabulary: shared"],
    ),
    "vocabulary too small": (["--model.teacher.name_or_path", "narrow"], ["teacher", "9"]),
    "two origins": ([*KD, "--model.student.name_or_path", "teacher"], ["both came"]),
    "no origin": ([*KD, "--config", "no_student.yaml"], ["neither came"]),
    "no model type": ([*KD, "--model.student.config", "{hidden_size: 16}"], ["lacks model_type"]),
    "tensors under other names": (
        ["--model.teacher.name_or_path", "renamed"],
        ["'renamed'", "21 missing", "21 not part of the architecture", "x.lm_head.weight"],
    ),
    "layers that were never saved": (
        ["--model.teacher.name_or_path", "three_layers"],
        ["9 missing", "model.layers.2."],
    ),
    "layers that are not in the config": (
        ["--model.teacher.name_or_path", "one_layer"],
        ["9 not part of the architecture", "model.layers.1."],
    ),
    "misspelt field": (
        [*KD, "--model.student.config", SMALL.replace("_layers", "_layer")],
        ["'num_hidden_layer'", "did you mean num_hidden_layers?"],
    ),
    "student of no layers": (
        [*KD, "--model.student.config", SMALL.replace("layers: 1", "layers: 0")],
        ["num_hidden_layers is 0"],
    ),
    "student of no width": (
        [*KD, "--model.student.config", SMALL.replace("hidden_size: 16", "hidden_size: 0")],
        ["hidden_size is 0"],
    ),
    "teacher that is the student": (
        minillm("--model.student.name_or_path", "./teacher"),
        ["student and teacher are both"],
    ),
    "long rows": (
        [*JSONL, "--data.train", "words.jsonl", "--model.teacher.name_or_path", "short"],
        ["train rows take up to 38 tokens", "teacher has 8 positions", "max_positions"],
    ),
    "long blocks": (
        [*TEXT, "--data.train", "plain.txt", "--data.block_length", "300"],
        ["train rows take up to 300 tokens", "teacher has 256 positions"],
    ),
    "positions that do not exist": (
        [
            *(*KD, "--model.student.config"),
            "{model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 8}",
        ],
        ["student has 8 positions", "13 tokens"],
    ),
    "unknown model type": (
        [*KD, "--model.student.config", SMALL.replace("llama", "lama")],
        ["config of the student", "lama"],
    ),
    "impossible sizes": (
        [*KD, "--model.student.config", SMALL.replace("heads: 2", "heads: 3")],
        ["config of the student"],
    ),
    "config in no file": ([*KD, "--model.student.config", "nowhere.json"], ["nowhere.json"]),
    "config file is no JSON": ([*KD, "--model.student.config", "broken.json"], ["readable JSON"]),
    "unknown dtype": ([*KD, "--model.student.dtype", "float8"], ["float8", "bfloat16"]),
    "unknown attention": ([*KD, "--model.student.attn_implementation", "magic"], ["magic"]),
    "no rank": ([*KD, "--model.student.lora.r", "0"], ["r is 0"]),
    "nothing to adapt": (
        [*KD, "--model.student.lora.target_modules", "nonsense"],
        ["nonsense", "target"],
    ),
    "unknown placement": ([*KD, "--model.teacher.placement", "moon"], ["'moon'", "replicated"]),
    "shards without shards": (
        [*KD, "--model.teacher.placement", "sharded"],
        ["placement: sharded", "fsdp2"],
    ),
    "no such device": ([*KD, "--model.teacher.placement", "cuda:7"], ["cuda:7"]),
    "quantization without its package": (
        [*KD, "--model.teacher.quantization", "{quant_method: quanto, weights: int8}"],
        ["optimum-quanto"],
    ),
    "quantized weights elsewhere": (
        [
            *(*KD, "--model.teacher.placement", "offloaded"),
            *("--model.teacher.quantization", "{quant_method: bitsandbytes, load_in_8bit: true}"),
        ],
        ["placement 'offloaded' of a quantized model", "placement: replicated"],
    ),
    "unknown quantization": (
        [*KD, "--model.teacher.quantization", "{quant_method: magic}"],
        ["magic"],
    ),
    # Checkpoints.
    "missing checkpoint": ([*KD, "--ckpt_path", "no.ckpt"], ["'no.ckpt' does not exist"]),
    "checkpoint of another method": (
        [*KD, "--ckpt_path", "sft.ckpt"],
        ["written by SFT, this is SupervisedKD"],
    ),
    "hollow checkpoint": (
        [*KD, "--ckpt_path", "hollow.ckpt"],
        ["another student", "not there in the checkpoint"],
    ),
    "text for a checkpoint": ([*KD, "--ckpt_path", "text.ckpt"], ["text.ckpt"]),
    "checkpoint cut short": ([*KD, "--ckpt_path", "cut.ckpt"], ["cut.ckpt"]),
    "directory for a checkpoint": ([*KD, "--ckpt_path", "directory.ckpt"], ["directory.ckpt"]),
    "malicious checkpoint": ([*KD, "--ckpt_path", "evil.ckpt"], ["evil.ckpt"]),
    "malicious archive": ([*KD, "--ckpt_path", "evil_zip.ckpt"], ["evil_zip.ckpt"]),
    # Rollouts.
    "lmbda outside": (gkd("--on_policy.lmbda", "2"), ["lmbda", "2"]),
    "temperature below zero": (
        gkd("--on_policy.generation.temperature", "-1"),
        ["temperature", "-1"],
    ),
    "top_p zero": (gkd("--on_policy.generation.top_p", "0"), ["top_p", "0"]),
    "nothing written": (gkd("--on_policy.generation.max_new_tokens", "0"), ["max_new_tokens", "0"]),
    "teacher writes alone": (gkd("--on_policy.mixture_alpha", "1"), ["mixture_alpha is 1"]),
    "completions beyond the positions": (
        gkd("--on_policy.generation.max_new_tokens", "250"),
        ["max_new_tokens take up to 258 tokens", "teacher has 256 positions"],
    ),
    "samples beyond the positions": (
        [
            *(*KD, "--trainer.callbacks", "[{class_path: CompletionSamples}]"),
            *("--model.student.config", SMALL[:-1] + ", max_position_embeddings: 100}"),
        ],
        ["CompletionSamples take up to 136", "student has 100 positions"],
    ),
    "rollouts into the data": (
        gkd(*JSONL[2:], "--data.train", "good.jsonl", "--on_policy.path", "./good.jsonl"),
        ["on_policy.path is 'good.jsonl'", "reads as its data"],
    ),
    "rollouts for nothing": (
        ("sft", ["--on_policy.lmbda", "1"]),
        ["SFT learns the completions of the data", "GKD"],
    ),
    "engine of old": (
        gkd("--on_policy.engine", "transformers"),
        [
            "engine",
            "transformers",
            ENGINES,
        ],
    ),
    "engine of the module": (
        [*KD, "--model.engine", "cached"],
        ["cached", ENGINES],
    ),
    "engine among the options": (
        gkd("--on_policy.generation.engine", "cached"),
        ["'engine' is not accepted", "beside generation: --on_policy.engine"],
    ),
    "engine among the options of the module": (
        [*KD, "--model.generation.engine", "cached"],
        ["'engine' is not accepted", "beside generation: --model.engine"],
    ),
    "engine without beams": (
        [*KD, "--model.engine", "CachedSampler", "--model.generation.num_beams", "2"],
        ["CachedSampler has no beam search", "TransformersEngine"],
    ),
    "engine without mixtures": (
        gkd("--on_policy.engine", "TransformersEngine", "--on_policy.mixture_alpha", "0.2"),
        ["TransformersEngine cannot sample from a mixture", "CachedSampler"],
    ),
    "rows at once for slots": (
        gkd("--on_policy.engine", "ContinuousBatchingSampler", "--on_policy.rows_at_once", "4"),
        ["rows_at_once is 4", "ContinuousBatchingSampler", "leave rows_at_once out"],
    ),
    "no group": (gkd("--on_policy.group_size", "0"), ["group_size", "0"]),
    "odd group": (
        gkd("--on_policy.group_size", "3", "--data.batch_size", "4"),
        ["group_size 3", "batch_size"],
    ),
    "unknown truncation of rollouts": (gkd("--on_policy.truncated", "cut"), ["cut", "keep"]),
    "too few windows": (
        gkd("--on_policy.health.windows", "2"),
        ["health.windows is 2", "4 or more"],
    ),
    "more likely tokens than all": (
        gkd("--on_policy.health.overlap_k", "99"),
        ["health.overlap_k is 99", "lower it"],
    ),
    "nothing to unshard": (gkd("--on_policy.unshard", "true"), ["unshard", "fsdp2"]),
    "writer elsewhere": (
        gkd("--on_policy.mixture_alpha", "0.2", "--model.teacher.placement", "cpu"),
        ["placement is 'cpu'", "offloaded"],
    ),
    "data for a policy gradient": (minillm("--on_policy.lmbda", "0.5"), ["lmbda: 1"]),
    "truncated sampling": (minillm("--on_policy.generation.top_k", "5"), ["top_k", "5"]),
    "two temperatures": (minillm("--on_policy.generation.temperature", "0.5"), ["0.5", "same"]),
    "no such reward": (rl("--model.rewards", "[no.such.reward]"), ["no.such.reward"]),
    "reward is no function": (rl("--model.rewards", "[math.pi]"), ["math.pi"]),
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.usefixtures("files")
def test_bad_input_is_a_short_error_before_the_first_step(fails, case):
    arguments, expected = TABLE[case]
    config, arguments = arguments if isinstance(arguments, tuple) else ("supervised_kd", arguments)
    command = fit(config, *arguments)
    if config in {"minillm", "rl_distillation"}:  # their students have been trained before
        at = command.index(SMALL)
        del command[at - 1 : at + 1]
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    began = time.perf_counter()
    said = fails(*command)
    assert time.perf_counter() - began < 20
    for text in expected:
        assert text in said, said
    assert len(said.splitlines()) <= 12, said
    assert not Path("executed").exists()
    # Nothing that was there is another now, and nothing was trained.
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(Path().rglob("student/model.safetensors"))
    assert not list(Path().glob("runs/version_*")), "a run that never began takes no number"


def test_data_that_has_changed_is_named_by_a_resumed_run(cli, fails, teacher):
    write("train.jsonl", *[GOOD] * 8)
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 2, "save_last": True, "dirpath": "checkpoints"},
    }
    command = fit("supervised_kd", *JSONL, "--data.train", "train.jsonl", "--data.batch_size", "2")
    command += ["--trainer.enable_checkpointing", "true"]
    command += ["--trainer.callbacks", json.dumps([checkpoint])]
    cli(*command)
    resume = ["--ckpt_path", "checkpoints/last.ckpt", "--trainer.max_steps", "4"]
    rows = Path("train.jsonl").read_text()
    write("train.jsonl", *[GOOD] * 7, {"prompt": "1+1=", "completion": "3"})
    said = fails(*command, *resume)
    assert "data has changed since the checkpoint was written: train.jsonl" in said
    # The same rows under another name are the same data.
    write("moved.jsonl", rows)
    cli(*command, *resume, "--data.train", "moved.jsonl")
