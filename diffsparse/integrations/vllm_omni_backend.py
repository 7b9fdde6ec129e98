"""The attention backend that releases of vLLM-Omni load by its class path: their arguments, for our function.

It follows the classes of vLLM-Omni 0.30.0 (`diffusion/attention/backends/abstract.py`). Only the engine loads this
file.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from diffsparse.integrations.vllm_omni import LAYOUT, NO_STEP, OBSTACLE, POLICY, SPARSE_STEPS, attn_fn, read_config


class DiffSparseBackend(AttentionBackend):
    """What the engine asks about the backend before it builds a model."""

    supported_platforms: tuple[str, ...] | None = ("cuda", "rocm")

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """Layers with a mask are dense, by torch's own attention."""
        return True

    @staticmethod
    def get_name() -> str:
        """The name in the engine's log."""
        return "DIFFSPARSE"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """What computes."""
        return DiffSparseImpl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Empty: any. What the kernel cannot do is dense."""
        return []


class DiffSparseImpl(AttentionImpl):
    """The attention of one layer.

    Args:
        num_heads, head_size, softmax_scale, causal, num_kv_heads: of the layer.
        prefix: the layer's name, such as "blocks.3.attn1".
        qkv_layout: "BSND", the order of the axes; None is the same.
        backend_kwargs: the engine's options for block-sparse attention: `sparsity`, the share of key blocks that is
            left out; `start_step` and `end_step`, how many steps stay dense at either end; `skip_layers`, indices of
            layers that do; `precision`, of which there is "bf16".
        extra_impl_args: what else the engine tells its backends.

    Raises:
        ValueError: options, an order of axes or a way to split the sequence that this backend does not have.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ) -> None:
        options = backend_kwargs or {}
        if qkv_layout not in (None, "BSND"):
            raise ValueError(
                f"`qkv_layout` of {prefix or 'a layer'} must be BSND for diffsparse, got {qkv_layout!r}. "
                f"Give this role a dense backend, such as TORCH_SDPA."
            )
        if (precision := options.get("precision", "bf16")) != "bf16":
            raise ValueError(f"`precision` must be 'bf16' with diffsparse, got {precision!r}.")
        _refuse_ring()
        self.causal, self.softmax_scale = causal, softmax_scale
        self._sparsity = float(options.get("sparsity", 0.0))
        self._start_step, self._end_step = int(options.get("start_step", 0)), int(options.get("end_step", 0))
        skipped = options.get("skip_layers") or ()
        self._is_skipped = bool(skipped) and extract_layer_index(prefix) in skipped
        # Here the steps count, and not their share.
        self._options: dict[str, Any] = {"dense_steps": 0.0}
        if self._sparsity > 0:
            self._options["density"] = 1 - self._sparsity
        read_config(self._options)
        self._dense = SDPABackend.get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            qkv_layout=qkv_layout,
        )

    def forward_cuda(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        """Attention, [B, S, H, D] in and out; the engine calls this on ROCm as well."""
        params = self._options | self._params(attn_metadata)
        output = attn_fn.sparse(query, key, value, params, self.causal, self.softmax_scale)
        return self._dense.forward_cuda(query, key, value, attn_metadata) if output is None else output

    def _params(self, metadata: AttentionMetadata | None) -> dict[str, Any]:
        context = get_forward_context() if is_forward_context_available() else None
        step, total = getattr(context, "denoise_step_idx", None), getattr(context, "total_denoise_steps", None)
        mask = getattr(metadata, "attn_mask", None)
        params: dict[str, Any] = {"denoise_step_idx": step, "total_denoise_steps": total, "attn_mask": mask}
        if total is not None:
            params[SPARSE_STEPS] = self._start_step, total - self._end_step
        if (policy := self._policy(step, total)) is not None:
            return params | {POLICY: policy}
        if (self._start_step and step is None) or (self._end_step and (step is None or total is None)):
            return params | {OBSTACLE: NO_STEP}
        if metadata is None or (layout := metadata.video_layout) is None:
            return params
        if layout.latent_grid is None or layout.prefix_len is None:
            return params | {OBSTACLE: "several videos in one sequence"}
        return params | {LAYOUT: (*layout.latent_grid, layout.prefix_len, 0)}

    def _policy(self, step: int | None, total: int | None) -> str | None:
        """Why the user's own settings want this call dense."""
        if self._sparsity == 0:
            return "sparsity 0"
        if self._is_skipped:
            return "dense layer"
        if step is not None and step < self._start_step:
            return "early step"
        if step is not None and total is not None and step >= total - self._end_step:
            return "late step"
        return None


def _refuse_ring() -> None:
    """A ring of GPUs goes past the backend, unseen."""
    degree = getattr(getattr(get_current_diffusion_config_or_none(), "parallel_config", None), "ring_degree", 1)
    if degree > 1:
        raise ValueError(f"`ring_degree` must be 1 with diffsparse, got {degree}. Ulysses splits the heads instead.")
