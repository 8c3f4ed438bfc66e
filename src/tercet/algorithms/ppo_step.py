"""One batch of scored answers, learned by PPO with a critic: the step of manual loops and of `tercet ppo` alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tercet.algorithms.kl_control import ESTIMATORS, KLControl, KLPenalty, adapted_kl_coef
from tercet.algorithms.ppo_batch import (
    Rollouts,
    Targets,
    Tokens,
    check_responses,
    policy_figures,
    response_datum,
    targets,
    token_lists,
)
from tercet.algorithms.steps import OptimConfig, learn
from tercet.data import order
from tercet.engine.base import Sampler, Trainer
from tercet.errors import ConfigError, UsageError
from tercet.runs.run import Run
from tercet.types import AdamParams, Batch, SamplingParams, StepResult, Weights

Permutation = Callable[[int, int], Sequence[int]]
"""(epoch counted over all batches, number of answers) -> the order in which they are learned."""

CRITIC_FOLDER = "critic"
"""In a checkpoint: a critic of its own."""

# Of the last mini-batch, at the end of an epoch, as in TRL up to 0.11.
EARLY_STOP_FACTOR = 1.5

KL_TERMS = {"kl": "kl_term", "abs": "abs_kl_term", "mse": "mse_kl_term", "k3": "k3_term"}


@dataclass(frozen=True, kw_only=True)
class PPOStepConfig(OptimConfig):
    """How PPO learns a batch."""

    learning_rate: float = 1e-4
    """Peak learning rate of the policy."""
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    """How the learning rates fall."""
    adam_eps: float = 1e-5
    """Epsilon of AdamW."""
    ppo_epochs: int = 4
    """Times every batch is learned."""
    mini_batch_size: int = 16
    """Answers per optimizer step; the batch must be a multiple."""
    critic: Literal["shared", "separate"] = "shared"
    """shared: a value head on the policy's own trunk; separate: weights of its own on the same base."""
    critic_learning_rate: float = 3e-4
    """Peak learning rate of a separate critic."""
    vf_coef: float = 0.1
    """Weight of a shared critic's loss beside the policy's."""
    clip_range: float = 0.2
    """The ratio of new to old probability is cut at 1 minus and plus this."""
    clip_range_value: float = 0.2
    """A value may leave the old one by so much."""
    gamma: float = 1.0
    """Discount of later rewards within an answer."""
    lam: float = 0.95
    """Generalised advantage estimation: 1 trusts returns, 0 the critic."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the whole batch."""
    whiten_rewards: bool = False
    """Scale rewards of tokens to variance 1 over the whole batch; their mean stays."""
    kl_penalty: KLPenalty = "kl"
    """How a token's KL to the reference is estimated: kl, abs, mse, k3, or full (from whole distributions)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL is charged. Only kl in the reward has pi_ref exp(score / beta) as its optimum."""
    kl_control: KLControl = "adaptive"
    """adaptive moves the coefficient towards the target; fixed leaves it."""
    init_kl_coef: float = 0.1
    """The KL's coefficient at the start."""
    target: float = 6.0
    """Wanted KL of an answer in nats; read by the adaptive controller."""
    horizon: float = 200.0
    """Answers over which the adaptive controller changes the coefficient by about a fifth."""
    early_stopping: bool = False
    """Leave out the rest of the epochs when the policy has moved too far; see target_kl."""
    target_kl: float = 0.1
    """Early stopping looks once an epoch, at its last mini-batch: mean old minus new log-prob above 1.5 times this ends
    the batch. It does not move the KL's coefficient."""
    ratio_threshold: float = 10.0
    """A mini-batch whose mean ratio is above this teaches nothing: its gradient is scaled to zero."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; above 0 it costs a second pass."""
    temperature: float = 1.0
    """Of the policy's distribution, in sampling and learning alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; exploring needs it above 0 (1.0 is usual)")
        if self.kl_in == "loss" and self.kl_penalty not in KL_TERMS:
            raise ConfigError(
                f"kl_penalty is {self.kl_penalty}, which can only be charged in the reward; set kl_in to reward, or "
                f"one of {', '.join(KL_TERMS)}"
            )
        least = {"ppo_epochs": 1, "mini_batch_size": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {bound}")
        for name in ("target", "horizon", "target_kl", "ratio_threshold", "critic_learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")

    def adam(self, step: int, total_steps: int) -> AdamParams:
        """The policy's optimizer at a step."""
        return replace(super().adam(step, total_steps), eps=self.adam_eps)

    def critic_adam(self, step: int, total_steps: int) -> AdamParams:
        """A separate critic's."""
        params = self.adam(step, total_steps)
        share = self.critic_learning_rate / self.learning_rate
        return replace(params, learning_rate=params.learning_rate * share)


