"""Locust users that read the metadata of models and send inferences that fit it, and check each response.

README.md says how to run it. Requests appear in locust's statistics as "MODEL KIND", such as "digits binary".
"""

import argparse
import glob
import itertools
import logging
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import gevent
import kserve
from gevent.lock import BoundedSemaphore
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.runners import WorkerRunner
from locust.user.wait_time import constant_throughput

log = logging.getLogger(__name__)

VARIANTS = 4  # different requests per model and kind, sent in random order
RETRY_SECONDS = 1.0  # before a user tries again to read the metadata


@events.init_command_line_parser.add_listener
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, which the web page shows as well, except those in a group."""
    add = partial(parser.add_argument, type=str, default="")
    add("--models", help="models and pipelines to send to, separated by commas; default: all that GET /v2/models lists")
    for kind in kserve.KINDS:
        add(f"--{kind}-weight", type=_weight, default=1.0, help=f"relative frequency of {kind} requests; default: 1")
    add("--shapes", type=_checked(kserve.parse_shapes), help='shapes of inputs: "[MODEL/]INPUT=1,64,64,1;INPUT=2,4"')
    add("--dynamic-dim", type=int, default=1, help="size of every other dynamic dim; default: 1")
    add("--picture-size", type=int, default=64, help="height and width of pictures where they are dynamic; default: 64")
    add("--integers", type=_checked(kserve.parse_range), default="0:1", help="range of integer values; default: 0:1")
    parser.add_argument(
        "--pictures",
        default="",
        include_in_web_ui=False,  # or every visitor of the page could send any file of this host
        help="image files to send instead of generated ones, as a pattern such as 'pictures/*.jpg'",
    )
    add("--allow-no-content", type=int, default=0, help="1: accept 204 from a pipeline that found nothing; default: 0")
    add("--rate-per-user", type=float, default=0.0, help="requests/s of each user; default: 0, no limit")
    add(
        "--max-fail-ratio",
        type=float,
        default=0.0,
        help="exit with status 1 if more requests fail; default: 0",
    )
    add("--max-p99-ms", type=float, default=0.0, help="exit with status 1 if p99 is above it; default: 0, no limit")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        type=_checked(_parse_header),
        include_in_web_ui=False,
        help='header of every request, such as "X-API-Key: SECRET"; may be repeated',
    )


def _weight(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return value


def _parse_header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip()):
        raise ValueError(f'expected "NAME: VALUE", got {text!r}')
    return name.strip(), value.strip()


def _checked(parse: Any) -> Any:
    """Check an argument when it is parsed, but keep its text, which the web page and workers exchange."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return check


class Prepared(NamedTuple):
    """A request and the expectations on its response."""

    path: str
    label: str
    metadata: dict[str, Any]
    request: kserve.Request


class Plan:
    """The requests of this process, made from the metadata that its first user reads."""

    def __init__(self) -> None:
        """Begin without requests."""
        self._reading = BoundedSemaphore()
        self._requests: dict[str, list[Prepared]] = {}
        self._kinds: list[str] = []
        self._weights: list[float] = []

    def ensure(self, user: "KServeUser") -> bool:
        """Read the metadata if necessary; return whether the requests are ready. Failures are in the statistics."""
        if self._kinds:
            return True
        with self._reading:
            if not self._kinds:
                try:
                    self._read(user)
                except kserve.UnusableError as error:
                    _report(user.environment, error)
                except kserve.WrongAnswerError:
                    pass  # the request is in the statistics as a failure
            return bool(self._kinds)

    def draw(self) -> Prepared:
        """Return a request of a kind drawn by the weights, to any of the models that take this kind."""
        kind = random.choices(self._kinds, self._weights)[0]
        return random.choice(self._requests[kind])

    def _read(self, user: "KServeUser") -> None:
        arguments = user.environment.parsed_options
        options = _options(arguments)
        weights = {kind: getattr(arguments, f"{kind}_weight") for kind in kserve.KINDS}
        names = [name.strip() for name in arguments.models.split(",") if name.strip()] or user.list_models()
        models = [(user.read_metadata(name), user.read_config(name)) for name in names]
        _check_names(options, [metadata for metadata, _ in models])
        requests: dict[str, list[Prepared]] = {kind: [] for kind in kserve.KINDS if weights[kind]}
        for (metadata, config), kind in itertools.product(models, requests):
            if kind == kserve.IMAGE and not kserve.supports_images(metadata, config):
                continue
            path = f"/v2/models/{quote(metadata['name'], safe='')}/infer"
            for seed in range(VARIANTS):
                request = kserve.make_request(metadata, kind, options, seed, config)
                request.headers.update(user.headers)
                requests[kind].append(Prepared(path, f"{metadata['name']} {kind}", metadata, request))
                gevent.sleep(0)  # large bodies take a while to make
        if requests.get(kserve.IMAGE) == []:
            log.warning("no model accepts images ([n,height,width,1, 3 or 4] of floats or UINT8)")
        self._requests = {kind: prepared for kind, prepared in requests.items() if prepared}
        if not self._requests:
            raise kserve.UnusableError("there is no request to send: all kinds that the models accept have weight 0")
        self._weights = [weights[kind] for kind in self._requests]
        self._kinds = list(self._requests)


