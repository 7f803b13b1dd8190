"""Reading evaluation sets: a folder of JSONL files, plain or gzip, each a set that is named by its file's stem.

What such a file holds decides verdicts, so whatever cannot be read is an error that names file and line, never a line
passed over; and a file of another kind is an error too, for a set that goes unread unseen contaminates. Files are read
whole, by the driver: evaluation sets are megabytes where a corpus is terabytes. Left out: subfolders, Parquet, names
of data sets on a hub.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipelines.decontaminate.config import DecontaminateConfig
from pipelines.errors import LakeError
from pipelines.tables import hash_version

ENDINGS = (".jsonl", ".jsonl.gz")
# Items that are hashed at a time (characters), which bounds memory and makes no difference to the result.
SLICE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One set: its name, the file, the field that holds an item's text, and the file's bytes."""

    name: str
    path: Path
    field: str
    content: bytes

    def items(self) -> Iterator[str]:
        """The text of every item in the file's order; blank lines are none.

        Raises LakeError (exit code 2) that names the line which holds no item.
        """
        for number, line in enumerate(self._lines(), 1):
            if line.strip():
                yield self._text(line, number)

    def texts(self) -> Iterator[pa.Array]:
        """The items in arrays of about ``SLICE`` characters (large_string)."""
        part: list[str] = []
        characters = 0
        for text in self.items():
            part.append(text)
            characters += len(text)
            if characters >= SLICE:
                yield pa.array(part, pa.large_string())
                part, characters = [], 0
        if part:
            yield pa.array(part, pa.large_string())

    def _lines(self) -> Iterator[bytes]:
        stream = io.BytesIO(self.content)
        try:
            # Lines end at LF alone: JSON strings may hold Unicode's other line ends.
            yield from gzip.GzipFile(fileobj=stream) if self.path.suffix == ".gz" else stream
        except (EOFError, OSError, zlib.error) as error:
            raise LakeError(f"{self.path} is no whole gzip file ({error}); make it anew.", 2) from None

    def _text(self, line: bytes, number: int) -> str:
        where = f"{self.path}, line {number}"
        try:
            item = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise LakeError(f"{where}: no JSON ({error}); mend or remove the line.", 2) from None
        text = item.get(self.field) if isinstance(item, dict) else None
        if not isinstance(text, str):
            raise LakeError(
                f"{where}: no text in a field {self.field!r}; mend the line, or name the field of the set "
                f"{self.name!r} in decontaminate.fields.",
                2,
            )
        # JSON can escape half a surrogate pair, which is no character and has no UTF-8.
        return text.encode("utf-8", "replace").decode()


def read_sets(config: DecontaminateConfig) -> tuple[EvaluationSet, ...]:
    """The sets in the order of their names; none where no folder is configured.

    Raises LakeError (exit code 2) when the folder is absent or has no set, when something in it is no JSONL file, when
    two files have one name, or when a set of ``fields`` is not there. Dot files are passed over.
    """
    if config.sets is None:
        return ()
    if "://" in config.sets:
        raise LakeError(f"{config.sets} is no local path: mount or copy the evaluation sets to a folder first.", 2)
    folder = Path(config.sets).expanduser()
    if not folder.is_dir():
        raise LakeError(f"{folder} is no folder: name the folder of evaluation sets with --decontaminate.sets.", 2)
    found: dict[str, EvaluationSet] = {}
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        ending = next((e for e in ENDINGS if path.name.endswith(e) and path.name != e), None)
        if ending is None or not path.is_file():
            raise LakeError(f"{path} is no evaluation set: keep {' and '.join(ENDINGS)} files alone in the folder.", 2)
        name = path.name.removesuffix(ending)
        if name in found:
            raise LakeError(f"{found[name].path} and {path} are both the set {name!r}: rename or remove one.", 2)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LakeError(f"Cannot read {path}: {error.strerror}; mend or remove the file.", 2) from None
        found[name] = EvaluationSet(name=name, path=path, field=config.fields.get(name, "text"), content=content)
    if not found:
        raise LakeError(f"{folder} has no evaluation set: put {' or '.join(ENDINGS)} files there.", 2)
    if unknown := sorted(set(config.fields) - set(found)):
        raise LakeError(
            f"decontaminate.fields names the set {unknown[0]!r}, and {folder} has {', '.join(sorted(found))}.", 2
        )
    return tuple(found[name] for name in sorted(found))


def sets_input(sets: Sequence[EvaluationSet]) -> dict[str, int]:
    """How a run's record names the sets that it read: 63 bits of a hash of names and bytes, 0 where there are none."""
    if not sets:
        return {"sets": 0}
    digest = hashlib.sha256()
    for one in sets:
        digest.update(f"{one.name}\0{hashlib.sha256(one.content).hexdigest()}\n".encode())
    return {"sets": hash_version(digest.digest())}
