from __future__ import annotations

from pathlib import Path

import pytest

from tercet.cli.models import main, size_in_words
from tercet.errors import UsageError


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "models"


def test_an_empty_cache_says_how_to_fetch(cache, capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "no: tercet models fetch smollm2-135m" in text
    assert f"Nothing is in {cache} yet." in text


def test_a_fetched_model_is_listed_with_its_size(cache, capsys):
    assert main(["fetch", "tiny"]) == 0
    (directory,) = cache.glob("tiny-*")
    assert f"tiny is in {directory} (" in capsys.readouterr().out
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert directory.name in text and "made on this machine" in text and "no: tercet models fetch tiny" not in text


def test_fetch_wants_a_name_and_list_none():
    with pytest.raises(UsageError, match="fetch what"):
        main(["fetch"])
    with pytest.raises(UsageError, match="list takes no name"):
        main(["list", "tiny"])


def test_a_size_is_said_in_megabytes_and_gigabytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1_500_000))
    assert size_in_words(tmp_path) == "1.5 MB"
    with (tmp_path / "b").open("wb") as hole:
        hole.truncate(2_000_000_000)
    assert size_in_words(tmp_path) == "2.00 GB"
