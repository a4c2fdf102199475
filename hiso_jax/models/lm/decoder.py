"""A decoder-only language model as pure functions of (parameters, tokens): hidden states, logits, cached decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from hiso_jax.factored import product, take
from hiso_jax.models.lm.config import LMConfig, Rope
from hiso_jax.models.lm.layout import layout_of, placed
from hiso_jax.models.lm.modules import NO_ADAPTERS, Adapters, Block, Cache, LayerKind, Reading, norm
from hiso_jax.models.lm.rope import rotations
from hiso_jax.stacked import Stacked, scan, scan_to_last

# transformers reserves the first rows of OPT's position table for padding.
OPT_POSITION_OFFSET = 2


@dataclass(frozen=True)
class Decoder:
    """A language model of a given architecture; it holds no parameters, and every method is pure.

    The parameters are a nested dict with the names of Hugging Face's Llama: ``embed_tokens``; ``layers``, a
    :class:`hiso_jax.stacked.Stacked` whose leaves have a leading axis of layers; ``norm`` and ``lm_head`` if the
    architecture has them; and OPT's ``embed_positions``, ``project_in`` and ``project_out``.

    Attributes:
      config: the architecture.
      dtype: the dtype of the computation; norms, rotations and softmax are always float32.
      adapters: the adapters of its layers.
    """

    config: LMConfig
    dtype: Any = jnp.float32
    adapters: Adapters = NO_ADAPTERS

    @cached_property
    def _block(self) -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: Block(self.config, self.adapters, self.dtype, rngs=nnx.Rngs(0))))

    @cached_property
    def _norm(self) -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: norm(self.config, self.dtype, rngs=nnx.Rngs(0))))

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random parameters, float32: normal with standard deviation 0.02, norms as identities, biases at zero."""
        config = self.config

        def pure(module: nnx.Module) -> PyTree:
            return nnx.to_pure_dict(nnx.state(module, nnx.Param))

        def block(layer_key: Key[Array, ""]) -> PyTree:
            return pure(Block(config, self.adapters, self.dtype, rngs=nnx.Rngs(layer_key)))

        def table(index: int, *shape: int) -> Array:
            return 0.02 * jax.random.normal(jax.random.fold_in(key, index), shape)

        layer_keys = jax.random.split(jax.random.fold_in(key, 0), config.layers)
        params = {
            "embed_tokens": {"embedding": table(1, config.vocab_size, config.embedding_size)},
            "layers": Stacked(jax.vmap(block)(layer_keys)),
        }
        if config.learned_positions:
            params["embed_positions"] = {"embedding": table(2, config.learned_positions, config.hidden_size)}
        if config.embedding_size != config.hidden_size:
            params["project_in"] = {"kernel": table(3, config.embedding_size, config.hidden_size)}
            params["project_out"] = {"kernel": table(4, config.hidden_size, config.embedding_size)}
        if config.final_norm:
            params["norm"] = pure(norm(config, self.dtype, rngs=nnx.Rngs(0)))
        if not config.tied:
            params["lm_head"] = {"kernel": table(5, config.embedding_size, config.vocab_size)}
        return params

    @staticmethod
    def perturbed_as(name: str) -> Literal["matrix", "table"] | None:
        """How a :class:`hiso_jax.factored.PerturbedParameter` is read: kernels and embeddings may be one."""
        parameter = name.rpartition(".")[2]
        return "table" if parameter == "embedding" else "matrix" if parameter == "kernel" else None

    @property
    def layout(self) -> Callable[[str, tuple[int, ...], int], int | None]:
        """How the parameters are split over devices."""
        return layout_of(self.config)

    def hidden(
        self,
        params: PyTree,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Array, "B N H"]:
        """The hidden states after the last norm, the input of :meth:`logits`.

        Args:
          params: the parameters.
          tokens: token ids, padded on either side.
          mask: which tokens are real; None means all. Padding does not change the real positions.
          last: N, the number of last positions to return; the last layer computes only these. None means all positions.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        x, reading = self._begin(params, tokens, mask)
        if last is None:
            return self._layers(params, x, reading, None, None)[0]

        def layer(read: int | None) -> Callable[..., tuple[Array, None]]:
            def run(x: Array, block: PyTree, kind: LayerKind) -> tuple[Array, None]:
                return self._at(block)(x, reading, kind, None, None, read)[0], None

            return run

        return self._normed(params, scan_to_last(params["layers"], layer(None), layer(last), x, self._kinds))

    @property
    def _kinds(self) -> LayerKind:
        """The windows and the rotations of all layers, [L]."""
        windows, rotated, local = self.config.windows, self.config.rotated, self.config.local
        return LayerKind(
            None if windows is None else np.array(windows, np.int32),
            None if rotated is None else np.array(rotated, bool),
            None if local is None else np.array(local, bool),
        )

    def _begin(
        self, params: PyTree, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T H"], Reading]:
        """The input of the first layer, and the inputs that all layers share."""
        positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0) + self.adapters.prefix
        distance = positions[:, :, None] - positions[:, None, :]
        # The mask is causal by index in the sequence, so that padding is ordered, too.
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        reading = self._reading(positions, causal & mask[:, None, :], distance)
        return self._embed(params, tokens, positions), reading

    def _at(self, block: PyTree) -> Any:
        """The module of a layer, with its parameters."""
        return nnx.merge(self._block, placed(self.config, block))

    def _normed(self, params: PyTree, x: Array) -> Array:
        return nnx.merge(self._norm, params["norm"])(x) if "norm" in params else x

    def _reading(
        self, positions: Int[Array, "B T"], mask: Bool[Array, "B T S"], distance: Int[Array, "B T S"]
    ) -> Reading:

        def turns(rope: Rope | None) -> Any:
            return None if rope is None else rotations(rope, self.config.head_dim, positions)

        return Reading(turns(self.config.rope), mask, distance, turns(self.config.local_rope))

    def _embed(self, params: PyTree, tokens: Array, positions: Array) -> Float[Array, "B T H"]:
        x = take(params["embed_tokens"]["embedding"], tokens).astype(self.dtype)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, self.dtype)
        if "project_in" in params:
            x = product(x, params["project_in"]["kernel"])
        if self.config.learned_positions:
            table = params["embed_positions"]["embedding"]
            x = x + take(table, positions + OPT_POSITION_OFFSET).astype(self.dtype)
        return x

    def _layers(
        self, params: PyTree, x: Array, reading: Reading, cache: Cache | None, at: Any
    ) -> tuple[Float[Array, "B T H"], Cache]:
        per_layer = (self._kinds, cache)

        def layer(x: Array, block: PyTree, inputs: tuple[LayerKind, Cache | None]) -> tuple[Array, Cache]:
            return self._at(block)(x, reading, *inputs, at)

        x, caches = scan(params["layers"], layer, x, per_layer)
        return self._normed(params, x), caches

    def logits(
        self, params: PyTree, hidden: Float[Array, "... H"], columns: Int[Array, "W"] | None = None
    ) -> Float[Array, "... W"]:
        """The logits of the next token, float32.

        Args:
          params: the parameters.
          hidden: the hidden states of only those positions that need logits.
          columns: the tokens that need logits; None means the entire vocabulary.
        """
        if "project_out" in params:
            hidden = product(hidden, params["project_out"]["kernel"])
        tied = "lm_head" not in params
        weights = params["embed_tokens"]["embedding"] if tied else params["lm_head"]["kernel"]
        if columns is not None:
            weights = take(weights, columns, axis=0 if tied else 1)
        # The sum is float32: bfloat16 logits would lose the differences of losses that make the scalars.
        logits = product(hidden, weights, transposed=tied, to=jnp.float32)
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def prefill(
        self, params: PyTree, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], room: int
    ) -> tuple[Float[Array, "B H"], Cache]:
        """The hidden state of the last position of left-padded prompts, and a cache with room for ``room`` tokens."""
        hidden, cache = self._layers(params, *self._begin(params, tokens, mask), None, None)
        grown = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), cache)
        return hidden[:, -1], grown

    def decode(
        self, params: PyTree, token: Int[Array, "B"], mask: Bool[Array, "B S"], cache: Cache, at: Int[Array, ""]
    ) -> tuple[Float[Array, "B H"], Cache]:
        """The hidden state of one more token, and the cache with its keys and values at index ``at``.

        Args:
          params: the parameters.
          token: the token of each sequence.
          mask: which entries of the cache hold a real token, including this token.
          cache: the cache from :meth:`prefill` or the last call.
          at: the index, the same in every sequence.
        """
        places = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0) + self.adapters.prefix
        position = places[:, at][:, None]
        reading = self._reading(position, mask[:, None, :], position[:, :, None] - places[:, None, :])
        hidden, cache = self._layers(params, self._embed(params, token[:, None], position), reading, cache, at)
        return hidden[:, 0], cache


class Generates(Protocol):
    """What generation needs of a model: see :class:`Decoder`."""

    def prefill(self, params: PyTree, tokens: Any, mask: Any, room: int) -> tuple[Array, Any]:
        """The last state of prompts, and a cache."""
        ...

    def decode(self, params: PyTree, token: Any, mask: Any, cache: Any, at: Any) -> tuple[Array, Any]:
        """The state after one more token, and the cache with it."""
        ...

    def logits(self, params: PyTree, hidden: Any) -> Array:
        """The logits of states."""
        ...


def greedy(
    decoder: Generates,
    params: PyTree,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
) -> Int[Array, "B N"]:
    """The greedy continuation of prompts, token by token, with a cache of keys and values.

    Args:
      decoder: the model.
      params: its parameters.
      tokens: left-padded prompts.
      mask: which tokens are real.
      max_new_tokens: N, the most tokens to generate.
      stop_tokens: the tokens that end a sequence; they are not returned.
      pad_token: the token that fills the output after the end.
    """
    limits = max_new_tokens, stop_tokens, pad_token
    return _continued(decoder, params, tokens, mask, *limits, lambda logits, count: logits.argmax(-1))


def sampled(
    decoder: Generates,
    params: PyTree,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: float,
    keys: Key[Array, "B"],
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
) -> Int[Array, "B N"]:
    """A sampled continuation of each prompt, token by token, with a cache of keys and values.

    Token n of row b is drawn with the key ``fold_in(keys[b], n)`` by adding Gumbel noise to the logits (Maddison et
    al., arXiv 1411.0030). The same keys give close parameters mostly the same tokens, so that two losses along a
    direction differ by the direction more than by the draw.

    Args:
      decoder: the model.
      params: its parameters.
      tokens: left-padded prompts.
      mask: which tokens are real.
      temperature: the divisor of the logits, positive.
      keys: a key for each row.
      max_new_tokens: N, the most tokens to generate.
      stop_tokens: the tokens that end a sequence; they are not returned.
      pad_token: the token that fills the output after the end.
    """

    def choose(logits: Float[Array, "B V"], count: Int[Array, ""]) -> Int[Array, "B"]:
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, count), logits.shape[1:]))(keys)
        return (logits / temperature + noise).argmax(-1)

    return _continued(decoder, params, tokens, mask, max_new_tokens, stop_tokens, pad_token, choose)


def _continued(
    decoder: Generates,
    params: PyTree,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    choose: Callable[[Float[Array, "B V"], Int[Array, ""]], Int[Array, "B"]],
) -> Int[Array, "B N"]:
    """A continuation of prompts; ``choose`` takes a token from the logits of each row, and the number of the token."""
    length = tokens.shape[1]
    state, cache = decoder.prefill(params, tokens, mask, max_new_tokens)
    full = jnp.pad(mask, ((0, 0), (0, max_new_tokens)))
    start = jnp.full((tokens.shape[0], max_new_tokens), pad_token, jnp.int32)
    ended = jnp.zeros(tokens.shape[0], bool)

    def going(carry: tuple) -> Array:
        count, _, _, _, _, ended = carry
        return (count < max_new_tokens) & ~ended.all()

    def turn(carry: tuple) -> tuple:
        count, state, cache, full, output, ended = carry
        token = choose(decoder.logits(params, state), count).astype(jnp.int32)
        ended = ended | jnp.isin(token, jnp.array(stop_tokens, jnp.int32))
        output = output.at[:, count].set(jnp.where(ended, pad_token, token))
        full = full.at[:, length + count].set(True)
        state, cache = decoder.decode(params, token, full, cache, length + count)
        return count + 1, state, cache, full, output, ended

    return jax.lax.while_loop(going, turn, (jnp.int32(0), state, cache, full, start, ended))[4]
