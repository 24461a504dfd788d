"""S3, Google Cloud Storage and Azure through obstore, as fsspec file systems that can also create what must be new.

Settings come from the environment, as their own tools have it: AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, keys or the
machine's role; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME. A request is tried again for three minutes. What fails
all the same is an OSError: nothing here takes a store that does not answer for an empty one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fsspec.asyn import sync
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.fsspec import BufferedFile, FsspecStore

if TYPE_CHECKING:
    from obstore._store._retry import RetryConfig

# By time alone: with obstore's own ten retries a store that refuses is given up after five seconds.
RETRIES: RetryConfig = {
    "max_retries": 10_000,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
# What obstore gives up at once: an answer that breaks off, and no answer to a request that changes something.
_NOT_REPEATED = re.compile("response body error|error sending request")
WHOLE = 2**20  # objects of up to so many bytes are read by one request
CHUNK = 8 * 2**20  # bytes of an object that are in memory while it is copied to a disk


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """What those who read and write expect of storage that fails; obstore's own errors are no OSErrors."""
    try:
        yield
    except BaseError as error:
        raise OSError(errno.EIO, str(error).partition("\n\nDebug source")[0]) from error


def _awaited(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(method)
    async def call(*arguments: Any, **options: Any) -> Any:
        with _as_os_errors():
            return await method(*arguments, **options)

    return call


def _repeated(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Of requests that may be made twice."""

    @functools.wraps(method)
    async def call(*arguments: Any, **options: Any) -> Any:
        until = time.monotonic() + RETRIES["retry_timeout"].total_seconds()
        while True:
            try:
                with _as_os_errors():
                    return await method(*arguments, **options)
            except OSError as error:
                if not _NOT_REPEATED.search(str(error)) or time.monotonic() > until:
                    raise
            await asyncio.sleep(0.3)

    return call


class _File(BufferedFile):
    """An object that is read or written in pieces."""

    def __init__(self, *arguments: Any, **options: Any):
        try:
            super().__init__(*arguments, **options)
        except BaseException:
            self.closed = True  # else it fails once more when it is collected: there is nothing to close
            raise


class _Store(FsspecStore):
    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"retry_config": RETRIES, **options})

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,
        autocommit: Any = True,
        cache_options: Any = None,
        **options: Any,
    ) -> Any:
        if mode == "rb" and (small := sync(self.loop, self._small, path)) is not None:
            return io.BytesIO(small)
        return _File(self, path, mode, **options)

    @_repeated
    async def _small(self, path: str) -> bytes | None:
        """An object by one request; None if it is not small.

        A size that is asked for before may be that of the object before, and the reader gets a part of the new one.
        """
        bucket, key = self._split_path(path)
        answer = await self._construct_store(bucket).get_async(key)
        return bytes(await answer.bytes_async()) if answer.meta["size"] <= WHOLE else None

    async def _isdir(self, path: str) -> bool:
        return await self._is(path, "directory")

    async def _isfile(self, path: str) -> bool:
        return await self._is(path, "file")

    async def _is(self, path: str, kind: str) -> bool:
        """fsspec's own says no of a store that does not answer."""
        try:
            return (await self._info(path))["type"] == kind
        except FileNotFoundError:
            return False

    async def _glob(self, path: str, maxdepth: int | None = None, **options: Any) -> Any:
        """fsspec's own fails where the folder's last object is removed while it looks."""
        try:
            return await super()._glob(path, maxdepth=maxdepth, **options)
        except FileNotFoundError:
            return {} if options.get("detail") else []

    async def _walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: Any = None,
        **options: Any,
    ) -> AsyncIterator[Any]:
        """fsspec's own takes a folder whose listing fails for an empty one."""

        def told(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        async for one in super()._walk(path, maxdepth=maxdepth, topdown=topdown, on_error=told, **options):
            yield one

    async def _find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any
    ) -> Any:
        """All objects below by one listing, with their times; fsspec's own asks folder by folder."""
        if maxdepth is not None or withdirs:
            return await super()._find(path, maxdepth=maxdepth, withdirs=withdirs, **options)
        path = str(self._strip_protocol(path))
        found = await self._below(path)
        if not found and await self._isfile(path):
            found = {path: await self._info(path)}
        return found if options.get("detail") else list(found)

    @_repeated
    async def _below(self, path: str) -> dict[str, dict[str, Any]]:
        bucket, key = self._split_path(path)
        found: dict[str, dict[str, Any]] = {}
        async for batch in self._construct_store(bucket).list(key or None):
            for one in batch:
                name = f"{bucket}/{one['path']}"
                found[name] = {
                    "name": name,
                    "type": "file",
                    **{key: one[key] for key in ("size", "e_tag", "last_modified")},
                }
        return dict(sorted(found.items()))

    @_repeated
    async def _rm_file(self, path: str, **options: Any) -> None:
        """What is not there is removed. Google's store says 404 of it, also of folders, which are no objects there."""
        with contextlib.suppress(FileNotFoundError):
            await super()._rm_file(path, **options)

    @_repeated
    async def _get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """obstore's own has the whole object in memory."""
        bucket, key = self._split_path(rpath)
        answer = await self._construct_store(bucket).get_async(key)
        with open(lpath, "wb") as file:
            async for chunk in answer.stream(min_chunk_size=CHUNK):
                file.write(chunk)

    async def _pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> Any:
        """As fsspec has it: mode "create" raises FileExistsError where there is an object.

        If that object has this very content, the answer to a request of ours was lost, and it was made again.
        """
        if mode != "create":
            return await super()._pipe_file(path, value, mode=mode, **options)
        try:
            await self._create(path, value)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile: it was another's
                if await self._small(path) == value:
                    return
            raise

    @_repeated
    async def _create(self, path: str, value: Any) -> None:
        bucket, key = self._split_path(path)
        try:
            await self._construct_store(bucket).put_async(key, value, mode="create")
        except AlreadyExistsError as error:
            raise FileExistsError(path) from error


for _name in ("__init__", "read", "readline", "readlines", "write", "flush", "close"):
    setattr(_File, _name, _as_os_errors()(getattr(_File, _name)))
for _name in ("_cp_file", "_pipe_file", "_cat", "_cat_ranges", "_put_file"):
    setattr(_Store, _name, _awaited(getattr(_Store, _name)))
for _name in ("_cat_file", "_info", "_ls"):
    setattr(_Store, _name, _repeated(getattr(_Store, _name)))


class S3(_Store):
    """s3://bucket/path"""

    protocol = "s3"


class GS(_Store):
    """gs://bucket/path"""

    protocol = "gs"


class AZ(_Store):
    """az://container/path"""

    protocol = "az"
