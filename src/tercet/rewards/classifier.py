"""Any text classifier of transformers as a reward; and reward models that bring their own code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tercet.errors import ModelError, RewardError
from tercet.rewards.interface import Candidate
from tercet.types import as_messages

if TYPE_CHECKING:
    from torch import Tensor

Reads = Literal["answer", "conversation", "chat"]
Gives = Literal["logit", "probability"]


class ClassifierReward:
    """The logit, or the probability, that a sequence classifier gives to one label.

    Texts are scored one by one, so that neither padding nor the classifier's idea of a pad token can matter. A model
    whose output has `score` (ArmoRM's own code does) gives that.
    """

    def __init__(
        self,
        place: str,
        *,
        label: str | None = None,
        reads: Reads = "answer",
        gives: Gives = "logit",
        max_length: int = 4096,
        trust_remote_code: bool = False,
        device: str = "cpu",
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Load it.

        Args:
            place: A local directory or a hub id.
            label: Which label's number is the reward, by name or index; None where there is one label.
            reads: `answer`: the answer's text; `conversation`: prompt and answer as text; `chat`: both, written by the
                classifier's own chat template.
            gives: `logit`, or `probability` (softmax over labels; the sigmoid where there is one).
            max_length: Longest text in tokens, or what tokenizer and model take where that is less; longer ones lose
                their end and are counted.
            trust_remote_code: Let Python files that came with the model run.
            device: cpu or cuda.
            say: Told once, of the first texts that are cut, how many they are.

        Raises:
            ModelError: It cannot be loaded, or has no such label, or no chat template where one is wanted.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from tercet.models.quiet import quiet

        self.place, self.reads, self.gives, self.say = place, reads, gives, say
        self.scored = self.cut = 0
        try:
            with quiet():
                trusted = trust_remote_code
                self.tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=trusted)
                model: Any = AutoModelForSequenceClassification.from_pretrained(place, trust_remote_code=trusted)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"the classifier {place} cannot be loaded: {error}") from error
        self.model = model.to(device).eval()
        self.device = device
        self.max_length = self._limit(max_length)
        # Texts that are too long are cut and counted; transformers would warn at the first.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.label = self._index_of(label)
        if reads == "chat" and not self.tokenizer.chat_template:
            raise ModelError(f"the classifier {place} has no chat template; let it read answer or conversation")

    def rewards(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """See `AnswerReward`."""
        import torch

        told = self.cut > 0
        with torch.inference_mode():
            found = [self._score(self.model(**self._encoded(each))) for each in candidates]
        self.scored += len(candidates)
        if self.cut and not told and self.say is not None:
            self.say(
                f"{self.cut:,} of {self.scored:,} texts have more than {self.max_length:,} tokens, the most that the "
                f"classifier {self.place} is shown, and lose their end; of later ones nothing is said"
            )
        for score, candidate in zip(found, candidates, strict=True):
            if not math.isfinite(score):
                raise RewardError(f"the classifier {self.place} gives {score} to the answer {candidate.text[:60]!r}")
        return list(found)

    def _score(self, out: Any) -> float:
        if getattr(out, "score", None) is not None:
            return float(out.score.float().reshape(-1)[0])
        logits: Tensor = out.logits[0].float()
        if self.gives == "logit":
            return float(logits[self.label])
        return float(logits.sigmoid()[0] if len(logits) == 1 else logits.softmax(-1)[self.label])

    def _encoded(self, candidate: Candidate) -> Any:
        found = self._tokens(candidate, truncation=True, max_length=self.max_length)
        if found["input_ids"].shape[1] == self.max_length:
            self.cut += self._tokens(candidate)["input_ids"].shape[1] > self.max_length
        return found.to(self.device)

    def _tokens(self, candidate: Candidate, **limits: Any) -> Any:
        turns, options = (*candidate.prompt, *candidate.answer), {"return_tensors": "pt", **limits}
        if self.reads == "chat":
            return self.tokenizer.apply_chat_template(as_messages(turns), return_dict=True, **options)
        text = "\n\n".join(turn.content for turn in (turns if self.reads == "conversation" else candidate.answer))
        return self.tokenizer(text, **options)

    def _limit(self, wanted: int) -> int:
        """The longest text that tokenizer and model take, or what is wanted where that is less."""
        from torch.nn import Embedding

        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
        limits = [wanted, self.tokenizer.model_max_length]
        if positions > 0:
            # RoBERTa and its kin count positions from behind the padding index on: that many rows are never reached.
            skipped = [
                module.padding_idx + 1
                for name, module in self.model.named_modules()
                if name.endswith("position_embeddings")
                and isinstance(module, Embedding)
                and module.padding_idx is not None
            ]
            limits.append(positions - max(skipped, default=0))
        return int(min(limits))

    def _index_of(self, label: str | None) -> int:
        names = {int(i): str(name) for i, name in self.model.config.id2label.items()}
        if label is None and len(names) > 1:
            raise ModelError(f"the classifier {self.place} has the labels {', '.join(names.values())}; choose one")
        if label is None:
            return 0
        found = [i for i, name in names.items() if label in (name, str(i))]
        if not found:
            raise ModelError(f"the classifier {self.place} has no label {label!r}; it has {', '.join(names.values())}")
        return found[0]
