"""PPO by hand: four prompts, answers, scores of a reward model, a step. The exercise of many tutorials, made to work.

python examples/ppo_loop.py                                    # SmolLM2-135M, minutes
python examples/ppo_loop.py --model tiny --judge-steps 8       # seconds
"""

from __future__ import annotations

import argparse

from tercet.algorithms.ppo_step import PPO, PPOStepConfig
from tercet.algorithms.reward_model import grouped, pair_batch
from tercet.chat.answers import AnswerRenderer
from tercet.chat.renderers import renderer
from tercet.data import index_at, load_comparisons
from tercet.engine.local import LocalEngine
from tercet.evaluation.judges import agreement
from tercet.models.load import load_model
from tercet.rewards.scalar import ScalarJudge
from tercet.types import AdamParams, Head, LoraConfig, Message, SamplingParams

PROMPTS = ("How do I boil an egg?", "Why is the sky blue?", "Name a good habit.", "What is a friend?")


def reward_model(engine: LocalEngine, shown: AnswerRenderer, steps: int) -> ScalarJudge:
    """Scores answers; it has learned which of two people prefer."""
    train, test = (load_comparisons("builtin", split=split).rows for split in ("train", "test"))
    trainer = engine.trainer(lora=LoraConfig(rank=16, alpha=32.0), head=Head())
    for step in range(steps):
        rows = [train[index_at(8 * step + i, len(train), seed=0)] for i in range(8)]
        batch = pair_batch(grouped(rows, k_wise=False), shown)
        loss = trainer.forward_backward(batch, "bradley_terry", center=0.01).result().loss
        trainer.optim_step(AdamParams(learning_rate=5e-4, max_grad_norm=1.0)).result()
        print(f"reward model  step {step + 1:2}  loss {loss:.4f}")
    judge = ScalarJudge(trainer.scorer(), shown)
    print(f"reward model  held-out accuracy {agreement(judge, test[:40]).accuracy:.2f}")
    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--judge-steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    engine = LocalEngine(load_model(args.model, dtype="auto"))
    chat = renderer("auto", engine.loaded.tokenizer)
    judge = reward_model(engine, AnswerRenderer(chat, engine.context_tokens), args.judge_steps)
    config = PPOStepConfig(mini_batch_size=2, ppo_epochs=4, learning_rate=1e-4, init_kl_coef=0.2, target_kl=0.1)
    policy = engine.trainer(lora=LoraConfig(rank=16, alpha=32.0), head=Head(init_std=0.0))
    ppo = PPO(config, policy, reference=engine.sampler())

    conversations = [(Message("user", prompt),) for prompt in PROMPTS]
    queries = [chat.generation_prompt(conversation) for conversation in conversations]
    for step in range(args.steps):
        params = SamplingParams(max_tokens=args.max_tokens, stop=chat.stop, seed=step)
        responses = ppo.generate(queries, params)
        answers = [(chat.parse(response)[0],) for response in responses]
        rewards = judge.scores(list(zip(conversations, answers, strict=True)))
        stats = ppo.step(queries, responses, rewards)
        keys = ("ppo/mean_scores", "ppo/kl", "objective/kl_coef", "ppo/loss/policy", "ppo/loss/value")
        print(f"step {step}  " + "  ".join(f"{key} {stats[key]:.6f}" for key in keys))


if __name__ == "__main__":
    main()
