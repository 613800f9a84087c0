"""Found by gunicorn in the working directory; the settings themselves are part of the package."""

from ovms_rest.arbiter.gunicorn_settings import *  # noqa: F403
