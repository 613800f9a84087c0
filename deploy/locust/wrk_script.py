"""Print a script for wrk that sends the same request as the locust users: the first one of a model and kind."""

import argparse
import json
import sys
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

import kserve


def main() -> None:
    """Read the metadata of a model and print the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="http://127.0.0.1:8000", help="default: http://127.0.0.1:8000")
    parser.add_argument("--dynamic-dim", type=int, default=1)
    parser.add_argument("--picture-size", type=int, default=64)
    parser.add_argument("--shapes", type=kserve.parse_shapes, default={})
    parser.add_argument("model")
    parser.add_argument("kind", choices=kserve.KINDS)
    arguments = parser.parse_args()
    path = f"/v2/models/{quote(arguments.model, safe='')}"
    options = kserve.Options(arguments.shapes, arguments.dynamic_dim, arguments.picture_size)
    metadata, config = _get(arguments.host + path), _get(f"{arguments.host}{path}/config")
    if arguments.kind == kserve.IMAGE and not kserve.supports_images(metadata, config):
        sys.exit(f"{arguments.model} does not accept images")
    request = kserve.make_request(metadata, arguments.kind, options, 0, config)
    print('wrk.method = "POST"')
    print(f"wrk.path = {_quote(f'{path}/infer'.encode())}")
    for name, value in request.headers.items():
        print(f"wrk.headers[{_quote(name.encode())}] = {_quote(value.encode())}")
    print(f"wrk.body = {_quote(request.body)}")


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.load(response)
    except urllib.error.URLError as error:
        return sys.exit(f"GET {url}: {error}")


def _quote(data: bytes) -> str:
    """Return a string literal of Lua for any bytes."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ,.:;/{}[]()_-+=%"
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03d}" for byte in data) + '"'


if __name__ == "__main__":
    main()
