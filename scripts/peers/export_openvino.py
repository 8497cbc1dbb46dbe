# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = ["optimum-intel==2.2.0", "openvino==2026.4.1", "nncf"]
# ///
"""Export a model directory for run_openvino.py: `export_openvino.py MODEL OUT`; int8 weights, as its users do."""

from __future__ import annotations

import sys

from optimum.exporters.openvino import main_export
from optimum.intel import OVWeightQuantizationConfig
from optimum.intel.openvino import OVConfig

if __name__ == "__main__":
    model, out = sys.argv[1:3]
    main_export(
        model,
        output=out,
        task="text-generation-with-past",
        ov_config=OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8, sym=False)),
        stateful=True,
    )
