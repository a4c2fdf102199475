"""An independent implementation of the Llama family in NumPy, in float64, from a checkpoint's named tensors."""

import numpy as np


def plain_angles(width, theta=10_000.0):
    """Radians a position of each pair of coordinates (Su et al., arXiv 2104.09864, equation 15)."""
    return theta ** (-np.arange(0, width, 2) / width)


def yarn_angles(width, factor, original, theta=10_000.0, fast=32.0, slow=1.0, truncate=True):
    """YaRN's angles (arXiv 2309.00071, section 3.2): short wavelengths stay, long ones are stretched by the factor."""
    turned = original * plain_angles(width, theta) / (2 * np.pi)
    # Each pair has a place on the logarithmic axis of wavelengths; ``low`` and ``high`` are the ends of the ramp.
    place = -np.log(turned / (original / (2 * np.pi))) / np.log(theta) * width / 2

    def end(rotations):
        return width * np.log(original / (rotations * 2 * np.pi)) / (2 * np.log(theta))

    low, high = end(fast), end(slow)
    if truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((place - low) / (high - low), 0, 1)
    return plain_angles(width, theta) * (1 - ramp + ramp / factor)


def logits(tensors, config, tokens, *, windows=None, angles=None, scale=1.0):
    """The logits [T, V] of one text.

    ``windows`` holds each layer's attention window, and ``angles`` each pair's rotation for one position; ``scale``
    multiplies rotated queries and keys.
    """
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], head_width(config)
    angles = plain_angles(width) if angles is None else angles
    turn = scale * np.exp(1j * np.arange(len(tokens))[:, None] * angles)
    back = np.subtract.outer(np.arange(len(tokens)), np.arange(len(tokens)))

    def norm(x, name):
        return tensors[name] * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config["rms_norm_eps"])

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors.get(f"{name}.bias", 0.0)

    def rotated(x):
        # The first half of a head's coordinates are real parts, the second imaginary ones.
        turned = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q = rotated(linear(h, f"{at}.self_attn.q_proj").reshape(len(tokens), heads, width))
        k = rotated(linear(h, f"{at}.self_attn.k_proj").reshape(len(tokens), groups, width))
        v = linear(h, f"{at}.self_attn.v_proj").reshape(len(tokens), groups, width)
        seen = (back >= 0) & (back < (np.inf if windows is None else windows[layer]))
        out = np.empty((len(tokens), heads, width))
        for head in range(heads):
            own = head * groups // heads
            scores = np.where(seen, q[:, head] @ k[:, own].T / np.sqrt(width), -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, own]
        x = x + linear(out.reshape(len(tokens), -1), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate = linear(h, f"{at}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return norm(x, "model.norm.weight") @ tensors[head].T.astype(np.float64)


def head_width(config):
    """The width of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
