"""The records of a run: a ledger of its rounds, snapshots and deltas, and the replay that rebuilds the model."""

from hiso_jax.fed.ledger.delta import Delta, apply_delta, bytes_a_round, delta_of, load_delta, save_delta
from hiso_jax.fed.ledger.files import exists, links_in, read_regular, sync_directory, write_file
from hiso_jax.fed.ledger.fingerprint import base_fingerprints, contents, fingerprint, sample
from hiso_jax.fed.ledger.frames import Lost
from hiso_jax.fed.ledger.ledger import FileLedger, Ledger, salvage
from hiso_jax.fed.ledger.reading import LEDGER, LedgerFile, load
from hiso_jax.fed.ledger.records import Evaluation, Records, RoundRecord, Updates
from hiso_jax.fed.ledger.replay import replay
from hiso_jax.fed.ledger.run_store import RunStore, run_store_of
from hiso_jax.fed.ledger.same import EXECUTION, header_of
from hiso_jax.fed.ledger.schema import read_json
from hiso_jax.fed.ledger.seed_sums import add_sums, pack_sums, sums_bytes
from hiso_jax.fed.ledger.storage import Storage, differences, lock

__all__ = [
    "EXECUTION",
    "LEDGER",
    "Delta",
    "Evaluation",
    "FileLedger",
    "Ledger",
    "LedgerFile",
    "Lost",
    "Records",
    "RoundRecord",
    "RunStore",
    "Storage",
    "Updates",
    "add_sums",
    "apply_delta",
    "base_fingerprints",
    "bytes_a_round",
    "contents",
    "delta_of",
    "differences",
    "exists",
    "fingerprint",
    "header_of",
    "links_in",
    "load",
    "load_delta",
    "lock",
    "pack_sums",
    "read_json",
    "read_regular",
    "replay",
    "run_store_of",
    "salvage",
    "sample",
    "save_delta",
    "sums_bytes",
    "sync_directory",
    "write_file",
]
