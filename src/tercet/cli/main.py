"""`tercet VERB ...`: find the verb, run it, and say what went wrong in words."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from tercet import __version__
from tercet.config import suggestion
from tercet.errors import TercetError, UsageError


class Verb(Protocol):
    """What the module of a verb has."""

    def main(self, argv: list[str]) -> int:
        """Carry out the verb with the words after it; 0 when all went well."""
        ...


VERBS = {
    "rlhf": ("tercet.cli.rlhf", "all three stages: supervised fine-tuning, preference model, reinforcement learning"),
    "sft": ("tercet.cli.sft", "learn from conversations"),
    "preference": ("tercet.cli.preference", "learn from comparisons to tell the better answer"),
    "reward": ("tercet.cli.reward", "learn from comparisons to give an answer one number"),
    "rl": ("tercet.cli.rl", "learn from a judge's verdicts on the policy's own answers"),
    "dpo": ("tercet.cli.dpo", "learn from pairs of answers without sampling: DPO and its family"),
    "rebel": (
        "tercet.cli.rebel",
        "learn from the policy's own answers, ranked: generate, score, prepare, learn, again",
    ),
    "kto": ("tercet.cli.kto", "learn from answers that are labelled good or bad"),
    "ppo": ("tercet.cli.ppo", "learn from scores of the policy's own answers, with a critic"),
    "eval": ("tercet.cli.eval", "win rate of a policy, accuracy and calibration of a judge"),
    "generate": ("tercet.cli.generate", "answer prompts from a file into a file"),
    "score": ("tercet.cli.score", "give every answer in a file its reward"),
    "prepare": ("tercet.cli.prepare", "make pairs of scored answers"),
    "chat": ("tercet.cli.chat", "talk to models side by side"),
    "preview": ("tercet.cli.preview", "show what a model would learn from data, token by token"),
    "serve": ("tercet.cli.serve", "let programs written for the Tinker service train and sample on this machine"),
    "report": ("tercet.cli.report", "make report.html of a run"),
    "export": ("tercet.cli.export", "write an adapter or a merged model for other tools"),
    "models": ("tercet.cli.models", "list the built-in models, or fetch one"),
    "doctor": ("tercet.cli.doctor", "what works on this machine, and why the rest does not"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except TercetError as error:
        if debug:
            raise
        print(f"tercet: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        if debug:
            raise
        # A run that saved says where, and how to go on.
        told = str(error) or "interrupted; a run goes on from its last checkpoint when the same command is given again"
        print(f"\ntercet: {told}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        if debug:
            raise
        print(f"tercet: {error}; --debug shows where", file=sys.stderr)
        return 1


def load(verb: str) -> Verb:
    """The module of a verb; importing it imports no torch.

    Raises:
        UsageError: There is no such verb; the message names the nearest.
    """
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}; {suggestion(verb, VERBS)}")
    module: Verb = importlib.import_module(VERBS[verb][0])
    return module


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"tercet {__version__}")
        return 0
    return load(words[0]).main(words[1:])


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, (_, about) in VERBS.items())
    return (
        "usage: tercet VERB [--config FILE] [--name value | name=value ...]\n\n"
        "tercet trains language models from human preferences, on the machine you have.\n\n"
        f"verbs:\n{verbs}\n\n"
        "options:\n"
        "  --help     of tercet, or of a verb: tercet sft --help\n"
        "  --version  print the version\n"
        "  --debug    show where an error comes from\n\n"
        "Begin with: tercet rlhf"
    )


if __name__ == "__main__":
    sys.exit(main())
