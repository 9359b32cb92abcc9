"""Replaced files: whole or not there."""

import contextlib
import errno
import os
import stat

import pytest

from lora_jax._io import replacement


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: events.append(name) or real(*a)
        )
    replacement.write_bytes(tmp_path / "a", b"new")
    assert events == ["fsync", "replace", "fsync"]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, name):
    def fail(*args):
        raise OSError(errno.ENOSPC, "no space left")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="no space left"):
        replacement.write_bytes(tmp_path / "a", b"new")
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("a", b"old")]


def test_file_systems_that_cannot_synchronize_directories(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    replacement.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_permissions_are_the_usual_ones(tmp_path):
    (tmp_path / "usual").touch()
    replacement.write_text(tmp_path / "a", "text")
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_nothing_is_there_before_it_is_whole(tmp_path):
    with (
        contextlib.suppress(KeyboardInterrupt),
        replacement.replacing(tmp_path / "a") as new,
    ):
        new.write_bytes(b"half")
        assert not (tmp_path / "a").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
