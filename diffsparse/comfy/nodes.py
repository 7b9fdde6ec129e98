"""The nodes by name, in ComfyUI's first node format: it works in every version since 0.3.60."""

from diffsparse.comfy.attention_node import DiffSparseAttention
from diffsparse.comfy.calibrate_node import DiffSparseCalibrate
from diffsparse.comfy.report_node import DiffSparseReport
from diffsparse.comfy.token_count_node import DiffSparseTokenCount

NODE_CLASS_MAPPINGS = {
    "DiffSparseAttention": DiffSparseAttention,
    "DiffSparseCalibrate": DiffSparseCalibrate,
    "DiffSparseReport": DiffSparseReport,
    "DiffSparseTokenCount": DiffSparseTokenCount,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DiffSparseAttention": "DiffSparse Attention",
    "DiffSparseCalibrate": "DiffSparse Calibrate",
    "DiffSparseReport": "DiffSparse Report",
    "DiffSparseTokenCount": "DiffSparse Token Count",
}
