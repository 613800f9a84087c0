"""CORS as in OVMS: the values of its four options are sent with every response."""

import falcon

from ovms_rest.settings import Settings, cors_headers


class Cors:
    """Falcon middleware that adds the headers to every response, errors included."""

    def __init__(self, settings: Settings) -> None:
        self._headers = cors_headers(settings)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Add the headers."""
        resp.set_headers(self._headers)
