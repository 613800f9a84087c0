"""Reasons of failures, out of the texts of OpenVINO's exceptions."""

import re

_LOCATION = re.compile(r"(?:Check '.*?' failed at|Exception from) \S+:\d+:?|\b(?:src|thirdparty)/\S+:\d+:?")
_NODE = re.compile(r"While validating node '\S+ .*?' with friendly_name '(?P<name>.*?)':")
_PATH = re.compile(r"(?<![\w.])/[\w.+-]+(?:/[\w.+-]+)+(?::\d+)?")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")
_LONGEST_REASON = 400
_LONGEST_LINE = 500


def find_reason(error: Exception) -> str:
    """Return the reason for the client of a request, with the names of nodes and the dims, in one line.

    Locations in OpenVINO's sources, paths and addresses are left out (protocol/README.md section 1, "Routes").
    """
    text = _NODE.sub(r"node '\g<name>':", str(error))
    for pattern in (_LOCATION, _PATH, _ADDRESS):
        text = pattern.sub("", text)
    words = " ".join(text.replace("[CPU]", "").replace("[cpu]", "").split())
    return words[:_LONGEST_REASON] or "OpenVINO gives no reason"


def one_line(error: Exception) -> str:
    """Return the reason for the log and the control routes, without locations in OpenVINO's sources, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from ", "Check "))]
    return " ".join(said or lines)[:_LONGEST_LINE]
