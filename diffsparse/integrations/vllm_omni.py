"""The attention function that vLLM-Omni's plugin contract for sparse attention asks for.

The contract is that of vllm-project/vllm-omni pull request 4493, open in November 2026 and in no release, at the
revision whose dispatcher (`attention/backends/sparse_attn.py`) calls `geometry_fn` and lets `latent_shape` and
`patch_size` reach `params`. Releases know nothing of it; for 0.30.0, `vllm_omni_backend.py` translates to the function
here.

Neither names the request or the guidance branch that a call is for, and the engine may take turns between requests. So
nothing that is kept from one call could be trusted in the next: each sparse call is planned anew.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.config import SparseAttentionConfig, as_config
from diffsparse.report import SparseAttentionReport, make_report
from diffsparse.session import Session
from diffsparse.steps import Step
from diffsparse.strategies.adaptive import Adaptive

logger = logging.getLogger(__name__)

LAYOUT = "diffsparse_layout"
"""The key under which `params` says where the tokens sit, as a `Layout`."""
OBSTACLE = "diffsparse_obstacle"
"""The key under which `params` says why a call cannot be sparse."""
POLICY = "diffsparse_policy"
"""The key under which `params` says why the user's own settings want a call dense."""
SPARSE_STEPS = "diffsparse_sparse_steps"
"""The key under which `params` says which steps `POLICY` leaves: the first, and the one after the last."""

_OPTIONS = ("dense_steps", "min_tokens", "strict", "quantization")
NO_STEP = "the call does not say which step it is"


@dataclass(frozen=True)
class _Served:
    """What a session asks of a model family. Here a call says by itself how its tokens are laid out."""

    name: str = "vLLM-Omni"
    padding_mask: bool = False
    text_apart: bool | None = None


class _Calls:
    """Sends attention calls to the session of their settings, and has a tally of what ran."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[SparseAttentionConfig, int], Session] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: Mapping[str, Any],
        is_causal: bool,
        softmax_scale: float | None,
    ) -> Tensor | None:
        """Sparse attention, [B, S, H, D] as the arguments; None, and counted, where it has to be dense."""
        session = self._session(read_config(params), query.shape[2])
        counted = session.tallies[0].dense_reasons
        known = set(counted)
        try:
            output = self._attend(session, query, key, value, params, is_causal, softmax_scale)
        finally:
            for reason in counted.keys() - known:
                logger.warning("diffsparse: some attention stays dense: %s", reason)
        return None if output is None else output.transpose(1, 2)

    def report(self) -> SparseAttentionReport:
        """What ran in this process, by settings and number of heads."""
        return make_report({f"self-attention {i}": session for i, session in enumerate(self._sessions.values())})

    def _session(self, config: SparseAttentionConfig, heads: int) -> Session:
        # The tally of a session has an entry for each head.
        if (config, heads) not in self._sessions:
            planned_anew = dataclasses.replace(config, replan_every=1)
            self._sessions[config, heads] = Session("vLLM-Omni", _Served(), ("self-attention",), planned_anew)
        return self._sessions[config, heads]

    def _attend(
        self,
        session: Session,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: Mapping[str, Any],
        is_causal: bool,
        softmax_scale: float | None,
    ) -> Tensor | None:
        if (policy := params.get(POLICY)) is not None:
            session.count_dense(0, policy)
            return None
        index, total = _first_step(params.get("denoise_step_idx")), _first_step(params.get("total_denoise_steps"))
        obstacle = params.get(OBSTACLE) or _obstacle(query, key, value, params, is_causal)
        if index is None and session.config.dense_steps > 0:
            obstacle = obstacle or NO_STEP
        if obstacle is not None:
            session.fall_back(0, obstacle)
            return None
        first, end = params.get(SPARSE_STEPS, (0, total))
        step = Step(index or 0, total, None, is_first_of_generation=True, sparse_from=first, sparse_until=end)
        session.begin(step, params.get(LAYOUT))
        dense = functools.partial(_dense, query, key, value, None, False, softmax_scale)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        try:
            return session.attend(0, query, key, value, None, softmax_scale, dense=dense)
        finally:
            session.forget_plans()


def make_attn_fn() -> Any:
    """A function for the contract, with its attributes `capabilities` and `geometry_fn`, and a tally of its own.

    Two more attributes are ours: `report()` gives what ran, and `sparse` takes the same arguments and returns None
    where the function would compute dense attention.
    """
    calls = _Calls()

    def attn_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: Mapping[str, Any],
        is_causal: bool = False,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Attention of one layer, [B, S, H, D], sparse where it can be.

        Args:
            query, key, value: [B, S, H, D] after norms and rotary embedding.
            params: the user's options, see `read_config`; `denoise_step_idx` and `total_denoise_steps`, tensors of
                one number a sample or plain numbers; what `geometry_fn` returned; `attn_mask` in any form that
                `scaled_dot_product_attention` takes, or [B, S]. Other keys are none of ours.
            is_causal: whether the model asks for a causal mask.
            softmax_scale: factor on the scores, D ** -0.5 if None.

        Raises:
            DenseFallback: `strict` is set and this call cannot be sparse.
            TypeError, ValueError: an option of a wrong type or range.
        """
        output = calls.attend(query, key, value, params, is_causal, softmax_scale)
        if output is None:
            output = _dense(query, key, value, params.get("attn_mask"), is_causal, softmax_scale)
        return output

    # Compiled code would have the step, a plain number, in it. What compiled code calls must not be traced either.
    served: Any = torch.compiler.disable(attn_fn, recursive=True)
    served.capabilities = {"supports_attention_mask": True, "supports_full_attn_spans": False}
    served.geometry_fn = geometry_fn
    served.sparse = torch.compiler.disable(calls.attend, recursive=True)
    served.report = calls.report
    return served


