"""The node that writes a plan file."""

from __future__ import annotations

from typing import Any

from diffsparse.comfy.patch import KEY, SparsePatch
from diffsparse.comfy.plan_folder import check_new_name, new_plans
from diffsparse.comfy.plan_output import PlanOutput
from diffsparse.config import SparseAttentionConfig


class DiffSparseCalibrate:
    """Gives out the model so that its next sampling also writes a plan file."""

    DESCRIPTION = (
        "Keeps what DiffSparse Attention finds out in one sampling as a file, so that later runs of the same model, "
        "size and length need not find it anew. Put it between DiffSparse Attention and the sampler and run once. "
        "Then remove it, press R, and choose the file as plan_file in DiffSparse Attention. Not needed for a first "
        "try."
    )
    CATEGORY = "model/patch"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "record"
    SEARCH_ALIASES = ("sparse attention plan", "save attention plan")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI reads the widgets from here."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model from DiffSparse Attention, which decides what is kept."}),
                "file_name": (
                    "STRING",
                    {
                        "default": "my_plan",
                        "tooltip": "Name of the file in ComfyUI's models/diffsparse folder. Once a sampling has "
                        "reached its end, it takes the place of an older file of that name.",
                    },
                ),
            },
            "optional": {
                "replan_every": (
                    "INT",
                    {
                        "default": SparseAttentionConfig().replan_every,
                        "min": 1,
                        "max": 1000,
                        "advanced": True,
                        "tooltip": "Steps that share what was found. 4: as without a file. 1000: found once for the "
                        "whole run, for the smallest file.",
                    },
                ),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file_name: str | None = None) -> bool | str:
        """ComfyUI shows what this says at the widget, before anything runs. The text may come from another node."""
        try:
            if file_name is not None:
                check_new_name(file_name)
        except ValueError as error:
            return str(error)
        return True

    def record(
        self,
        model: Any,
        file_name: str = "my_plan",
        replan_every: int = SparseAttentionConfig().replan_every,
        node_id: str | None = None,
    ) -> tuple[Any]:
        """The model, whose next sampling writes the file.

        Raises:
            ValueError: no DiffSparse Attention comes before, or it runs a plan file itself, or the name is no name.
        """
        patch: SparsePatch | None = model.get_attachment(KEY)
        if patch is None:
            raise ValueError(
                "DiffSparse Calibrate: this model comes from no DiffSparse Attention that is on and knows it. Put that "
                "node between the model loader and this one."
            )
        output = PlanOutput(new_plans(file_name), node_id)
        return (patch.with_output(output, replan_every).put_on(model),)
