"""Artifact in, HTTP out: composition only; the parts are tested without Ray."""
