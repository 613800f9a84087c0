"""Loads run at a low priority, and only they do."""

import ast
import contextlib
import os
import resource
import sys
import threading
import time

import model_zoo
import pytest
from service import serve, write_config

from ovms_rest.errors import LoadError
from ovms_rest.host import priority
from ovms_rest.host.priority import core_seconds, run_lowered, wants_core
from ovms_rest.host.throwaway import start


@pytest.fixture(autouse=True)
def _make_this_module_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture
def _serving(monkeypatch):
    """Make this a process whose workers serve, at the priority that it has."""
    monkeypatch.setattr(priority, "_state", {})
    priority.begin_to_serve()


NODE = """
import os
with open(os.environ["POLICIES"], "a") as policies:
    print(os.sched_getscheduler(0), file=policies)
def inputs(params): return {"x": ("FP32", [-1, 4])}
def outputs(params): return {"x": ("FP32", [-1, 4])}
def execute(inputs, params): return {"x": inputs["x"]}
"""
PIPELINE = {
    "name": "p",
    "inputs": ["x"],
    "nodes": [
        {
            "name": "n",
            "type": "custom",
            "library_name": "node",
            "inputs": [{"x": {"node_name": "request", "data_item": "x"}}],
            "outputs": [{"data_item": "x", "alias": "x"}],
        }
    ],
    "outputs": [{"x": {"node_name": "n", "data_item": "x"}}],
}


def describe_priority(task, send):
    """Send the policy and nice value of a throwaway process, the policy of a thread, and the session."""
    found = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(threading.get_native_id())))
    thread.start()
    thread.join()
    send(policies=[os.sched_getscheduler(0), *found], nice=os.getpriority(os.PRIO_PROCESS, 0), session=os.getsid(0))


def spin(task, send):
    """Compute for some seconds of CPU time on one core, in a throwaway process."""
    os.sched_setaffinity(0, {task["core"]})
    send(ready=True)
    while time.process_time() < task["seconds"]:
        pass
    send(done=True)


def test_priorities_stay_the_same_until_the_service_serves():
    own, policy = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
    with start(describe_priority, None) as process:
        result = process.receive(60)
    assert result == {"policies": [policy, policy], "nice": own, "session": os.getsid(0)}
    assert run_lowered(threading.get_ident) == threading.get_ident()


@pytest.mark.usefixtures("_serving")
def test_throwaway_process_beside_workers_runs_on_idle_cores_only():
    policy = os.sched_getscheduler(0)
    with start(describe_priority, None) as process:
        result = process.receive(60)
    assert os.sched_getscheduler(0) == policy
    assert result == {"policies": [os.SCHED_IDLE, os.SCHED_IDLE], "nice": 19, "session": os.getsid(0)}


def describe_thread():
    """Return the policy and the nice value of the calling thread."""
    thread = threading.get_native_id()
    return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)


@pytest.mark.usefixtures("_serving")
@pytest.mark.parametrize(("can_rise", "expected"), [(True, (os.SCHED_IDLE, 19)), (False, (os.SCHED_OTHER, 10))])
def test_lowered_work_leaves_the_priority_of_the_caller(monkeypatch, can_rise, expected):
    monkeypatch.setattr(priority, "_can_rise", lambda: can_rise)
    own = describe_thread()
    assert run_lowered(describe_thread) == expected
    assert describe_thread() == own


@pytest.mark.usefixtures("_serving")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
@pytest.mark.parametrize("run", [run_lowered, lambda work: _run_within_lowered(work)])
def test_long_work_is_no_longer_idle_after_a_while(monkeypatch, run):
    """So it finishes even on cores that are always busy."""
    monkeypatch.setattr(priority, "_PATIENCE_SECONDS", 0.2)

    def work():
        seen, deadline = [describe_thread()], time.monotonic() + 30
        while seen[-1] != (os.SCHED_OTHER, 10) and time.monotonic() < deadline:
            seen.append(describe_thread())
        return seen[0], seen[-1]

    assert run(work) == ((os.SCHED_IDLE, 19), (os.SCHED_OTHER, 10))


