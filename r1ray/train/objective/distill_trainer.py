"""The supervised trainer with a frozen teacher beside the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from r1ray.errors import UnsupportedModel
from r1ray.train.distillation import add_distillation_loss, supervised_logits
from r1ray.train.loss import has_plain_head
from r1ray.train.objective.sft_trainer import SupervisedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from r1ray.train.blocks import DistillSettings

__all__ = ["DistilledTrainer"]


class DistilledTrainer(SupervisedTrainer):
    """The loss of a step is the mean over all its supervised tokens of how far the student is from the teacher."""

    teacher: PreTrainedModel

    def learn_from(self, teacher: PreTrainedModel, settings: DistillSettings) -> None:
        """Before training.

        Raises:
            UnsupportedModel: teacher or student scales its logits after the output layer.
        """
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        for model in (student, teacher):
            if not has_plain_head(model):
                raise UnsupportedModel(
                    f"{type(model).__name__} scales its logits after the output layer, which distillation from probabilities does not "
                    "follow. Set train.distill.mode=texts."
                )
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        add_distillation_loss(student, settings)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, num_items_in_batch: Any = None, **__: Any) -> torch.Tensor:
        taught = supervised_logits(self.teacher, inputs)
        return self.counted(model(**inputs, taught=taught), num_items_in_batch)
