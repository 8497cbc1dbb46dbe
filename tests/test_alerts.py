"""The alert rules name metrics that exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def rules():
    tree = yaml.safe_load((ROOT / "alerts.yaml").read_text(encoding="utf-8"))
    return [rule for group in tree["groups"] for rule in group["rules"]]


def test_every_rule_alerts_on_something_and_says_what_to_do():
    for rule in rules():
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert "$value" in rule["annotations"]["summary"]


def test_every_metric_of_the_rules_is_written_by_r1ray_or_ray():
    ours = set(re.findall(r'"(r1ray_\w+)"', (ROOT / "r1ray" / "serve" / "meter.py").read_text(encoding="utf-8")))
    agent = Path(find_spec("ray").origin).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    rays = set(re.findall(r'"(node_\w+)"', agent.read_text(encoding="utf-8")))
    named = {name.removesuffix("_bucket") for rule in rules() for name in re.findall(r"\bray_(\w+)", rule["expr"])}
    assert len(named) >= 8
    assert named <= ours | rays
