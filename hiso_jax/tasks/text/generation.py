"""Generation of answers and summaries by a language model: the loss of right answers, and scores of its own answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError, finite, integer
from hiso_jax.models.lm import Tuned, greedy, sampled
from hiso_jax.tasks.text import chat, token_scores
from hiso_jax.tasks.text.encode import (
    at_bucket,
    buckets_for,
    check_length,
    check_tokens,
    left_padded,
    pad_token,
    sorted_by_length,
    tokenize,
    truncate,
)
from hiso_jax.tasks.text.pretrained import PretrainedTask
from hiso_jax.tasks.text.prompts import Prompt, Row
from hiso_jax.tasks.text.scores import exact_match, rouge, token_f1

Scoring = Literal["span", "summary", "chat"]


@dataclass(frozen=True, kw_only=True)
class TextGeneration(PretrainedTask):
    """Question answering or summarisation by a language model; it satisfies ``hiso_jax.fed.Task``.

    The loss projects only the positions before the answer's tokens to the vocabulary.

    Attributes:
      tokenizer: a tokenizer of transformers, to decode the generated tokens.
      buckets: the lengths at which batches are computed.
      answer_length: A, the most tokens of an answer.
      max_new_tokens: the most tokens to generate.
      stop_tokens: the tokens that end an answer.
      scoring: ``span`` for exact match and F1, ``summary`` for ROUGE, ``chat`` for the loss, with exact match and F1 of
        whole answers beside it.
      train: {"tokens": int32 [n, T], prompts and answers, left-padded; "length": int32 [n], of prompt and answer;
        "answer": int32 [n], the length of the answer, at most A}.
      test: the same, with "prompt" [n, T] and "prompt_length" [n], the prompts alone, and "row" [n], the index in
        ``golden``.
      golden: the right answers of each test row.
      name: the name in reports.
      target: the score at which methods are compared, or None.
      temperature: the temperature at which an objective of generated answers samples them in training; 0 is greedy.
        Evaluations are greedy.
      shown: how many test prompts each evaluation shows with the model's answers.
      cut: the numbers of training prompts that lost their beginning, and of answers that lost their end, to fit.
    """

    tokenizer: Any
    buckets: tuple[int, ...]
    answer_length: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    scoring: Scoring
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    golden: tuple[tuple[str, ...], ...] = field(repr=False)
    name: str = "generation"
    target: float | None = None
    temperature: float = 0.0
    shown: int = 0
    cut: tuple[int, int] = (0, 0)

    @property
    def metric(self) -> str:
        """The score by which runs are compared."""
        return {"summary": "rougeL", "span": "f1", "chat": "loss"}[self.scoring]

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        """The metrics that are means over examples; those of :meth:`metrics` compare tokens, not texts."""
        return ("loss",) if self.scoring == "summary" else ("exact_match", "f1", "loss")

    def loss(self, params: PyTree, batch: Mapping[str, Array], frozen: PyTree | None = None) -> Float[Array, "B"]:
        """The mean cross-entropy of each answer's tokens, float32."""
        whole, decoder, count = self.model.whole(params, frozen), self.model.decoder, self.answer_length

        def before(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B A H"]:
            return decoder.hidden(whole, tokens, mask, last=count + 1)[:, :-1]

        hidden = at_bucket(before, self.buckets, batch["tokens"], batch["length"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            decoder.logits(whole, hidden), batch["tokens"][:, -count:]
        )
        real = jnp.arange(count) >= count - batch["answer"][:, None]
        return jnp.where(real, losses, 0).sum(1) / batch["answer"]

    def metrics(
        self,
        params: PyTree,
        batch: Mapping[str, Array],
        frozen: PyTree | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Shaped[Array, "B ..."]]:
        """``loss`` of each golden answer, ``generated`` tokens [B, max_new_tokens], and ``row`` of a test example.

        With a ``key`` and a temperature the tokens are sampled, else they are greedy. ``f1`` and ``exact_match``
        compare the generated tokens with those of the training target, so that a program can maximise them; reports
        compare texts with all golden answers.
        """
        whole = self.model.whole(params, frozen)
        limits: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "stop_tokens": self.stop_tokens,
            "pad_token": pad_token(self.tokenizer),
        }

        def generate(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Int[Array, "B N"]:
            if key is None or not self.temperature:
                return greedy(self.model.decoder, whole, tokens, mask, **limits)
            keys = _keys_of(key, tokens, mask)
            return sampled(self.model.decoder, whole, tokens, mask, temperature=self.temperature, keys=keys, **limits)

        generated = at_bucket(generate, self.buckets, *prompts_of(batch))
        golden = batch["tokens"][:, -self.answer_length :]
        real = jnp.arange(self.answer_length) >= self.answer_length - batch["answer"][:, None]
        stops = jnp.array(self.stop_tokens, jnp.int32)
        # A row is filled up after its stop token.
        kept = ~jnp.cumsum(jnp.isin(generated, stops), 1).astype(bool)
        wanted = real & ~jnp.isin(golden, stops)
        compared = generated, kept, golden, wanted
        scores = {"f1": token_scores.token_f1(*compared), "exact_match": token_scores.exact_match(*compared)}
        rows = {"row": batch["row"]} if "row" in batch else {}
        return {"loss": self.loss(params, batch, frozen), "generated": generated, **scores, **rows}

    def answers(self, generated: Int[np.ndarray, "n N"]) -> list[str]:
        """The generated answers as text; but for conversations they end with their first line.

        They are cut there because a token may hold more than a line break.
        """
        # A row is filled up after its stop token, with any token if the tokenizer has no pad token.
        ends = np.isin(generated, self.stop_tokens)
        lengths = np.where(ends.any(1), ends.argmax(1), generated.shape[1])
        rows = [row[:length] for row, length in zip(generated.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        if self.scoring == "chat":
            return [text.strip() for text in texts]
        return [(text.strip().splitlines() or [""])[0].strip() for text in texts]

    def samples(self, outputs: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        """The first ``shown`` test rows: ``prompt``, the model's ``answer``, and the ``golden`` one."""
        places = np.argsort(outputs["row"])[: self.shown]
        answers = self.answers(outputs["generated"][places])
        rows, where = outputs["row"][places], np.argsort(self.test["row"])
        prompts = []
        for row in rows:
            tokens, length = self.test["prompt"][where[row]], self.test["prompt_length"][where[row]]
            prompts.append(self.tokenizer.decode(tokens[len(tokens) - length :], skip_special_tokens=True))
        return [
            {"prompt": prompt, "answer": answer, "golden": self.golden[row][0]}
            for prompt, answer, row in zip(prompts, answers, rows, strict=True)
        ]

    def summarise(self, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean ``loss``, and the scores: ``exact_match`` and ``f1``, or ``rouge1``, ``rouge2`` and ``rougeL``."""
        answers = self.answers(outputs["generated"])
        golden = [self.golden[row] for row in outputs["row"]]
        loss = {"loss": float(outputs["loss"].mean(dtype=np.float64))}
        if self.scoring == "summary":
            scores = rouge(answers, golden)
            return {**loss, **scores}
        pairs = list(zip(answers, golden, strict=True))
        f1 = float(np.mean([token_f1(*pair) for pair in pairs]))
        return {**loss, "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])), "f1": f1}

    def hold_out(self, examples: int, *, seed: int = 0) -> "TextGeneration":
        """Refused, because the training rows keep one answer each, and the scores need all answers.

        Raises:
          ValueError: always.
        """
        raise ParameterError(
            "task", f"must be one of classification to be tuned by validation accuracy; {self.name} is not"
        )


def _arrays(own: dict[str, list], width: int, fill: int) -> dict[str, np.ndarray]:
    """The arrays that a split's loss reads: prompts with their answers, left-padded with ``fill`` to ``width``."""
    return {
        "tokens": left_padded(own["tokens"], width, fill),
        "length": np.array([len(ids) for ids in own["tokens"]], np.int32),
        "answer": np.array(own["answer"], np.int32),
    }


def text_generation(
    model: Tuned,
    tokenizer: Any,
    prompt: Prompt,
    rows: Mapping[str, Sequence[Row]],
    *,
    max_length: int,
    max_new_tokens: int,
    scoring: Scoring,
    name: str,
    temperature: float = 0.0,
    samples: int = 0,
) -> TextGeneration:
    """A generation task over rows of text.

    Args:
      model: the language model, with its trained part chosen.
      tokenizer: its tokenizer.
      prompt: how a row becomes a prompt, and which answers are right.
      rows: the rows of the splits ``train`` and ``test``.
      max_length: the most tokens of prompt and answer; a longer prompt keeps its beginning-of-text token and its end,
        a longer answer its beginning.
      max_new_tokens: the most tokens to generate.
      scoring: ``span``, ``summary`` or ``chat``; conversations have prompts of the tokenizer's chat template.
      name: the name in reports.
      temperature: the temperature of objectives of generated answers in training; 0 is greedy.
      samples: how many test prompts each evaluation shows with the model's answers.

    Raises:
      ValueError: ``max_length`` or ``max_new_tokens`` is out of range, or a row has no answer.
    """
    check_length(max_length, model)
    finite("temperature", temperature)
    integer("samples", samples, 0)
    if not 1 <= max_new_tokens < max_length:
        raise ParameterError(
            "max_new_tokens", f"must be at least 1 and below `max_length`, {max_length}, got {max_new_tokens}"
        )
    assert prompt.answers is not None
    if scoring == "summary":
        # A missing package is reported before anything is run.
        rouge([], [])
    bos = tokenizer.bos_token_id
    read = partial(chat.encode, tokenizer) if scoring == "chat" else partial(_encode, prompt, tokenizer)
    encoded = {split: read(rows[split], split) for split in ("train", "test")}
    answer_length = min(max_new_tokens, max(len(answer) for pairs in encoded.values() for _, answer in pairs))
    splits: dict[str, dict[str, list]] = {}
    for split, pairs in encoded.items():
        own = splits[split] = {"tokens": [], "answer": [], "prompt": []}
        for ids, answer in pairs:
            kept = answer[:answer_length]
            own["tokens"].append(truncate(ids, max_length - len(kept), bos) + kept)
            own["answer"].append(len(kept))
            own["prompt"].append(truncate(ids, max_length - max_new_tokens, bos))
    lengths = [len(ids) for own in splits.values() for part in ("tokens", "prompt") for ids in own[part]]
    buckets = _wide_enough(lengths, max_length, answer_length)
    fill = pad_token(tokenizer)
    test = _arrays(splits["test"], buckets[-1], fill) | {
        "prompt": left_padded(splits["test"]["prompt"], buckets[-1], fill),
        "prompt_length": np.array([len(ids) for ids in splits["test"]["prompt"]], np.int32),
        "row": np.arange(len(rows["test"]), dtype=np.int32),
    }
    train = _arrays(splits["train"], buckets[-1], fill)
    check_tokens(train["tokens"], model)
    check_tokens(test["tokens"], model)
    if scoring == "chat":
        ends = sorted(chat.ends(tokenizer, encoded["train"]) - {None})
    else:
        ends = [tokenizer.eos_token_id, *tokenize(tokenizer, ["\n"], special=False)[0][-1:]]
    pairs = encoded["train"]
    long_prompts = sum(len(ids) > max_length - min(len(answer), answer_length) for ids, answer in pairs)
    cut = long_prompts, sum(len(answer) > answer_length for _, answer in pairs)
    return TextGeneration(
        model=model,
        tokenizer=tokenizer,
        buckets=buckets,
        answer_length=answer_length,
        max_new_tokens=max_new_tokens,
        stop_tokens=tuple(token for token in ends if token is not None),
        scoring=scoring,
        train=train,
        test=sorted_by_length(test),
        golden=tuple(tuple(prompt.answers(row)) for row in rows["test"]),
        name=name,
        temperature=float(temperature),
        shown=samples,
        cut=cut,
    )


def _wide_enough(lengths: Sequence[int], max_length: int, answer_length: int) -> tuple[int, ...]:
    """The buckets with room for the longest answer and the position before it."""
    wide = [max(length, answer_length + 1) for length in lengths]
    return tuple(bucket for bucket in buckets_for(wide, max_length) if bucket > answer_length)


def _encode(prompt: Prompt, tokenizer: Any, rows: Sequence[Row], split: str) -> list[tuple[list[int], list[int]]]:
    """The tokens of each row's prompt and of its first answer, which is the training target."""
    assert prompt.answers is not None
    answers = [prompt.answers(row) for row in rows]
    for number, given in enumerate(answers, 1):
        if not given or not given[0].strip():
            raise ValueError(f"row {number} of {split} has no answer")
    prompts = tokenize(tokenizer, [prompt.render(row) for row in rows])
    texts = [prompt.answer_template.format(answer=given[0]) for given in answers]
    return list(zip(prompts, tokenize(tokenizer, texts, special=False), strict=True))


# An odd number of 32 bits whose multiples spread well (2³² divided by the golden ratio; Knuth, TAOCP 3, 6.4).
SPREAD = np.uint32(0x9E3779B1)


def _keys_of(key: Key[Array, ""], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Key[Array, "B"]:
    """A key for each prompt, from the prompt's tokens.

    It depends on neither the padding nor the other rows, so that a client's bits are those of the simulation however
    the cohort is cut into pieces.
    """
    places = np.arange(tokens.shape[1])[::-1]
    powers = np.array([pow(int(SPREAD), int(place) + 1, 2**32) for place in places], np.uint32)
    hashes = jnp.where(mask, (tokens.astype(jnp.uint32) + 1) * powers, 0).sum(1, dtype=jnp.uint32)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(hashes)


def prompts_of(batch: Mapping[str, Array]) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """The left-padded prompts of a batch and their lengths; training examples hold them in front of the answers."""
    if "prompt" in batch:
        return batch["prompt"], batch["prompt_length"]
    tokens, answer = batch["tokens"], batch["answer"]
    places = jnp.arange(tokens.shape[1]) - answer[:, None]
    # What wraps around lies in the padding.
    return jnp.take_along_axis(tokens, places % tokens.shape[1], 1), batch["length"] - answer
