"""Traces: W3C Trace Context, and spans of requests that a process of its own sends by OTLP/HTTP."""
