"""What a sweep leaves behind for people and for other programs."""

import csv
import json

from r1ray.tune.report import Setting, print_settings, write_front_plot, write_rows
from r1ray.types import Sampling

SETTINGS = [
    Setting(name="greedy", sampling=Sampling(temperature=0), quality=0.9, latency_s=1.2, on_front=True, is_chosen=True, is_baseline=True),
    Setting(
        name="search-1",
        sampling=Sampling(),
        quality=0.5,
        latency_s=1.0,
        gain=-0.4,
        gain_at_least=-0.5,
        metrics={"rouge_l": 0.25},
        on_front=True,
    ),
]


def test_rows_are_written_alike_as_csv_and_json(tmp_path):
    table, tree = write_rows([s.row() for s in SETTINGS], tmp_path / "out", "settings")
    rows = json.loads(tree.read_text())
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [line["name"] for line in lines] == ["greedy", "search-1"]
    assert (lines[0]["rouge_l"], lines[1]["rouge_l"]) == ("", "0.25")
    assert (rows[0]["temperature"], rows[0]["chosen"]) == (0, True)


def test_the_table_marks_the_front_and_the_chosen_setting(capsys):
    print_settings(SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    greedy = next(line for line in lines if "greedy" in line)
    assert greedy.count("* chosen") == 1
    assert "baseline" in greedy
    other = next(line for line in lines if "search-1" in line)
    assert "front" in other
    assert "-0.400" in other
    assert "-0.500" in other


def test_the_plot_is_a_png(tmp_path):
    assert write_front_plot(SETTINGS, 1.3, tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
