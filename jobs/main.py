"""The command line: ``lakemoe JOB``; ``python -m jobs.JOB`` is the same.

Exit codes: 0 done; 1 failed and another try cannot help; 2 wrong usage or configuration; 75 failed but another try may
help. An error that a user can cause ends in one sentence on standard error; a traceback needs ``--debug``.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import importlib.metadata
import os
import sys
import time
import traceback

from jobs.catalog import JOBS

OK, FAILED, USAGE, TRY_AGAIN = 0, 1, 2, 75
PATIENCE = 15  # seconds
# Another try helps when the machine, not the input, was at fault.
_TRY_AGAIN_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
}
_FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")


def usage() -> str:
    """What ``lakemoe --help`` prints."""
    width = max(map(len, JOBS))
    lines = [f"  {name:<{width}}  {job.help}" for name, job in JOBS.items()]
    head = "usage: lakemoe JOB [--lake PATH] [--config FILE] [--SECTION.KEY VALUE ...]"
    tail = "lakemoe JOB --help lists a job's settings with their units and defaults."
    return "\n".join([head, "", "jobs:", *lines, "", tail])


def main(argv: list[str] | None = None) -> int:
    """Run one job; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return OK if arguments else USAGE
    if arguments[0] in ("-V", "--version"):
        print("lakemoe", importlib.metadata.version("lakemoe"))
        return OK
    name, rest = arguments[0], arguments[1:]
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lakemoe --help lists the jobs."
        return _say(f"There is no job {name!r}; {hint}", USAGE)
    debug = "--debug" in rest or bool(os.environ.get("LAKEMOE_DEBUG"))
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        return _say("Interrupted; run the same command again to go on.", TRY_AGAIN)
    except BrokenPipeError:
        return OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        if getattr(error, "told_by_main", False):  # by a training's first process, for all
            # Where one process ends, torchrun ends the others: the first one has something to say before.
            time.sleep(PATIENCE)
            return explain(error, name)[1]
        return _say(*explain(error, name))


def _run(name: str, arguments: list[str]) -> int:
    from jobs import settings as reader

    module = importlib.import_module(JOBS[name].module)
    settings = reader.load(module.Settings, arguments, program=f"lakemoe {name}")
    code = module.run(settings)
    return code if isinstance(code, int) else OK


def explain(error: BaseException, job: str) -> tuple[str, int]:
    """One sentence and the exit code for an error."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return str(error), code
    # Spark's and Delta's errors come by py4j, with the cause in their text.
    if type(error).__name__.startswith("Concurrent") or "DELTA_CONCURRENT" in str(error):
        return f"{job}: another job writes the same table; run the same command again when it has ended.", TRY_AGAIN
    if any(words in str(error) for words in _FULL_DISK) or (
        isinstance(error, OSError) and error.errno in _TRY_AGAIN_ERRNOS
    ):
        return (
            f"{job}: {_first_line(error)}; free space or restore the service and run the same command again.",
            TRY_AGAIN,
        )
    if isinstance(error, PermissionError):
        return f"{job}: no permission for {error.filename}; change its mode or name another --lake.", FAILED
    return (
        f"{job} failed: {type(error).__name__}: {_first_line(error)} (the same command with --debug shows where).",
        FAILED,
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300].rstrip(".")


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
