"""A reward model taken elsewhere gives the same numbers there."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tercet.chat.answers import AnswerRenderer
from tercet.chat.renderers import renderer
from tercet.engine.local import LocalEngine
from tercet.errors import UsageError
from tercet.models.export import export_adapter, export_classifier, export_merged
from tercet.models.load import load_model
from tercet.models.quiet import quiet
from tercet.models.tiny import tiny_model
from tercet.rewards.scalar import ScalarJudge
from tercet.types import Head, LoraConfig, Message

# What peft says of its own calls to transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore::UserWarning"
)
PROMPT = (Message("user", "Well? What is it?"),)
ANSWERS = [(Message("assistant", words),) for words in ("Yes.", "No, I think that it is not right.", "It works")]


@pytest.fixture(params=["llama", "gpt2"])
def trained(request, tmp_path):
    """A base, its engine, and a reward model on it that says something."""
    base = tiny_model(tmp_path / "base", request.param, chat_template=request.param == "llama")
    engine = LocalEngine(load_model(str(base)))
    trainer = engine.trainer(lora=LoraConfig(rank=4), head=Head(), seed=3)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return base, engine, trainer.save(tmp_path / "saved").result()


def scored(engine, weights):
    """Our scores, and the texts they are of."""
    tokenizer, scorer = engine.loaded.tokenizer, engine.scorer(weights)
    shown = AnswerRenderer(renderer("auto", tokenizer), limit=512)
    texts = [tokenizer.decode(list(shown.tokens(PROMPT, answer))) for answer in ANSWERS]
    scores = scorer.scores([tokenizer(text)["input_ids"] for text in texts]).result()
    if tokenizer.chat_template:  # without, the pieces of a conversation are tokenised apart, and a text is one piece
        assert scores == ScalarJudge(scorer, shown).scores([(PROMPT, answer) for answer in ANSWERS])
    return scores, texts


def test_transformers_pipeline_gives_the_same_number_alone_and_in_a_padded_batch(trained, tmp_path):
    base, engine, weights = trained
    scores, texts = scored(engine, weights)
    export_classifier(str(base), weights.path, tmp_path / "out")
    with quiet():
        score = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    for batch_size in (1, 3):
        found = score(texts, function_to_apply="none", batch_size=batch_size)
        assert [each["score"] for each in found] == pytest.approx(scores, abs=1e-4)
    assert len(set(scores)) == 3
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == model.config.pad_token_id


def test_the_last_token_of_a_conversation_is_never_taken_for_padding(trained, tmp_path):
    base, engine, weights = trained
    _, texts = scored(engine, weights)
    export_classifier(str(base), weights.path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(tokenizer.pad_token_id not in tokenizer(text)["input_ids"] for text in texts)


def test_an_exported_adapter_is_pefts(trained, tmp_path):
    base, engine, weights = trained
    scores, texts = scored(engine, weights)
    export_adapter(weights.path, tmp_path / "out")
    assert "AutoPeftModelForSequenceClassification" in (tmp_path / "out/README.md").read_text()
    with quiet():
        model = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "out"), num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        found = [float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in texts]
    assert found == pytest.approx(scores, abs=1e-4)


def test_a_policy_that_learned_with_a_value_head_is_exported_without_it(trained, tmp_path):
    base, engine, weights = trained
    export_adapter(weights.path, tmp_path / "adapter", keep_head=False)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("CAUSAL_LM", None)
    export_merged(str(base), weights.path, tmp_path / "merged")
    rows = [[5, 9, 11, 7]]
    ours = engine.sampler(weights).logprobs(rows).result()[0]
    with quiet():
        models = [
            peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")),
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        ]
    for model in models:
        with torch.no_grad():
            every = torch.log_softmax(model(input_ids=torch.tensor(rows)).logits[0], -1)
        assert [float(every[t, token]) for t, token in enumerate(rows[0][1:])] == pytest.approx(ours, abs=1e-4)


def test_weights_without_a_head_are_no_reward_model(tmp_path):
    base = tiny_model(tmp_path / "base")
    saved = LocalEngine(load_model(str(base))).trainer(lora=LoraConfig(rank=4)).save(tmp_path / "saved").result()
    with pytest.raises(UsageError, match="it is no reward model"):
        export_classifier(str(base), saved.path, tmp_path / "out")
    with pytest.raises(UsageError, match="dtype is 'int4'"):
        export_classifier(str(base), saved.path, tmp_path / "out", dtype="int4")
