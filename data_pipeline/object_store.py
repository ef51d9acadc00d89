"""A prefix of a bucket: S3, or anything that speaks its protocol.

The endpoint and the credentials are boto3's to find (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...,
shared files, the machine's role); they are never part of a place, a job file or a message.
"""

import base64
import hashlib
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from typing import IO, Any, TypeVar

from data_pipeline.errors import DataError, StorageUnavailable

_Result = TypeVar("_Result")

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_CONNECTIONS = 64
_PART_BYTES = 64 << 20  # a store limits one PUT to 5 GB, an upload to 10,000 parts
_BUSY = {"SlowDown", "Throttling", "RequestTimeout", "RequestTimeTooSlow", "BadDigest"}
_BUSY |= {"ConditionalRequestConflict", "OperationAborted"}  # of conditional writes at once
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 8.0  # seconds


class Changed(DataError):
    """An object is no longer (or already) what a conditional write expects."""


class _Interrupted(Exception):
    """A body that ended early, or another passing trouble."""


class ObjectStore:
    """The objects under s3://bucket/prefix; see `Storage` for what the methods promise.

    Passing trouble (time-outs, broken connections, bodies cut short, 5xx, SlowDown) is retried with
    growing random waits for `patience` seconds; `timeout` bounds the silence of a connection.
    """

    remote = True

    def __init__(self, place: str, *, patience: float = 120.0, timeout: float = 20.0) -> None:
        bucket, _, prefix = place.partition("/")
        if not _BUCKET.match(bucket):
            shown = bucket if "@" not in bucket else "..."  # a secret may stand before the @
            raise DataError(
                f"s3://{shown}: not the name of a bucket; write s3://bucket/prefix, and give "
                "credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self._patience, self._timeout = patience, timeout

    @property
    def place(self) -> str:
        """s3://bucket/prefix."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        if size == 0:
            return b""
        uri = f"{self.place}/{name}"

        def get() -> bytes:
            stop = offset + size
            answer = self._client.get_object(**self._at(name), Range=f"bytes={offset}-{stop - 1}")
            whole = re.search(r"/(\d+)$", answer.get("ContentRange", ""))
            if whole is None:
                raise DataError(f"{uri}: the store does not answer requests for a range of bytes")
            if int(whole[1]) < stop:
                raise DataError(_too_short(uri, f"{whole[1]} bytes, bytes {offset} to {stop}"))
            return _body(answer, size)

        return self._retry(uri, get)

    def read_whole(self, name: str) -> bytes:
        """See `Storage`."""

        def get() -> bytes:
            answer = self._client.get_object(**self._at(name))
            return _body(answer, answer["ContentLength"])

        return self._retry(f"{self.place}/{name}", get)

    def size(self, name: str) -> int | None:
        """See `Storage`."""

        def head() -> int | None:
            from botocore.exceptions import ClientError

            try:
                return self._client.head_object(**self._at(name))["ContentLength"]
            except ClientError as error:
                if _code(error) in ("404", "NoSuchKey"):
                    return None
                raise

        return self._retry(f"{self.place}/{name}", head)

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """See `Storage`: a nameless local file, which no kill leaves behind, then PUT."""
        with tempfile.TemporaryFile(prefix="atrous-") as file:
            yield file
            self.upload(name, file)

    def upload(self, name: str, file: IO[bytes], **condition: str) -> None:
        """Make an object of a local file, whole or not at all; `condition` as of `put`."""
        size = file.seek(0, 2)
        file.seek(0)
        if size <= _PART_BYTES:
            self.put(name, file.read(), **condition)
        else:
            self._upload_in_parts(name, file, condition)

    def put(self, name: str, data: bytes, **condition: str) -> str:
        """Write an object in one piece; its ETag. `condition`: IfMatch="ETag", or IfNoneMatch="*".

        Raises:
            Changed: the condition is not met; by an own write, where its answer was lost.
        """
        put = self._client_method("put_object")
        return self._send(name, put, self._at(name) | condition, data)["ETag"]

    def get(self, name: str, known: str = "") -> tuple[bytes | None, str]:
        """All of an object and its ETag; no bytes where that is `known`, no ETag where none is."""

        def get() -> tuple[bytes | None, str]:
            from botocore.exceptions import ClientError

            condition = {"IfNoneMatch": known} if known else {}
            try:
                answer = self._client.get_object(**self._at(name), **condition)
            except ClientError as error:
                if _code(error) == "NoSuchKey":
                    return None, ""
                if _code(error) == "304":
                    return None, known
                raise
            return _body(answer, answer["ContentLength"]), answer["ETag"]

        return self._retry(f"{self.place}/{name}", get)

    def download(self, name: str, size: int, file: IO[bytes]) -> None:
        """Write the `size` bytes of an object to a local file."""
        for offset in range(0, size, _PART_BYTES):
            file.write(self.read(name, offset, min(_PART_BYTES, size - offset)))
        file.flush()

    def copy(self, name: str, target: str) -> None:
        """Copy an object, in parts where it is large, without a way through this machine."""
        source = self._at(name)
        to = self._at(target)
        self._retry(f"{self.place}/{target}", lambda: self._client.copy(source, **to))

    def abort_uploads(self, prefix: str) -> None:
        """Forget uploads in parts that killed writers began: unseen, and paid for."""

        def abort() -> None:
            base = self._at(prefix)
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=base["Key"]
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

        self._retry(f"{self.place}/{prefix}*", abort)

    def delete(self, name: str) -> None:
        """See `Storage`."""
        self._retry(f"{self.place}/{name}", lambda: self._client.delete_object(**self._at(name)))

    def names(self, prefix: str) -> list[str]:
        """See `Storage`."""
        return [name for name, _ in self.sizes(prefix)]

    def sizes(self, prefix: str) -> list[tuple[str, int]]:
        """Names of the objects here that begin with `prefix`, and their bytes."""
        base = f"{self._prefix}/" if self._prefix else ""

        def listing() -> list[tuple[str, int]]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=base + prefix
            )
            items = (item for page in pages for item in page.get("Contents", ()))
            return [(item["Key"][len(base) :], item["Size"]) for item in items]

        return self._retry(f"{self.place}/{prefix}*", listing)

    def scan(self) -> tuple[list[str], list[tuple[str, int, str]]]:
        """Names of the folders directly below the place; name, size and ETag of the objects."""
        base = f"{self._prefix}/" if self._prefix else ""

        def listing() -> tuple[list[str], list[tuple[str, int, str]]]:
            folders, objects = [], []
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=base, Delimiter="/"
            )
            for page in pages:
                folders += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
                objects += [
                    (entry["Key"][len(base) :], entry["Size"], entry["ETag"].strip('"'))
                    for entry in page.get("Contents", ())
                ]
            names = [name[len(base) : -1] for name in folders]
            # Some programs mark a folder by an empty object of its name.
            return [name for name in names if name], [entry for entry in objects if entry[0]]

        return self._retry(f"{self.place}/", listing)

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(ObjectStore, patience=self._patience, timeout=self._timeout)
        return make, (self.place.removeprefix("s3://"),)

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}/{name}".lstrip("/")}

    def _client_method(self, name: str) -> Callable[..., Any]:
        return lambda **arguments: getattr(self._client, name)(**arguments)

    @property
    def _client(self) -> Any:
        settings = sorted((name, value) for name, value in os.environ.items() if "AWS_" in name)
        with _lock:
            return _shared_client(self._timeout, tuple(settings), os.getpid())

    def _send(
        self, name: str, send: Callable[..., Any], arguments: dict[str, Any], data: bytes
    ) -> Any:
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return self._retry(
            f"{self.place}/{name}", lambda: send(**arguments, Body=data, ContentMD5=digest)
        )

    def _upload_in_parts(self, name: str, file: IO[bytes], condition: dict[str, str]) -> None:
        uri, target = f"{self.place}/{name}", self._at(name)
        upload = self._retry(uri, lambda: self._client.create_multipart_upload(**target))
        target["UploadId"] = upload["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            while data := file.read(_PART_BYTES):
                arguments = target | {"PartNumber": len(parts) + 1}
                sent = self._send(name, self._client_method("upload_part"), arguments, data)
                parts.append({"ETag": sent["ETag"], "PartNumber": len(parts) + 1})
            whole, size = {"Parts": parts}, file.tell()
            self._retry(uri, lambda: self._complete(name, target | condition, whole, size))
        except BaseException:
            with suppress(Exception):  # else its parts stay, unseen and paid for
                self._client.abort_multipart_upload(**target)
            raise

    def _complete(self, name: str, target: dict[str, Any], whole: Any, size: int) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.complete_multipart_upload(**target, MultipartUpload=whole)
        except ClientError as error:
            # The answer to an earlier attempt was lost.
            if _code(error) != "NoSuchUpload" or self.size(name) != size:
                raise

    def _retry(self, uri: str, call: Callable[[], _Result]) -> _Result:
        """The result of `call`, in spite of passing trouble."""
        started, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                return call()
            except DataError:
                raise
            except Exception as error:
                _refuse_lasting(uri, error)
                waited = time.monotonic() - started
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(attempt, 10))
                wait *= 0.5 + random.random() / 2  # so that a thousand readers do not come at once
                if waited + wait > self._patience:
                    raise StorageUnavailable(
                        f"{uri}: {_text(error)}; tried {attempt} times in {waited:.0f} s. "
                        "Check the store and the network, then start again: it goes on from here"
                    ) from error
            time.sleep(wait)


_lock = threading.Lock()  # two threads shall not make two clients


@cache
def _shared_client(timeout: float, settings: tuple[tuple[str, str], ...], process: int) -> Any:
    """The client of all stores of this process that find the same settings: it is slow to make."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=min(5.0, timeout),
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # ours are retries enough, and they look at bodies
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        # Checksums in trailers are refused by many stores; what we send has Content-MD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


def _body(answer: dict[str, Any], size: int) -> bytes:
    with closing(answer["Body"]) as body:
        data = body.read()
    if len(data) != size:
        raise _Interrupted(f"{len(data)} of {size} bytes arrived")
    return data


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _too_short(uri: str, what: str) -> str:
    return f"{uri}: has {what} were wanted; it is shorter than it should be, copy it again"


def _refuse_lasting(uri: str, error: Exception) -> None:
    """Raise what will not pass by waiting, in words; return for what may."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
    )

    if isinstance(error, ClientError):
        _refuse_answer(uri, error)
    elif isinstance(error, BotoCoreError):
        if not isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError):
            raise StorageUnavailable(
                f"{uri}: {_text(error)}; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_DEFAULT_REGION and, for a store of your own, AWS_ENDPOINT_URL"
            ) from None
    elif not isinstance(error, OSError | _Interrupted) and "urllib3" not in type(error).__module__:
        raise error


def _refuse_answer(uri: str, error: Any) -> None:
    code, status = _code(error), error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
    if code in _BUSY or status >= 500 or status == 429:
        return
    if status == 412:
        raise Changed(f"{uri}: another process wrote it") from None
    if code == "NoSuchBucket":
        raise StorageUnavailable(f"{uri}: there is no such bucket; correct its name") from None
    if status == 404:
        raise DataError(
            f"{uri}: not there (404); copy the data set completely or correct the place"
        ) from None
    if status in (401, 403):
        raise StorageUnavailable(
            f"{uri}: access denied ({code}); the credentials of the environment (AWS_ACCESS_KEY_ID "
            "..., or the machine's role) do not open it"
        ) from None
    if status == 416:
        raise DataError(_too_short(uri, "fewer bytes than")) from None
    raise DataError(f"{uri}: the store refuses: {_text(error)}") from None
