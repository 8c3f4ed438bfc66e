"""Facts about the machine."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
import sys

from tercet.runs import environment


def test_the_facts_are_json_and_name_versions_and_cpus() -> None:
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpus"] >= 0.1 and facts["memory_gib"] > 0
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
