"""Memory that runs out in the middle of a pass, told by a hook on the model's own modules."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tercet.engine import local, sampler
from tercet.engine.bodies import BodySampler
from tercet.engine.kv_cache import KeyValueCache
from tercet.engine.local import Frozen, LocalEngine, width
from tercet.errors import EngineError
from tercet.models.load import load_model
from tercet.models.out_of_memory import ran_out
from tercet.types import AdamParams, Datum, LoraConfig, SamplingParams

OUT = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    "python": MemoryError(),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "onednn": RuntimeError("could not create a primitive"),
}


class Full:
    """A memory that holds `tokens` tokens in a layer."""

    def __init__(self, tokens: int, error: BaseException) -> None:
        self.tokens, self.error, self.failures = tokens, error, 0

    def forward(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self.check(given[0])

    def backward(self, module: torch.nn.Module, gradients: tuple[torch.Tensor, ...]) -> None:
        self.check(gradients[0])

    def check(self, hidden: torch.Tensor) -> None:
        if hidden.shape[1] > self.tokens:
            self.failures += 1
            raise self.error


def engine_and_trainer(tokens: int, lora: LoraConfig | None):
    engine = LocalEngine(load_model("tiny"), micro_batch_tokens=tokens, score_tokens=tokens)
    return engine, engine.trainer(lora=lora, seed=1)


def layer(trainer, index):
    return trainer.body().trunk.layers[index]


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), None])
@pytest.mark.parametrize("out", sorted(OUT))
def test_the_micro_batch_is_halved_and_the_gradient_is_the_same(batch, gradient, caplog, out, lora):
    _, wanted = engine_and_trainer(8, lora)
    expected = wanted.forward_backward(batch, "cross_entropy").result()
    engine, trainer = engine_and_trainer(32, lora)
    memory = Full(8, OUT[out])
    layer(trainer, 1).register_forward_pre_hook(memory.forward)
    for times in (1, 2):
        result = trainer.forward_backward(batch, "cross_entropy").result()
        torch.testing.assert_close(gradient(trainer), times * gradient(wanted), rtol=1e-6, atol=1e-7)
        assert result == expected
    assert engine.budgets.micro_batch_tokens == 8
    # 32 and 16 were too much; the second call knew, and said nothing.
    assert memory.failures == 2
    assert [record.args[1:3] for record in caplog.records] == [(16, 32), (8, 16)]


@pytest.mark.parametrize("before", [0, 1])
def test_what_a_backward_pass_left_halfway_is_taken_back(batch, gradient, before):
    _, wanted = engine_and_trainer(16, None)
    _, trainer = engine_and_trainer(32, None)
    for _ in range(before):  # a gradient that is already there stays
        wanted.forward_backward(batch, "cross_entropy").result()
        trainer.forward_backward(batch, "cross_entropy").result()
    memory = Full(16, OUT["gpu"])
    handle = layer(trainer, 0).register_full_backward_pre_hook(memory.backward)
    wanted.forward_backward(batch, "cross_entropy").result()
    trainer.forward_backward(batch, "cross_entropy").result()
    handle.remove()
    assert memory.failures == 1
    torch.testing.assert_close(gradient(trainer), gradient(wanted), rtol=1e-5, atol=1e-7)


def test_scoring_halves_its_own_budget(batch):
    sequences = [datum.tokens for datum in batch.data]
    engine, trainer = engine_and_trainer(32, LoraConfig(rank=4))
    expected = trainer.forward(batch).result()
    memory = Full(8, OUT["cpu"])
    layer(trainer, 1).register_forward_pre_hook(memory.forward)
    assert trainer.forward(batch).result().logprobs == [pytest.approx(row, abs=1e-5) for row in expected.logprobs]
    assert (engine.budgets.score_tokens, engine.budgets.micro_batch_tokens) == (8, 32)
    assert len(engine.sampler().logprobs(sequences).result()) == len(sequences)


def test_with_one_sequence_at_a_time_there_is_nothing_to_halve(batch, gradient):
    _, trainer = engine_and_trainer(2048, LoraConfig(rank=4))
    trainer.forward_backward(batch, "cross_entropy").result()
    before = gradient(trainer)
    memory = Full(4, OUT["cpu"])
    layer(trainer, 1).register_forward_pre_hook(memory.forward)
    with pytest.raises(EngineError, match=r"one sequence, or one pair, at a time: .*can't allocate.*shorter sequences"):
        trainer.forward_backward(batch, "cross_entropy").result()
    assert torch.equal(gradient(trainer), before)
    # 2048, 16, 8, 4 and 2; with 1 the pieces would be those of 2.
    assert memory.failures == 5


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), None])
@pytest.mark.parametrize("before", [0, 1])
def test_another_error_is_passed_on_and_leaves_the_gradient_that_was_there(batch, gradient, before, lora):
    engine, trainer = engine_and_trainer(32, lora)
    for _ in range(before):
        trainer.forward_backward(batch, "cross_entropy").result()
    there = gradient(trainer).clone() if before else None
    memory = Full(8, RuntimeError("shapes cannot be multiplied"))
    layer(trainer, 0).register_full_backward_pre_hook(memory.backward)  # the layer above has its gradient by then
    with pytest.raises(RuntimeError, match="shapes cannot"):
        trainer.forward_backward(batch, "cross_entropy").result()
    assert (memory.failures, engine.budgets.micro_batch_tokens) == (1, 32)
    if there is None:
        assert all(parameter.grad is None for parameter in trainer.parameters.values())
    else:
        assert torch.equal(gradient(trainer), there)


@pytest.mark.parametrize(
    ("words", "is_memory"),
    [
        ("could not create a memory object", True),
        ("dnnl: out_of_memory", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("could not create a primitive descriptor for a matmul primitive", False),
        ("could not create a memory descriptor by tag", False),
        ("CUDA error: CUBLAS_STATUS_INVALID_VALUE", False),
    ],
)
def test_libraries_say_in_their_own_words_that_memory_ran_out(words, is_memory):
    assert ran_out(RuntimeError(words)) is is_memory
    assert not ran_out(ValueError(words))


class Allocator(TorchDispatchMode):
    """Refuses the n-th call of an operation, while `n` counts down to it."""

    def __init__(self, operation: str, n: int) -> None:
        super().__init__()
        self.operation, self.n = operation, n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n -= function.name().startswith(self.operation)
        if self.n == 0:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99")
        return function(*args, **(kwargs or {}))


def learning(trainer, batch):
    """A gradient, a step, and the weights after it."""
    trainer.forward_backward(batch, "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=0.1)).result()
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


@pytest.mark.parametrize(
    ("operation", "n", "steps"),
    [("aten::zeros_like", 1, 0), ("aten::zeros_like", 4, 0), ("aten::empty_like", 1, 0), ("aten::empty_like", 1, 1)],
    ids=["first moment", "fourth moment", "first step", "second step"],
)
def test_without_room_for_a_step_nothing_changes_and_it_can_be_taken_later(batch, gradient, operation, n, steps):
    (_, wanted), (_, trainer) = (engine_and_trainer(32, LoraConfig(rank=4)) for _ in range(2))
    for _ in range(steps):
        learning(wanted, batch)
        learning(trainer, batch)
    trainer.forward_backward(batch, "cross_entropy").result()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    moments, there = copy.deepcopy(trainer.optimizer.state_dict()["state"]), gradient(trainer).clone()
    with (
        Allocator(operation, n),
        pytest.raises(EngineError, match=r"before the step .*can't allocate.*GB: t"),
    ):
        trainer.optim_step(AdamParams(learning_rate=0.1)).result()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in trainer.parameters.items())
    assert torch.equal(gradient(trainer), there)
    assert str(trainer.optimizer.state_dict()["state"]) == str(moments)
    trainer.optim_step(AdamParams(learning_rate=0.1)).result()
    expected = learning(wanted, batch)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trainer.parameters.items())


def test_what_a_step_without_room_had_made_is_given_back_while_its_error_is_still_looked_at(batch, monkeypatch):
    _, trainer = engine_and_trainer(32, LoraConfig(rank=4))
    trainer.forward_backward(batch, "cross_entropy").result()
    made, zeros_like = [], torch.zeros_like

    def noted(*args, **kwargs):
        zeros = zeros_like(*args, **kwargs)
        made.append(weakref.ref(zeros))
        return zeros

    monkeypatch.setattr(torch, "zeros_like", noted)
    with Allocator("aten::empty_like", 1), pytest.raises(EngineError, match="before the step") as caught:
        trainer.optim_step(AdamParams(learning_rate=0.1)).result()
    assert len(made) == 2 * len(trainer.parameters)
    assert caught.value.__cause__ is None
    assert not any(each() is not None for each in made)


def test_a_step_that_ends_halfway_says_that_the_weights_are_lost(batch):
    _, trainer = engine_and_trainer(32, LoraConfig(rank=4))
    trainer.forward_backward(batch, "cross_entropy").result()
    with Allocator("aten::sqrt", 2), pytest.raises(EngineError, match="others have not; load the last save .*allocate"):
        trainer.optim_step(AdamParams(learning_rate=0.1)).result()


def test_a_datum_of_any_length_alone_needs_no_second_try(batch):
    engine, trainer = engine_and_trainer(4, LoraConfig(rank=4))
    memory = Full(8, OUT["cpu"])
    layer(trainer, 1).register_forward_pre_hook(memory.forward)
    trainer.forward_backward(type(batch)([Datum([3] * 8, [0.0, *[1.0] * 7])]), "cross_entropy").result()
    assert (memory.failures, engine.budgets.micro_batch_tokens) == (0, 4)


def drawn(engine: LocalEngine):
    """Twelve completions of three prompts."""
    prompts = [[3, 4, 5], [6], [7, 8]]
    return engine.sampler().sample(prompts, SamplingParams(max_tokens=6, eos=False, seed=5), n=4).result()


def tokens_of(groups):
    return [[completion.tokens for completion in group] for group in groups]


@pytest.fixture
def caches(monkeypatch):
    """Caches hold the rows that are allowed, and those asked for are noted in the list that is given back."""

    def holding(most: float = math.inf) -> list[int]:
        rooms: list[int] = []

        class Small(KeyValueCache):
            def __init__(self, rows: int, *rest) -> None:
                rooms.append(rows)
                if rows > most:
                    raise OUT["cpu"]
                super().__init__(rows, *rest)

        monkeypatch.setattr(sampler, "KeyValueCache", Small)
        return rooms

    return holding


def test_fewer_rows_are_drawn_when_memory_runs_out_and_the_answers_are_the_same(caches, caplog):
    plain = LocalEngine(load_model("tiny"))
    expected = drawn(plain)
    rooms = caches(3)
    engine = LocalEngine(load_model("tiny"), max_rows=100)
    assert tokens_of(drawn(engine)) == tokens_of(expected)
    assert rooms == [12, 6, 3]
    assert engine.budgets.max_rows == 3
    assert "max_rows is 3 from here on instead of 6" in caplog.text


def test_rows_whose_keys_and_values_would_not_fit_wait_for_others(caches):
    engine = LocalEngine(load_model("tiny"))
    expected, rooms = drawn(engine), caches()
    # The longest prompt has three tokens, a completion six.
    for there, rows in ((5 * 9, 5), (6 * 9 - 1, 5), (4, 1), (100 * 9, 12)):
        engine.budgets.cache_tokens = there
        assert tokens_of(drawn(engine)) == tokens_of(expected)
        assert rooms.pop() == rows


def test_a_quarter_of_the_memory_may_be_keys_and_values(monkeypatch):
    monkeypatch.setattr(local, "memory_bytes", lambda: 8_000_000)
    engine = LocalEngine(load_model("tiny"))
    config = engine.model.config
    # A number has four bytes, and a key is one of two.
    token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert engine.budgets.cache_tokens == 2_000_000 // token


def test_numbers_twice_as_wide_leave_room_for_half_the_rows(caches):
    engine, rooms = LocalEngine(load_model("tiny")), caches()
    engine.budgets.cache_tokens = 9 * 9
    base = engine.sampler()
    wide = BodySampler(base.body, base.tensors, engine.language, engine.budgets, width=2)
    for each in (base, wide):
        each.sample([[7, 8, 3]], SamplingParams(max_tokens=6, eos=False), n=12).result()
    assert rooms == [9, 4]


def test_whole_models_that_were_trained_are_sampled_in_float32_whatever_the_base_is():
    whole, adapter = {"a": torch.zeros(2)}, LoraConfig(rank=4)
    assert width(Frozen(None, whole), torch.bfloat16, on_cpu=False) == 2
    assert width(Frozen(None, whole), torch.float32, on_cpu=False) == 1
    assert width(Frozen(adapter, whole), torch.bfloat16, on_cpu=False) == 1  # merged into the base's numbers
    assert width(Frozen(), torch.bfloat16, on_cpu=False) == 1
    assert width(Frozen(None, whole), torch.bfloat16, on_cpu=True) == 1  # attention on a CPU is in float32


def test_rows_that_did_not_wait_for_memory_are_halved_when_it_runs_out(caches):
    engine, rooms = LocalEngine(load_model("tiny")), caches(4)
    engine.budgets.cache_tokens = 9 * 9
    drawn(engine)
    # 128 allowed, of which nine fit; 64, 32 and 16 would change nothing.
    assert rooms == [9, 8, 4]


def test_no_sample_of_a_prompt_is_an_empty_group():
    assert LocalEngine(load_model("tiny")).sampler().sample([[3], [4]], SamplingParams(max_tokens=2), n=0).result() == [
        [], [],
    ]  # fmt: skip
