"""Models that are exported, and what runs them: PyTorch or onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from experts.language import LanguageModel

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Source:
    """A model to be exported. `module` maps inputs `[N, ...]` like `examples` to logits `[N, ..., C]`, for any N or for
    batches of `batch` only; `about` goes into the manifest. `language` is the model behind it, if it is one."""

    module: nn.Module
    examples: np.ndarray
    about: dict[str, Any]
    batch: int | None = None
    language: LanguageModel | None = None


def onnx_runner(raw: bytes, threads: int = 1, inter_op: int = 1) -> Run:
    """Runs an ONNX graph: `threads` of a product, `inter_op` products at once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, inter_op
    if inter_op > 1:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])

    def run(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"input": inputs})[0])

    return run


def torch_runner(module: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """Runs a torch module."""

    def run(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(inputs)).numpy())

    return run
