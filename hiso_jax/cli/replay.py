"""``hiso-jax replay``: rebuild a run from its scalars."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.cli import errors
from hiso_jax.cli.arguments import Positional
from hiso_jax.cli.pytree_io import write_tree
from hiso_jax.cli.restore import Again, base_of, options_of, rebuild, recorded
from hiso_jax.fed.ledger import differences, exists
from hiso_jax.reports import human_seconds, print_rows


@dataclass(frozen=True, kw_only=True)
class Replay(Again):
    """Rebuild the parameters, curvature and optimizer state of a run from its ledger, bit for bit.

    Attributes:
      run: directory of the run.
      to_round: rounds to replay; by default all.
      unfinished: accept a run that has not finished, and replay the rounds that it has.
      model: where the base checkpoint is now; by default where it was.
      out: safetensors file to write parameters and optimizer state to; by default no file is written.
    """

    run: Annotated[Path, Positional]
    to_round: int | None = None
    unfinished: bool = False
    model: str | None = None
    out: Path | None = None


def replay(options: Replay, console: Console) -> int:
    """Replay, report, and return the exit code.

    Raises:
      UsageError: the run cannot be read, has too few rounds, or began with another model than the one found.
    """
    with errors.refusing():
        ledger = recorded(options.run, unfinished=options.unfinished)
        total = len(ledger.rows)
        until = total if options.to_round is None else options.to_round
        if not 0 <= until <= total:
            raise ParameterError("to_round", f"must be between 0 and the {total} rounds of the ledger, got {until}")
        if options.out is not None and exists(options.out):
            raise ParameterError("out", f"must be a file that does not exist yet; {options.out} does")
        about = ledger.header["about"] | ({} if options.model is None else {"model": options.model})
        run = options_of(about, options.again)
        base = base_of(run, ledger.header["base"], "model")
        begin = time.perf_counter()
        params, state = rebuild(run, base, ledger.records.updates_with_losses.between(0, until))
        seconds = time.perf_counter() - begin
    digest = fed.fingerprint(params)
    known = ledger.checks.get(until)
    elsewhere = [differs for each in ledger.all_environments if (differs := differences(each))]
    verdict = "equal to the run's, bit for bit" if digest == known else "not the run's to the last bit"
    if known is None:
        verdict = "no SHA-256 was noted after this round: a run notes one at every evaluation, and at its end"
    elif digest != known and elsewhere:
        verdict += f", which was made elsewhere: {'; '.join(elsewhere[0])}"
    rows = {
        "rounds": f"{until:,} of {total:,}",
        "seconds": f"{seconds:.2f}, compiling included",
        "parameters": f"SHA-256 {digest}",
        "": verdict,
    }
    if ledger.seal is not None and until == total:
        rows["seconds"] += f"; the rounds took the run {human_seconds(ledger.seal['seconds'])}"
    if options.out is not None:
        with errors.refusing():
            write_tree({"params": params, "state": state}, options.out)
        rows["written to"] = str(options.out)
    print_rows(console, rows)
    if known not in (None, digest) and not elsewhere:
        raise errors.UsageError(
            f"{options.run}: the replay is not the run to the last bit, though the backend, jaxlib and the flags are "
            "the run's: the processor may be another"
        )
    return errors.DONE
