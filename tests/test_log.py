"""The logger of the package."""

import logging

from ovms_rest.log import log


def test_records_reach_the_handlers_of_gunicorn_at_its_level(caplog):
    gunicorn = logging.getLogger("gunicorn.error")
    gunicorn.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, "gunicorn.error")
    log.info("left out")
    log.warning("logged")
    gunicorn.removeHandler(caplog.handler)
    assert "logged" in caplog.messages
    assert "left out" not in caplog.messages
