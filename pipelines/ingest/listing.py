"""Which files a source holds: names only, listed on the driver, sorted, so that every run sees them in one order.

Version-control folders, the lake's own folder and what `include` and `exclude` leave out are not part of a source.
Files whose name says that they are compiled or media (`.pyc`, `.so`, `.png` ...) are no records: they are counted as
skipped. Archives and compressed files of a kind that is not read are not on that list: they come in and are quarantined
as `binary`, so that data in them is missed loudly. A folder below the source that cannot be listed is a record,
`unreadable`.

Links to files are followed where they stay in the source; those that lead out of it are passed over and counted, unless
`follow_links` is set: what they lead to may be of another owner than the folder. In a Hugging Face cache the source is
taken to be the repository's whole folder, whose snapshots are links to its blobs, and of a data set or a source with
the format `parquet`, whose files programs lay out, all links are followed. Links to folders never are (they may lead
round in a circle) and count as skipped. Hidden files, of a name with a dot before it, or in such a folder, are part of
the source unless `hidden` is unset; then they are passed over and counted, folders whole.

A listing has a fingerprint, by which a run finds that there is nothing to read: names, sizes and the times of the last
change, as git's index takes a file for unchanged. The later of modification and status change counts, so that a
file whose modification time was set back, as cp -p does, is noticed as well. A Hugging Face data set's is its revision,
or that of its folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.errors import LakeError
from pipelines.ingest.config import Format, IngestConfig, SourceConfig, format_of, glob_base, is_glob
from pipelines.ingest.languages import extension
from pipelines.tables import FILES, hash_version

if TYPE_CHECKING:
    from pipelines.ingest.hugging_face import DataSet

VERSION_CONTROL = frozenset({".git", ".hg", ".svn", ".bzr", ".jj", "_darcs", ".fslckout", "CVS"})
# Compiled code, pictures, sound, film, fonts: never text, whatever the folder.
SKIPPED_EXTENSIONS = frozenset(
    "." + name
    for row in (
        "pyc pyo pyd so o a obj lib dll dylib exe class jar wasm elc beam hi rlib",
        "png jpg jpeg gif bmp ico icns webp tif tiff psd avif heic",
        "mp3 mp4 wav ogg flac m4a avi mov mkv webm aac",
        "ttf otf woff woff2 eot",
    )
    for name in row.split()
)


# A file that is changed again within one tick of its file system's clock keeps its time. The coarsest in use ticks in
# two seconds (FAT).
_TICK_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to read. problem: why it cannot be (then it is a quarantined record and is not opened).

    changed_ns: when it last changed, in nanoseconds since the epoch. split, part: of a data set.
    """

    source: int
    raw_path: bytes
    relative: str
    format: Format
    size: int
    problem: str | None = None
    changed_ns: int = 0
    split: str = ""
    part: int = 0


@dataclass(slots=True)
class Listing:
    """What a source holds, and what was passed over. folders: relative paths of those listed, `.` for the source's.

    skipped: by name, and links to folders. links_outside, hidden: links out of the source and hidden files and folders
    that were passed over. at_ns: when the listing began, in nanoseconds since the epoch. data_set, version: of a data
    set, what was opened, and its fingerprint.
    """

    entries: list[Entry] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: int = 0
    links_outside: int = 0
    hidden: int = 0
    at_ns: int = field(default_factory=lambda: time.time_ns())
    data_set: DataSet | None = None
    version: int | None = None

    @property
    def revision(self) -> str:
        """The hub's revision of a data set; empty for what has none."""
        return self.data_set.revision if self.data_set else ""

    def fingerprint(self) -> int | None:
        """63 bits, equal while nothing changes; None where a file is so new that a later change may not show."""
        if self.data_set is not None:
            return self.version
        if any(entry.changed_ns > self.at_ns - _TICK_NS for entry in self.entries):
            return None
        digest = hashlib.sha256(repr((self.folders, self.skipped, self.links_outside, self.hidden)).encode())
        for entry in self.entries:
            digest.update(repr((entry.raw_path, entry.format, entry.size, entry.problem, entry.changed_ns)).encode())
        return hash_version(digest.digest())


def path_of(raw_path: bytes) -> str:
    """A file's path as documents have it: bytes that are not UTF-8 become ``\\xNN``."""
    return raw_path.decode("utf-8", "backslashreplace")


