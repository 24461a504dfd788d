"""A client of the HTTP API: typed answers, one retry, and errors that name the wrong field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from http.cookiejar import DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.parse import quote

import requests
from pydantic import BaseModel, TypeAdapter, ValidationError
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving import api

MAX_CONNECTIONS = 64  # kept open, for the threads that share a client
RETRIED = (
    408,
    500,
    502,
    503,
    504,
)  # statuses; Serve says 408 of a timeout, its HAProxy 500 when a replica has died
MAX_WAIT_S = 5  # longest wait that a Retry-After of the service can ask for
Answer = TypeVar("Answer")
_MODELS = TypeAdapter(list[api.VersionInfo])


class Refused(UserError):
    """The service refuses this request, and would refuse it again. status: 401, 404, 413 or 422."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Unavailable(Exception):
    """No answer, or one that cannot be read: no connection, a timeout, or a status of 408, or of 500 and above."""


class Client:
    """Sends requests to one service. Threads may share a client. All methods raise Refused or Unavailable."""

    def __init__(self, url: str, token: str = "", timeout_s: float = 10.0):
        """url: for example http://127.0.0.1:8000; timeout_s: to connect, and between two bytes, in each of two attempts."""
        self._url, self._timeout = url.rstrip("/"), timeout_s
        # No request changes anything, so all may be sent twice: also when an open connection has lost its other end.
        retry = Retry(
            1,
            allowed_methods=None,
            status_forcelist=RETRIED,
            retry_after_max=MAX_WAIT_S,
            raise_on_status=False,
        )
        adapter = HTTPAdapter(pool_maxsize=MAX_CONNECTIONS, max_retries=retry)
        self._session = requests.Session()
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.headers["Content-Type"] = "application/json"
        if token:
            self._session.auth = _bearer(token)

    def rerank(
        self, candidates: Sequence[str | api.Candidate], user_id: str | None = None, **fields: Any
    ) -> api.RerankResponse:
        """The candidates, best first. fields: other fields of a RerankRequest, such as history and top_n."""
        body = _checked(api.RerankRequest, candidates=candidates, user_id=user_id, **fields)
        return self._ask(api.RerankResponse.model_validate_json, "rerank", body)

    def rerank_batch(self, bodies: Sequence[api.RerankRequest]) -> list[api.RerankResponse]:
        """Answers in the order of the bodies. All are answered, or none."""
        body = _checked(api.BatchRequest, requests=bodies)
        return self._ask(api.BatchResponse.model_validate_json, "rerank/batch", body).responses

    def knowledge(self, user_id: str) -> api.UserKnowledge:
        """What the service knows about a user. Raises Refused with status 404 if that is nothing."""
        path = f"users/{quote(user_id, safe='')}/knowledge"
        return self._ask(api.UserKnowledge.model_validate_json, path)

    def models(self) -> list[api.VersionInfo]:
        """The published versions and what they do."""
        return self._ask(_MODELS.validate_json, "models")

    def _ask(self, read: Callable[[bytes], Answer], path: str, body: BaseModel | None = None) -> Answer:
        url = f"{self._url}/v1/{path}"
        method = "POST" if body else "GET"
        data = body and body.model_dump_json(exclude_none=True).encode()
        try:
            answer = self._request(method, url, data)
            if answer.status_code == 200:
                return read(answer.content)
        except (requests.RequestException, ValidationError) as error:
            raise Unavailable(f"{url}: {error}") from error
        try:
            reason = api.in_one_line(answer.json()["detail"])
        except (ValueError, KeyError, TypeError):  # an error page of a proxy
            reason = answer.text[:200]
        message = f"{url}: {answer.status_code} {answer.reason}: {reason}"
        unavailable = answer.status_code in RETRIED or answer.status_code >= 500
        raise Unavailable(message) if unavailable else Refused(answer.status_code, message)

    def _request(self, method: str, url: str, data: bytes | None) -> requests.Response:
        send = partial(
            self._session.request, method, url, data=data, timeout=self._timeout, allow_redirects=False
        )
        try:
            return send()
        except requests.exceptions.ChunkedEncodingError:  # the answer broke off, which no Retry sees
            return send()


def _bearer(token: str) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """For `auth`. A token that is only a header would be replaced by a .netrc."""

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign


def _checked(kind: type[BaseModel], **fields: Any) -> BaseModel:
    """The body, checked as the service does, before anything is sent."""
    try:
        return kind(**fields)
    except ValidationError as error:
        raise Refused(422, api.in_one_line(error.errors())) from None
