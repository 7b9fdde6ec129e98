"""diffsparse in ComfyUI. Its nodes need torch and ComfyUI; none of what the diffusers pipelines and the commands do."""

from diffsparse.comfy.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
