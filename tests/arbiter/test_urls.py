"""URLs of listen addresses."""

import pytest

from ovms_rest.arbiter.urls import find_port, find_url

PORT, WILDCARD, IPV6 = ("10.0.0.1", 80), ("0.0.0.0", 8000), ("::", 8000, 0, 0)  # noqa: S104


@pytest.mark.parametrize(
    ("addresses", "is_tls", "url"),
    [
        ([PORT, WILDCARD], False, "http://10.0.0.1:80/a"),
        ([WILDCARD], True, "https://127.0.0.1:8000/a"),
        ([IPV6], False, "http://[::1]:8000/a"),
        (["/run/x", PORT], False, "http://10.0.0.1:80/a"),
        (["/run/x"], False, "/a on unix:/run/x"),
        ([b"/run/x"], False, "/a on unix:/run/x"),
        ([], False, "/a"),
    ],
)
def test_url_is_that_of_the_first_address_with_a_port(addresses, is_tls, url):
    assert find_url(addresses, is_tls, "/a") == url


def test_path_of_a_url_is_encoded():
    assert find_url([PORT], False, "/a b/\xc3\xa4").endswith(":80/a%20b/%C3%A4")


def test_port_is_the_first_one():
    assert (find_port(["/run/x", PORT, WILDCARD]), find_port(["/run/x"])) == (80, None)
