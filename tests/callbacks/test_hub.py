"""What is pushed to the hub, byte for byte, and when it is refused; against a stand-in."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.utils import get_session
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load as load_safetensors

from lightning_kd.callbacks import HFExport
from lightning_kd.callbacks.export import hub as push
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, run
from tests.support.harness import BatchList, trainer
from tests.support.hub import TOKEN, serving
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

pytestmark = [
    *EXPECTED_WARNINGS,
    # huggingface_hub 2.4 hands large files to httpx2 as it was done with requests.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),
]

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
NAME = "ada/student"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, where huggingface_hub looks for the hub."""
    with serving() as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


class Steps(ModelCheckpoint):
    begun = 0

    def on_train_batch_start(self, *_):
        self.begun += 1


def fit(export, *callbacks):
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    fitted = trainer(
        max_steps=2, max_epochs=-1, callbacks=[export, *callbacks], enable_checkpointing=True
    )
    fitted.fit(module, datamodule=BatchList([BATCH] * 2))
    return module


def refused(message, name=NAME, **options):
    """Check that no step is taken, and return what was said."""
    steps = Steps(save_top_k=0)
    with pytest.raises(ValueError, match=message) as error:
        fit(HFExport("student", push_to_hub=name, **options), steps)
    assert steps.begun == 0
    assert not Path("student").exists()
    assert TOKEN not in str(error.value)
    return str(error.value)


def test_every_file_arrives_as_it_is_here(hub, caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        module = fit(HFExport("student", push_to_hub=NAME), ModelCheckpoint("checkpoints"))
    here = {path.name: path.read_bytes() for path in Path("student").iterdir()}
    del here[".run"]
    assert hub.files[NAME] == here
    assert hub.private[NAME] is True
    assert hub.commits[NAME] == ["Export of student by lightning_kd"]
    assert f"It is pushed to {hub.address}/{NAME}" in caplog.text
    weights = load_safetensors(hub.files[NAME]["model.safetensors"])
    assert torch.equal(weights["model.norm.weight"], module.student.model.norm.weight)
    card = hub.files[NAME]["README.md"].decode()
    assert f'from_pretrained("{NAME}")' in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert TOKEN not in card


def test_a_public_repository_on_request(hub):
    fit(HFExport("student", push_to_hub="lab/student", private=False), Steps(save_top_k=0))
    assert hub.private["lab/student"] is False


def test_another_model_is_replaced_by_a_new_commit_and_nothing_of_it_is_loaded(hub):
    old = {
        "model.safetensors.index.json": b"of another model",
        "model-00001-of-00002.safetensors": b"its weights",
        "adapter_config.json": b"its adapter",
        "chat_template.jinja": b"its template",
        "LICENSE": b"a text",
        ".gitattributes": b"attributes",
    }
    hub.make(NAME)
    hub.files[NAME] = old
    fit(HFExport("student", push_to_hub=NAME), Steps(save_top_k=0))
    assert len(hub.commits[NAME]) == 2
    here = {path.name for path in Path("student").iterdir()} - {".run"}
    assert hub.files[NAME].keys() == here | {"LICENSE", ".gitattributes"}


def test_a_name_that_cannot_be_is_refused_when_it_is_given():
    for name in ("student", "a/b/c", "ada/stu dent", "ada/-x", "ada/x.git"):
        with pytest.raises(ValueError, match=r"export.push_to_hub is .* which is no user/name"):
            HFExport(push_to_hub=name)
    with pytest.raises(ValueError, match=r"export.private is false, and nothing is pushed"):
        HFExport(private=False)


def test_without_a_token_nothing_is_trained(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert "hf auth login" in refused("there is no token for the hub")
    assert hub.asked == []


def test_a_token_that_the_hub_does_not_take_is_refused_before_training(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "unknown" * 5)
    assert "HF_TOKEN environment variable is invalid" in refused("does not take the token")


@pytest.mark.parametrize("status", [403, 500, 503])
def test_what_the_hub_says_instead_is_told(hub, status):
    hub.refuses["whoami"] = status
    assert f"refused with {status}" in refused("does not take the token, or does not answer")


def test_rights_are_looked_at_before_training(hub):
    refused("the token is of ada, who may write to ada/..., lab/...", name="bob/student")
    hub.lab_role = "read"
    refused("who may write to ada/...; choose", name="lab/student")
    hub.role = "read"
    refused("the token may only read")


def scope(name, *permissions, kind="user"):
    return {"entity": {"type": kind, "name": name}, "permissions": list(permissions)}


def test_a_fine_grained_token_has_to_write_to_the_owner_or_the_repository(hub):
    hub.role = "fineGrained"
    for scopes in (
        [],
        [scope("ada", "repo.content.read")],
        [scope("lab", "repo.write", kind="org"), scope("ada/other", "repo.write", kind="model")],
    ):
        hub.scopes = scopes
        refused("the token may only read there")
    hub.scopes = [scope("ada", "repo.content.read", "repo.write")]
    fit(HFExport("student", push_to_hub=NAME), Steps(save_top_k=0))
    hub.scopes = [scope(NAME, "repo.write", kind="model")]
    fit(HFExport("again", push_to_hub=NAME), Steps(save_top_k=0))
    assert len(hub.commits[NAME]) == 2


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (b"<html>log in</html>", "what came is no JSON, but perhaps the page of a proxy"),
        (b"null", "does not say whose the token is"),
        (b"[]", "does not say whose the token is"),
        (b"{}", "does not say whose the token is"),
    ],
)
def test_an_answer_that_is_not_of_a_hub_is_called_that(hub, page, said):
    hub.pages["whoami"] = page
    assert f"export.push_to_hub is {NAME!r}, and " in refused(said)


