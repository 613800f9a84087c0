#!/usr/bin/env python
"""Fuzz one target in this process: `python tests/fuzz/fuzz.py TARGET [libFuzzer's options] [DIRECTORY | FILE ...]`.

With a file, such as a finding, only that input is run; --seeds first adds the target's seeds to the directory.
run.py runs all targets.
"""

import hashlib
import importlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

HERE = Path(__file__).parent
# The name of the target, for the process that libFuzzer starts to merge corpora: it gets libFuzzer's arguments alone.
_TARGET = "OVMS_FUZZ_TARGET"
# No input may take more memory. libFuzzer looks at the process once a second, and names the input of that moment.
_MOST_MEMORY = 2**28


def main() -> None:
    """Run libFuzzer with the target, its dictionary and its mutator; never returns."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]
    if _TARGET not in os.environ:
        os.environ[_TARGET] = sys.argv.pop(1)
    with atheris.instrument_imports(include=["ovms_rest"]):
        name = os.environ[_TARGET]  # of a module of ours, or with a dot of any other
        target = importlib.import_module(name if "." in name else f"fuzz_targets.{name}")
    arguments = [str(Path(__file__).absolute()), *sys.argv[1:]]
    if "--seeds" in arguments:
        arguments.remove("--seeds")
        _write_seeds(target.seeds(), Path(next(text for text in arguments[1:] if text[0] != "-")))
    options = {}
    if "--blind" in arguments:  # without help, to see what the help is worth
        arguments.remove("--blind")
    else:
        arguments += _dictionary(getattr(target, "TOKENS", ()))
        options = {"custom_mutator": target.mutate} if hasattr(target, "mutate") else {}
    atheris.Setup(
        [*arguments, f"-max_len={getattr(target, 'MAX_LENGTH', 4096)}"], _limit_memory(target.check), **options
    )
    atheris.Fuzz()


def _limit_memory(check: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def check_within_limit(data: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        check(data)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert taken < _MOST_MEMORY, f"an input took {taken} bytes of memory"

    return check_within_limit


def _write_seeds(seeds: list[bytes], directory: Path) -> None:
    for seed in seeds:
        (directory / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)


def _dictionary(tokens: list[bytes]) -> list[str]:
    """Write the dictionary of a target; return the option that names it."""
    if not tokens:
        return []
    path = Path(f"/proc/self/fd/{os.memfd_create('dictionary')}")  # libFuzzer exits without cleaning up
    path.write_text("".join(f'"{_escape(token)}"\n' for token in tokens))
    return [f"-dict={path}"]


def _escape(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


if __name__ == "__main__":
    main()
