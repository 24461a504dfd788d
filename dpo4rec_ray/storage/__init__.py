"""Where runs and registries lie: folders of this machine, folders that machines share, or object stores.

Nothing else in the package renames, locks or removes what belongs to a run. On an object store there is no rename: an object
is there whole or not at all, and a folder of objects counts when its last one, the manifest, is there.
"""

from __future__ import annotations

from fsspec import register_implementation

# By name, so that obstore is imported by those who need it. s3fs would bring another botocore than boto3 has.
for _scheme in ("s3", "gs", "az"):
    register_implementation(_scheme, f"dpo4rec_ray.storage.object_store.{_scheme.upper()}", clobber=True)
