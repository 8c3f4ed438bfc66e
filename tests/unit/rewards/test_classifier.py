"""A real, tiny classifier of transformers, made here."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from tercet.errors import ModelError
from tercet.models.load import load_tokenizer
from tercet.rewards.classifier import ClassifierReward
from tercet.rewards.interface import Candidate
from tercet.types import Message

ROWS = [Candidate((Message("user", "Well?"),), (Message("assistant", words),)) for words in ("Yes, good.", "No.")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two labels, for which random weights have random logits."""
    directory = tmp_path_factory.mktemp("classifier")
    tokenizer = load_tokenizer("tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1}, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        model.score.weight.data.normal_(std=1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_the_logit_of_the_chosen_label_is_the_pipelines(place):
    found = ClassifierReward(str(place), label="POSITIVE").rewards(ROWS)
    classify = pipeline("text-classification", model=str(place), device="cpu")
    said = classify([row.text for row in ROWS], function_to_apply="none", top_k=None, batch_size=1)
    theirs = [next(each["score"] for each in row if each["label"] == "POSITIVE") for row in said]
    assert found == pytest.approx(theirs, abs=1e-5)
    assert found[0] != found[1]
    assert ClassifierReward(str(place), label="1").rewards(ROWS) == found


def test_the_probability_of_a_label_and_what_is_shown_can_be_chosen(place):
    positive, negative = (
        ClassifierReward(str(place), label=label, gives="probability").rewards(ROWS) for label in ("POSITIVE", "0")
    )
    assert [a + b for a, b in zip(positive, negative, strict=True)] == pytest.approx([1.0, 1.0])
    alone, both, chat = (
        ClassifierReward(str(place), label="POSITIVE", reads=reads).rewards(ROWS)
        for reads in ("answer", "conversation", "chat")
    )
    assert len({alone[0], both[0], chat[0]}) == 3
    whole = Candidate((), (Message("assistant", "Well?\n\nYes, good."),))
    assert both[0] == ClassifierReward(str(place), label="POSITIVE").rewards([whole])[0]


def test_what_cannot_be_read_is_refused(place, tmp_path):
    with pytest.raises(ModelError, match="labels NEGATIVE, POSITIVE; choose one"):
        ClassifierReward(str(place))
    with pytest.raises(ModelError, match="no label 'GOOD'"):
        ClassifierReward(str(place), label="GOOD")
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClassifierReward(str(tmp_path))


WIDTH = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHORT = {
    "bert": lambda size: BertForSequenceClassification(
        BertConfig(vocab_size=size, max_position_embeddings=16, num_labels=1, **WIDTH)
    ),
    # Positions begin behind the padding index, which is 1: of 18 rows 16 are used.
    "roberta": lambda size: RobertaForSequenceClassification(
        RobertaConfig(vocab_size=size, max_position_embeddings=18, pad_token_id=1, num_labels=1, **WIDTH)
    ),
    "gpt2": lambda size: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=size, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    ),
}


@pytest.mark.parametrize("kind", SHORT)
def test_a_text_longer_than_the_classifiers_context_loses_its_end_and_is_counted_once(kind, tmp_path):
    tokenizer = load_tokenizer("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SHORT[kind](len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said: list[str] = []
    classifier = ClassifierReward(str(tmp_path), say=said.append)
    assert classifier.max_length == 16
    words = tokenizer(ROWS[0].text * 20)["input_ids"]
    assert len(words) > 100
    texts = (ROWS[0].text * 20, tokenizer.decode(words[:16]))
    long, exact = (Candidate((), (Message("assistant", text),)) for text in texts)
    found = classifier.rewards([ROWS[1], long, exact])
    assert found[1] == found[2] != found[0]
    assert (classifier.cut, classifier.scored) == (1, 3)
    classifier.rewards([long])
    [sentence] = said
    assert sentence.startswith("1 of 3 texts have more than 16 tokens")


def test_a_tokenizers_own_limit_counts_too(place, tmp_path):
    for file in place.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 12}))
    assert ClassifierReward(str(tmp_path), label="1").max_length == 12
    assert ClassifierReward(str(tmp_path), label="1", max_length=10).max_length == 10
    assert ClassifierReward(str(place), label="1").max_length == 1024  # of `tiny`; the model takes 2048


OWN_CODE = """
from types import SimpleNamespace
import torch
from transformers import LlamaModel, LlamaPreTrainedModel

class Own(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(score=input_ids.shape[1] * torch.ones(1))
"""


def test_a_model_with_its_own_code_gives_its_score_when_it_is_trusted(place, tmp_path):
    config = json.loads((place / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "own.Own"}
    config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    for file in place.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(OWN_CODE)
    found = ClassifierReward(str(tmp_path), reads="chat", trust_remote_code=True).rewards(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(place)
    turns = [[{"role": m.role, "content": m.content} for m in (*row.prompt, *row.answer)] for row in ROWS]
    assert found == [len(tokenizer.apply_chat_template(each, return_dict=False)) for each in turns]
