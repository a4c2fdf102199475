"""One layer of a decoder-only transformer and its adapters for fine-tuning, as flax.nnx modules."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hiso_jax.models.functional import Linear as AnyLinear
from hiso_jax.models.lm.config import LMConfig
from hiso_jax.models.lm.rope import rotate

ACTIVATIONS = {
    "relu": nnx.relu,
    "gelu": lambda x: nnx.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nnx.gelu(x, approximate=True),
    "silu": nnx.silu,
}


@dataclass(frozen=True)
class Adapters:
    """Parameters that are added to every layer for fine-tuning.

    Attributes:
      rank: r of LoRA (Hu et al., arXiv 2106.09685); 0 means no LoRA.
      alpha: α of LoRA; the low-rank product is scaled by α / r.
      targets: the projections that get LoRA.
      prefix: learned keys and values before the first token (Li and Liang, arXiv 2101.00190); 0 means none.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    prefix: int = 0


NO_ADAPTERS = Adapters()


class Reading(NamedTuple):
    """Inputs that all layers share.

    Attributes:
      rotation: cosines and sines of the positions, or None.
      mask: which keys each query attends to, before any window is applied.
      distance: how many positions each key lies behind the query.
      local_rotation: cosines and sines for the layers with a window, or None if they are those of all layers.
    """

    rotation: tuple[Float[Array, "B T D"], Float[Array, "B T D"]] | None
    mask: Bool[Array, "B T S"]
    distance: Int[Array, "B T S"]
    local_rotation: tuple[Float[Array, "B T D"], Float[Array, "B T D"]] | None = None


class LayerKind(NamedTuple):
    """The window and the rotation of a layer; they are values, so layers of the same shapes share one program.

    Attributes:
      window: how many tokens back it attends; None in a model whose layers attend to all tokens.
      rotates: whether it rotates queries and keys; None in a model whose layers all do, or none.
      is_local: whether it rotates as layers with a window do; None in a model whose layers all rotate alike.
    """

    window: Any = None
    rotates: Any = None
    is_local: Any = None


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, S, kv_heads, head_dim]; for all layers [L, B, S, ...]."""

    keys: Array
    values: Array


class Linear(AnyLinear):
    """A projection with an optional low-rank addition x·A·B·α/r (LoRA, arXiv 2106.09685)."""

    def __init__(
        self, inputs: int, outputs: int, *, adapters: Adapters, name: str, use_bias: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        """``inputs`` → ``outputs`` features; LoRA if ``adapters`` targets ``name``."""
        init = nnx.initializers.normal(0.02)
        super().__init__(inputs, outputs, use_bias=use_bias, dtype=dtype, kernel_init=init, rngs=rngs)
        self.scale = 0.0
        if adapters.rank and name in adapters.targets:
            self.scale = adapters.alpha / adapters.rank
            down = nnx.initializers.he_uniform()
            self.lora_a = nnx.Param(down(rngs.params(), (inputs, adapters.rank), jnp.float32))
            self.lora_b = nnx.Param(jnp.zeros((adapters.rank, outputs), jnp.float32))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """The outputs of the projection."""
        outputs = super().__call__(inputs)
        if not self.scale:
            return outputs
        a, b = self.lora_a[...].astype(outputs.dtype), self.lora_b[...].astype(outputs.dtype)
        return outputs + self.scale * ((inputs.astype(outputs.dtype) @ a) @ b)


class Attention(nnx.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: LMConfig, adapters: Adapters, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        """Of the shapes of ``config``, computing in ``dtype``."""
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.scale, self.cap = config.attention_scale, config.attention_cap
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shared: dict[str, Any] = {"adapters": adapters, "dtype": dtype, "rngs": rngs}
        self.q_proj = Linear(config.hidden_size, queries, name="q_proj", use_bias=config.qkv_bias, **shared)
        self.k_proj = Linear(config.hidden_size, keys, name="k_proj", use_bias=config.qkv_bias, **shared)
        self.v_proj = Linear(config.hidden_size, keys, name="v_proj", use_bias=config.qkv_bias, **shared)
        self.o_proj = Linear(queries, config.hidden_size, name="o_proj", use_bias=config.out_bias, **shared)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = norm(config, dtype, self.head_dim, rngs=rngs)
            self.k_norm = norm(config, dtype, self.head_dim, rngs=rngs)
        self.prefix = adapters.prefix
        if self.prefix:
            shape = (self.prefix, self.kv_heads, self.head_dim)
            self.prefix_keys = nnx.Param(jnp.zeros(shape, jnp.float32))
            self.prefix_values = nnx.Param(jnp.zeros(shape, jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T H"],
        reading: Reading,
        kind: LayerKind,
        cache: Cache | None,
        at: Any,
        last: int | None = None,
    ) -> tuple[Float[Array, "B N H"], Cache]:
        """The outputs at the last N positions, by default all, and the keys and values.

        The keys and values are those of ``x``, or the cache with those of ``x`` written at ``at``.
        """
        asked = x if last is None else x[:, -last:]
        queries = self.q_proj(asked).reshape(*asked.shape[:2], self.heads, self.head_dim)
        keys = self.k_proj(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        values = self.v_proj(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        if self.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if reading.rotation is not None:
            turns = reading.rotation
            if reading.local_rotation is not None:
                turns = jax.tree.map(
                    lambda local, plain: jnp.where(kind.is_local, local, plain), reading.local_rotation, turns
                )
            own = [turn[:, -asked.shape[1] :] for turn in turns]
            plain, turned = (queries, keys), (rotate(queries, *own), rotate(keys, *turns))
            if kind.rotates is not None:
                turned = jax.tree.map(lambda new, old: jnp.where(kind.rotates, new, old), turned, plain)
            queries, keys = turned
        if cache is not None:
            keys = lax.dynamic_update_slice_in_dim(cache.keys, keys.astype(cache.keys.dtype), at, 1)
            values = lax.dynamic_update_slice_in_dim(cache.values, values.astype(cache.values.dtype), at, 1)
        new = Cache(keys, values)
        mask = reading.mask if kind.window is None else reading.mask & (reading.distance < kind.window)
        mask = mask[:, -asked.shape[1] :]
        if self.prefix:
            keys = self._behind(self.prefix_keys[...], keys)
            values = self._behind(self.prefix_values[...], values)
            mask = jnp.pad(mask, ((0, 0), (0, 0), (self.prefix, 0)), constant_values=True)
        mixed = _attended(queries, keys, values, mask[:, None], self.scale, self.cap)
        return self.o_proj(mixed.reshape(*asked.shape[:2], -1)), new

    def _behind(self, prefix: Array, own: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(prefix.astype(own.dtype), (len(own), *prefix.shape)), own], 1)


def _attended(
    queries: Float[Array, "B T N D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K D"],
    mask: Bool[Array, "B 1 T S"],
    scale: float | None,
    cap: float | None,
) -> Float[Array, "B T N D"]:
    """The values, mixed by the softmax of queries times keys times ``scale``, with a soft cap if there is one."""
    if cap is None:
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask, scale=scale)
    batch, length, heads, width = queries.shape
    grouped = queries.reshape(batch, length, keys.shape[2], -1, width)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", grouped, keys, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scores * (width**-0.5 if scale is None else scale) / cap)
    shares = jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min), -1)
    return jnp.einsum("BKGTS,BSKD->BTKGD", shares.astype(values.dtype), values).reshape(batch, length, heads, width)


class MLP(nnx.Module):
    """The feed-forward network, gated or plain."""

    def __init__(self, config: LMConfig, adapters: Adapters, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        """Of the shapes of ``config``, computing in ``dtype``."""
        shared: dict[str, Any] = {"adapters": adapters, "use_bias": config.mlp_bias, "dtype": dtype, "rngs": rngs}
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = Linear(config.hidden_size, config.mlp_size, name="up_proj", **shared)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, name="down_proj", **shared)
        self.gated = config.gated
        if self.gated:
            self.gate_proj = Linear(config.hidden_size, config.mlp_size, name="gate_proj", **shared)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """The network's output."""
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


