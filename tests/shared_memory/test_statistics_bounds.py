"""The buckets of histograms; tests/resources/test_statistics.py has the form of the statistics."""

from ovms_rest.shared_memory.statistics import BOUNDS

# OVMS's documentation of metrics
OVMS_BOUNDS = (
    "10 18 32 58 104 188 340 612 1101 1983 3570 6426 11568 20822 37481 67466 121439 218591 393464 708235 1274823 "
    "2294682 4130428 7434771 13382588 24088659 43359586 78047255 140485060 252873108 455171596 819308872 1474755971"
)


def test_bounds_are_those_of_ovms():
    assert " ".join(map(str, BOUNDS)) == OVMS_BOUNDS
