"""``hiso-jax export`` and ``hiso-jax apply``: a fine-tuned model as a small delta, or as a folder for transformers."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from rich.console import Console

from hiso_jax import algorithms, fed
from hiso_jax.checks import ParameterError
from hiso_jax.choices import is_foreign
from hiso_jax.cli import errors
from hiso_jax.cli.arguments import Positional
from hiso_jax.cli.pytree_io import read_tree, write_tree
from hiso_jax.cli.restore import Again, base_of, options_of, rebuild, recorded
from hiso_jax.experiment import choice_of, is_language_model
from hiso_jax.fed.ledger import Delta, bytes_a_round, delta_of, exists, load_delta, save_delta
from hiso_jax.fed.ledger import sample as take_sample
from hiso_jax.reports import human_bytes, print_rows
from hiso_jax.tasks.named import Base

# Options that are places on the machine of the run, which are private; a delta leaves them out.
LOCAL = ("data_dir", "out", "resume", "trace")


@dataclass(frozen=True, kw_only=True)
class Export(Again):
    """Write the model of a run: a delta of its scalars, a complete model for transformers, or adapters for PEFT.

    Attributes:
      run: directory of the run.
      format: delta, one small file of scalars and fingerprints; hf, a folder with weights, config and tokenizer; or
        peft, a folder with the low-rank adapters of --trainable lora.
      unfinished: accept a run that has not finished, and export the rounds that it has.
      out: file or folder to write; by default delta.safetensors, hf or peft in the run's directory.
      model: where the base checkpoint is now, for hf and peft; by default where it was.
    """

    run: Annotated[Path, Positional]
    format: Literal["delta", "hf", "peft"] = "delta"
    unfinished: bool = False
    out: Path | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Apply(Again):
    """Rebuild the model of a delta from its base checkpoint, and write it.

    Attributes:
      delta: file that hiso-jax export wrote.
      base: checkpoint that the run began with, as --model takes it; not needed for embedded models; for a run made from
        Python, a safetensors file of its initial parameters.
      out: folder to write for transformers; a safetensors file for a model that is not a language model.
      algorithm: FILE:NAME of the delta's method, needed if that is user code; for a run made from Python, FILE:NAME of
        its optimizer.
      expect_sha256: SHA-256 of the delta's file, from a source that you trust: a file's own digests do not tell who
        wrote it.
      accept_difference: write the model even if it is not the run's to the last bit, and tell how far apart they are.
    """

    delta: Annotated[Path, Positional]
    base: str | None = None
    out: Path
    expect_sha256: str | None = None
    accept_difference: bool = False


def export(options: Export, console: Console) -> int:
    """Write the delta or the folder, and return the exit code.

    Raises:
      UsageError: the run cannot be read, or cannot be written in this format.
    """
    with errors.refusing():
        ledger = recorded(options.run, unfinished=options.unfinished)
        if not len(ledger.rows):
            raise ValueError(f"{options.run} has no rounds to export")
        default = "delta.safetensors" if options.format == "delta" else options.format
        out = _fresh(options.out or options.run / default)
        about = ledger.header["about"]
        if options.format == "delta":
            for name, value in {"model": options.model, **options.again}.items():
                if value is not None:
                    raise ParameterError(
                        name, "is read with `format` hf or peft; a delta names no code and no checkpoint"
                    )
            return _export_delta(delta_of(ledger, _without_places(about)), out, console)
        run = options_of(about | ({} if options.model is None else {"model": options.model}), options.again)
        if not is_language_model(choice_of("task", run)):
            raise ParameterError("format", f"must be delta for {run.task}: transformers has no such model")
        base = base_of(run, ledger.header["base"], "model")
        if options.format == "peft":
            from hiso_jax.models.lm import check_adapters

            check_adapters(base.tuned)
        known = Known(ledger.checks.get(len(ledger.rows)), None, True)
        given = run, base, ledger.records.updates_with_losses, known, out, console
        _write_model(*given, is_adapter=options.format == "peft")
    return errors.DONE


def apply(options: Apply, console: Console) -> int:
    """Rebuild the model, write it, and return the exit code.

    Raises:
      UsageError: the delta is altered, the base is another one, or the model cannot be written.
    """
    with errors.refusing():
        delta = load_delta(options.delta, expect_sha256=options.expect_sha256)
        out = _fresh(options.out)
        if not isinstance(delta.header["about"].get("algorithm"), str):
            return _apply_own(options, delta, console)
        run = options_of(delta.header["about"], options.again)
        if is_language_model(choice_of("task", run)):
            if options.base is None:
                raise ParameterError("base", f"must be the checkpoint that the run began with, {run.model} there")
            run = replace(run, model=options.base)
        elif options.base is not None:
            raise ParameterError(
                "base", f"must not be given for {run.task}, whose network is in the package; got {options.base}"
            )
        base = base_of(run, delta.header["base"], "base")
        known = Known(delta.header["params_sha256"], delta.header.get("sample"), options.accept_difference)
        _write_model(run, base, delta.updates, known, out, console)
    return errors.DONE


def _apply_own(options: Apply, delta: Delta, console: Console) -> int:
    """Apply the delta of a run made from Python; the user gives its optimizer and its initial parameters."""
    for option in ("algorithm", "base"):
        if getattr(options, option) is None:
            raise ParameterError(
                option,
                "must be given: the run was made from Python, so that --algorithm FILE:NAME has to name its "
                "optimizer, and --base a safetensors file of its initial parameters",
            )
    assert options.base is not None
    assert options.algorithm is not None
    tx, base = algorithms.load_value(options.algorithm), read_tree(Path(options.base), "base")
    params = fed.apply_delta(delta, base, tx, accept_difference=options.accept_difference)
    write_tree(params, options.out)
    rows = {
        "rounds": f"{delta.header['rounds']:,}",
        "parameters": f"SHA-256 {fed.fingerprint(params)}",
        "written to": str(options.out),
    }
    print_rows(console, rows)
    return errors.DONE


class Known(NamedTuple):
    """Known facts about the model to rebuild.

    Attributes:
      sha256: SHA-256 of its parameters, or None.
      sample: some of its parameters, or None.
      accept_difference: whether a model that differs is written, too.
    """

    sha256: str | None
    sample: list[float] | None
    accept_difference: bool


def _fresh(out: Path) -> Path:
    if exists(out):
        raise ParameterError("out", f"must not exist yet; {out} does")
    return out


def _apart(params: Any, sample: list[float] | None) -> str:
    """A clause that tells how far ``params`` are from the parameters of the run."""
    if sample is None:
        return "how far apart they are is not known"
    here, there = np.array(take_sample(params)), np.array(sample)
    if here.shape != there.shape:
        return "they are not of one size"
    size, most = np.sqrt(np.mean(there**2)), np.abs(here - there).max()
    return (
        f"of {len(there)} of them, evenly spread, the farthest is off by {most:.2g}, their root mean square {size:.2g}"
    )


def _without_places(about: Mapping[str, Any]) -> dict[str, Any]:
    # The record of the rate's search shows the clients' losses, which are not for others.
    kept = {name: None if name in LOCAL else value for name, value in about.items() if name != "probe"}
    return {name: _without_place(value, name == "model") for name, value in kept.items()}


def _without_place(value: Any, keeps_name: bool) -> Any:
    """A value without folders: a checkpoint's or user code's name without its path, and no other absolute path."""
    if not isinstance(value, str):
        return value
    source, colon, attribute = value.rpartition(":")
    if is_foreign(value):
        return f"{Path(source).name}{colon}{attribute}"
    if not Path(value).is_absolute():
        return value
    return Path(value).name if keeps_name else None


def _export_delta(delta: Delta, out: Path, console: Console) -> int:
    try:
        size = save_delta(delta, out)
    except OSError as error:
        raise ParameterError("out", f"cannot be written: {out} ({error.strerror})") from error
    rounds = delta.header["rounds"]
    rows = {
        "rounds": f"{rounds:,}",
        "size": f"{human_bytes(size)}; {human_bytes(1000 * bytes_a_round(delta))} for each 1,000 rounds",
        "base": f"SHA-256 {delta.header['base']['trained']}",
        "file": f"SHA-256 {hashlib.sha256(out.read_bytes()).hexdigest()}, for hiso-jax apply --expect-sha256",
        "written to": str(out),
    }
    print_rows(console, rows)
    return errors.DONE


def _write_model(
    run: Any,
    base: Base,
    updates: fed.Updates,
    known: Known,
    out: Path,
    console: Console,
    *,
    is_adapter: bool = False,
) -> None:
    params, _ = rebuild(run, base, updates)
    rebuilt = fed.fingerprint(params)
    verdict = "" if known.sha256 is None else ", the run's"
    if known.sha256 not in (None, rebuilt):
        apart = _apart(params, known.sample)
        if not known.accept_difference:
            raise ValueError(
                f"the model is not the run's to the last bit: its parameters have SHA-256 {rebuilt}, the run's "
                f"{known.sha256}; {apart}. Nothing is written; --accept-difference writes it all the same"
            )
        verdict = f", not the run's to the last bit: {apart}"
    if base.tuned is None:
        write_tree(params, out)
    else:
        from hiso_jax.models.lm import save_adapters, save_pretrained

        # The folder gets its name once it is complete.
        half = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            files = (save_adapters if is_adapter else save_pretrained)(base.pretrained, base.tuned, params, half)
            os.replace(half, out)
        except OSError as error:
            raise ParameterError("out", f"cannot be written: {out} ({error.strerror})") from error
        finally:
            shutil.rmtree(half, ignore_errors=True)
        files = [out / file.name for file in files]
    rows = {"rounds": f"{len(updates.round):,}", "parameters": f"SHA-256 {rebuilt}{verdict}"}
    if base.tuned is not None:
        rows["weights"] = f"{human_bytes(sum(file.stat().st_size for file in files))} in {len(files)} files"
    rows["written to"] = str(out)
    print_rows(console, rows)
