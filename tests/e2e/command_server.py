"""Runs commands in processes of their own, forked from one that has imported the libraries already.

Importing torch and its friends takes seconds, and these tests run the command line a hundred times. A line of JSON on
standard input asks: `{"argv": …, "stdin": …, "stdout": …, "stderr": …, "environment": …}` forks a process that runs
`tercet` with these words and variables and answers its id; `{"wait": id}` answers its exit code (negative: the signal
that ended it) once it has ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

LIBRARIES = (
    "matplotlib.pyplot", "rich.console", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama",
    "tercet.engine.local", "tercet.models.export", "tercet.recipes.measure", "tercet.runs.report",
)  # fmt: skip


def run(request: dict[str, Any]) -> int:
    """The child: a `tercet` command as the shell would start it."""
    for number, name, flags in (
        (0, request["stdin"] or os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(name, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.update(request["environment"])
    # Whoever started the tests may have had Ctrl-C switched off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from tercet.cli.main import main

    try:
        return main(request["argv"])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    os.environ["COLUMNS"] = "200"  # so that no table breaks the words a test looks for
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
            continue
        child = os.fork()
        if child == 0:
            os._exit(run(request))
        print(child, file=answers, flush=True)


if __name__ == "__main__":
    serve()
