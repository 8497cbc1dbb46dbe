"""What Ray Tune tries next: fixed candidates in their order, then Optuna's suggestions. Knows no model and no training."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from r1ray.tune.space import Choice, Integer, LogUniform, Uniform, distributions

__all__ = ["CandidatesFirst", "optuna_search"]


def optuna_search(
    space: Mapping[str, Uniform | LogUniform | Integer | Choice], metric: str | list[str], mode: str | list[str], *, seed: int
) -> OptunaSearch | None:
    """TPE over the space (it handles several objectives); None when there is nothing to search."""
    return OptunaSearch(space=distributions(space), metric=metric, mode=mode, seed=seed) if space else None


class CandidatesFirst(Searcher):
    """Suggests `{"name": ..., "values": {...}}`: the candidates, then what `searcher` proposes as `search-1`, `search-2`, ...

    Candidates are not told to Optuna, since they may lie outside its space. Without a searcher it ends after the candidates.
    """

    def __init__(self, candidates: Sequence[tuple[str, Mapping[str, Any]]], searcher: OptunaSearch | None) -> None:
        super().__init__()  # without a metric: Tune would demand it of every intermediate report
        self._candidates = list(candidates)
        self._searcher = searcher
        self._suggested: dict[str, dict[str, Any]] = {}
        self._num_searched = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if trial_id in self._suggested:
            return self._suggested[trial_id]
        if len(self._suggested) - self._num_searched < len(self._candidates):
            name, values = self._candidates[len(self._suggested) - self._num_searched]
            suggestion = {"name": name, "values": dict(values)}
        elif self._searcher is None:
            return Searcher.FINISHED
        else:
            values = self._searcher.suggest(trial_id)
            self._num_searched += 1
            suggestion = {"name": f"search-{self._num_searched}", "values": dict(values)}
        self._suggested[trial_id] = suggestion
        return suggestion

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Intermediate reports are the scheduler's business."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._searcher is not None and self._suggested.get(trial_id, {}).get("name", "").startswith("search-"):
            self._searcher.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))
