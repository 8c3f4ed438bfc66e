"""Reinforcement learning as a plain loop: answer in groups, reward, make what did better than its group likelier.

python examples/rl_loop.py                                    # reward: plain prose, a function of the text
python examples/rl_loop.py --reward tournament                # reward: matches, judged by a model trained first
python examples/rl_loop.py --model tiny --steps 2             # seconds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import fmean

from tercet.algorithms.advantages import advantages
from tercet.algorithms.preference_model import both_orders
from tercet.algorithms.rollouts import Answer, answer, log_ratios, tournament_rewards
from tercet.chat.comparisons import ComparisonRenderer
from tercet.chat.renderers import Renderer, renderer
from tercet.data import index_at, load_comparisons, load_prompts
from tercet.engine.local import LocalEngine
from tercet.evaluation.judges import agreement
from tercet.evaluation.win_rate import win_rate
from tercet.models.load import load_model
from tercet.rewards.judge import Judge
from tercet.types import AdamParams, Batch, LoraConfig, SamplingParams

Groups = Sequence[Sequence[Answer]]
Reward = Callable[[Groups], list[list[float]]]


def plain_prose(groups: Groups) -> list[list[float]]:
    """Share of small letters, spaces and full stops, less 0.5 for an answer that does not end: no lists, no code."""

    def of(each: Answer) -> float:
        text = each.message.content
        plain = sum("a" <= c <= "z" or c in " ." for c in text) / max(1, len(text))
        return plain - 0.5 * (each.termination != "stop")

    return [[of(each) for each in group] for group in groups]


def preference_model(engine: LocalEngine, render: Renderer, steps: int, seed: int) -> Judge:
    """A judge, trained to say by one token which of two answers is better."""
    train, test = (load_comparisons("builtin", split=split).rows for split in ("train", "test"))
    shown = ComparisonRenderer(render, limit=engine.context_tokens)
    trainer = engine.trainer(lora=LoraConfig(rank=16, alpha=32.0), seed=seed)
    for step in range(steps):
        pairs = [train[index_at(4 * step + i, len(train), seed=seed)] for i in range(4)]
        # Both orders in one loss: otherwise the place of an answer is easier to learn than its worth.
        loss = trainer.forward_backward(both_orders(pairs, shown), "both_orders").result().loss
        rate = 1e-3 * min((step + 1) / 5, 1 - step / steps)
        trainer.optim_step(AdamParams(learning_rate=rate, max_grad_norm=1.0)).result()
        print(f"preference model  step {step + 1:3}  loss {loss:.4f}")
    judge = Judge(trainer.sampler(), shown)
    found = agreement(judge, test[:40])
    print(f"preference model  held-out accuracy {found.accuracy_both:.2f}, flip rate {found.flip_rate:.2f}")
    return judge


def main() -> None:
    """Read the settings, load, learn."""
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--model", default="smollm2-135m", help="a built-in name, a directory, or a hub id")
    about.add_argument("--reward", choices=("plain", "tournament"), default="plain", help="what is rewarded")
    about.add_argument("--steps", type=int, default=10, help="rounds of sampling and learning")
    about.add_argument("--judge-steps", type=int, default=56, help="optimizer steps of the preference model")
    about.add_argument("--prompts", type=int, default=8, help="prompts per step")
    about.add_argument("--group", type=int, default=4, help="answers per prompt")
    about.add_argument("--max-tokens", type=int, default=48, help="longest answer")
    about.add_argument("--learning-rate", type=float, default=5e-4)
    about.add_argument("--seed", type=int, default=0, help="of adapters, order and samples")
    args = about.parse_args()

    loaded = load_model(args.model, dtype="auto")
    engine = LocalEngine(loaded)
    render = renderer("auto", loaded.tokenizer)
    prompts, asked_at_end = (load_prompts("builtin", split=split).rows for split in ("train", "test"))
    asked_at_end = asked_at_end[:16]

    judge = preference_model(engine, render, args.judge_steps, args.seed) if args.reward == "tournament" else None

    def tournament(groups: Groups) -> list[list[float]]:
        assert judge is not None
        return tournament_rewards(groups, judge, pattern="both_ways", chunk=None, format_penalty=1.0)[0]

    reward: Reward = plain_prose if judge is None else tournament
    trainer = engine.trainer(lora=LoraConfig(rank=16, alpha=32.0), seed=args.seed)
    reference = trainer.sampler()  # frozen: what the trainer learns later never reaches it

    for step in range(args.steps):
        began = time.monotonic()
        asked = [prompts[index_at(args.prompts * step + i, len(prompts), seed=args.seed)] for i in range(args.prompts)]
        params = SamplingParams(max_tokens=args.max_tokens, stop=render.stop, seed=args.seed + step)
        groups = answer(asked, trainer.sampler(), render, params, args.group)
        rewards = reward(groups)
        data = [
            each.datum(sampling_logprobs=each.completion.logprobs, advantages=a)
            for group, row in zip(groups, advantages(rewards), strict=True)
            for each, a in zip(group, row, strict=True)
        ]
        learned = trainer.forward_backward(Batch(data), "importance_sampling").result()
        trainer.optim_step(AdamParams(learning_rate=args.learning_rate, max_grad_norm=1.0)).result()
        kl = fmean(sum(each) for group in log_ratios(groups, reference, 1.0) for each in group)
        print(
            f"step {step + 1:3}  reward {fmean(map(fmean, rewards)):+.4f}  kl {kl:+.3f}  "
            f"entropy {learned.metrics['entropy']:.3f}  ratio {learned.metrics['ratio']:.4f}  "
            f"tokens {fmean(len(each.completion.tokens) for group in groups for each in group):.1f}  "
            f"{time.monotonic() - began:.1f} s"
        )

    last = SamplingParams(max_tokens=args.max_tokens, stop=render.stop, seed=args.seed + 1_000_003)
    before, after = (
        answer(asked_at_end, sampler, render, last, args.group) for sampler in (reference, trainer.sampler())
    )
    if judge is None:
        old, new = (fmean(map(fmean, reward(groups))) for groups in (before, after))
        print(f"held-out reward {old:+.4f} before, {new:+.4f} after")
    else:
        ours, theirs = ([group[0].conversation for group in groups] for groups in (after, before))
        rate = win_rate(judge, asked_at_end, ours, theirs)
        print(f"held-out win rate {rate.win_rate:.3f} ({rate.low:.2f} to {rate.high:.2f}) against the start")
    print(f"asked: {asked_at_end[0][-1].content}\nbefore: {before[0][0].message.content!r}")
    print(f"after: {after[0][0].message.content!r}")


if __name__ == "__main__":
    main()
