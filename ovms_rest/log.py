"""The logger of the package, a child of gunicorn's, which has the handlers and the level."""

import logging

log = logging.getLogger("gunicorn.error.ovms_rest")
