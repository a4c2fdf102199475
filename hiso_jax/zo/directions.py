"""Search directions z = H^{-1/2} ⊙ u from keys and raw perturbations u (HiSo, arXiv 2506.02370, Algorithm 1).

Only this module assigns keys to directions.

Directions are made leaf by leaf and are never needed dense. The values of a leaf depend only on its key, so that any
party, device or layer can make just the part that it holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax import checks
from hiso_jax.checks import ParameterError
from hiso_jax.exact import pin
from hiso_jax.factored import Factors, PerturbedAs, PerturbedParameter, added, dense, is_factors
from hiso_jax.stacked import Layers, Stacked, is_stacked, path_name
from hiso_jax.zo.partitioned import split_as
from hiso_jax.zo.samplers import Blocks, Hadamard, LowRank, Sampler, Subspace, as_sampler, gaussian
from hiso_jax.zo.threefry import fold_in


def perturbation_key(round_key: Key[Array, ""], step: ArrayLike, index: ArrayLike) -> Key[Array, ""]:
    """The key of perturbation ``index`` of local step ``step``: two nested ``fold_in``.

    Args:
      round_key: the key of the round, a typed scalar key.
      step: local step k, 0 ≤ k < K.
      index: perturbation p, 0 ≤ p < P.

    Raises:
      ValueError: the key's generator is unsafe_rbg, see :func:`check_generator`.
    """
    check_generator(round_key)
    return fold_in(fold_in(round_key, step), index)


def check_generator(key: Key[Array, ""]) -> None:
    """Refuse keys for which the order of nested ``fold_in`` calls makes no difference.

    ``unsafe_rbg`` XORs a key with the folded number: direction 1 of local step 0 would equal direction 0 of local step
    1, and client 3 in round 5 would draw the values of client 5 in round 3.

    Raises:
      ValueError: the key's generator is unsafe_rbg.
    """
    if str(jax.random.key_impl(key)) == "unsafe_rbg":
        raise ValueError(
            "jax_default_prng_impl must be threefry2x32 or rbg, not unsafe_rbg: its keys fold in numbers without an "
            "order, so that directions of different steps and rounds would coincide"
        )


def working_dtype(leaf: Array | jax.ShapeDtypeStruct) -> jnp.dtype:
    """The dtype of draws, curvature and updates of ``leaf``: promote_types(leaf dtype, float32)."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def draw_leaves(
    key: Key[Array, ""], tree: PyTree[Shaped[Array, "..."]], draw: Callable[[Any, Sequence[int], Any], Any]
) -> list[Any]:
    """One draw for each leaf, in leaf order; :class:`~hiso_jax.factored.Factors` count as one leaf.

    Leaf i draws from ``fold_in(key, i)``, where i counts unstacked leaves: a leaf of a
    :class:`hiso_jax.stacked.Stacked` is drawn layer by layer, by a vmap over the keys of its layers.

    Args:
      key: the key of all leaves.
      tree: the leaves; only their shapes and dtypes are read.
      draw: (leaf key, shape, leaf) → the leaf's draw.
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: is_stacked(node) or is_factors(node))
    counts = [len(leaves_of(node)) * (node.depth if isinstance(node, Stacked) else 1) for node in nodes]
    # One hash makes the keys of all leaves, because every separate fold_in is another program to compile.
    # Barriers then separate the leaves' keys: XLA for GPUs fuses operations that read one array, and would hold the
    # draws of all leaves at once.
    keys = jax.vmap(fold_in, (None, 0))(key, jnp.arange(sum(counts)))
    drawn, first = [], 0
    for node, count in zip(nodes, counts, strict=True):
        if isinstance(node, Stacked):
            leaves = leaves_of(node)
            for place, leaf in enumerate(leaves):
                own = lax.optimization_barrier(keys[first + place : first + count : len(leaves)])
                drawn.append(jax.vmap(lambda layer_key, leaf=leaf: draw(layer_key, leaf.shape[1:], leaf))(own))
        else:
            drawn.append(draw(lax.optimization_barrier(keys[first]), node.shape, node))
        first += count
    return drawn


def leaves_of(tree: PyTree) -> list[Any]:
    """The leaves of a direction or a curvature; factors count as leaves."""
    return jax.tree.leaves(tree, is_leaf=is_factors)


def made_dense(tree: PyTree) -> PyTree[Shaped[Array, "..."]]:
    """A direction or a curvature with every leaf as a dense array."""
    return jax.tree.map(dense, tree, is_leaf=is_factors)


def direction(
    key: Key[Array, ""],
    params: PyTree[Shaped[Array, "..."]],
    curvature: PyTree[Shaped[Array, "..."]] | None = None,
    sampler: Sampler | str | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """One search direction z = H^{-1/2} ⊙ u (HiSo, Algorithm 1), in the structure of ``params``.

    Args:
      key: a perturbation key; leaf i of ``jax.tree.leaves(params)`` draws from ``fold_in(key, i)``, and each layer
        of a leaf in a :class:`hiso_jax.stacked.Stacked` counts as a leaf.
      params: the trainable parameters; only their shapes and dtypes are read.
      curvature: H in the structure of ``params``, or None for H = 1.
      sampler: the family of raw perturbations; None means :func:`gaussian`.

    Returns:
      z with the shapes of ``params``, in :func:`working_dtype`.
    """
    return made_dense(_direction(key, params, curvature, as_sampler(sampler)))


def _direction(key: Key[Array, ""], params: PyTree, curvature: PyTree | None, family: Sampler) -> PyTree:
    """:func:`direction` with low-rank leaves as factors."""

    def draw(leaf_key: Any, shape: Sequence[int], leaf: Array) -> Array | Factors:
        dtype = working_dtype(leaf)
        if isinstance(family, LowRank | Subspace) and family.splits(shape):
            if isinstance(family, Subspace) and curvature is None:
                return family(leaf_key, shape, dtype)
            return family.factors(leaf_key, shape, dtype)
        # Pinned: in some programs XLA would move the constant factors of a draw into later products.
        drawn = family(leaf_key, shape, dtype)
        if getattr(drawn, "shape", None) != tuple(shape):
            got = getattr(drawn, "shape", type(drawn).__name__)
            raise ParameterError(
                "sampler", f"must return an array of the shape it is asked for, {tuple(shape)}; got {got}"
            )
        return pin(jnp.asarray(drawn).astype(dtype))

    if curvature is not None:
        # Tied to the key: in a loop over keys XLA would compute every square root before the loop and keep them all.
        curvature, key = lax.optimization_barrier((curvature, key))
    leaves = zip(jax.tree.leaves(params), draw_leaves(key, params, draw), strict=True)
    z = [u if isinstance(u, Factors) else split_as(x, u) for x, u in leaves]
    if isinstance(family, Blocks):
        if curvature is None:
            raise ParameterError("sampler", "must not be Blocks without a head that keeps the norms of the leaves")
        scales = family.scales(key, leaves_of(curvature))
        z = [pin(dense(u) * scale) for u, scale in zip(z, scales, strict=True)]
    elif curvature is not None:
        by = _in_subspace if isinstance(family, Subspace) else shaped
        z = [by(u, h) for u, h in zip(z, leaves_of(curvature), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), z)


def _in_subspace(u: Array | Factors, basis: Array) -> Array | Factors:
    """B Qᵀ as factors; a leaf that is not a matrix stays unchanged."""
    return Factors(u.rows, basis, u.own) if isinstance(u, Factors) else u


def subspaces(key: Key[Array, ""], params: PyTree[Shaped[Array, "..."]], rank: int) -> PyTree[Float[Array, "..."]]:
    """Random orthonormal bases for :class:`~hiso_jax.zo.Subspace`, uniform over all subspaces.

    Args:
      key: the key of all bases.
      params: the trainable parameters; only their shapes and dtypes are read.
      rank: r.

    Returns:
      Q [C, r] for every matrix with last axis C, after a leading axis of layers if they are stacked; 1 for all other
      leaves.
    """

    def basis(leaf_key: Any, shape: Sequence[int], leaf: Array) -> Array:
        dtype = working_dtype(leaf)
        if len(shape) < 2 or 0 in shape:
            return jnp.ones([], dtype)
        q, r = jnp.linalg.qr(pin(gaussian(leaf_key, (shape[-1], min(rank, shape[-1])), dtype)))
        # The bases are uniform only with the signs of R's diagonal; otherwise the QR routine chooses the signs.
        return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)[None]

    return jax.tree.unflatten(jax.tree.structure(params), draw_leaves(key, params, basis))


def shaped(u: Array | Factors, h: Array | Factors) -> Array | Factors:
    """H^{-1/2} ⊙ u, as factors if u and H are factors."""

    # A square root and a division, each correctly rounded, so that H = 1 returns u to the last bit and HiSo at
    # decay 1 is DeComFL exactly. Without the inner pin XLA replaces them by u · rsqrt(h), which is approximate.
    def by_root(u: Array, h: Array) -> Array:
        return u / pin(jnp.sqrt(h.astype(u.dtype)))

    if isinstance(u, Factors) and isinstance(h, Factors):
        return Factors(pin(by_root(u.rows, h.rows)), pin(by_root(u.columns, h.columns)), u.own)
    return by_root(dense(u), dense(h))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Directions:
    """The rule from (round key, local step, index) to a direction; it holds no arrays and is compared by value.

    It is part of the optimizer's state, so that measurement and update cannot use different directions.

    Attributes:
      sampler: the family of raw perturbations.
      key: the key rule, (round key, step k, index p) → the key of a direction.
      groups: G, the number of groups of a cohort: its c-th client is in group c mod G and measures along the
        directions of its group (see ``zo/groups.py``). 1 is one set for all clients; None gives every client its own.
      block: B, the number of coordinates whose signs are flipped together to distinguish the directions of groups;
        None is the largest power of two ≤ min(64, d / (8·G)); 0 draws every group's directions independently, at G
        times the cost.

    Raises:
      ValueError: ``groups`` < 1, or ``block`` is negative.
    """

    sampler: Sampler = gaussian
    key: Callable[[Key[Array, ""], ArrayLike, ArrayLike], Key[Array, ""]] = perturbation_key
    groups: int | None = 1
    block: int | None = None

    def __post_init__(self) -> None:
        """Check every range."""
        if self.groups is not None:
            checks.integer("groups", self.groups, 1)
        if self.block is not None:
            checks.integer("block", self.block, 0)
        if isinstance(self.sampler, Hadamard):
            if self.block:
                raise ParameterError(
                    "direction_blocks", "must not be given with `sampler` hadamard, whose groups have their own signs"
                )
            if self.key is not perturbation_key:
                raise ParameterError("sampler", "must not be hadamard for directions from a pool")

    def groups_of(self, clients: int) -> int:
        """G for a cohort of ``clients`` clients.

        Raises:
          ValueError: there are fewer clients than groups.
        """
        if self.groups is not None and self.groups > clients:
            raise ParameterError("groups", f"must be at most the clients of a round, {clients}, got {self.groups}")
        return clients if self.groups is None else self.groups

    def at(
        self,
        round_key: Key[Array, ""],
        step: ArrayLike,
        index: ArrayLike,
        params: PyTree[Shaped[Array, "..."]],
        curvature: PyTree[Shaped[Array, "..."]] | None = None,
    ) -> PyTree[Shaped[Array, "..."]]:
        """The direction, see :func:`direction`; low-rank leaves stay factors."""
        return _direction(self.key(round_key, step, index), params, curvature, self.sampler)


def as_directions(sampler: "Directions | Sampler | str | None") -> Directions:
    """The directions of a sampler, given as a value or by name, new in every round; None means gaussian.

    Raises:
      ValueError: the name is unknown.
    """
    return sampler if isinstance(sampler, Directions) else Directions(as_sampler(sampler))


def perturb(
    params: PyTree[Shaped[Array, "..."]],
    z: PyTree[Shaped[Array, "..."]],
    scale: ArrayLike,
    perturbed_as: PerturbedAs | None = None,
) -> PyTree:
    """``params + scale · z``, added in the wider dtype and then cast to the dtype of the parameters.

    Stacked layers are perturbed one at a time, inside the model's scan over them: a :class:`hiso_jax.stacked.Layers`
    replaces a :class:`hiso_jax.stacked.Stacked`, and no perturbed copy of all layers exists.

    Args:
      params: the parameters.
      z: a direction.
      scale: the distance along the direction.
      perturbed_as: which parameters the model reads as a :class:`hiso_jax.factored.PerturbedParameter`. A matrix
        becomes one if its direction has factors; an embedding table always does, because few of its rows are read.
    """

    def leaf(path: tuple[Any, ...], x: Array, u: Array | Factors) -> Array | PerturbedParameter:
        kind = None if perturbed_as is None else perturbed_as(path_name(path))
        if kind == "table" or (kind == "matrix" and isinstance(u, Factors)):
            return PerturbedParameter(x, u, jnp.asarray(scale, u.dtype))
        return added(x, dense(u), scale)

    def node(path: tuple[Any, ...], x: Any, u: Any) -> Any:
        if not isinstance(x, Stacked):
            return leaf(path, x, u)

        def opened(layer: tuple[PyTree, PyTree]) -> PyTree:
            return jax.tree_util.tree_map_with_path(lambda inner, *own: leaf((*path, *inner), *own), *layer)

        return Layers((x.layers, u.layers), opened)

    return jax.tree_util.tree_map_with_path(node, params, z, is_leaf=is_stacked)


def shares_matmuls(params: PyTree, z: PyTree, perturbed_as: PerturbedAs | None) -> bool:
    """Whether :func:`perturb` makes no matrix dense, so that all groups of a cohort share the products with weights.

    Args:
      params: the parameters; only their shapes and paths are read.
      z: a direction; only its shapes and paths are read.
      perturbed_as: as in :func:`perturb`.
    """

    def rides_at(path: tuple[Any, ...], axes: int, u: Any) -> bool:
        known = perturbed_as is not None and perturbed_as(path_name(path)) is not None
        return axes < 2 or (known and isinstance(u, Factors))

    def node(path: tuple[Any, ...], x: Any, u: Any) -> PyTree:
        if not isinstance(x, Stacked):
            return rides_at(path, x.ndim, u)
        return jax.tree_util.tree_map_with_path(
            lambda inner, own, v: rides_at((*path, *inner), own.ndim - 1, v), x.layers, u.layers
        )

    return all(jax.tree.leaves(jax.tree_util.tree_map_with_path(node, params, z, is_leaf=is_stacked)))
