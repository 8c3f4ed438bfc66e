"""Rows are found in files of every kind, in directories, in saved data sets and, by name, on the hub."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tercet.data import load_comparisons, load_conversations, splits
from tercet.errors import DataError


def rows(*words: str) -> list[dict[str, str]]:
    return [{"prompt": f"Say {word}", "completion": word} for word in words]


def lines(*words: str) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(*words))


def answers(source: Path | str, split: str = "train") -> list[str]:
    return [conversation[-1].content for conversation in load_conversations(str(source), split=split).rows]


def parquet(path: Path, *words: str) -> None:
    import pyarrow
    from pyarrow import parquet as files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(pyarrow.Table.from_pylist(rows(*words)), path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    said = ["one", "two, or 2", "zwei\nZeilen"]
    (tmp_path / "a.jsonl").write_text(lines(*said), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*said).encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows(*said), indent=2), encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines(*said), encoding="utf-8")
    parquet(tmp_path / "a.parquet", *said)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows(*said))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.parquet", "a.csv"):
        assert answers(tmp_path / name) == said, name


def test_a_line_ends_at_a_line_feed_and_not_at_a_line_separator(tmp_path: Path) -> None:
    said = ["before\u2028after", "next\u2029one\x85two"]
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*said), encoding="utf-8")
    assert answers(path) == said


def test_what_is_no_json_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("one").encode() + b'\n{"prompt": \n' + b"[1]\n" + b'"\xff"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON in UTF-8"):
        load_conversations(str(path))
    loaded = load_conversations(str(path), skip_bad_rows=True)
    assert loaded.dropped == {"not JSON in UTF-8": 2, "not a JSON object": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    content = {"a.jsonl.gz": gzip.compress(lines("one").encode())[:-9], "a.parquet": b"PAR1", "a.json": b"[{"}[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_conversations(str(tmp_path / name))


def test_a_row_of_a_table_with_too_few_cells_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nHi,Hello\nBye\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: row 2: not as many cells as columns"):
        load_conversations(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/part.jsonl", "test/part.jsonl"),
        ("my-training.jsonl", "my_validation.jsonl"),
        ("train_sft.jsonl", "test_sft.jsonl"),
        ("part.jsonl", "dev.jsonl"),
    ],
)
def test_a_directory_has_the_splits_its_files_are_named_after(tmp_path: Path, train: str, test: str) -> None:
    for name, word in ((train, "one"), (test, "two")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines(word), encoding="utf-8")
    (tmp_path / "README.md").write_text("about it", encoding="utf-8")
    (tmp_path / "dataset_infos.json").write_text("{}", encoding="utf-8")
    assert answers(tmp_path) == ["one"]
    assert answers(tmp_path, "test") == ["two"]


def test_a_directory_laid_out_as_on_the_hub_is_loaded_by_path_shards_in_order(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", "one")
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", "two")
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", "three")
    assert answers(tmp_path) == ["one", "two"]
    assert answers(tmp_path, "test") == ["three"]
    assert splits(str(tmp_path)) == ("train", "test")


def test_a_configuration_is_a_folder_of_a_directory(tmp_path: Path) -> None:
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines(name), encoding="utf-8")
    assert answers(f"{tmp_path}:de") == ["de"]
    with pytest.raises(DataError, match="fr, which is not there"):
        answers(f"{tmp_path}:fr")


def test_a_saved_data_set_is_loaded_with_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = {"train": datasets.Dataset.from_list(rows("one")), "test": datasets.Dataset.from_list(rows("two"))}
    datasets.DatasetDict(table).save_to_disk(str(tmp_path / "both"))
    table["train"].save_to_disk(str(tmp_path / "one"))
    assert answers(tmp_path / "both", "test") == ["two"]
    assert answers(tmp_path / "one") == ["one"]


def test_files_of_two_kinds_for_one_split_are_refused_as_they_may_be_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines("one"), encoding="utf-8")
    parquet(tmp_path / "train.parquet", "one")
    with pytest.raises(DataError, match="several kinds"):
        answers(tmp_path)


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines("one"), encoding="utf-8")
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        answers(tmp_path, "test")
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        answers(tmp_path / "train.jsonl", "test")


def test_the_split_that_stands_in_for_another_is_announced(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text(lines("one"), encoding="utf-8")
    assert "(validation): prompt/completion, 1 rows" in load_conversations(str(tmp_path), split="test").describe()


def test_splits_for_conversations_and_for_comparisons_are_told_apart_by_name(tmp_path: Path) -> None:
    (tmp_path / "train_sft.jsonl").write_text(lines("one"), encoding="utf-8")
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    (tmp_path / "train_prefs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    assert load_conversations(str(tmp_path)).split == "train_sft"
    assert load_comparisons(str(tmp_path)).split == "train_prefs"


@pytest.mark.parametrize("source", ["missing/rows.jsonl", "/no/such/place", "three/part/name"])
def test_a_path_that_does_not_exist_is_an_error_that_says_what_may_be_given(source: str) -> None:
    with pytest.raises(DataError, match="'builtin', a hub id such as"):
        load_conversations(source)


def test_an_empty_file_and_an_empty_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        load_conversations(str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="there are no rows"):
        load_conversations(str(tmp_path / "a.jsonl"))


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    # In a process of its own: the datasets library reads HF_HUB_OFFLINE when it is imported.
    program = (
        "from tercet.data import load_conversations\n"
        "from tercet.errors import DataError\n"
        "try:\n    load_conversations('nobody/nothing:plain')\nexcept DataError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    for part in ("nobody/nothing:plain", "offline", "download the data elsewhere", "'builtin'", "HF_ENDPOINT"):
        assert part.lower() in done.stdout.lower(), done.stdout + done.stderr


def test_importing_the_loaders_imports_neither_torch_nor_datasets() -> None:
    program = (
        "import sys, tercet.data; print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
