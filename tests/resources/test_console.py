"""The console over HTTP: its files, its settings, and where it is served. tests/console has the page itself."""

import contextlib
import http.client
import re

import model_zoo
import pytest
from fake_app import client_of
from raw_http import exchange, head, parse
from service import PATIENCE, ROOT, Answer, free_port, serve, write_config

from ovms_rest.resources.console import FILES, ConsoleFile, ConsolePlace, ConsoleSettings, File, read_files
from ovms_rest.resources.console_origin import ConsolePorts
from ovms_rest.resources.entry_points import EntryPoints
from ovms_rest.resources.permission import Permission
from ovms_rest.settings import Settings

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
RESHAPE = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [4], "data": [1, 2, 3, 4]},
        {"name": "dims", "datatype": "INT64", "shape": [2], "data": [3, 3]},
    ]
}


def ask(port, method, path, headers=None, body=None):
    """Send a request to a port; return the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): text for name, text in response.getheaders()}, response.read())


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A service with a control address, whose port is `control`; the model "none" does not serve."""
    control, directory = free_port(), tmp_path_factory.mktemp("controlled")
    model_zoo.save(model_zoo.reshaping(), directory / "reshaping")
    config = write_config(directory, *({"name": name, "base_path": name} for name in ("reshaping", "none")))
    with serve(directory, "-w", "1", config=config, OVMS_REST_CONTROL_BIND=f"127.0.0.1:{control}") as running:
        running.control = control
        running.wait_for_workers(2)
        yield running


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    """A service below a prefix, with a bug in the resource of the liveness."""
    directory = tmp_path_factory.mktemp("mounted")
    faulty = directory / "faulty.py"
    faulty.write_text(
        "from ovms_rest.arbiter.gunicorn_settings import *\n"
        "from ovms_rest.resources.health import Live\n"
        "def on_get(self, req, resp): raise ValueError('a bug')\n"
        "Live.on_get = on_get\n"
    )
    with serve(directory, "-w", "1", "-c", str(faulty), SCRIPT_NAME="/models here") as running:
        yield running


# --- Files


def test_page_is_served_with_a_strict_policy(service):
    answer = service.get("/console")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.body == (FILES / "index.html").read_bytes()
    assert answer.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    expected = {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "permissions-policy": "camera=(self), geolocation=(), microphone=()",
        "cache-control": "no-cache",
    }
    assert {name: answer.headers.get(name) for name in expected} == expected


@pytest.mark.parametrize("path", sorted(path for path in read_files() if path))
def test_each_file_is_served_with_its_type(service, path):
    answer = service.get(f"/console{path}")
    assert (answer.status, answer.body) == (200, (FILES / path[1:]).read_bytes())
    kind = {"js": "text/javascript", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}[path.rpartition(".")[2]]
    assert answer.headers["content-type"] == kind
    assert (answer.headers["x-content-type-options"], "content-security-policy" in answer.headers) == ("nosniff", True)


def test_files_that_the_page_names_exist():
    page = (FILES / "index.html").read_text()
    named = re.findall(r'(?:src|href)="console(/[^"]+)"', page)
    assert len(named) > 4
    assert set(named) <= read_files().keys()


def test_page_and_modules_need_no_other_host():
    for path, file in read_files().items():
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"""(?:src|href|from|import|url)\b[\s=(]*["']?(?:https?:)?//""", text), path


def test_all_files_of_the_console_are_in_the_package():
    """A wheel has the files that package_data names."""
    lines = (ROOT / "setup.cfg").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.startswith("    console/")]
    packaged = {path for pattern in patterns for path in FILES.parent.glob(pattern)}
    assert {FILES / path.removeprefix("/") for path in read_files() if path} | {FILES / "index.html"} == packaged


def test_unchanged_file_is_not_sent_again(service):
    etag = service.get("/console").headers["etag"]
    for tags in (etag, f'"other", W/{etag}', "*"):
        answer = service.request("GET", "/console", headers={"If-None-Match": tags})
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
    assert service.request("GET", "/console", headers={"If-None-Match": '"other"'}).status == 200


def test_etag_depends_on_the_content(tmp_path):
    (tmp_path / "views").mkdir()
    for name, text in (("index.html", "a"), ("a.js", "a"), ("views/b.js", "b"), ("README.md", "not served")):
        (tmp_path / name).write_text(text)
    files = read_files(tmp_path)
    assert sorted(files) == ["", "/a.js", "/views/b.js"]
    assert files[""].tag == files["/a.js"].tag != files["/views/b.js"].tag
    assert files["/a.js"] == File(b"a", "text/javascript", files["/a.js"].tag)


