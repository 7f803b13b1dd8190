"""pyarrow's clients for a lake's URI: of a disk, S3 (s3://, s3a://), Google (gs://) and Azure (abfs://, abfss://).

They take credentials and endpoints from storage options and the environment by the names that deltalake takes
(AWS_ENDPOINT_URL, AZURE_STORAGE_ACCOUNT_NAME, GOOGLE_BASE_URL, ...), so that one setting serves the Delta log and the
files. Google's client knows an account only by GOOGLE_APPLICATION_CREDENTIALS in the environment, and holds Python's
lock while it waits for a file's first bytes. Azure's client (pyarrow 25) ends the whole process, by std::terminate,
where an error's answer says that it is XML and is none (to HEAD, none ever is); what Azure itself answers was not seen,
only Azurite. deltalake's client takes such an answer for an error, but cannot be used in a forked worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from model.errors import ModelError

# The first of these names that is set, in the options before the environment.
Setting = Callable[..., str | None]

# Published for everybody; deltalake takes them, too, where an emulator is asked for.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def open_filesystem(uri: str, options: Mapping[str, str], attempts: int = 1) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for a path or URI, and the path within it without a trailing slash.

    attempts: of each request, by the client itself; Google's takes a time for it, Azure's has its own number.
    Raises ModelError (2) where no client takes the URI or its credentials.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(use_mmap=True), str(Path(uri).absolute())
    scheme, _, path = uri.partition("://")
    path = unquote(path).rstrip("/")
    lower = {name.lower(): value for name, value in options.items()}

    def setting(*names: str) -> str | None:
        found = [lower[name.lower()] for name in names if name.lower() in lower]
        return next(iter(found + [os.environ[name] for name in names if name in os.environ]), None)

    if scheme == "file":
        return fs.LocalFileSystem(use_mmap=True), path
    if scheme in ("s3", "s3a"):
        return _s3(path.partition("/")[0], setting, attempts), path
    if scheme in ("gs", "gcs"):
        return _google(setting, attempts), path
    if scheme in ("abfs", "abfss"):
        container, _, rest = path.partition("/")
        container, _, host = container.partition("@")
        return _azure(host.partition(".")[0], setting), f"{container}/{rest}"
    raise ModelError(f"{uri} is in no store that the loader knows; use a path, s3://, gs:// or abfs(s)://.", 2)


def open_input(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """A file to be read at any place. Raises OSError also where Google's client hands out a file that it has closed."""
    file = filesystem.open_input_file(path)
    if file.closed:  # all that it shows of an answer that failed
        raise OSError("the store broke off its answer")
    return file


def _s3(bucket: str, setting: Setting, attempts: int) -> fs.FileSystem:
    endpoint = urlsplit(setting("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") or "")
    region = setting("AWS_REGION", "AWS_DEFAULT_REGION")
    return fs.S3FileSystem(
        access_key=setting("AWS_ACCESS_KEY_ID"),
        secret_key=setting("AWS_SECRET_ACCESS_KEY"),
        session_token=setting("AWS_SESSION_TOKEN"),
        anonymous=_is_on(setting("AWS_SKIP_SIGNATURE")),
        region=region or (None if endpoint.netloc else fs.resolve_s3_region(bucket)),
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or "https",
        # Store tries again itself, bodies that are cut short as well.
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=10,
        request_timeout=30,
    )


def _google(setting: Setting, attempts: int) -> fs.FileSystem:
    anonymous = _is_on(setting("GOOGLE_SKIP_SIGNATURE"))
    given = setting(
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
    )
    # Else the client would go on as whoever the machine is, and not as the account that was named.
    if given is not None and not anonymous and "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ:
        raise ModelError(
            "A lake in gs:// is read with the credentials that the environment names; "
            "set GOOGLE_APPLICATION_CREDENTIALS to the service account's file.",
            2,
        )
    endpoint = urlsplit(setting("GOOGLE_BASE_URL") or "")
    return fs.GcsFileSystem(
        anonymous=anonymous,
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or "https",
        # Else a quarter of an hour, of each of Store's attempts.
        retry_time_limit=timedelta(seconds=1 if attempts == 1 else 60),
    )


def _azure(account: str, setting: Setting) -> fs.FileSystem:
    endpoint = setting("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    key = setting("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY")
    account = account or setting("AZURE_STORAGE_ACCOUNT_NAME") or ""
    if _is_on(setting("AZURE_STORAGE_USE_EMULATOR")):
        endpoint = os.environ.get("AZURITE_BLOB_STORAGE_URL", "http://127.0.0.1:10000")
        account, key = account or AZURITE_ACCOUNT, key or AZURITE_KEY
    given: dict[str, str | None] = {}
    if key is not None:
        given["account_key"] = key
    elif (sas := setting("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY")) is not None:
        given["sas_token"] = sas
    elif (secret := setting("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET")) is not None:
        given["client_secret"] = secret
        given["client_id"] = setting("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID")
        given["tenant_id"] = setting("AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID")
    if endpoint is not None:
        server = urlsplit(endpoint)
        for service in ("blob", "dfs"):
            given |= {f"{service}_storage_authority": server.netloc, f"{service}_storage_scheme": server.scheme}
    return fs.AzureFileSystem(account, **given)


def _is_on(flag: str | None) -> bool:
    return (flag or "").lower() in ("1", "true")
