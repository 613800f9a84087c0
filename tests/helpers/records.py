"""Records of inferences, for the tests of what counts them."""

from ovms_rest.shared_memory.statistics import InferenceRecord


def timed(
    queue_ns: int = 0,
    input_ns: int = 0,
    infer_ns: int = 0,
    output_ns: int = 0,
    batch: int = 1,
    request_bytes: int = 0,
    response_bytes: int = 0,
) -> InferenceRecord:
    """Make the record of an inference with these times and sizes."""
    return InferenceRecord(0, "", "", "", queue_ns, input_ns, infer_ns, output_ns, batch, request_bytes, response_bytes)