def geometry_fn(query_shape: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any]:
    """Where the tokens sit, by the latent's size and the patch size; nothing where `params` lacks them.

    Args:
        query_shape: B, S, H, D.
        params: `latent_shape` (frames, height, width) and `patch_size`, each [num_samples, 3] or three numbers.
    """
    if params.get("latent_shape") is None or params.get("patch_size") is None:
        return {}
    sizes, patches = _rows(params["latent_shape"]), _rows(params["patch_size"])
    grids = {
        tuple(size // patch for size, patch in zip(*row)) for row in zip(sizes, patches * (len(sizes) // len(patches)))
    }
    if len(grids) != 1:
        return {OBSTACLE: "the samples of the batch differ in size"}
    # A sequence with other tokens in it does not fit, and stays dense: nothing says where they stand.
    return {LAYOUT: (*grids.pop(), 0, 0)}


def read_config(params: Mapping[str, Any]) -> SparseAttentionConfig:
    """The config that the user's options ask for.

    Args:
        params: `config`, the name of a preset, "balanced" if there is none; `density` of the strategy `Adaptive`;
            `dense_steps`, `min_tokens`, `strict` and `quantization` as in `SparseAttentionConfig`.

    Raises:
        TypeError, ValueError: a wrong type or range, with what was expected.
    """
    changes = {name: params[name] for name in _OPTIONS if name in params}
    if "density" in params:
        changes["strategy"] = Adaptive(density=params["density"])
    return dataclasses.replace(as_config(params.get("config")), **changes)


def _obstacle(query: Tensor, key: Tensor, value: Tensor, params: Mapping[str, Any], is_causal: bool) -> str | None:
    """What no session can handle."""
    if is_causal:
        return "causal attention"
    if params.get("attn_mask") is not None:
        return "attention mask"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "gradients are required"
    return None


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Ordinary attention, [B, S, H, D] in and out."""
    if mask is not None and mask.ndim == 2:
        # [B, S], true where there is a token.
        mask = mask.to(torch.bool)[:, None, None]
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return output.transpose(1, 2)


def _first_step(value: Any) -> int | None:
    """The lowest of the steps of the samples: what is too early for one is too early for all."""
    if isinstance(value, Tensor):
        return int(value.min())
    return None if value is None else int(value)


def _rows(value: Any) -> list[list[int]]:
    """Three whole numbers a sample."""
    rows: list[list[int]] = torch.as_tensor(value).reshape(-1, 3).tolist()
    return rows


attn_fn = make_attn_fn()
