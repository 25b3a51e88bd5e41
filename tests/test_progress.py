"""Long work says how far it is, in a log too; short work says nothing."""

import io
import logging
import re
import sys
from types import SimpleNamespace

from staff.runtime import progress
from staff.training.reports import Progress


def test_a_log_gets_a_line_now_and_then_of_what_takes_long_and_none_of_what_does_not(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    with progress.progress(3, "effort") as bar:
        bar.update(3)
    assert not caplog.messages
    monkeypatch.setattr(progress, "EVERY", 1e-9)
    with progress.progress(3, "effort") as bar:
        bar.update(2)
        bar.update(1)
    assert caplog.messages[0].startswith("effort: 2 of 3 samples, 00:00 gone")
    assert len(caplog.messages) == 2 and capsys.readouterr() == ("", "")


def test_a_fine_tuning_says_its_steps_its_remaining_time_and_its_loss(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "EVERY", 1e-9)
    shown, state = Progress("small", 24), SimpleNamespace(max_steps=6, global_step=2)  # it resumes after the second
    shown.on_train_begin(None, state, None)
    shown.on_log(None, state, None, {"loss": 4.25})
    shown.on_step_end(None, state, None)
    shown.close()
    assert caplog.messages[0] == "fine-tuning small on 24 samples: 6 steps"
    assert re.fullmatch(
        r"fine-tuning small: 3 of 6 steps, 00:00 gone, \d\d:\d\d to go, loss 4\.250", caplog.messages[1]
    )


def test_a_terminal_shows_no_bar_without_a_name_and_no_dictionary(run, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run("method=random")
    shown = terminal.getvalue()
    bars = {bar.strip("\x1b[A\n ") for bar in re.split(r"[\r\n]", shown) if "%|" in bar}
    names = {bar.split(":")[0] for bar in bars}
    assert names == {"tokenise", "loading target", "fine-tuning target", "answers", "nll"}
    assert any(re.search(r"fine-tuning target.* 1/1 \[\d\d:\d\d<\d\d:\d\d", bar) for bar in bars), "the time to go"
    assert "{'loss'" not in shown + capsys.readouterr().out


def test_a_log_line_is_written_above_a_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = progress.LogHandler(terminal)
    with progress.tqdm(total=2, desc="work", file=terminal, leave=False) as bar:
        bar.update(1)
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
    before, _, after = terminal.getvalue().partition("a line\n")
    assert before.endswith("\r") and "work:" in before and "work:" in after, "cleared, and drawn again"
