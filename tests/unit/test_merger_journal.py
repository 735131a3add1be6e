"""Notes of clones and migrations that are under way."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from samepage_merger.cluster.journal import Journal, Note


def test_notes_of_an_older_version_are_read(tmp_path: Path) -> None:
    note = Note("host-b", "ab" * 16, leaving=True, source_store="cd" * 16, source_number=3)
    journal = Journal(tmp_path)
    journal.write(note)
    (path,) = tmp_path.iterdir()
    fields = asdict(note)
    for name in ("source_pid", "source_inode", "source_namespace"):
        del fields[name]
    path.write_text(json.dumps(fields))
    assert journal.read() == [note]
    journal.forget(note)
    assert not journal.read()
