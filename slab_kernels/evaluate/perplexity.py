"""What a compressed model is worth: perplexity, output error of every layer, tokens per second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CalibrationError, CheckpointError
from ..models.blocks import batch_size, find_blocks
from ..models.packed import check
from ..nn import SlabLinear
from ..terminal import first_line
from ..text.source import Sampling, tokenize, windows
from ..text.token_ids import check_fits, text_config, token_ids

LOGITS_AT_ONCE = 1 << 26  # tokens * vocabulary whose logits are held at a time: 256 MiB in fp32


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Around a model's own code, which fails in any way where the values of its config do not fit together.

    Raises: CheckpointError that names its folder, instead of what transformers and torch raise; errors of this library,
    of memory, devices, files and packages as they are.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("slab_kernels") or "DefaultCPUAllocator" in str(error):
            raise
        folder = getattr(getattr(model, "config", None), "_name_or_path", None)
        raise CheckpointError(
            f"the model of {folder or type(model).__name__} does not run: {type(error).__name__}: {first_line(error)}; "
            "its config.json and generation_config.json may be damaged"
        ) from error


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer,
    text: str,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """exp of the mean negative log-likelihood per token.

    `text` is cut without overlap into windows of the BOS token and window-1 tokens of text (window tokens where the
    tokenizer has no BOS); the tail that fills no window is left out, as is usual, unless it is all there is. Every
    token of a window is predicted once but the first of all (the BOS). Likelihoods are summed in fp64.

    Args:
        text: the text itself (`text.read_text` reads one).
        window: default 2048, cut to the model's maximum positions.
        progress: called with the windows done and those in all.

    Returns: {"perplexity", "tokens" (predicted), "windows", "window"}.
    Raises: CalibrationError for an empty text, or a window longer than the model's positions; CheckpointError for a packed model that
    transformers opened with random weights.
    """
    limit = getattr(text_config(check(model)), "max_position_embeddings", None)
    window = Sampling(window=min(2048, limit or 2048) if window is None else window).window
    if limit is not None and window > limit:
        raise CalibrationError(f"window={window} is longer than the model's {limit} positions")
    ids = tokenize(tokenizer, text)
    pieces = (
        [w for w in windows(ids, window, tokenizer.bos_token_id) if len(w) > 1] if len(ids) else []
    )
    pieces = [w for w in pieces if len(w) == window] or pieces
    if not pieces:
        raise CalibrationError(f"the evaluation text has {len(ids)} tokens; at least 2 are needed")
    check_fits(torch.cat(pieces), model, "evaluation", tokenizer)
    vocabulary, device = (
        model.get_input_embeddings().weight.shape[0],
        model.get_input_embeddings().weight.device,
    )
    total, tokens, done = 0.0, 0, 0
    for batch in _batches(
        pieces, max(1, min(batch_size(window), LOGITS_AT_ONCE // (window * vocabulary)))
    ):
        batch = batch.to(device)
        with running(model):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        total += float(loss.double().sum())
        tokens += loss.numel()
        done += len(batch)
        if progress is not None:
            progress(done, len(pieces))
    mean = total / tokens
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "tokens": tokens,
        "windows": len(pieces),
        "window": window,
    }


def _batches(pieces: list[Tensor], size: int):
    start = 0
    while start < len(pieces):
        end = start + 1
        while end < len(pieces) and end - start < size and len(pieces[end]) == len(pieces[start]):
            end += 1
        yield torch.stack(pieces[start:end])
        start = end


@torch.no_grad()
def layer_errors(
    dense_model: nn.Module, compressed_model: nn.Module, tokens: Tensor
) -> dict[str, float]:
    """||X (W - W')^T|| / ||X W^T|| of every compressed linear, X its inputs in the compressed model on `tokens`.

    Args:
        tokens: ids [samples, window] of held-out text in any form of `token_ids` (`text.sample_windows` makes them).

    Compared are all SlabLinear modules, and all nn.Linear of the decoder blocks whose weight differs from the dense
    model's. Returns module name -> error, in the model's order.
    """
    dense, ids = dict(dense_model.named_modules()), token_ids(tokens, "held-out")
    if ids is None:
        raise CalibrationError(
            "layer errors are measured on token ids [samples, window], not on text; `text.sample_windows` makes them"
        )
    check_fits(ids, compressed_model, "held-out")
    path, _ = find_blocks(compressed_model)
    compared: list[str] = []
    for name, module in compressed_model.named_modules():
        if not name.startswith(path + ".") or type(module) not in (nn.Linear, SlabLinear):
            continue
        original = dense.get(name)
        if type(original) is not nn.Linear or original.weight.shape != (
            module.out_features,
            module.in_features,
        ):
            raise CalibrationError(
                f"the dense model has no nn.Linear {name} of {module.out_features}x{module.in_features}"
            )
        if isinstance(module, SlabLinear) or not torch.equal(
            module.weight.float(), original.weight.float().to(module.weight.device)
        ):
            compared.append(name)
    sums = {name: [0.0, 0.0] for name in compared}

    def watch(name: str):
        def see(module, args):
            x = args[0].flatten(0, -2).float()
            weight = dense[name].weight.float().to(x.device)
            stored = (
                module.packed().dense() if isinstance(module, SlabLinear) else module.weight.float()
            )
            for position, matrix in enumerate(
                (weight - stored, weight)
            ):  # decoded anew: 7B in fp32 would not fit twice
                sums[name][position] += float((x @ matrix.T).square().sum(dtype=torch.float64))

        return see

    handles = [
        compressed_model.get_submodule(name).register_forward_pre_hook(watch(name))
        for name in compared
    ]
    device = compressed_model.get_input_embeddings().weight.device
    try:
        for batch in ids.split(batch_size(ids.shape[1])):
            with running(compressed_model):
                compressed_model(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: math.sqrt(error / whole) if whole else 0.0 for name, (error, whole) in sums.items()
    }


def continuation(
    model: nn.Module, tokenizer, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0
) -> tuple[Tensor, float]:
    """The ids that follow `prompt`, at most `tokens` and no more than the model has positions for,
    and the seconds taken.

    temperature: 0 takes the most probable token, more draws by `seed`. Raises: CalibrationError for
    a prompt that is empty, too long, or has tokens that the model does not know.
    """
    inputs, tokens = _prompt(model, tokenizer, prompt, tokens)
    torch.manual_seed(Sampling(seed=seed).seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    start = time.perf_counter()
    with torch.inference_mode(), running(model):
        out = model.generate(**inputs, max_new_tokens=tokens, **sampling)
    return out[0, inputs["input_ids"].shape[1] :], time.perf_counter() - start


def _prompt(model: nn.Module, tokenizer, prompt: str, tokens: int) -> tuple[dict[str, Tensor], int]:
    """The prompt as `generate` takes it, and how many of `tokens` fit behind it.

    Raises: CalibrationError.
    """
    if not isinstance(prompt, str) or any("\ud800" <= c <= "\udfff" for c in prompt):
        raise CalibrationError(f"the prompt {prompt!r} is no text in UTF-8")
    inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    length = inputs["input_ids"].numel()
    if not length:
        raise CalibrationError(
            "the prompt is empty and this tokenizer adds no start token; give some text to go on from"
        )
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and length >= limit:
        raise CalibrationError(
            f"the prompt has {length} tokens, which leaves none of the model's {limit} positions; shorten it"
        )
    check_fits(inputs["input_ids"], model, "prompt's", tokenizer)
    device = model.get_input_embeddings().weight.device
    return {name: t.to(device) for name, t in inputs.items()}, tokens if limit is None else min(
        tokens, limit - length
    )


@torch.no_grad()
def tokens_per_second(model: nn.Module, tokenizer, prompt: str, new_tokens: int = 128) -> float:
    """Speed of greedy decoding through `model.generate`: tokens after the first over the time they take.

    The time of a run that makes one token (the prompt and all overhead) is subtracted; both runs are warmed up.
    """
    if new_tokens < 2:
        raise ArgumentError(f"new_tokens={new_tokens} must be at least 2 to time decoding")
    inputs, new_tokens = _prompt(model, tokenizer, prompt, new_tokens)
    device = inputs["input_ids"].device

    def run(count: int) -> float:
        began = time.perf_counter()
        with running(model):
            model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    run(2)
    first = min(run(1) for _ in range(2))
    whole = min(run(new_tokens) for _ in range(2))
    # On a busy machine a single-token run may take as long as the whole: then its time is not taken off.
    return (new_tokens - 1) / (whole - first) if whole > 1.1 * first else new_tokens / whole
