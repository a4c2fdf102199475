"""The answers of a language model to prompts, among given words, scored as a text task scores them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from hiso_jax.checks import ParameterError, of_kind
from hiso_jax.models.lm import Pretrained, Tuned
from hiso_jax.tasks.text.encode import last_tokens, left_padded, pad_token, tokenize, truncate

# Prompts are computed at multiples of this length, so that few programs are compiled, and so many together.
STEP, TOGETHER = 32, 8


def answers(
    pretrained: Pretrained,
    prompts: Sequence[str],
    words: Sequence[str],
    *,
    tuned: tuple[Tuned, PyTree] | None = None,
) -> list[str]:
    """The most probable of some words after each prompt.

    Prompts and words become tokens as in a text task, so the share of right answers is the task's accuracy.

    Args:
      pretrained: the model and its tokenizer; an exported model, loaded again, for example.
      prompts: texts up to the answer, with the template filled in.
      words: the answer words with their blanks; of a word of several tokens, the last decides.
      tuned: a fine-tuned model with its trained parameters, ``(task.model, result.params)``, in place of the
        pretrained parameters.

    Returns:
      One of ``words`` for each prompt.

    Raises:
      ValueError: there are no words, two words end in the same token, or a prompt has no token.

    Example:
      ``tasks.text.answers(models.lm.load("topics"), ["Rain is expected. This is about"], [" weather", " sport"])``
    """
    of_kind("pretrained", pretrained, Pretrained, "the result of models.lm.load")
    if isinstance(prompts, str):
        raise ParameterError("prompts", "must be a list of texts, got one text")
    if not words:
        raise ParameterError("words", "must be at least one, got none")
    if not prompts:
        return []
    model = Tuned(pretrained.decoder, pretrained.params, None) if tuned is None else tuned[0]
    decoder, given = model.decoder, (pretrained.params if tuned is None else tuned[1], model.frozen)
    tokenizer, most = pretrained.tokenizer, decoder.config.max_positions - decoder.adapters.prefix
    columns = jnp.array(last_tokens(tokenizer, words, prompts))
    rows = [truncate(ids, most, tokenizer.bos_token_id) for ids in tokenize(tokenizer, prompts)]
    if not all(rows):
        raise ParameterError("prompts", "must not be empty texts")

    @jax.jit
    def scores(given: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Array:
        # Merged here, because the merged layers are no argument of a program.
        params = model.whole(*given)
        # Padded on the left, so that every answer is at the last position.
        mask = jnp.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
        return decoder.logits(params, decoder.hidden(params, tokens, mask, last=1)[:, 0], columns)

    found: list[str] = []
    for begin in range(0, len(rows), TOGETHER):
        batch = rows[begin : begin + TOGETHER]
        # The last prompt fills up the last batch, whose shape is that of the others.
        batch += [batch[-1]] * (TOGETHER - len(batch))
        length = min(most, -(-max(map(len, batch)) // STEP) * STEP)
        tokens = left_padded(batch, length, pad_token(tokenizer))
        best = np.asarray(scores(given, jnp.asarray(tokens), jnp.array([len(ids) for ids in batch]))).argmax(1)
        found += [words[index] for index in best[: len(rows) - begin]]
    return found
