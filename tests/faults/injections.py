"""Functions that inject one fault each into a host, and wait until it has had its effect.

The host has not recovered yet when they return; `fault_table.inject` waits for that.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crashing_nodes
import generations
import numpy as np
import slow_models
from faulty_host import TIMEOUT_SECONDS, Host
from faulty_models import save_version
from processes import limited, stopped
from rude_clients import dribble, half_close, read_slowly, vanish
from service import Answer, is_running, wait_for
from surroundings import SMALL_DISK_MIB, USER, Clock, small_disk

Random = random.Random


# --- Workers


def _kill(host: Host, *pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_for(lambda pid=pid: not is_running(pid), lambda pid=pid: f"process {pid} is still running\n{host.log()}")


def kill_worker(host: Host, generator: Random) -> None:
    """SIGKILL to the oldest worker, so that each one gets its turn, the control worker included."""
    _kill(host, host.oldest_worker())


def kill_all_workers(host: Host, generator: Random) -> None:
    """SIGKILL to all workers at once."""
    _kill(host, *host.service.workers())


def stop_worker(host: Host, generator: Random) -> None:
    """SIGSTOP to the oldest worker, until the arbiter kills it."""
    pid = host.oldest_worker()
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: not is_running(pid), host.log)


def pause_worker(host: Host, generator: Random) -> None:
    """SIGSTOP to the oldest worker, and SIGCONT before the arbiter would kill it."""
    with stopped(host.service, host.oldest_worker()):
        time.sleep(generator.uniform(0.2, 0.5) * TIMEOUT_SECONDS)


def _end_in_inference(host: Host, generator: Random, what: int) -> None:
    """Ask for an inference that ends its worker until one has ended; with new inputs, as the service knows old ones."""
    before = set(host.service.workers())

    def has_ended() -> bool:
        answer = host.ask("fragile", crashing_nodes.request(what, generator.randrange(1_000_000)))
        assert answer.status in (500, 502, 503), answer
        if answer.status == 503:  # the model is paused, as it has crashed several workers within seconds
            time.sleep(1)
        return bool(before - set(filter(is_running, host.service.workers())))

    wait_for(has_ended, host.log)


def crash_in_inference(host: Host, generator: Random) -> None:
    """A request whose inference ends its worker by SIGSEGV or SIGABRT."""
    _end_in_inference(host, generator, generator.choice([crashing_nodes.CRASH, crashing_nodes.ABORT]))


def hang_in_inference(host: Host, generator: Random) -> None:
    """A request whose inference never ends."""
    _end_in_inference(host, generator, crashing_nodes.WAIT)


def outgrow_memory(host: Host, generator: Random) -> None:
    """Images of ever new sizes, until a worker is above its memory limit and has been replaced."""
    name = "ovms_rest_worker_memory_replacements"
    before = host.metric(name)

    def is_replaced() -> bool:
        for _ in range(20):
            shape = [1, 3, *(generator.randrange(16, 600) for _ in range(2))]
            answer = host.ask_binary("growing", np.zeros(shape, np.float32))
            assert answer.status == 200, answer
        return host.metric(name) > before

    wait_for(is_replaced, host.log)


# --- The arbiter


def reload_by_signal(host: Host, generator: Random) -> None:
    """SIGHUP, which replaces all workers."""
    _hang_up(host, times=1)


def reload_without_waiting(host: Host, generator: Random) -> None:
    """Ten SIGHUP within a second."""
    _hang_up(host, times=10)


def _hang_up(host: Host, times: int) -> None:
    """Send SIGHUP every 0.1 s, and wait until the workers of before are gone, those of the last reload included."""
    before = set(host.service.workers())
    for count in range(times):
        time.sleep(0.1 if count else 0.0)
        host.service.signal(signal.SIGHUP)
    wait_for(lambda: not before & set(host.service.workers()), host.log)


def kill_arbiter(host: Host, generator: Random) -> None:
    """SIGKILL to the arbiter; its orphans end by themselves, and the service is started again."""
    host.kill_arbiter(with_workers=False)


def kill_service(host: Host, generator: Random) -> None:
    """SIGKILL to the arbiter and its workers, and the service is started again."""
    host.kill_arbiter(with_workers=True)


def restart_service(host: Host, generator: Random) -> None:
    """SIGTERM, and the service is started again."""
    host.stop_service()
    host.start_service()


# --- Models and config


def _next_factor(host: Host, generator: Random) -> float:
    return generator.choice([factor for factor in range(2, 100) if factor != host.factor])


def _serve(host: Host, version: int, factor: float) -> None:
    """Load what changed; from then on no other version may answer."""
    answer = host.reload()
    assert answer.status in (200, 201), answer
    host.load.factors.change((version, factor))
    host.version, host.factor = version, factor


def _allow(host: Host, version: int, factor: float) -> None:
    host.load.factors.change((host.version, host.factor), (version, factor))


def _directory(host: Host, version: int) -> Path:
    return host.models / "versioned" / str(version)


def swap_version(host: Host, generator: Random) -> None:
    """A new version, after which the directory of the one before is deleted."""
    version, factor = host.version + 1, _next_factor(host, generator)
    _allow(host, version, factor)
    save_version(host.models / "versioned", version, factor)
    before = host.version
    _serve(host, version, factor)
    shutil.rmtree(_directory(host, before))
    assert host.reload().status in (200, 201)


def _save_aside(host: Host, version: int, factor: float) -> Path:
    """Write a version beside the models, as another machine would have it."""
    aside = host.directory / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    save_version(aside, version, factor)
    return aside / str(version)


def replace_in_place(host: Host, generator: Random) -> None:
    """Other files are copied over those of the served version, as `cp` does."""
    factor = _next_factor(host, generator)
    _allow(host, host.version, factor)
    for file in _save_aside(host, host.version, factor).iterdir():
        shutil.copy(file, _directory(host, host.version))
    _serve(host, host.version, factor)


def delete_model(host: Host, generator: Random) -> None:
    """The directory of a served model is deleted, and comes back with other files."""
    base_path = host.models / "versioned"
    shutil.rmtree(base_path)
    host.reload()
    host.load.wait_for_all(host.log)
    version, factor = host.version + 1, _next_factor(host, generator)
    _allow(host, version, factor)
    save_version(base_path, version, factor)
    _serve(host, version, factor)


def corrupt_model(host: Host, generator: Random) -> None:
    """The served version is overwritten by garbage; a corrupt version appears beside it; then both are repaired."""
    served, broken = _directory(host, host.version), _directory(host, host.version + 1)
    for file in served.iterdir():
        file.write_bytes(generator.randbytes(100))
    generations.save_broken(broken)
    assert host.reload().status == 412
    host.load.wait_for_all(host.log)
    factor = _next_factor(host, generator)
    _allow(host, host.version, factor)
    shutil.rmtree(broken)
    for file in _save_aside(host, host.version, factor).iterdir():
        shutil.copy(file, served)
    _serve(host, host.version, factor)


def copy_half_of_model(host: Host, generator: Random) -> None:
    """A new version whose weights are still being copied when the service loads it."""
    version, factor = host.version + 1, _next_factor(host, generator)
    aside, made = _save_aside(host, version, factor), _directory(host, version)
    _allow(host, version, factor)
    made.mkdir()
    weights = (aside / "model.bin").read_bytes()
    with (made / "model.bin").open("wb") as file:
        file.write(weights[: len(weights) // 2])
        file.flush()
        shutil.copy(aside / "model.xml", made)
        assert host.reload().status == 412
        host.load.wait_for_all(host.log)
        file.write(weights[len(weights) // 2 :])
    _serve(host, version, factor)


def break_config(host: Host, generator: Random) -> None:
    """Half of the config file, and then the whole again."""
    text = host.config.read_text()
    host.config.write_text(text[: generator.randrange(1, len(text) - 1)])
    assert host.reload().status == 400
    host.load.wait_for_all(host.log)
    host.config.write_text(text)
    assert host.reload().status == 200


# --- Resources


@contextlib.contextmanager
def _logged(host: Host, text: str) -> Iterator[None]:
    """Wait after the block until the service has logged a text once more than before it."""
    before = host.service.log.count(text)
    yield
    wait_for(lambda: host.service.log.count(text) > before, host.log)


def fill_disk(host: Host, generator: Random) -> None:
    """No room for the access log, the log and the cache, while a model is loaded and a worker is killed."""
    disk = Path(f"/proc/{host.service.process.pid}/root{small_disk(host.directory)}")
    filler = disk / "filler"
    filler.write_bytes(b"")
    with filler.open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    try:
        host.load.wait_for_all(host.log)
        swap_version(host, generator)
        kill_worker(host, generator)
        host.wait_until_whole()
        assert os.statvfs(disk).f_bavail < SMALL_DISK_MIB
    finally:
        filler.unlink()
    for name in ("access.log", "error.log"):
        os.truncate(disk / name, 0)
    host.service.signal(signal.SIGUSR1)
    wait_for(lambda: (disk / "access.log").stat().st_size, host.log)


def exhaust_arbiters_descriptors(host: Host, generator: Random) -> None:
    """No descriptor for the arbiter, while a worker is killed and SIGHUP asks for a reload."""
    with limited(host.service, "nofile", 3):
        with _logged(host, "the reload failed; the service keeps its previous settings"):
            _kill(host, host.inferring_worker())
            host.service.signal(signal.SIGHUP)
        host.load.wait_for_all(host.log)


def exhaust_workers_descriptors(host: Host, generator: Random) -> None:
    """No descriptor for the workers, while clients open more connections."""
    limits = {}
    for pid in host.service.workers():
        limits[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        count = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (count + 1, limits[pid][1]))
    text = "cannot accept a connection: Too many open files"
    before = host.service.log.count(text)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        clients = pool.submit(_together, 30, lambda: _expect_200(host.ask("counting", slow_models.count(5000))))

        def is_logged() -> bool:
            if host.service.log.count(text) > before:
                return True
            stack.enter_context(host.connect_to_service())  # nginx may need no more than the workers have room for
            return False

        try:
            wait_for(is_logged, host.log)
            clients.result()
        finally:
            for pid, limit in limits.items():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)


def _expect_200(answer: Answer) -> None:
    assert answer.status == 200, answer


def exhaust_processes(host: Host, generator: Random) -> None:
    """No process for the service, while a worker is killed and a model is to be loaded."""
    with limited(host.service, "nproc", 1, ["setpriv", "--reuid", str(USER)]):
        with _logged(host, "cannot start a worker: Resource temporarily unavailable"):
            _kill(host, host.inferring_worker())
        host.load.wait_for_all(host.log)
    swap_version(host, generator)


# In seconds: within the hour up to which the service believes the time in X-Request-Start, beyond it, and back.
CLOCK_JUMPS = (600, -600, 90_000, -5_000_000, 0)


def jump_clock(host: Host, generator: Random) -> None:
    """The clock of the service and of nginx jumps; that of the monotonic time, and of files, does not."""
    clock = Clock(host.directory)
    following = dict(zip(CLOCK_JUMPS, (*CLOCK_JUMPS[1:], CLOCK_JUMPS[0]), strict=True))
    clock.move(following[clock.offset])
    wait_for(lambda: all(abs(date - time.time() - clock.offset) < 60 for date in host.dates()), host.log)


# --- Clients


def _together(count: int, step: Callable[[], None]) -> None:
    """Run a step in threads; the first exception is raised."""
    errors = []

    def run() -> None:
        try:
            step()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def vanish_as_client(host: Host, generator: Random) -> None:
    """100 clients that disconnect at any moment."""
    for _ in range(100):
        vanish(host.nginx.connect, generator)
        host.own["vanished"] += 1


def dribble_as_client(host: Host, generator: Random) -> None:
    """20 clients that send a request in small pieces."""
    dribble(host.nginx.connect)
    host.own["200"] += 20


def half_close_as_client(host: Host, generator: Random) -> None:
    """20 clients that close their sending side after the request."""
    for _ in range(20):
        answer = half_close(host.nginx.connect, generator)
        host.own[str(answer.status) if answer else "no answer"] += 1


def read_slowly_as_client(host: Host, generator: Random) -> None:
    """Four clients that read large responses in small pieces."""
    seeds = [generator.randrange(2**32) for _ in range(4)]
    _together(4, lambda: read_slowly(host.nginx.connect, Random(seeds.pop())))
    host.own["200"] += 4


# --- nginx


def reload_nginx(host: Host, generator: Random) -> None:
    """SIGHUP to nginx."""
    host.nginx.reload()


def restart_nginx(host: Host, generator: Random) -> None:
    """SIGQUIT to nginx, and it is started again."""
    host.stop_nginx()
    host.start_nginx()
