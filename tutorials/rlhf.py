# mypy: allow-untyped-defs
import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="tercet: from human preferences to a better policy")

with app.setup:
    import atexit
    import html
    import shutil
    import tempfile
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import marimo as mo
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from tercet.algorithms.advantages import advantages
    from tercet.algorithms.policy_gradient import RLConfig, policy_gradient
    from tercet.algorithms.preference_model import both_orders
    from tercet.algorithms.rollouts import answer
    from tercet.chat.comparisons import ComparisonRenderer
    from tercet.chat.encoding import Tokenizer, text_of
    from tercet.chat.renderers import renderer
    from tercet.data import index_at, load_comparisons, load_conversations, load_prompts
    from tercet.engine.base import Sampler, Trainer
    from tercet.engine.local import LocalEngine
    from tercet.evaluation.judges import agreement
    from tercet.evaluation.nll import held_out, nll
    from tercet.evaluation.win_rate import WinRate, win_rate
    from tercet.models.load import load_model
    from tercet.rewards.judge import Judge
    from tercet.rewards.tournament import matches, scores
    from tercet.runs.rows import read_rows
    from tercet.runs.run import Run
    from tercet.types import (
        AdamParams,
        Batch,
        Comparison,
        Conversation,
        Datum,
        LoraConfig,
        Message,
        SamplingParams,
    )  # fmt: skip

    # What the notebook writes is gone when it is.
    folder = Path(tempfile.mkdtemp(prefix="tercet-tutorial-"))
    _at_exit = atexit.register(shutil.rmtree, folder, ignore_errors=True)


@app.cell
def _():
    mo.md("""
    # From preferences to a better policy

    A model that has read the internet can go on with a text. Three stages make it answer as people would like it
    to:

    1. **Supervised fine-tuning** (SFT) shows it answers, and makes them likelier.
    2. A **preference model** is shown two answers, and learns to say which is better.
    3. **Reinforcement learning** (RL) lets the policy answer, has the preference model judge, and makes the
       better answers likelier.

    This notebook walks through all three with a real model of 135 million weights and the data that come with
    tercet: some minutes each on two CPU cores, no GPU, no account. Every number below is computed here. `tercet
    rlhf` does the same with more steps, writes everything into a folder, and goes on where it was stopped.

    Settings follow `--`: `marimo edit tutorials/rlhf.py -- --steps 4`, or, to run it as a script in seconds,
    `python tutorials/rlhf.py -- --model tiny --steps 2`. The model `tiny` is random: it shows that things run,
    and learns nothing worth having.
    """)
    return


@app.cell
def _():
    asked = mo.cli_args()
    MODEL = str(asked.get("model") or "smollm2-135m")
    # The most steps of any stage.
    LIMIT = int(str(asked.get("steps") or 1_000))
    SFT_STEPS, JUDGE_STEPS, RL_STEPS = (min(LIMIT, steps) for steps in (12, 48, 12))

    loaded = load_model(MODEL, dtype="auto")
    engine = LocalEngine(loaded)
    render = renderer("auto", loaded.tokenizer)
    lora = LoraConfig(rank=16, alpha=32.0)
    print(f"{MODEL}: {sum(p.numel() for p in loaded.model.parameters()) / 1e6:.4g} million weights")
    return JUDGE_STEPS, RL_STEPS, SFT_STEPS, engine, loaded, lora, render


@app.cell
def _():
    mo.md("""
    ## 1. Supervised fine-tuning

    A conversation becomes tokens, and every token a weight: 1 where the assistant speaks, its stop included, 0
    elsewhere. The loss is the mean of minus log-probability over the tokens with weight. Below, one conversation
    that is never learned: given tokens are pale, learned ones coloured, redder the less the model expects them.
    """)
    return


@app.cell
def _(engine, loaded, lora, render):
    conversations = load_conversations("builtin").rows
    unseen = [render.datum(row) for row in load_conversations("builtin", split="test").rows]
    data = [render.datum(row) for row in conversations]
    text = held_out(unseen, lambda tokens: text_of(loaded.tokenizer, tokens))

    sft_trainer = engine.trainer(lora=lora)
    # An adapter starts as nothing: what the trainer says now is what the base says.
    expected_before = sft_trainer.forward(Batch(unseen[:1])).result().logprobs[0]
    nll_before = nll(sft_trainer, text)["test/nll"]
    painted(loaded.tokenizer, unseen[0], expected_before)
    return data, expected_before, nll_before, sft_trainer, text, unseen


