from __future__ import annotations

import pytest

from diffsparse.eval.prompts import SHIPPED, read_prompts


def write(folder, name, text):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_set_has_16_prompts(name):
    assert len(read_prompts(name)) == 16


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat, asleep\n\n  a “dog”  \n"),
        ("p.csv", 'id,prompt\n1,"a cat, asleep"\n2,\n3,a “dog”\n'),
        ("p.jsonl", '{"prompt": "a cat, asleep", "id": 1}\n\n"a “dog”"\n'),
        ("bom.txt", "\ufeffa cat, asleep\r\na “dog”"),
    ],
)
def test_every_kind_of_file_gives_its_prompts_in_order(tmp_path, name, text):
    assert read_prompts(write(tmp_path, name, text)) == ["a cat, asleep", "a “dog”"]


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\x0c"])
@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", "{}\nb"), ("p.csv", "prompt\n{}\nb\n"), ("p.jsonl", '"{}"\n"b"\n')]
)
def test_only_the_end_of_a_line_ends_a_prompt(tmp_path, name, text, inside):
    # JSON must have \x0c escaped.
    written = "\\f" if (name, inside) == ("p.jsonl", "\x0c") else inside
    assert read_prompts(write(tmp_path, name, text.format(f"a{written}cat"))) == [f"a{inside}cat", "b"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", "\n \n", "no prompt"),
        ("p.txt", "a cat\na dog\n a cat\n", "'a cat' twice, in lines 1 and 3"),
        ("p.txt", b"caf\xe9", "UTF-8"),
        ("p.csv", "text\na cat\n", "column `prompt`"),
        ("p.csv", "", "column `prompt`"),
        ("p.jsonl", '"a cat"\n{', "line 2, is not JSON"),
        ("p.jsonl", '"a cat"\n' + "[" * 10_000, "line 2, is not JSON"),
        ("p.csv", f'prompt\na cat\n"{"z" * 140_000}"\n', "as CSV after line 2: field larger"),
        ("p.jsonl", '{"text": "a cat"}', "line 1"),
        ("p.jsonl", '"a cat"\n"a dog \\ud83d"', "line 2, is cut inside a character"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=says):
        read_prompts(write(tmp_path, name, text))


def test_a_file_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"demo or general or a file, got nowhere\.txt"):
        read_prompts("nowhere.txt")
