"""S3, Google Cloud Storage and Azure through obstore, as fsspec file systems that can also create what must be new.

Settings come from the environment, as their own tools have it: AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, keys or the
machine's role; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME. A request is tried again for three minutes.
"""

from __future__ import annotations

from typing import Any

from obstore.exceptions import AlreadyExistsError
from obstore.fsspec import FsspecStore


class _Store(FsspecStore):
    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self.info(
                path
            )  # a missing object is known here; obstore's own file then fails once more when it is collected
        return super()._open(path, mode, **options)

    async def _pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> Any:
        """As fsspec has it: mode "create" raises FileExistsError where there is an object."""
        if mode != "create":
            return await super()._pipe_file(path, value, mode=mode, **options)
        bucket, key = self._split_path(path)
        try:
            return await self._construct_store(bucket).put_async(key, value, mode="create")
        except AlreadyExistsError as error:
            raise FileExistsError(path) from error


class S3(_Store):
    """s3://bucket/path"""

    protocol = "s3"


class GS(_Store):
    """gs://bucket/path"""

    protocol = "gs"


class AZ(_Store):
    """az://container/path"""

    protocol = "az"
