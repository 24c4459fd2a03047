"""The model that a config.json describes, built without memory for its weights.

What is allocated without values goes to the meta device; what a model computes from its config
(rotary tables, masks) is real. The torch mode that does this belongs to one thread, so other
threads see nothing of it; `init_empty_weights` of accelerate patches nn.Module for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ArchitectureError, CheckpointError, FormatError
from ..terminal import first_line
from .model_config import check_sizes, config_dtype, config_parts
from .shards import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WITHOUT_VALUES = (torch.empty, torch.empty_permuted, torch.empty_strided)
DEFAULT_DTYPE = (
    *WITHOUT_VALUES, torch.zeros, torch.ones, torch.rand, torch.randn, torch.eye, torch.linspace,
    torch.logspace,
)  # fmt: skip
# The numbers given decide whether these make the default dtype.
MAYBE_DEFAULT_DTYPE = (torch.tensor, torch.full, torch.arange, torch.scalar_tensor)


def folder_skeleton(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a folder: parameters on meta, computed buffers real.

    trust_remote_code: run the Python code in the folder, where its config names some.

    Raises: CheckpointError if the config cannot be read or no model can have its sizes,
        ArchitectureError if transformers has no causal model for it, or it needs code of the
        folder's that may not run.
    """
    from transformers import AutoConfig

    where = folder / "config.json"
    with _one_sentence(where):
        described = read_json(where)
        if not isinstance(described.get("model_type"), str):
            raise CheckpointError(
                f"{where} names no model_type; it is no Hugging Face model config"
            )
        if not trust_remote_code:
            _refuse_own_code(described, folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return _causal_model(config, where, trust_remote_code)


def config_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a config in memory, built as `folder_skeleton` builds one.

    Raises: as `folder_skeleton`.
    """
    where = "the given config"
    with _one_sentence(where):
        return _causal_model(config, where, trust_remote_code=False)


@contextmanager
def _one_sentence(where: Path | str) -> Iterator[None]:
    """Around transformers' reading of a config, whose senseless values surface as anything.

    An IndexError is among that, and the RuntimeError of an allocator.
    """
    try:
        yield
    except (CheckpointError, ArchitectureError, FormatError):
        raise
    except ImportError as error:
        raise ArchitectureError(
            f"transformers cannot build the model of {where} here: {first_line(error)}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"transformers cannot use {where}: {first_line(error)}") from error


def _refuse_own_code(described: dict[str, Any], folder: Path) -> None:
    """Raises: ArchitectureError for a type that transformers lacks and the folder's code has."""
    from transformers import CONFIG_MAPPING

    if described.get("auto_map") and described["model_type"] not in CONFIG_MAPPING:
        raise ArchitectureError(
            f"{folder} holds a model of its own Python code (model_type "
            f"{described['model_type']!r}), which was not run; read the .py files there, and if "
            "you trust them give trust_remote_code=True"
        )


def _causal_model(
    config: PreTrainedConfig, where: Path | str, trust_remote_code: bool
) -> PreTrainedModel:
    """The skeleton of a config, in evaluation mode.

    transformers would make the config's dtype the default of the whole process while it builds, so
    the config says none meanwhile.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    check_sizes(config, where)
    own_code = trust_remote_code and "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise ArchitectureError(
            f"transformers builds no causal language model for {config.model_type!r}"
        )

    def make() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    named = config.get_text_config().dtype or config.dtype or torch.get_default_dtype()
    dtype = config_dtype({"dtype": str(named)}) or torch.get_default_dtype()
    dtypes = [(part, part.dtype) for part in config_parts(config)]
    for part, _ in dtypes:
        part.dtype = None
    try:
        return build(make, dtype).eval()
    finally:
        for part, own in dtypes:
            part.dtype = own


class _Unfilled(TorchFunctionMode):
    """Inside, tensors without values are made on meta, and those without dtype in `dtype`.

    torch.set_default_dtype would set the dtype for all threads.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of `func`, for every function of torch that is called inside."""
        kwargs = dict(kwargs or {})
        plain = torch.get_default_dtype()
        if func is torch.Tensor.to and args[1:] == (plain,) and args[0].dtype == plain:
            return args[0].to(self.dtype)  # such a cast asks for torch's default
        without_dtype = kwargs.get("dtype") is None
        # By torch.tensor([]) transformers sees that it builds on meta.
        probe = func is torch.tensor and args and isinstance(args[0], list) and not args[0]
        if func in WITHOUT_VALUES or probe:
            kwargs["device"] = kwargs.get("device") or "meta"
        if without_dtype and func in DEFAULT_DTYPE:
            kwargs["dtype"] = self.dtype
        made = func(*args, **kwargs)
        if without_dtype and func in MAYBE_DEFAULT_DTYPE and made.dtype == plain:
            made = made.to(self.dtype)
        return made


def build(make: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """The model that `make` makes, parameters on meta in `dtype`, buffers that it computes real.

    Raises: ArchitectureError if it leaves a buffer without values that no checkpoint holds.
    """
    with _Unfilled(dtype):
        model = make()
    _fill_buffers(model, model)
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None and module._buffers[name].is_meta:
                raise ArchitectureError(
                    f"{type(model).__name__} makes the buffer {name!r} of '{path}' "
                    f"({type(module).__name__}) without values, and no checkpoint holds it"
                )
    empty: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may stand in several modules
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                if parameter not in empty:
                    on_meta = parameter.detach().to("meta")
                    empty[parameter] = nn.Parameter(on_meta, requires_grad=False)
                module._parameters[name] = empty[parameter]
    return model


def computes(module: nn.Module) -> bool:
    """Whether a buffer in `module` or below is computed from the config and so in no checkpoint."""
    return any(part._non_persistent_buffers_set for part in module.modules())


def _fill_buffers(module: nn.Module, model: PreTrainedModel) -> None:
    """Let `_init_weights` of `model` fill computed buffers, as in `from_pretrained`."""
    if not computes(module):
        return
    for child in module.children():
        _fill_buffers(child, child if hasattr(child, "_init_weights") else model)
    with torch.no_grad():
        model._init_weights(module)


def blanked(model: PreTrainedModel) -> dict[str, int]:
    """Weight of an embedding -> its padding row, where transformers makes that row zero.

    It does so whenever it opens a dense folder, whatever the file holds (in 5.23 for Youtu).
    """
    rows: dict[str, int] = {}
    if not type(model).__module__.startswith("transformers."):
        return rows  # code of a folder initialises no module that came from a file
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            probe = nn.Embedding(module.padding_idx + 1, 1, padding_idx=module.padding_idx)
            nn.init.ones_(probe.weight)
            # transformers marks weights so that came from a file.
            probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            with torch.no_grad():
                model._init_weights(probe)
            if not probe.weight[-1].any():
                rows[f"{name}.weight"] = module.padding_idx
    return rows


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the model has the parameter or buffer `name`, without a gradient."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
