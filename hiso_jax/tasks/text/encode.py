"""Texts as token arrays: left-padded, truncated after the first token, and computed at one of a few lengths."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm import Tuned

# Each length is a separate program, so there are few.
BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
MOST_BUCKETS = 5
# The fewest texts computed at one length. On CPU eight short texts fill the cores, and padding is the main cost.
CPU_GROUP, ACCELERATOR_GROUP = 8, 64


def tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """The token ids of each text.

    Args:
      tokenizer: a tokenizer of transformers.
      texts: the texts to tokenise.
      special: whether to add the tokens that the tokenizer puts before a text. Tokens that it puts after a text, like
        an end of text, are left out, because an answer follows.

    Raises:
      ValueError: a text is not valid Unicode, or the tokenizer fails.
    """
    behind = _behind(tokenizer) if special and texts else 0
    return [ids[: len(ids) - behind] for ids in _tokenize(tokenizer, texts, special=special)]


# A text that shows the tokens that a tokenizer adds; any text will do.
SAMPLE = "a"


def _behind(tokenizer: Any) -> int:
    """The number of tokens that a tokenizer puts after a text."""
    (plain,), (whole,) = (_tokenize(tokenizer, [SAMPLE], special=special) for special in (False, True))
    places = [place for place in range(len(whole) - len(plain) + 1) if whole[place : place + len(plain)] == plain]
    return len(whole) - places[0] - len(plain) if plain and places else 0


def _tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text must be of whole characters; {text[:40]!r} has half of one") from error
    try:
        return tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []
    except BaseException as error:
        # A tokenizer comes with a model that is not trusted, and may raise any error; Rust's panics are not Exceptions.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ParameterError(
            "model", f"must come with a tokenizer that works; {type(error).__name__}: {reason}"
        ) from error


def truncate(ids: Sequence[int], limit: int, bos: int | None) -> list[int]:
    """At most ``limit`` tokens: the beginning-of-text token, if the text has it, and the end of the text."""
    if len(ids) <= limit:
        return list(ids)
    if bos is not None and ids[0] == bos and limit > 1:
        return [bos, *ids[len(ids) - limit + 1 :]]
    return list(ids[len(ids) - limit :])


# The number of prompts after which the answer words are tokenised.
LOOKED_AT = 8


def last_tokens(tokenizer: Any, words: Sequence[str], prompts: Sequence[str]) -> tuple[int, ...]:
    """The last token of each answer word after its prompt; the token's logit is the score of the class.

    A word is tokenised together with its prompt, as in MeZO's code, because a word alone begins with a blank in
    SentencePiece, "▁Yes", which cannot follow a line break. If the prompt's end and the word's beginning become one
    token ("was " and "good"), the tokens of the word alone are used.

    Args:
      tokenizer: a tokenizer of transformers.
      words: the answer words.
      prompts: some of the prompts that the words follow.

    Raises:
      ValueError: a word has no token, two words have the same last token, or the tokens differ between prompts.
    """
    found: dict[tuple[int, ...], str] = {}
    for prompt in list(dict.fromkeys(prompts))[:LOOKED_AT]:
        found.setdefault(_last_behind(tokenizer, words, prompt), prompt)
    if len(found) > 1:
        first, other = list(found.values())[:2]
        raise ParameterError(
            "template",
            "must end so that the words of the verbalizer have the same tokens behind every prompt; "
            f"{','.join(words)} have not behind {first[-20:]!r} and {other[-20:]!r}: let it end in text of its own",
        )
    last = next(iter(found))
    if len(set(last)) != len(last):
        raise ParameterError("verbalizer", f"must be words that end in different tokens; got {','.join(words)}")
    return last


def _last_behind(tokenizer: Any, words: Sequence[str], prompt: str) -> tuple[int, ...]:
    alone = _tokenize(tokenizer, words, special=False)
    for word, tokens in zip(words, alone, strict=True):
        if not tokens:
            raise ParameterError("verbalizer", f"must be words that the tokenizer knows; {word!r} has no token")
    asked, *answered = tokenize(tokenizer, [prompt, *(prompt + word for word in words)])
    last = []
    for tokens, whole in zip(alone, answered, strict=True):
        follows = len(whole) > len(asked) and whole[: len(asked)] == asked
        last.append(whole[-1] if follows else tokens[-1])
    return tuple(last)


def pad_token(tokenizer: Any) -> int:
    """The token that fills the arrays outside the text; it is masked, so any token of the vocabulary will do."""
    given = tokenizer.pad_token_id
    return given if given is not None else (tokenizer.eos_token_id or 0)


def left_padded(sequences: Sequence[Sequence[int]], length: int, fill: int) -> Int[np.ndarray, "n T"]:
    """The sequences, right-aligned in rows of ``length`` that begin with ``fill``."""
    rows = np.full((len(sequences), length), fill, np.int32)
    for row, ids in zip(rows, sequences, strict=True):
        if len(ids):
            row[length - len(ids) :] = ids
    return rows


def buckets_for(lengths: Sequence[int], limit: int) -> tuple[int, ...]:
    """The lengths at which batches of texts of these ``lengths`` are computed, in rising order.

    They come from a fixed set, so that other data of about the same lengths uses the same programs. The last length
    fits the longest text, and is not above ``limit``, which no text exceeds.
    """
    top = min([bucket for bucket in BUCKETS if bucket >= max(lengths)] + [limit])
    # The buckets that fit the quantiles: a bucket between two of them would serve few texts.
    shares = np.quantile(np.asarray(lengths), np.linspace(0, 1, MOST_BUCKETS + 1)[1:-1])
    below = {next((bucket for bucket in BUCKETS if bucket >= share), top) for share in shares}
    return (*sorted(bucket for bucket in below if bucket < top), top)


@custom_vmap
def longest(lengths: Int[Array, "B"]) -> Int[Array, ""]:
    """The length of the longest text of a batch.

    Under ``vmap`` it is that of all batches, so that a branch that depends on it remains a single branch.
    """
    return lengths.max()


@longest.def_vmap
def _longest_of_all(axis_size: int, in_batched: list[bool], lengths: Array) -> tuple[Array, bool]:
    return longest(lengths.reshape(-1)), False


def group_size(examples: int, smallest: int) -> int:
    """The number of examples to compute at one length: a divisor of ``examples``, if possible at least ``smallest``."""
    groups = max(examples // smallest, 1)
    while examples % groups:
        groups -= 1
    return examples // groups


def at_bucket(
    function: Callable[[Int[Array, "b T"], Bool[Array, "b T"]], PyTree],
    buckets: tuple[int, ...],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> PyTree:
    """Apply ``function(tokens, mask)`` to left-padded texts, cut to the first bucket that fits the longest text.

    A batch is split into groups of texts of about the same length, each with its own bucket.

    Args:
      function: a function of tokens [b, bucket] and the mask of real tokens; its outputs [b, ...] have the same shapes
        for every bucket.
      buckets: lengths in rising order; the last is at least the width of ``tokens``.
      tokens: left-padded texts.
      lengths: the number of real tokens in each row.

    Returns:
      The outputs [B, ...], in the order of the rows.
    """

    def branch(bucket: int) -> Callable[[Array, Array], PyTree]:
        def run(tokens: Array, lengths: Array) -> PyTree:
            cut = tokens[:, max(tokens.shape[1] - bucket, 0) :]
            # A gradient through a conditional keeps the activations of every branch; this keeps the inputs of one, in
            # the same time on CPU, although it runs forward twice.
            return jax.checkpoint(function)(cut, jnp.arange(cut.shape[1]) >= cut.shape[1] - lengths[:, None])

        return run

    if len(buckets) == 1:
        return branch(buckets[0])(tokens, lengths)

    def group(rows: tuple[Array, Array]) -> PyTree:
        index = jnp.searchsorted(jnp.array(buckets[:-1], jnp.int32), longest(rows[1]))
        return lax.switch(index, [branch(bucket) for bucket in buckets], *rows)

    def in_groups(size: int) -> Callable[[Array, Array], PyTree]:
        def run(tokens: Array, lengths: Array) -> PyTree:
            if size == len(lengths):
                return group((tokens, lengths))
            order = jnp.argsort(lengths)
            rows = jax.tree.map(lambda a: a[order].reshape(-1, size, *a.shape[1:]), (tokens, lengths))
            outputs = lax.map(group, rows)
            place = jnp.argsort(order)
            return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[place], outputs)

        return run

    few, many = (group_size(len(lengths), smallest) for smallest in (CPU_GROUP, ACCELERATOR_GROUP))
    if few == many:
        return in_groups(few)(tokens, lengths)
    return lax.platform_dependent(tokens, lengths, cpu=in_groups(few), default=in_groups(many))


def sorted_by_length(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same examples, sorted from the shortest to the longest, so that chunks need little padding."""
    order = np.argsort(arrays["length"], kind="stable")
    return jax.tree.map(lambda a: a[order], arrays)


def check_length(max_length: int, model: Tuned) -> None:
    """Refuse a prompt length that the model cannot take.

    Raises:
      ValueError: ``max_length`` is below 1 or beyond the model's positions.
    """
    most = model.decoder.config.max_positions - model.decoder.adapters.prefix
    if not 1 <= max_length <= most:
        raise ParameterError("max_length", f"must be between 1 and the model's {most} positions, got {max_length}")


def check_tokens(tokens: Int[np.ndarray, "n T"], model: Tuned) -> None:
    """Refuse tokens without an embedding, because a gather beyond the last row silently takes the last row.

    Raises:
      ValueError: the model has no embedding for a token.
    """
    known = model.decoder.config.vocab_size
    if tokens.size and tokens.max() >= known:
        raise ParameterError(
            "model",
            f"must come with a tokenizer of its own {known:,} tokens; the one it has gives token {tokens.max():,}",
        )
