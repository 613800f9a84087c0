"""From where the service may be changed."""

import falcon
import pytest
from falcon import testing

from ovms_rest.errors import ForbiddenError
from ovms_rest.serving.permission import Permission
from ovms_rest.settings import Settings

PATH = "/v2/repository/models/m/load"


def check(permission, address="127.0.0.1", **headers):
    """Return why a request from that address is refused, None when it is not."""
    environ = testing.create_environ(PATH, method="POST", remote_addr=address, headers=headers)
    try:
        permission.check(falcon.Request({**environ, "REMOTE_ADDR": address}))
    except ForbiddenError as error:
        return str(error)
    return None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", ""])
def test_this_host_may(address):
    """A client on a Unix socket has no address."""
    assert check(Permission(Settings()), address) is None


@pytest.mark.parametrize("address", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "2001:db8::1", "nonsense"])
def test_others_may_not_unless_all_may(address):
    message = f"POST {PATH} is allowed from this host only; OVMS_REST_MODEL_CONTROL is 'auto'"
    assert check(Permission(Settings()), address) == message
    assert check(Permission(Settings(model_control="all")), address) is None


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
def test_a_proxy_on_this_host_does_not_open_it_to_its_clients(header):
    message = f"POST {PATH} is allowed from this host only, and not through a proxy; OVMS_REST_MODEL_CONTROL is 'auto'"
    assert check(Permission(Settings()), **{header: "10.0.0.1"}) == message


def test_a_control_address_is_the_only_one_where_it_may_be():
    permission = Permission(Settings(control_bind="127.0.0.1:9000"))
    message = "is allowed on the control address only, 127.0.0.1:9000; OVMS_REST_MODEL_CONTROL is 'auto'"
    assert check(permission) == f"POST {PATH} {message}"
    permission.is_control_address = True
    assert check(permission, "10.0.0.1") is None


def test_nobody_may_where_it_is_turned_off():
    permission = Permission(Settings(model_control="none"))
    assert not permission.is_possible
    assert check(permission) == f"POST {PATH} is not allowed over HTTP; OVMS_REST_MODEL_CONTROL is 'none'"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(), "from this host"),
        (Settings(control_bind="127.0.0.1:9000"), "on the control address 127.0.0.1:9000"),
        (Settings(model_control="all"), "from everywhere"),
        (Settings(model_control="none"), "from nowhere"),
    ],
)
def test_where_it_may_be_is_told(settings, words):
    assert Permission(settings).describe() == words
