"""Versions that somebody has resolved already cost no connection."""

from __future__ import annotations

import pickle
import subprocess
import sys

from r1ray.registry.known import KnownVersions
from tests.registry.conftest import add


def test_known_versions_resolve_without_mlflow(shared):
    first = add(shared, "known-before")
    known = pickle.dumps(KnownVersions([first], shared.settings))
    code = f"import pickle, sys; print(pickle.loads({known!r}).resolve('{first.ref}').path); print('mlflow' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown == [str(first.path), "False"]
    second = add(shared, "known-before", b"second")
    assert pickle.loads(known).resolve("known-before").ref == second.ref
