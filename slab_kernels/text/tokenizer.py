"""A model folder's tokenizer, and a text as its token ids."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from ..terminal import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
MAX_TOKENIZER_FILE = 1 << 28  # bytes; a vocabulary of a million tokens takes a tenth


def open_tokenizer(
    path: str | Path, trust_remote_code: bool = False, **where: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    trust_remote_code: run Python code that the folder brings along; nobody is asked. where:
    keywords of transformers for a name of the hub (revision, subfolder, token).

    Raises: CheckpointError if there is none that works.
    """
    from transformers import AutoTokenizer

    for file in Path(path).glob("*"):
        read = file.suffix in TOKENIZER_FILES and file.is_file()
        if read and file.stat().st_size > MAX_TOKENIZER_FILE:
            raise CheckpointError(
                f"{file} is larger than {MAX_TOKENIZER_FILE >> 20} MiB, which no tokenizer's file "
                "is; copy or download it again"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **where
        )
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it knows special tokens only")  # transformers made one up
        # Some settings fail only when a text is encoded and decoded.
        tokenizer.decode(tokenizer("a text", verbose=False)["input_ids"])
        return tokenizer
    except Exception as error:  # transformers raises many types for unusable files
        if "trust_remote_code=True" in str(error) and not trust_remote_code:
            reason = "it is a program in that folder, which runs only with trust_remote_code=True"
        else:
            reason = first_line(error)
        raise CheckpointError(
            f"no tokenizer can be loaded from {path} ({reason}); give tokenizer= or put its files "
            "there"
        ) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of `text` [tokens] int64, with no special tokens added.

    Raises: CalibrationError for what is no text.
    """
    if not isinstance(text, str):
        raise CalibrationError(
            f"{reprlib.repr(text)} is no text; `text.source.read_text` reads a file, a folder or a "
            "list of texts"
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
