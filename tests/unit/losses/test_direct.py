"""The direct family in float64 against the formulas worked out with `math`, and gradients against differences of these.

Two pairs, answers 0 and 1 chosen and 2 and 3 rejected, given out of order so that an index that is ignored shows.
"""

from __future__ import annotations

import math

import pytest
import torch

from tercet.losses import LOSSES
from tercet.losses.direct_free import sft_loss

POLICY = [-4.0, -2.5, -6.0, -3.0]
REFERENCE = [-5.0, -2.0, -5.5, -4.0]
LENGTHS = [4.0, 2.0, 5.0, 3.0]
CHOSEN, REJECTED = [1, 0], [3, 2]
TOKEN_MEAN = [3.0, 3.0]  # tokens of the chosen answers: 2 and 4
# Pairs of answers; the pairs of `both_orders` are labels of one prompt, and it has tests of its own.
PER_PAIR = [
    name for name, loss in LOSSES.items() if loss.per == "pair" and "logprobs" in loss.inputs and name != "both_orders"
]


def logistic(z):
    return 1 / (1 + math.exp(-z))


def ls(z):
    return math.log(logistic(z))


def cdpo(z, e):
    return -(1 - e) * ls(z) - e * ls(-z)


def log_odds(a):
    return a - math.log(1 - math.exp(a))


class Pairs:
    """What the formulas are written in; w and l are the winner and the loser of each pair."""

    def __init__(self, policy, reference):
        pairs = list(zip(CHOSEN, REJECTED, strict=True))
        ratio = [p - q for p, q in zip(policy, reference, strict=True)]
        mean = [p / n for p, n in zip(policy, LENGTHS, strict=True)]
        self.c, self.r = [ratio[w] for w, _ in pairs], [ratio[lost] for _, lost in pairs]
        self.d = [c - r for c, r in zip(self.c, self.r, strict=True)]
        self.mean_d = [ratio[w] / LENGTHS[w] - ratio[lost] / LENGTHS[lost] for w, lost in pairs]
        self.s = [(policy[w], policy[lost]) for w, lost in pairs]
        self.a = [(mean[w], mean[lost]) for w, lost in pairs]
        ours = sorted(policy[w] - policy[lost] for w, lost in pairs)
        theirs = sorted(reference[w] - reference[lost] for w, lost in pairs)
        self.aot = [p - q for p, q in zip(ours, theirs, strict=True)]
        self.aot_unpaired = [c - r for c, r in zip(sorted(self.c), sorted(self.r), strict=True)]


def exo(z, e):
    return logistic(z) * (ls(z) - math.log(1 - e)) + logistic(-z) * (ls(-z) - math.log(e))


def discopop(z, tau):
    modulation = logistic(z / tau)
    return -ls(z) * (1 - modulation) + math.exp(-z) * modulation


