"""The faults in what is done with a whole model: presets, windows that are held back, embeddings
and heads, orders of channels, and the comparison with the dense model.

Most of them give a folder that opens and a model that speaks, only worse than it should be, or a
number that looks better than the model is.
"""

from __future__ import annotations

from .fault import Fault

PRESETS = ("tests/compression/test_presets.py",)
STORED = ("tests/methods/test_stored_form.py",)
TABLES = ("tests/nn/test_embedding.py",)
SCALED = ("tests/models/test_scaled_embedding.py",)
HELD_BACK = ("tests/compression/test_held_back.py",)
ERRORS = ("tests/compression/test_model.py::test_errors_are_those_of_the_compressed_prefix",)
HEAD = ("tests/compression/test_head.py",)
ORDERS = ("tests/compression/test_orders.py",)
AGAINST = ("tests/evaluate/test_against.py",)
CHAT = ("tests/cli/test_chat.py",)
TOTALS = ("tests/models/test_totals.py",)
PADDING = ("tests/text/test_reader.py", "tests/compression/test_padding.py")
BY_PATTERN = ("tests/compression/test_by_pattern.py",)
HUB = ("tests/models/test_hub.py",)
SHARDING = ("tests/engines/test_sharding.py",)

WHOLE_MODEL = (
    # Presets and group sizes
    Fault(
        "a preset with a plane too many",
        "slab_kernels/compression/*.py", '"int4", 2, SMALL_EMBEDDINGS',
        '"int4", 3, SMALL_EMBEDDINGS', PRESETS,
    ),
    Fault(
        "what was asked for stays dense where the model cannot have it",
        "slab_kernels/compression/*.py",
        "tuple(name for name in outside if given[name] is None)", "tuple(outside)",
        (*PRESETS, *HEAD),
    ),
    Fault(
        "the smallest group size that fits",
        "slab_kernels/format/*.py", "(-in_features % size, -size)", "(-in_features % size, size)",
        STORED,
    ),
    Fault(
        "padding that is named for every layer",
        "slab_kernels/format/*.py", "if layout.padded_in_features > layout.in_features:",
        "if layout.padded_in_features >= layout.in_features:", PRESETS,
    ),
    # Embeddings of int8 rows
    Fault(
        "codes for a scale that is rounded afterwards",
        "slab_kernels/format/*.py", "scales = _stored(largest / MOST_CODE)",
        "scales = (largest / MOST_CODE)", TABLES,
    ),
    Fault(
        "the scales of the first rows for every piece of a head",
        "slab_kernels/nn/*.py", ".mul_(scales[piece].to(kind))",
        ".mul_(scales[: len(codes[piece])].to(kind))", TABLES,
    ),
    Fault(
        "rows that are not multiplied once the folder is opened again",
        "slab_kernels/models/*.py",
        'Int8Embedding(*sizes, "meta", embedding.weight.dtype, entry.multiplier)',
        'Int8Embedding(*sizes, "meta", embedding.weight.dtype)', SCALED,
    ),
    Fault(
        "rows that are not multiplied in the dense model of a packed one",
        "slab_kernels/nn/*.py", "        if self.multiplier is None:\n", "        if True:\n",
        SCALED,
    ),
    Fault(
        "an embedding whose class does more than its number says",
        "slab_kernels/models/*.py",
        "return multiplier if same and multiplier not in (0.0, 1.0) else None",
        "return multiplier", SCALED,
    ),
    Fault(
        "the first rank's rows of the vocabulary on every rank",
        "slab_kernels/engines/*.py", "return Slice(layout, first, count, 0, layout.in_features)",
        "return Slice(layout, 0, count, 0, layout.in_features)", SHARDING,
    ),
    # Windows that judge
    Fault(
        "layers fitted to the windows that judge them",
        "slab_kernels/compression/*.py", "calibration = caught(tokens.fitted)",
        "calibration = caught(tokens.calibration)", HELD_BACK,
    ),
    Fault(
        "held-back windows that are the fitted ones",
        "slab_kernels/compression/*.py", "judging = moments(self.held_back, groups)",
        "judging = moments(self.calibration, groups)", HELD_BACK,
    ),
    Fault(
        "held-out errors of the windows that a layer was fitted to",
        "slab_kernels/compression/*.py", "relative_error(weight, dense, judging)",
        "relative_error(weight, dense, inputs.stats.matrix)", ERRORS,
    ),
    Fault(
        "the text that was given for judging is not the one that judges",
        "slab_kernels/compression/*.py",
        "return self.stats.held_back if self.heldout is None else self.heldout.gram",
        "return self.stats.held_back", ERRORS,
    ),
    Fault(
        "outputs from before matching in the statistics behind it",
        "slab_kernels/compression/*.py",
        "self.streams.forget()  # what training changes", "# what training changes",
        (*HELD_BACK, "tests/compression/test_matching.py"),
    ),
    # Texts with padding, settings by pattern, models by name
    Fault(
        "padding that is read as text",
        "slab_kernels/text/*.py", "kept.append(row[mask.bool()])", "kept.append(row)", PADDING,
    ),
    Fault(
        "a field that is named and not read",
        "slab_kernels/text/*.py", "return self._named(row, self.field, where)", "pass", PADDING,
    ),
    Fault(
        "the earlier of two patterns wins",
        "slab_kernels/compression/*.py", "found |= settings", "found = settings | found",
        BY_PATTERN,
    ),
    Fault(
        "a token in the JSON of a measurement",
        "slab_kernels/cli/*.py", "*without_token(arguments)])", "*arguments])", HUB,
    ),
    Fault(
        "the main branch in place of the revision",
        "slab_kernels/models/*.py", 'given = {"revision": self.revision, ', "given = {", HUB,
    ),
    # The head
    Fault(
        "a head that is judged by the windows that it was fitted to",
        "slab_kernels/compression/*.py", "grams.append(inputs.judging)",
        "grams.append(inputs.stats.matrix)", HEAD,
    ),
    Fault(
        "the magnitudes of a head from its first rows alone",
        "slab_kernels/compression/*.py", "torch.arange(rows, device=weight.device) * N // rows",
        "torch.arange(rows, device=weight.device)", HEAD,
    ),
    # Orders of channels
    Fault(
        "an order of a value head that its writer does not get",
        "slab_kernels/models/*.py", "parts = [*_linear(block, prefix, value, 0, head * size)]",
        "parts: list[Part] = []", ORDERS,
    ),
    Fault(
        "every value head in the order that suits the first",
        "slab_kernels/compression/*.py", "costs[n][:, start : start + size] for n, start in",
        "costs[n][:, :size] for n, start in", ORDERS,
    ),
    Fault(
        "norms of a model in memory that keep the old order",
        "slab_kernels/compression/*.py", "for name in source.moves.keys() - replaced}",
        'for name in source.moves.keys() - replaced if "norm" not in name}', ORDERS,
    ),
    # The comparison with the dense model, chats, totals
    Fault(
        "the divergence the other way round",
        "slab_kernels/evaluate/*.py", "p.exp() * (p - q)", "q.exp() * (q - p)", AGAINST,
    ),
    Fault(
        "the standard error of tokens, which are not independent",
        "slab_kernels/evaluate/*.py", ".reshape(windows, -1).mean(1)", "", AGAINST,
    ),
    Fault(
        "windows of the model with more positions",
        "slab_kernels/evaluate/*.py", "limits[1] < (limits[0] or math.inf)",
        "limits[1] > (limits[0] or math.inf)", AGAINST,
    ),
    Fault(
        "a chat that begins twice",
        "slab_kernels/evaluate/*.py", "tokenizer(text, add_special_tokens=False, return",
        "tokenizer(text, return", CHAT,
    ),
    Fault(
        "a packed head that was the embedding counted as more parameters",
        "slab_kernels/models/*.py",
        "if not (tied and _is_packed_head(layouts, name, vocabulary)):", "if True:", TOTALS,
    ),
)  # fmt: skip