class PPO:
    """A policy, its critic and its reference, and what is carried from batch to batch: the KL's coefficient and the
    number of batches."""

    def __init__(
        self,
        config: PPOStepConfig,
        policy: Trainer,
        reference: Sampler,
        *,
        critic: Trainer | None = None,
        total_steps: int = 0,
        seed: int = 0,
        permutation: Permutation | None = None,
        run: Run | None = None,
    ) -> None:
        """Put them together.

        Args:
            config: How.
            policy: What learns; with a shared critic it has a head.
            reference: What the KL is measured to.
            critic: A separate critic, which has a head.
            total_steps: Batches of the whole run, for schedules that fall.
            seed: Of the order of answers.
            permutation: That order, given.
            run: Where a batch is kept whose loss is not finite.

        Raises:
            ConfigError: A schedule falls, and nobody said when it ends.
            UsageError: A separate critic is missing, or one is given that is not used.
        """
        if config.schedule != "constant" and not total_steps:
            raise ConfigError(f"schedule is {config.schedule}, which ends with the run; give total_steps, or constant")
        if (critic is None) != (config.critic == "shared"):
            given = "none is given" if critic is None else "a separate one is given"
            raise UsageError(f"critic is {config.critic}, and {given}")
        self.config, self.policy, self.reference, self.critic = config, policy, reference, critic
        self.total_steps, self.run = total_steps, run
        self.permutation = permutation or (lambda epoch, n: order(n, seed=seed, epoch=epoch))
        self.kl_coef, self.steps = config.init_kl_coef, 0

    def generate(
        self, queries: Sequence[object], params: SamplingParams, *, return_prompt: bool = False
    ) -> list[list[int]]:
        """One response to every query, sampled from the policy as it is now; with `return_prompt` behind its query."""
        prompts = token_lists("query", queries)
        groups = self.policy.sampler().sample(prompts, params).result()
        return [
            [*(prompt if return_prompt else []), *group[0].tokens]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def step(
        self, queries: Sequence[object], responses: Sequence[object], rewards: Sequence[float]
    ) -> dict[str, float]:
        """Learn scored responses, and return statistics under the keys of TRL up to 0.11.

        Args:
            queries: Token ids, each (n,) or (1, n).
            responses: Token ids of what was sampled, without the query.
            rewards: A score for each response.

        Raises:
            DataError: A query or response is empty or has another shape.
            UsageError: The numbers of queries, responses and rewards differ, or a response begins with its query.
        """
        if not len(queries) == len(responses) == len(rewards) > 0:
            raise UsageError(
                f"there are {len(queries)} queries, {len(responses)} responses and {len(rewards)} rewards; they must "
                "be as many, and at least one"
            )
        asked, answered = token_lists("query", queries), token_lists("response", responses)
        check_responses(asked, answered)
        return self.learn(asked, answered, [float(reward) for reward in rewards])

    def learn(
        self, queries: Sequence[Tokens], responses: Sequence[Tokens], scores: Sequence[float]
    ) -> dict[str, float]:
        """The step itself, on answers that are known to be the policy's own.

        Raises:
            ConfigError: The number of answers is no multiple of `mini_batch_size`.
        """
        config = self.config
        size = config.mini_batch_size
        if len(queries) % size:
            raise ConfigError(f"there are {len(queries)} answers, which must be a multiple of mini_batch_size, {size}")
        seen = self.rollouts(queries, responses, scores)
        charged = self.kl_coef if config.kl_in == "reward" else 0.0
        wanted = targets(
            seen.token_rewards(charged),
            seen.values,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            whiten_advantages=config.whiten_advantages,
        )
        figures = policy_figures(seen, wanted, self.kl_coef)
        learned = self._epochs(seen, wanted)
        if config.kl_control == "adaptive":
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, seen.mean_kl, len(queries), target=config.target, horizon=config.horizon
            )
        self.steps += 1
        spread = figures["ppo/returns/var"]
        explained = 1 - learned["ppo/val/error"] / spread if spread else 0.0
        return {**figures, **learned, "ppo/val/var_explained": explained}

    def rollouts(self, queries: Sequence[Tokens], responses: Sequence[Tokens], scores: Sequence[float]) -> Rollouts:
        """What policy, critic and reference say of answers, by the same route as in learning."""
        batch = Batch([response_datum(*pair) for pair in zip(queries, responses, strict=True)])
        sequences, starts = [datum.tokens for datum in batch.data], [len(query) for query in queries]
        temperature = self.config.temperature
        ours = self.policy.forward(batch, temperature=temperature).result()
        values = ours.values if self.critic is None else self.critic.forward(batch, values_only=True).result().values
        theirs = self.reference.logprobs(sequences, starts, temperature).result()

        def of_response(rows: Sequence[Sequence[float]]) -> list[list[float]]:
            return [list(row[start:]) for row, start in zip(rows, starts, strict=True)]

        logprobs = of_response(ours.logprobs)
        if self.config.kl_penalty == "full":
            kl = self.policy.sampler().divergences(self.reference, sequences, starts, temperature).result()
        else:
            estimate = ESTIMATORS[self.config.kl_penalty]
            kl = [[estimate(p - q) for p, q in zip(*rows, strict=True)] for rows in zip(logprobs, theirs, strict=True)]
        return Rollouts(
            queries=[list(query) for query in queries],
            responses=[list(response) for response in responses],
            scores=list(scores),
            logprobs=logprobs,
            reference_logprobs=theirs,
            entropies=of_response(ours.entropies),
            values=of_response(values),
            kl=kl,
        )

    def _epochs(self, seen: Rollouts, wanted: Targets) -> dict[str, float]:
        """Every answer `ppo_epochs` times, in mini-batches; the mean of what these tell."""
        config, size, n = self.config, self.config.mini_batch_size, len(seen.scores)
        rows: list[dict[str, float]] = []
        epochs = 0
        for epoch in range(config.ppo_epochs):
            places = list(self.permutation(self.steps * config.ppo_epochs + epoch, n))
            rows += [self._mini_batch(seen, wanted, places[at : at + size]) for at in range(0, n, size)]
            epochs += 1
            moved = rows[-1]["ppo/policy/policykl"] > EARLY_STOP_FACTOR * config.target_kl
            if config.early_stopping and moved:
                break
        means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        return {**means, "ppo/epochs": epochs}

    def _mini_batch(self, seen: Rollouts, wanted: Targets, places: Sequence[int]) -> dict[str, float]:
        """One optimizer step of the policy, and one of a separate critic."""
        config, shared = self.config, self.critic is None
        batch = Batch([
            response_datum(
                seen.queries[i],
                seen.responses[i],
                sampling_logprobs=seen.logprobs[i],
                reference_logprobs=seen.reference_logprobs[i],
                advantages=wanted.advantages[i],
                old_values=seen.values[i],
                returns=wanted.returns[i],
            )
            for i in places
        ])  # fmt: skip
        bounds = {"clip_low": config.clip_range, "clip_high": config.clip_range, "temperature": config.temperature}
        value = {"clip_range_value": config.clip_range_value}
        policy = self._learn(
            self.policy, batch, "ppo_critic" if shared else "ppo",
            **bounds, **({**value, "vf_coef": config.vf_coef} if shared else {}),
        )  # fmt: skip
        if config.entropy_coef:
            self._learn(
                self.policy, batch, "entropy_bonus", coef=config.entropy_coef, temperature=config.temperature
            )  # fmt: skip
        if config.kl_in == "loss":
            term = KL_TERMS[config.kl_penalty]
            self._learn(self.policy, batch, term, coef=self.kl_coef, temperature=config.temperature)
        adam = config.adam(self.steps, self.total_steps)
        trusted = policy.metrics["ratio"] <= config.ratio_threshold
        optim = self.policy.optim_step(adam if trusted else replace(adam, max_grad_norm=0.0)).result()
        critic = policy
        if self.critic is not None:
            critic = self._learn(self.critic, batch, "value", **value)
            self.critic.optim_step(config.critic_adam(self.steps, self.total_steps)).result()
        old = [seen.logprobs[i] for i in places]
        new = [row[len(seen.queries[i]) :] for row, i in zip(policy.logprobs, places, strict=True)]
        gaps = [a - b for rows in zip(old, new, strict=True) for a, b in zip(*rows, strict=True)]
        loss = policy.metrics.get("policy_loss", policy.loss)
        return {
            "ppo/loss/policy": loss,
            "ppo/loss/value": critic.metrics["value_loss"],
            "ppo/loss/total": loss + config.vf_coef * critic.metrics["value_loss"],
            "ppo/policy/entropy": policy.metrics["entropy"],
            "ppo/policy/approxkl": statistics.fmean(gap * gap for gap in gaps) / 2,
            "ppo/policy/policykl": statistics.fmean(gaps),
            "ppo/policy/clipfrac": policy.metrics["clip_ratio"],
            "ppo/policy/ratio": policy.metrics["ratio"],
            "ppo/policy/skipped": float(not trusted),
            "ppo/val/vpred": critic.metrics["value"],
            "ppo/val/error": critic.metrics["value_error"],
            "ppo/val/clipfrac": critic.metrics["value_clip_ratio"],
            "ppo/learning_rate": optim.learning_rate,
            "ppo/grad_norm": optim.grad_norm,
        }

    def _learn(self, trainer: Trainer, batch: Batch, loss: str, **settings: float) -> StepResult:
        return learn(trainer, batch, loss, self.run, **settings)

    @property
    def state(self) -> dict[str, float]:
        """What must be restored beside the weights."""
        return {"kl_coef": self.kl_coef, "ppo_steps": self.steps}

    def restore(self, weights: Weights, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.policy.load(weights).result()
        if self.critic is not None:
            self.critic.load(Weights(weights.path / CRITIC_FOLDER)).result()
        self.kl_coef, self.steps = state["kl_coef"], int(state["ppo_steps"])

    def save(self, directory: Path) -> Future[Weights]:
        """Write policy and critic."""
        saved = self.policy.save(directory)
        if self.critic is not None:
            self.critic.save(directory / CRITIC_FOLDER).result()
        return saved
