"""Delta's JARs: fetched once into a folder of the environment or of the user, from then on taken from there.

`make install` fetches them into the environment, so that who can read it, under whatever user, starts Spark without a
network. Where it has none of today's version a session fetches them into the user's cache, below ``$HOME``. Spark alone
would ask Ivy at every start, which keeps what it fetches in the home of Java's user, whatever ``$HOME`` says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

_LIST = "jars.json"


def in_environment() -> Path:
    """The folder of the Python environment."""
    return Path(sys.prefix) / "share" / "lakemoe" / "jars"


def of_user() -> Path:
    """The folder of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lakemoe" / "jars"


def packages() -> str:
    """The Maven coordinates of the Delta that goes with the installed Python packages."""
    from delta import configure_spark_with_delta_pip

    return str(configure_spark_with_delta_pip(SparkSession.Builder())._options["spark.jars.packages"])


def fetched(folder: Path, wanted: str) -> list[str] | None:
    """The paths of the wanted packages' JARs; None where the folder does not have them all."""
    try:
        kept = json.loads((folder / _LIST).read_text(encoding="utf-8"))
        names = kept["jars"] if kept["packages"] == wanted else []
    except (OSError, ValueError, KeyError, TypeError):
        return None
    files = [folder / "jars" / name for name in names]
    return [str(file) for file in files] if files and all(os.access(file, os.R_OK) for file in files) else None


def settings(wanted: str, fetch_into: Path) -> dict[str, str]:
    """Spark's settings: the JARs that the environment or this folder has, or which to fetch into it."""
    for folder in (in_environment(), fetch_into):
        if found := fetched(folder, wanted):
            return {"spark.jars": ",".join(found)}
    return {"spark.jars.packages": wanted, "spark.jars.ivy": str(fetch_into)}


def remember(folder: Path, wanted: str, resolved: str) -> None:
    """Write down what Spark has fetched into the folder. resolved: the session's ``spark.jars``."""
    names = [name for uri in resolved.split(",") if (folder / "jars" / (name := uri.rpartition("/")[2])).is_file()]
    draft = folder / f".{_LIST}.{os.getpid()}"
    draft.write_text(json.dumps({"packages": wanted, "jars": names}), encoding="utf-8")
    os.replace(draft, folder / _LIST)
