"""The calls that a function makes, to count work without a clock."""

import sys


def called(function, *arguments):
    """Return the callees of a call: functions written in C, and the code of those in Python."""
    functions = []

    def note(frame, event, argument):
        if event in ("call", "c_call"):
            functions.append(frame.f_code if event == "call" else argument)

    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return functions