def norm(config: LMConfig, dtype: DTypeLike, width: int | None = None, *, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of the family over ``width`` numbers, by default H, with statistics in float32."""
    kind: Any = OffsetNorm if config.norm_offset else nnx.RMSNorm if config.rms else nnx.LayerNorm
    return kind(width or config.hidden_size, epsilon=config.norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


class OffsetNorm(nnx.Module):
    """RMSNorm that multiplies by 1 + scale, in float32, as Gemma's does."""

    def __init__(
        self, width: int, *, epsilon: float, dtype: DTypeLike, use_fast_variance: bool, rngs: nnx.Rngs
    ) -> None:
        """Over ``width`` numbers; other arguments as of ``flax.nnx.RMSNorm``."""
        self.scale = nnx.Param(jnp.zeros(width, jnp.float32))
        self.plain = nnx.RMSNorm(
            width,
            epsilon=epsilon,
            dtype=jnp.float32,
            use_scale=False,
            use_fast_variance=use_fast_variance,
            rngs=rngs,
        )
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """The numbers, divided by the root of their mean square and multiplied by 1 + scale."""
        return (self.plain(x) * (1 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


class Block(nnx.Module):
    """Attention and feed-forward network around a residual stream."""

    def __init__(self, config: LMConfig, adapters: Adapters, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        """Of the shapes of ``config``, computing in ``dtype``."""
        self.norm_first = config.norm_first
        self.attention_norm = norm(config, dtype, rngs=rngs)
        self.self_attn = Attention(config, adapters, dtype, rngs=rngs)
        self.mlp_norm = norm(config, dtype, rngs=rngs)
        self.mlp = MLP(config, adapters, dtype, rngs=rngs)
        self.output_norms = config.output_norms
        if self.output_norms:
            self.attention_output_norm = norm(config, dtype, rngs=rngs)
            self.mlp_output_norm = norm(config, dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T H"],
        reading: Reading,
        kind: LayerKind,
        cache: Cache | None,
        at: Any,
        last: int | None = None,
    ) -> tuple[Float[Array, "B N H"], Cache]:
        """The residual stream after the layer at the last N positions, by default all, and the keys and values."""
        asked = x if last is None else x[:, -last:]
        if self.norm_first:
            mixed, new = self.self_attn(self.attention_norm(x), reading, kind, cache, at, last)
            x = asked + (self.attention_output_norm(mixed) if self.output_norms else mixed)
            fed = self.mlp(self.mlp_norm(x))
            return x + (self.mlp_output_norm(fed) if self.output_norms else fed), new
        mixed, new = self.self_attn(x, reading, kind, cache, at, last)
        x = self.attention_norm(asked + mixed)
        return self.mlp_norm(x + self.mlp(x)), new