@pytest.mark.parametrize("path", ["/console", "/console/console.js", "/console/settings", "/console/errors"])
def test_head_and_wrong_methods(service, path):
    answer = service.request("HEAD", path)
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["content-length"]) > 0
    answer = service.request("POST", path, b"")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert "is not allowed" in answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    [
        *("/console/none.js", "/console/views", "/console/index.html", "/console/README.md", "/consolex"),
        *(
            "/console/../settings.py",
            "/console/%2e%2e/settings.py",
            "/console/..%2fsettings.py",
            "/console//etc/passwd",
        ),
    ],
)
def test_unknown_files_get_404_as_json(service, path):
    (answer,) = parse(exchange(service, head("GET", path)))
    assert (answer.status, answer.headers["content-type"]) == (404, "application/json")
    assert "is unknown" in answer.json()["error"]


def test_page_with_a_slash_is_redirected_to_the_one_without(service):
    """The page's links to its files are relative, for a proxy may serve it below a prefix."""
    answer = service.get("/console/")
    assert (answer.status, answer.headers["location"]) == (308, "../console")


# --- The root


def test_root_redirects_browsers_to_the_console(service):
    answer = service.request("GET", "/", headers=HTML)
    assert (answer.status, answer.headers["location"], answer.headers["vary"]) == (302, "./console", "Accept")
    for accepted in ("*/*", "application/json", ";;,", "text/html;q=0", "application/json, text/html;q=0.5"):
        answer = service.request("GET", "/", headers={"Accept": accepted})
        assert (answer.status, answer.headers["vary"]) == (200, "Accept")
        assert answer.json()["routes"]["console, for browsers"] == "GET /console"


@pytest.mark.parametrize(("target", "location"), [("/prefix", "./prefix/console"), ("/prefix/", "./console")])
def test_redirect_stays_below_a_prefix(tmp_path, target, location):
    place = ConsolePlace(True, "", lambda: False, ConsolePorts())
    client = client_of({"/": EntryPoints(place)})
    answer = client.simulate_get("/", headers=HTML, extras={"RAW_URI": target, "SCRIPT_NAME": "/prefix"})
    assert (answer.status_code, answer.headers["location"]) == (302, location)


# --- Where it is served


def test_start_names_the_url(service, controlled):
    assert re.search(rf"; console: http://127\.0\.0\.1:{service.port}/console\n", service.log)
    assert re.search(rf"; console: http://127\.0\.0\.1:{controlled.control}/console\n", controlled.log)


def test_control_address_serves_it_instead_of_the_service(controlled):
    for path in ("/console", "/console/console.js", "/console/settings", "/console/errors"):
        assert ask(controlled.control, "GET", path).status == 200
        answer = controlled.get(path)
        assert answer.status == 404
        assert answer.json()["error"] == (
            f"the console is served on the control address only, 127.0.0.1:{controlled.control}"
        )
    assert ask(controlled.control, "GET", "/", HTML).status == 302
    answer = controlled.request("GET", "/", headers=HTML)
    assert (answer.status, answer.json()["name"]) == (200, "ovms_rest")


def test_it_is_off_by_its_setting(tmp_path):
    with serve(tmp_path, "-w", "1", OVMS_REST_CONSOLE="false") as off:
        assert "console: " not in off.log
        for path in ("/console", "/console/console.js", "/console/settings", "/console/errors"):
            answer = off.get(path)
            assert (answer.status, answer.json()["error"]) == (
                404,
                "the console is turned off; OVMS_REST_CONSOLE is false",
            )
        assert "GET /console" not in off.request("GET", "/", headers=HTML).json()["routes"].values()


def test_prefix_of_script_name_is_part_of_the_url(mounted):
    assert f"; console: http://127.0.0.1:{mounted.port}/models%20here/console\n" in mounted.log
    assert mounted.get("/models%20here/console").status == 200
    answer = mounted.request("GET", "/models%20here", headers=HTML)
    assert (answer.status, answer.headers["location"]) == (302, "./models%20here/console")


# --- What the page is told


def test_settings_allow_changes_where_the_service_does(service, controlled):
    assert service.get("/console/settings").json() == {"version": "0.1.0", "service": "", "obstacle": None}
    answer = service.request("GET", "/console/settings", headers={"Host": "evil.example"})
    assert answer.json()["obstacle"].startswith("is allowed from this host only")
    answer = ask(controlled.control, "GET", "/console/settings")
    assert answer.json()["obstacle"] is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "my-host.example"])
