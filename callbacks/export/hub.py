"""The repository on the Hugging Face hub to which a student is pushed."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, get_session, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lightning_kd.callbacks.export.directory import RUN

_ANSWER_TIMEOUT = 10.0
"""Seconds that the hub may take for an answer before training."""

_UPLOAD_TIMEOUT = 120.0
"""Seconds without a byte after which an upload is broken off."""

_READ_BY_NAME = [
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_*"),
    *("tokenizer*", "vocab*", "merges.txt", "*token*.json", "chat_template*"),
    *("preprocessor_config.json", "processor_config.json", "modeling_*.py", "configuration_*.py"),
]
"""Files of another model that would be loaded with, or instead of, those of this one."""


@dataclass(frozen=True)
class HubRepository:
    """A repository of models on the hub.

    Args:
        name: ``user/name``.
        private: Whether only its owners see it.

    Raises:
        ValueError: If there can be no repository of that name.
    """

    name: str
    private: bool

    def __post_init__(self) -> None:
        """Check the name."""
        try:
            validate_repo_id(self.name)
            if "/" not in self.name:
                raise HFValidationError("it does not say whose it is")
        except HFValidationError as error:
            raise ValueError(
                f"export.push_to_hub is {self.name!r}, which is no user/name of the hub: {error}"
            ) from error

    def check(self) -> None:
        """Validate, before anything is trained, that the hub will take a model.

        Raises:
            ValueError: If there is no token, the hub does not know it or cannot be asked, it may not
                write there, or the repository is there and seen by others than was asked for.
        """
        if get_token() is None:
            raise ValueError(
                f"export.push_to_hub is {self.name!r}, and there is no token for the hub: log in with "
                "hf auth login, or set HF_TOKEN to a token that may write "
                "(https://huggingface.co/settings/tokens)"
            )
        api = HfApi()
        with _patience(_ANSWER_TIMEOUT):
            try:
                known, there = api.whoami(), self._there(api)
            except Exception as error:  # whatever the network does
                raise ValueError(
                    f"export.push_to_hub is {self.name!r}, and the hub at {api.endpoint} does not take "
                    f"the token, or does not answer: {_said(error)}"
                ) from error
        if not isinstance(known, dict) or not known.get("name"):
            raise ValueError(
                f"export.push_to_hub is {self.name!r}, and {api.endpoint} does not answer as a hub: it "
                "does not say whose the token is"
            )
        self._check_rights(known)
        self._check_visibility(there)

    def push(self, directory: Path, otherwise: str = "") -> str:
        """Upload a directory as a new commit, and return its address.

        Weights and tokenizer of another model that the repository had are deleted in the same commit,
        so that nothing is loaded but this one; all else stays.

        Args:
            directory: The exported student.
            otherwise: Another way to push it, for the error.

        Raises:
            ValueError: If it does not arrive; the directory is complete.
        """
        api = HfApi()
        with _patience(_UPLOAD_TIMEOUT):
            try:
                there = self._there(api)
                self._check_visibility(there)
                if there is None:
                    api.create_repo(self.name, private=self.private)
                api.upload_folder(
                    repo_id=self.name,
                    folder_path=directory,
                    ignore_patterns=[RUN],
                    delete_patterns=_READ_BY_NAME,
                    commit_message=f"Export of {directory.name} by lightning_kd",
                )
            except Exception as error:  # whatever the network does; nothing is swallowed
                private = " --private" if self.private else ""
                raise ValueError(
                    f"the student was not pushed to {self.name}: {_said(error)}\n"
                    f"Nothing is lost: it is complete in {directory}. Upload it with\n"
                    f"  hf upload {self.name} {shlex.quote(str(directory))} .{private}{otherwise}"
                ) from error
        return f"{api.endpoint}/{self.name}"

    def _check_rights(self, known: dict[str, Any]) -> None:
        owner, who = self.name.partition("/")[0], known["name"]
        roles = {org.get("name"): org.get("roleInOrg") for org in known.get("orgs") or ()}
        own = [who, *(name for name, role in roles.items() if role != "read")]
        if owner not in own:
            raise ValueError(
                f"export.push_to_hub is {self.name!r}, and the token is of {who}, who may write to "
                f"{', '.join(f'{name}/...' for name in own)}; choose one of these, or another token"
            )
        token = (known.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read" or not self._in_scope(token.get("fineGrained")):
            raise ValueError(
                f"export.push_to_hub is {self.name!r}, and the token may only read there; give one "
                "that may write (https://huggingface.co/settings/tokens)"
            )

    def _in_scope(self, granted: dict[str, Any] | None) -> bool:
        """Return whether a token may write, as far as it has scopes at all."""
        if granted is None:
            return True
        writable = [
            scope.get("entity", {}).get("name")
            for scope in granted.get("scoped") or ()
            if "repo.write" in scope.get("permissions", ())
        ]
        return self.name in writable or self.name.partition("/")[0] in writable

    def _there(self, api: HfApi) -> ModelInfo | None:
        try:
            return api.model_info(self.name, timeout=_ANSWER_TIMEOUT)
        except RepositoryNotFoundError:
            return None  # it will be made

    def _check_visibility(self, there: ModelInfo | None) -> None:
        if there is None:
            return
        if there.private is not None and there.private != self.private:
            seen = "private" if there.private else "public"
            raise ValueError(
                f"{self.name} is there already, and {seen}; pushing does not change that. Give "
                f"export.private: {str(there.private).lower()}, change it on the hub, or choose "
                "another export.push_to_hub"
            )


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Bound every wait for the hub, whose client waits for ever."""
    session = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


def _said(error: BaseException) -> str:
    """Return what came, in one line, with the cause of an error that hides it."""
    if isinstance(error, json.JSONDecodeError):
        return "what came is no JSON, but perhaps the page of a proxy or of a login"
    said = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    return said if cause is None else f"{said} ({_said(cause)})"