# name, settings, value of every pair from (pairs, beta), value (of every pair) where policy and reference are one
FORMULAS = {
    "sigmoid": ("sigmoid", {}, lambda p, b: [-ls(b * d) for d in p.d], lambda b: math.log(2)),
    "conservative": (
        "sigmoid", {"label_smoothing": 0.2}, lambda p, b: [cdpo(b * d, 0.2) for d in p.d], lambda b: math.log(2),
    ),
    "robust": (
        "robust", {"label_smoothing": 0.2},
        lambda p, b: [(-0.8 * ls(b * d) + 0.2 * ls(-b * d)) / 0.6 for d in p.d], lambda b: math.log(2),
    ),
    "hinge": ("hinge", {}, lambda p, b: [max(0.0, 1 - b * d) for d in p.d], lambda b: 1.0),
    "ipo": ("ipo", {}, lambda p, b: [(d - 0.5 / b) ** 2 for d in p.d], lambda b: 1 / (4 * b**2)),
    "ipo_mean": ("ipo_mean", {}, lambda p, b: [(d - 0.5 / b) ** 2 for d in p.mean_d], lambda b: 1 / (4 * b**2)),
    "sigmoid_norm": ("sigmoid_norm", {}, lambda p, b: [-ls(b * d) for d in p.mean_d], lambda b: math.log(2)),
    "sigmoid_norm smoothed": (
        "sigmoid_norm", {"label_smoothing": 0.2}, lambda p, b: [cdpo(b * d, 0.2) for d in p.mean_d],
        lambda b: math.log(2),
    ),
    "exo": (
        "exo", {"label_smoothing": 0.01}, lambda p, b: [exo(b * d, 0.01) for d in p.d],
        lambda b: -math.log(2) - 0.5 * math.log(0.99) - 0.5 * math.log(0.01),
    ),
    "nca": (
        "nca", {},
        lambda p, b: [-ls(b * c) - 0.5 * ls(-b * c) - 0.5 * ls(-b * r) for c, r in zip(p.c, p.r, strict=True)],
        lambda b: 2 * math.log(2),
    ),
    "bco": (
        "bco", {}, lambda p, b: [-ls(b * c) - ls(-b * r) for c, r in zip(p.c, p.r, strict=True)],
        lambda b: 2 * math.log(2),
    ),
    "bco shifted": (
        "bco", {"shift": 0.3},
        lambda p, b: [-ls(b * c - 0.3) - ls(-(b * r - 0.3)) for c, r in zip(p.c, p.r, strict=True)],
        lambda b: -ls(-0.3) - ls(0.3),
    ),
    "sppo_hard": (
        "sppo_hard", {},
        lambda p, b: [(c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2 for c, r in zip(p.c, p.r, strict=True)],
        lambda b: 0.5 / b**2,
    ),
    "aot": ("aot", {"label_smoothing": 0.1}, lambda p, b: [cdpo(b * d, 0.1) for d in p.aot], lambda b: math.log(2)),
    "aot_unpaired": (
        "aot_unpaired", {}, lambda p, b: [-ls(b * d) for d in p.aot_unpaired], lambda b: math.log(2),
    ),
    "aot_unpaired smoothed": (
        "aot_unpaired", {"label_smoothing": 0.2}, lambda p, b: [cdpo(b * d, 0.2) for d in p.aot_unpaired],
        lambda b: math.log(2),
    ),
    "apo_zero": (
        "apo_zero", {}, lambda p, b: [1 - logistic(b * c) + logistic(b * r) for c, r in zip(p.c, p.r, strict=True)],
        lambda b: 1.0,
    ),
    "apo_down": (
        "apo_down", {}, lambda p, b: [logistic(b * c) + 1 - logistic(b * d) for c, d in zip(p.c, p.d, strict=True)],
        lambda b: 1.0,
    ),
    "discopop": (
        "discopop", {}, lambda p, b: [discopop(b * d, 0.05) for d in p.d], lambda b: 0.5 * math.log(2) + 0.5,
    ),
    "simpo": ("simpo", {"gamma": 0.4}, lambda p, b: [-ls(b * (w - v) - 0.4) for w, v in p.a], None),
    "simpo smoothed": (
        "simpo", {"gamma": 0.4, "label_smoothing": 0.2},
        lambda p, b: [-0.8 * ls(b * (w - v) - 0.4) - 0.2 * ls(0.4 - b * (w - v)) for w, v in p.a], None,
    ),
    "cpo": ("cpo", {"nll_weight": 0.7}, lambda p, b: [-ls(b * (w - v)) - 0.7 * w / 3 for w, v in p.s], None),
    "cpo smoothed": (
        "cpo", {"nll_weight": 0.7, "label_smoothing": 0.2},
        lambda p, b: [cdpo(b * (w - v), 0.2) - 0.7 * w / 3 for w, v in p.s], None,
    ),
    "orpo": (
        "orpo", {},
        lambda p, b: [
            -w / 3 - b * ls(log_odds(mean_w) - log_odds(mean_v))
            for (w, _), (mean_w, mean_v) in zip(p.s, p.a, strict=True)
        ],
        None,
    ),
    "mixture": (
        "mixture", {"sigmoid": 0.8, "bco": 0.2, "sft": 1.0},
        lambda p, b: [
            -0.8 * ls(b * d) + 0.2 * (-ls(b * c) - ls(-b * r)) - w / 3
            for d, c, r, (w, _) in zip(p.d, p.c, p.r, p.s, strict=True)
        ],
        lambda b: [1.2 * math.log(2) + 2.5 / 3, 1.2 * math.log(2) + 4 / 3],  # 0.8 ln 2 + 0.2 * 2 ln 2, and the NLL
    ),
    # The gaps are 0.5 and -0.25; at the start the value is (eta g)^2 / eta.
    "rebel": (
        "rebel", {"eta": 1.0},
        lambda p, b: [(d - g) ** 2 for d, g in zip(p.d, (0.5, -0.25), strict=True)], lambda b: [0.25, 0.0625],
    ),
    "rebel far": (
        "rebel", {"eta": 2.0},
        lambda p, b: [(d - 2 * g) ** 2 / 2 for d, g in zip(p.d, (0.5, -0.25), strict=True)], lambda b: [0.5, 0.125],
    ),
    "rebel near": (
        "rebel", {"eta": 0.1},
        lambda p, b: [(d - 0.1 * g) ** 2 / 0.1 for d, g in zip(p.d, (0.5, -0.25), strict=True)],
        lambda b: [0.025, 0.00625],
    ),
}  # fmt: skip


def loss_of(name, policy, reference=None, *, beta=None, **settings):
    """Values of a loss of the table, its metrics, and the log-probs it can be differentiated by."""
    loss = LOSSES[name]
    logprobs = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    known = {"logprobs": logprobs, "lengths": torch.tensor(LENGTHS, dtype=torch.float64)}
    pair_streams = {"mean_chosen_length": TOKEN_MEAN, "reward_gaps": [0.5, -0.25]}
    streams = {key: torch.tensor(pair_streams[key], dtype=torch.float64) for key in loss.pair_streams}
    if loss.streams:
        streams["reference_logprobs"] = torch.tensor(reference or REFERENCE, dtype=torch.float64)
    indices = {"chosen": torch.tensor(CHOSEN), "rejected": torch.tensor(REJECTED)}
    if beta is not None and name != "rebel":
        settings["beta"] = beta
    values, metrics = loss.function(*(known[each] for each in loss.inputs), **streams, **indices, **settings)
    return values, metrics, logprobs


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("case", FORMULAS)
def test_a_value_is_what_the_formula_says(case, beta):
    name, settings, formula, _ = FORMULAS[case]
    values, _, _ = loss_of(name, POLICY, beta=beta, **settings)
    assert values.tolist() == pytest.approx(formula(Pairs(POLICY, REFERENCE), beta), abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("case", FORMULAS)
def test_a_gradient_is_the_formulas(case, beta):
    name, settings, formula, _ = FORMULAS[case]
    values, _, logprobs = loss_of(name, POLICY, beta=beta, **settings)
    values.sum().backward()

    def total(change, i):
        moved = [p + change * (i == j) for j, p in enumerate(POLICY)]
        return math.fsum(formula(Pairs(moved, REFERENCE), beta))

    def slope(i, h=1e-2):
        # Differences of the sixth order: their error is of the size h^6, far below what is asked for.
        near, mid, far = ((total(k * h, i) - total(-k * h, i)) / (2 * h) for k in (1, 2, 3))
        return 1.5 * near - 0.3 * mid + far / 30

    assert logprobs.grad.tolist() == pytest.approx([slope(i) for i in range(4)], abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("case", [case for case, (*_, start) in FORMULAS.items() if start])
def test_where_policy_and_reference_are_one_the_value_is_known(case, beta):
    name, settings, _, start = FORMULAS[case]
    values, _, _ = loss_of(name, POLICY, POLICY, beta=beta, **settings)
    wanted = start(beta)
    assert values.tolist() == pytest.approx(wanted if isinstance(wanted, list) else [wanted] * 2, abs=1e-9)


@pytest.mark.parametrize("name", PER_PAIR)
def test_every_loss_of_pairs_is_tested(name):
    assert name in {case[0] for case in FORMULAS.values()}


def test_every_loss_with_label_smoothing_is_tested_with_some():
    smoothed = {name for name in PER_PAIR if "label_smoothing" in LOSSES[name].function.__annotations__}
    assert smoothed == {name for name, settings, *_ in FORMULAS.values() if settings.get("label_smoothing")}


@pytest.mark.parametrize("name", PER_PAIR)
@pytest.mark.parametrize("gap", [5e3, -5e3])
def test_answers_however_unlikely_give_finite_numbers(name, gap):
    far = [-1e-8, -1e-8, -1e-8 - abs(gap), -1e-8 - abs(gap)]
    policy, reference = (far, REFERENCE) if gap > 0 else (far[::-1], REFERENCE)
    settings = {"sigmoid": 1.0, "discopop": 1.0} if name == "mixture" else {}
    values, _, logprobs = loss_of(name, policy, reference, **settings)
    values.sum().backward()
    assert values.isfinite().all() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("mean", [-1e-8, -0.5, -50.0, 0.0])
def test_the_odds_of_a_sure_and_of_a_hopeless_answer_have_a_gradient(mean):
    values, _, logprobs = loss_of("orpo", [mean * n for n in LENGTHS[:2]] + POLICY[2:])
    values.sum().backward()
    assert values.isfinite().all() and logprobs.grad.isfinite().all()


def test_orpo_tells_the_log_odds_of_the_chosen_answer_and_their_log_sigmoid():
    _, metrics, _ = loss_of("orpo", POLICY)
    gaps = [log_odds(w) - log_odds(v) for w, v in Pairs(POLICY, REFERENCE).a]
    assert metrics["log_odds_chosen"].tolist() == pytest.approx(gaps, abs=1e-9)
    assert metrics["log_odds_ratio"].tolist() == pytest.approx([ls(gap) for gap in gaps], abs=1e-9)
    assert metrics["nll_loss"].tolist() == pytest.approx([2.5 / 3, 4 / 3], abs=1e-9)


def test_simpo_of_the_papers_ratio_is_simpo_of_the_margin():
    values, _, _ = loss_of("simpo", POLICY, beta=2.5, gamma=2.5 * 0.55)
    a = Pairs(POLICY, REFERENCE).a
    assert values.tolist() == pytest.approx([-ls(2.5 * ((w - v) - 0.55)) for w, v in a], abs=1e-9)


def test_robust_dpos_expectation_does_not_know_of_flipped_labels():
    flip = 0.2
    right, _, _ = loss_of("robust", POLICY, beta=1.0, label_smoothing=flip)
    swapped = [POLICY[i] for i in (2, 3, 0, 1)], [REFERENCE[i] for i in (2, 3, 0, 1)]
    wrong, _, _ = loss_of("robust", *swapped, beta=1.0, label_smoothing=flip)
    clean, _, _ = loss_of("sigmoid", POLICY, beta=1.0)
    assert ((1 - flip) * right + flip * wrong).tolist() == pytest.approx(clean.tolist(), abs=1e-9)


def test_the_same_answer_twice_teaches_dpo_nothing():
    values, _, logprobs = loss_of("sigmoid", [-3.0] * 4, [-2.0] * 4)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-0.05, -0.05, 0.05, 0.05])  # each answer's own, equal and opposite
    assert float(gradient.sum()) == 0.0


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_losses_without_a_reference_ask_for_none(name):
    assert LOSSES[name].streams == ()


def test_every_weight_of_a_mixture_adds_its_loss():
    parts = [name for name in PER_PAIR if name in LOSSES["mixture"].function.__annotations__]
    assert len(parts) == 13  # all that do not need the whole batch and have a reference
    for name in parts:
        alone, _, _ = loss_of(name, POLICY, beta=0.3)
        mixed, _, _ = loss_of("mixture", POLICY, beta=0.3, **{name: 0.5})
        assert mixed.tolist() == pytest.approx((0.5 * alone).tolist(), abs=1e-12)


def test_the_likelihood_in_a_mixture_is_a_mean_over_tokens():
    values, _ = sft_loss(
        torch.tensor(POLICY, dtype=torch.float64),
        chosen=torch.tensor(CHOSEN),
        mean_chosen_length=torch.tensor(TOKEN_MEAN, dtype=torch.float64),
    )
    assert float(values.mean()) == pytest.approx((4.0 + 2.5) / (4 + 2), abs=1e-12)


def test_rebels_published_loss_is_a_metric():
    _, metrics, _ = loss_of("rebel", POLICY, eta=2.0)
    d = Pairs(POLICY, REFERENCE).d
    wanted = [(x / 2 - g) ** 2 for x, g in zip(d, (0.5, -0.25), strict=True)]
    assert metrics["published_loss"].tolist() == pytest.approx(wanted, abs=1e-9)
    assert metrics["predicted_gap"].tolist() == pytest.approx([x / 2 for x in d], abs=1e-9)


@pytest.mark.parametrize("eta", [1.0, 1e6])
def test_rebels_first_step_with_adam_does_not_shrink_as_eta_grows(eta):
    start = torch.tensor(POLICY, dtype=torch.float64)

    def step_of(scale):
        logprobs = start.clone().requires_grad_(True)
        values, _ = LOSSES["rebel"].function(
            1e-3 * logprobs,  # a model whose log-probs hardly move with its weights
            reference_logprobs=1e-3 * start,
            chosen=torch.tensor(CHOSEN),
            rejected=torch.tensor(REJECTED),
            reward_gaps=torch.tensor([0.02, 0.01], dtype=torch.float64),
            eta=eta,
        )
        adam = torch.optim.Adam([logprobs], lr=0.1, eps=1e-8)
        (scale * values.mean()).backward()
        adam.step()
        return float((logprobs.detach() - start).norm())

    assert step_of(1.0) == pytest.approx(step_of(1e6), rel=2e-3)
    assert step_of(1.0) == pytest.approx(0.2, rel=2e-3)  # 0.1 for each of four
