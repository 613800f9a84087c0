"""CORS as OVMS has it: its four options are sent with every response as they are."""

import falcon

from ovms_rest.settings import Settings, cors_headers


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
