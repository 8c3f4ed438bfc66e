"""All algorithms side by side: `python benchmarks/algorithms.py --run runs/rlhf --out runs/algorithms`.

From the SFT policy of a `tercet rlhf`, each algorithm learns by a command of its own, whose time and memory are kept.
Then all policies answer the same held-out prompts, and both judges of the run compare them with the SFT policy. Prints
tables in Markdown, and writes them beside `algorithms.json`. What is done is not done again; docs/algorithms.md tells
the rest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from algorithms_measured import compare, known, prepare
from algorithms_table import tables
from commands import attempt, check_ended, is_done, run_command

from tercet.config import differences, load, parse, to_mapping
from tercet.errors import TercetError, UsageError
from tercet.recipes.rl import as_json
from tercet.recipes.rlhf import RLHFConfig
from tercet.runs.checkpoints import read_done
from tercet.runs.durable import write_atomically

Result = TypeVar("Result")

PAIRS = "policy={run}/sft data={out}/data/comparisons.jsonl test_data={out}/data/test.jsonl test_rows={test_rows}"
PROMPTS = "policy={run}/sft data={out}/data/prompts.jsonl"
ANSWERED = (
    PROMPTS + " max_tokens={max_tokens} test_data={out}/data/test-prompts.jsonl evaluation.against_chosen=0"
    " evaluation.prompts={few} evaluation.prompts_while_training={few}"
    " evaluation.max_tokens={max_tokens} evaluation.temperature={temperature}"
)

COMMANDS: dict[str, str] = {
    "reward": f"reward {PAIRS} normalise_on={{run}}/sft normalise_max_tokens={{max_tokens}}",
    "policy_gradient": f"rl --config {{out}}/policy_gradient.yaml judge_model={{run}}/preference {ANSWERED}",
    "ppo": f"ppo {ANSWERED} reward.model={{out}}/reward steps=16 prompts_per_step=32 ppo_epochs=2 mini_batch_size=16 "
    "learning_rate=3e-4",
    "rebel": f"rebel {PROMPTS} reward.model={{out}}/reward iterations=2 shards=2 prompts=200 eta=4 pairs_per_step=8 "
    "learning_rate=5e-4 temperature=1 answers.top_p=1 max_grad_norm=1 answers.max_tokens={max_tokens} "
    "selection.drop_unfinished=false",
    "dpo": f"dpo {PAIRS} loss=sigmoid learning_rate=2e-4",
    "simpo": f"dpo {PAIRS} loss=simpo learning_rate=1e-4",
}
"""A verb and its settings; the model, the machine, the seed and the adapters' size are the run's."""

REWARDED = ("ppo", "rebel")
"""What learns from the scalar reward model, which is trained first."""

ALGORITHMS = tuple(name for name in COMMANDS if name != "reward")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/rlhf"), help="folder of a tercet rlhf; goes on if begun")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"), help="where everything goes")
    parser.add_argument("--model", help="base model of a run that is not there yet")
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=ALGORITHMS, metavar="NAME",
                        help=f"what to train, of {', '.join(ALGORITHMS)}; the others' rows stay")  # fmt: skip
    parser.add_argument("--prompts", type=int, help="held-out prompts that are answered; by default as many as the run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.SETTING=VALUE", dest="settings",
                        help="another setting of rlhf, reward or an algorithm: dpo.learning-rate=1e-4")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        given = settings_by_command(args.settings)
        config = whole_run(args.run, [*((f"model={args.model}",) if args.model else ()), *given["rlhf"]])
        prompts = config.evaluation.prompts if args.prompts is None else args.prompts
        asked = {"run": str(args.run), "prompts": prompts, "config": to_mapping(config)}
        common = known(args.out, asked) or apart(prepare, args.run, args.out, asked)
        train(args.run, args.out, args.only, common, given)
        found = apart(compare, args.run, args.out, prompts, [name for name in COMMANDS if is_done(name, args.out)])
    except TercetError as error:
        print(f"algorithms: {error}", file=sys.stderr)
        return error.exit_code
    text = tables(found)
    write_atomically(args.out / "algorithms.json", as_json(found))
    write_atomically(args.out / "algorithms.md", text)
    print(text, end="")
    return 0


def settings_by_command(words: Sequence[str]) -> dict[str, list[str]]:
    """Settings as `NAME.SETTING=VALUE`, gathered by what they are of."""
    found: dict[str, list[str]] = {name: [] for name in ("rlhf", *COMMANDS)}
    for word in words:
        name, dot, setting = word.partition(".")
        if name not in found or not dot or "=" not in setting:
            raise UsageError(f"--set {word}: NAME.SETTING=VALUE is wanted, with a name of {', '.join(found)}")
        found[name].append(setting)
    return found


def whole_run(run: Path, settings: Sequence[str]) -> RLHFConfig:
    """The config of a run whose policy and judges are trained; what it lacks of them is done first.

    Raises:
        UsageError: The run has other settings, or lacks one of the two judges.
    """
    kept = run / "config.yaml"
    asked = [*(("--config", str(kept)) if kept.exists() else ()), *settings]
    config = parse(RLHFConfig, [*asked, f"out={run}"], prog="tercet rlhf")
    if config.policy.algorithm != "policy_gradient" or not config.held_out_judge:
        raise UsageError(
            f"{run} has policy.algorithm {config.policy.algorithm} and held_out_judge {config.held_out_judge:g}; "
            "wanted is a run with a pairwise preference model and a held-out judge, as tercet rlhf makes by default"
        )
    if not all(read_done(run / stage) for stage in ("sft", "preference", "judge")):
        check_ended(attempt(["rlhf", *asked, f"out={run}"]))
    found = load(RLHFConfig, kept)
    differ = [each for each in differences(to_mapping(found), to_mapping(config)) if each != "out"]
    if differ:
        raise UsageError(
            f"{run} was made with another {', '.join(differ)}; leave these settings out, or name another --run"
        )
    return found


def train(
    run: Path, out: Path, names: Collection[str], common: Mapping[str, object], given: Mapping[str, Sequence[str]]
) -> None:
    """Carry out the commands of some algorithms, the reward model's before those that need it."""
    for name, command in COMMANDS.items():
        if name in names or (name == "reward" and set(names) & set(REWARDED)):
            verb, *words = (word.format(run=run, out=out, **common) for word in command.split())
            run_command(name, [verb, "--config", f"{out}/setup.yaml", *words, *given[name], f"out={out}/{name}"], out)


def apart(work: Callable[..., Result], *args: object) -> Result:
    """Do something in a process of its own: a command that is started by a large process counts its memory too."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