@app.function
def painted(tokenizer: Tokenizer, datum: Datum, logprobs: Sequence[float]) -> mo.Html:
    """Tokens as coloured text: without weight pale, with weight the redder the less likely."""
    pieces = []
    for token, weight, logprob in zip(datum.tokens, datum.weights, logprobs, strict=True):
        said = html.escape(text_of(tokenizer, [token])).replace("\n", "↵<br>")
        surprise = min(1.0, -logprob / 6)
        style = f"background: rgba({int(60 + 160 * surprise)}, {int(160 - 100 * surprise)}, 80, 0.45)"
        hint = f' title="{-logprob:.2f} nats"' if weight else ""
        pieces.append(f'<span style="{style if weight else "opacity: 0.45"}"{hint}>{said}</span>')
    return mo.Html(f'<div style="font-family: monospace; line-height: 1.7">{"".join(pieces)}</div>')


@app.cell
def _():
    mo.md("""
    The loop has two verbs. `forward_backward` adds the gradient of a batch, `optim_step` uses it up. What the two
    return are futures: an engine far away is kept busy while the next batch is made ready.
    """)
    return


@app.function
def learn_step(trainer: Trainer, batch: Batch, learning_rate: float, loss: str = "cross_entropy") -> float:
    """One step of learning; its loss."""
    learning = trainer.forward_backward(batch, loss)
    trainer.optim_step(AdamParams(learning_rate=learning_rate, max_grad_norm=1.0)).result()
    return learning.result().loss


@app.cell
def _(SFT_STEPS, data, engine, expected_before, loaded, nll_before, render, sft_trainer, text, unseen):
    sft_losses = []
    for _step in range(SFT_STEPS):
        _batch = Batch([data[index_at(8 * _step + _i, len(data), seed=0)] for _i in range(8)])
        sft_losses.append(learn_step(sft_trainer, _batch, 5e-4 * (1 - _step / SFT_STEPS)))
        print(f"SFT step {_step + 1}  loss {sft_losses[-1]:.4f}")
    sft_weights = sft_trainer.save(folder / "sft").result()
    sft_policy = engine.sampler(sft_weights)
    nll_after = nll(sft_trainer, text)["test/nll"]
    print(f"SFT held-out NLL {nll_before:.4f} before, {nll_after:.4f} after")
    _expected = sft_trainer.forward(Batch(unseen[:1])).result().logprobs[0]
    _question: Conversation = (Message("user", "My houseplant droops, but its soil is wet. What should I do?"),)
    _greedy = SamplingParams(max_tokens=48, temperature=0, stop=render.stop)
    _said = [answer([_question], each, render, _greedy, 1)[0][0] for each in (engine.sampler(), sft_policy)]
    mo.vstack(
        [
            mo.md(f"Held-out NLL: **{nll_before:.3f}** before, **{nll_after:.3f}** after, in nats per token."),
            curves({"loss of the batch (nats per token)": list(enumerate(sft_losses, 1))}),
            mo.md("The same unseen conversation, before and after:"),
            mo.hstack(
                [painted(loaded.tokenizer, unseen[0], each) for each in (expected_before, _expected)],
                widths="equal",
            ),
            mo.md(f"And a question that is nowhere in the data: *{_question[0].content}*"),
            table("base,SFT", [[each.message.content for each in _said]]),
        ]
    )
    return sft_policy, sft_weights


@app.function
def table(columns: str, rows: Sequence[Sequence[object]]) -> mo.Html:
    """Rows as a table, its columns named by words between commas; fractions with three decimals."""

    def cell(value: object) -> str:
        return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value).strip()).replace("\n", "<br>")

    def line(cells: Sequence[str], kind: str) -> str:
        style = "padding: 0.3em 0.8em; text-align: left; vertical-align: top"
        return "<tr>" + "".join(f'<{kind} style="{style}">{each}</{kind}>' for each in cells) + "</tr>"

    head = line(columns.split(","), "th")
    return mo.Html(f"<table>{head}{''.join(line([cell(value) for value in row], 'td') for row in rows)}</table>")


