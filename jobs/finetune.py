"""Fine-tune a registered base on dialogues; the result is a new registered version.

    ray job submit --working-dir . -- python jobs/finetune.py --config jobs/configs/finetune_lora.yaml train.num_workers=2

`--show 3` prints three dialogues as they would be trained, the part that carries loss between marks, and trains nothing.
"""

from r1ray import entry
from r1ray.train.config import FinetuneConfig
from r1ray.train.launcher import finetune, show

if __name__ == "__main__":
    raise SystemExit(entry.run(FinetuneConfig, __doc__, lambda config: show(config) if config.show else finetune(config)))