def printable(path: str) -> str:
    """A path as text: bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob over relative paths: `*` and `?` stay in one part, `**` crosses parts."""
    out = ""
    parts = pattern.split("/")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == "**":
            out += ".*" if last else "(?:.*/)?"
            continue
        out += re.sub(r"\\\*|\\\?|\\\[(!?)(.+?)\\\]", _wildcard, re.escape(part).replace("\\!", "!"))
        out += "" if last else "/"
    return re.compile(out, re.DOTALL)


def _wildcard(match: re.Match[str]) -> str:
    if match[0] == r"\*":
        return "[^/]*"
    if match[0] == r"\?":
        return "[^/]"
    return f"[{'^' if match[1] else ''}{match[2].replace(chr(92) + '-', '-')}]"


def list_source(
    index: int, source: SourceConfig, *, exclude: str | None = None, follow_links: bool = False, hidden: bool = True
) -> Listing:
    """List a source whose path is absolute (`SourceConfig.resolved`).

    exclude: an absolute path that is no part of it (the lake, where it lies in the source). follow_links, hidden:
    whether links out of it and hidden files are part of it.
    Raises LakeError (exit code 2) where the path is not there or cannot be listed.
    """
    if source.format == "datasets":
        return _list_data_set(index, source)
    listing = Listing()
    included = [glob_pattern(pattern).fullmatch for pattern in source.include]
    left_out = [glob_pattern(pattern).fullmatch for pattern in source.exclude]
    left_out_whole = [glob_pattern(pattern).fullmatch for pattern in source.exclude if pattern.endswith("**")]

    def wanted(relative: str) -> bool:
        """Of a file's path, or of a folder's with a slash at its end: whether anything in it may be wanted."""
        if relative.endswith("/"):
            return not any(matches(relative) for matches in left_out_whole)
        if any(matches(relative) for matches in left_out):
            return False
        return not included or any(matches(relative) for matches in included)

    excluded = os.path.realpath(exclude) if exclude else None
    follow_links = follow_links or source.format == "parquet"
    if is_glob(source.path):
        base = glob_base(source.path)
        pattern = os.path.relpath(source.path, base)
        depth = None if "**" in pattern else pattern.count("/")
        of_glob = glob_pattern(pattern).fullmatch
        _list_folder(
            listing,
            index,
            source,
            base,
            lambda relative: wanted(relative) and (relative.endswith("/") or of_glob(relative)),
            depth,
            excluded,
            None if follow_links else _bounds(base),
            hidden,
        )
        if not (listing.entries or listing.skipped or listing.links_outside or listing.hidden):
            raise LakeError(f"No file matches the source {source.path}: check the pattern.", 2)
    elif os.path.isdir(source.path):
        bounds = None if follow_links else _bounds(source.path)
        _list_folder(listing, index, source, source.path, wanted, None, excluded, bounds, hidden)
    elif os.path.lexists(source.path):
        _add_file(listing, index, source, source.path, os.path.basename(source.path))
    else:
        raise LakeError(f"The source {source.path} does not exist: check the path.", 2)
    return listing


def _list_data_set(index: int, source: SourceConfig) -> Listing:
    """A data set's parts. The library takes a second to import, which who has none need not wait for."""
    from pipelines.ingest.hugging_face import PART_BYTES, open_data_set, version_of

    files = Listing()
    of_hub = not os.path.isdir(source.path)
    if not of_hub:
        _list_folder(files, index, source, source.path, lambda _: True, None, None, None, True)
    data_set = open_data_set(source)
    path = os.fsencode(f"hf://datasets/{source.path}" if of_hub else source.path)
    entries = [
        Entry(index, path, f"{split}/{part:05d}", "datasets", PART_BYTES, split=split, part=part)
        for split, part in data_set.parts()
    ]
    version = version_of(source, data_set.revision) if of_hub else files.fingerprint()
    return Listing(entries, ["."], data_set=data_set, version=version)


def list_sources(config: IngestConfig, lake: str) -> dict[SourceConfig, Listing]:
    """List every source, resolved, in the order of the configuration; a lake that lies in one is no part of it."""
    exclude = None if "://" in lake else lake
    settings = {"follow_links": config.follow_links, "hidden": config.hidden}
    return {s: list_source(i, s, exclude=exclude, **settings) for i, s in enumerate(config.resolved_sources())}


