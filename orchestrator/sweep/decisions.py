"""The decision log of a sweep: everything it has decided, and what it decided from, in order.

`<storage>/sweeps/<name>-<fingerprint>/decisions.jsonl` is only ever added to, and each line is on
the disk before it is acted on. By `kind`:

suggest   trial, values: what the searcher chose for the space's fields
start     trial, run (its directory, relative to the storage), fingerprint, steps, evaluate_every
          (in steps)
result    trial, step, metrics of an evaluation
decide    trial, step, action (continue, stop, exploit), why; exploit: from (the donor), values
end       trial, status (finished, stopped, failed, invalid, nan), metrics of the last result, error

A trial that exploits starts again, in another run: its later results belong to its last start.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.files import sync
from orchestrator.runs.run import append_journal

Entry = dict[str, Any]

_FILE = "decisions.jsonl"


def read(sweep_dir: Path) -> list[Entry]:
    """All entries, in order; a line that a power cut left in pieces is passed over."""
    try:
        text = (sweep_dir / _FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    entries = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def add(sweep_dir: Path, entry: Entry) -> None:
    """Add an entry; it is on the disk when this returns.

    Raises:
        OSError: it is not, and nothing of it is.
    """
    append_journal(sweep_dir / _FILE, entry)
    sync(sweep_dir / _FILE)
