"""The first law of ingest, without Spark: documents + quarantined = records, whatever the formats and their state."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ingest.config import SourceConfig
from pipelines.ingest.listing import list_source
from pipelines.ingest.read import Reading, read_entry
from pipelines.tables import QUARANTINE_REASONS
from tests.pipelines.ingest import tree


def count(folder: Path) -> tuple[int, int, bool]:
    """Documents, quarantined records and whether all was read whole, of a folder; each record's form checked."""
    documents = quarantined = 0
    complete = True
    source = SourceConfig(path=str(folder)).resolved()
    for entry in list_source(0, source).entries:
        reading = Reading()
        outcomes = list(read_entry(source, entry, tree.LIMIT, reading))
        assert reading.records == len(outcomes)
        assert len({outcome.location for outcome in outcomes}) == len(outcomes)
        for outcome in outcomes:
            assert (outcome.content is None) == (outcome.problem is not None)
            assert outcome.problem is None or outcome.problem.reason in QUARANTINE_REASONS
        documents += sum(outcome.problem is None for outcome in outcomes)
        quarantined += sum(outcome.problem is not None for outcome in outcomes)
        complete &= reading.complete
    return documents, quarantined, complete


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9))
def test_counts_add_up_for_every_mix_of_formats(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = tree.grow(Path(folder), random.Random(seed))
        documents, quarantined, _ = count(Path(folder))
        assert documents + quarantined == records


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9), at=st.floats(0, 1), damage=st.sampled_from(["cut", "overwritten"]))
def test_a_damaged_file_is_never_silent(seed: int, at: float, damage: str) -> None:
    """A packed file that is cut or overwritten, anywhere, says that it breaks."""
    rng = random.Random(seed)
    ending = rng.choice(["jsonl", "warc"])
    data, records = tree.FORMATS[ending][0](rng)
    pack = rng.choice([".gz", ".zst"])
    # Noise, so that there is something to cut: one record that is a document.
    noise = b'{"text": "%s"}\n' % rng.randbytes(400).hex().encode() if ending == "jsonl" else b""
    packed = tree.PACK[pack](noise + data)
    place = int(at * (len(packed) - 1))
    broken = packed[:place] if damage == "cut" else packed[:place] + b"\xff" * 8 + packed[place + 8 :]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"a.{ending}{pack}").write_bytes(broken)
        documents, quarantined, complete = count(Path(folder))
    if damage == "cut":
        assert quarantined > 0
        assert not complete
        assert documents + quarantined <= records + bool(noise) + 1
    else:
        # Some bytes of a header say nothing of the content: then all is as it was.
        assert not complete or documents + quarantined == records + bool(noise)
