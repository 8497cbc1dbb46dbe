"""Put Markdown, text, PDF, Word and HTML files into a retrieval collection that models answer from.

ray job submit --working-dir . -- python jobs/index_corpus.py --config jobs/configs/index_corpus.yaml 'sources=[/srv/handbook]'
"""

from r1ray import entry
from r1ray.retrieval.config import IndexConfig
from r1ray.retrieval.index import build_index


def index_corpus(config: IndexConfig) -> None:
    stats = build_index(config, progress=lambda line: print(line, flush=True))
    done = "indexed" if stats.changed else "unchanged, nothing written:"
    print(
        f"{done} {stats.num_documents} documents, {stats.num_chunks} passages ({stats.num_embedded} embedded, {stats.num_reused} reused), "
        f"{len(stats.rejects)} unreadable, {stats.seconds:.1f} s -> {stats.path}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(entry.run(IndexConfig, __doc__, index_corpus))
