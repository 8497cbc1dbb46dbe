"""Supervised fine-tuning: the next token of what the assistant says."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from r1ray.data.prepare.plan import Mix, read_mix, stored_mix
from r1ray.data.read import Loaded, read_conversations
from r1ray.data.split import origins_digest, stem_hash
from r1ray.settings import Settings
from r1ray.train.batches import BatchPlan
from r1ray.train.objective.base import Bench, Objective, identity
from r1ray.train.order import Material, plan_for
from r1ray.train.tokens import TokenSet, tokenise
from r1ray.types import Artifact

if TYPE_CHECKING:
    from r1ray.train.config import FinetuneConfig
    from r1ray.train.corpus import Corpus
    from r1ray.train.feed import Feed
    from r1ray.train.objective.sft_trainer import SupervisedTrainer
    from r1ray.train.parallel.pipeline import PipelineTrainer
    from r1ray.train.parallel.sequence import SlicedFeed
    from r1ray.train.trainer import Paced

__all__ = ["Supervised"]


class Supervised(Objective):
    """Dialogues in any format; the loss is the mean over the batch's supervised tokens."""

    def read(self, config: FinetuneConfig) -> Loaded | Corpus:
        settings = Settings()
        if config.data.backend == "ray":
            return self._streamed(config, settings)
        loaded, mix = read_conversations(config.data), _mix(config, settings)
        origins = origins_digest(stem_hash(one.id) for one in loaded.conversations) if config.train.eval_share else None
        return replace(loaded, data_hash=identity(loaded.data_hash, mix.stored if mix else None, origins))

    def prepare(self, rows: Loaded | Corpus, base: Artifact, config: FinetuneConfig, settings: Settings) -> TokenSet:
        if not isinstance(rows, Loaded):
            return rows.tokens
        return tokenise(rows, base, config.data, max_length=config.train.max_length, cache=settings.cache, mix=_mix(config, settings))

    def _streamed(self, config: FinetuneConfig, settings: Settings) -> Corpus:
        """Read and tokenised in one pass, since the dialogues in between are never all in memory."""
        from r1ray.registry import Registry
        from r1ray.train.corpus import Recipe, read_corpus

        base = Registry(settings).resolve(config.base)
        mix = stored_mix(settings.locate(config.data.path)) if config.train.mix else None
        corpus = read_corpus(Recipe(data=config.data, base=base, max_length=config.train.max_length, mix=mix), settings)
        origins = corpus.origins if config.train.eval_share else None
        return replace(corpus, data_hash=identity(corpus.data_hash, mix, origins))

    def trainer_class(self, _: Bench) -> type[SupervisedTrainer]:
        from r1ray.train.objective.sft_trainer import SupervisedTrainer

        return SupervisedTrainer

    def trainer(self, bench: Bench) -> Paced:
        from r1ray.train.feed import Feed
        from r1ray.train.objective.sft_trainer import sft_arguments

        arguments = sft_arguments(bench)  # before the model: ZeRO-3 must be known when it is loaded
        order, tokenizer = bench.order, bench.tokenizer()
        ids, masks = order.material.rows()
        feed = Feed(
            input_ids=ids,
            masks=masks,
            plan=plan_for(order.config, order.material),
            num_steps=order.num_steps,
            rank=bench.rank,
            num_workers=bench.num_workers,
            accumulation=bench.accumulation,
            pad_id=tokenizer.pad_token_id or 0,
            packing=bool(order.config.packing),
            attention=order.attention,
        )
        trainer: SupervisedTrainer | PipelineTrainer
        if bench.layout.pipeline > 1:
            from r1ray.train.parallel.pipeline import PipelineTrainer

            trainer = PipelineTrainer(bench, feed)
        else:
            trainer = self.trainer_class(bench)(
                bench.model(), arguments, feed=bench.sliced(feed), schedule=bench.schedule, tokenizer=tokenizer, callbacks=bench.callbacks
            )
        if order.held_out is not None:
            trainer.held_out, trainer.num_held_out = _held_out(bench, feed, order.held_out)
        return trainer


def _held_out(bench: Bench, feed: Feed, material: Material) -> tuple[Feed | SlicedFeed, int]:
    """(this worker's part of the rows that are only measured, in how many batches); as full as a pass may be, similar lengths together."""
    ids, masks = material.rows()
    rows = bench.order.config.micro_batch_size * bench.num_workers
    plan = BatchPlan(material.lengths(), batch_size=rows, num_epochs=1, seed=0, group_window=len(ids))
    return bench.sliced(replace(feed, input_ids=ids, masks=masks, plan=plan, num_steps=plan.num_steps, accumulation=1)), plan.num_steps


def _mix(config: FinetuneConfig, settings: Settings) -> Mix | None:
    return read_mix(settings.locate(config.data.path)) if config.train.mix else None
