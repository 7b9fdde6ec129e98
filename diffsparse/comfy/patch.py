"""What the node puts on a model: wrappers around its sampling and around each call of it."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffsparse.comfy.models import ComfyModel
from diffsparse.comfy.schedule import Branches, Window, step_of
from diffsparse.comfy.summary import RunClock, summarize
from diffsparse.comfy.transformer import UNREACHED, SampledTransformer
from diffsparse.config import SparseAttentionConfig
from diffsparse.report import SparseAttentionReport, make_report
from diffsparse.session import Session
from diffsparse.steps import Step

logger = logging.getLogger(__name__)

KEY = "diffsparse"
OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class Settings:
    """What the user asked for at the node.

    Attributes:
        config: the strategy, dense layers, least number of tokens, strictness.
        start_percent, end_percent: the share of the sampling that is sparse, 0 to 1.
        first_step_only: whether few-step schedules keep at most their first step dense, whatever `start_percent` says.
        verbose: log the whole report at the end of each run.
    """

    config: SparseAttentionConfig
    start_percent: float = 0.2
    end_percent: float = 1.0
    first_step_only: bool = False
    verbose: bool = False


class SparsePatch:
    """Sparse attention of one node, in the model that it gives out and in everything made of that model.

    It holds the state of one run of the sampler at a time.
    """

    def __init__(self, settings: Settings, model: ComfyModel, node_id: str | None = None) -> None:
        self._settings = settings
        self._model = model
        self._node_id = node_id
        self._transformers: dict[int, SampledTransformer] = {}
        self._clock = RunClock()
        self._branches = Branches()
        self._window: Window | None = None
        self.line: str | None = None
        """What the last run came to; None before the first."""

    def put_on(self, patcher: Any) -> Any:
        """A clone of ComfyUI's ModelPatcher with this patch, which takes the place of an earlier one."""
        from comfy.patcher_extension import WrappersMP

        patched = patcher.clone()
        call_wrapper = {"diffusion_model": WrappersMP.DIFFUSION_MODEL, "apply_model": WrappersMP.APPLY_MODEL}
        if patched.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            logger.info("A second DiffSparse Attention node takes the place of the first: its settings count.")
        for wrapper in (WrappersMP.OUTER_SAMPLE, *call_wrapper.values()):
            patched.remove_wrappers_with_key(wrapper, KEY)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.around_sampling)
        patched.add_wrapper_with_key(call_wrapper[self._model.wrapper], KEY, self.around_call)
        patched.set_attachments(KEY, self)
        return patched

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's OUTER_SAMPLE wrapper: one run of the sampler."""
        sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        self._window = Window(
            sigma_start=float(sampling.percent_to_sigma(self._settings.start_percent)),
            sigma_end=float(sampling.percent_to_sigma(self._settings.end_percent)),
            first_step_only=self._settings.first_step_only,
        )
        self._transformers.clear()
        self._clock, self._branches = RunClock(), Branches()
        finished = False
        try:
            output = executor(*args, **kwargs)
            finished = True
        finally:
            self._end_run(finished)
        return output

    def around_call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's DIFFUSION_MODEL or APPLY_MODEL wrapper: one call of the model."""
        transformer, options = self._begin_call(executor, args, kwargs)
        if transformer is None:
            return executor(*args, **kwargs)
        # Set at each call, so that no node that comes later can silence this one unseen.
        before = options.get(OVERRIDE)
        transformer.previous = before
        options[OVERRIDE] = transformer.override
        try:
            return executor(*args, **kwargs)
        finally:
            _put_back(options, before)
            if transformer.ran_sparse:
                self._clock.mark_sparse()

    def report(self) -> SparseAttentionReport:
        """What ran in the last run of the sampler."""
        name = self._model.name
        return make_report({f"{name} {i}" if i else name: session for i, session in enumerate(self._sessions())})

    def _sessions(self) -> list[Session]:
        return [transformer.session for transformer in self._transformers.values()]

    @torch.compiler.disable
    def _begin_call(
        self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[SampledTransformer | None, dict[str, Any]]:
        call = _named(executor.original, args, kwargs)
        options = call.get("transformer_options") or {}
        if self._window is None or "sigmas" not in options or "sample_sigmas" not in options:
            # Nobody samples: something calls the model on its own.
            return None, options
        # The model itself, or ComfyUI's model around it.
        module = getattr(executor.class_obj, "diffusion_model", executor.class_obj)
        # Several GPUs have a model each, and a thread each.
        transformer = self._transformers.get(id(module))
        if transformer is None:
            transformer = SampledTransformer(module, self._model, self._settings.config)
            self._transformers[id(module)] = transformer
        sigmas = options["sample_sigmas"].tolist()
        sigma = options["sigmas"].max().item()
        index, total = step_of(sigma, sigmas), len(sigmas) - 1
        self._clock.tick(index, total)
        step = Step(index, total, self._branches.name(options), is_first_of_generation=False)
        layout = self._model.layout(module, call)
        transformer.begin_call(step, layout, self._window.why_dense(sigma, index, total))
        return transformer, options

    def _end_run(self, finished: bool) -> None:
        self._clock.stop()
        self._window = None
        for transformer in self._transformers.values():
            transformer.remove()
        self.line = summarize(self._clock, self._sessions(), finished)
        logger.info(self.line)
        if any(UNREACHED in tally.dense_reasons for session in self._sessions() for tally in session.tallies):
            logger.warning(_UNREACHED_WARNING)
        if self._settings.verbose:
            logger.info("%s", self.report())
        show_on_node(self.line, self._node_id)


_UNREACHED_WARNING = (
    "DiffSparse: another node has replaced the attention of some blocks (memory-efficient or Sage nodes do), so that "
    "DiffSparse never saw it. These blocks ran that node's attention. Remove that node, or this one."
)


def show_on_node(text: str, node_id: str | None) -> None:
    """Show a text under a node in the browser, where ComfyUI has one."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def _named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, those of `**kwargs` among them."""
    signature = inspect.signature(function)
    call = dict(signature.bind(*args, **kwargs).arguments)
    rest = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    return call | {key: value for name in rest for key, value in call.pop(name, {}).items()}


def _put_back(options: dict[str, Any], before: Any) -> None:
    if before is None:
        options.pop(OVERRIDE, None)
    else:
        options[OVERRIDE] = before