def test_page_on_the_control_address_may_call_the_service_on_the_same_host(controlled, host):
    headers = {"Host": f"{host}:{controlled.control}"}
    service = f"http://{host}:{controlled.port}"
    assert ask(controlled.control, "GET", "/console/settings", headers).json()["service"] == service
    policy = ask(controlled.control, "GET", "/console", headers).headers["content-security-policy"]
    assert f"; connect-src 'self' {service}; " in policy


@pytest.mark.parametrize("host", ["a b", "x; script-src *", "'self'", "*", "x,y", "u@x", "x:9:9", ""])
def test_host_that_is_no_name_does_not_reach_the_policy(host):
    place = ConsolePlace(True, "127.0.0.1:9000", lambda: True, ConsolePorts(8000, 9000))
    client = client_of({"/console": ConsoleFile(File(b"", "text/html", "1"), place)})
    answer = client.simulate_get("/console", headers={"Host": host})
    assert "; connect-src 'self'; " in answer.headers["content-security-policy"]


def test_page_that_came_through_a_proxy_calls_the_service_through_it(controlled):
    for name in ("X-Forwarded-For", "Forwarded", "Via"):
        answer = ask(controlled.control, "GET", "/console/settings", {name: "x"})
        assert answer.json()["service"] == ""


@pytest.mark.parametrize(("port", "service"), [(8000, "http://x:8000"), (None, None)])
def test_service_on_unix_sockets_only_has_no_address_for_a_page(port, service):
    place = ConsolePlace(True, "127.0.0.1:9000", lambda: True, ConsolePorts(port, 9000))
    client = client_of({"/console/settings": ConsoleSettings(place, Permission(Settings()))})
    assert client.simulate_get("/console/settings", headers={"Host": "x:9000"}).json["service"] == service


def test_service_answers_the_page_of_the_control_address_by_cors(controlled):
    origin = f"http://127.0.0.1:{controlled.control}"
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    too_large = (f"Host: 127.0.0.1:{controlled.port}", f"Origin: {origin}", "Content-Length: 999999999999")
    infer = "/v2/models/reshaping/infer"
    answers = [
        controlled.request("OPTIONS", infer, headers=asked),
        controlled.request("POST", infer, b"{}", {"Origin": origin}),
        controlled.request("GET", "/v2/models/none", headers={"Origin": origin}),
        controlled.raw(head("POST", infer, *too_large).replace(b"Host: x\r\n", b"")),
    ]
    assert [answer.status for answer in answers] == [200, 400, 404, 413]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-methods"] == "GET, HEAD, POST"
        assert answer.headers["access-control-allow-headers"] == "*"
    for other in (f"http://127.0.0.1:{controlled.port + 1}", f"http://evil.example:{controlled.control}"):
        answer = controlled.request("POST", infer, b"{}", {"Origin": other})
        assert "access-control-allow-origin" not in answer.headers
    load = "/v2/repository/models/reshaping/load"
    assert "access-control-allow-origin" not in controlled.request("OPTIONS", load, headers=asked).headers


def test_without_a_control_address_there_is_no_cors(service):
    answer = service.request("GET", "/v2", headers={"Origin": f"http://127.0.0.1:{service.port}"})
    assert "access-control-allow-origin" not in answer.headers


# --- Errors


def test_errors_of_all_processes_are_listed(controlled):
    assert controlled.infer("reshaping", RESHAPE).status == 400
    lines = ask(controlled.control, "GET", "/console/errors").json()["lines"]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert all(line["text"] in controlled.log for line in lines)
    (first,) = [line for line in lines if line["text"].startswith("model 'none' does not serve: ")]
    assert (first["process"], first["level"]) == (controlled.process.pid, "ERROR")
    start = "inference of model 'reshaping' version 1 failed: "
    (last,) = [line for line in lines if line["text"].startswith(start)]
    assert (last["process"] in controlled.workers(), last["level"]) == (True, "WARNING")


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}])
def test_errors_are_not_for_pages_of_other_sites(service, headers):
    answer = service.request("GET", "/console/errors", headers=headers)
    assert answer.status == 403
    assert "is not allowed for web pages of other sites: " in answer.json()["error"]


def test_bug_in_a_resource_is_among_the_errors(mounted):
    """Falcon writes it to the log of WSGI, not to a logger."""
    assert mounted.get("/models%20here/v2/health/live").status == 500
    (line,) = mounted.get("/models%20here/console/errors").json()["lines"]
    assert (line["level"], line["text"]) == ("ERROR", "GET /v2/health/live failed: ValueError: a bug")
    assert "ValueError: a bug" in mounted.log
