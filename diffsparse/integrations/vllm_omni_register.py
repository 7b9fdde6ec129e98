"""The entry point by which releases of vLLM-Omni come to know our attention backend."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of vLLM-Omni's general plugins: make ours what releases run as RAINFUSION_ATTN, but on an NPU.

    Their list of backends is closed, so one of them has to give its name. This one runs on nothing but NPUs, and is
    the one that takes options for block-sparse attention. Versions that have SPARSE_ATTN find `attn_fn` by
    its own entry point. May be called many times.
    """
    from vllm_omni.diffusion.attention.backends.registry import (
        DiffusionAttentionBackendEnum,
        register_diffusion_backend,
    )
    from vllm_omni.platforms import current_omni_platform

    names = DiffusionAttentionBackendEnum.__members__
    if "SPARSE_ATTN" in names or current_omni_platform.is_npu():
        return
    if "RAINFUSION_ATTN" not in names:
        logger.warning(
            "diffsparse: this version of vLLM-Omni has no backend RAINFUSION_ATTN whose name could be taken, only %s. "
            "No attention is sparse. 0.30.0 has it.",
            ", ".join(names),
        )
        return
    register_diffusion_backend(names["RAINFUSION_ATTN"], "diffsparse.integrations.vllm_omni_backend.DiffSparseBackend")
