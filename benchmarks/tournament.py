"""A tournament of four answers, twelve matches, judged by label probabilities: one trie against one row a match."""

from __future__ import annotations

from typing import Any

from local import engine, laid_out
from measuring import Once, Row, Run, Work, timed


def comparisons(work: Work, renderer: Any) -> list[list[int]]:
    """The prompts of all matches among four answers to the first prompt, as the judge reads them."""
    from tercet.chat.comparisons import ComparisonRenderer
    from tercet.rewards.tournament import matches
    from tercet.types import Comparison, Message

    shown = ComparisonRenderer(renderer, 4096 if not work.smoke else 1024)
    tokenizer = renderer.tokenizer
    group = work.groups[0]
    answers = [(Message("assistant", tokenizer.decode(tokens)),) for tokens in (group["answers"] * 4)[:4]]
    prompt = (Message("user", tokenizer.decode(group["prompt"])),)
    return [shown.prompt(Comparison(prompt, answers[i], answers[j])) for i, j in matches(4)]


def labels(renderer: Any) -> list[int]:
    from tercet.chat.comparisons import ComparisonRenderer

    found = ComparisonRenderer(renderer, 1024).labels
    return [found["A"], found["B"]]


def trie(work: Work) -> Once:
    from tercet.chat.renderers import renderer

    base = engine(work)
    talk = renderer("auto", base.loaded.tokenizer)
    prompts, ends = comparisons(work, talk), labels(talk)
    sampler = base.sampler()
    sequences = [[*prompt, label] for prompt in prompts for label in ends]
    starts = [len(prompt) for prompt in prompts for _ in ends]

    def once() -> Run:
        seconds, rows = timed(lambda: sampler.logprobs(sequences, starts).result())
        same = {f"match_{i // 2}_{'AB'[i % 2]}": row[0] for i, row in enumerate(rows)}
        return Run(seconds, sum(map(len, prompts)), 0.0, same)

    return once


def rows(work: Work) -> Once:
    """Right-padded batches, the head at the last token alone; the best of some batch sizes."""
    import torch
    from trl_steps import plain_model, tokenizer

    from tercet.chat.renderers import renderer

    model, talk = plain_model(work), renderer("auto", tokenizer(work))
    prompts, ends = comparisons(work, talk), labels(talk)

    def judged(size: int) -> list[list[float]]:
        found: list[list[float]] = []
        with torch.inference_mode():
            for at in range(0, len(prompts), size):
                part = prompts[at : at + size]
                rows = [([], prompt) for prompt in part]
                tokens, attention, _ = laid_out(rows, 0, max(map(len, part)), work.device)
                hidden = model.get_decoder()(input_ids=tokens, attention_mask=attention).last_hidden_state
                last = hidden[range(len(part)), [len(prompt) - 1 for prompt in part]]
                found += torch.log_softmax(model.get_output_embeddings()(last), -1)[:, ends].tolist()
        return found

    judged(4)
    best = min(work.settings["match_batches"], key=lambda size: timed(lambda: judged(size))[0])

    def once() -> Run:
        seconds, found = timed(lambda: judged(best))
        same = {f"match_{i}_{'AB'[j]}": value for i, row in enumerate(found) for j, value in enumerate(row)}
        return Run(seconds, sum(map(len, prompts)), 0.0, same)

    return once


ROW = Row(
    "tournament",
    "tournament of 4, 12 matches, against one row per match in batches",
    {"tercet": trie, "rows": rows},
    target=2.2,
)
