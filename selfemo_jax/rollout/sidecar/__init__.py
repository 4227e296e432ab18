"""The serving process: vLLM behind a key, with weights read from published versions.

It runs in an environment of its own, started by path, as the package `sidecar`; nothing else of this project
is imported here.
"""
