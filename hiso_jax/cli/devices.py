"""The devices of a run: on this machine, or shared by the processes of a job."""

import contextlib
import os
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from hiso_jax import fed
from hiso_jax.checks import ParameterError, first_line, integer

# Most virtual devices of a process. Each has its own threads, and a thousand of them crash the process.
MOST_VIRTUAL = 128


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices that a run is split over.

    Attributes:
      devices: devices to split each round's cohort over, counted over all processes, with the same number in each; by
        default one, or with several processes all their devices. Without an accelerator, virtual CPU devices are made.
      model_shards: devices that the parameters are split over, for models too large for one; must divide the number of
        devices.
      distributed: join the other processes of the job, as SLURM, Kubernetes, a TPU pod or Open MPI describe it.
      coordinator: address host:port of process 0, to join processes by hand.
      process_id: index of this process, counted from 0.
      num_processes: number of processes.
    """

    devices: int | None = None
    model_shards: int = 1
    distributed: bool = False
    coordinator: str | None = None
    process_id: int | None = None
    num_processes: int | None = None

    def check_devices(self) -> None:
        """Check every range.

        Raises:
          ValueError: naming the first option out of range.
        """
        if self.devices is not None:
            integer("devices", self.devices, 1)
        integer("model_shards", self.model_shards, 1)
        by_hand = (self.coordinator, self.process_id, self.num_processes)
        if any(given is not None for given in by_hand):
            if None in by_hand:
                raise ParameterError("coordinator", "must be given together with `process_id` and `num_processes`")
            if ":" not in str(self.coordinator):
                raise ParameterError("coordinator", f"must be an address host:port, got {self.coordinator}")
            integer("num_processes", self.num_processes or 0, 1)
            if not 0 <= (self.process_id or 0) < (self.num_processes or 0):
                raise ParameterError(
                    "process_id",
                    f"must be at least 0 and below `num_processes`, {self.num_processes}, got {self.process_id}",
                )

    def join(self) -> None:
        """Make virtual devices if they are needed, and join the job's processes; call it before any use of a device.

        Raises:
          ValueError: the other processes cannot be found.
        """
        if self.devices is not None and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            each = -(-self.devices // (self.num_processes or 1))
            # Without effect once JAX has initialised its devices; an error then names ``devices`` if it is too high.
            if each <= MOST_VIRTUAL:
                with contextlib.suppress(RuntimeError):
                    jax.config.update("jax_num_cpu_devices", each)
        if self.distributed or self.coordinator is not None:
            try:
                jax.distributed.initialize(self.coordinator, self.num_processes, self.process_id)
            except (RuntimeError, ValueError) as error:
                option = "coordinator" if self.coordinator else "distributed"
                raise ParameterError(option, f"led to no other process: {first_line(error)}") from error

    def mesh(self) -> Mesh | None:
        """The mesh that the options describe; None for one device.

        Raises:
          ValueError: there are too few devices, or the shards do not divide them.
        """
        if self.devices is None and self.model_shards == 1 and jax.process_count() == 1:
            return None
        virtual = MOST_VIRTUAL * jax.process_count()
        if jax.default_backend() == "cpu" and (self.devices or 0) > max(virtual, jax.device_count()):
            raise ParameterError("devices", f"must be at most {virtual} where they are virtual, got {self.devices}")
        return fed.make_mesh(self.devices, model_shards=self.model_shards)
