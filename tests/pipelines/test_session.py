"""Where Delta's JARs come from, and what is said when Spark does not start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from pipelines import jars
from pipelines.session import _explained

WANTED = "io.delta:delta-spark_4.2_2.13:4.4.0"


def test_jars_are_taken_from_the_environment_else_fetched_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    environment, user = jars.in_environment(), jars.of_user()
    assert user == tmp_path / "home" / ".cache" / "lakemoe" / "jars"
    fetch = {"spark.jars.packages": WANTED, "spark.jars.ivy": str(user)}
    assert jars.settings(WANTED, user) == fetch

    for folder in (environment, user):
        (folder / "jars").mkdir(parents=True)
    for name in ("delta.jar", "storage.jar"):
        (environment / "jars" / name).touch()
    here = ",".join(f"file://{environment}/jars/{name}" for name in ("delta.jar", "storage.jar"))
    jars.remember(environment, WANTED, f"file:///elsewhere/mine.jar,{here}")
    found = [str(environment / "jars" / name) for name in ("delta.jar", "storage.jar")]
    assert jars.settings(WANTED, user) == {"spark.jars": ",".join(found)}
    # Another version's, or not all of them, are none.
    assert jars.settings(WANTED.replace("4.4.0", "4.5.0"), user)["spark.jars.ivy"] == str(user)
    (environment / "jars" / "storage.jar").unlink()
    assert jars.settings(WANTED, user) == fetch
    (environment / "jars.json").write_text("cut sh")
    assert jars.settings(WANTED, user) == fetch

    # `make install` fills the environment also where its user has them.
    (user / "jars" / "delta.jar").touch()
    jars.remember(user, WANTED, "delta.jar")
    assert jars.settings(WANTED, user) == {"spark.jars": str(user / "jars" / "delta.jar")}
    assert jars.settings(WANTED, environment)["spark.jars.ivy"] == str(environment)


def test_the_session_has_its_jars_from_there(spark: SparkSession) -> None:
    taken = [Path(uri.removeprefix("file://")) for uri in spark.sparkContext.getConf().get("spark.jars", "").split(",")]
    assert {jar.parent.parent for jar in taken} <= {jars.in_environment(), jars.of_user()}
    assert all(jar.is_file() for jar in taken)
    assert jars.fetched(taken[0].parent.parent, jars.packages()) is not None


@pytest.mark.parametrize(
    ("log", "words", "code"),
    [
        ("java.io.FileNotFoundException: /h/.cache/x/resolved-1.xml (Permission denied)\n", "/h/.cache/x cannot be", 1),
        ("java.nio.file.AccessDeniedException: /ro/spark\n\tat a.B\n", "/ro/spark cannot be written", 1),
        (
            "ERROR DiskBlockManager: Failed to create local dir in /ro/l.1. Ignoring this directory.\n",
            "/ro/l.1 cannot",
            1,
        ),
        (
            "RuntimeException: [unresolved dependency: io.delta#x;9.9: not found]\n",
            "no repository has io.delta#x;9.9",
            1,
        ),
        (
            "Host repos.spark-packages.org not found.\n[unresolved dependency: io.delta#x;9.9: not found]\n",
            "to be fetched into /jars: check the versions",
            1,
        ),
        (
            "Host repo1.maven.org not found. url=https://x\n[unresolved dependency: io.delta#x;9.9: not found]\n",
            "could not be fetched into /jars: run again with a network",
            75,
        ),
        ("OutOfMemoryError\n", "could not start (it ended)", 75),
    ],
)
def test_why_spark_did_not_start(log: str, words: str, code: int, tmp_path: Path) -> None:
    file = tmp_path / "spark.log"
    file.write_text(f"first\n{log}")
    error = _explained(RuntimeError("it ended.\nat once"), file, Path("/jars"))
    assert words in str(error)
    assert str(file) in str(error)
    assert error.exit_code == code


@pytest.mark.slow
def test_a_folder_that_spark_cannot_make_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.txt").write_text("a text")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "SPARK_LOCAL_DIRS": str(tmp_path / "file" / "below")}
    command = [sys.executable, "-m", "jobs.main", "ingest", "--source", str(tmp_path / "a.txt")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"Spark could not start, because {tmp_path}/file/below cannot be written")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_what_the_jvm_prints_is_not_the_job_s(tmp_path: Path) -> None:
    """Delta prints a line about every vacuum, for one."""
    block = "from pipelines.session import spark_session as s; s()._jvm.java.lang.System.out.println('of the JVM')"
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
