"""S3, Google Cloud Storage and Azure through obstore, as fsspec file systems that can also create what must be new.

Settings come from the environment, as their own tools have it: AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, keys or the
machine's role; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME. A request is tried again for three minutes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

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
        return _File(self, path, mode, **options)

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

    async def _pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> Any:
        """As fsspec has it: mode "create" raises FileExistsError where there is an object."""
        if mode != "create":
            return await super()._pipe_file(path, value, mode=mode, **options)
        bucket, key = self._split_path(path)
        try:
            return await self._construct_store(bucket).put_async(key, value, mode="create")
        except AlreadyExistsError as error:
            raise FileExistsError(path) from error


for _name in ("__init__", "read", "readline", "readlines", "write", "flush", "close"):
    setattr(_File, _name, _as_os_errors()(getattr(_File, _name)))
_REQUESTS = ["_rm_file", "_cp_file", "_pipe_file", "_cat_file", "_cat", "_cat_ranges"]
for _name in [*_REQUESTS, "_put_file", "_get_file", "_info", "_ls"]:
    setattr(_Store, _name, _awaited(getattr(_Store, _name)))


class S3(_Store):
    """s3://bucket/path"""

    protocol = "s3"


class GS(_Store):
    """gs://bucket/path"""

    protocol = "gs"


class AZ(_Store):
    """az://container/path"""

    protocol = "az"
