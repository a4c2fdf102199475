"""The trained part of a language model: all parameters, adapters, the head, or the parameters that match a pattern."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError, positive
from hiso_jax.models.lm.checkpoint import Pretrained, needing
from hiso_jax.models.lm.config import LMConfig
from hiso_jax.models.lm.decoder import Decoder
from hiso_jax.models.lm.modules import NO_ADAPTERS, Adapters
from hiso_jax.models.lm.names import leaves
from hiso_jax.models.lm.torch_decoder import TorchDecoder, chosen_of, with_adapters
from hiso_jax.stacked import Stacked, merge, path_name

LORA_TARGETS = ("q_proj", "v_proj")
# The longest search of a pattern in the name of one parameter.
SEARCH_SECONDS = 0.5
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Tuned:
    """A language model, split into trained and frozen parameters.

    Attributes:
      decoder: the model's functions.
      trained: the trained parameters, in host memory.
      frozen: the frozen parameters, or None.
    """

    decoder: Decoder | TorchDecoder
    trained: PyTree
    frozen: PyTree | None

    @property
    def has_adapters(self) -> bool:
        """Whether what is trained are low-rank products or a prefix."""
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.trained)]
        return all("lora_" in name or "prefix_" in name for name in paths)

    def whole(self, trained: PyTree, frozen: PyTree | None) -> PyTree:
        """All parameters, as ``decoder`` takes them; the arguments may be perturbed, or on a device."""
        return trained if frozen is None else merge(trained, frozen)


def partition(params: PyTree, chosen: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Split a nested dict into the leaves whose dotted path is ``chosen``, and the rest.

    A :class:`hiso_jax.stacked.Stacked` becomes a ``Stacked`` in each part that has some of its leaves.
    """

    def split(node: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
        if isinstance(node, Stacked):
            first, second = split(node.layers, path)
            return None if first is None else Stacked(first), None if second is None else Stacked(second)
        if not isinstance(node, Mapping):
            return (node, None) if chosen(path_name(path)) else (None, node)
        both = {name: split(child, (*path, jax.tree_util.DictKey(name))) for name, child in node.items()}
        first = {name: pair[0] for name, pair in both.items() if pair[0] is not None}
        second = {name: pair[1] for name, pair in both.items() if pair[1] is not None}
        return first or None, second or None

    return split(params, ())


def tune(
    pretrained: Pretrained,
    trainable: str = "all",
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: tuple[str, ...] = LORA_TARGETS,
    prefix_tokens: int = 5,
    seed: int = 0,
) -> Tuned:
    """Choose the trained part of a pretrained model.

    Args:
      pretrained: the model.
      trainable: ``all``; ``lora`` (Hu et al., arXiv 2106.09685); ``prefix``, learned keys and values that are
        initialised with those of random tokens (Li and Liang, arXiv 2101.00190); ``head``, untied from the embedding if
        it was tied; or a regular expression that is searched for in the dotted paths of the parameters.
      lora_rank: r.
      lora_alpha: α; the low-rank product is scaled by α / r.
      lora_targets: the projections that get a low-rank product.
      prefix_tokens: the number of prefix positions.
      seed: the seed of the random initial values.

    Raises:
      ValueError: a rank or a number of tokens is below 1, α is not positive, a target is unknown, or a pattern is
        malformed or matches no parameter.
    """
    base, key, decoder = pretrained.params, jax.random.key(seed), pretrained.decoder
    adapters = Adapters(lora_rank, lora_alpha, tuple(lora_targets))
    if trainable == "all":
        return Tuned(decoder, base, None)
    if isinstance(decoder, TorchDecoder):
        chosen_of(decoder, trainable)
        if trainable == "lora":
            return Tuned(*with_adapters(decoder, base, adapters, key), base)
    elif trainable == "lora":
        return _lora(decoder, base, adapters, key)
    elif trainable == "prefix":
        return _prefix(decoder, base, prefix_tokens, key)
    elif trainable == "head":
        return _head(decoder, base)
    return Tuned(decoder, *_named(base, trainable))


def tuned_shapes(
    decoder: Decoder, trainable: str = "all", *, adapters: Adapters = NO_ADAPTERS, param_dtype: DTypeLike = jnp.float32
) -> Tuned:
    """The result of :func:`tune` with shapes instead of arrays, for a model known only by its architecture.

    Args:
      decoder: the model's functions.
      trainable: as in :func:`tune`.
      adapters: the adapters that ``trainable`` needs.
      param_dtype: the dtype of the model's own parameters; adapters are float32.

    Raises:
      ValueError: as in :func:`tune`.
    """
    if trainable == "lora":
        check_lora(adapters, decoder.config)
    elif trainable == "prefix":
        check_prefix(adapters.prefix, decoder.config)
    elif trainable == "head":
        decoder = replace(decoder, config=replace(decoder.config, tied=False))
    decoder = replace(decoder, adapters=adapters)
    whole = jax.eval_shape(decoder.init, jax.random.key(0))

    def kept(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = path_name(path).rpartition(".")[2]
        return leaf if name.startswith(("lora_", "prefix_")) else leaf.update(dtype=jnp.dtype(param_dtype))

    whole = jax.tree_util.tree_map_with_path(kept, whole)
    if trainable == "all":
        return Tuned(decoder, whole, None)
    chosen = {"lora": _is_lora, "prefix": lambda name: "prefix_" in name, "head": _is_head}
    return Tuned(decoder, *(partition(whole, chosen[trainable]) if trainable in chosen else _named(whole, trainable)))


def _is_lora(name: str) -> bool:
    return "lora_" in name


def _is_head(name: str) -> bool:
    return name.startswith("lm_head.")


def _named(params: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
    """The parameters whose names match ``pattern``, and the rest.

    Raises:
      ValueError: no name matches.
    """
    trained, frozen = partition(params, _matcher(pattern))
    if trained is None:
        known = [leaf.name for leaf in leaves(params)]
        raise ParameterError(
            "trainable",
            f"must be all, lora, prefix, head or a pattern that names a parameter; {pattern!r} names none "
            f"of {', '.join(known[:4])}, … {known[-1]}",
        )
    return trained, frozen


def _matcher(pattern: str) -> Callable[[str], bool]:
    """A test of whether a name matches ``pattern``; the search has a time limit, because patterns are not trusted.

    Raises:
      ValueError: ``pattern`` is not a regular expression, or a search takes too long.
    """
    with needing("regex"):
        import regex
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ParameterError(
            "trainable", f"must be all, lora, prefix, head or a regular expression: {error}"
        ) from error

    def matches(name: str) -> bool:
        try:
            return compiled.search(name, timeout=SEARCH_SECONDS) is not None
        except TimeoutError:
            raise ParameterError(
                "trainable", f"must be a regular expression that ends; {pattern!r} does not on {name}"
            ) from None

    return matches


def check_lora(adapters: Adapters, config: LMConfig) -> None:
    """Refuse adapters that a model cannot have.

    Raises:
      ValueError: the rank is out of range, α is not positive, there is no target, or the model lacks a target.
    """
    positive("lora_alpha", adapters.alpha)
    if adapters.rank < 1:
        raise ParameterError("lora_rank", f"must be at least 1, got {adapters.rank}")
    present = [name for name in PROJECTIONS if config.gated or name != "gate_proj"]
    for target in adapters.targets:
        if target not in present:
            raise ParameterError("lora_targets", f"must be of {', '.join(present)}; got {target}")
    if adapters.rank > config.hidden_size:
        raise ParameterError(
            "lora_rank", f"must be at most the model's width, {config.hidden_size}, got {adapters.rank}"
        )
    if not adapters.targets:
        raise ParameterError("lora_targets", f"must name at least one of {', '.join(present)}")


def check_prefix(tokens: int, config: LMConfig) -> None:
    """Refuse a prefix that leaves no position for a token.

    Raises:
      ValueError: the prefix leaves no position, or is empty.
    """
    most = config.max_positions - 1
    if not 1 <= tokens <= most:
        raise ParameterError("prefix_tokens", f"must be at least 1 and at most {most}, got {tokens}")


def _lora(plain: Decoder, params: PyTree, adapters: Adapters, key: jax.Array) -> Tuned:
    check_lora(adapters, plain.config)
    decoder = replace(plain, adapters=adapters)
    # Only the adapters are computed: the rest of the program is dead code.
    added = jax.jit(lambda key: partition(decoder.init(key), _is_lora)[0])(key)
    return Tuned(decoder, jax.tree.map(np.asarray, added), params)


def _prefix(plain: Decoder, params: PyTree, tokens: int, key: jax.Array) -> Tuned:
    check_prefix(tokens, plain.config)
    numbers = jax.random.randint(key, (1, tokens), 0, plain.config.vocab_size)
    _, cache = jax.jit(lambda params: plain.prefill(params, numbers, jnp.ones(numbers.shape, bool), 0))(params)
    added = {"prefix_keys": cache.keys[:, 0], "prefix_values": cache.values[:, 0]}
    added = jax.tree.map(lambda a: np.asarray(a, np.float32), added)
    decoder = replace(plain, adapters=Adapters(prefix=tokens))
    return Tuned(decoder, {"layers": Stacked({"self_attn": added})}, params)


def _head(decoder: Decoder, params: PyTree) -> Tuned:
    if "lm_head" not in params:
        decoder = replace(decoder, config=replace(decoder.config, tied=False))
        params = {**params, "lm_head": {"kernel": np.ascontiguousarray(params["embed_tokens"]["embedding"].T)}}
    return Tuned(decoder, *partition(params, _is_head))
