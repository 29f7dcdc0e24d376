"""What other systems lack is said in one sentence."""

import sys

import pytest

from diffseg.errors import DiffsegError
from diffseg.lab import locks
from diffseg.lab.cli import MAC, main


def test_without_file_locks_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(DiffsegError, match="on Windows work in WSL"):
        locks.acquire(tmp_path / "lock", "busy")
    assert not (tmp_path / "lock").exists()


def test_a_file_system_without_locks_is_named_and_not_called_busy(tmp_path, monkeypatch):
    def flock(file, kind):
        assert file.readable() and file.writable()  # as NFS asks for shared locks and for others
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(DiffsegError, match="lock cannot be locked .No locks available.; set out to a file system"):
        locks.acquire(tmp_path / "lock", "busy", waiting="waits")


def test_macos_is_told_what_was_not_tried(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["run", "no-such-file"]) == 1
    assert MAC in capsys.readouterr().out
