"""Where a model that is named is found: the arguments of the Hugging Face hub, as one value."""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ArgumentError, CheckpointError
from ..terminal import first_line
from .side_files import NOT_DOWNLOADED, WEIGHTS_BELOW, snapshot


@dataclass(frozen=True)
class HubArguments:
    """How a model that is named is found and opened.

    revision: a branch, a tag or a commit on the hub; None for the main branch.
    subfolder: where in the repository, or in a folder here, config.json lies; None for the top.
    token: for private models; None for the one that the hub's client knows (HF_TOKEN, or a login),
        False for none. It is in no message, no record and no repr.
    trust_remote_code: run the Python code in the model's folder, of which some models are made.

    Raises on construction: ArgumentError.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("revision", "subfolder"):
            value = getattr(self, name)
            if not (value is None or (isinstance(value, str) and value.strip())):
                raise ArgumentError(
                    f"{name}={reprlib.repr(value)} must be a text with something in it, or be "
                    "left out"
                )
        secret = self.token.strip() if isinstance(self.token, str) else self.token
        if not (secret is None or isinstance(secret, bool | str)) or secret == "":
            raise ArgumentError(
                f"token= is {'empty' if secret == '' else 'a ' + type(secret).__name__}; give the "
                "text of a token, or leave it out"
            )
        if isinstance(secret, str) and not (secret.isprintable() and " " not in secret):
            raise ArgumentError("token= has spaces or control characters inside; give it as it is")
        # A file that holds a token ends with a line break, which is not part of it.
        object.__setattr__(self, "token", secret)
        if self.subfolder is not None:
            path = PurePosixPath(self.subfolder)
            strange = any(character in self.subfolder for character in "\\*?[")
            if path.is_absolute() or ".." in path.parts or strange:
                raise ArgumentError(
                    f"subfolder={self.subfolder!r} must be a folder below the model's, such as "
                    "'fp16'"
                )
            object.__setattr__(self, "subfolder", str(path) if path.parts else None)

    def found(self) -> HubArguments:
        """The same for a folder that was found by these."""
        return HubArguments(trust_remote_code=self.trust_remote_code)

    def places(self) -> dict[str, Any]:
        """The keywords of transformers and of the hub's client, those that were given."""
        given = {"revision": self.revision, "subfolder": self.subfolder, "token": self.token}
        return {name: value for name, value in given.items() if value is not None}

    def download(self, name: str) -> Path:
        """The folder of the model `name` of the hub, in its cache. Raises: CheckpointError."""
        how, patterns = self.places(), list(NOT_DOWNLOADED)
        if how.pop("subfolder", None) is not None:
            patterns[patterns.index(WEIGHTS_BELOW)] = f"{self.subfolder}/{WEIGHTS_BELOW}"
            how["allow_patterns"] = [f"{self.subfolder}/*"]
        try:
            from huggingface_hub import snapshot_download

            found = snapshot_download(name, ignore_patterns=patterns, **how)
        except Exception as error:  # of many types: offline, unknown name, no rights
            at = "" if self.revision is None else f" at revision {self.revision!r}"
            reason = self.redacted(first_line(error))
            secret = isinstance(self.token, str)  # which the error that is told of may hold
            raise CheckpointError(
                f"{name} is no folder here and cannot be fetched from the Hugging Face hub{at}: "
                f"{reason}"
            ) from (None if secret else error)
        return self.inside(Path(found), name)

    def inside(self, folder: Path, name: str) -> Path:
        """The subfolder of a model's folder. Raises: CheckpointError if it is not there."""
        if self.subfolder is None:
            return folder
        found = folder / self.subfolder
        if not found.is_dir():
            others = sorted(path.parent.name for path in folder.glob("*/config.json"))
            there = f"; those with a model are {', '.join(others[:8])}" if others else ""
            raise CheckpointError(f"{name} has no folder {self.subfolder!r}{there}")
        return found

    def redacted(self, text: str) -> str:
        """A message without the token."""
        secret = self.token
        return text.replace(secret, "***") if isinstance(secret, str) and secret.strip() else text

    def origin(self, name: str | os.PathLike[str], folder: Path) -> dict[str, str | None]:
        """What a record says of a model of the hub; nothing of a folder that is no snapshot."""
        found = snapshot(folder.resolve())
        if found is None or Path(name).exists():
            return {}
        return {
            "name": str(name),
            "revision": self.revision,
            "subfolder": self.subfolder,
            "commit": found.name,
        }


ON_MAIN = HubArguments()  # where nobody says anything