@app.function
def curves(panels: Mapping[str, Sequence[tuple[float, float]]], levels: Mapping[str, float] | None = None) -> Figure:
    """Small figures side by side: title to points (step, value), and where wanted the value that chance would give."""
    figure = Figure(figsize=(max(4.5, 3.2 * len(panels)), 2.6), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker=".")
        if title in (levels or {}):
            axes.axhline((levels or {})[title], linestyle="--", color="grey", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@app.cell
def _():
    mo.md("""
    ## 2. A model of preference

    A comparison is one prompt: the conversation, the first answer, the second answer, and the question which is
    better. The preference model answers with one token, `A` or `B`; nothing else is learned. tercet reads
    the *probabilities* of both: their difference, P(B) - P(A), is a margin from -1 (surely the first) to +1
    (surely the second).

    Which answer is shown first should not matter. To a model that has just begun it does, very much. So a pair is
    always shown in both orders: in one loss when it is learned (docs/preference.md), and in both when it is judged,
    where the mean cancels what the place contributes. Choose one of the held-out comparisons:
    """)
    return


@app.cell
def _(engine, render):
    pairs, unseen_pairs = (load_comparisons("builtin", split=split).rows for split in ("train", "test"))
    shown = ComparisonRenderer(render, limit=engine.context_tokens)
    which = mo.ui.slider(0, len(unseen_pairs) - 1, value=0, label="comparison", show_value=True)
    mo.hstack([which])
    return pairs, shown, unseen_pairs, which


@app.cell
def _(loaded, shown, unseen_pairs, which):
    one_pair = unseen_pairs[which.value]
    _datum = shown.datum(one_pair)
    painted(loaded.tokenizer, _datum, [0.0] * len(_datum.tokens))
    return (one_pair,)


@app.function
def verdicts(judge: Judge, pair: Comparison) -> mo.Html:
    """What a judge says of a pair in both orders."""
    both = zip(("the better", "the worse"), judge.probabilities([pair, pair.swapped()]), strict=True)
    rows = [(first, p.a, p.b, p.margin, "the second" if p.margin > 0 else "the first") for first, p in both]
    return table("shown first,P(A),P(B),margin,prefers", rows)


@app.cell
def _(JUDGE_STEPS, engine, pairs, sft_weights, shown, unseen_pairs):
    # From the SFT policy, which knows what answers look like.
    judge_trainer = engine.trainer(init=sft_weights)
    untrained_judge = Judge(judge_trainer.sampler(), shown)
    judge_losses = []
    for _step in range(JUDGE_STEPS):
        _rows = [pairs[index_at(4 * _step + _i, len(pairs), seed=0)] for _i in range(4)]
        _rate = 1e-3 * min((_step + 1) / 5, 1 - _step / JUDGE_STEPS)
        judge_losses.append(learn_step(judge_trainer, both_orders(_rows, shown), _rate, "both_orders"))
        print(f"preference step {_step + 1}  loss {judge_losses[-1]:.4f}")
    judge = Judge(judge_trainer.sampler(), shown)
    agreed = agreement(judge, unseen_pairs[:40])
    print(f"preference held-out accuracy {agreed.accuracy_both:.3f}, flip rate {agreed.flip_rate:.3f}")
    mo.vstack(
        [
            curves(
                {"loss (nats; dashed: a coin)": list(enumerate(judge_losses, 1))},
                {"loss (nats; dashed: a coin)": 0.693},
            ),
            mo.md(f"""
            On {agreed.n} held-out comparisons:

            - a single verdict is right in **{agreed.accuracy:.0%}**;
            - the mean of both orders is right in **{agreed.accuracy_both:.0%}**;
            - the verdict is for the same *place* in both orders in **{agreed.flip_rate:.0%}** (the flip rate): this is
              what is left of the bias, and why both orders are asked.
            """),
        ]
    )
    return judge, untrained_judge


@app.cell
def _(judge, one_pair, untrained_judge):
    mo.vstack(
        [
            mo.md("What the judge says of the comparison chosen above, **before** it learned and **after**:"),
            verdicts(untrained_judge, one_pair),
            verdicts(judge, one_pair),
        ]
    )
    return


@app.cell
def _():
    mo.md("""
    ## 3. Reinforcement learning

    ### One prompt, one tournament

    The SFT policy answers a prompt four times. Every answer meets every other, in both orders: 12 matches. An
    answer's score is its mean margin over its matches; an answer that does not end with its stop loses 1. That is
    the **reward**. Its **advantage** is the reward minus the mean of the group: how much better it is than what
    the policy says anyway.
    """)
    return


@app.cell
def _():
    prompts, unseen_prompts = (load_prompts("builtin", split=split).rows for split in ("train", "test"))
    which_prompt = mo.ui.slider(0, 99, value=3, label="prompt", show_value=True)
    mo.hstack([which_prompt])
    return prompts, unseen_prompts, which_prompt


@app.cell
def _(judge, prompts, render, sft_policy, which_prompt):
    _params = SamplingParams(max_tokens=40, stop=render.stop, seed=0)
    group = answer([prompts[which_prompt.value]], sft_policy, render, _params, 4)[0]
    played = matches(4)
    shown_pairs = [Comparison(group[i].prompt, group[i].conversation, group[j].conversation) for i, j in played]
    margins = dict(zip(played, judge.margins(shown_pairs), strict=True))
    rewards = [score - float(each.termination != "stop") for score, each in zip(scores(4, margins), group, strict=True)]
    advantage = advantages([rewards])[0]
    _answers = [
        (f"answer {i + 1}", group[i].message.content, group[i].termination, rewards[i], advantage[i]) for i in range(4)
    ]
    _matches = [(f"answer {i + 1}", *(margins.get((i, j), "") for j in range(4))) for i in range(4)]
    mo.vstack(
        [
            mo.md(f"Prompt: *{prompts[which_prompt.value][-1].content}*"),
            table(",says,ended,reward,advantage", _answers),
            mo.md(
                "Its matches. The row is shown first, the column second; the number: how much the second is preferred."
            ),
            table("first,answer 1,answer 2,answer 3,answer 4", _matches),
        ]
    )
    return advantage, group


@app.cell
def _():
    mo.md("""
    ### One step

    Every token of an answer carries its advantage. The loss is minus *ratio x advantage*, where the ratio is how
    much likelier the token is now than when it was sampled: 1 before the first step, and its gradient is that of
    the log-probability. One step should make answers with positive advantage likelier, the others less likely. It
    does so for the group as a whole; all answers come from the same weights, so a single one may be carried the
    other way.
    """)
    return


@app.cell
def _(advantage, engine, group, sft_weights):
    _trainer = engine.trainer(init=sft_weights)
    _batch = Batch(
        [
            each.datum(sampling_logprobs=each.completion.logprobs, advantages=a)
            for each, a in zip(group, advantage, strict=True)
        ]
    )
    _result = _trainer.forward_backward(_batch, "importance_sampling").result()
    _trainer.optim_step(AdamParams(learning_rate=1e-4, max_grad_norm=1.0)).result()
    moved = [
        sum(new) - sum(old)
        for new, old in zip(_trainer.forward(_batch).result().logprobs, _result.logprobs, strict=True)
    ]
    gained = sum(a * change for a, change in zip(advantage, moved, strict=True))
    print(f"RL one step: ratio {_result.metrics['ratio']:.4f}, advantage-weighted change {gained:+.2e} nats")
    _rows = [(f"answer {i + 1}", advantage[i], moved[i]) for i in range(4)]
    table(",advantage,change of its log-probability (nats)", _rows)
    return


@app.cell
def _():
    mo.md("""
    ### The whole run

    `policy_gradient` is this step, repeated on new prompts and new answers, with what a run needs around it:
    self-checks before the first step, metrics, samples, checkpoints. Look at four things together:

    - **win rate** on held-out prompts against the SFT policy, by the judge that rewards: it should rise;
    - **KL** to the SFT policy, in nats per answer: how far the policy has gone. It is the price of the win rate;
    - **length**, in tokens: a judge that just likes long or short answers shows here first;
    - **ended**: the share of answers that end by themselves, which the penalty pushes to 1.
    """)
    return


@app.function
def rl_run(
    config: RLConfig,
    prompts: Sequence[Conversation],
    unseen: Sequence[Conversation],
    judge: Judge,
    start: Sampler,
    trainer: Trainer,
) -> tuple[list[dict[str, float]], WinRate]:
    """Learn from tournaments; the metrics of every step, and the win rate over the start on prompts never learned."""
    render = judge.renderer.renderer
    params = SamplingParams(max_tokens=config.max_tokens, stop=render.stop, seed=1_000_003)
    first = [group[0].conversation for group in answer(unseen, start, render, params, 1)]

    def rate_of(policy: Sampler) -> WinRate:
        answers = [group[0].conversation for group in answer(unseen, policy, render, params, 1)]
        return win_rate(judge, unseen, answers, first)

    def evaluate(policy: Sampler, step: int) -> Mapping[str, float]:
        return rate_of(policy).metrics()

    directory = Path(tempfile.mkdtemp(dir=folder))
    with Run(directory, config={}, save_every_steps=0, total_steps=config.steps, stage="rl") as run:
        policy_gradient(config, prompts, render, judge, start, trainer=trainer, run=run, evaluate=evaluate, seed=0)
    return read_rows(directory / "metrics.jsonl"), rate_of(trainer.sampler())


@app.cell
def _(
    RL_STEPS,
    engine,
    judge,
    prompts,
    sft_policy,
    sft_weights,
    unseen_prompts,
):
    rl_trainer = engine.trainer(init=sft_weights)
    rl_config = RLConfig(steps=RL_STEPS, prompts_per_step=5, group_size=4, max_tokens=40, eval_every_steps=6)
    rows, final = rl_run(rl_config, prompts, unseen_prompts[:16], judge, sft_policy, rl_trainer)
    print(f"RL held-out win rate {final.win_rate:.3f} ({final.low:.2f} to {final.high:.2f}) against SFT, n {final.n}")
    return final, rl_config, rl_trainer, rows


@app.cell
def _(engine, final, render, rl_config, rl_trainer, rows, sft_policy, unseen_prompts):
    _steps = [row for row in rows if "reward" in row]
    _rates = [(row["step"], row["test/win_rate"]) for row in rows if "test/win_rate" in row]
    _params = SamplingParams(max_tokens=rl_config.max_tokens, stop=render.stop, seed=1_000_003)
    _policies = (engine.sampler(), sft_policy, rl_trainer.sampler())
    _three = [answer(unseen_prompts[:5], each, render, _params, 1) for each in _policies]
    _said = [
        (prompt[-1].content, *(groups[i][0].message.content for groups in _three))
        for i, prompt in enumerate(unseen_prompts[:5])
    ]
    mo.vstack(
        [
            curves(
                {"win rate against SFT": _rates}
                | {
                    title: [(row["step"] + 1, row[key]) for row in _steps]
                    for title, key in (
                        ("KL to SFT (nats per answer)", "kl"),
                        ("length (tokens)", "completions/mean_length"),
                        ("share of answers that end", "format"),
                    )
                },
                {"win rate against SFT": 0.5},
            ),
            mo.md(
                f"Held-out win rate against the SFT policy: **{final.win_rate:.2f}**, 95% interval "
                f"{final.low:.2f} to {final.high:.2f}, on {final.n} prompts."
            ),
            table("asked,base,SFT,RL", _said),
        ]
    )
    return


@app.cell
def _():
    mo.md("""
    ## What to keep in mind

    - The judge that rewards is also the judge that measures here. A policy learns what the judge likes, its
      mistakes included. `tercet rlhf` therefore trains a second judge on comparisons the first never saw, and
      lets it watch.
    - A judge of this size tells rude, rambling and evasive answers from good ones. It hardly tells true from
      false.
    - Sixteen prompts give a wide interval. Read the interval, not the middle of it.

    From here: `tercet rlhf` for all of it in one command, `docs/recipes.md` for every number it writes,
    `docs/rl.md` and `docs/preference.md` for the two stages in depth, `examples/` for the loops without a
    notebook.
    """)
    return


if __name__ == "__main__":
    app.run()
