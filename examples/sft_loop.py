"""Supervised fine-tuning as a plain loop: make the answers of a data set likely.

python examples/sft_loop.py                              # a real model of 135M weights, the built-in conversations
python examples/sft_loop.py --model tiny --steps 20      # seconds
python examples/sft_loop.py --data my.jsonl --out adapter
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tercet.algorithms.rollouts import answer
from tercet.chat.encoding import text_of
from tercet.chat.renderers import Renderer, renderer
from tercet.data import hold_out, index_at, load_conversations
from tercet.engine.base import Sampler
from tercet.engine.local import LocalEngine
from tercet.evaluation.nll import held_out, nll
from tercet.models.load import load_model
from tercet.types import AdamParams, Batch, Conversation, Datum, LoraConfig, Message, SamplingParams

QUESTION: Conversation = (Message("user", "My houseplant droops, but its soil is wet. What should I do?"),)


def data_of(rows: list[Conversation], render: Renderer, limit: int) -> list[Datum]:
    """Conversations as tokens and weights: 1 on what the assistant says, 0 on the rest. Over-long ones are left out."""
    data = [render.datum(row) for row in rows]
    return [datum for datum in data if len(datum.tokens) <= limit]


def said(sampler: Sampler, render: Renderer) -> str:
    """What a policy says to one question, its likeliest words."""
    [[found]] = answer([QUESTION], sampler, render, SamplingParams(max_tokens=48, temperature=0, stop=render.stop), 1)
    return found.message.content


def main() -> None:
    """Read the settings, load, learn."""
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--model", default="smollm2-135m", help="a built-in name, a directory, or a hub id")
    about.add_argument("--data", default="builtin", help="conversations: builtin, a file, a directory, or a hub id")
    about.add_argument("--steps", type=int, default=12, help="optimizer steps")
    about.add_argument("--batch-size", type=int, default=16, help="conversations per step")
    about.add_argument("--learning-rate", type=float, default=5e-4, help="at the first step; falls to 0 in a line")
    about.add_argument("--max-length", type=int, default=1024, help="longest conversation, in tokens")
    about.add_argument("--out", type=Path, help="a directory for the adapter, in PEFT's layout")
    about.add_argument("--seed", type=int, default=0, help="of the adapter and of the order of rows")
    args = about.parse_args()

    loaded = load_model(args.model, dtype="auto")
    engine = LocalEngine(loaded)
    render = renderer("auto", loaded.tokenizer)

    source = load_conversations(args.data)
    print(source.describe())
    train, test = hold_out(source.rows, fraction=0.1, seed=args.seed)
    data = data_of(train, render, args.max_length)
    text = held_out(data_of(test, render, args.max_length), lambda tokens: text_of(loaded.tokenizer, tokens))
    print(f"{len(data)} conversations to learn, {len(text.data)} held out")

    trainer = engine.trainer(lora=LoraConfig(rank=16, alpha=32.0), seed=args.seed)
    print(f"before: {said(trainer.sampler(), render)!r}")
    print(f"held-out NLL {nll(trainer, text)['test/nll']:.4f} nats per token")

    for step in range(args.steps):
        began = time.monotonic()
        places = range(step * args.batch_size, (step + 1) * args.batch_size)
        batch = Batch([data[index_at(place, len(data), seed=args.seed)] for place in places])
        adam = AdamParams(learning_rate=args.learning_rate * (1 - step / args.steps), max_grad_norm=1.0)
        # Both are handed over before either is waited for.
        learning = trainer.forward_backward(batch, "cross_entropy")
        stepping = trainer.optim_step(adam)
        loss, grad_norm = learning.result().loss, stepping.result().grad_norm
        took = time.monotonic() - began
        tokens = sum(len(datum.tokens) for datum in batch.data)
        print(f"step {step + 1:3}  loss {loss:.4f}  grad norm {grad_norm:.3f}  {tokens / took:,.0f} tokens/s")

    print(f"held-out NLL {nll(trainer, text)['test/nll']:.4f} nats per token")
    print(f"after: {said(trainer.sampler(), render)!r}")
    if args.out:
        print(f"adapter and optimizer in {trainer.save(args.out).result().path}")


if __name__ == "__main__":
    main()
