"""A registered version -> a version of kind onnx for ONNX Runtime (engine.type=onnx), compared with the original first.

    ray job submit --working-dir . -- python jobs/export_onnx.py --config jobs/configs/export_onnx.yaml model=bank-assistant

It needs no cluster: without `ray job submit` the same command runs in this process. An export whose perplexity grew too much is refused.
"""

from r1ray import entry
from r1ray.compress.config import ExportOnnxConfig


def export(config: ExportOnnxConfig) -> None:
    from r1ray.compress.onnx import export_onnx

    export_onnx(config)


if __name__ == "__main__":
    raise SystemExit(entry.run(ExportOnnxConfig, __doc__, export))
