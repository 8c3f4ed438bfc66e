"""Checkpoints on disk: whole or not there, within their folder, and gone when their time is up."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tercet.errors import CheckpointError, UsageError
from tercet.server.store import Run, Store, now

RUN = "sess-1:train:0"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "served")
    store.begin(Run(RUN, "Qwen/Qwen3-8B-Base", "tiny", 8, {"who": "me"}, now(), now()))
    return store


def save(store: Store, name: str = "a", kind: str = "weights", content: str = "1", **settings: Any) -> Any:
    given = {"ttl_seconds": None, "user_metadata": None, "overwrite": False, **settings}
    return store.save(RUN, kind, name, lambda directory: (directory / "file").write_text(content) and None, **given)


def test_a_checkpoint_is_found_by_its_name_by_whoever_opens_the_folder(store):
    saved = save(store, user_metadata={"step": 3})
    assert saved.path == f"tinker://{RUN}/weights/a"
    found = Store(store.root).checkpoint(saved.path)
    assert (found.directory / "file").read_text() == "1"
    assert found.as_json() | {"time": ""} == {
        "checkpoint_id": "weights/a", "checkpoint_type": "training", "time": "", "tinker_path": saved.path,
        "size_bytes": 1, "public": False, "user_metadata": {"step": "3"}, "expires_at": None,
    }  # fmt: skip
    assert found.run.user_metadata == {"who": "me"}


def test_a_name_is_taken_once_unless_it_may_be_overwritten(store):
    save(store)
    with pytest.raises(UsageError, match="is there already; give another name, or overwrite=True"):
        save(store, content="2")
    assert (save(store, content="2", overwrite=True).directory / "file").read_text() == "2"
    assert save(store, kind="sampler_weights").path == f"tinker://{RUN}/sampler_weights/a"


@pytest.mark.parametrize("name", ["..", "../b", "a/b", ".hidden", "", "x" * 201, "a\\b", "a\0b", "a.tmp-1"])
def test_no_name_leads_out_of_the_folder(store, name):
    with pytest.raises(UsageError, match="cannot name a checkpoint"):
        save(store, name)
    with pytest.raises((UsageError, CheckpointError)):
        store.checkpoint(f"tinker://{RUN}/weights/{name}")
    with pytest.raises(UsageError, match="cannot name a training run"):
        store.run(name or "/")


@pytest.mark.parametrize("path", ["a", "tinker://a", "tinker://a/b/c", "tinker://a/weights/b/c", "file://a/weights/b"])
def test_what_is_no_path_is_refused(store, path):
    with pytest.raises(UsageError, match="names no checkpoint here"):
        store.checkpoint(path)


def test_a_save_that_fails_leaves_the_old_one_and_no_half_of_the_new(store):
    save(store)

    def write(directory: Path) -> None:
        (directory / "file").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.save(RUN, "weights", "a", write, ttl_seconds=None, user_metadata=None, overwrite=True)
    assert [path.name for path in (store.root / RUN / "weights").iterdir()] == ["a"]
    again = Store(store.root)
    assert [each.name for each in again.checkpoints()] == ["a"]
    assert (again.checkpoint(f"tinker://{RUN}/weights/a").directory / "file").read_text() == "1"


def test_what_has_expired_is_not_served_and_is_removed(store):
    lasting = save(store, "lasting", ttl_seconds=3600)
    brief = save(store, "brief")
    store.expire_in(brief, 0)
    assert [each.name for each in store.checkpoints(RUN)] == ["lasting"]
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        store.checkpoint(brief.path)
    store.tidy()
    assert not brief.directory.exists() and lasting.directory.exists()
    store.expire_in(lasting, None)
    assert json.loads((lasting.directory / "checkpoint.json").read_text())["expires_at"] is None


def test_runs_are_listed_the_newest_first(store):
    store.begin(Run("sess-2:train:0", "tiny", "tiny", 4, None, now(), now()))
    assert [run.training_run_id for run in store.runs()] == ["sess-2:train:0", RUN]
    before = store.run(RUN)
    store.touch(RUN, now())
    assert store.run(RUN).last_request_time > before.last_request_time


def test_what_is_being_written_is_not_listed(store):
    save(store, "whole")
    half = store.root / RUN / "weights" / "half.tmp-new"
    half.mkdir()
    (half / "checkpoint.json").write_text('{"time": "')
    assert [each.name for each in store.checkpoints()] == ["whole"]
    store.tidy()
    assert half.exists()


@pytest.mark.parametrize(("there", "wanted"), [({"old", "new"}, "old"), ({"old", "final"}, "final"), ({"old"}, "old")])
def test_of_a_checkpoint_that_was_being_replaced_one_is_left_whenever_the_server_stops(store, there, wanted):
    folder = save(store, content="final").directory
    for name in ("old", "new"):
        if name in there:
            beside = folder.with_name(f"a.tmp-{name}")
            beside.mkdir()
            (beside / "file").write_text(name)
            (beside / "checkpoint.json").write_text((folder / "checkpoint.json").read_text())
    if "final" not in there:
        (folder / "file").unlink()
        (folder / "checkpoint.json").unlink()
        folder.rmdir()
    [found] = Store(store.root).checkpoints()
    assert (found.directory / "file").read_text() == wanted
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_replacing_leaves_nothing_beside(store):
    save(store)
    folder = save(store, content="2", overwrite=True).directory
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_threads_that_write_read_and_remove_at_once_do_not_fall_over_one_another(store):
    over = threading.Event()

    def until_over(work: Callable[[], object]) -> None:
        while not over.is_set():
            work()

    def remove() -> None:
        for each in store.checkpoints():
            with contextlib.suppress(CheckpointError):
                store.expire_in(each, 0 if each.name == "a" else None)
                if each.name == "b":
                    store.delete(each)

    with ThreadPoolExecutor(4) as pool:
        others = [
            pool.submit(until_over, work) for work in (store.tidy, remove, store.runs, lambda: store.touch(RUN, now()))
        ]
        for turn in range(40):
            save(store, "ab"[turn % 2], content=f"{turn}", overwrite=True)
        over.set()
        assert [each.result() for each in others] == [None] * 4


def test_a_time_out_of_range_is_refused_before_anything_is_written(store):
    lasting = save(store, "lasting", ttl_seconds=315_360_000)
    for seconds in (10**12, 315_360_001, -1):
        with pytest.raises(UsageError, match=f"ttl_seconds is {seconds}; it must be from 0 to 315360000"):
            save(store, "a", ttl_seconds=seconds)
        with pytest.raises(UsageError, match=f"ttl_seconds is {seconds}"):
            store.expire_in(lasting, seconds)
    assert [path.name for path in lasting.directory.parent.iterdir()] == ["lasting"]


def test_a_checkpoint_keeps_the_rank_it_was_saved_with(store):
    path = save(store, lora_rank=8).path
    [run] = store.runs()
    store.begin(replace(run, lora_rank=4))
    assert store.checkpoint(path).lora_rank == 8
    # A record of an earlier server says nothing: it is the run's.
    record = store.checkpoint(path).directory / "checkpoint.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "lora_rank"}))
    assert store.checkpoint(path).lora_rank == 4


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "TypeError"),
        (None, "IsADirectoryError"),
        ({"training_run_id": "sess-3:train:0"}, "ValueError: it is of the run 'sess-3:train:0'"),
        ({"created": 5}, "ValueError: a name or time is no text"),
    ],
)
def test_a_damaged_run_is_left_out_of_lists_which_the_log_says_once_and_told_to_who_asks_for_it(
    store, content, told, caplog
):
    save(store)
    other = "sess-2:train:0"
    store.begin(Run(other, "tiny", "tiny", 4, None, now(), now()))
    path = store.root / other / "run.json"
    written = json.loads(path.read_text())
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(content if isinstance(content, str) else json.dumps({**written, **content}))
    for _ in range(2):
        assert [run.training_run_id for run in store.runs()] == [RUN]
        assert [each.name for each in store.checkpoints()] == ["a"]
    [said] = caplog.messages
    assert said.startswith(f"left out of lists, and never expires: {path} is damaged ({told}")
    for ask in (lambda: store.run(other), lambda: store.checkpoints(other)):
        with pytest.raises(CheckpointError, match="run.json is damaged .*; put it right, or remove the folder it is"):
            ask()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"time": 5, "expires_at": null}',
        '{"time": "a", "expires_at": "then"}',
        '{"time": "a", "expires_at": null, "user_metadata": null}',
        '{"time": "a", "expires_at": null, "size_bytes": 5, "user_metadata": ["a"]}',
        '{"time": "a", "expires_at": null, "size_bytes": 5, "user_metadata": null, "colour": "red"}',
    ],
)
def test_a_damaged_checkpoint_hides_no_other_and_is_neither_served_nor_removed(store, content, caplog):
    save(store)
    path = save(store, "b").directory / "checkpoint.json"
    brief = save(store, "brief")
    store.expire_in(brief, 0)
    path.write_text(content)
    for _ in range(2):
        assert [each.name for each in store.checkpoints()] == ["a"]
        store.tidy()
    assert path.exists() and not brief.directory.exists()
    [said] = caplog.messages
    assert said.startswith(f"left out of lists, and never expires: {path} is damaged")
    with pytest.raises(CheckpointError, match=r"b/checkpoint.json is damaged"):
        store.checkpoint(f"tinker://{RUN}/weights/b")
