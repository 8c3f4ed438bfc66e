import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tercet.errors import ModelError, UsageError
from tercet.models.export import export_adapter, export_merged, find_weights
from tercet.models.quiet import quiet
from tercet.models.tiny import tiny_model

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.arange(3, 43).reshape(2, 20)


@torch.no_grad()
def logprobs(model) -> Tensor:
    return model(input_ids=TOKENS).logits.float().log_softmax(-1)


def trained_adapter(base: Path, out: Path, *, targets="all-linear", name: str | None = None) -> Path:
    """An adapter whose update is large enough to be seen."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base)
    turned = model.config.model_type == "gpt2"
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=turned)
    wrapped = peft.get_peft_model(model, settings)
    draw = torch.Generator().manual_seed(1)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    wrapped.save_pretrained(str(out), save_embedding_layers=False)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name or str(base)
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def with_adapter(base: Path, adapter: Path):
    with quiet():
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merged_model_gives_the_log_probs_of_base_and_adapter(tmp_path, architecture, tied):
    base = tiny_model(tmp_path / "base", architecture, tied=tied)
    adapter = trained_adapter(base, tmp_path / "adapter")
    with quiet():
        export_merged(str(base), adapter, tmp_path / "out")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        untouched = AutoModelForCausalLM.from_pretrained(base)
    wanted = logprobs(with_adapter(base, adapter))
    assert (logprobs(merged) - wanted).abs().max() < 1e-4
    assert (logprobs(untouched) - wanted).abs().max() > 0.01
    shared = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert shared == tied


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns that head and embedding are tied, which is the point
def test_an_adapter_on_a_shared_head_is_merged_into_the_head_alone(tmp_path):
    base = tiny_model(tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter", targets=["lm_head", "q_proj"])
    export_merged(str(base), adapter, tmp_path / "out")
    with quiet():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logprobs(merged) - logprobs(with_adapter(base, adapter))).abs().max() < 1e-4
    assert not merged.config.tie_word_embeddings


def test_a_merged_model_brings_tokenizer_template_and_generation_config(tmp_path):
    base = tiny_model(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    export_merged(str(base), trained_adapter(base, tmp_path / "adapter"), tmp_path / "out", dtype="bfloat16")
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(base)
    assert ours.chat_template == theirs.chat_template
    assert ours("What is it? 12")["input_ids"] == theirs("What is it? 12")["input_ids"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_wholly_trained_model_is_written_as_it_is(tmp_path):
    base, trained = tiny_model(tmp_path / "base"), tiny_model(tmp_path / "trained", seed=5)
    export_merged(str(base), trained, tmp_path / "out")
    with quiet():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        theirs = AutoModelForCausalLM.from_pretrained(trained)
    assert torch.equal(logprobs(ours), logprobs(theirs))
    with pytest.raises(UsageError, match="a whole model, not an adapter"):
        export_adapter(trained, tmp_path / "adapter")


def test_an_exported_adapter_names_a_base_that_others_can_find(tmp_path):
    base = tiny_model(tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter", name="smollm2-135m")
    export_adapter(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlibrary_name: peft\n")
    assert logprobs(with_adapter(base, tmp_path / "out")).equal(logprobs(with_adapter(base, adapter)))


def test_an_adapter_on_a_local_base_keeps_its_path(tmp_path):
    base = tiny_model(tmp_path / "base")
    export_adapter(trained_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    with quiet():
        model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert logprobs(model).equal(logprobs(with_adapter(base, tmp_path / "adapter")))


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(tmp_path):
    base = tiny_model(tmp_path / "base")
    deep, wide = tiny_model(tmp_path / "deep", layers=3), tiny_model(tmp_path / "wide", hidden=128)
    for i, other in enumerate((deep, wide)):
        adapter = trained_adapter(other, tmp_path / f"adapter{i}")
        with pytest.raises(ModelError, match="does not fit .*base"):
            export_merged(str(base), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_export_never_overwrites(tmp_path):
    base = tiny_model(tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter")
    for export in (lambda out: export_adapter(adapter, out), lambda out: export_merged(str(base), adapter, out)):
        with pytest.raises(UsageError, match="not empty"):
            export(base)
    assert AutoTokenizer.from_pretrained(base).eos_token == "<|im_end|>"


def test_the_newest_weights_of_a_run_are_found(tmp_path):
    base = tiny_model(tmp_path / "base", layers=1)
    for step in (20, 100):
        trained_adapter(base, tmp_path / "run" / "rl" / "checkpoints" / f"step-{step:06d}" / "weights")
    trained_adapter(base, tmp_path / "run" / "sft" / "checkpoints" / "step-000200")
    assert find_weights(tmp_path / "run").parts[-4:] == ("rl", "checkpoints", "step-000100", "weights")
    assert find_weights(tmp_path / "run" / "sft").name == "step-000200"
    with pytest.raises(UsageError, match="holds no trained weights"):
        find_weights(tmp_path)
