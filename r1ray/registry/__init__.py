"""Models, versions and their lineage.

Reading order: directory (what an artifact is on disk), rows (what MLflow keeps of it), versions (what is done with both).
"""

from r1ray.registry.directory import MANIFEST, POLICY, weights_sha256
from r1ray.registry.listing import ModelInfo, VersionInfo
from r1ray.registry.verdict import Verdict
from r1ray.registry.versions import Registry

__all__ = ["MANIFEST", "POLICY", "ModelInfo", "Registry", "Verdict", "VersionInfo", "weights_sha256"]
