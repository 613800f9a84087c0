"""The statistics of a version in the form of Triton's extension."""

import orjson

from ovms_rest.shared_memory.counters import Counters


def test_statistics_are_written_in_the_form_of_the_extension():
    model = Counters(1).of("m", "1")
    model.record(1, 20, 300, 4000, batch=8)
    model.fail("invalid", 5)
    model.fail("timeout", 6)
    seen = model.read()
    none = {"count": 0, "ns": 0}
    times = {"compute_input": {"count": 1, "ns": 20}, "compute_infer": {"count": 1, "ns": 300}}
    times["compute_output"] = {"count": 1, "ns": 4000}
    assert orjson.loads(orjson.dumps(seen.to_json())) == {
        "name": "m",
        "version": "1",
        "last_inference": seen.last_inference_ms,
        "inference_count": 8,
        "execution_count": 1,
        "inference_stats": {
            "success": {"count": 1, "ns": 4321},
            "fail": {"count": 2, "ns": 11},
            "queue": {"count": 1, "ns": 1},
            "cache_hit": none,
            "cache_miss": none,
            **times,
        },
        "batch_stats": [{"batch_size": 8, **times}],
    }
