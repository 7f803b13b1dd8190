"""The command line names its jobs, and its exit codes say whether another try helps."""

from __future__ import annotations

import errno

import pytest

from jobs.catalog import JOBS
from jobs.main import explain, main
from jobs.settings import UsageError
from pipelines.tables import TABLES


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in JOBS)


def test_no_job_is_wrong_usage() -> None:
    assert main([]) == 2


def test_an_unknown_job_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    near = next(iter(JOBS))
    assert main([near + "x"]) == 2
    assert f"did you mean {near!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 75),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1),
        (RuntimeError("a\nb"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    sentence, got = explain(error, "clean")
    assert got == code
    assert "\n" not in sentence


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([job, "--help"])
    assert caught.value.code == 0
    assert "--lake" in capsys.readouterr().out


def test_every_table_names_the_job_that_makes_it() -> None:
    assert {table.job for table in TABLES.values()} <= set(JOBS)
