"""Distillation: a smaller model learns from a larger one, from the texts that it writes or from its probabilities."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from r1ray.data.read import Loaded
from r1ray.errors import UnsupportedModel
from r1ray.model.soft import soft_kind
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train.objective.base import Bench
from r1ray.train.objective.sft import Supervised
from r1ray.train.order import attention_of
from r1ray.train.tokens import TokenSet
from r1ray.types import Artifact

if TYPE_CHECKING:
    from r1ray.train.config import FinetuneConfig
    from r1ray.train.corpus import Corpus
    from r1ray.train.objective.sft_trainer import SupervisedTrainer
    from r1ray.train.trainer import Paced

__all__ = ["Distilled"]


class Distilled(Supervised):
    """texts: supervised fine-tuning on the teacher's answers. logits: the divergence from it, at the data's answers."""

    def read(self, config: FinetuneConfig) -> Loaded:
        """The rows' hash says by whom they are taught: another teacher is another run."""
        loaded = super().read(config)
        assert isinstance(loaded, Loaded), "the config refuses to stream for this objective"
        taught = f"{loaded.data_hash}/{_teacher(config, Settings()).manifest.weights_sha256}"
        return replace(loaded, data_hash=hashlib.sha256(taught.encode()).hexdigest())

    def prepare(self, rows: Loaded | Corpus, base: Artifact, config: FinetuneConfig, settings: Settings) -> TokenSet:
        from r1ray.train.taught import taught_by

        assert isinstance(rows, Loaded), "the config refuses to stream for this objective"
        teacher = _teacher(config, settings)
        _check_kind(teacher, config.train.distill.mode)
        if config.train.distill.mode == "texts":
            rows = taught_by(teacher, rows, config, settings)
        else:
            _check_vocabulary(base, teacher)
        return super().prepare(rows, base, config, settings)

    def trainer(self, bench: Bench) -> Paced:
        config = bench.order.config
        if config.distill.mode == "texts":
            return super().trainer(bench)
        from r1ray.model.load import load_model
        from r1ray.train.attention import set_attention
        from r1ray.train.objective.distill_trainer import DistilledTrainer

        settings = bench.order.settings
        assert config.distill.teacher is not None, "checked by the config"
        teacher = Registry(settings).resolve(config.distill.teacher)
        trainer = super().trainer(bench)
        assert isinstance(trainer, DistilledTrainer), "made by this class"
        model = load_model(teacher, registry=Registry(settings), dtype=bench.order.dtype, device=str(trainer.args.device))
        longest = max(bench.order.material.lengths())
        set_attention(model, attention_of(config, model.config.to_dict(), teacher.ref, longest=longest))
        trainer.learn_from(model, config.distill)
        return trainer

    def trainer_class(self, bench: Bench) -> type[SupervisedTrainer]:
        if bench.order.config.distill.mode == "texts":
            return super().trainer_class(bench)
        from r1ray.train.objective.distill_trainer import DistilledTrainer

        return DistilledTrainer


def _teacher(config: FinetuneConfig, settings: Settings) -> Artifact:
    assert config.train.distill.teacher is not None, "checked by the config"
    return Registry(settings).resolve(config.train.distill.teacher)


def _check_kind(teacher: Artifact, mode: str) -> None:
    """A teacher writes texts; its probabilities are computed from weights alone, with an adapter's update merged into them."""
    if teacher.manifest.kind == "reward":
        raise UnsupportedModel(f"{teacher.ref} is a reward model and writes nothing to learn from. Set train.distill.teacher to another.")
    if mode == "logits" and teacher.manifest.kind == "adapter" and (kind := soft_kind(teacher.path)) is not None:
        raise UnsupportedModel(
            f"{teacher.ref} is a {kind} adapter, which is no change of weights, and cannot teach by its probabilities. Set "
            "train.distill.mode=texts."
        )


def _check_vocabulary(student: Artifact, teacher: Artifact) -> None:
    """Probabilities can be compared only where both mean the same tokens by the same ids."""
    from r1ray.model.load import load_tokenizer

    ours, theirs = load_tokenizer(student).get_vocab(), load_tokenizer(teacher).get_vocab()
    if ours == theirs:
        return
    other = sum(theirs.get(token) != number for token, number in ours.items())
    raise UnsupportedModel(
        f"{teacher.ref} cannot teach {student.ref} by its probabilities: {other} of {len(ours)} tokens have another id or none in its "
        "vocabulary. Set train.distill.mode=texts, which needs no common vocabulary."
    )
