"""Rounding to FP8 in Triton's interpreter, as GPUs do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_fp8_as_gpus_do(monkeypatch: Any) -> None:
    """Let PyTorch round to e4m3 in the interpreter, which as of Triton 3.8 makes 64 of 127: it carries no mantissa."""
    convert = interpreter._convert_float

    def convert_or_round(array: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if output_dtype != tl.float8e4nv:
            return convert(array, input_dtype, output_dtype, rounding_mode)
        wide = torch.from_numpy(np.ascontiguousarray(array)).float()
        # As cvt.rn.satfinite: PyTorch makes NaN of what is out of range.
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert_or_round)
