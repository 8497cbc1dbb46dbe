"""Raw files in; cleaned, augmented, balanced and mixed dialogues for jobs/finetune.py out.

    ray job submit --working-dir . -- python jobs/prepare_data.py --config jobs/configs/prepare_data.yaml \
        'sources=[{path: /data/chats.jsonl}, {path: /data/general.json, role: out_of_domain}]' out=/data/train.parquet

It needs no cluster: without `ray job submit` the same command runs in this process.
"""

from r1ray import entry
from r1ray.data.prepare.config import PrepareConfig


def prepare(config: PrepareConfig) -> None:
    from r1ray.data.prepare.job import prepare_data
    from r1ray.retrieval.embed import create_embedder

    prepare_data(config, embed=None if config.diversity.embedder == "ngrams" else create_embedder(config.diversity.embedder).passages)


if __name__ == "__main__":
    raise SystemExit(entry.run(PrepareConfig, __doc__, prepare))
