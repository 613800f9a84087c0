"""Whether spans are sent, by OpenTelemetry's environment variables."""

import pytest

from ovms_rest.tracing.settings import INSTALL, PACKAGES, find_endpoint, is_installed, read_tracing

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


def read(*packages, **environ):
    """Read with these packages installed."""
    return read_tracing(environ, (packages or PACKAGES).__contains__)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SERVICE_NAME": "mine", "OTEL_TRACES_SAMPLER": "always_on"},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_traces_are_off_without_a_word(environ, caplog):
    assert read(**environ) is None
    assert not caplog.messages


@pytest.mark.parametrize(
    "environ",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector/v1/traces"},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "false", "OTEL_TRACES_EXPORTER": "otlp"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "console, otlp"},
        {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
    ],
)
def test_traces_are_on_with_an_endpoint(environ, caplog):
    assert read(**environ) is not None
    assert not caplog.messages


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is grpc; only http/protobuf is supported, usually at port 4318",
        ),
        (
            {**ENDPOINT, "OTEL_TRACES_EXPORTER": "zipkin"},
            "OTEL_TRACES_EXPORTER is zipkin; otlp and none are supported",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"},
            "the endpoint 'collector:4318' is not a URL such as http://127.0.0.1:4318",
        ),
    ],
)
def test_one_warning_says_why_no_traces_are_sent(environ, reason, caplog):
    assert read(**environ) is None
    assert caplog.messages == [f"no traces are sent: {reason}"]


@pytest.mark.parametrize("installed", [("none",), PACKAGES[:1], PACKAGES[1:]])
def test_one_warning_names_the_command_that_installs_opentelemetry(installed, caplog):
    assert read(*installed, **ENDPOINT) is None
    assert caplog.messages == [
        "no traces are sent: OpenTelemetry is not installed: pip install 'ovms_rest[otel]'",
    ]
    assert INSTALL in caplog.text


def test_packages_are_found_without_importing_them():
    assert all(map(is_installed, PACKAGES))
    assert not is_installed("ovms-rest-does-not-exist")


def test_sampler_is_chosen():
    assert read(**ENDPOINT)(None, "f" * 32)
    assert not read(**ENDPOINT, OTEL_TRACES_SAMPLER="Always_Off")(None, "f" * 32)
    assert not read(**ENDPOINT, OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.1")(None, "f" * 32)


@pytest.mark.parametrize("more", [{"OTEL_TRACES_SAMPLER": "jaeger_remote"}, {"OTEL_TRACES_SAMPLER": "traceidratio"}])
def test_invalid_sampler_is_replaced_by_the_default_with_a_warning(more, caplog):
    assert read(**ENDPOINT, **more, OTEL_TRACES_SAMPLER_ARG="2")(None, "f" * 32)
    (message,) = caplog.messages
    assert message.endswith("; parentbased_always_on is used")


def test_endpoint_of_traces_comes_first():
    assert find_endpoint({**ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://other"}) == "http://other"
    assert find_endpoint(ENDPOINT) == "http://127.0.0.1:4318"
    assert find_endpoint({}) == ""
