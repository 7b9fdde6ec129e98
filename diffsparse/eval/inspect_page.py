"""What an inspected run shows, as one HTML page that needs nothing else."""

from __future__ import annotations

import itertools
from typing import Any

from diffsparse.eval.head_picture import COLOURS, MEANINGS, OTHER_COLOUR
from diffsparse.eval.html_page import data_uri, fact_list, html_page, sorted_cell, sorting_heads, text
from diffsparse.eval.inspect_grid import MEASURES, heads_grid


def as_page(data: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page; `data` as in the JSON file, `pictures` the PNGs of the attention maps by their file names."""
    body = [
        "<h1>What each attention head keeps</h1>",
        _introduction(data),
        *_headline(data),
        *_notes(data),
        *_words(data),
        *heads_grid(data),
        *_maps(data, pictures),
        *_table(data),
        *_origin(data),
    ]
    return html_page("diffsparse: what each attention head keeps", body, own="inspect")


def head_name(data: dict[str, Any], of: dict[str, Any]) -> str:
    """What a head is called, with its transformer where the pipeline has several."""
    name = f"layer {of['layer']}, head {of['head']}"
    return f"{of['transformer']}, {name}" if len(data["transformers"]) > 1 else name


def in_words(measure: dict[str, Any]) -> str:
    """Class and measures of a head in one line."""
    numbers = ", ".join(f"{name} {percent(measure[name])}" for name in MEASURES[1:])
    extra = ", skipped blocks enter as their mean" if measure["tail"] else ""
    return f"{measure['class']}, {numbers}{', output skipped' if measure['skipped'] else extra}"


def percent(share: float | None) -> str:
    """A share with three digits where it is small."""
    if share is None:
        return "–"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def in_both_orders(of: dict[str, Any]) -> str:
    """Incoherence in the tokens' own order and in the plan's."""
    own, planned = of["incoherence_own_order"], of["incoherence_plan_order"]
    return "–" if own is None else f"{own:.2f} → {planned:.2f}"


def _introduction(data: dict[str, Any]) -> str:
    sampling = data["sampling"]
    return (
        f"<p>“{text(data['prompt'])}”</p>"
        f'<p class="dim">Model {text(data["model"])}, config {text(data["config"])}, seed {data["seed"]}, '
        f"{sampling['width']} × {sampling['height']}, {sampling['num_frames']} frames, "
        f"{sampling['num_inference_steps']} steps, on {text(data['device'])}.</p>"
    )


def _headline(data: dict[str, Any]) -> list[str]:
    summary = data["summary"]
    worst = summary["worst_head"]
    if worst is None:
        never = "Sparse attention never ran: every head was dense, and all of its attention is kept."
        return [f"<p><strong>{never}</strong></p>"]
    tiles = [
        ("density", percent(summary["density"]), f"of the sparse calls, {percent(summary['overall_density'])} of all"),
        ("recall", percent(summary["recall"]), f"mean; 5th percentile {percent(summary['recall_5th_percentile'])}"),
        ("output error", percent(summary["error"]), "mean over heads and sparse steps"),
        ("worst head", head_name(data, worst), f"mean error {percent(worst['error'])}"),
    ]
    return [
        '<div class="tiles">',
        *(
            f'<div><span class="dim">{text(name)}</span><strong>{text(value)}</strong>'
            f'<span class="dim">{text(more).replace(" %", "&nbsp;%")}</span></div>'
            for name, value, more in tiles
        ),
        "</div>",
    ]


def _notes(data: dict[str, Any]) -> list[str]:
    lines = []
    for transformer in data["transformers"]:
        name = f"{transformer['name']}: " if len(data["transformers"]) > 1 else ""
        calls = transformer["sparse_calls"] + transformer["dense_calls"]
        if not calls:
            lines.append(f"{transformer['name']} was not called.")
        for reason, count in transformer["dense_reasons"].items():
            lines.append(f"{name}{count} of {calls} attention calls were dense: {reason}.")
        for reason, count in transformer["unreached_layers"].items():
            lines.append(f"{name}{count} layers run their own attention and are in no number here: {reason}.")
    return ["<ul>", *(f"<li>{text(line)}</li>" for line in lines), "</ul>"] if lines else []


def _words(data: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(
        head["class"]
        for transformer in data["transformers"]
        for layer in itertools.chain.from_iterable(step["layers"] for step in transformer["steps"])
        for head in layer["heads"]
    )
    classes = [
        f"<dt>{_dot(name)} {text(name)}</dt><dd>{text(MEANINGS.get(name, 'the strategy names no class'))}</dd>"
        for name in sorted(names, key=_class_place)
    ]
    return [
        "<details open><summary>What the words mean</summary><dl>",
        "<dt>density</dt><dd>Share of the key blocks that are computed exactly.</dd>",
        "<dt>recall</dt><dd>Share of the attention that a dense head would pay which falls on these blocks. 100 % at "
        "25 % density says that nothing attends to the three quarters that are skipped.</dd>",
        "<dt>error</dt><dd>How far the head’s output is from dense attention of the same queries, keys and values: "
        "length of the difference over length of the dense output. It can be small where recall is low: what is "
        "skipped may enter as the mean of each block.</dd>",
        "<dt>incoherence</dt><dd>How badly queries and keys can be quantized by blocks, each with one scale: the "
        "largest magnitude over the mean one, with the tokens in their own order → in the plan’s. 1 is the least; the "
        f"lower, the less is lost to 8 and 4 bits.{_mean_incoherence(data['summary'])}</dd>",
        *classes,
        "</dl>",
        f'<p class="dim">Recall and error are measured on {data["sampled_rows"]} video tokens a head against all '
        "keys, at the first attention call of every step: of the first guidance branch, or of both where the model "
        "computes them at once.</p></details>",
    ]


def _mean_incoherence(summary: dict[str, Any]) -> str:
    return "" if summary["incoherence_own_order"] is None else f" Mean of all: {in_both_orders(summary)}."


def _maps(data: dict[str, Any], pictures: dict[str, bytes]) -> list[str]:
    if not data["maps"]:
        asked = ", ".join(map(str, data["map_steps"]))
        return [
            "<h2>Attention maps</h2>",
            f"<p>There is none: at the steps asked for ({asked}) no chosen head ran sparse.</p>",
        ]
    lines = [
        "<h2>Attention maps</h2>",
        "<p>Queries go down, keys across; a dark cell is a pair of places that attend to each other strongly. "
        "<strong>Blue is computed exactly, orange is skipped</strong>: a plan is good where all that is dark is blue. "
        "Left, the tokens as the model has them; right, in the order that the plan gives them, which is to gather the "
        "dark cells into few blocks.</p>",
    ]
    for _, maps in itertools.groupby(data["maps"], key=lambda m: (m["transformer"], m["layer"], m["head"])):
        lines += _maps_of_head(data, list(maps), pictures)
    return lines


def _maps_of_head(data: dict[str, Any], maps: list[dict[str, Any]], pictures: dict[str, bytes]) -> list[str]:
    name = head_name(data, maps[0])
    why = "" if maps[0]["why"] is None else f": {maps[0]['why']}, at step {maps[0]['step']}"
    figures = [
        f'<figure data-step="{shown["step"]}"><img alt="{text(name)} at step {shown["step"]}: {text(in_words(shown))}" '
        f'src="{data_uri("image/png", pictures[shown["file"]])}"></figure>'
        for shown in maps
    ]
    buttons = "".join(f'<button data-step="{shown["step"]}">step {shown["step"]}</button>' for shown in maps)
    return [
        f'<section class="maps"><h3>{text(name[0].upper() + name[1:] + why)}</h3>',
        f'<div class="choice" hidden>{buttons}</div>',
        *figures,
        "</section>",
    ]


def _table(data: dict[str, Any]) -> list[str]:
    several = len(data["transformers"]) > 1
    headings = ["transformer"] * several + ["layer", "head", *MEASURES, "largest error", "at step"]
    headings += ["sparse steps", "tail steps", "incoherence"]
    rows = []
    for transformer in data["transformers"]:
        for head in sorted(transformer["heads"], key=lambda each: -each["error"]):
            others = [f"{name} in {count}" for name, count in head["classes"].items() if name != head["class"]]
            at_step = head["largest_error_at_step"]
            why_dense = ", ".join(head["dense_reasons"]) if not head["sparse_steps"] else ""
            cells = [
                *([sorted_cell(head["transformer"], head["transformer"], "config")] if several else []),
                *(sorted_cell(str(head[name]), head[name]) for name in ("layer", "head")),
                sorted_cell(head["class"], head["class"], below=", ".join(others)),
                *(sorted_cell(percent(head[name]), head[name]) for name in MEASURES[1:]),
                sorted_cell(percent(head["largest_error"]), head["largest_error"]),
                sorted_cell("–" if at_step is None else str(at_step), at_step),
                sorted_cell(str(head["sparse_steps"]), head["sparse_steps"], below=why_dense),
                sorted_cell(str(head["tail_steps"]), head["tail_steps"]),
                sorted_cell(in_both_orders(head), head["incoherence_plan_order"]),
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    return [
        "<h2>All heads in numbers</h2>",
        '<p class="dim">Means over the steps in which a head ran sparse, the largest error first; a click on a heading '
        "sorts. <em>Tail steps</em>: those in which what it skips enters as the mean of each block. "
        "<em>Incoherence</em>: in the tokens’ own order → in the plan’s; sorted by the latter.</p>",
        f'<div class="scroll"><table><thead>{sorting_heads(headings)}</thead><tbody>',
        *rows,
        "</tbody></table></div>",
    ]


def _origin(data: dict[str, Any]) -> list[str]:
    facts = data["machine"] | data["versions"]
    facts |= {"config in full": data["config_in_full"], "seconds, measuring included": f"{data['seconds']:.1f}"}
    return ["<h2>How it was made</h2>", f"<pre>{text(data['command'])}</pre>", fact_list(facts)]


def _dot(name: str) -> str:
    # A fill as an attribute: the page's policy allows no inline style.
    colour = COLOURS.get(name, OTHER_COLOUR)
    return (
        f'<svg class="dot" viewBox="0 0 10 10" aria-hidden="true"><circle cx="5" cy="5" r="5" fill="{colour}"/></svg>'
    )


def _class_place(name: str) -> int:
    return list(COLOURS).index(name) if name in COLOURS else len(COLOURS)
