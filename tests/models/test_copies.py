"""Private copies of models: consistent, independent of the files, and gone with the model."""

import mmap
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import formats
import model_zoo
import numpy as np
import pytest
from openvino import opset15

from ovms_rest.errors import LoadError
from ovms_rest.models import copies
from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.copies import NO_PLACE, ChangingError, copy_model, open_places, seal
from ovms_rest.models.runtime import Model

X = np.float32([[-1.5, 2.0, -3.0, 4.25]])
Y = [[0.0, 2.0, 0.0, 4.25]]


@pytest.fixture
def place():
    with open_places(1) as (place,):
        yield place


def load(path, source, **plugin_config):
    plan = plan_compilation("CPU", {"INFERENCE_PRECISION_HINT": "f32", **plugin_config}, cores=2)
    return Model("m", 1, path, plan, source=source)


def infer(model, written):
    model.open(lambda: None)
    return model.infer({written.input: X})[written.output].array.tolist()


def mapped(directory):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]


def overwrite_all(directory):
    for file in directory.rglob("*"):
        if file.is_file():
            os.truncate(file, 0)


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize("hint", ["THROUGHPUT", "LATENCY"])  # compiled here, and by each worker
def test_every_format_is_loaded_from_its_copy_alone(tmp_path, name, hint):
    written = formats.FORMATS[name](tmp_path / "1")
    with open_places(1) as (place,):
        source = copy_model(tmp_path / "1", place)
        assert source.may_map
        overwrite_all(tmp_path)
        model = load(tmp_path / "1", source, PERFORMANCE_HINT=hint)
        assert model.file == written.model
        if hint == "THROUGHPUT":
            model.compile()
    assert infer(model, written) == Y
    assert mapped(tmp_path) == []


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_is_read_unmapped_without_a_place(tmp_path, name):
    written = formats.FORMATS[name](tmp_path / "1")
    source = copy_model(tmp_path / "1", NO_PLACE)
    assert (source.model, source.may_map) == (str(written.model), False)
    model = load(tmp_path / "1", source)
    assert infer(model, written) == Y
    assert mapped(tmp_path) == []


def test_files_are_mapped_if_the_user_wants_that(tmp_path):
    file = save_constant(tmp_path)
    source = copy_model(tmp_path / "1", NO_PLACE, may_map=True)
    model = load(tmp_path / "1", source)
    model.open(lambda: None)
    assert mapped(file)


@pytest.mark.parametrize(("config", "is_mapped"), [({}, False), ({"ENABLE_MMAP": "YES"}, True)])
def test_model_from_the_cache_is_mapped_only_if_the_user_wants_that(tmp_path, config, is_mapped):
    save_constant(tmp_path)
    cache = tmp_path / "cache"
    for _ in range(2):
        model = load(tmp_path / "1", copy_model(tmp_path / "1", NO_PLACE), CACHE_DIR=str(cache), **config)
        model.compile()
    assert model._compiled.get_property("LOADED_FROM_CACHE")
    assert bool(mapped(cache)) == is_mapped


def save_constant(directory, value=1.0, size=2**20):
    """Write an IR that adds a constant; return its file of weights."""
    x = model_zoo.parameter("x", (1,), model_zoo.Type.f32)
    y = opset15.add(x, opset15.constant(np.full(size, value, np.float32)))
    model_zoo.save(model_zoo.model_of({"y": y}, [x]), directory)
    return directory / "1" / "model.bin"


def test_sealed_copy_cannot_be_changed(tmp_path, place):
    save_constant(tmp_path)
    copy_model(tmp_path / "1", place)
    seal(place)
    for descriptor in place.descriptors:
        for change in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 0)):  # noqa: B023
            with pytest.raises(PermissionError):
                change()


def test_places_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    formats.write_onnx_with_external_data(tmp_path / "1")
    before = set(os.listdir("/proc/self/fd"))
    with open_places(2) as places:
        copy_model(tmp_path / "1", places[1])
        assert len(list((tmp_path / "tmp").iterdir())) == 1
    assert list((tmp_path / "tmp").iterdir()) == []
    # Garbage collection may close descriptors of other tests meanwhile.
    assert set(os.listdir("/proc/self/fd")) <= before


def test_directories_of_killed_services_are_removed_and_those_in_use_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "ovms_rest_copies-left"
    left.mkdir()
    (left / "model.weights").write_text("x")
    with open_places(1), open_places(1):
        assert not left.exists()
        assert len(list(tmp_path.iterdir())) == 2


def test_forked_process_holds_no_copies(place):
    if (child := os.fork()) == 0:
        os._exit(sum(os.path.exists(f"/proc/self/fd/{number}") for number in place.descriptors))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.path.exists(place.directory.rpartition("/")[0])


