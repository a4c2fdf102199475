"""Reading compiled programs: loops, products, bytes, groups of devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hiso_jax import zo
from hiso_jax.plan import collectives, read, work_of
from hiso_jax.plan.collectives import groups_of
from hiso_jax.plan.hlo import flops_of_function
from hiso_jax.stacked import ONE_TURN


def compiled(function, *arguments):
    return read(jax.jit(function).lower(*arguments).compile().as_text())


def looped(x, weights):
    def turn(x, w):
        return lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=3)[0], None

    return lax.scan(turn, x, weights)[0]


def test_a_loop_in_a_loop_counts_every_turn():
    x, weights = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))
    expected = 5 * 3 * 2 * 8 * 16 * 16
    assert work_of(compiled(looped, x, weights)).flops == expected
    assert flops_of_function(looped, x, weights) == expected


def test_a_convolution_counts_its_window():
    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((5, 5, 3, 4))
    expected = 2 * (2 * 8 * 8 * 4) * (5 * 5 * 3)
    assert work_of(compiled(convolve, x, kernel)).flops == expected
    assert flops_of_function(convolve, x, kernel) == expected


def test_of_a_conditional_the_branch_with_products_counts():
    def choose(which, x):
        return lax.cond(which, lambda x: x @ x, lambda x: x + 1, x)

    assert work_of(compiled(choose, True, jnp.zeros((8, 8)))).flops == 2 * 8**3


def test_a_slice_of_a_stack_is_read_and_not_the_stack():
    """The bytes of a scan over 64 rows are those of reading each row once."""
    rows = jnp.zeros((64, 1024))
    moved = work_of(compiled(lambda a: lax.scan(lambda c, row: (c + row, None), a[0], a)[0], rows)).bytes
    assert 64 * 3 * 4096 <= moved <= 64 * 5 * 4096


def test_pins_are_counted():
    x = jnp.ones(100)
    assert work_of(compiled(lambda x: zo.pin(x * 3) + zo.pin(x * 5), x)).pins == 2
    assert work_of(compiled(lambda x: x * 3 + lax.reduce_precision(x, 5, 10), x)).pins == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [(0, 2), (1, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={0}", [(0, 2), (1, 3)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
        ("replica_groups={}, to_apply=%add", [(0, 1, 2, 3)]),
    ],
)
def test_every_notation_of_groups(text, groups):
    assert groups_of(text, 4) == groups


def test_a_collective_in_a_loop_of_unknown_length_is_refused():
    """The number of its calls is unknown; in a loop that is marked to turn once, it is known."""
    text = """
cond (p: (f32[8])) -> pred[] {
  %p = (f32[8]{0}) parameter(0)
  ROOT %go = pred[] custom-call(%p), custom_call_target="whether"
}
body (q: (f32[8])) -> (f32[8]) {
  %q = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=0
  %sum = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %t = (f32[8]{0}) tuple(%sum)
}
ENTRY main (a: f32[8]) -> (f32[8]) {
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}) tuple(%a)
  ROOT %loop = (f32[8]{0}) while(%s), condition=%cond, body=%body, metadata={op_name="jit(f)/SCOPE/while"}
}
"""
    mesh = SimpleNamespace(size=2, axis_names=("model",), devices=np.empty(2, object))
    with pytest.raises(ValueError, match="a loop of unknown length: sum"):
        list(collectives(read(text.replace("SCOPE", "scan")), mesh))
    (found,) = collectives(read(text.replace("SCOPE", ONE_TURN)), mesh)
    assert (found.kind, found.axes, found.times, found.bytes) == ("all-reduce", ("model",), 1, 32)


def test_an_unknown_notation_is_refused():
    with pytest.raises(ValueError, match="unknown notation"):
        groups_of("replica_groups=whatever", 4)
