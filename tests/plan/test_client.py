"""The memory of one client."""

import jax

from hiso_jax import plan, tasks


def test_a_gradient_needs_the_activations_of_its_batch():
    task = tasks.digits()
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
    small, large = plan.client_memory(task, 4), plan.client_memory(task, 64)
    for found in (small, large):
        # At least the parameters, and for training the gradient beside them.
        assert parameters < found.inference < found.training
        assert found.training > 2 * parameters
    # The rest grows with the batch.
    assert large.training - large.inference > 4 * (small.training - small.inference - parameters)