def input_name(source: SourceConfig, listing: Listing) -> str:
    """How a run's record names the source."""
    return f"{FILES}{source.name}{'@' * bool(listing.revision)}{listing.revision}"


def ingest_input(listings: Mapping[SourceConfig, Listing], erasures: int | None) -> dict[str, int]:
    """How a run's record names what it read, as it names tables at versions: ``files:SOURCE`` at a fingerprint, and
    ``erasures``, which documents were to stay out, at the version of ops.erasures (None where it is absent).

    What comes from the hub is named ``files:SOURCE@REVISION``: from its record a run can be made again. Empty where one
    of them has none: then the next run reads all.
    """
    found = {input_name(source, listing): listing.fingerprint() for source, listing in listings.items()}
    known = {name: value for name, value in found.items() if value is not None}
    return {**known, "erasures": -1 if erasures is None else erasures} if len(known) == len(found) else {}


def _list_folder(
    listing: Listing,
    index: int,
    source: SourceConfig,
    root: str,
    wanted: Callable[[str], object],
    depth: int | None,
    excluded: str | None,
    bounds: str | None,
    hidden: bool,
) -> None:
    """Walk `root` depth first in the order of names; `depth`: how many folders down, None for all.

    bounds: the folder that links may not lead out of, None: they may. hidden: whether hidden ones are taken.
    wanted: says of a file's relative path, and of a folder's with a slash at its end, whether it is part of the source.
    """
    waiting = [("", 0)]
    while waiting:
        folder, level = waiting.pop()
        path = os.path.join(root, folder) if folder else root
        try:
            with os.scandir(path) as found:
                children = sorted(found, key=lambda child: os.fsencode(child.name))
        except OSError as error:
            if not folder:
                raise LakeError(f"The source {root} cannot be listed: {error.strerror}.", 2) from error
            listing.entries.append(
                Entry(index, os.fsencode(path), printable(folder), "file", 0, f"folder: {error.strerror or error}")
            )
            continue
        listing.folders.append(printable(folder) or ".")
        below = []
        for child in children:
            relative = f"{folder}/{child.name}" if folder else child.name
            if child.name in VERSION_CONTROL:
                continue
            if _is_folder(child):
                if child.is_symlink():
                    listing.skipped += 1
                elif (
                    (depth is None or level < depth)
                    and wanted(relative + "/")
                    and os.path.realpath(child.path) != excluded
                ):
                    if child.name.startswith(".") and not hidden:
                        listing.hidden += 1
                    else:
                        below.append((relative, level + 1))
            elif wanted(relative):
                if extension(child.name) in SKIPPED_EXTENSIONS:
                    listing.skipped += 1
                elif child.name.startswith(".") and not hidden:
                    listing.hidden += 1
                elif bounds is not None and child.is_symlink() and not _lies_in(child.path, bounds):
                    listing.links_outside += 1
                else:
                    _add_file(listing, index, source, child.path, relative)
        waiting.extend(reversed(below))


def _bounds(root: str) -> str:
    """The folder that links of a source in `root` may lead to: its own, in a Hugging Face cache the repository's."""
    real = os.path.realpath(root)
    parts = real.split(os.sep)
    for at, part in enumerate(parts):
        repository = os.sep.join(parts[:at])
        if part == "snapshots" and os.path.isdir(os.path.join(repository, "blobs")):
            return repository
    return real


def _lies_in(link: str, folder: str) -> bool:
    return os.path.realpath(link).startswith(folder.rstrip(os.sep) + os.sep)


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link that leads round in a circle: it is read, and quarantined, as a file
        return False


def _add_file(listing: Listing, index: int, source: SourceConfig, path: str, relative: str) -> None:
    size, changed, problem = 0, 0, None
    try:
        status = os.stat(path)
        size, changed = status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)
        if not stat.S_ISREG(status.st_mode):
            problem = "not a regular file"
    except OSError as error:
        problem = error.strerror or str(error)
    entry_format = source.format or format_of(path)
    listing.entries.append(Entry(index, os.fsencode(path), printable(relative), entry_format, size, problem, changed))
