"""The loader reads what is there, in an order that nothing but content, seed and index decides."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable, write_deltalake

from model.errors import ModelError
from model.loader.loader import Batch, SequenceLoader, in_order
from model.loader.order import epoch_order
from model.loader.snapshot import open_sequences
from pipelines.tables import GOLD_SEQUENCES

WriteSequences = Callable[..., str]


def _take(loader: SequenceLoader, steps: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), steps))


def _rows(lake: str) -> list[dict[str, Any]]:
    """The rows of all live files, without the partition columns."""
    files = DeltaTable(GOLD_SEQUENCES.uri(lake)).file_uris()
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def _ids(batches: list[Batch]) -> list[list[str]]:
    return [b.sequence_ids for b in batches]


def test_snapshot_pins_and_describes(write_sequences: WriteSequences) -> None:
    lake = write_sequences()
    snapshot = open_sequences(lake)
    assert (snapshot.version, snapshot.num_sequences, snapshot.domains) == (0, 24, ("code", "text"))
    assert open_sequences(lake, split="validation").num_sequences == 4
    write_sequences(seed=1, mode="append")
    assert open_sequences(lake).num_sequences == 48
    assert open_sequences(lake, version=0).num_sequences == 24
    assert len(_ids(_take(SequenceLoader(snapshot, 6), 4))) == 4, "the pinned files still serve"


def test_batches_carry_the_tables_tokens(write_sequences: WriteSequences) -> None:
    lake = write_sequences(files=3, length=48)
    rows = {r["sequence_id"]: r for r in _rows(lake)}
    for batch in in_order(open_sequences(lake), 5):
        assert batch.tokens.dtype == torch.int64
        assert batch.segment_ids.dtype == torch.int32
        for b, name in enumerate(batch.sequence_ids):
            row = rows[name]
            assert batch.tokens[b].tolist() == np.frombuffer(row["tokens"], dtype="<u4").tolist()
            assert batch.domains[b] == row["domain"]
            at = 0
            lengths = list(row["segment_lengths"])
            for i, n in enumerate(lengths):
                padding = bool(row["pad_count"]) and i == len(lengths) - 1
                part = slice(at, at + n)
                assert batch.segment_ids[b, part].tolist() == [-1 if padding else i] * n
                assert batch.positions[b, part].tolist() == list(range(n))
                assert batch.loss_mask[b, part].tolist() == [False] + [not padding] * (n - 1)
                at += n


def test_every_sample_once_an_epoch_and_epochs_differ(write_sequences: WriteSequences) -> None:
    snapshot = open_sequences(write_sequences(count=21))
    flat = list(itertools.chain(*_ids(_take(SequenceLoader(snapshot, 7, seed=3), 6))))
    first, second = flat[:21], flat[21:]
    assert len(set(first)) == len(set(second)) == 21
    assert set(first) == set(second)
    assert first != second
    assert first != sorted(first)
    assert _ids(_take(SequenceLoader(snapshot, 7, seed=4), 3)) != _ids(_take(SequenceLoader(snapshot, 7, seed=3), 3))


def test_order_ignores_files_row_order_and_cache(write_sequences: WriteSequences) -> None:
    one = open_sequences(write_sequences("one"))
    other = open_sequences(write_sequences("other", files=4, reverse=True))
    assert one.table_id != other.table_id
    assert one.content == other.content
    a = _take(SequenceLoader(one, 5, seed=1), 9)
    b = _take(SequenceLoader(other, 5, seed=1, cache_bytes=0), 9)
    assert _ids(a) == _ids(b)
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_each_global_batch_and_resume_anywhere(write_sequences: WriteSequences, world: int) -> None:
    snapshot = open_sequences(write_sequences(count=20))
    whole = _ids(_take(SequenceLoader(snapshot, 8, seed=5), 6))
    state = SequenceLoader(snapshot, 8, seed=5).state_dict()
    for step in range(6):
        loaders = [SequenceLoader(snapshot, 8, rank, world, seed=5) for rank in range(world)]
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
        parts = [next(iter(loader)).sequence_ids for loader in loaders]
        assert list(itertools.chain(*zip(*parts, strict=True))) == whole[step]
        assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
        state = loaders[0].state_dict()


def test_foreign_states_are_refused_by_name(write_sequences: WriteSequences) -> None:
    snapshot = open_sequences(write_sequences("one"))
    state = SequenceLoader(snapshot, 4).state_dict()
    with pytest.raises(ModelError, match="seed 0, here 1"):
        SequenceLoader(snapshot, 4, seed=1).load_state_dict(state)
    with pytest.raises(ModelError, match="global_batch_size 4, here 8"):
        SequenceLoader(snapshot, 8).load_state_dict(state)
    other = open_sequences(write_sequences("two", seed=9))
    with pytest.raises(ModelError, match="table_id"):
        SequenceLoader(other, 4).load_state_dict(state)
    with pytest.raises(ModelError, match="samples_consumed"):
        SequenceLoader(snapshot, 4).load_state_dict({**state, "samples_consumed": -1})
    with pytest.raises(ModelError, match="multiple"):
        SequenceLoader(snapshot, 4, world_size=3)


def test_absent_empty_and_vanished_tables_are_refused(write_sequences: WriteSequences, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="run the pipeline"):
        open_sequences(str(tmp_path / "nowhere"))
    lake = write_sequences(validation=0)
    with pytest.raises(ModelError, match="no sequence in the split 'validation'"):
        open_sequences(lake, split="validation")
    with pytest.raises(ModelError, match="version 7"):
        open_sequences(lake, version=7)
    file = Path(DeltaTable(GOLD_SEQUENCES.uri(lake)).file_uris()[0])
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ModelError, match="bytes where the Delta log says"):
        open_sequences(lake)
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(ModelError, match="cannot be read as Parquet"):
        open_sequences(lake)
    file.unlink()
    with pytest.raises(ModelError, match="is gone"):
        open_sequences(lake)


def test_a_version_whose_files_a_vacuum_removed_is_refused(write_sequences: WriteSequences) -> None:
    lake = write_sequences()
    write_sequences(seed=1, mode="overwrite")
    pinned = open_sequences(lake, version=0)
    table = DeltaTable(GOLD_SEQUENCES.uri(lake))
    assert table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    with pytest.raises(ModelError, match="VACUUM removes old versions' files") as refused:
        open_sequences(lake, version=0)
    assert refused.value.exit_code == 1
    with pytest.raises(ModelError, match="VACUUM"):
        # Open files are memory-mapped and outlive the vacuum; another process's do not.
        list(in_order(pickle.loads(pickle.dumps(pinned)), 4))
    assert open_sequences(lake).num_sequences == 24


def test_a_file_without_a_column_is_refused(write_sequences: WriteSequences) -> None:
    lake = write_sequences()
    file = Path(DeltaTable(GOLD_SEQUENCES.uri(lake)).file_uris()[0])
    pq.write_table(pq.ParquetFile(file).read().drop_columns(["tokens"]), file)
    log = Path(GOLD_SEQUENCES.uri(lake)) / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        if "add" in action:
            action["add"]["size"] = file.stat().st_size
    log.write_text("\n".join(json.dumps(action) for action in actions))
    with pytest.raises(ModelError, match="lacks the columns tokens"):
        open_sequences(lake)


def test_several_editions_need_a_name(write_sequences: WriteSequences) -> None:
    lake = write_sequences(length=32)
    write_sequences(length=16, mode="append")
    with pytest.raises(ModelError, match="several editions") as refused:
        open_sequences(lake)
    assert refused.value.exit_code == 2
    assert "sequence_length 16" in str(refused.value)
    assert open_sequences(lake, sequence_length=16).sequence_length == 16
    with pytest.raises(ModelError, match="no such edition") as unknown:
        open_sequences(lake, tokenizer_id="00")
    assert unknown.value.exit_code == 2


@pytest.mark.parametrize(
    ("protocol", "configuration", "said"),
    [
        ({"minReaderVersion": 2, "minWriterVersion": 5}, {"delta.columnMapping.mode": "name"}, "column mapping"),
        (
            {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"]}
            | {"writerFeatures": ["deletionVectors"]},
            {},
            "deletionVectors",
        ),
    ],
)
def test_reader_features_are_refused(
    write_sequences: WriteSequences, protocol: dict[str, object], configuration: dict[str, str], said: str
) -> None:
    lake = write_sequences()
    log = Path(GOLD_SEQUENCES.uri(lake)) / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        if "protocol" in action:
            action["protocol"] = protocol
        if "metaData" in action:
            action["metaData"]["configuration"].update(configuration)
            schema = json.loads(action["metaData"]["schemaString"])
            for n, column in enumerate(schema["fields"], start=1):
                name = {"delta.columnMapping.id": n, "delta.columnMapping.physicalName": column["name"]}
                column["metadata"].update(name if configuration else {})
            action["metaData"]["schemaString"] = json.dumps(schema)
    log.write_text("\n".join(json.dumps(a) for a in actions))
    with pytest.raises(ModelError, match=said):
        open_sequences(lake)


@pytest.mark.parametrize(("broken", "said"), [("short", "tokens long"), ("lengths", "add up"), ("twice", "twice")])
def test_wrong_rows_are_refused(write_sequences: WriteSequences, broken: str, said: str) -> None:
    lake = write_sequences()
    rows = [r for r in _rows(lake) if r["split"] == "train"]
    edition = {name: DeltaTable(GOLD_SEQUENCES.uri(lake)).partitions()[0][name] for name in GOLD_SEQUENCES.partition_by}
    if broken == "short":
        rows[0]["tokens"] = rows[0]["tokens"][:-4]
    elif broken == "lengths":
        rows[0]["segment_lengths"] = [1]
    else:
        rows[0]["sequence_id"] = rows[1]["sequence_id"]
    table = pa.Table.from_pylist(
        [{**r, **edition, "sequence_length": int(edition["sequence_length"])} for r in rows],
        schema=GOLD_SEQUENCES.schema,
    )
    write_deltalake(GOLD_SEQUENCES.uri(lake), table, mode="overwrite")
    with pytest.raises(ModelError, match=said):
        list(in_order(open_sequences(lake), 4))


def test_epoch_order_is_uniform_and_fixed() -> None:
    assert epoch_order("key", 0, 8).tolist() == epoch_order("key", 0, 8).tolist()
    order = epoch_order("key", 1, 10_000)
    assert sorted(order.tolist()) == list(range(10_000))
    # Neighbours of a uniform shuffle lie (n + 1) / 3 apart on average.
    assert abs(np.abs(np.diff(order)).mean() / (10_001 / 3) - 1) < 0.03
