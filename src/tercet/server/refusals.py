"""What a client is told where it gets no answer: a status that the SDK knows, and `{"detail": …}`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tercet.errors import CheckpointError, TercetError


class Gone(TercetError):
    """A session or a promise is over, and nothing can bring it back; a client is told 410."""


class Busy(TercetError):
    """Too much waits already; a client is told 429."""


class Missing(TercetError):
    """What is asked for is not there; a client is told 404."""


STATUS = {Gone: 410, Missing: 404, CheckpointError: 404, Busy: 429}


def answer_errors(app: FastAPI) -> None:
    """Let the application say what went wrong."""
    app.add_exception_handler(TercetError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _no_endpoint)
    app.add_exception_handler(Exception, _failed)


async def _refused(request: Request, error: Exception) -> Response:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)
    return JSONResponse({"detail": str(error)}, status)


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
    return JSONResponse({"detail": f"{request.url.path} cannot read the request: {wrong}"}, 422)


async def _no_endpoint(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405):
        detail = f"{request.method} {request.url.path} is no endpoint of this server; docs/serve.md lists those it has"
        return JSONResponse({"detail": detail}, 404)
    return JSONResponse({"detail": error.detail}, error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    # The error goes on to uvicorn, whose log has all of it.
    detail = f"the server failed: {type(error).__name__}: {error}; its log has more"
    return JSONResponse({"detail": detail}, 500)
