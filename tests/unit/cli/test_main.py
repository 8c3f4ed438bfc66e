from __future__ import annotations

import subprocess
import sys

import pytest

from tercet import __version__
from tercet.cli import main as cli
from tercet.errors import ConfigError, DataError, UsageError
from tercet.runs import Interrupted


class Stub:
    """A verb that does what a test wants."""

    def __init__(self, outcome: int | BaseException) -> None:
        self.outcome = outcome
        self.words: list[str] | None = None

    def main(self, argv: list[str]) -> int:
        self.words = argv
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def verb(monkeypatch):
    """Put a module of a verb in place, as a file in the package would."""

    def put(outcome: int | BaseException) -> Stub:
        stub = Stub(outcome)
        monkeypatch.setitem(sys.modules, "tercet.cli.stub", stub)
        monkeypatch.setitem(cli.VERBS, "stub", ("tercet.cli.stub", "for this test"))
        return stub

    return put


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_of_the_table_can_be_loaded(name):
    assert callable(cli.load(name).main)


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_answers_help_and_refuses_an_unknown_setting_without_torch(name):
    code = (
        "import sys\nfrom tercet.cli.main import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit as stopped: print('exit', stopped.code)\n"
        "print('exit', main([sys.argv[1], '--no-such-setting=1']))\n"
        "print('imported', sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"usage: tercet {name}"), done.stderr
    assert done.stdout.endswith("exit 0\nexit 2\nimported []\n"), done.stdout + done.stderr
    assert done.stderr.startswith("tercet: unknown setting 'no-such-setting'; ")


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and about in text for name, (_, about) in cli.VERBS.items())


def test_no_verb_at_all_shows_the_help_and_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: tercet VERB")


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tercet {__version__}\n"


def test_an_unknown_verb_is_refused_with_the_nearest(capsys):
    assert cli.main(["preferense"]) == 2
    assert capsys.readouterr().err == "tercet: unknown verb 'preferense'; did you mean 'preference'?\n"


def test_a_verb_gets_the_words_after_it_and_gives_the_exit_code(verb):
    stub = verb(3)
    assert cli.main(["stub", "--a", "b"]) == 3
    assert stub.words == ["--a", "b"]


@pytest.mark.parametrize(("error", "code"), [(DataError("row 3"), 1), (UsageError("so not"), 2), (ConfigError("x"), 2)])
def test_an_error_of_ours_is_a_line_on_standard_error_and_its_exit_code(verb, capsys, error, code):
    verb(error)
    assert cli.main(["stub"]) == code
    assert capsys.readouterr() == ("", f"tercet: {error}\n")


def test_debug_shows_where_an_error_comes_from(verb):
    stub = verb(DataError("row 3"))
    with pytest.raises(DataError):
        cli.main(["stub", "x", "--debug"])
    assert stub.words == ["x"]


def test_an_error_that_is_not_ours_is_not_hidden(verb):
    verb(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["stub"])


def test_an_interrupt_ends_with_130_and_a_friendly_line(verb, capsys):
    verb(KeyboardInterrupt())
    assert cli.main(["stub"]) == 130
    assert "interrupted; a run goes on from its last checkpoint" in capsys.readouterr().err


def test_a_run_that_saved_when_it_was_interrupted_says_how_to_go_on(verb, capsys):
    verb(Interrupted("saved in x; type the same command to go on"))
    assert cli.main(["stub"]) == 130
    assert capsys.readouterr().err == "\ntercet: saved in x; type the same command to go on\n"


def test_a_full_disk_is_an_error_in_words(verb, capsys):
    verb(OSError(28, "No space left on device", "runs/sft"))
    assert cli.main(["stub"]) == 1
    assert capsys.readouterr().err == "tercet: [Errno 28] No space left on device: 'runs/sft'; --debug shows where\n"


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from tercet.cli.main import main; sys.exit(main(['--help']))"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run([sys.executable, "-c", code], stdout=reader.stdin, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert reader.stdin is not None
    reader.stdin.close()
