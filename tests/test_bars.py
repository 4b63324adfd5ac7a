"""Progress is seen where it can be: as a bar, as lines in a log, or as asked not at all."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import attnprune
from attnprune import bars
from attnprune.bars import Lines, bar, logged


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(bars, "monotonic", lambda: now.seconds)
    return now


def test_lines_come_now_and_then(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "attnprune")
    for step in bar(range(20), what="steps"):
        clock.seconds += 4
        assert clock.seconds == 100 + 4 * (step + 1)
    assert caplog.messages == [
        "steps: 3 of 20, 12 s, about 68 s left",
        "steps: 11 of 20, 44 s, about 36 s left",
        "steps: 19 of 20, 76 s, about 4 s left",
        "steps: 20 of 20, 80 s, done",
    ]
    assert {(record.name, record.levelname) for record in caplog.records} == {("attnprune", "INFO")}


def test_what_is_over_soon_or_not_to_be_shown_writes_none(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "attnprune")
    for shown, seconds in ((True, 1), (False, 100)):
        for _ in bar(range(9), what="steps", shown=shown):
            clock.seconds += seconds
    assert not caplog.messages


def test_what_was_done_before_is_not_counted_as_speed(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "attnprune")
    with bar(what="recovery", total=100, initial=80) as shown:
        shown.set_postfix_str("0.5 before")
        clock.seconds += 20
        shown.update(10)
    assert caplog.messages[0] == "recovery: 90 of 100, 20 s, about 20 s left, 0.5 before"


def test_without_a_total_nothing_is_foretold(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "attnprune")
    shown = bar(iter([1]), what="rounds")
    assert shown.total is None
    clock.seconds += 11
    shown.update()
    shown.close()
    shown.close()
    assert caplog.messages == ["rounds: 1, 11 s", "rounds: 1, 11 s, done"]


def test_a_line_is_the_last_also_where_the_loop_is_left(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "attnprune")
    loop = iter(bar(range(5), what="steps"))
    next(loop)
    clock.seconds += 10
    next(loop)
    loop.close()  # type: ignore[attr-defined]
    assert caplog.messages[-1] == "steps: 1 of 5, 10 s, done"


def test_a_terminal_and_a_notebook_show_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm.auto import tqdm

    assert isinstance(bar([1], what="steps"), Lines)
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(bar([1], what="steps"), Lines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(bar([1, 2], what="steps")) == [1, 2]
    assert "attnprune: steps" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert isinstance(bar([1], what="steps", shown=False), Lines)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for config, drawn in (({"IPKernelApp": {}}, True), ({}, False)):  # a kernel, and IPython with its output piped
        shell = SimpleNamespace(config=config)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert isinstance(bar([1], what="steps"), tqdm if drawn else Lines)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert isinstance(bar([1], what="steps"), Lines)


def test_a_loop_over_data_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bars, "FIRST", 0.0)
    caplog.set_level(logging.INFO, "attnprune")
    data = [torch.randn(2, 5, 8) for _ in range(4)]

    def model() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()

    attnprune.prune_attention(model(), 0.5, data=data, recover=2)
    said = [line.split(":")[0] for line in caplog.messages]
    assert said == ["calibration", "calibration", "gate", "gate", "recovery", "recovery"]
    caplog.clear()
    attnprune.prune_attention(model(), 0.5, data=data, recover=2, progress=False)
    assert not caplog.messages


def test_the_command_line_writes_the_lines_to_stderr() -> None:
    code = (
        "from attnprune.bars import LOGGER, logged;"
        "LOGGER.info('before')\n"
        "with logged(): LOGGER.info('inside')\n"
        "LOGGER.info('after'); assert not LOGGER.handlers and not LOGGER.level"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("", "attnprune: inside\n")


def test_every_command_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from attnprune.cli import commands, main

    monkeypatch.setattr(bars.LOGGER, "propagate", False)  # else pytest's handlers are there
    monkeypatch.setattr(commands, "inspect", lambda args: bars.LOGGER.info("inside") or commands.Done({}, ""))
    assert main(["inspect", "."]) == 0
    assert capsys.readouterr().err == "attnprune: inside\n"


def test_a_program_that_has_set_up_its_log_keeps_it(caplog: pytest.LogCaptureFixture) -> None:
    before = list(bars.LOGGER.handlers)
    with logged():
        assert bars.LOGGER.handlers == before
    assert before == bars.LOGGER.handlers
