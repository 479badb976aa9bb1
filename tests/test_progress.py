"""What rank 0 shows: plain lines where there is no terminal, one line rewritten in place on one, all of it in the log."""

import logging
import sys

import pytest

from bone_ds.progress import Progress, hold_log_lines

RATES = (1000.0, 900.0, 400.0)


def show(progress):
    progress.say("model tiny")
    progress.step(1, 2.5, 1e-3, 0.7, RATES)
    progress.step(2, 2.25, 5e-4, 0.6, RATES)
    progress.say("done")


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    show(Progress(tmp_path / "log.txt", steps=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 4
    for part in ("step 1/2", "loss 2.5000", "lr 1.00e-03", "grad 0.700", "1000 all", "900 real", "400 loss", "GiB", "left"):
        assert part in lines[1]


def test_in_place_on_a_terminal_and_no_wider_than_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    show(Progress(tmp_path / "log.txt", steps=2))
    shown = capsys.readouterr().out
    assert shown.count("\r\x1b[K") == 2
    assert shown.endswith("\ndone\n")
    assert max(map(len, shown.replace("\x1b[K", "").splitlines())) < 60
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


@pytest.mark.parametrize("columns, last", [(200, "400 loss"), (80, "GiB"), (66, "left"), (30, "loss 2.5000"), (6, "step ")])
def test_a_narrow_terminal_shows_the_first_fields_whole(tmp_path, capsys, monkeypatch, columns, last):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    Progress(tmp_path / "log.txt", steps=200).step(1, 2.5, 1e-3, 0.7, RATES)
    line = capsys.readouterr().out.removeprefix("\r\x1b[K")
    assert line.endswith(last) and len(line) < columns
    assert (tmp_path / "log.txt").read_text().endswith("400 loss\n")


def test_other_ranks_are_silent(capsys):
    show(Progress(None, steps=2))
    assert capsys.readouterr().out == ""


def test_what_the_packages_log_is_shown_and_kept(tmp_path, capsys):
    Progress(tmp_path / "log.txt", steps=2)
    logging.getLogger("bone_ds").warning("%s took its place", "chunked")
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "chunked took its place\n"
    Progress(None, steps=2)
    logging.getLogger("bone_ds").warning("unheard")
    assert capsys.readouterr().out == ""


def test_what_was_logged_before_is_shown_too(tmp_path, capsys):
    hold_log_lines()
    logging.getLogger("bone_ds").warning("chunked took its place")
    assert capsys.readouterr() == ("", "")
    Progress(tmp_path / "log.txt", steps=2)
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "chunked took its place\n"


@pytest.mark.parametrize(("first_step", "step", "steps"), [(0, 5, 10), (90, 95, 100)])
def test_time_left_counts_from_where_the_run_began(tmp_path, capsys, monkeypatch, first_step, step, steps):
    progress = Progress(tmp_path / "log.txt", steps, first_step)
    monkeypatch.setattr("time.monotonic", lambda: progress.started + 100)
    progress.step(step, 1.0, 1e-4, 0.5, RATES)
    assert "1:40 left" in capsys.readouterr().out
