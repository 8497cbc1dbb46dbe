"""The whole preparation on small files: counts add up, each rule drops what it should, nothing half-written is left."""

import json
import resource
import signal

import pyarrow.parquet as pq
import pytest

from r1ray.config import Config, load_config
from r1ray.data.augment import config as augment_config
from r1ray.data.augment.provenance import load, undo
from r1ray.data.config import DataConfig
from r1ray.data.demo import write_demo
from r1ray.data.lines import LONGEST_ROW_BYTES
from r1ray.data.prepare import config as prepare_config
from r1ray.data.prepare.config import PrepareConfig
from r1ray.data.prepare.job import prepare_data
from r1ray.data.prepare.pipeline import prepare
from r1ray.data.prepare.plan import read_mix
from r1ray.data.read import read_conversations
from r1ray.data.split import stem
from r1ray.errors import DiskFull, InvalidValue, MissingColumn, NothingToTrain, TooManyBadRows, UnknownFormat, WrongEncoding

QUESTIONS = [
    "How do I block my lost card?", "What does a transfer to Spain cost?", "Where can I change my address?", "Why was my payment declined?",
    "When does the branch in Hangzhou open?", "Can I raise the limit of my account?", "信用卡的年费是多少？", "怎么修改预留手机号码？",
    "转账到外地需要多长时间？", "开户要带什么证件？", "忘记了网银的登录密码怎么办？", "可以提前还清房贷吗？",
]  # fmt: skip


