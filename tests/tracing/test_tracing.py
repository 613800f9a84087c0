"""What the arbiter prepares for traces."""

from ovms_rest.tracing.tracing import prepare_tracing


def test_nothing_is_prepared_without_an_endpoint():
    assert prepare_tracing({}, 4) is None


def test_channel_has_room_for_the_counts_of_all_slots():
    tracing = prepare_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, 4)
    tracing.channel.counters.count_lost(3, 5)
    assert tracing.channel.counters.read().full == 5
    assert tracing.endpoint == "http://127.0.0.1:4318"
    assert tracing.sample(None, "f" * 32)
    tracing.channel.close()
