"""GGUF files: architecture, tokenizer and weights, read with the ``gguf`` package and without torch."""

import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm.config import LMConfig
from hiso_jax.models.lm.gguf_bounds import check_claims
from hiso_jax.models.lm.gguf_fields import Fields, check_fields, gemma_parts, rope_of

# The most characters of a token, and the largest sum of squares over all tokens: every split of a token is tried, which
# costs the square of its length. The pieces of SentencePiece have at most a few dozen characters.
MOST_CHARACTERS, MOST_SQUARED = 1024, 2**28
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# The patterns by which byte-level tokenizers split text before merging, and llama.cpp's names of them.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_STYLES = ("llama-bpe", "llama-v3", "llama3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
QWEN2_STYLES = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")
DIGIT_STYLES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
GPT2_STYLES = ("default", "gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "gigachat", "mpt", "olmo", "jais", "trillion")
CONTROL, USER_DEFINED = 3, 4


class GGUFTensors:
    """The tensors of a GGUF file, dequantised when they are read."""

    def __init__(self, readers: Sequence[Any], heads: dict[str, int], offset_norms: bool = False) -> None:
        """Collect the tensors of a file, or of all its parts.

        Args:
          readers: the reader of each part.
          heads: the number of heads of each projection whose rows the file keeps in llama.cpp's order.
          offset_norms: whether the file keeps 1 + scale for each norm, as it does for Gemma.

        Raises:
          ValueError: the ``gguf`` package cannot dequantise the type of a tensor.
        """
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        self._heads, self._offset = heads, offset_norms
        for name, tensor in self._tensors.items():
            if not _is_readable(tensor.tensor_type):
                raise ParameterError(
                    "model",
                    "must have GGUF tensors of types that the gguf package dequantises, Q4_K and Q8_0 say; "
                    f"{name} is {tensor.tensor_type.name}",
                )

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def size(self, name: str) -> int:
        """The number of values of a tensor, without reading it."""
        return math.prod(map(int, self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, in the layout of a Hugging Face checkpoint."""
        from gguf import dequantize

        tensor = self._tensors[name]
        if tensor.tensor_type.name == "BF16":
            words = np.asarray(tensor.data).view(np.uint16).astype(np.uint32) << 16
            values = words.view(np.float32)
        else:
            values = dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape(tensor.shape[::-1]).astype(np.float32)
        if self._offset and name.endswith("norm.weight"):
            return values - 1
        heads = self._heads.get(name.split(".")[-2])
        # llama.cpp rotates neighbouring coordinates, so its Llama files keep the rows in that order.
        return values if heads is None else _unpermuted(values, heads)


@cache
def _is_readable(kind: Any) -> bool:
    """Whether the ``gguf`` package can dequantise a type, tested on one block."""
    from gguf import GGML_QUANT_SIZES, dequantize

    if kind.name == "BF16":
        return True
    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def open_gguf(path: Path) -> tuple[LMConfig, GGUFTensors, Any]:
    """The architecture, the tensors and the tokenizer of a GGUF file.

    Raises:
      ValueError: the file or a part of it is missing or truncated, or the architecture, a tensor type or the tokenizer
        is not supported.
    """
    first = _read(path)
    fields = Fields(path, {name: field.contents() for name, field in first.fields.items()})
    readers = [first, *map(_read, _further_parts(path, fields))]
    try:
        config = _config(fields, [tensor for reader in readers for tensor in reader.tensors])
        permuted = {"attn_q": config.heads, "attn_k": config.kv_heads} if config.family == "llama" else {}
        return config, GGUFTensors(readers, permuted, config.norm_offset), _tokenizer(fields, path)
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} has a field of another kind than a model's ({reason})") from error


def _read(path: Path) -> Any:
    """The reader of one file.

    Raises:
      ValueError: the file does not exist, or is not a GGUF file.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise ParameterError("model", f"must be a hub name, a folder or a .gguf file; there is no file {path}")
    check_claims(path)
    try:
        return GGUFReader(path)
    except Exception as error:
        # The reader maps the file into memory and can fail at any place where a truncated file ends.
        raise ValueError(f"{path} is no GGUF file, or a truncated one: {error}") from error


def _further_parts(path: Path, fields: Fields) -> list[Path]:
    """The further files of a split model, by the names that llama.cpp's splitter gives them.

    Raises:
      ValueError: ``path`` does not have the name of the first part.
    """
    count = fields.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return []
    named = re.fullmatch(r"(.*)-00001-of-(\d{5})", path.stem)
    if named is None or int(named[2]) != count:
        raise ParameterError(
            "model", f"must be the first part of a GGUF file in {count:,} parts, …-00001-of-{count:05}.gguf; got {path}"
        )
    return [path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]


def _config(fields: Fields, tensors: Sequence[Any]) -> LMConfig:
    family = fields.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ParameterError(
            "model", f"must be a GGUF file of the architectures {', '.join(ARCHITECTURES)}; got {family}"
        )
    names = {tensor.name for tensor in tensors}

    def field(name: str, default: Any = None) -> Any:
        return fields.of(family, name, default)

    hidden, heads = field("embedding_length"), field("attention.head_count")
    head_dim = fields.get(f"{family}.attention.key_length") or hidden // heads
    check_fields(fields, family, head_dim)
    layers, context = field("block_count"), field("context_length")
    called = "rope_factors_short.weight" if family == "phi3" else "rope_freqs.weight"
    factors = [tensor for tensor in tensors if tensor.name == called]
    rope = rope_of(fields, family, head_dim, np.asarray(factors[0].data, np.float32) if factors else None)
    parts: dict[str, Any] = {"activation": "silu", "qk_norm": family == "qwen3"}
    if family in ("gemma2", "gemma3"):
        parts = gemma_parts(fields, family, layers, heads, hidden, head_dim)
    if family == "phi3" and field("attention.sliding_window", 0):
        # llama.cpp attends to all tokens, and says that results may be worse; the folder's model has the window.
        parts["windows"] = (int(field("attention.sliding_window")),) * layers
    return LMConfig(
        **parts,
        family=family,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        embedding_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=field("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_size=field("feed_forward_length"),
        gated=True,
        rms=True,
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        max_positions=rope.original if family == "phi3" and factors else context,
        rope=rope,
        qkv_bias="blk.0.attn_q.bias" in names,
        out_bias="blk.0.attn_output.bias" in names,
        tied="output.weight" not in names,
    )


def _tokenizer(fields: Fields, path: Path) -> Any:
    """The tokenizer of a file, as a fast tokenizer of transformers."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ParameterError("model", f"must have a GGUF tokenizer of the kinds gpt2 or llama; {path} has {kind}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    try:
        backend = _byte_level(fields, tokens, path) if kind == "gpt2" else _sentencepiece(fields, tokens)
    except ValueError:
        raise
    except Exception as error:
        # The tokenizers package raises bare Exceptions, for example if a merge gives no token of the vocabulary.
        reason = f"that of {path} does not: {error}"
        raise ParameterError("model", f"must have a vocabulary that fits its merges; {reason}") from error
    roles = list(zip(tokens, types, strict=False))
    backend.add_special_tokens([AddedToken(text, special=True) for text, role in roles if role == CONTROL])
    backend.add_tokens([AddedToken(text) for text, role in roles if role == USER_DEFINED])

    # A SentencePiece file without these fields has the usual special tokens, as in llama.cpp.
    usual = {"unknown": 0, "bos": 1, "eos": 2} if kind == "llama" and len(tokens) > 2 else {}

    def number_of(role: str) -> int | None:
        number = fields.get(f"tokenizer.ggml.{role}_token_id", usual.get(role))
        if number is not None and not 0 <= number < len(tokens):
            raise ParameterError(
                "model", f"must have a {role} token among its {len(tokens):,}; that of {path} is {number}"
            )
        return number

    def token(role: str) -> str | None:
        number = number_of(role)
        return None if number is None else tokens[number]

    bos, eos = token("bos"), token("eos")
    # Files without the field follow llama.cpp's own table.
    begins = kind == "llama" or fields.get("tokenizer.ggml.pre") in LLAMA3_STYLES
    if fields.get("tokenizer.ggml.add_bos_token", begins) and bos is not None:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number_of("bos"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=token("unknown"),
        pad_token=token("padding") or eos,
        additional_special_tokens=[text for text, role in roles if role == CONTROL and text not in (bos, eos)],
        model_max_length=fields.get(f"{fields.get('general.architecture')}.context_length"),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _byte_level(fields: Fields, tokens: list[str], path: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    style = fields.get("tokenizer.ggml.pre", "default")
    # Llama 3's vocabulary has words that no merge gives; such a word is one token without merges.
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=style in LLAMA3_STYLES))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])

    if style in DIGIT_STYLES:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    elif style in LLAMA3_STYLES:
        backend.pre_tokenizer = split(LLAMA3_SPLIT)
    elif style in QWEN2_STYLES:
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = split(QWEN2_SPLIT)
    elif style in GPT2_STYLES:
        backend.pre_tokenizer = whole
    else:
        raise ParameterError("model", f"must have a GGUF tokenizer that is known here; {path} splits text by {style}")
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, tokens: list[str]) -> Any:
    """SentencePiece's byte-pair encoding: two pieces merge if their concatenation is a piece, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    lengths = [len(token) for token in tokens]
    if max(lengths, default=0) > MOST_CHARACTERS or sum(length**2 for length in lengths) > MOST_SQUARED:
        raise ParameterError(
            "model",
            f"must have tokens of at most {MOST_CHARACTERS:,} characters; its longest has {max(lengths):,}, and "
            f"all of them together have {sum(lengths):,}",
        )
    rank = {token: i for i, token in enumerate(tokens)}
    scores = fields["tokenizer.ggml.scores"]
    merges = []
    for whole in tokens:
        splits = [(whole[:i], whole[i:]) for i in range(1, len(whole)) if whole[:i] in rank and whole[i:] in rank]
        splits.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        merges += [(scores[rank[whole]], pair) for pair in splits]
    merges.sort(key=lambda item: item[0], reverse=True)
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(
        models.BPE(rank, [pair for _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