def row(question, answer="Please use the app for that.", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def labelled(question, intent, answer="Done."):
    answered = {"role": "assistant", "text": answer, "annotations": {"intent": intent, "entities": {}}}
    return {"utterances": [{"role": "user", "text": question}, answered]}


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def run(settings, tmp_path, rows, **more):
    path = save(tmp_path / "in.jsonl", rows)
    tree = {
        "sources": [{"path": path}],
        "out": tmp_path / "out/x.parquet",
        "track": False,
        "progress_s": None,
        "max_reject_share": 1.0,
        **more,
    }
    return prepare(PrepareConfig.model_validate(tree), settings)


def rejects(result):
    return [json.loads(line) for line in result.rejects.read_text(encoding="utf-8").splitlines()]


def written(result):
    return pq.read_table(result.out).to_pylist()


def questions(result):
    return [r["utterances"][0]["text"] for r in written(result)]


def test_what_is_written_is_read_by_the_training_as_it_is(settings, tmp_path):
    result = run(settings, tmp_path, [row(q) for q in QUESTIONS])
    loaded = read_conversations(DataConfig(path=result.out))
    assert [c.messages[0].content for c in loaded.conversations] == QUESTIONS
    assert loaded.conversations[0].source.endswith("in.jsonl:1")
    assert loaded.rejects == ()


def test_every_dropped_row_is_listed_with_its_step_and_the_counts_add_up(settings, tmp_path):
    rows = [row(q) for q in QUESTIONS]
    rows += [
        {"messages": []},
        row("Я потерял карту и не знаю, что делать"),
        row("\ufffd\ufffd\ufffd\ufffd help me please"),
        row("x"),
        row(QUESTIONS[0].upper()),
        row(QUESTIONS[1] + "!"),
        row("What is that?", "." * 40),
    ]
    result = run(settings, tmp_path, rows)
    assert [(r["row"], r["step"]) for r in rejects(result)] == [
        (13, "schema"), (14, "language"), (15, "mangled"), (16, "length"), (19, "quality"), (17, "exact_duplicate"), (18, "near_duplicate"),
    ]  # fmt: skip
    assert rejects(result)[5]["reason"].endswith("in.jsonl:1")
    assert rejects(result)[0]["reason"] == "messages is empty"
    assert result.report["rows_in"] == len(rows) == result.report["rows_out"] + result.report["rows_rejected"]
    assert questions(result) == QUESTIONS


@pytest.mark.parametrize("batch_rows", [1, 3, 1024])
def test_the_result_does_not_depend_on_the_batches(settings, tmp_path, batch_rows):
    rows = [row(q) for q in [*QUESTIONS, *QUESTIONS[3:7], *(f"{q} please" for q in QUESTIONS)]]
    result = run(settings, tmp_path, rows, batch_rows=batch_rows)
    whole = run(settings, tmp_path / "whole", rows)
    assert written(result) == [{**r, "source": r["source"].replace("/whole", "")} for r in written(whole)]


def test_a_contradiction_is_settled_by_the_majority_of_all_rows(settings, tmp_path):
    rows = [labelled("Block my card", "a"), labelled("block my  card", "b"), labelled("block my card", "b"), labelled("Where is it?", "c")]
    rows += [labelled("What is the fee?", "d"), labelled("what is the fee?", "e")]
    result = run(settings, tmp_path, rows, clean={"near_duplicates": None})
    assert [(r["utterances"][1]["annotations"]["intent"]) for r in written(result)] == ["b", "c"]
    reasons = {r["row"]: (r["step"], r["reason"]) for r in rejects(result)}
    assert reasons[1] == ("contradiction", "3 rows ask the same and answer differently; 2 agree on another answer")
    assert reasons[3][0] == "exact_duplicate"
    assert reasons[5][1].endswith("no answer has a majority")


def test_a_new_domain_rule_overrules_history(settings, tmp_path):
    old = save(
        tmp_path / "old.jsonl", [row(QUESTIONS[0], f"Call us at window {n}.") for n in "1"] + [row(q, "Old.") for q in QUESTIONS[4:8]]
    )
    new = save(tmp_path / "new.jsonl", [row(QUESTIONS[0], "Use the app now.")])
    sources = [{"path": old, "role": "history"}, {"path": new}]
    result = run(settings, tmp_path, [], sources=sources, mix={"history_share": 1.0}, clean={"quality": None})
    assert "Use the app now." in [r["utterances"][1]["text"] for r in written(result)]
    assert [r["step"] for r in rejects(result)] == ["contradiction"]


def test_personal_data_reaches_no_file_of_the_job(settings, tmp_path):
    rows = [row(q) for q in QUESTIONS]
    rows += [row("Я потерял карту 13812345678"), row("call me at 13987654321", "..........................")]
    result = run(settings, tmp_path, [*rows, row("My mail is li@bank.cn, help!")])
    texts = result.rejects.read_text() + json.dumps(written(result))
    assert not any(secret in texts for secret in ("13812345678", "13987654321", "li@bank.cn"))
    assert result.report["pii"] == {"mobile": 2, "email": 1}


def test_classes_are_balanced_and_intents_capped(settings, tmp_path):
    rows = [labelled(f"fraud question number {n} {q}", "fraud") for n, q in enumerate(QUESTIONS[:4])]
    rows += [labelled(f"harmless question number {n} {q}", "other") for n, q in enumerate(QUESTIONS * 3)]
    plain = {"near_duplicates": None, "quality": None}
    result = run(settings, tmp_path, rows, clean=plain, balance={"negatives": ["other"]})
    intents = [r["utterances"][1]["annotations"]["intent"] for r in written(result)]
    assert (intents.count("fraud"), intents.count("other")) == (4, 6)
    capped = run(settings, tmp_path, rows, clean=plain, balance={"max_per_intent": 3})
    intents = [r["utterances"][1]["annotations"]["intent"] for r in written(capped)]
    assert (intents.count("fraud"), intents.count("other")) == (3, 3)


def test_sources_are_mixed_in_their_shares(settings, tmp_path):
    def many(name, num):
        rows = [row(f"{name} {n} {QUESTIONS[n % 12]} {n * 7919}") for n in range(num)]
        return save(tmp_path / f"{name}.jsonl", rows)

    sources = [
        {"path": many("domain", 140)},
        {"path": many("history", 100), "role": "history"},
        {"path": many("general", 100), "role": "out_of_domain"},
    ]
    clean = {"near_duplicates": None, "quality": None}
    result = run(settings, tmp_path, [], sources=sources, clean=clean, augment={"operations": [{"type": "traps", "share": 0.5}]})
    roles = result.report["roles"]
    assert roles["history"] == 70
    assert 0.10 <= roles["out_of_domain"] / sum(roles.values()) <= 0.15
    assert result.report["rows_in"] + result.report["rows_made"] == result.report["rows_out"] + result.report["rows_rejected"]


def test_made_rows_stay_within_their_share_and_can_be_undone(settings, tmp_path):
    demo = write_demo(tmp_path / "demo")
    operations = [{"type": name, "share": 1.0} for name in ("synonyms", "entities", "syntax", "traps")]
    sources = [{"path": demo.train}]
    result = run(settings, tmp_path, [], sources=sources, augment={"operations": operations, "max_share": 0.25})
    rows = {c.id: c for c in read_conversations(DataConfig(path=result.out)).conversations}
    made = [r for r in written(result) if r["operations"] != "[]"]
    assert 0 < len(made) <= 0.25 * len(rows)
    assert len(made) == result.report["rows_made"] == sum(result.report["made"].values())
    for r in made:
        original = undo(rows[r["conversation_id"]], r["origin"], load(r["operations"]))
        assert original.messages == rows[r["origin"]].messages
        assert original.id == r["origin"]


def test_sources_that_both_count_from_one_lose_no_row_and_no_role(settings, tmp_path):
    new = save(tmp_path / "new.jsonl", [row(q, id=str(n)) for n, q in enumerate(QUESTIONS[:6])])
    old = save(
        tmp_path / "last_year.jsonl", [row(q, id=str(n)) for n, q in enumerate(QUESTIONS[6:])] + [row("Where are you open today?", id="5")]
    )
    sources = [{"path": new}, {"path": old, "role": "history"}]
    result = run(settings, tmp_path, [], sources=sources, mix={"history_share": 1.0})
    loaded = read_conversations(DataConfig(path=result.out, max_bad_share=0))
    assert [c.messages[0].content for c in loaded.conversations] == QUESTIONS
    assert [c.id for c in loaded.conversations] == [*"012345", *(f"last_year/{n}" for n in range(6))]
    assert [r["origin"] for r in written(result)] == [c.id for c in loaded.conversations]
    columns = read_mix(result.out).columns([c.id for c in loaded.conversations])
    assert columns["role"] == ["domain"] * 6 + ["history"] * 6
    (again,) = rejects(result)
    assert again["reason"] == f"conversation_id '5' was already used at {old}:6"


def test_files_of_one_name_and_rows_made_earlier_are_told_apart(settings, tmp_path):
    texts = iter([f"{q} {n}" for n in (1, 2) for q in QUESTIONS])
    names = {"a": ["1", "2"], "b": ["1", "3", "1#masked", "3#masked", "4#masked"], "c": ["1"]}
    sources = [{"path": save(tmp_path / place / "d.jsonl", [row(next(texts), id=n) for n in ids])} for place, ids in names.items()]
    result = run(settings, tmp_path, [], sources=sources, clean={"near_duplicates": None})
    found = [r["conversation_id"] for r in written(result)]
    assert found == ["1", "2", "d/1", "3", "d/1#masked", "3#masked", "4#masked", "d.2/1"], "a made row keeps its origin's name"


def test_two_operations_of_one_type_make_rows_of_different_names(settings, tmp_path):
    demo = write_demo(tmp_path / "demo")
    operations = [{"type": "synonyms", "share": 1.0, "probability": p} for p in (0.4, 1.0)]
    augment = {"operations": operations, "max_share": 0.6}
    result = run(settings, tmp_path, [], sources=[{"path": demo.train}], augment=augment, clean={"quality": None})
    loaded = read_conversations(DataConfig(path=result.out, max_bad_share=0))
    assert len(loaded.conversations) == result.report["rows_out"]
    made = {r["conversation_id"]: r["origin"] for r in written(result) if r["operations"] != "[]"}
    numbered = [name for name in made if name.endswith("#synonyms#2")]
    assert numbered
    assert all(name.removesuffix("#2") in made and stem(name) == made[name] for name in numbered)


def test_sections_of_documents_of_one_name_are_told_apart(settings, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "fees.md").write_text("# Fees\n\nA transfer to Spain costs two euros, and takes a day.\n", encoding="utf-8")
    documents = {"sources": [tmp_path / "a", tmp_path / "b"], "dialogues": True}
    clean = {"near_duplicates": None, "exact_duplicates": False}
    result = run(settings, tmp_path, [], sources=[], documents=documents, clean=clean)
    first, second = [r["conversation_id"] for r in written(result)]
    assert second == f"{first}#2" and stem(second) == first


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(settings, tmp_path):
    demo = write_demo(tmp_path / "demo")

    def made(name, seed):
        more = {"sources": [{"path": demo.train}], "augment": {"operations": [{"type": "synonyms"}, {"type": "traps"}]}, "seed": seed}
        return run(settings, tmp_path / name, [], **more).out.read_bytes()

    first = made("a", 0)
    assert first == made("b", 0)
    assert first != made("c", 1)


def test_too_many_rejects_fail_and_leave_only_their_list(settings, tmp_path):
    with pytest.raises(TooManyBadRows, match=r"3 of 4 rows are bad \(3 schema\), more than max_reject_share=0.5") as caught:
        run(settings, tmp_path, [row(QUESTIONS[0]), {"messages": []}, {"messages": 1}, {"messages": []}], max_reject_share=0.5)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.rejects.jsonl"]
    assert str(tmp_path / "out/x.rejects.jsonl") in str(caught.value)


def test_rows_left_out_by_design_do_not_fail_the_job(settings, tmp_path):
    general = save(tmp_path / "general.jsonl", [row(f"{q} {n}") for n, q in enumerate(QUESTIONS * 4)])
    domain = save(tmp_path / "domain.jsonl", [row(q) for q in QUESTIONS])
    sources = [{"path": domain}, {"path": general, "role": "out_of_domain"}]
    result = run(settings, tmp_path, [], sources=sources, max_reject_share=0.1, clean={"near_duplicates": None})
    assert result.report["roles"] == {"domain": 12, "out_of_domain": 1}


def test_a_row_whose_question_nobody_answers_says_so(settings, tmp_path):
    result = run(settings, tmp_path, [row(QUESTIONS[0]), {"messages": [{"role": "user", "content": "Hello?"}]}])
    assert rejects(result)[0]["reason"].startswith("no answer to any question")


def test_no_row_left_is_nothing_to_train(settings, tmp_path):
    with pytest.raises(NothingToTrain, match="No row is left of 1"):
        run(settings, tmp_path, [row("x")])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", NothingToTrain),
        ("text,label\n我的卡丢了，怎么办？,a\n".encode("gbk"), WrongEncoding),
        (b"a,b\n1,2\n", MissingColumn),
        (b"%PDF-1.7 ...", UnknownFormat),
    ],
)
def test_a_file_that_cannot_be_read_stops_the_job_and_leaves_nothing(settings, tmp_path, data, error):
    path = tmp_path / ("bad.pdf" if data.startswith(b"%PDF") else "bad.csv")
    path.write_bytes(data)
    good = save(tmp_path / "good.jsonl", [row(q) for q in QUESTIONS])
    with pytest.raises(error, match=r"bad\."):
        run(settings, tmp_path, [], sources=[{"path": good}, {"path": path}])
    assert list((tmp_path / "out").iterdir()) == []


