"""The command and the page: what is in it, and that what comes from outside stays text."""

from __future__ import annotations

import json
import re

import pytest
from commands import run_command
from page_reader import HOSTILE, Page

from diffsparse.eval import report
from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.run_folder import Pair, RunFolder


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    monkeypatch.setattr(report, "lpips_or_reason", lambda net, backbone: NoLpips("alex", "n/a: get it at this address"))


def make_report(*argv):
    return run_command("eval", "report", *argv)


def test_the_page_stands_alone(fake_run, capsys):
    run = fake_run(["a cat", "a dog"], ["fast", "slow"])
    assert make_report(run) == 0
    html = (run / "report.html").read_text()
    page = Page(html)
    outside = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith("data:") for value in outside)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for shown in ("a cat", "fast − slow", "n/a: get it at this address", "diffsparse eval run --output", "early step"):
        assert shown in page.text
    clips = json.loads(page.data)
    assert len(clips) == 4
    assert all(clip["uri"].startswith("data:video/mp4;base64,") for clip in clips)
    shown = capsys.readouterr().out
    assert "report.html" in shown
    # Of two videos 1.5 and 2.5 seconds.
    assert re.search(r"\sin attention\s.*2\.0 \(dense 4\.0\)", shown)
    assert page.text.count("2.0(dense 4.0)") == 2
    assert page.text.count("2.5dense 4.0") == 2
    assert (run / "report.md").read_text().count("2.0 (dense 4.0)") == 2
    assert "n/a: get it at this address" in shown


def test_a_hostile_prompt_or_config_is_only_text(fake_run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    name = r"<i>\[red]"
    plain, hostile = fake_run(["a cat"], name="plain"), fake_run([HOSTILE], ["<b>", "fast"], name=name)
    RunFolder(hostile).remove("fast", Pair(0, 0))
    RunFolder(hostile).note_failure("fast", Pair(0, 0), HOSTILE)
    make_report(plain)
    assert make_report(hostile, plain, "--output", hostile) == 1
    # The heading of its column, in which brackets are no colour.
    assert re.search(rf"┃ {re.escape(f'{hostile}: fast')} +┃", capsys.readouterr().out)
    pages = [Page((run / "report.html").read_text()) for run in (plain, hostile)]
    kinds = [{(tag, name) for tag, attributes in page.tags for name in attributes or [""]} for page in pages]
    # A missing video adds no kind of element that the plain page has not.
    assert kinds[1] - kinds[0] == set()
    assert sum(tag == "script" for tag, _ in pages[1].tags) == 2
    assert HOSTILE in pages[1].text
    assert any(HOSTILE in clip["about"] for clip in json.loads(pages[1].data))
    markdown = (hostile / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script|(?<!\\)\*\*b|(?<!\\)`c", markdown)
    heading = next(line for line in markdown.splitlines() if line.startswith("| prompt"))
    row = next(line for line in markdown.splitlines() if "alert" in line and " | 0 | " in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == heading.count("|")


def test_what_no_video_has_counted_has_no_column(fake_run):
    run = fake_run(["a cat"])
    for file in run.glob("*/*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_seconds": None}))
    make_report(run, "--max-megabytes", "0")
    assert "in attention" not in Page((run / "report.html").read_text()).text


def test_the_player_claims_no_sparse_attention_where_none_ran(fake_run):
    run = fake_run(["a cat"], ["seacache"])
    file = run / "seacache" / "000-seed0.json"
    nothing = {"density": None, "overall_density": None, "transformers": []}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention": nothing}))
    make_report(run)
    (clip,) = json.loads(Page((run / "report.html").read_text()).data)
    assert clip["about"] == "“a cat”, seed 0: dense in 10.0 s; by seacache in 5.0 s."


def test_what_does_not_fit_is_left_out_and_told(fake_run):
    run = fake_run(["a cat", "a dog"])
    make_report(run, "--max-megabytes", "0")
    assert "Look at them" not in Page((run / "report.html").read_text()).text
    size = len((run / "report.html").read_text())
    make_report(run, "--max-megabytes", "inf")
    clip = (len((run / "report.html").read_text()) - size) / 2e6
    make_report(run, "--max-megabytes", 1.2 * clip)
    assert "1 more would make the page too large" in Page((run / "report.html").read_text()).text


def test_a_report_of_a_report_is_the_same(fake_run):
    run = fake_run(["a cat", "a dog"], ["fast", "slow"])
    make_report(run, "--max-megabytes", "0")
    first = (run / "report.json").read_text()
    make_report(run, "--max-megabytes", "0")
    assert (run / "report.json").read_text() == first


@pytest.mark.parametrize(
    ("more", "says"), [(["--max-megabytes", -1], "--max-megabytes"), (["--output", "/proc/x"], "--output")]
)
def test_bad_input_is_said(fake_run, more, says):
    with pytest.raises(ValueError, match=says):
        make_report(fake_run(["a"]), *more)
