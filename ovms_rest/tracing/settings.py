"""The settings of traces: OpenTelemetry's environment variables.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ and .../protocol/exporter/. Those of
the exporter (headers, timeout, compression, certificates), of the resource and of batches are read by the process that
sends the spans.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

from ovms_rest.log import log
from ovms_rest.tracing.sampling import DEFAULT, Sampler, choose_sampler

INSTALL = "pip install 'ovms_rest[otel]'"

PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
_PROTOCOL = "http/protobuf"


def is_installed(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def find_endpoint(environ: Mapping[str, str]) -> str:
    """Return where spans are to be sent, "" for nowhere."""
    return environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")


def read_tracing(environ: Mapping[str, str], is_installed: Callable[[str], bool] = is_installed) -> Sampler | None:
    """Return which requests to record, None if no spans are to be sent.

    The log says in one line why spans are not sent although an endpoint is set, unless a variable turns them off.
    """
    endpoint = find_endpoint(environ)
    exporters = {name.strip().lower() for name in environ.get("OTEL_TRACES_EXPORTER", "").split(",")} - {""}
    if not endpoint or exporters == {"none"} or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = (
        environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "")
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
        or _PROTOCOL
    )
    if exporters and "otlp" not in exporters:
        _refuse(f"OTEL_TRACES_EXPORTER is {', '.join(sorted(exporters))}; otlp and none are supported")
    elif protocol.lower() != _PROTOCOL:
        _refuse(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; only {_PROTOCOL} is supported, usually at port 4318")
    elif not endpoint.lower().startswith(("http://", "https://")):
        _refuse(f"the endpoint {endpoint!r} is not a URL such as http://127.0.0.1:4318")
    elif not all(map(is_installed, PACKAGES)):
        _refuse(f"OpenTelemetry is not installed: {INSTALL}")
    else:
        return _find_sampler(environ)
    return None


def _refuse(reason: str) -> None:
    log.warning("no traces are sent: %s", reason)


def _find_sampler(environ: Mapping[str, str]) -> Sampler:
    """Return the sampler; as the specification asks, the default one for an unknown name or an invalid ratio."""
    name = (environ.get("OTEL_TRACES_SAMPLER", "") or DEFAULT).lower()
    try:
        return choose_sampler(name, environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
    except ValueError as error:
        log.warning("%s; %s is used", error, DEFAULT)
        return choose_sampler(DEFAULT, "")
