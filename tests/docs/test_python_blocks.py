"""Every Python block of the documents runs, statement by statement, beside tiny models."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.documents import DOCUMENTS, provide, python_blocks, text_of

OPENERS = {"load", "from_pretrained", "compress", "decompress"}
OPTIONAL = ("peft",)  # blocks that import one of these run where it is installed
NEEDS_A_GPU = ('"cuda"', "'cuda'", "vllm", "torchrun")
WITH_BLOCKS = [document for document in DOCUMENTS if python_blocks(text_of(document))]


def opened_folders(statement: ast.stmt) -> list[tuple[str, bool]]:
    """Folder names that a statement opens, and whether a dense model belongs there."""
    found = []
    for call in ast.walk(statement):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        if name in OPENERS and isinstance(call.args[0], ast.Constant):
            quantized = any(keyword.arg == "quantization_config" for keyword in call.keywords)
            found.append((str(call.args[0].value), name == "compress" or quantized))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_BLOCKS, ids=lambda document: document.stem)
def test_python_blocks_run(document, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in python_blocks(text_of(document)):
        if any(f"from {name} import" in block and not find_spec(name) for name in OPTIONAL):
            continue
        for statement in ast.parse(block).body:
            code = ast.unparse(statement)
            if any(word in code for word in NEEDS_A_GPU):
                continue
            for name, dense in opened_folders(statement):
                provide(models, name, dense)
            exec(compile(code, str(document), "exec"), namespace)


@pytest.mark.slow
def test_the_readme_shows_four_ways_to_start_and_a_layer():
    blocks = python_blocks(text_of(DOCUMENTS[0]))
    assert len(blocks) == 3 and any("torch.nn.Linear(" in block for block in blocks)
    assert "vllm serve" in text_of(DOCUMENTS[0])


@pytest.mark.slow
def test_a_block_that_fails_is_seen(tmp_path):
    page = Path(tmp_path, "page.md")
    page.write_text("```python\nassert 1 == 2\n```\n", encoding="utf-8")
    (block,) = python_blocks(text_of(page))
    with pytest.raises(AssertionError):
        exec(block, {})
