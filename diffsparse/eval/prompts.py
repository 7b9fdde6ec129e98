"""The prompts of a run: a shipped set, or a text, CSV or JSONL file, with what is wrong in it found at once."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {
    "demo": ASSETS / "demo_prompts.txt",
    "general": ASSETS / "general_prompts.txt",
}


def read_prompts(name: str, option: str = "--prompts") -> list[str]:
    """The prompts of a shipped set or of a file, which `option` names on the command line.

    A text file has one prompt a line, a CSV file a column `prompt`, a JSONL file a string a line or an object with
    the key `prompt`. Empty lines are skipped, anything else in a file is ignored.

    Raises:
        ValueError: no such set or file, none or equal prompts in it, or contents that cannot be read.
    """
    file = SHIPPED.get(name, Path(name))
    if not file.is_file():
        raise ValueError(
            f"{option} must be {' or '.join(SHIPPED)} or a file, got {name or 'nothing'}, which is neither."
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    numbered = _READERS.get(file.suffix.lower(), _from_text)(file, text)
    lines_of: dict[str, int] = {}
    for line, prompt in numbered:
        if not prompt.strip():
            continue
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{file}, line {line}, is cut inside a character: {prompt.strip()!r}.") from error
        if prompt.strip() in lines_of:
            raise ValueError(
                f"{file} has the prompt {prompt.strip()!r} twice, in lines {lines_of[prompt.strip()]} and {line}. "
                f"For more videos of a prompt name more --seeds."
            )
        lines_of[prompt.strip()] = line
    if not lines_of:
        raise ValueError(f"{file} has no prompt in it; expected one a line.")
    return list(lines_of)


def first_prompts(prompts: list[str], count: int, option: str) -> list[str]:
    """The first `count` of them, as `option` says on the command line; ValueError where there are not so many."""
    if not 1 <= count <= len(prompts):
        raise ValueError(f"{option} must be 1 to {len(prompts)}, the prompts there are; got {count}.")
    return prompts[:count]


def prompt_or_first(prompt: str | None) -> str:
    """What --prompt says; where it is left out, the first of the embedded model's prompts.

    Raises:
        ValueError: it is empty, or no text.
    """
    if prompt is None:
        return read_prompts("demo")[0]
    if not prompt.strip():
        raise ValueError("--prompt is empty: say what the video shall show, or leave the option out.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"--prompt {prompt!r} has bytes that are no text in this locale, from character {error.start} on. "
            f"Set LC_ALL=C.UTF-8, or say it in other letters."
        ) from error
    return prompt.strip()


def _from_text(file: Path, text: str) -> list[tuple[int, str]]:
    # Not splitlines, which also ends a line at what JSON and CSV may have inside a prompt, as U+2028.
    return list(enumerate(text.split("\n"), start=1))


def _from_csv(file: Path, text: str) -> list[tuple[int, str]]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise ValueError(f"{file} must have a column `prompt`, its first line is {text.splitlines()[:1]}.")
        return [(reader.line_num, row["prompt"] or "") for row in reader]
    except csv.Error as error:
        raise ValueError(f"{file} cannot be read as CSV after line {reader.line_num}: {error}.") from error


def _from_jsonl(file: Path, text: str) -> list[tuple[int, str]]:
    prompts = []
    for number, line in _from_text(file, text):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        # Brackets in more brackets than Python follows.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}, is not JSON: {error}.") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ValueError(f"{file}, line {number}, must be a string or have the key `prompt`, got {line.strip()}.")
        prompts.append((number, prompt))
    return prompts


_READERS = {".csv": _from_csv, ".jsonl": _from_jsonl}
