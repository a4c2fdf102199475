"""GGUF files: architecture, tokenizer and weights from one file, by the ``gguf`` package and without torch."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.models.lm.claims import check_claims
from hiso_jax.models.lm.config import LMConfig, Rope

READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
ARCHITECTURES = ("llama", "qwen2")
# How the byte-level tokenizers split text before merging; the names are llama.cpp's.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_STYLES = ("llama-bpe", "llama-v3", "llama3")
CONTROL, USER_DEFINED = 3, 4


class GGUFTensors:
    """The tensors of a GGUF file, dequantised when they are read."""

    def __init__(self, reader: Any, heads: dict[str, int]) -> None:
        """``heads`` are the heads of the projections whose rows the file keeps in llama.cpp's order."""
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._heads = heads
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in READABLE:
                raise ValueError(
                    f"model must have GGUF tensors of the types {', '.join(READABLE)}; "
                    f"{name} is {tensor.tensor_type.name}"
                )

    def names(self) -> Iterable[str]:
        """All names."""
        return list(self._tensors)

    def size(self, name: str) -> int:
        """How many numbers a tensor has, without reading it."""
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
        heads = self._heads.get(name.split(".")[-2])
        # llama.cpp rotates neighbouring coordinates, and its Llama files keep the rows in that order.
        return values if heads is None else _unpermuted(values, heads)


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class Fields(dict):
    """The metadata of a file; asking for what it lacks is one sentence."""

    def __init__(self, path: Path, contents: dict[str, Any]) -> None:
        """``contents`` of the file at ``path``."""
        super().__init__(contents)
        self.path = path

    def __missing__(self, name: str) -> Any:
        """Refuse a name that the file does not have."""
        raise ValueError(f"{self.path} lacks the field {name}")


def open_gguf(path: Path) -> tuple[LMConfig, GGUFTensors, Any]:
    """The architecture, the tensors and the tokenizer of a GGUF file.

    Raises:
      ValueError: the file is missing, truncated, or of an architecture, tensor type or tokenizer that is not known.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise ValueError(f"model must be a hub name, a folder or a .gguf file; there is no file {path}")
    check_claims(path)
    try:
        reader = GGUFReader(path)
        fields = Fields(path, {name: field.contents() for name, field in reader.fields.items()})
    except Exception as error:
        # The reader maps the file and fails wherever it ends.
        raise ValueError(f"{path} is no GGUF file, or a truncated one: {error}") from error
    try:
        config = _config(fields, reader)
        permuted = {"attn_q": config.heads, "attn_k": config.kv_heads} if config.family == "llama" else {}
        return config, GGUFTensors(reader, permuted), _tokenizer(fields, path)
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} has a field of another kind than a model's ({told})") from error


def _config(fields: Fields, reader: Any) -> LMConfig:
    family = fields.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(f"model must be a GGUF file of the architectures {', '.join(ARCHITECTURES)}; got {family}")
    names = {tensor.name for tensor in reader.tensors}

    def field(name: str, default: Any = None) -> Any:
        return fields[f"{family}.{name}"] if default is None else fields.get(f"{family}.{name}", default)

    hidden, heads = field("embedding_length"), field("attention.head_count")
    head_dim = fields.get(f"{family}.attention.key_length") or hidden // heads
    return LMConfig(
        family=family,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        embedding_size=hidden,
        layers=field("block_count"),
        heads=heads,
        kv_heads=field("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_size=field("feed_forward_length"),
        gated=True,
        activation="silu",
        rms=True,
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        max_positions=field("context_length"),
        rope=_rope(fields, family, reader, field("context_length")),
        qkv_bias="blk.0.attn_q.bias" in names,
        out_bias="blk.0.attn_output.bias" in names,
        tied="output.weight" not in names,
    )


def _rope(fields: Fields, family: str, reader: Any, context: int) -> Rope:
    theta = float(fields.get(f"{family}.rope.freq_base", 10_000.0))
    factors = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if factors:
        return Rope(theta=theta, kind="factors", factors=tuple(np.asarray(factors[0].data, np.float32).tolist()))
    kind = fields.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return Rope(theta=theta)
    if kind not in ("linear", "yarn"):
        raise ValueError(f"model must have GGUF rope scaling none, linear or yarn; got {kind}")
    factor = float(fields[f"{family}.rope.scaling.factor"])
    original = int(fields.get(f"{family}.rope.scaling.original_context_length", context))
    temperature = 0.1 * float(np.log(factor)) + 1.0 if kind == "yarn" else 1.0
    return Rope(theta=theta, kind=kind, factor=factor, original=original, attention_factor=temperature)


def _tokenizer(fields: Fields, path: Path) -> Any:
    """The tokenizer of a file, as transformers' fast tokenizer."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"model must have a GGUF tokenizer of the kinds gpt2 or llama; {path} has {kind}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    backend = _byte_level(fields, tokens, path) if kind == "gpt2" else _sentencepiece(fields, tokens)
    roles = list(zip(tokens, types, strict=False))
    backend.add_special_tokens([AddedToken(text, special=True) for text, role in roles if role == CONTROL])
    backend.add_tokens([AddedToken(text) for text, role in roles if role == USER_DEFINED])

    def token(role: str) -> str | None:
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if number is None else tokens[number]

    bos, eos = token("bos"), token("eos")
    # Files that do not say follow llama.cpp's own table.
    begins = kind == "llama" or fields.get("tokenizer.ggml.pre") in LLAMA3_STYLES
    if fields.get("tokenizer.ggml.add_bos_token", begins) and bos is not None:
        from tokenizers.processors import TemplateProcessing

        number = fields["tokenizer.ggml.bos_token_id"]
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=token("unknown"),
        pad_token=token("padding") or eos,
    )


def _byte_level(fields: Fields, tokens: list[str], path: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    style = fields.get("tokenizer.ggml.pre", "default")
    # Llama 3's vocabulary has words that no merge makes; they are taken whole.
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=style in LLAMA3_STYLES))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])

    if style in ("smollm", "refact", "codeshell"):
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    elif style in LLAMA3_STYLES:
        backend.pre_tokenizer = split(LLAMA3_SPLIT)
    elif style == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = split(QWEN2_SPLIT)
    elif style in ("default", "gpt-2", "gpt2"):
        backend.pre_tokenizer = whole
    else:
        raise ValueError(f"model must have a GGUF tokenizer that is known here; {path} splits text by {style}")
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, tokens: list[str]) -> Any:
    """SentencePiece's byte-pair encoding: two pieces merge where their union is a piece, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

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