def _options(arguments: argparse.Namespace) -> kserve.Options:
    """Read the arguments that shape requests. Raises UnusableError; the web page does not check them."""
    files = sorted(glob.glob(arguments.pictures, recursive=True)) if arguments.pictures else []
    if arguments.pictures and not files:
        raise kserve.UnusableError(f"--pictures: no file matches {arguments.pictures}")
    if arguments.dynamic_dim < 0 or arguments.picture_size < 1:
        raise kserve.UnusableError("--dynamic-dim must not be negative, and --picture-size must be positive")
    try:
        return kserve.Options(
            shapes=kserve.parse_shapes(arguments.shapes),
            dynamic_dim=arguments.dynamic_dim,
            picture_size=arguments.picture_size,
            integers=kserve.parse_range(arguments.integers),
            pictures=[Path(file).read_bytes() for file in files],
            allow_no_content=bool(arguments.allow_no_content),
        )
    except (ValueError, OSError) as error:
        raise kserve.UnusableError(str(error)) from error


def _check_names(options: kserve.Options, models: list[dict[str, Any]]) -> None:
    known = {name for model in models for tensor in model["inputs"] for name in _names(model["name"], tensor["name"])}
    if unknown := options.shapes.keys() - known:
        raise kserve.UnusableError(f"--shapes: no model has the input {', '.join(sorted(unknown))}")


def _names(model: str, tensor: str) -> tuple[str, str]:
    return tensor, f"{model}/{tensor}"


def _report(environment: Environment, error: Exception) -> None:
    """Count a failure that belongs to no request."""
    environment.events.request.fire(
        request_type="PLAN", name="requests", response_time=None, response_length=0, exception=error, context={}
    )


plan = Plan()


@events.test_start.add_listener
def forget_requests(**_: Any) -> None:
    """Make new requests for each test: the web page may have changed the options."""
    global plan
    plan = Plan()


class KServeUser(FastHttpUser):
    """A client that sends inferences one after another on a kept-alive connection."""

    def on_start(self) -> None:
        """Take the headers and the rate from the arguments."""
        arguments = self.environment.parsed_options
        # Responses are compressed only on request, because decompressing them costs more than most inferences.
        self.headers = {"Accept-Encoding": "identity", **dict(map(_parse_header, arguments.header))}
        if arguments.rate_per_user:
            self.wait_time = partial(constant_throughput(arguments.rate_per_user), self)

    @task
    def infer(self) -> None:
        """Send one request and check its response."""
        if not plan.ensure(self):
            gevent.sleep(RETRY_SECONDS)
            return
        path, label, metadata, request = plan.draw()
        with self.client.post(
            path, data=request.body, headers=request.headers, name=label, catch_response=True
        ) as response:
            if not response.status_code:
                return  # locust reports the reason
            length = response.headers.get("Inference-Header-Content-Length")
            allow_no_content = bool(self.environment.parsed_options.allow_no_content)
            try:
                kserve.check_answer(metadata, request, response.status_code, length, response.content, allow_no_content)
            except kserve.WrongAnswerError as error:
                response.failure(error)
            else:
                response.success()

    def list_models(self) -> list[str]:
        """Return the names of all models and pipelines with a version that serves. Raises WrongAnswerError."""
        names: list[str] = self._get("/v2/models", "/v2/models", kserve.check_models)
        if not names:
            raise kserve.UnusableError("GET /v2/models lists no model that serves")
        return names

    def read_metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of a model. Raises WrongAnswerError."""
        path = f"/v2/models/{quote(name, safe='')}"
        return self._get(path, f"/v2/models/{name}", partial(kserve.check_metadata, name))

    def read_config(self, name: str) -> dict[str, Any] | None:
        """Return Triton's configuration of a model, which has the layout; None where the server has no such route."""
        path = f"/v2/models/{quote(name, safe='')}/config"
        return self._get(path, f"/v2/models/{name}/config", kserve.read_object, missing=(401, 403, 404, 405))

    def _get(self, path: str, label: str, check: Any, missing: tuple[int, ...] = ()) -> Any:
        """Send a GET request and return the result of `check`, None for a status in `missing`."""
        with self.client.get(path, headers=self.headers, name=label, catch_response=True) as response:
            if not response.status_code:
                raise_for = kserve.WrongAnswerError(f"{type(response.error).__name__}: {response.error}")
                response.failure(raise_for)
                raise raise_for
            if response.status_code in missing:
                response.success()
                return None
            try:
                found = check(response.status_code, response.content)
            except kserve.WrongAnswerError as error:
                response.failure(error)
                raise
            response.success()
            return found


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Set the exit status, unless a load shape has set it."""
    if isinstance(environment.runner, WorkerRunner) or environment.process_exit_code is not None:
        return
    arguments, total = environment.parsed_options, environment.stats.total
    faults = []
    if not total.num_requests:
        faults.append("no request was made")
    if total.fail_ratio > arguments.max_fail_ratio:
        faults.append(f"{total.fail_ratio:.2%} of the requests failed, more than {arguments.max_fail_ratio:.2%}")
    p99 = total.get_response_time_percentile(0.99)
    if 0 < arguments.max_p99_ms < p99:
        faults.append(f"p99 is {p99} ms, more than {arguments.max_p99_ms:g} ms")
    for fault in faults:
        log.error("failed: %s", fault)
    if faults:
        environment.process_exit_code = 1
    elif total.num_failures and not environment.runner.exceptions:
        environment.process_exit_code = 0  # locust's own rule is 1 for any failure
