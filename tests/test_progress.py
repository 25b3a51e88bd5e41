"""Long work says how far it is, in a log too; short work says nothing."""

import logging

from staff.runtime import progress


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
