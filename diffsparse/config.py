"""What the user asks for, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsparse.kernels.backends import BACKENDS
from diffsparse.kernels.quantization import QUANTIZED
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.calibrated import Calibrated
from diffsparse.strategies.option_checks import check_integers, is_number
from diffsparse.strategies.strategy import Strategy

MIN_TOKENS = 4096
PLAN_FILE_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SparseAttentionConfig:
    """When attention is sparse, and by which strategy.

    Args:
        strategy: what decides which tokens attend to which; `Adaptive()` needs no tuning.
        dense_steps: share of the denoising steps, from the first, that stay dense: 0.2 of 50 steps is 10. The first
            steps lay out the scene.
        dense_layers: indices of layers that stay dense, counted from 0; negative ones from the end.
        min_tokens: shorter sequences stay dense. None for 4,096, and from there on for what sparse attention is hardly
            faster at on this machine: the first sparse call of each size is timed against the dense one.
        replan_every: steps for which a layer's plan is kept, unless the strategy has made it to last.
        strict: raise at the first dense fallback, instead of counting it in the report. Early steps, dense layers,
            short sequences and what is hardly faster are policy, not fallbacks.
        backend: the kernel's implementation, one of those that `diffsparse doctor` lists; None for the best one. Where
            it cannot run, the first attention call raises ValueError.
        quantization: what sparse attention computes in, "int8", "int8_int8", "int8_fp8", "fp8" or "int4"
            (docs/quantization.md); None for the dtype of the model. Where the backend cannot, the first attention call
            raises ValueError.
        dense_quantization: what early steps and dense layers compute in, one of the same, by the same kernel; None
            leaves them to the model's own attention. That also computes, even where `strict`, what the kernel cannot
            take or is hardly faster at, which is timed as sparse calls are by `min_tokens`. Where the backend cannot
            compute in it, the first attention call raises ValueError.

    Raises:
        TypeError, ValueError: a wrong type or range, with what was expected.
    """

    strategy: Strategy = field(default_factory=Adaptive)
    dense_steps: float = 0.2
    dense_layers: tuple[int, ...] = ()
    min_tokens: int | None = None
    replan_every: int = 4
    strict: bool = False
    backend: str | None = None
    quantization: str | None = None
    dense_quantization: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strategy, type) or not isinstance(self.strategy, Strategy):
            raise TypeError(
                f"`strategy` must be a strategy object with a `plan` method, got {self.strategy!r}. "
                f"For the default say Adaptive(), for no sparsity Dense()."
            )
        if not is_number(self.dense_steps) or not 0 <= self.dense_steps <= 1:
            raise ValueError(
                f"`dense_steps` must be a fraction between 0 and 1, got {self.dense_steps!r}. "
                f"For 10 of 50 steps say 0.2."
            )
        if not isinstance(self.dense_layers, tuple) or not all(map(_is_integer, self.dense_layers)):
            raise TypeError(
                f"`dense_layers` must be a tuple of layer indices, got {self.dense_layers!r}. "
                f"For the first and the last layer say (0, -1)."
            )
        if self.min_tokens is not None:
            check_integers(0, min_tokens=self.min_tokens)
        check_integers(1, replan_every=self.replan_every)
        if not isinstance(self.strict, bool):
            raise TypeError(f"`strict` must be True or False, got {self.strict!r}.")
        if self.backend is not None and not (isinstance(self.backend, str) and self.backend in BACKENDS):
            raise ValueError(f"`backend` must be None or one of {', '.join(BACKENDS)}, got {self.backend!r}.")
        for name, precision in self.precisions.items():
            if precision not in QUANTIZED:
                raise ValueError(
                    f"`{name}` must be None or one of {', '.join(QUANTIZED)}, got {precision!r}. "
                    f"None computes in the dtype of the model."
                )

    @property
    def precisions(self) -> dict[str, str]:
        """`quantization` and `dense_quantization`, as far as they are not None."""
        both = {"quantization": self.quantization, "dense_quantization": self.dense_quantization}
        return {name: precision for name, precision in both.items() if precision is not None}

    @property
    def fewest_tokens(self) -> int:
        """`min_tokens`, or the shortest sequence that is worth timing."""
        return MIN_TOKENS if self.min_tokens is None else self.min_tokens


PRESETS: dict[str, Callable[[], SparseAttentionConfig]] = {
    "quality": lambda: SparseAttentionConfig(Adaptive(density=0.4), dense_steps=0.3),
    "balanced": lambda: SparseAttentionConfig(Adaptive(density=0.25), dense_steps=0.2),
    "fast": lambda: SparseAttentionConfig(Adaptive(density=0.15), dense_steps=0.1),
}


def as_config(config: Any) -> SparseAttentionConfig:
    """The config that a user's argument stands for: None is the preset "balanced", a *.safetensors file its plans.

    Raises:
        ValueError: the name of no preset, or a plan file that cannot be used.
        TypeError: neither None, a name, a path, nor a config.
    """
    if isinstance(config, SparseAttentionConfig):
        return config
    if isinstance(config, Path) or (isinstance(config, str) and config.endswith(PLAN_FILE_SUFFIX)):
        return _config_of_file(Path(config))
    if config is not None and not isinstance(config, str):
        given, way_out = repr(config), ""
        if isinstance(config, Strategy):
            name = (config if isinstance(config, type) else type(config)).__name__
            given, way_out = f"{name}(…)", f" A strategy goes into a config: SparseAttentionConfig({name}(…))."
        raise TypeError(
            f"`config` must be None, the name of a preset, a plan file or a SparseAttentionConfig, got {given}."
            f"{way_out}"
        )
    name = "balanced" if config is None else config
    if name not in PRESETS:
        raise ValueError(
            f"`config` names no preset: got {name!r}, expected one of {', '.join(map(repr, PRESETS))}, or the name of "
            f"a plan file, which ends in {PLAN_FILE_SUFFIX}."
        )
    return PRESETS[name]()


def resolve_dense_layers(layers: tuple[int, ...], count: int, model_name: str) -> frozenset[int]:
    """The layers of `count` that indices name, negative ones from the end."""
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(
                f"`dense_layers` names layer {layer}, but {model_name} has {count} "
                f"self-attention layers: expected {-count} to {count - 1}."
            )
    return frozenset(layer % count for layer in layers)


def _config_of_file(path: Path) -> SparseAttentionConfig:
    strategy = Calibrated.from_file(path)
    try:
        return SparseAttentionConfig(strategy, **strategy.calibration.settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be used: {error} Fetch it again, or make it anew with `diffsparse calibrate` (in ComfyUI "
            f"with DiffSparse Calibrate)."
        ) from error


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
