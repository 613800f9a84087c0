"""Certificates and keys: read once by the arbiter, for all workers, and kept when new ones cannot be used."""

import os
import signal
import ssl
import subprocess

import model_zoo
import pytest
from generations import hang_up
from gunicorn.config import Config
from service import receive, repeating, run_to_end, serve

from ovms_rest.arbiter.tls import TlsError, load_tls

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def make_pair(directory, name):
    """Make a self-signed certificate and its key."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", f"{name}.key", "-out", f"{name}.pem"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def arguments(tmp_path):
    """Arguments for two workers with a pair of files."""
    for name in ("used", "other"):
        make_pair(tmp_path, name)
    return ("-w", "2", "--certfile", str(tmp_path / "used.pem"), "--keyfile", str(tmp_path / "used.key"))


def replace(directory, kind):
    (directory / f"used.{kind}").write_bytes((directory / f"other.{kind}").read_bytes())


def served_certificate(service):
    """Make a request and return the certificate of the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(service.connect()) as connection:
        connection.sendall(LIVE)
        assert receive(connection).status == 200
        return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True))


def clients(service):
    """Make requests continuously; none may fail."""
    return repeating(lambda: served_certificate(service))


def test_half_replaced_pair_keeps_the_one_in_use_until_a_reload_finds_it_whole(tmp_path, relu, arguments):
    old, new = ((tmp_path / f"{name}.pem").read_text() for name in ("used", "other"))
    with serve(tmp_path, *arguments, config=relu) as service:
        service.wait_for(lambda: len(service.workers()) == 2)
        assert served_certificate(service) == old
        replace(tmp_path, "pem")
        with clients(service):
            model_zoo.save(model_zoo.relu(), tmp_path / "relu", version=2)
            hang_up(service)
        assert service.log.count("key values mismatch") == 1
        assert service.log.count("Booting worker") == 4
        assert "relu' version 2 serves" in service.log  # what else the reload is about is done
        # A worker that dies now is replaced by one with the pair in use.
        for pid in service.workers():
            os.kill(pid, signal.SIGKILL)
        service.wait_for(lambda: len(service.workers()) == 2 and service.log.count("Booting worker") == 6)
        assert served_certificate(service) == old
        replace(tmp_path, "key")
        with clients(service):
            hang_up(service)
        assert served_certificate(service) == new


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start workers of another user")
def test_key_that_only_root_may_read_serves_for_workers_of_another_user(tmp_path, relu, arguments):
    (tmp_path / "used.key").chmod(0o600)
    with serve(tmp_path, *arguments, "--user", "nobody", "--group", "nogroup", config=relu) as service:
        assert served_certificate(service) == (tmp_path / "used.pem").read_text()
        service.wait_for_workers(2)
        assert all(os.stat(f"/proc/{pid}").st_uid for pid in service.workers())
        os.kill(service.workers()[0], signal.SIGKILL)
        service.wait_for(lambda: service.log.count("Booting worker") == 3)
        assert served_certificate(service)


def test_unusable_pair_ends_the_start_with_a_line_before_models_are_loaded(tmp_path, relu, arguments):
    replace(tmp_path, "pem")
    ended = run_to_end(tmp_path, *arguments, OVMS_REST_CONFIG=str(relu))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert f"cannot use certfile '{tmp_path}/used.pem', keyfile '{tmp_path}/used.key': " in line
    assert "key values mismatch" in line


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"certfile": "used.pem", "keyfile": "none.key"}, "keyfile: No such file or directory"),
        ({"certfile": "none.pem", "keyfile": "used.key"}, "certfile: No such file or directory"),
        ({"certfile": "used.pem", "keyfile": "used.key", "ca_certs": "."}, "ca_certs: Is a directory"),
        ({"certfile": "used.pem", "keyfile": "used.key", "ciphers": "NONE_OF_THESE"}, "No cipher can be selected"),
        ({"certfile": "used.pem"}, "PEM"),
        ({"keyfile": "used.key"}, "a keyfile needs a certfile"),
        ({"certfile": "used.pem", "keyfile": "pipe"}, "keyfile: it is not a regular file"),
    ],
)
def test_tls_error_names_the_file(tmp_path, arguments, settings, reason):
    os.mkfifo(tmp_path / "pipe")
    cfg = Config()
    for name, value in settings.items():
        cfg.set(name, value if name == "ciphers" else str(tmp_path / value))
    with pytest.raises(TlsError) as caught:
        load_tls(cfg)
    assert reason in str(caught.value)


def test_no_files_mean_no_tls():
    assert load_tls(Config()) is None
