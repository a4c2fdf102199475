"""The memory of one client."""

import jax

from hiso_jax import plan, tasks


def test_local_steps_need_copies_and_the_activations_of_a_batch():
    task = tasks.digits()
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
    small, large = plan.client_memory(task, 4), plan.client_memory(task, 64)
    for found in (small, large):
        assert parameters < found.inference
        # The server's parameters, the client's own, and the sum of its gradients.
        assert found.training > 3 * parameters
    # A backward pass keeps activations, so each example needs more.
    assert large.training - small.training > large.inference - small.inference > 0
