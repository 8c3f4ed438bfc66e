"""A whole PPO step against the same step written in plain torch and plain transformers, with padding and masks."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tercet.algorithms.ppo_step import PPO, PPOStepConfig
from tercet.engine.local import LocalEngine
from tercet.models.load import load_model
from tercet.models.tiny import tiny_model
from tercet.types import Head, LoraConfig, SamplingParams

QUERIES = [[5, 9, 11, 7], [5, 9], [30, 31, 32, 33, 34, 35], [5, 9, 11]]
RESPONSES = [[8, 12, 2], [40], [21, 22, 23, 24, 2], [8, 12]]
SCORES = [1.0, -0.5, 0.25, 2.0]
ORDER = [[2, 0, 3, 1], [1, 2, 0, 3]]
CONFIG = PPOStepConfig(
    learning_rate=1e-3, critic_learning_rate=2e-3, ppo_epochs=2, mini_batch_size=2, init_kl_coef=0.3, max_grad_norm=0.5,
    horizon=20.0, target=0.05, whiten_rewards=True, gamma=0.9, entropy_coef=0.01, temperature=0.8, clip_range=0.01,
    clip_range_value=0.01,
)  # fmt: skip


class Plain:
    """PPO as the formulas have it: right-padded rows, masks from lengths, one optimizer, no merging of anything."""

    def __init__(self, directory, policy, value, critic=None):
        """`policy`, `value` and `critic` are state dicts and head weights to begin with."""
        self.model = self.load(directory, policy)
        self.trunk = self.model if critic is None else self.load(directory, critic)
        self.value = torch.nn.Parameter(value.clone())
        every = [*self.model.parameters(), *([self.value] if critic is None else [])]
        self.optimizer = torch.optim.AdamW(every, lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        own = [] if critic is None else [*self.trunk.parameters(), self.value]
        self.critic = torch.optim.AdamW(own, lr=2e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0) if own else None

    @staticmethod
    def load(directory, weights):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model.load_state_dict(weights)
        return model.eval()

    def look(self, rows):
        """Log-probs, entropies, values and the mask of the response tokens, (B, T - 1)."""
        width = max(len(QUERIES[i]) + len(RESPONSES[i]) for i in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width)
        for at, i in enumerate(rows):
            tokens = [*QUERIES[i], *RESPONSES[i]]
            ids[at, : len(tokens)] = torch.tensor(tokens)
            real[at, : len(tokens)] = 1
            mask[at, len(QUERIES[i]) : len(tokens)] = 1
        logits = self.model(input_ids=ids, attention_mask=real).logits[:, :-1] / CONFIG.temperature
        every = torch.log_softmax(logits, -1)
        hidden = self.trunk(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states[-1][:, :-1]
        logprobs = every.gather(-1, ids[:, 1:, None])[..., 0]
        return logprobs, -(every.exp() * every).sum(-1), hidden @ self.value[0], mask[:, 1:]

    def targets(self, reference):
        with torch.no_grad():
            old, _, values, mask = self.look(range(4))
            kl = (old - reference.look(range(4))[0]) * mask
            rewards = -CONFIG.init_kl_coef * kl
            for i, score in enumerate(SCORES):
                rewards[i, len(QUERIES[i]) + len(RESPONSES[i]) - 2] += score
            tokens = rewards[mask == 1]
            rewards = ((rewards - tokens.mean()) / (tokens.var() + 1e-8).sqrt() + tokens.mean()) * mask
            values = values * mask
            advantages, later = torch.zeros_like(rewards), torch.zeros(4)
            for t in reversed(range(rewards.shape[1])):
                after = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros(4)
                later = rewards[:, t] + CONFIG.gamma * after - values[:, t] + CONFIG.gamma * CONFIG.lam * later
                advantages[:, t] = later
            returns = advantages + values
            chosen = advantages[mask == 1]
            advantages = (advantages - chosen.mean()) / (chosen.var() + 1e-8).sqrt()
            return old, values, advantages, returns, float(kl.sum(1).mean())

    def step(self, reference):
        old, old_values, advantages, returns, kl = self.targets(reference)
        seen = []
        for order in ORDER:
            for rows in (order[:2], order[2:]):
                new, entropy, values, mask = self.look(rows)
                cut = new.shape[1]
                lp, v, a, r = (each[rows][:, :cut] for each in (old, old_values, advantages, returns))
                ratio = (new - lp).exp()
                low, high = 1 - CONFIG.clip_range, 1 + CONFIG.clip_range
                policy = torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
                kept = v + (values - v).clamp(-CONFIG.clip_range_value, CONFIG.clip_range_value)
                critic = torch.maximum((values - r) ** 2, (kept - r) ** 2) / 2

                def mean(x, mask=mask):
                    return (x * mask).sum() / mask.sum()

                shared = self.critic is None
                loss = mean(policy) - CONFIG.entropy_coef * mean(entropy)
                (loss + CONFIG.vf_coef * mean(critic) if shared else loss).backward()
                self.take(self.optimizer)
                if self.critic is not None:
                    mean(critic).backward()
                    self.take(self.critic)
                seen.append([float(mean(each.detach())) for each in (policy, critic, lp - new)])
        return kl, torch.tensor(seen).mean(0).tolist()

    @staticmethod
    def take(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_whole_step_is_that_of_plain_torch(tmp_path, architecture, critic):
    directory = tiny_model(tmp_path, architecture, chat_template=architecture == "llama")
    engine = LocalEngine(load_model(str(directory)))
    shared = critic == "shared"
    policy = engine.trainer(head=Head() if shared else None, seed=1)
    # A policy that has already left its reference.
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    judge = None if shared else engine.trainer(head=Head(), seed=2)
    head = (policy if judge is None else judge).head_weight().clone()
    plain = Plain(directory, policy.model.state_dict(), head, None if judge is None else judge.model.state_dict())
    reference = Plain(directory, engine.model.state_dict(), head)
    config = CONFIG if shared else type(CONFIG)(**{**vars(CONFIG), "critic": "separate"})
    ours = PPO(config, policy, engine.sampler(), critic=judge, permutation=lambda epoch, n: ORDER[epoch])

    stats = ours.step([torch.tensor([query]) for query in QUERIES], [torch.tensor(r) for r in RESPONSES], SCORES)
    kl, (policy_loss, value_loss, policykl) = plain.step(reference)

    close = {"rel": 0, "abs": 2e-5}
    assert stats["objective/kl"] == stats["ppo/kl"] == pytest.approx(kl, **close)
    assert stats["ppo/loss/policy"] == pytest.approx(policy_loss, **close)
    assert stats["ppo/loss/value"] == pytest.approx(value_loss, **close)
    assert stats["ppo/policy/policykl"] == pytest.approx(policykl, **close)
    error = min(0.2, max(-0.2, kl / CONFIG.target - 1))
    assert ours.kl_coef == pytest.approx(0.3 * (1 + error * 4 / CONFIG.horizon), **close)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(policy.model.get_parameter(name), parameter, rtol=0, atol=2e-5)
    ours_head = (policy if judge is None else judge).head_weight()
    torch.testing.assert_close(ours_head, plain.value.detach(), rtol=0, atol=2e-5)


def test_a_gpt2_without_template_or_pad_token_goes_through_generation_and_step(tmp_path):
    engine = LocalEngine(load_model(str(tiny_model(tmp_path, "gpt2", chat_template=False))))
    config = PPOStepConfig(mini_batch_size=2, ppo_epochs=2)
    ours = PPO(config, engine.trainer(lora=LoraConfig(rank=4), head=Head()), engine.sampler())
    queries = [[5, 9, 11, 7], [5, 9], [30, 31], [40, 41, 42]]
    responses = ours.generate(queries, SamplingParams(max_tokens=6))
    stats = ours.step(queries, responses, [1.0, 0.0, 0.5, -1.0])
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-4)  # policy and reference are one model still
    assert all(map(math.isfinite, stats.values()))
