"""What comes from elsewhere is data: never code, a path, a format string or markup."""

import json
import pickle
from pathlib import Path, PosixPath

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.callbacks.text_tables import markdown_table
from lightning_kd.checkpoints import AtomicCheckpointIO
from lightning_kd.data import ChatData, PromptCompletionData, arithmetic_tokenizer
from lightning_kd.integrity import checksums, write_about
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.strategies.directories import read_safely
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import trainer
from tests.support.toys import tiny_llama


class Command:
    def __reduce__(self):
        return exec, ("from pathlib import Path; Path('executed').touch()",)


def test_a_checkpoint_is_not_executed(tmp_path):
    torch.save({"state_dict": Command()}, "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is no checkpoint that can be read safely"):
        AtomicCheckpointIO().load_checkpoint("evil.ckpt")
    assert not Path("executed").exists()
    # It would have worked: the user may still say so.
    AtomicCheckpointIO().load_checkpoint("evil.ckpt", weights_only=False)
    assert Path("executed").exists()


def shards(folder, state):
    """A directory as all processes would write it, by one."""
    torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    describe_as_the_library_does(Path(folder))
    return Path(folder)


def describe_as_the_library_does(folder):
    """Whoever writes a hostile directory writes its checksums, too."""
    about = {"saved_by": {"strategy": "fsdp2"}, "weights": {}, "run": {}, "step": 1, "best": None}
    write_about(folder, about | {"weights_only": False, "checksums": checksums(folder)})


def read(folder, weights_only=True):
    strategy = SingleDeviceStrategy("cpu")
    strategy._lightning_module = L.LightningModule()
    strategy._lightning_module.trainer = trainer()
    state = {"tensor": torch.zeros(2), "bytes": None}
    with read_safely(strategy, Path(folder), {"strategy": "fsdp2"}, weights_only):
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)
    return state


def names_a_command(folder):
    (folder / ".metadata").write_bytes(pickle.dumps({"planner": Command()}))


def of_one_process(folder):
    """torch falls back on it where the common index cannot be read."""
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(Command()))


def no_index(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(1))
    (folder / "__0.metadata").write_bytes(pickle.dumps(1))


def gives_a_class_a_state(folder):
    """What follows would find another class of this name."""
    changed = b"\x80\x02cpathlib\nPosixPath\nN}X\x04\x00\x00\x00openK\x01s\x86b."
    (folder / ".metadata").write_bytes(changed)


def of_something_else(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(torch.distributed.checkpoint.FileSystemReader))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    "attack",
    [names_a_command, of_one_process, no_index, gives_a_class_a_state, of_something_else],
)
def test_the_index_of_shards_is_not_executed(attack):
    good = {"tensor": torch.ones(2), "bytes": "linear"}
    folder = shards("shards", good)
    assert read("shards")["bytes"] == "linear"
    attack(folder)
    describe_as_the_library_does(folder)
    with pytest.raises(ValueError, match=r"\.metadata is no checkpoint that can be read safely"):
        read("shards")
    assert not Path("executed").exists()
    assert callable(PosixPath.open)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_what_is_no_tensor_in_a_shard_is_not_executed():
    """torch asks for pickle there."""
    shards("evil", {"tensor": torch.ones(2), "bytes": Command()})
    with pytest.raises(ValueError, match="evil is no checkpoint that can be read safely"):
        read("evil")
    assert not Path("executed").exists()
    # It would have worked: the user may still say so.
    read("evil", weights_only=False)
    assert Path("executed").exists()


def test_pickled_weights_of_a_model_are_not_executed():
    tiny_llama(0).save_pretrained("model")
    Path("model/model.safetensors").unlink()
    torch.save({"lm_head.weight": Command()}, "model/pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the model"):
        LocalTeacher("model").load(arithmetic_tokenizer(), "teacher")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(template):
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = template
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    Path("chat.jsonl").write_text(json.dumps(row))
    data = ChatData(tokenizer=tokenizer, train="chat.jsonl")
    with pytest.raises(Exception, match=r"unsafe|undefined|not safe"):
        data.rows("train")
    assert not Path("executed").exists()


HOSTILE = "../../{prompt}{0.__class__}%s<script>alert(1)</script>|`x`\x1b[31m$(touch executed)"


def test_the_text_of_a_row_stays_text(tmp_path):
    """Through template, rollouts, JSONL and tables it is what it was; nothing is made of it."""
    letters = sorted(set(HOSTILE))
    tokenizer = letter_tokenizer_of(letters)
    Path("rows.jsonl").write_text(
        "\n".join([json.dumps({"prompt": HOSTILE, "completion": HOSTILE})] * 4)
    )
    data = PromptCompletionData(
        tokenizer=tokenizer, train="rows.jsonl", prompt_template="Q {prompt}", batch_size=4
    )
    size = len(tokenizer)
    module = GKD(
        student=StudentSpec.of(tiny_llama(0, vocab_size=size, max_position_embeddings=256)),
        teacher=LocalTeacher.of(tiny_llama(1, vocab_size=size, max_position_embeddings=256)),
    )
    before = {path for path in Path().rglob("*") if path.is_file()}
    writing = OnPolicyGeneration(path="rollouts.jsonl", table_every=0)
    trainer(max_steps=1, callbacks=[writing]).fit(module, datamodule=data)
    rows = [json.loads(line) for line in Path("rollouts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Q " + HOSTILE] * 4
    made = {path for path in Path().rglob("*") if path.is_file()} - before
    assert {path.name for path in made} - {"rollouts.jsonl"} <= {
        path.name for path in made if "datasets" in path.parts
    }
    table = markdown_table(("prompt",), [(HOSTILE,)])
    assert "<script>" not in table
    assert table.count("\n") == 2


def letter_tokenizer_of(letters):
    from tests.support.toys import letter_tokenizer

    return letter_tokenizer("".join(["Q", " ", *(x for x in letters if x not in "Q ")]))
