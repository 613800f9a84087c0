"""KServe v2 REST server for OpenVINO models on CPU hosts."""

__version__ = "0.1.0"
