"""Check that a long run, and many runs in one process, leak neither memory nor file descriptors.

python -m tests.endurance            # 20,000 rounds; 50 simulations
"""

import gc
import os
import resource
import tempfile
from pathlib import Path

import hiso_jax
from hiso_jax import fed
from tests.fed.problems import digits_population, linear_task


def resident() -> int:
    """Bytes of this process in memory now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors() -> int:
    """The number of files that this process holds open."""
    return len(os.listdir("/proc/self/fd"))


def simulation(folder: Path, rounds: int, watch: list[tuple[int, int]]) -> fed.Simulation:
    config = fed.SimulationConfig(rounds=rounds, cohort=5, perturbations=3, batch_size=8, eval_every=500)

    def note(session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        if evaluation:
            watch.append((session.round, resident()))

    storage = fed.Storage(folder, snapshot_every=2000)
    return fed.Simulation(
        linear_task(), hiso_jax.hiso(0.01), digits_population(), config, storage=storage, callbacks=[fed.Callback(note)]
    )


def main(rounds: int = 20_000, runs: int = 50) -> None:
    """Print the growth of memory, and fail if it is more than 2 % or a descriptor was left open."""
    with tempfile.TemporaryDirectory() as name:
        watch: list[tuple[int, int]] = []
        result = simulation(Path(name) / "long", rounds, watch).run()
        assert result.rounds == rounds
        # A run keeps its log in memory, with one row for each round.
        row = fed.load(Path(name) / "long").layout.dtype.itemsize
        first, last = watch[len(watch) // 4], watch[-1]
        kept = (last[0] - first[0]) * row
        growth = (last[1] - first[1] - kept) / first[1]
        print(
            f"round {first[0]}: {first[1] / 1e6:.1f} MB, round {last[0]}: {last[1] / 1e6:.1f} MB, of which its log "
            f"{kept / 1e6:.1f} MB"
        )
        print(f"growth beside the log: {100 * growth:.2f} %")
        simulation(Path(name) / "first", 10, []).run()
        before = descriptors()
        for number in range(runs):
            simulation(Path(name) / f"{number}", 10, []).run()
        print(f"{before} descriptors before {runs} simulations, {descriptors()} after")
        assert descriptors() <= before
        assert abs(growth) <= 0.02


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
