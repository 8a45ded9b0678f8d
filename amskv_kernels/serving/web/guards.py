"""What stands before the routes: the key, the size of a body, and how a refusal is told."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amskv_kernels.arguments import shown
from amskv_kernels.serving.web.schema import ErrorBody, ErrorDetail

MOST_BYTES = 2**16  # of a body; the longest request that means anything has 3 KB
_SCHEME = HTTPBearer(auto_error=False)


class RefusedError(Exception):
    """A request that gets an error, in the form of OpenAI's API."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        told, named = (None if text is None else _printable(text) for text in (message, param))
        self.status = status
        self.body = ErrorBody(error=ErrorDetail(message=told or "", type=kind, param=named, code=code))
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}


class BodyLimit:
    """Refuses bodies of more than `MOST_BYTES`, before they are read where they say so."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        declared, seen = int(length) if length.isdigit() and len(length) < 20 else 0, 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive() if declared <= MOST_BYTES else {}
            seen += len(message.get("body", b""))
            if max(declared, seen) > MOST_BYTES:
                raise HTTPException(413, f"the body must have at most {MOST_BYTES} bytes")
            return message

        await self.app(scope, counted, send)


def bearer(key: str) -> Callable[..., None]:
    """A dependency that asks for `Authorization: Bearer KEY`."""

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_SCHEME)]) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), key.encode()):
            raise RefusedError(401, "the request must bear the key: Authorization: Bearer …", code="invalid_api_key")

    return check


def handle_errors(app: FastAPI, count: Callable[[int], None]) -> None:
    """Every refusal in the same form, and counted by its status."""

    def refuse(_: Request, error: Any) -> JSONResponse:
        count(error.status)
        return JSONResponse(error.body.model_dump(), error.status, error.headers)

    def refuse_fields(request: Request, error: Any) -> JSONResponse:
        wrong = error.errors()[0]
        param = ".".join(str(part) for part in wrong["loc"][1:] if isinstance(part, str)) or "body"
        value = "" if wrong["type"] == "missing" else f" is {shown(wrong.get('input'))}"
        return refuse(request, RefusedError(400, f"{param}{value}: {wrong['msg']}", param))

    def refuse_plainly(request: Request, error: Any) -> JSONResponse:
        param = "body" if error.status_code == 400 else None  # FastAPI's own, of a body that is no text
        found = refuse(request, RefusedError(error.status_code, str(error.detail), param))
        found.headers.update(error.headers or {})
        return found

    def fail(request: Request, _: Exception) -> JSONResponse:
        return refuse(request, RefusedError(500, "the server failed; its log says why", code="failed"))

    app.add_exception_handler(RefusedError, refuse)
    app.add_exception_handler(RequestValidationError, refuse_fields)
    app.add_exception_handler(AnyHTTPException, refuse_plainly)
    app.add_exception_handler(Exception, fail)


def _printable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may name and UTF-8 cannot hold."""
    return text.encode(errors="backslashreplace").decode()
