"""The quantizer by which transformers (>= 5.0) opens and writes packed folders.

It serves plain `from_pretrained` and `save_pretrained`, and `import slab_kernels` registers it. A
process that does not import this library opens such a folder with **random** linears, with a
warning about missing weights and exit code 0: `models.packed.check` finds a model opened so.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ArgumentError, CheckpointError
from ..format import FORMAT_VERSION
from ..models.experts import mixtures, restack
from ..models.folder import Checkpoint, hub_folder
from ..models.hub import HubArguments
from ..models.load import load
from ..models.model_config import check_counts, read_generation_config
from ..models.packed import (
    check,
    check_finite,
    check_tensors_fit,
    packed_modules,
    read_packed,
    swap_in,
)
from ..models.packed_config import (
    DESCRIBED,
    QUANT_METHOD,
    TABLES_KEY,
    UNTIED_KEY,
    parse_layouts,
    quantization_config,
)
from ..models.shards import CHECKSUMS, checksum, tensor_bytes
from ..models.side_files import snapshot
from ..models.skeleton import computes
from ..models.tables import parse_tables, read_table, set_row_types, table_modules, undo_tables
from ..models.ties import holds, retie, untie
from ..nn.preparation import check_words, prepare_opened
from ..terminal import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ADJUST = "_adjust_missing_and_unexpected_keys"  # where transformers learns what it could not load
LOADING = "LOADING_ATTRIBUTES_CONFIG_TYPES"  # of transformers 5.2x; 5.0 takes none of ours
# So many blocks are built in a second; names of packed modules say little of how many there are.
MANY_BLOCKS = 512
_REGISTERING = threading.Lock()
# These keywords of `compress` say how it runs, and are checked only when it does.
OF_THE_RUN = (
    "calibration", "heldout", "field", "tokenizer", "device", "progress",
    "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip


class SlabConfig(QuantizationConfigMixin):
    """How a model is compressed, or was.

    `from_pretrained(dense, quantization_config=SlabConfig(values="int4"))` compresses what it
    loads; the keywords are those of `slab_kernels.compress` (method, rank, values, planes,
    adapter_rank, bits, matching, settings_by_pattern, calibration, samples, window, skip, ...; the
    pattern is 2:4). Read back from config.json it lists the packed modules.

    prefill: whether dense copies serve many tokens, as `slab_kernels.load` takes it. It is nothing
        of the folder's and is not stored. `from_pretrained(packed, quantization_config=
        SlabConfig(prefill="dense"))` takes it from here, and `activations`, and nothing else.
    activations: how x enters products on a CPU, as `slab_kernels.load` takes it; as little stored.

    Raises: ArgumentError, MethodError or a FormatError on settings that contradict each other,
        CheckpointError or VersionError on a stored config that this library cannot read.
    """

    modules: dict[str, dict[str, Any]] | None

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        prefill: str | None = None,
        embeddings: str | dict[str, dict[str, Any]] | None = None,
        activations: str | None = None,
        **settings: Any,
    ):
        check_words(prefill, activations)
        self.quant_method, self.prefill, self.activations = QUANT_METHOD, prefill, activations
        self.format_version = format_version
        self.modules, self.settings = modules, settings
        self.embeddings: dict[str, dict[str, Any]] | None = None
        if modules is None:
            if embeddings is not None:
                self.settings[TABLES_KEY] = embeddings
            self._check_settings()
            return
        stored = {"format_version": format_version, "modules": modules, TABLES_KEY: embeddings}
        layouts = parse_layouts(stored, "this model")
        tables = parse_tables(stored, "this model")
        plain = {key: value for key, value in settings.items() if isinstance(value, str | int)}
        entry = quantization_config(layouts, plain, tables)
        self.modules = entry["modules"]
        self.settings = {key: entry[key] for key in (*DESCRIBED, UNTIED_KEY) if key in entry}
        self.embeddings = entry.get(TABLES_KEY)
        if self.embeddings:  # in memory it may have been raised from that of packed linears alone
            self.format_version = entry["format_version"]

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> SlabConfig | tuple[SlabConfig, dict[str, Any]]:
        """What config.json holds, without keys that are not known. Raises: as the class does."""
        modules = config_dict.get("modules")
        described: dict[str, Any] = {key: config_dict.get(key) for key in (*DESCRIBED, UNTIED_KEY)}
        described["format_version"] = config_dict.get("format_version")
        if modules is not None:
            described[TABLES_KEY] = config_dict.get(TABLES_KEY)
        config = cls({} if modules is None else modules, **described)
        return (config, kwargs) if return_unused_kwargs else config

    def _check_settings(self) -> None:
        # This is not imported above because opening a packed folder needs no methods.
        from ..compression.arguments import Arguments

        given = {name: value for name, value in self.settings.items() if name not in OF_THE_RUN}
        layer = Arguments.of(**given).plan.usual
        if not layer.packed:
            raise ArgumentError(
                f"SlabConfig(pattern={layer.pattern!r}): only 2:4 can be packed; "
                f"slab_kernels.compress(model, out, pattern={layer.pattern!r}) writes other "
                "patterns as a dense checkpoint"
            )

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained` of a packed folder takes from the config that it is given."""
        words = {"prefill": self.prefill, "activations": self.activations}
        return {name: word for name, word in words.items() if word is not None}

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json under quantization_config."""
        entry = {"quant_method": self.quant_method, "format_version": self.format_version}
        keys = [key for key in (*DESCRIBED, UNTIED_KEY) if key in self.settings]
        entry |= {key: self.settings[key] for key in keys}
        if self.modules is not None:
            entry["modules"] = {name: dict(module) for name, module in self.modules.items()}
        if self.embeddings:
            entry[TABLES_KEY] = {name: dict(table) for name, table in self.embeddings.items()}
        return entry

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class SlabQuantizer(HfQuantizer):
    """What transformers calls while it opens a model that is packed, or to be compressed.

    Packed modules are put into the skeleton before the weights come and checked after; a dense
    model is compressed once its weights are there.
    """

    _found: Mapping[str, Any] = MappingProxyType({})  # where the dense model was, see `_found_at`
    requires_calibration = False  # True would forbid compressing in from_pretrained
    quantization_config: SlabConfig

    def validate_environment(
        self, *args: Any, device_map: str | dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Raises: ArgumentError for places where packed layers do not work."""
        places = {str(device_map)}
        if isinstance(device_map, dict):
            places = set(map(str, device_map.values()))
        if "meta" in places:
            raise ArgumentError(
                "device_map='meta' holds no weights, and packed ones are checked on opening; "
                "give a device"
            )
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ArgumentError(
                f"device_map puts parts of the model on {', '.join(sorted(places))}: packed layers "
                "keep what they prepare where they first ran, so parts cannot be fetched from a "
                "disk or CPU for each call; give one device, or several GPUs"
            )

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Check the config, which transformers shows before it builds the model.

        5.0 shows it by this method, 5.23 by the one below.
        """
        if self.pre_quantized:
            names = self.quantization_config.modules or {}
            where = config._name_or_path or "this model"
            check_counts(config.to_dict(), names, where, few=MANY_BLOCKS)
        return config

    update_attn_implementation = update_tp_plan

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self._found = _found_at(model, checkpoint_files or [])
            return
        if not checkpoint_files:
            raise CheckpointError(
                "a packed model opens from its folder only, not from a state_dict; save it first"
            )
        entry, kind = self.quantization_config.to_dict(), type(model).__name__
        swap_in(model, parse_layouts(entry, kind), parse_tables(entry, kind))
        checkpoint = Checkpoint(_folder(model, checkpoint_files), checkpoint_files)
        read_generation_config(checkpoint.folder)  # transformers reads it later, unchecked
        check_tensors_fit(checkpoint, model)
        checkpoint.verify()
        for module in model.modules():
            if not computes(module):  # all its tensors come from files
                module._is_hf_initialized = True
        # A mixer initialises the weights of the linears inside it, so there has to be one.
        for linear in packed_modules(model).values():
            linear.weight = torch.empty(linear.out_features, linear.in_features, device="meta")
        if hasattr(model, ADJUST):
            setattr(model, ADJUST, _Refusing(getattr(model, ADJUST)))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            return self._compress(model)
        vars(model).pop(ADJUST, None)
        for module in packed_modules(model).values():
            del module.weight
        # On a CPU transformers loads views of the mapped file, which may change.
        for t in (*model.parameters(), *model.buffers()):
            if t.device.type == "cpu":
                t.data = t.data.clone()
        for name, module in packed_modules(model).items():
            read_packed(model.get_buffer, name, module.layout)
            module.requires_grad_(False)  # the loader turns it back on for a bias
        for name, embedding in table_modules(model).items():
            read_table(model.get_buffer, name, embedding)
        set_row_types(model, model.dtype)
        buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in model.state_dict().items():
            check_finite(name, tensor, name in buffers)
        if not holds(model):
            untie(model)
        prepare_opened(model, model.dtype, **self._words())
        return model

    def _words(self) -> dict[str, Any]:
        """How the layers are prepared, as `prepare_opened` takes it."""
        config = self.quantization_config
        return {"prefill": config.prefill, "activations": config.activations}

    def _compress(self, model: PreTrainedModel) -> PreTrainedModel:
        from ..compression.model import compress

        where, dtype = model.device, model.dtype
        del model.config.quantization_config  # marks a compressed model, which `compress` refuses
        # The tokenizer of a text for calibration is that of the revision that was opened.
        defaults, words = {"device": where, "progress": False, **self._found}, self._words()
        compress(model, None, **defaults | self.quantization_config.settings)
        self.quantization_config = SlabConfig(**model.config.quantization_config, **words)
        model.config.quantization_config, self.pre_quantized = self.quantization_config, True
        model.to(device=where, dtype=dtype).eval()
        prepare_opened(model, dtype, **words)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        # transformers gives config.dtype, which is a string once the model has been saved.
        dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype
        for name, module in packed_modules(model).items():
            model.set_submodule(name, module.to_linear(dtype))
        if stacks := mixtures(model):
            for path in stacks:
                restack(model, path)
            # What transformers noted on opening knows no stacks; without it, it asks its tables.
            vars(model).pop("_weight_conversions", None)
        if undo_tables(model, dtype):
            retie(model)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[None, dict[str, str]]:
        """The metadata of every shard that `save_pretrained` writes: checksums of all tensors.

        A tensor stands there by each name that transformers may give it (`save_original_format`
        decides); a name of two contents has none.
        """
        from transformers.core_model_loading import revert_weight_conversion

        state = model.state_dict()
        checksums = {name: checksum(tensor_bytes(t)) for name, t in state.items()}
        for name, t in revert_weight_conversion(model, dict(state)).items():
            if t is not state.get(name):
                found = checksum(tensor_bytes(t))
                if checksums.setdefault(name, found) != found:
                    del checksums[name]
        return None, {CHECKSUMS: json.dumps(checksums, separators=(",", ":"))}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: LoRA around packed layers (engines/peft.py) is what transformers' Trainer trains.

        It refuses a packed model without an adapter.
        """
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Refusing:
    """transformers' own reckoning of what it could not load, with an error instead of a warning."""

    def __init__(self, adjust: Callable[..., Any]):
        self.adjust = adjust

    def __call__(self, *found: Any) -> Any:
        result = self.adjust(*found)  # 5.0 gives and returns names; others change them
        missing, unexpected = result or (found[0].missing_keys, found[0].unexpected_keys)
        kinds = (("has no weight for", missing), ("has no use for the weight", unexpected))
        for what, names in kinds:
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise CheckpointError(
                    f"transformers {what} {min(names)!r}{more}: a packed folder opens with exactly "
                    "its own weights or not at all"
                )
        return result


def _folder(model: PreTrainedModel, files: list[str]) -> Path:
    """Where the weights lie. Raises: CheckpointError if that is outside the model's folder."""
    here, named = Path(files[0]).parent, Path(model.config._name_or_path)
    if named.is_dir() and os.path.relpath(here, named).split(os.sep)[0] == os.pardir:
        raise CheckpointError(f"the shard {str(files[0])!r} does not lie in {named}; copy it there")
    return here


def _found_at(model: PreTrainedModel, files: list[str]) -> dict[str, Any]:
    """Which commit of the hub, and which folder below the model's, its files were read from."""
    if not files:
        return {}
    here, named = Path(files[0]).parent, Path(model.config._name_or_path)
    top = snapshot(here)
    found: dict[str, Any] = {} if top is None or named.is_dir() else {"revision": top.name}
    top = named if named.is_dir() else top
    if top is not None and here != top and here.is_relative_to(top):
        found["subfolder"] = here.relative_to(top).as_posix()
    return found


def register() -> None:
    """Register config and quantizer with transformers.

    Calling it again, or from several threads, does no harm.
    """
    with _REGISTERING:
        if auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD) is not SlabConfig:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
            auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
            auto.register_quantizer(QUANT_METHOD)(SlabQuantizer)
            auto.register_quantization_config(QUANT_METHOD)(SlabConfig)
        # From a config of these classes `from_pretrained` takes loading attributes.
        taking = getattr(auto, LOADING, None)
        if isinstance(taking, tuple) and SlabConfig not in taking:
            setattr(auto, LOADING, (*taking, SlabConfig))


def compare(
    folder: Path | str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """Open a packed folder by `slab_kernels.load` and by `from_pretrained`, and compare the models.

    trust_remote_code: run the Python code in the folder, of which some models are made. revision,
    subfolder, token: of a model on the hub, see `load`.

    Returns: {"folder", "transformers" (version), "tensors" (compared)}.
    Raises: CheckpointError if a tensor differs or a layer came as random numbers, and whatever
        `load` raises.
    """
    from transformers import AutoModelForCausalLM, __version__

    path = hub_folder(folder, HubArguments(revision, subfolder, token, trust_remote_code))
    ours = load(path, trust_remote_code=trust_remote_code)
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, MemoryError):  # among them are all errors of this library
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers {__version__} cannot open it, slab_kernels.load does: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    check(theirs)
    state, found = ours.state_dict(), theirs.state_dict()
    for name in sorted(state.keys() | found.keys()):
        both = name in state and name in found
        if not both or not torch.equal(state[name], found[name].to(state[name].dtype)):
            raise CheckpointError(
                f"{folder}: transformers {__version__} reads tensor {name!r} otherwise than it is "
                "stored; use slab_kernels.load"
            )
    return {"folder": str(folder), "transformers": __version__, "tensors": len(state)}


register()
