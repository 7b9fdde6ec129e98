"""What the nodes put on a model: wrappers around its sampling and around each call of it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffsparse.comfy import compiled
from diffsparse.comfy.models import ComfyModel, uncompiled
from diffsparse.comfy.node_text import show_on_node
from diffsparse.comfy.plan_output import PlanOutput
from diffsparse.comfy.schedule import Branches, Window, has_few_steps, step_of, whole_schedule
from diffsparse.comfy.summary import RunClock, summarize
from diffsparse.comfy.transformer import OPTIONS, OUT_OF_MEMORY, OVERRIDE, UNREACHED, SampledTransformer
from diffsparse.config import SparseAttentionConfig
from diffsparse.plan_recorder import PlanRecorder
from diffsparse.report import SparseAttentionReport, make_report
from diffsparse.session import Session
from diffsparse.steps import Step
from diffsparse.strategies.calibrated import Calibrated

logger = logging.getLogger(__name__)

KEY = "diffsparse"


@dataclass(frozen=True)
class Settings:
    """What the user asked for at the node.

    Attributes:
        config: the strategy, dense layers, least number of tokens, strictness.
        start_percent, end_percent: the share of the sampling that is sparse, 0 to 1.
        first_step_only: whether few-step schedules keep at most their first step dense, whatever `start_percent` says.
        verbose: log the whole report at the end of each run.
        output: where each run writes what was planned in it; None for nowhere.
    """

    config: SparseAttentionConfig
    start_percent: float = 0.2
    end_percent: float = 1.0
    first_step_only: bool = False
    verbose: bool = False
    output: PlanOutput | None = None


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
        self._schedule: list[float] = []
        """The sigmas of the run under way, of which another node may sample a part at a time."""
        self._percent_to_sigma: Callable[[float], float] | None = None
        """Of the run under way; None where nobody samples."""
        self._recorder: PlanRecorder | None = None
        self.line: str | None = None
        """What the last run came to; None before the first."""

    def with_output(self, output: PlanOutput, replan_every: int) -> SparsePatch:
        """The same patch, but each run writes what was planned in it, anew every so many steps.

        Raises:
            ValueError: it runs plans out of a file, so that there is nothing to find out.
        """
        config = self._settings.config
        if isinstance(config.strategy, Calibrated):
            raise ValueError(
                f"DiffSparse Calibrate: DiffSparse Attention runs {config.strategy.path} already, so there is nothing "
                f"to find out. Set its plan_file to none, or remove DiffSparse Calibrate."
            )
        settings = replace(self._settings, config=replace(config, replan_every=replan_every), output=output)
        return SparsePatch(settings, self._model, self._node_id)

    def put_on(self, patcher: Any) -> Any:
        """A clone of ComfyUI's ModelPatcher with this patch, which takes the place of an earlier one.

        Raises:
            ValueError: the earlier one would write a file, and now would not.
        """
        from comfy.patcher_extension import WrappersMP

        patched = patcher.clone()
        call_wrapper = {"diffusion_model": WrappersMP.DIFFUSION_MODEL, "apply_model": WrappersMP.APPLY_MODEL}
        earlier = patched.get_attachment(KEY)
        if earlier is not None and earlier._settings.output is not None:
            raise ValueError(
                "DiffSparse Calibrate writes nothing when another DiffSparse Attention or Calibrate comes after it. "
                "Let it be the last of them before the sampler."
            )
        if earlier is not None and self._settings.output is None:
            logger.info("A second DiffSparse Attention node takes the place of the first: its settings count.")
        for wrapper in (WrappersMP.OUTER_SAMPLE, *call_wrapper.values()):
            patched.remove_wrappers_with_key(wrapper, KEY)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.around_sampling)
        patched.add_wrapper_with_key(call_wrapper[self._model.wrapper], KEY, self.around_call)
        patched.set_attachments(KEY, self)
        return patched

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's OUTER_SAMPLE wrapper: one run of the sampler."""
        patcher = executor.class_obj.model_patcher
        compiled.begin_run(patcher)
        self._percent_to_sigma = patcher.get_model_object("model_sampling").percent_to_sigma
        self._transformers.clear()
        self._clock, self._branches = RunClock(), Branches()
        sigmas = _named(executor.original, args, kwargs).get("sigmas")
        self._schedule = [] if sigmas is None else sigmas.tolist()
        output = self._settings.output
        self._recorder = None if output is None else PlanRecorder(self._settings.config.strategy)
        finished = False
        try:
            latents = executor(*args, **kwargs)
            finished = True
        finally:
            recorder, self._recorder = self._recorder, None
            self._end_run(patcher, finished)
            if output is not None and not finished:
                output.give_up("the sampling did not reach its end")
        if output is not None and recorder is not None:
            self._write(output, recorder)
        return latents

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
            transformer.end_call()
            if transformer.ran:
                self._clock.mark_run(transformer.ran_sparse)

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
        options = call.get(OPTIONS) or {}
        if self._percent_to_sigma is None or "sigmas" not in options or "sample_sigmas" not in options:
            # Nobody samples: something calls the model on its own.
            return None, options
        # The model itself, or ComfyUI's model around it.
        module = uncompiled(getattr(executor.class_obj, "diffusion_model", executor.class_obj))
        # Several GPUs have a model each, and a thread each.
        transformer = self._transformers.get(id(module))
        if transformer is None:
            config = self._settings.config
            if self._recorder is not None:
                # Nothing is timed: the plans are for other machines as well.
                config = replace(config, strategy=self._recorder, min_tokens=config.fewest_tokens)
            transformer = SampledTransformer(module, self._model, config)
            self._transformers[id(module)] = transformer
        sigmas = whole_schedule(options["sample_sigmas"].tolist(), self._schedule)
        sigma = options["sigmas"].max().item()
        index, total = step_of(sigma, sigmas), len(sigmas) - 1
        self._clock.tick(index, total)
        window = self._window(sigmas, self._percent_to_sigma)
        first, end = window.sparse_steps(sigmas)
        branch = self._branches.name(options)
        step = Step(index, total, branch, is_first_of_generation=False, sparse_from=first, sparse_until=end)
        layout = self._model.layout(module, call)
        transformer.begin_call(step, layout, window.why_dense(sigma, index))
        return transformer, options

    def _window(self, sigmas: Sequence[float], percent_to_sigma: Callable[[float], float]) -> Window:
        """The share of this schedule that is sparse."""
        return Window(
            sigma_start=float(percent_to_sigma(self._settings.start_percent)),
            sigma_end=float(percent_to_sigma(self._settings.end_percent)),
            first_step_only=self._settings.first_step_only and has_few_steps(sigmas, percent_to_sigma),
        )

    def _write(self, output: PlanOutput, recorder: PlanRecorder) -> None:
        if self._met(OUT_OF_MEMORY):
            output.give_up("memory ran out, so that not all of the run was sparse")
        elif self.line is not None:
            output.write(recorder, self._settings.config, self.line)

    def _met(self, reason: str) -> bool:
        """Whether any attention of the run was dense for this reason."""
        return any(reason in tally.dense_reasons for session in self._sessions() for tally in session.tallies)

    def _end_run(self, patcher: Any, finished: bool) -> None:
        self._clock.stop()
        self._percent_to_sigma = None
        for transformer in self._transformers.values():
            transformer.remove()
            # Without the recorder: ComfyUI keeps this node's model, and what was recorded may be gigabytes.
            transformer.session.config = self._settings.config
        self.line = summarize(self._clock, self._sessions(), finished)
        logger.info(self.line)
        tallies = [tally for session in self._sessions() for tally in session.tallies]
        any_counted = any(tally.sparse_calls or tally.dense_reasons for tally in tallies)
        is_reached = any_counted and not self._met(UNREACHED)
        if (finished or any_counted) and compiled.end_run(patcher, is_reached):
            logger.warning(_COMPILED_WARNING)
        elif self._met(UNREACHED):
            logger.warning(_UNREACHED_WARNING)
        if self._settings.verbose:
            logger.info("%s", self.report())
        show_on_node(self.line, self._node_id)


_UNREACHED_WARNING = (
    "DiffSparse: another node has replaced the attention of some blocks (memory-efficient or Sage nodes do), so that "
    "DiffSparse never saw it. These blocks ran that node's attention. Remove that node, or this one."
)

_COMPILED_WARNING = (
    "DiffSparse: torch.compile has run code that it made without DiffSparse, so that DiffSparse never saw some blocks, "
    "and they ran in full. The next run compiles the model anew. For this one queue again with another seed."
)


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
