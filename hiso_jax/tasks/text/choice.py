"""Classification by the answer word that a language model puts after a prompt, as in MeZO, DeComFL and HiSo."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from hiso_jax.models.lm import Tuned
from hiso_jax.tasks.splits import held_out
from hiso_jax.tasks.text.encode import (
    at_bucket,
    buckets_for,
    check_length,
    check_tokens,
    last_tokens,
    left_padded,
    pad_token,
    sorted_by_length,
    tokenize,
    truncate,
)
from hiso_jax.tasks.text.pretrained import PretrainedTask
from hiso_jax.tasks.text.prompts import Prompt, Row
from hiso_jax.tasks.text.scores import macro_f1


@dataclass(frozen=True, kw_only=True)
class TextChoice(PretrainedTask):
    """Text classification by a language model; it satisfies ``hiso_jax.fed.Task``.

    Only the hidden state of the last position and the logits of the answer words are computed.

    Attributes:
      words: the token of each class.
      buckets: the lengths at which batches are computed.
      train: {"tokens": int32 [n, T] left-padded, "length": int32 [n], "label": int32 [n]}.
      test: the same for the test split, sorted by length.
      name: the name in reports.
      target: the accuracy at which methods are compared, or None.
      metric: the main metric.
      mean_metrics: the metrics that are means over examples.
      label_words: a sentence that says which word stands for which label.
    """

    words: tuple[int, ...]
    buckets: tuple[int, ...]
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    name: str
    target: float | None = None
    metric: str = "accuracy"
    mean_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    label_words: str = ""

    def logits(
        self, params: PyTree, batch: Mapping[str, Array], frozen: PyTree | None = None
    ) -> Float[Array, "B classes"]:
        """The logit of each class, float32."""
        whole, decoder = self.model.whole(params, frozen), self.model.decoder

        def last(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B H"]:
            return decoder.hidden(whole, tokens, mask, last=1)[:, 0]

        hidden = at_bucket(last, self.buckets, batch["tokens"], batch["length"])
        return decoder.logits(whole, hidden, jnp.array(self.words, jnp.int32))

    def loss(self, params: PyTree, batch: Mapping[str, Array], frozen: PyTree | None = None) -> Float[Array, "B"]:
        """The cross-entropy of each example over the answer words, float32."""
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, batch, frozen), batch["label"])

    def metrics(
        self, params: PyTree, batch: Mapping[str, Array], frozen: PyTree | None = None
    ) -> dict[str, Shaped[Array, "B"]]:
        """``loss``, ``accuracy``, ``prediction`` and ``label`` of each example."""
        logits = self.logits(params, batch, frozen)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        predicted, label = logits.argmax(-1), batch["label"]
        return {"loss": loss, "accuracy": predicted == label, "prediction": predicted, "label": label}

    def summarise(self, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean ``loss``, ``accuracy`` and ``macro_f1``."""
        predicted, labels = outputs["prediction"], outputs["label"]
        return {
            "loss": float(outputs["loss"].mean(dtype=np.float64)),
            "accuracy": float(np.mean(predicted == labels)),
            "macro_f1": macro_f1(predicted, labels, len(self.words)),
        }

    def hold_out(self, examples: int, *, seed: int = 0) -> "TextChoice":
        """The same task with ``examples`` random training examples as its test split, for tuning.

        Raises:
          ValueError: a split would have no examples.
        """
        kept, held = held_out(self.train, examples, seed)
        return replace(self, train=kept, test=sorted_by_length(held))


def text_choice(
    model: Tuned,
    tokenizer: Any,
    prompt: Prompt,
    rows: Mapping[str, Sequence[Row]],
    *,
    max_length: int,
    name: str,
    target: float | None = None,
    label_words: str = "",
) -> TextChoice:
    """A classification task over rows of text.

    Args:
      model: the language model, with its trained part chosen.
      tokenizer: its tokenizer.
      prompt: how a row becomes a prompt, and the answer words.
      rows: the rows of the splits ``train`` and ``test``, with the prompt's columns and an integer ``label``.
      max_length: the most tokens of a prompt; a longer prompt keeps its beginning-of-text token and its end.
      name: the name in reports.
      target: the accuracy at which methods are compared, or None.
      label_words: a sentence that says which word stands for which label.

    Raises:
      ValueError: ``max_length`` is below 1 or beyond the model's positions, the tokenizer cannot tell the words apart,
        or a prompt is empty.
    """
    check_length(max_length, model)
    asked = {split: [prompt.render(row) for row in rows[split]] for split in ("train", "test")}
    words, bos = last_tokens(tokenizer, prompt.words, asked["train"]), tokenizer.bos_token_id
    texts: dict[str, list[list[int]]] = {}
    for split in ("train", "test"):
        encoded = tokenize(tokenizer, asked[split])
        for number, ids in enumerate(encoded, 1):
            if not ids:
                raise ValueError(f"row {number} of {split} has no tokens: its prompt is empty")
        texts[split] = [truncate(ids, max_length, bos) for ids in encoded]
    buckets = buckets_for([len(ids) for split in texts.values() for ids in split], max_length)
    arrays = {
        split: {
            "tokens": left_padded(encoded, buckets[-1], pad_token(tokenizer)),
            "length": np.array([len(ids) for ids in encoded], np.int32),
            "label": np.array([row["label"] for row in rows[split]], np.int32),
        }
        for split, encoded in texts.items()
    }
    for own in (*arrays.values(), {"tokens": np.array(words)}):
        check_tokens(own["tokens"], model)
    return TextChoice(
        model=model,
        words=words,
        buckets=buckets,
        train=arrays["train"],
        test=sorted_by_length(arrays["test"]),
        name=name,
        target=target,
        label_words=label_words,
    )
