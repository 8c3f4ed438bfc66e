"""Facts about the machine."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
import sys

import pytest

from tercet.runs import environment
from tercet.runs.environment import _physical_cores, default_threads


def test_the_facts_are_json_and_name_versions_and_cpus() -> None:
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpus"] >= 0.1 and facts["memory_gib"] > 0
    assert 1 <= facts["cores"] <= max(1, facts["cpus"])
    assert facts["libraries"]["torch"] and facts["python"] == sys.version.split()[0]


def test_the_facts_say_neither_who_nor_where() -> None:
    words = json.dumps({key: value for key, value in environment().items() if key != "libraries"})
    assert socket.gethostname() not in words
    assert len(getpass.getuser()) < 3 or f'"{getpass.getuser()}"' not in words


def test_nothing_of_run_folders_imports_torch() -> None:
    code = (
        "import sys, tercet.runs, tercet.runs.report; tercet.runs.environment(); "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("said", "threads"), [(None, 6), ("3", 3), ("4,2", 4), ("0", 6), ("", 6), ("many", 6)])
def test_threads_are_what_omp_num_threads_says_or_one_for_every_core(said, threads):
    variables = {} if said is None else {"OMP_NUM_THREADS": said}
    assert default_threads({"cores": 6, "variables": variables}) == threads


def test_logical_cpus_of_one_core_count_once(tmp_path):
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{siblings}\n")
    assert _physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert _physical_cores({1, 3}, tmp_path) == 1
    assert _physical_cores({0, 1, 7, 8}, tmp_path) == 4
