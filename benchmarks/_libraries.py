"""A peer that consists of two libraries.

It takes a contrastive step by sentence-transformers and a fine-tuning step by TRL:

    SentenceTransformer([Transformer(folder), Pooling(width, "lasttoken"), Dense])
    CachedMultipleNegativesRankingLoss(
        model, scale=1 / temperature, mini_batch_size=N, partition_mode="per_direction",
        directions=("query_to_doc", "doc_to_query"))
    SFTTrainer(
        PeftModel,
        SFTConfig(per_device_train_batch_size=B, gradient_checkpointing=False, max_length=None),
        train_dataset=[{"images", "prompt", "completion"}], processing_class=AutoProcessor)

The temperature is fixed, because that loss learns none. An image is read from its last token,
because that pooling does not know image tokens. Both libraries work on one model: TRL trains
get_peft_model(AutoModelForImageTextToText, LoraConfig), sentence-transformers embeds with its
inner model, and one AdamW updates LoRA, projector and Dense after both backward passes. The
processor gets a chat template that writes our prompts and nothing else, so that all contenders
have the same tokens. Both libraries get the image itself in every step, as their users pass it,
and run the frozen vision tower on it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlduet.data import images
from vlduet.data.records import Record
from vlduet.model.adapters import LORA_TARGET_PATTERNS, LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts


def build_chat_template(prompts: Prompts, image_token: str, eos: str) -> str:
    """Return a chat template that renders an image, a text, or an image and its caption.

    The result has the same tokens as the prompts of VLDuet. `eos` ends a caption.
    """
    before, after = prompts.image.split("{image}")
    text_before, text_after = prompts.text.split("{text}")
    return (
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}"
        "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
        f"{{{{ {eos!r} }}}}"
        "{% else %}{% for p in m['content'] %}"
        f"{{% if p['type'] == 'image' %}}{{{{ {before + image_token + after!r} }}}}"
        f"{{% else %}}{{{{ {text_before!r} + p['text'] + {text_after!r} }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{% endfor %}"
    )


class TwoLibraries:
    """One training step by sentence-transformers and TRL on the same records.

    Raises:
        ImportError: one of the libraries is not installed.
        SystemExit: the model has chat prompts, or a head that is not linear.
    """

    def __init__(
        self, folder: Path, records: list[Record], *, lora: LoraSettings, lr: float, mini_batch: int
    ):
        self.records = records
        duet = DuetModel.from_pretrained(folder, device="cpu")  # for its prompts and its head
        if duet.prompts.chat or duet.head.kind != "linear":
            raise SystemExit("the peers need a model with plain prompts and a linear head")
        base = AutoModelForImageTextToText.from_pretrained(folder)
        base.requires_grad_(False)
        targets = rf".*language_model\..*\.({LORA_TARGET_PATTERNS[lora.targets]})"
        lora_config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        self.model = get_peft_model(base, lora_config)
        base.model.multi_modal_projector.requires_grad_(True)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.chat_template = build_chat_template(
            duet.prompts, self.processor.image_token, self.processor.tokenizer.eos_token
        )
        dense = self._build_embedder(folder, base, duet, mini_batch=mini_batch)
        self._build_trainer()
        parameters = [*self.model.parameters(), *dense.parameters()]
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)

    def _build_embedder(
        self, folder: Path, base: Any, duet: DuetModel, *, mini_batch: int
    ) -> torch.nn.Module:
        """Set the sentence-transformers model and its loss; return the module of its head."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )
        from sentence_transformers.sentence_transformer.modules import Dense, Pooling

        transformer = Transformer(str(folder))
        transformer.model = base.model
        transformer.processor.chat_template = self.processor.chat_template
        linear = duet.head.layers
        dense = Dense(
            linear.in_features, linear.out_features, activation_function=torch.nn.Identity()
        )
        dense.linear.load_state_dict(linear.state_dict())
        pooling = Pooling(duet.backbone.hidden_size, "lasttoken")
        self.embedder = SentenceTransformer(modules=[transformer, pooling, dense], device="cpu")
        self.contrastive = CachedMultipleNegativesRankingLoss(
            self.embedder,
            scale=float(duet.logit_scale.detach().exp()),
            mini_batch_size=mini_batch,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        head: torch.nn.Module = dense
        return head

    def _build_trainer(self) -> None:
        """Set the TRL trainer and its data set, one example for every record with an image."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        examples = []
        for record in self.records:
            if record.image is not None:
                caption = {"type": "text", "text": record.long}
                examples.append(
                    {
                        "images": [images.load_image(record.image)],
                        "prompt": [{"role": "user", "content": [{"type": "image"}]}],
                        "completion": [{"role": "assistant", "content": [caption]}],
                    }
                )
        self.examples = Dataset.from_list(examples)
        # The trainer requires a folder, although it writes nothing here.
        self.output_folder = tempfile.TemporaryDirectory()
        settings = SFTConfig(
            output_dir=self.output_folder.name,
            per_device_train_batch_size=len(self.records),
            gradient_checkpointing=False,
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to=[],
            remove_unused_columns=False,
        )
        self.trainer = SFTTrainer(
            self.model, settings, train_dataset=self.examples, processing_class=self.processor
        )

    def train_step(self) -> dict[str, float]:
        """Compute both losses and their gradients, update the weights, and return the losses.

        Returns:
            `contrastive`, the sum of both directions as in VLDuet, and `language`, per token.
        """
        self.embedder.train()
        self.model.base_model.model.model.vision_tower.eval()
        pixels = []
        captions = []
        for record in self.records:
            captions.append(record.short[0])
            if record.image is not None:
                pixels.append(images.load_image(record.image))
        inputs = [self.embedder.preprocess(pixels), self.embedder.preprocess(captions)]
        contrastive = self.contrastive(inputs, None)
        contrastive.backward()
        batch = self.trainer.data_collator([self.examples[i] for i in range(len(self.examples))])
        language = self.trainer.compute_loss(self.trainer.model, batch)
        language.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # sentence-transformers averages the two directions; VLDuet adds them.
        return {
            "contrastive": 2 * float(contrastive.detach()),
            "language": float(language.detach()),
        }
