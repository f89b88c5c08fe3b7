"""From a config to an empty module on its device: by transformers, or by a function that the validator names.

Parameters are allocated where they will live and not initialized (a 30B model's random numbers take minutes), while
buffers that are computed, such as rotary frequencies, get their values as usual. Code that a checkpoint brings along is
never run: only classes that transformers itself has.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from bzstream.evaluation.rejection_codes import EvaluationError, Failure
from bzstream.util.dtypes import DTYPES

__all__ = ["build_module", "ignored_names", "map_errors", "prepare_torch", "state_of", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    dtype = getattr(torch, str(DTYPES[name].torch))
    assert isinstance(dtype, torch.dtype)
    return dtype


def prepare_torch() -> None:
    """Process-wide switches that make a repeat bit-identical. Call before the first CUDA operation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: the same workspace for every call
    # warn_only: a model may use an operation that has no deterministic kernel; the record then says what it was.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


@contextmanager
def map_errors() -> Iterator[None]:
    """Turn what torch raises into Failure `out_of_memory` or `device_error`, once, at the edge."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise Failure("out_of_memory", "the evaluator ran out of memory") from None
    except RuntimeError as error:
        text = str(error)
        if "allocate memory" in text or "out of memory" in text:
            raise Failure("out_of_memory", "the evaluator ran out of memory") from None
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "cuDNN" in text or "CUBLAS" in text:
            raise Failure("device_error", f"the accelerator reported an error: {text.splitlines()[0][:200]}") from None
        raise


def build_module(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, factory: str | None
) -> torch.nn.Module:
    """The module on its device, its parameters allocated and not initialized, its computed buffers in place."""
    if factory is None:
        module = _transformers_module(config, dtype, device)
    else:
        function = _factory(factory)
        with device:
            module = function(dict(config))
        if not isinstance(module, torch.nn.Module):
            raise EvaluationError(f"evaluation.model {factory} gave no torch.nn.Module")
        module.to(device=device, dtype=dtype)
    return module.eval().requires_grad_(False)


def _factory(name: str) -> Callable[[dict[str, Any]], Any]:
    module, colon, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise EvaluationError(f"evaluation.model {name} cannot be imported: {error}") from None
    if not colon or not callable(found):
        raise EvaluationError(f"evaluation.model is {name}; it must be written module:function")
    return found  # type: ignore[no-any-return]


def _transformers_module(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    import transformers
    from transformers.initialization import no_init_weights

    family = config.get("model_type")
    if family not in transformers.CONFIG_MAPPING:
        raise EvaluationError(
            f"transformers {transformers.__version__} has no model type {family!r}; set evaluation.model"
        )
    settings = transformers.CONFIG_MAPPING[family].from_dict(dict(config))
    named = [getattr(transformers, name, None) for name in config.get("architectures") or ()]
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(settings) in mapping:
            kinds.append(mapping[type(settings)])  # noqa: PERF401 (a comprehension over both would hide the order)
    if not kinds:
        raise EvaluationError(f"transformers has no language model of type {family!r}; set evaluation.model")
    with device, no_init_weights():
        module: Any = kinds[0]._from_config(settings, dtype=dtype)  # type: ignore[attr-defined]
    module.tie_weights()
    # Grouped matrix products, transformers' default, want rows that are multiples of 16 bytes.
    experts = [p for name, p in module.named_parameters() if ".experts." in name and p.dim() == 3]
    if any(size * p.element_size() % 16 for p in experts for size in p.shape[1:]):
        module.set_experts_implementation("eager")
    assert isinstance(module, torch.nn.Module)
    return module


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    found: dict[str, torch.Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def ignored_names(module: torch.nn.Module) -> Callable[[str], bool]:
    """Published tensors that the model does without: what transformers ignores too, and second names of tied ones."""
    patterns = [re.compile(p) for p in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    tied = set(module.state_dict())
    return lambda name: name in tied or any(pattern.search(name) for pattern in patterns)
