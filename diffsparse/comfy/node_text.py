"""The text under a node in the browser."""

from __future__ import annotations

import sys


def show_on_node(text: str, node_id: str | None) -> None:
    """Show a text under a node in the browser, where ComfyUI has one.

    A node shows about two lines of it until the user makes the node larger, so what is long has a line for each thing.
    ComfyUI's newer nodes read it as Markdown, in which two spaces before its end keep a line.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    # What runs workflows without a browser may bring a server of its own that has none of this.
    send = getattr(server, "send_progress_text", None)
    if send is not None and node_id is not None:
        lines = text.removeprefix("DiffSparse: ").replace("; ", "\n").split("\n")
        send("  \n".join(lines), node_id)
