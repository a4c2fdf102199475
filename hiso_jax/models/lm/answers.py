"""The answers of a language model to prompts, among given words, as a text task scores them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm.checkpoint import Pretrained
from hiso_jax.models.lm.trainable import Tuned

# Prompts are computed at multiples of this length, so that few programs are compiled.
STEP, TOGETHER = 32, 8


def answers(
    pretrained: Pretrained,
    prompts: Sequence[str],
    words: Sequence[str],
    *,
    tuned: tuple[Tuned, PyTree] | None = None,
) -> list[str]:
    """The most probable of some words after each prompt.

    Args:
      pretrained: the model, exported and loaded again for example.
      prompts: texts up to the answer, the template filled in.
      words: the answer words with their blanks; of a word of several tokens, the last decides.
      tuned: a fine-tuned model with its trained parameters, ``(task.model, result.params)``, in place of the
        pretrained parameters.

    Raises:
      ParameterError: there are no words, or two words have the same last token.

    Example:
      ``models.lm.answers(models.lm.load("topics"), ["Rain is expected. This is about"], [" weather", " sport"])``
    """
    tokenizer = pretrained.tokenizer
    columns = [tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in words]
    if not columns or len(set(columns)) < len(columns):
        raise ParameterError("words", f"must end in different tokens, at least one; got {list(words)}")
    model = Tuned(pretrained.decoder, pretrained.params, None) if tuned is None else tuned[0]
    decoder, given = model.decoder, (pretrained.params if tuned is None else tuned[1], model.frozen)

    @jax.jit
    def scores(given: PyTree, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Array:
        # Merged here, because the merged layers are no argument of a program.
        params = model.whole(*given)
        return decoder.logits(params, decoder.hidden(params, tokens, mask, last=1)[:, 0], jnp.array(columns))

    found: list[str] = []
    for begin in range(0, len(prompts), TOGETHER):
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts[begin : begin + TOGETHER]]
        length = -(-max(map(len, rows)) // STEP) * STEP
        # Padded on the left, so that every answer is at the last position.
        tokens, mask = np.zeros((TOGETHER, length), np.int32), np.zeros((TOGETHER, length), bool)
        for place, row in enumerate(rows):
            tokens[place, length - len(row) :], mask[place, length - len(row) :] = row, True
        # Rows that fill up the last batch attend to one token.
        mask[len(rows) :, -1] = True
        best = np.asarray(scores(given, jnp.asarray(tokens), jnp.asarray(mask)))[: len(rows)].argmax(1)
        found += [words[index] for index in best]
    return found