def test_an_endless_line_is_rejected_without_being_loaded(settings, tmp_path):
    path = save(tmp_path / "long.jsonl", [row(q) for q in QUESTIONS])
    with path.open("ab") as file:
        file.write(b'{"messages": "')
        file.truncate(file.tell() + 3 * LONGEST_ROW_BYTES)  # a hole: zeros without a line break
        file.seek(0, 2)
        file.write(b"\n" + json.dumps(row("What is your opening time?")).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run(settings, tmp_path, [], sources=[{"path": path}])
    assert [(r["row"], r["reason"]) for r in rejects(result)] == [(13, "a line of more than 64 MiB")]
    assert result.report["rows_out"] == 13
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 * 1024  # KiB; the line has 192 MiB


def test_a_full_disk_leaves_nothing_behind(settings, tmp_path):
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save(tmp_path / "in.jsonl", [])
    source = save(tmp_path / "big.jsonl", [row(f"{n} {q} {n * 104729}") for n in range(60) for q in QUESTIONS])
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(DiskFull, match="No room to write in"):
            run(settings, tmp_path, [], sources=[{"path": source}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_to_prepare_and_a_source_as_output_are_refused(settings, tmp_path):
    with pytest.raises(InvalidValue, match="Nothing to prepare"):
        prepare(PrepareConfig(), settings)
    path = save(tmp_path / "x.jsonl", [row(QUESTIONS[0])])
    with pytest.raises(InvalidValue, match="is one of the sources"):
        prepare(PrepareConfig.model_validate({"sources": [{"path": path}], "out": path}), settings)
    assert path.read_text()


def test_marks_train_the_quality_model_and_report_held_out_figures(settings, tmp_path):
    good = [row(f"case {n}: {QUESTIONS[n % 12]}", f"Please open the app and choose case {n}.", quality="good") for n in range(60)]
    bad = [row(f"case {n}: {QUESTIONS[n % 12]}", f"No idea, ask somebody else about {n}.", quality="bad") for n in range(60)]
    marks = save(tmp_path / "marks.jsonl", good + bad)
    rows = [row(QUESTIONS[0], "Please open the app and choose case 70."), row(QUESTIONS[1], "No idea, ask somebody else about 71.")]
    result = run(settings, tmp_path, rows, clean={"quality": {"marks": marks, "threshold": 0.6}})
    assert questions(result) == QUESTIONS[:1]
    assert result.report["quality"]["held_out_auc"] > 0.9
    again = run(settings, tmp_path, rows, clean={"quality": {"model": tmp_path / "out/quality.json", "threshold": 0.6}})
    assert questions(again) == QUESTIONS[:1]


def test_a_row_without_a_mark_is_named(settings, tmp_path):
    marks = save(tmp_path / "marks.jsonl", [row(QUESTIONS[0], quality="so so")])
    with pytest.raises(InvalidValue, match=r"marks.jsonl:1 has 'so so' in the column 'quality'"):
        run(settings, tmp_path, [row(QUESTIONS[0])], clean={"quality": {"marks": marks}})


def test_the_job_reports_on_the_terminal_beside_the_output_and_in_mlflow(settings, tmp_path, capsys):
    path = save(tmp_path / "in.jsonl", [*(row(q) for q in QUESTIONS), row("x")])
    config = PrepareConfig.model_validate({"sources": [{"path": path}], "out": tmp_path / "out/x.parquet"})
    result = prepare_data(config, settings)
    report = json.loads((tmp_path / "out/x.report.json").read_text())
    assert report["rows_in"] == 13 and report["sources"][str(path)] == {"in": 13, "dropped": {"length": 1}}
    assert report["config"]["seed"] == 0
    assert "rows_per_s" in capsys.readouterr().out
    from r1ray.observe.client import client

    experiment = client(settings.registry_uri).get_experiment_by_name("prepare")
    (logged,) = client(settings.registry_uri).search_runs([experiment.experiment_id])
    assert logged.data.metrics["rows_out"] == result.report["rows_out"] == 12


def test_every_field_of_these_configs_is_described():
    missing = []
    for module in (prepare_config, augment_config):
        for name, schema in vars(module).items():
            if isinstance(schema, type) and issubclass(schema, Config) and schema is not Config:
                missing += [f"{name}.{field}" for field, info in schema.model_fields.items() if not info.description]
    assert missing == []


def test_the_shipped_yaml_states_the_defaults_but_for_its_source_and_operations():
    loaded = load_config(PrepareConfig, "jobs/configs/prepare_data.yaml").model_dump()
    defaults = PrepareConfig().model_dump()
    assert {key for key in loaded if loaded[key] != defaults[key]} == {"sources", "augment"}
    assert loaded["augment"]["max_share"] == defaults["augment"]["max_share"]
