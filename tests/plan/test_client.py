"""The memory of one client."""

import jax

from hiso_jax import plan, tasks


def test_local_steps_need_copies_and_the_activations_of_a_batch():
    task = tasks.digits()
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
    small, large = plan.training_bytes(task, 4), plan.training_bytes(task, 64)
    # The server's parameters, the client's own, and the sum of its gradients.
    assert small > 3 * parameters
    # 60 more examples, 64 pixels and a label each, in two batches; a backward pass also keeps 32 hidden values and 10
    # logits of each.
    assert large - small > 60 * 4 * (2 * (64 + 1) + 32 + 10)
