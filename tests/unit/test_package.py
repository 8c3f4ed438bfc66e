from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tercet

SOURCE = {path: path.read_text(encoding="utf-8") for path in sorted(Path(tercet.__file__).parent.rglob("*.py"))}
REPOSITORY = Path(__file__).parents[2]


def test_every_field_of_every_config_is_read_somewhere():
    read = set(re.findall(r"\.(\w+)", "\n".join(SOURCE.values())))
    unread = [
        f"{node.name}.{line.target.id}"
        for text in SOURCE.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id not in read
        and "ClassVar" not in ast.unparse(line.annotation)
    ]  # fmt: skip
    assert unread == []


@pytest.mark.parametrize(
    "module",
    [
        "types",
        "errors",
        "config",
        "data",
        "runs",
        "algorithms",
        "evaluation",
        "rewards",
        "recipes",
        "cli.main",
        "engine.base",
    ],
)
def test_importing_it_imports_no_torch(module):
    code = f"import sys, tercet.{module}; print({{'torch', 'transformers', 'peft', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_the_readme_has_two_commands_and_ci_runs_the_second():
    commands = re.findall(r"^python3 -m venv .*$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert [command.split(" && ")[-1] for command in commands] == [".venv/bin/tercet rlhf", "scripts/check"]
    pattern = re.search(r"grep -m1 '(.*)' README.md", (REPOSITORY / ".ci/run").read_text())
    assert pattern is not None
    assert [bool(re.search(pattern[1], command)) for command in commands] == [False, True]
