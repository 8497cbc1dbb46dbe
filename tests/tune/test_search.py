"""Candidates come first and in order, then the search; all of it survives a restart."""

from r1ray.tune.search import CandidatesFirst, optuna_search
from r1ray.tune.space import Uniform

SPACE = {"temperature": Uniform(type="uniform", low=0.0, high=1.0)}
TWO = [("base", {}), ("greedy", {"temperature": 0.0})]


def searcher():
    return CandidatesFirst(TWO, optuna_search(SPACE, ["quality", "latency_s"], ["max", "min"], seed=1))


def test_candidates_come_first_then_the_search():
    search = searcher()
    suggestions = [search.suggest(f"t{i}") for i in range(4)]
    assert [s["name"] for s in suggestions] == ["base", "greedy", "search-1", "search-2"]
    assert suggestions[1]["values"] == {"temperature": 0.0}
    assert 0 <= suggestions[2]["values"]["temperature"] <= 1
    for i in range(4):
        search.on_trial_complete(f"t{i}", {"quality": 0.5, "latency_s": 1.0})


def searcher_values():
    search = searcher()
    return [search.suggest(f"t{i}")["values"] for i in range(5)]


def test_the_same_seed_suggests_the_same():
    assert searcher_values() == searcher_values()


def test_a_saved_search_goes_on_where_it_was(tmp_path):
    search, restored = searcher(), searcher()
    for i in range(3):
        search.suggest(f"t{i}")
    search.save(str(tmp_path / "state"))
    restored.restore(str(tmp_path / "state"))
    assert restored.suggest("t3")["name"] == "search-2"
    restored.on_trial_complete("t2", {"quality": 0.5, "latency_s": 1.0})


def test_without_a_space_the_search_ends_after_the_candidates():
    search = CandidatesFirst(TWO, optuna_search({}, "loss", "min", seed=0))
    assert [search.suggest(f"t{i}") for i in range(3)][2] == CandidatesFirst.FINISHED
