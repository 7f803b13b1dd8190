"""Real prose and code of this machine as JSONL, with a known share of exact and near duplicates.

Code is the installed packages' and the standard library's sources. Prose is their documentation: .md, .rst and .txt
files, and the docstrings of a module joined to one document, of which there is far more. Near duplicates are real
documents with words replaced, dropped and swapped at random; at most two words in a hundred are touched, which leaves
the Jaccard similarity of five-word shingles at about 0.82 and more. The same seed and packages give the same bytes.

OUT/text and OUT/code hold files of about 4 MB, one record a line: id, text, kind. An id says what the record is:
`original-N`, `exact-N-of-M`, `near-N-of-M`. OUT/corpus.json says how much there is of each. Left out: downloads, and
other languages than English, which packages hold little of.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

MEGABYTE = 1_000_000
KINDS = ("text", "code")
CODE = (".py", ".pyi", ".pyx", ".c", ".h", ".cpp", ".hpp", ".cuh", ".js", ".ts", ".java", ".scala")
PROSE = (".md", ".rst", ".txt")
MOST = MEGABYTE  # bytes; the few larger files are tables written as source
LEAST = 400  # characters; a module with less docstring than this has no documentation to speak of
MOST_EDITED = 0.01  # edits a word; a swap touches two words
_SPACE = re.compile(r"(\s+)")


class CorpusConfig(BaseModel):
    """What to build."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    megabytes: float = Field(20.0, gt=0, description="text in all (10^6 bytes of UTF-8)")
    prose: float = Field(0.5, ge=0, le=1, description="share of prose, as far as there is as much (fraction of bytes)")
    exact: float = Field(0.05, ge=0, lt=0.5, description="share of exact copies (fraction of bytes)")
    near: float = Field(0.05, ge=0, lt=0.5, description="share of edited copies (fraction of bytes)")
    file_megabytes: float = Field(4.0, gt=0, description="size of a file, about (10^6 bytes of text)")
    seed: int = Field(0, description="which files, which copies and which edits (number)")


def build(config: CorpusConfig, out: Path) -> dict[str, int]:
    """Write the corpus into a new folder; documents and bytes by kind and origin. SystemExit where there is too little.

    A folder that holds the same corpus already is left as it is.
    """
    about = out / "corpus.json"
    wanted = config.model_dump()
    if about.exists():
        found = json.loads(about.read_text(encoding="utf-8"))
        if found["config"] == wanted:
            return dict(found["counts"])
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} holds something else already; name another folder for this corpus.")
    draw = random.Random(config.seed)
    records = [*_originals(config)]
    records += _copies(config, records, draw)
    draw.shuffle(records)
    counts: dict[str, int] = {}
    for kind in KINDS:
        (out / kind).mkdir(parents=True)
        of_kind = [record for record in records if record["kind"] == kind]
        for number, part in enumerate(_parts(of_kind, config.file_megabytes * MEGABYTE)):
            with (out / kind / f"{number:04d}.jsonl").open("w", encoding="utf-8") as file:
                for record in part:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for record in records:
        size = len(record["text"].encode())
        origin = record["id"].partition("-")[0]
        for name, n in (("documents", 1), ("bytes", size)):
            for key in (name, f"{name}.{record['kind']}", f"{name}.{origin}"):
                counts[key] = counts.get(key, 0) + n
    about.write_text(json.dumps({"config": wanted, "counts": counts}, indent=2) + "\n", encoding="utf-8")
    return counts


def _originals(config: CorpusConfig) -> Iterator[dict[str, str]]:
    """Documents of both kinds until the share of originals is full; code fills up where prose runs out."""
    left = config.megabytes * MEGABYTE * (1 - config.exact - config.near)
    prose_left = config.prose * left
    number = 0
    files = _files(config.seed)
    for kind, documents in (("text", _prose(files)), ("code", _code(files))):
        budget = prose_left if kind == "text" else left
        for text in documents:
            if budget <= 0:
                break
            size = len(text.encode())
            budget -= size
            left -= size
            yield {"id": f"original-{number}", "text": text, "kind": kind}
            number += 1
    if left > 0:
        raise SystemExit(
            f"This Python's packages hold {left / MEGABYTE:.0f} MB less than was asked for; ask for less text."
        )


def _files(seed: int) -> list[Path]:
    """The files of the standard library and the installed packages, in the order of the hashes of their names."""
    found: dict[str, Path] = {}
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        for folder, folders, names in os.walk(root):
            folders[:] = [f for f in folders if f not in ("site-packages", "__pycache__")]
            for file in names:
                path = Path(folder, file)
                if path.suffix.lower() in (*CODE, *PROSE):
                    found[f"{name}/{path.relative_to(root).as_posix()}"] = path
    order = sorted(found, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return [found[name] for name in order]


def _read(path: Path) -> str | None:
    try:
        if path.stat().st_size > MOST:
            return None
        return path.read_text(encoding="utf-8") or None
    except (OSError, UnicodeDecodeError):
        return None


def _code(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        if path.suffix.lower() in CODE and (text := _read(path)):
            yield text


def _prose(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        if path.suffix.lower() in PROSE and (text := _read(path)):
            yield text
        elif path.suffix == ".py" and (text := _read(path)) and len(told := docstrings(text)) >= LEAST:
            yield told


def docstrings(source: str) -> str:
    """A module's docstrings, its own, its classes' and functions', in order, blank lines between; "" where it has none.

    A module that this Python cannot parse has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    told = [
        (getattr(node, "lineno", 0), ast.get_docstring(node)) for node in ast.walk(tree) if isinstance(node, documented)
    ]
    return "\n\n".join(text for _, text in sorted((line, text) for line, text in told if text))


def _copies(config: CorpusConfig, originals: list[dict[str, str]], draw: random.Random) -> list[dict[str, str]]:
    """Exact and edited copies of originals drawn at random, each share until its bytes are there."""
    copies: list[dict[str, str]] = []
    for origin, share in (("exact", config.exact), ("near", config.near)):
        left = share * config.megabytes * MEGABYTE
        while left > 0:
            chosen = draw.choice(originals)
            text = chosen["text"] if origin == "exact" else edited(chosen["text"], draw)
            left -= len(text.encode())
            name = f"{origin}-{len(copies)}-of-{chosen['id'].partition('-')[2]}"
            copies.append({"id": name, "text": text, "kind": chosen["kind"]})
    return copies


def edited(text: str, draw: random.Random) -> str:
    """The text after an edit or more, at most MOST_EDITED a word: one replaced by another, one dropped, two swapped."""
    pieces = _SPACE.split(text)
    words = range(0, len(pieces), 2)
    for _ in range(max(1, int(draw.uniform(0, MOST_EDITED) * len(words)))):
        at, other = draw.choice(words), draw.choice(words)
        match draw.randrange(3):
            case 0:
                pieces[at] = pieces[other]
            case 1:
                pieces[at] = ""
            case _:
                pieces[at], pieces[other] = pieces[other], pieces[at]
    return "".join(pieces)


def _parts(records: list[dict[str, str]], size: float) -> Iterator[list[dict[str, str]]]:
    part: list[dict[str, str]] = []
    held = 0
    for record in records:
        part.append(record)
        held += len(record["text"].encode())
        if held >= size:
            yield part
            part, held = [], 0
    if part:
        yield part


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write, which must not hold anything else")
    for name, field in CorpusConfig.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, help=field.description)
    asked = vars(parser.parse_args())
    counts = build(CorpusConfig(**{name: asked[name] for name in CorpusConfig.model_fields}), asked["out"])
    for name, count in counts.items():
        print(f"{name:<20}{count:>14,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