def test_end_of_a_forked_process_keeps_the_places_of_its_parent():
    with open_places(1) as (place,):
        root = place.directory.rpartition("/")[0]
    program = (
        "import os, sys\n"
        "from ovms_rest.models.copies import open_places\n"
        "with open_places(1) as (place,):\n"
        "    if (child := os.fork()) == 0:\n"
        "        sys.exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    assert os.path.isdir(os.path.dirname(place.directory))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not os.path.exists(root)


@pytest.mark.parametrize(
    ("directory", "note"),
    [
        ("", "read in place, without a private copy: no temporary directory can be written"),
        ("/dev/full/x", "read in place, without a private copy: [Errno 20] Not a directory: '/dev/full/x'"),
    ],
)
def test_files_are_read_in_place_without_a_usable_directory(tmp_path, place, directory, note):
    written = formats.write_onnx_with_external_data(tmp_path / "1")
    source = copy_model(tmp_path / "1", replace(place, directory=directory))
    assert (source.model, source.may_map, source.note) == (str(written.model), False, note)
    assert infer(load(tmp_path / "1", source), written) == Y


def test_files_are_read_in_place_when_the_disk_is_full(tmp_path, place):
    formats.write_onnx_with_external_data(tmp_path / "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        source = copy_model(tmp_path / "1", place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not source.may_map
    assert source.note.endswith("File too large")


def test_external_data_outside_the_directory_is_read_in_place(tmp_path, place):
    written = formats.write_onnx_with_external_data(tmp_path / "1")
    content = written.model.read_bytes()
    written.model.write_bytes(content.replace(b"relu.weights", b"../r.weights"))
    (tmp_path / "1" / "relu.weights").rename(tmp_path / "r.weights")
    source = copy_model(tmp_path / "1", place)
    assert source.note.endswith(f"{tmp_path}/1/../r.weights is outside {tmp_path}/1")


def test_files_that_changed_after_their_trial_in_place_are_refused(tmp_path):
    file = save_constant(tmp_path)
    source = copy_model(tmp_path / "1", NO_PLACE)
    file.write_bytes(file.read_bytes())
    time.sleep(0.05)
    with pytest.raises(ChangingError, match="changed while it was being loaded"):
        load(tmp_path / "1", source)


# --- Files that are not at rest


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(copies, "_PATIENCE_SECONDS", 0.1)


def test_file_that_is_open_for_writing_is_refused(tmp_path, place, impatient):
    file = save_constant(tmp_path)
    message = f"{file} is open for writing in another process"
    with file.open("r+b"), pytest.raises(ChangingError, match=message):
        copy_model(tmp_path / "1", place)


def test_file_that_is_mapped_for_writing_is_refused(tmp_path, place, impatient):
    file = save_constant(tmp_path)
    with file.open("r+b") as stream:
        memory = mmap.mmap(stream.fileno(), 0)
    with memory, pytest.raises(ChangingError, match="open for writing"):
        copy_model(tmp_path / "1", place)


def test_copy_waits_for_a_writer(tmp_path, place):
    file = save_constant(tmp_path)
    stream = file.open("r+b")
    threading.Timer(0.3, stream.close).start()
    began = time.monotonic()
    copy_model(tmp_path / "1", place)
    assert time.monotonic() - began >= 0.25


def test_file_that_vanishes_after_it_was_found_is_refused(tmp_path):
    file = save_constant(tmp_path)
    source = copy_model(tmp_path / "1", NO_PLACE)
    file.unlink()
    with pytest.raises(ChangingError, match=f"{file} vanished while it was being loaded"):
        source.check()


def test_copy_is_consistent_while_the_file_is_repeatedly_overwritten(tmp_path):
    file = save_constant(tmp_path)
    one, two = (np.full(2**20, value, np.float32).tobytes() for value in (1, 2))
    ended = threading.Event()

    def write():
        while not ended.is_set():
            for content in (two, one):
                with file.open("r+b") as stream:
                    for start in range(0, len(content), 2**16):
                        stream.write(content[start : start + 2**16])
                time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(10):
            with open_places(1) as (place,):
                copy_model(tmp_path / "1", place)
                copied = np.frombuffer(os.pread(place.descriptors[1], 2**23, 0)[: 2**22], np.float32)
                assert copied.min() == copied.max(), (copied.min(), copied.max())
    finally:
        ended.set()
        writer.join()


def test_lease_does_not_end_the_process_when_a_writer_opens_the_file(tmp_path):
    """A broken lease sends a signal that is ignored by default."""
    program = (
        "import fcntl, os, signal, sys, time\n"
        "from ovms_rest.models import copies\n"
        "real = fcntl.fcntl\n"
        "def slow(fd, command, argument=0):\n"
        "    if command == fcntl.F_SETLEASE and argument == fcntl.F_UNLCK:\n"
        "        print('leased', flush=True)\n"
        "        time.sleep(0.5)\n"
        "    return real(fd, command, argument)\n"
        "copies.fcntl.fcntl = slow\n"
        f"print(copies._is_being_written(os.open({str(tmp_path / 'file')!r}, os.O_RDONLY)))\n"
    )
    (tmp_path / "file").touch()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "leased\n"
        began = time.monotonic()
        (tmp_path / "file").write_text("x")
        assert time.monotonic() - began > 0.1
        assert process.stdout.readline() == "False\n"
    assert process.returncode == 0


# --- Messages


XML = '<?xml version="1.0"?><net name="x" version="11"><layers><layer/></layers></net>'


@pytest.mark.parametrize(
    ("name", "content", "copied_to"),
    [("model.xml", XML, ("/proc/self", "memfd")), ("m.onnx", "no model", ("ovms_rest_copies",))],
)
def test_errors_name_the_users_files(tmp_path, place, name, content, copied_to):
    file = tmp_path / "1" / name
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "1", copy_model(tmp_path / "1", place))
    assert str(caught.value).startswith(f"cannot read {file}: ")
    assert not [word for word in copied_to if word in str(caught.value)]
