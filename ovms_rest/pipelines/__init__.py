"""Pipelines: models and custom nodes as one servable graph, as the OpenVINO Model Server has them."""
