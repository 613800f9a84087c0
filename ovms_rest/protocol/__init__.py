"""The KServe v2 protocol as plain functions on values: no files, sockets, threads, Falcon or OpenVINO."""
