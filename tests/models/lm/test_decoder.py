"""Cached decoding, trained parts, scanned and separate layers, and buckets of lengths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hiso_jax import zo
from hiso_jax.models.lm import SHAPES, Adapters, Decoder, from_transformers, greedy, tuned_shapes
from hiso_jax.models.lm.checkpoint import Pretrained
from hiso_jax.models.lm.names import leaves
from hiso_jax.models.lm.trainable import partition, tune
from hiso_jax.stacked import merge
from tests.marks import slow, thorough
from tests.models.lm.checkpoints import CONFIGS, LLAMA, inputs

KEY = jax.random.key(0)


def pretrained(name="llama"):
    decoder = Decoder(from_transformers(CONFIGS[name]))
    params = jax.tree.map(lambda x: np.asarray(3 * x), jax.jit(decoder.init)(KEY))
    return Pretrained(decoder, params, None, name)


def plain_greedy(model, tokens, mask, count):
    """The next tokens, each from a run over the whole sequence so far, without a cache."""
    run = jax.jit(lambda p, t, m: model.decoder.logits(p, model.decoder.hidden(p, t, m)[:, -1]).argmax(-1))
    for _ in range(count):
        following = run(model.params, tokens, mask)
        tokens = jnp.concatenate([tokens, following[:, None]], 1)
        mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    return np.asarray(tokens[:, -count:])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        "mistral",
        "gemma3",
        *(slow(name) for name in ("opt", "llama", "qwen3", "smollm3-windowed", "gemma2", "phi3-partial")),
    ],
)
def test_cached_decoding_is_decoding_without_a_cache(name):
    model, (tokens, mask) = pretrained(name), inputs("left")
    generate = jax.jit(
        lambda p, t, m, stop: greedy(model.decoder, p, t, m, max_new_tokens=6, stop_tokens=stop, pad_token=60),
        static_argnums=3,
    )
    expected = plain_greedy(model, jnp.asarray(tokens), jnp.asarray(mask), 6)
    np.testing.assert_array_equal(generate(model.params, tokens, mask, (-1,)), expected)
    assert len(np.unique(expected)) > 2
    # The first row ends where its third token first occurs; the others go on unless they have it, too.
    stop = int(expected[0, 2])
    stopped = np.asarray(generate(model.params, tokens, mask, (stop,)))
    for row, whole in zip(stopped, expected, strict=True):
        end = int(np.argmax(whole == stop)) if stop in whole else 6
        np.testing.assert_array_equal(row, np.where(np.arange(6) < end, whole, 60))


def test_padding_changes_nothing():
    model, (tokens, mask) = pretrained(), inputs("left")
    run = jax.jit(model.decoder.hidden)
    hidden = run(model.params, tokens, mask)
    wide = run(model.params, jnp.pad(tokens, ((0, 0), (7, 0))), jnp.pad(mask, ((0, 0), (7, 0))))
    np.testing.assert_allclose(wide[:, 7:][mask], hidden[mask], atol=2e-5)


@pytest.mark.thorough
def test_lora_begins_as_the_model_and_is_what_the_formula_says():
    model, (tokens, mask) = pretrained(), inputs("left")
    tuned = tune(model, "lora", lora_rank=3, lora_alpha=6.0, lora_targets=("q_proj", "down_proj"))
    names = [leaf.name for leaf in leaves(tuned.trained)]
    assert sorted(names) == sorted(
        f"layers.{part}.lora_{side}" for part in ("self_attn.q_proj", "mlp.down_proj") for side in "ab"
    )
    run = jax.jit(lambda trained, frozen: tuned.decoder.hidden(tuned.whole(trained, frozen), tokens, mask))
    before = model.decoder.hidden(model.params, tokens, mask)
    np.testing.assert_allclose(run(tuned.trained, tuned.frozen)[mask], before[mask], atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.1, tuned.trained)

    def add(path, kernel):
        target = moved["layers"].layers
        for key in path:
            target = target.get(key.key) if isinstance(target, dict) else None
            if target is not None and "lora_a" in target:
                return kernel + 2.0 * target["lora_a"] @ target["lora_b"]
        return kernel

    folded = dict(model.params)
    layers = jax.tree_util.tree_map_with_path(add, model.params["layers"].layers)
    folded["layers"] = dataclasses.replace(model.params["layers"], layers=layers)
    expected = model.decoder.hidden(folded, tokens, mask)
    np.testing.assert_allclose(run(moved, tuned.frozen)[mask], expected[mask], atol=2e-4)
    assert np.abs(expected - before)[mask].max() > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", "smollm3", slow("opt"), slow("qwen3")])
def test_a_prefix_begins_as_tokens_before_the_text(name):
    model, (tokens, mask) = pretrained(name), inputs("left")
    tuned = tune(model, "prefix", prefix_tokens=3, seed=5)
    numbers = jax.random.randint(jax.random.key(5), (1, 3), 0, 61)
    run = jax.jit(lambda trained, frozen: tuned.decoder.hidden(tuned.whole(trained, frozen), tokens, mask))
    # The same tokens stand before each text, inside its padding.
    width = tokens.shape[1] + 3
    longer, real = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
    for row, length in enumerate(mask.sum(1)):
        longer[row, width - length - 3 :] = np.concatenate([numbers[0], tokens[row][mask[row]]])
        real[row, width - length - 3 :] = True
    expected = model.decoder.hidden(model.params, longer, real)[:, 3:]
    np.testing.assert_allclose(run(tuned.trained, tuned.frozen)[mask], expected[mask], atol=2e-5)


@pytest.mark.thorough
def test_the_head_is_untied_to_be_trained():
    model, (tokens, mask) = pretrained("qwen2"), inputs("left")
    assert model.decoder.config.tied
    tuned = tune(model, "head")
    assert [leaf.name for leaf in leaves(tuned.trained)] == ["lm_head.kernel"]
    whole = tuned.whole(tuned.trained, tuned.frozen)
    np.testing.assert_allclose(
        tuned.decoder.logits(whole, tuned.decoder.hidden(whole, tokens, mask)),
        model.decoder.logits(model.params, model.decoder.hidden(model.params, tokens, mask)),
        atol=1e-5,
    )


def test_a_pattern_names_what_is_trained():
    model = pretrained()
    tuned = tune(model, r"layers\..*norm|^norm")
    assert [leaf.name for leaf in leaves(tuned.trained)] == [
        "layers.attention_norm.scale", "layers.mlp_norm.scale", "norm.scale"
    ]  # fmt: skip
    both = merge(tuned.trained, tuned.frozen)
    assert set(both) == set(model.params)
    first, second = partition(model.params, lambda name: True)
    assert second is None
    assert jax.tree.structure(first) == jax.tree.structure(model.params)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"trainable": "nothing_like_it"}, "names none of embed_tokens.embedding"),
        ({"trainable": "(unclosed"}, "or a regular expression"),
        ({"trainable": "lora", "lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"trainable": "lora", "lora_targets": ("query",)}, "lora_targets must be of q_proj, .*; got query"),
        ({"trainable": "lora", "lora_targets": ()}, "lora_targets must name at least one"),
        ({"trainable": "prefix", "prefix_tokens": 0}, "prefix_tokens must be at least 1 and at most 63, got 0"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        tune(pretrained(), **settings)


@pytest.mark.thorough
def test_scanned_or_not_the_same_seed_gives_the_same_scalars():
    model, (tokens, mask) = pretrained(), inputs("left")
    params = jax.tree.map(jnp.asarray, model.params)
    apart = {**params, "layers": params["layers"].unstacked()}

    def loss(params, batch):
        hidden = model.decoder.hidden(params, *batch)[:, -1]
        return jax.nn.logsumexp(model.decoder.logits(params, hidden, jnp.array([3, 5])), 1).mean()

    results = [
        jax.jit(lambda p: zo.scalars(loss, p, (tokens, mask), KEY, num_perturbations=2, mu=1e-3))(tree)
        for tree in (params, apart)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    tolerance = 8 * 2.0**-23 * abs(float(results[0][0])) / 1e-3
    np.testing.assert_allclose(results[0][1], results[1][1], atol=tolerance)
    assert np.abs(results[0][1]).max() > 10 * tolerance


def test_a_deep_model_compiles_as_fast_as_a_shallow_one():
    """A deep model has a program of the same length, because its layers are one scan."""
    lines = {}
    for depth in (2, 32):
        decoder = Decoder(from_transformers({**LLAMA, "num_hidden_layers": depth}), adapters=Adapters())
        shapes = jax.eval_shape(decoder.init, KEY)
        tokens, mask = inputs("left")
        lines[depth] = len(jax.jit(decoder.hidden).lower(shapes, tokens, mask).as_text().splitlines())
    assert lines[32] == lines[2]


# Of each kind of last layer one: biased, with a projection of embeddings, with windows, without rotary embedding.
KINDS = ("opt-350m", "llama", "qwen3", "smollm3-windowed", "gemma3")


@pytest.mark.parametrize("name", [name if name in KINDS else thorough(name) for name in CONFIGS])
def test_the_last_positions_alone_are_those_of_all(name):
    """The last layer computes only these positions, on every architecture, with padding."""
    model = pretrained(name)
    tokens, mask = inputs("left")

    @jax.jit
    def run(*given):
        return model.decoder.hidden(*given), *(model.decoder.hidden(*given, last=last) for last in (1, 3))

    whole, *alone = run(model.params, tokens, mask)
    for found in alone:
        np.testing.assert_allclose(found, whole[:, -found.shape[1] :], atol=2e-6 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("trainable", ["all", "lora", "prefix", "head", "norm"])
def test_what_is_tuned_is_described_alike(trainable):
    model = pretrained()
    adapters = {"lora": Adapters(3, 6.0, ("q_proj",)), "prefix": Adapters(prefix=2)}.get(trainable, Adapters())
    made = tune(model, trainable, lora_rank=3, lora_alpha=6.0, lora_targets=("q_proj",), prefix_tokens=2)
    described = tuned_shapes(Decoder(model.decoder.config), trainable, adapters=adapters)
    assert described.decoder.config == made.decoder.config
    assert described.decoder.adapters == made.decoder.adapters
    for shapes, arrays in ((described.trained, made.trained), (described.frozen, made.frozen)):
        assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
        assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(arrays)]


@pytest.mark.parametrize(
    ("trainable", "adapters", "said"),
    [
        ("lora", Adapters(3, 6.0, ("nothing",)), "lora_targets must be of"),
        ("prefix", Adapters(prefix=10**6), "prefix_tokens must be at least 1"),
        ("nothing", Adapters(), "trainable must be all, lora, prefix, head or a pattern"),
    ],
)
def test_what_cannot_be_tuned_is_not_described(trainable, adapters, said):
    with pytest.raises(ValueError, match=said):
        tuned_shapes(Decoder(pretrained().decoder.config), trainable, adapters=adapters)


def test_published_architectures_have_their_published_sizes():
    millions = {"opt-125m": 125.2, "opt-1.3b": 1315.8, "opt-66b": 65717, "llama-7b": 6738.4, "smollm2-135m": 134.5}
    for name, expected in millions.items():
        shapes = jax.eval_shape(Decoder(SHAPES[name]).init, KEY)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(expected, rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["opt-350m", "llama", "gemma2"])
@pytest.mark.usefixtures("x64")
def test_a_model_moved_along_factors_is_the_one_that_is_made_whole(name):
    """Every kernel and table is read beside its factors; in double precision the scores are the dense ones."""
    model = pretrained(name)
    decoder = dataclasses.replace(model.decoder, dtype=jnp.float64)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params)
    z = zo.Directions(zo.LowRank(2)).at(jax.random.key(3), 0, 0, params)
    tokens = jnp.arange(14).reshape(2, 7) % decoder.config.vocab_size

    def scores(params, columns):
        return decoder.logits(params, decoder.hidden(params, tokens, last=1)[:, 0], columns)

    for columns in (None, jnp.array([2, 5])):
        own = scores(zo.perturb(params, z, 0.1, decoder.perturbed_as), columns)
        whole = scores(zo.perturb(params, z, 0.1), columns)
        assert np.abs(own - scores(params, columns)).max() > 1e-4
        # Scores are float32.
        np.testing.assert_allclose(own, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.usefixtures("x64")
def test_gradients_go_through_the_layer_that_is_read_at_its_last_position(name):
    """First-order methods and diagnoses need derivatives, which are compared with central differences."""
    model, tokens = pretrained(name), jnp.arange(14).reshape(2, 7)
    decoder = dataclasses.replace(model.decoder, dtype=jnp.float64)
    x, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params))
    along, read = jax.random.normal(jax.random.key(3), x.shape), tokens % decoder.config.vocab_size

    def loss(x):
        return (decoder.hidden(unravel(x), read, last=1) ** 2).mean()

    def slope(x):
        return jax.jvp(loss, (x,), (along,))[1]

    gradient, product = jax.jit(lambda x: (jax.grad(loss)(x), jax.jvp(jax.grad(loss), (x,), (along,))[1]))(x)
    ahead, behind = x + 1e-5 * along, x - 1e-5 * along
    assert gradient @ along == pytest.approx(float((loss(ahead) - loss(behind)) / 2e-5), rel=1e-5)
    assert product @ along == pytest.approx(float((slope(ahead) - slope(behind)) / 2e-5), rel=1e-4)