def test_a_page_instead_of_the_repository_is_called_that(hub):
    hub.make(NAME)
    hub.pages["api/models"] = b"<html>log in</html>"
    refused("the hub at .* does not answer: what came is no JSON")


def test_a_repository_that_others_see_is_not_taken_for_a_private_one(hub):
    hub.make(NAME, private=False)
    refused("ada/student is there already, and public; .* export.private: false")
    hub.make("lab/student", private=True)
    refused("there already, and private", name="lab/student", private=False)


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, monkeypatch):
    before = get_session().timeout
    monkeypatch.setattr(push, "_ANSWER_TIMEOUT", 0.2)
    hub.silent = 2
    refused("does not answer: .*timed out")
    assert get_session().timeout == before


def test_no_hub_is_asked_where_that_is_forbidden(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("does not answer")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("part", "status"),
    [("repos/create", 409), ("repos/create", 500), ("commit/main", 403), ("commit/main", 500)],
)
def test_a_failed_upload_loses_nothing_and_says_how_to_go_on(hub, part, status):
    hub.refuses[part] = status
    export = HFExport("student", push_to_hub=NAME)
    with pytest.raises(ValueError, match=f"not pushed to {NAME}: .*refused with {status}") as error:
        fit(export, ModelCheckpoint("checkpoints", filename="last", every_n_train_steps=2))
    there = Path("student").resolve()
    assert f"hf upload {NAME} {there} . --private" in str(error.value)
    assert f"--ckpt_path {Path('checkpoints/last.ckpt').resolve()}" in str(error.value)
    assert (
        huggingface_hub.ModelCard.load(there / "README.md").data.pipeline_tag == "text-generation"
    )
    hub.refuses.clear()
    fit(HFExport("again", push_to_hub=NAME), Steps(save_top_k=0))
    weights = (there / "model.safetensors").read_bytes()
    assert hub.files[NAME]["model.safetensors"] == weights
    assert "model.safetensors" in hub.files[NAME]


def test_a_large_file_that_does_not_arrive_is_said(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", ())
    hub.refuses["blobs"] = 403
    with pytest.raises(ValueError, match=r"model.safetensors.*refused with 403"):
        fit(HFExport("student", push_to_hub=NAME), Steps(save_top_k=0))
    assert "README.md" not in hub.files[NAME]
    assert Path("student/model.safetensors").exists()


@pytest.mark.processes
def test_the_commands_push_as_a_user_types_them(hub, tmp_path):
    """In processes of their own, with the variables that a user sets."""
    variables = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
    }
    config = ["--config", CONFIGS / "sft.yaml", "--config", CONFIGS / "overlays" / "debug.yaml"]
    command = [sys.executable, "-m", "lightning_kd"]
    save = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    save["init_args"] = {"save_last": True}
    checkpoints = ["--trainer.enable_checkpointing", "true"]
    checkpoints += ["--trainer.callbacks", json.dumps([save])]
    fitted = run(
        *(*command, "fit", *config, *checkpoints, "--trainer.accelerator", "cpu"),
        *("--export.push_to_hub", "ada/first"),
        **variables,
    )
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    (checkpoint,) = Path("runs/version_0/checkpoints").glob("last.ckpt")
    exported = run(
        *(*command, "export", "--ckpt_path", checkpoint, "--export.push_to_hub", "ada/second"),
        **variables,
    )
    assert exported.returncode == 0, exported.stderr[-3000:]
    first, second = hub.files["ada/first"], hub.files["ada/second"]
    assert first["model.safetensors"] == second["model.safetensors"]
    assert "lightning-kd fit --config" in second["README.md"].decode()
    refusal = run(*command, "fit", *config, "--export.push_to_hub", "bob/x", **variables)
    assert refusal.returncode == 2
    assert "the token is of ada" in refusal.stderr
    assert not Path("runs/version_1/checkpoints").exists()
