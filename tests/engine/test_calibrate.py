"""A calibration keeps what it measured, and `dtype: auto` follows it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from r1ray.engine import calibrate as module
from r1ray.engine.calibrate import calibrate
from r1ray.engine.calibration import Calibration, choose, load_calibration, store_calibration
from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.engine.native import build
from r1ray.errors import InvalidValue
from r1ray.model.importer import import_model

needs_kernels = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@needs_kernels
def test_auto_takes_what_was_measured_here(tiny_llama, registry, monkeypatch):
    monkeypatch.setattr(module, "MIN_TOKENS", 600)
    artifact = import_model(str(tiny_llama), name="tiny", registry=registry)
    said = []
    found = calibrate(artifact, [20 + i % 400 for i in range(600)], registry=registry, on_done=said.append)
    assert len(said) == 5
    assert set(found.perplexity) == set(found.agreement) == {"float32", "bfloat16", "int8_weight_only", "int8", "int4"}
    assert found.agreement["float32"] == 1
    assert found.agreement["bfloat16"] > 0.9
    assert found.perplexity["bfloat16"] == pytest.approx(found.perplexity["float32"], rel=0.02)
    assert found.perplexity["int8_weight_only"] == pytest.approx(found.perplexity["float32"], rel=0.02)
    assert all(rate > 0 for rates in found.tokens_per_s.values() for rate in rates.values())
    kept = load_calibration(artifact, registry.settings)
    assert kept is not None
    assert (kept.chosen, kept.reason) == (found.chosen, found.reason)
    engine = create_engine(artifact, EngineConfig(), registry)
    assert engine.precision == found.chosen
    asyncio.run(engine.stop())


def test_the_fastest_within_the_bound_is_chosen():
    speed = {name: {"1": rate, "8": 4 * rate} for name, rate in (("float32", 10.0), ("bfloat16", 20.0), ("int8", 40.0))}
    assert choose({"float32": 20.0, "bfloat16": 20.01, "int8": 20.2}, speed)[0] == "int8"
    chosen, reason = choose({"float32": 20.0, "bfloat16": 20.01, "int8": 20.4}, speed)
    assert chosen == "bfloat16"
    assert "int8 loses +2.0%" in reason


def test_an_adapter_is_not_merged_into_int4(tiny_llama, registry):
    """Weights that were changed no longer lie where the base's codes did, so what the base lost says nothing."""
    base = import_model(str(tiny_llama), name="tiny", registry=registry)
    speed = {name: {"1": rate, "8": 4 * rate} for name, rate in (("float32", 10.0), ("int8", 40.0), ("int4", 50.0))}
    perplexity = {"float32": 20.0, "int8": 20.2, "int4": 20.1}
    chosen, reason = choose(perplexity, speed)
    found = Calibration(num_tokens=1, perplexity=perplexity, agreement={}, tokens_per_s=speed, chosen=chosen, reason=reason)
    store_calibration(base, registry.settings, found)
    manifest = base.manifest.model_copy(update={"kind": "adapter", "base_sha256": base.manifest.weights_sha256, "weights_sha256": "0" * 64})
    adapter = replace(base, manifest=manifest)
    assert load_calibration(base, registry.settings).chosen == "int4"
    assert load_calibration(adapter, registry.settings).chosen == "int8"


def test_too_little_text_is_refused(tiny_llama, registry):
    artifact = import_model(str(tiny_llama), name="tiny", registry=registry)
    with pytest.raises(InvalidValue, match="calibration needs 20000"):
        calibrate(artifact, [1, 2, 3], registry=registry)


def test_a_damaged_record_counts_as_none(tiny_llama, registry):
    from r1ray.engine.calibration import _file

    artifact = import_model(str(tiny_llama), name="tiny", registry=registry)
    assert load_calibration(artifact, registry.settings) is None
    file = _file(artifact, registry.settings)
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert load_calibration(artifact, registry.settings) is None
