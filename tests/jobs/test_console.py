"""What jobs say when they are done."""

from __future__ import annotations

import pytest

from jobs import console


def test_what_a_run_did_is_told_from_what_the_table_holds(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"documents": 12, "table_documents": 3456, "table_quarantine": 7, "table_quarantine.pii": 7, "failed": 0}
    console.done("ingest", "succeeded", counts)
    console.unchanged("ingest", {"table_documents": 3456})
    assert capsys.readouterr().out.splitlines() == [
        "ingest: succeeded (documents 12, documents in all 3,456, quarantine in all 7)",
        "ingest: unchanged; the lake has documents 3,456",
    ]
