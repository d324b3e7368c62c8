"""The peer that is made of two libraries: a contrastive step by sentence-transformers, and one of fine-tuning by TRL.

    SentenceTransformer([Transformer(folder), Pooling(width, "lasttoken"), Dense])
    CachedMultipleNegativesRankingLoss(model, scale=1 / temperature, mini_batch_size=N, partition_mode="per_direction",
                                       directions=("query_to_doc", "doc_to_query"))
    SFTTrainer(PeftModel, SFTConfig(per_device_train_batch_size=B, gradient_checkpointing=False, max_length=None),
               train_dataset=[{"images", "prompt", "completion"}], processing_class=AutoProcessor)

The temperature is fixed and an image is read from its last token, for the loss learns none and the pooling knows no image
tokens. Both libraries work on one model: get_peft_model(AutoModelForImageTextToText, LoraConfig) is what TRL trains, its
inner model is what sentence-transformers embeds with, and one AdamW moves LoRA, projector and Dense after both backward
passes. The processor gets a chat template that writes our prompts and nothing else, so that all have the same tokens. Both
get the image itself in every step, as their users give it, and run the frozen tower on it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlduet.data import images
from vlduet.data.records import Record
from vlduet.model.adapters import LORA_TARGET_PATTERNS, LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts


def chat_template(prompts: Prompts, image_token: str, eos: str) -> str:
    """A template that renders an image, a text, or an image and its caption as our prompts do."""
    before, after = prompts.image.split("{image}")
    text_before, text_after = prompts.text.split("{text}")
    return (
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
        f"{{{{ {eos!r} }}}}"
        "{% else %}{% for p in m['content'] %}"
        f"{{% if p['type'] == 'image' %}}{{{{ {before + image_token + after!r} }}}}"
        f"{{% else %}}{{{{ {text_before!r} + p['text'] + {text_after!r} }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{% endfor %}"
    )


class Libraries:
    """One step of both libraries on the same records.

    Raises:
        ImportError: one of them is not installed.
    """

    def __init__(
        self, folder: Path, records: list[Record], *, lora: LoraSettings, lr: float, mini_batch: int
    ):
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )
        from sentence_transformers.sentence_transformer.modules import Dense, Pooling
        from trl import SFTConfig, SFTTrainer

        self.records = records
        self.scratch = (
            tempfile.TemporaryDirectory()
        )  # the trainer wants a folder, and writes nothing there
        mine = DuetModel.from_pretrained(
            folder, device="cpu"
        )  # for its prompts and its head's weights
        if mine.prompts.chat or mine.head.kind != "linear":
            raise SystemExit(
                "the peers are written for a model whose prompts are plain and whose head is linear"
            )
        base = AutoModelForImageTextToText.from_pretrained(folder)
        base.requires_grad_(False)
        targets = rf".*language_model\..*\.({LORA_TARGET_PATTERNS[lora.targets]})"
        model = get_peft_model(
            base, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        )
        base.model.multi_modal_projector.requires_grad_(True)
        processor = AutoProcessor.from_pretrained(folder)
        processor.chat_template = chat_template(
            mine.prompts, processor.image_token, processor.tokenizer.eos_token
        )

        embedder = Transformer(str(folder))
        embedder.model = base.model
        embedder.processor.chat_template = processor.chat_template
        linear = mine.head.layers
        dense = Dense(
            linear.in_features, linear.out_features, activation_function=torch.nn.Identity()
        )
        dense.linear.load_state_dict(linear.state_dict())
        pooling = Pooling(mine.backbone.hidden_size, "lasttoken")
        self.embedder = SentenceTransformer(modules=[embedder, pooling, dense], device="cpu")
        self.contrastive = CachedMultipleNegativesRankingLoss(
            self.embedder,
            scale=float(mine.logit_scale.detach().exp()),
            mini_batch_size=mini_batch,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        self.examples = Dataset.from_list(
            [
                {
                    "images": [images.load_image(record.image)],
                    "prompt": [{"role": "user", "content": [{"type": "image"}]}],
                    "completion": [
                        {"role": "assistant", "content": [{"type": "text", "text": record.long}]}
                    ],
                }
                for record in records
                if record.image is not None
            ]
        )
        settings = SFTConfig(
            output_dir=self.scratch.name,
            per_device_train_batch_size=len(records),
            gradient_checkpointing=False,
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to=[],
            remove_unused_columns=False,
        )
        self.tuner = SFTTrainer(
            model, settings, train_dataset=self.examples, processing_class=processor
        )
        self.model = model
        moving = [p for p in [*model.parameters(), *dense.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(moving, lr=lr, weight_decay=0.0)

    def step(self) -> dict[str, float]:
        """Embed, compare, backward; then write, backward; then move."""
        self.embedder.train()
        self.model.base_model.model.model.vision_tower.eval()
        pictures = [
            images.load_image(record.image) for record in self.records if record.image is not None
        ]
        sides = [
            self.embedder.preprocess(side)
            for side in (pictures, [r.short[0] for r in self.records])
        ]
        contrastive = self.contrastive(sides, None)
        contrastive.backward()
        inputs = self.tuner.data_collator([self.examples[i] for i in range(len(self.examples))])
        language = self.tuner.compute_loss(self.tuner.model, inputs)
        language.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Ours is the sum of both directions.
        return {
            "contrastive": 2 * float(contrastive.detach()),
            "language": float(language.detach()),
        }
