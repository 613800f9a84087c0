"""Permission to change the service, by the origin of a request."""

import socket

import falcon
import pytest
from falcon import testing

from ovms_rest.errors import ForbiddenError
from ovms_rest.resources.permission import Permission
from ovms_rest.settings import Settings

PATH = "/v2/repository/models/m/load"
LOCAL = Permission(Settings(model_control="local"))
ONLY_LOCAL = f"POST {PATH} is allowed from this host only, not through a proxy or from a web page of another site: "
HERE = socket.gethostname()
NAMES = (
    *("localhost", "LocalHost:8000", "localhost.", "a.localhost:1", "127.0.0.1:8000", "127.8.8.8", "[::1]:8000"),
    *("[::1]", HERE, f"{HERE.upper()}:8000"),
)
FOREIGN_NAMES = (
    *("evil.example", "evil.example:8000", "localhost.evil.example", "evillocalhost", "127.0.0.1.evil.example"),
    *("192.0.2.1", "[2001:db8::1]:8000"),  # of documentation (RFC 5737, RFC 3849)
    *("224.0.0.1", "localhost,evil.example", "", "127.1", "2130706433"),
)


def check(permission, address="127.0.0.1", target=PATH, **headers):
    """Return the message that refuses a request, None if it is allowed."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    environ = testing.create_environ(PATH, method="POST", headers={"Host": "127.0.0.1:8000", **headers})
    try:
        permission.check(falcon.Request({**environ, "REMOTE_ADDR": address, "RAW_URI": target}))
    except ForbiddenError as error:
        return str(error)
    return None


def on_control_address(**settings):
    return Permission(Settings(control_bind="127.0.0.1:9000", **settings), lambda: True)


# --- The default


def test_default_refuses_everyone_without_a_control_address():
    message = (
        f"POST {PATH} is allowed on a control address only, and none is configured; OVMS_REST_CONTROL_BIND sets one; "
        "OVMS_REST_MODEL_CONTROL=local would allow it from this host"
    )
    assert check(Permission(Settings())) == message


def test_default_allows_the_control_address_only():
    permission = Permission(Settings(control_bind="127.0.0.1:9000"))
    message = (
        "is allowed on the control address only, 127.0.0.1:9000; OVMS_REST_MODEL_CONTROL is 'auto'; 'local' would "
        "allow it from this host too"
    )
    assert check(permission) == f"POST {PATH} {message}"
    assert check(on_control_address(), "10.0.0.1") is None


# --- local


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", ""])
def test_local_allows_this_host(address):
    """A client on a Unix socket has no address."""
    assert check(LOCAL, address) is None


@pytest.mark.parametrize("address", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "2001:db8::1", "nonsense"])
def test_local_refuses_other_hosts_and_names_the_setting(address):
    message = (
        f"the request comes from {address}; OVMS_REST_MODEL_CONTROL is 'local'; 'all' would allow it from anywhere"
    )
    assert check(LOCAL, address) == ONLY_LOCAL + message
    assert check(Permission(Settings(model_control="all")), address) is None


@pytest.mark.parametrize(
    "header",
    ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Any", "Forwarded", "X-Real-IP", "Via"],
)
@pytest.mark.parametrize("value", ["10.0.0.1", "127.0.0.1", ""])
def test_local_refuses_requests_through_a_proxy(header, value):
    refusal = check(LOCAL, **{header: value})
    assert refusal.lower().startswith(f"{ONLY_LOCAL}the request has the header {header}; ".lower())


@pytest.mark.parametrize("host", NAMES)
def test_local_accepts_names_of_this_host(host):
    assert check(LOCAL, Host=host) is None
    assert check(LOCAL, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin") is None


@pytest.mark.parametrize("host", FOREIGN_NAMES)
def test_local_refuses_names_of_other_hosts(host):
    """A page can have its name bound to this host's address after it was loaded (DNS rebinding)."""
    assert f": {host!r} is not a name or address of this host; " in check(LOCAL, Host=host)
    if host:
        assert check(LOCAL, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin") is not None


def test_local_refuses_a_foreign_authority_in_the_target():
    """RFC 9112 section 3.2.2: it replaces Host."""
    assert "'evil.example:80' is not a name" in check(LOCAL, target=f"http://evil.example:80{PATH}")
    assert check(LOCAL, target=f"http://localhost:8000{PATH}") is None


FOREIGN_PAGES = [
    {"Origin": "http://evil.example"},
    {"Origin": "https://127.0.0.1:8443"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "http://127.0.0.1:8000.evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "file://"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": ""},
    {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN_PAGES)
def test_pages_of_other_sites_are_refused(headers):
    assert check(LOCAL, **headers).startswith((f"{ONLY_LOCAL}Origin is ", f"{ONLY_LOCAL}Sec-Fetch-Site is "))
    refusal = check(on_control_address(), **headers)
    assert refusal.startswith(f"POST {PATH} is not allowed for web pages of other sites: ")
    assert check(on_control_address(model_control="local"), **headers) == refusal


@pytest.mark.parametrize("name", ["Host", "Origin", "Sec-Fetch-Site"])
def test_long_value_is_cut_in_the_message(name):
    message = check(LOCAL, **{name: "x" * 8000})
    assert f"'{'x' * 60}...'" in message
    assert len(message) < 300


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "none"}, {"Origin": "http://127.0.0.1:8000"}])
def test_pages_of_the_service_itself_are_allowed(headers):
    assert check(LOCAL, **headers) is None
    assert check(on_control_address(), **headers) is None


# --- The control address


@pytest.mark.parametrize("host", FOREIGN_NAMES)
def test_control_address_refuses_pages_under_a_foreign_name(host):
    """DNS rebinding reaches it too. Browsers put Origin into every POST."""
    for headers in ({"Origin": f"http://{host}"}, {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}):
        assert check(on_control_address(), Host=host, **headers) is not None


def test_tools_and_proxies_may_use_any_name_for_the_control_address():
    assert check(on_control_address(), "10.0.0.1", Host="ovms.svc.cluster.local", Via="1.1 proxy") is None
    assert check(on_control_address(), Host="ovms.example", X_Forwarded_For="10.0.0.1") is None


def test_page_may_come_through_a_proxy_that_changes_host():
    assert check(on_control_address(), Origin="https://ovms.example", Sec_Fetch_Site="same-origin") is None
    assert "Origin is " in check(LOCAL, Origin="https://ovms.example", Sec_Fetch_Site="same-origin")


def test_control_address_may_be_bound_by_name():
    permission = Permission(Settings(control_bind="ovms.example:9000"), lambda: True)
    assert check(permission, Host="ovms.example:9000", Origin="http://ovms.example:9000") is None


# --- none and all


def test_none_refuses_the_control_address_too():
    permission = on_control_address(model_control="none")
    assert check(permission) == f"POST {PATH} is not allowed over HTTP; OVMS_REST_MODEL_CONTROL is 'none'"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(), "disabled, as OVMS_REST_CONTROL_BIND is not set"),
        (Settings(control_bind="127.0.0.1:9000"), "on the control address 127.0.0.1:9000"),
        (Settings(model_control="local"), "from this host"),
        (
            Settings(model_control="local", control_bind="127.0.0.1:9000"),
            "from this host and on the control address 127.0.0.1:9000",
        ),
        (Settings(model_control="all"), "from anywhere"),
        (Settings(model_control="none", control_bind="127.0.0.1:9000"), "disabled"),
    ],
)
def test_permission_describes_itself(settings, words):
    assert Permission(settings).describe() == words
