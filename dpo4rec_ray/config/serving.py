"""Reranks over HTTP."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpo4rec_ray.config.section import Folder, Section

APPLICATION = "rerank"  # its name in Ray Serve, and that of its ingress deployment


class ServingSection(Section):
    """The server (`dpo4rec serve run`)."""

    registry: Folder = "runs/registry"
    """Folder of the published versions, on storage that every node sees."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 opens the server to the network."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    num_replicas: int = Field(default=1, ge=1)
    """Number of replicas, the processes that answer."""
    max_replicas: int = Field(default=0, ge=0)
    """Most replicas. If it is above num_replicas, Ray Serve adds replicas under load."""
    cpus_per_replica: float = Field(default=1, gt=0)
    """CPUs of a replica."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """GPUs of a replica."""
    threads: int = Field(default=1, ge=1)
    """Threads of a replica's forward pass."""
    max_batch: int = Field(default=64, ge=1)
    """Most lists in one forward pass."""
    max_waiting: int = Field(default=512, ge=64)
    """Most lists that wait. Further requests are answered 503 with Retry-After."""
    max_body: int = Field(default=2**20, ge=1024)
    """Most bytes of a request. Larger ones are answered 413."""
    request_timeout_s: float = Field(default=30, gt=0)
    """Seconds after which a request is answered 504. On clusters `deploy/serve.env` says it: 5, then up to three times
    more at other replicas, then 500."""
    token_file: str = ""
    """File of bearer tokens, one per line, on every node. "": no token is needed."""
    query: Literal["user", "history", "text"] = "user"
    """What `query` is in requests of other rerank APIs' clients: a user id; item ids, oldest first, between blanks or commas
    or as a JSON list; or a text, which is encoded as if it were the text about a user."""
    documents: Literal["ids", "titles"] = "ids"
    """What the texts of their documents are: item ids, or titles. A title that several items have means the first of them in
    the catalogue."""
    poll_s: float = Field(default=1.0, gt=0)
    """Seconds between reads of the registry."""
    online_llm: Literal["off", "async"] = "off"
    """"async": for a user whom no version knows, the LLM that wrote the version's texts writes one more (llm.source =
    "vllm"), in the background, from the history in the request. Later requests use it."""
    writer_cpus: float = Field(default=1, gt=0)
    """CPUs of the writer."""
    writer_gpus: float = Field(default=0, ge=0)
    """GPUs of the writer. A fraction shares one with replicas."""
    fresh_queue: int = Field(default=256, ge=1)
    """Most users who wait for a text. Further ones are refused."""
    fresh_retry_s: float = Field(default=60, gt=0)
    """Seconds after which a missing text is asked for again."""
    fresh_ttl_s: float = Field(default=86_400, gt=0)
    """Seconds that a text is used."""
    fresh_max_users: int = Field(default=100_000, ge=1)
    """Most texts kept, over all versions. The oldest are removed first."""
