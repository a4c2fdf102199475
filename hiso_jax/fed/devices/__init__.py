"""The devices of a run: meshes, processes, the execution of a cohort in memory, and the placement of arrays."""

from hiso_jax.fed.devices.execution import (
    Execution,
    ExecutionSettings,
    a_device,
    evaluation_bytes,
    execution_for,
    filled,
    has_convolution,
    in_pieces,
    inner_jaxprs,
    keeps_directions,
    memory_budget,
)
from hiso_jax.fed.devices.layout import Layout, longest_axis, param_shardings, state_shardings
from hiso_jax.fed.devices.mesh import (
    CLIENTS,
    MODEL,
    Part,
    check_mesh,
    make_mesh,
    on_all_devices,
    over_clients,
    put,
    replicated_shardings,
    to_host,
)
from hiso_jax.fed.devices.placement import Described, Placement, owned
from hiso_jax.fed.devices.prng_keys import from_key_data, is_key, key_data
from hiso_jax.fed.devices.processes import agree, all_processes, in_all_processes

__all__ = [
    "CLIENTS",
    "MODEL",
    "Described",
    "Execution",
    "ExecutionSettings",
    "Layout",
    "Part",
    "Placement",
    "a_device",
    "agree",
    "all_processes",
    "check_mesh",
    "evaluation_bytes",
    "execution_for",
    "filled",
    "from_key_data",
    "has_convolution",
    "in_all_processes",
    "in_pieces",
    "inner_jaxprs",
    "is_key",
    "keeps_directions",
    "key_data",
    "longest_axis",
    "make_mesh",
    "memory_budget",
    "on_all_devices",
    "over_clients",
    "owned",
    "param_shardings",
    "put",
    "replicated_shardings",
    "state_shardings",
    "to_host",
]