def _run_within_lowered(work):
    """Do work in a thread that lowers itself; the test keeps its own priority in any case."""
    results = []

    def run():
        with priority.lowered():
            results.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def count_sleeps():
    """Return how often this thread has given up its core by itself."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def compute(seconds):
    """Compute for that CPU time of this thread; return how often it slept."""
    before, started = count_sleeps(), time.thread_time()
    while time.thread_time() - started < seconds:
        sum(range(1000))
    return count_sleeps() - before


@pytest.mark.usefixtures("_serving")
@pytest.mark.parametrize("can_rise", [True, False])
@pytest.mark.parametrize("run", [run_lowered, lambda work: _run_within_lowered(work)])
def test_work_that_computes_naps(monkeypatch, can_rise, run):
    """So the core that it uses takes over a worker that waits for the core of another one."""
    monkeypatch.setattr(priority, "_can_rise", lambda: can_rise)
    assert run(lambda: compute(0.5)) >= 20


def compute_apart(task, send):
    """Compute for some CPU time in a throwaway process; send how often it slept."""
    send(sleeps=compute(0.5))


@pytest.mark.usefixtures("_serving")
def test_throwaway_process_naps():
    with start(compute_apart, None) as process:
        assert process.receive(60)["sleeps"] >= 20


@pytest.mark.usefixtures("_serving")
def test_work_that_waits_is_not_woken():
    """Naps are counted by the CPU time of the thread."""

    def wait():
        before = count_sleeps()
        time.sleep(0.3)
        return count_sleeps() - before

    assert run_lowered(wait) <= 3


@pytest.mark.usefixtures("_serving")
@pytest.mark.parametrize("can_rise", [True, False])
def test_work_is_done_when_no_thread_can_be_started(monkeypatch, can_rise):
    """As when the user has no process left; the work may need none."""
    monkeypatch.setattr(priority, "_can_rise", lambda: can_rise)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    def work():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            return run_lowered(lambda: 7)

    assert work() == 7


@pytest.mark.usefixtures("_serving")
def test_exception_of_lowered_work_reaches_the_caller():
    with pytest.raises(LoadError, match="why"):
        run_lowered(lambda: (_ for _ in ()).throw(LoadError("why")))


def hang(task, send):
    """Wait without using a core, in a throwaway process."""
    send(ready=True)
    time.sleep(60)


@contextlib.contextmanager
def busy_core():
    """Keep one core busy with another process; return the core."""
    core = min(os.sched_getaffinity(0))
    pid = os.fork()
    if not pid:
        os.sched_setaffinity(0, {core})
        while True:
            pass
    try:
        yield core
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.usefixtures("_serving")
def test_time_without_a_core_does_not_count_towards_the_timeout():
    """The process may take up to four times its timeout while another process uses its only core."""
    task = {"core": min(os.sched_getaffinity(0)), "seconds": 3600}
    with start(spin, task) as process:
        process.receive(60)
        with busy_core() as core:
            assert core == task["core"]
            started = time.monotonic()
            with pytest.raises(LoadError, match=r"timed out after 0\.5 s"):
                process.receive(0.5)
            assert 0.7 <= time.monotonic() - started < 5


@pytest.mark.usefixtures("_serving")
def test_load_that_does_not_want_a_core_has_its_usual_timeout():
    def wait_in_vain():
        with start(hang, None) as process:
            process.receive(60)
            started = time.monotonic()
            with pytest.raises(LoadError, match=r"timed out after 0\.5 s"):
                process.receive(0.5)
            waited = time.monotonic() - started
            assert waited >= 0.5
            return waited

    # It would be 2 s for one that wants a core, every time; the machine itself may pause for as long.
    assert any(wait_in_vain() < 1.8 for _ in range(3))


def test_ended_process_wants_no_core():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert (core_seconds(pid), wants_core(pid)) == (0, False)
    assert wants_core(os.getpid())
    assert core_seconds(os.getpid()) > 0


def describe_forked(loses_rights=False):
    """Return policy and nice value of a forked process within `lowered`, and then those of any of its threads."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        if loses_rights:  # neither CAP_SYS_NICE nor a limit that allows it
            os.setgid(65534)
            os.setuid(65534)
        with priority.lowered():
            inside = describe_thread()
            thread = threading.Thread(target=time.sleep, args=(0.5,))
            thread.start()
        after = set()
        for each in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(ProcessLookupError):  # one that has been joined may still be listed
                after.add((os.sched_getscheduler(each), os.getpriority(os.PRIO_PROCESS, each)))
        os.write(writing, repr([inside, after]).encode())
        os._exit(0)
    os.wait()
    os.close(writing)
    with os.fdopen(reading) as stream:
        return ast.literal_eval(stream.read())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise its priority")
def test_process_that_may_raise_its_priority_lowers_and_restores_all_threads(monkeypatch):
    usual = describe_thread()
    monkeypatch.setitem(priority._state, "nice", usual[1])
    assert describe_forked() == [(os.SCHED_IDLE, 19), {usual}]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_forked_process_restores_the_usual_priority(monkeypatch):
    usual = describe_thread()
    monkeypatch.setitem(priority._state, "nice", usual[1])

    def fork():
        reading, writing = os.pipe()
        if os.fork() == 0:
            before = describe_thread()
            priority.restore()
            os.write(writing, repr([before, describe_thread()]).encode())
            os._exit(0)
        os.wait()
        os.close(writing)
        with os.fdopen(reading) as stream:
            return ast.literal_eval(stream.read())

    assert _run_within_lowered(fork) == [(os.SCHED_IDLE, 19), usual]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_process_that_may_not_raise_its_priority_keeps_it(monkeypatch):
    usual = describe_thread()
    monkeypatch.setitem(priority._state, "nice", usual[1])
    assert describe_forked(loses_rights=True) == [usual, {usual}]


def test_workers_and_arbiter_keep_their_priority_through_a_reload_that_gives_way(tmp_path):
    """The process that tries a node appends its scheduling policy to a file."""
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    (tmp_path / "node.py").write_text(NODE)
    config = write_config(
        tmp_path,
        {"name": "m", "base_path": "m"},
        custom_node_library_config_list=[{"name": "node", "base_path": "node.py"}],
        pipeline_config_list=[PIPELINE],
    )
    with serve(tmp_path, "-w", "1", config=config, POLICIES=str(tmp_path / "policies")) as service:
        service.wait_for_workers(1)
        assert service.get("/v2/models/p/ready").status == 200
        before = service.workers()
        at_start = (tmp_path / "policies").read_text().splitlines()
        (tmp_path / "node.py").write_text(f"{NODE}\n")
        os.utime(tmp_path / "m" / "1" / "model.xml")
        assert service.request("POST", "/v1/config/reload").status == 201
        service.wait_for(lambda: set(before).isdisjoint(service.workers()))  # which end at a low priority
        policies = (tmp_path / "policies").read_text().splitlines()
        assert str(os.SCHED_IDLE) not in at_start
        assert policies[len(at_start) :][0] == str(os.SCHED_IDLE)
        own = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
        for pid in (service.process.pid, *service.workers()):
            service.wait_for(lambda pid=pid: (os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)) == own)
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [-1, 2, -3, 4]}]}
        assert service.infer("m", body).json()["outputs"][0]["data"] == [0, 2, 0, 4]
