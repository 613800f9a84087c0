"""CORS as OVMS has it: its four options are sent with every response as they are."""

import falcon

from ovms_rest.settings import Settings


class Cors:
    """Falcon middleware that adds the headers."""

    def __init__(self, settings: Settings) -> None:
        """Prepare the headers from the settings."""
        self._headers = cors_headers(settings)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Add the headers, to errors too."""
        resp.set_headers(self._headers)


def cors_headers(settings: Settings) -> dict[str, str]:
    """Return the headers of every response, none when CORS is off."""
    if not settings.allowed_origins:
        return {}
    headers = {
        "Access-Control-Allow-Origin": settings.allowed_origins,
        "Access-Control-Allow-Methods": settings.allowed_methods,
        "Access-Control-Allow-Headers": settings.allowed_headers,
        # A page could not read a binary answer without it.
        "Access-Control-Expose-Headers": "Inference-Header-Content-Length",
    }
    if settings.allow_credentials:
        headers["Access-Control-Allow-Credentials"] = "true"
    return headers
