"""What goes wrong with a request, as OpenAI's API says it: a status, and an object that names the parameter."""

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """
    A request that is refused.

    Args:
        message: what was found and what was expected, for the person who wrote the client.
        status: of the response; 400 where the request is wrong as it stands.
        param: the part of the request that is meant, such as `messages[0].content`.
        code: what a program tells it by.
        retry_after: seconds after which the same request may be answered.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The error as the client gets it."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return JSONResponse(self.body, self.status, headers)


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

__all__ = ["ApiError"]
