"""Where one run of the sampler writes what was planned in it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from diffsparse.comfy.node_text import show_on_node
from diffsparse.config import SparseAttentionConfig
from diffsparse.plan_recorder import PlanRecorder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanOutput:
    """A plan file to be, and the node that tells of it."""

    path: Path
    node_id: str | None = None

    def write(self, recorder: PlanRecorder, config: SparseAttentionConfig, line: str) -> None:
        """Write the file, whole or not at all; `line` is what the run came to.

        Raises:
            ValueError: the run planned nothing.
            OSError: the file cannot be written.
        """
        recorder.end_prompt()
        try:
            recorder.save(self.path, config)
        except ValueError as error:
            raise ValueError(
                f"DiffSparse Calibrate has nothing to write into {self.path.name}: {error}. {line}. In DiffSparse "
                f"Attention, min_tokens 0 makes short sequences sparse too, and a lower start_percent early steps."
            ) from error
        self._say(
            f"DiffSparse: {self.path.name} is written, {self.path.stat().st_size / 1e3:,.0f} kB. Press R, then choose "
            f"it as plan_file in DiffSparse Attention."
        )

    def give_up(self, why: str) -> None:
        """Say that this run leaves no file behind, and that an older one stays."""
        self._say(f"DiffSparse: {self.path.name} is not written, as {why}. A file that was there before is unchanged.")

    def _say(self, text: str) -> None:
        logger.info(text)
        show_on_node(text, self.node_id)
