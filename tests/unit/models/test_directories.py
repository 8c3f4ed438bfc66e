import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tercet.errors import ModelError, UsageError
from tercet.models.directories import cache_directory, made_once, new_directory


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("TERCET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_directory() == tmp_path / "shared" / "tercet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "tercet"


def test_nothing_is_kept_when_making_fails(tmp_path):
    with pytest.raises(RuntimeError, match="half"), made_once(tmp_path / "model") as making:
        assert making is not None
        (making / "config.json").write_text("{}")
        raise RuntimeError("half-way")
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def make(directory: Path, log: Path, slow_s: float) -> None:
    with made_once(directory) as making:
        if making is not None:
            (making / "part").write_text("one")
            with log.open("a") as stream:
                stream.write("made\n")
            time.sleep(slow_s)
            (making / "rest").write_text("two")


def test_processes_that_want_the_same_directory_make_it_once(tmp_path):
    directory, log = tmp_path / "model", tmp_path / "log"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=make, args=(directory, log, 0.3)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert log.read_text() == "made\n"
    assert {path.name for path in directory.iterdir()} == {"part", "rest"}


def test_what_a_killed_process_left_is_neither_used_nor_kept(tmp_path):
    directory, log = tmp_path / "model", tmp_path / "log"
    killed = multiprocessing.get_context("spawn").Process(target=make, args=(directory, log, 60))
    killed.start()
    while not log.exists():
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not directory.exists()
    assert len(list(tmp_path.glob(".model.making-*"))) == 1
    make(directory, log, 0)
    assert {path.name for path in directory.iterdir()} == {"part", "rest"}
    assert not list(tmp_path.glob(".model.making-*"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="TERCET_CACHE"), made_once(tmp_path / "file" / "model"):
        pass


def test_a_new_directory_takes_the_place_of_an_empty_one_and_of_nothing_else(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    with new_directory(tmp_path / "empty") as making:
        (making / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"
    with pytest.raises(UsageError, match="not empty"), new_directory(tmp_path / "full"):
        pass
    assert (tmp_path / "full" / "precious").read_text() == "kept"
