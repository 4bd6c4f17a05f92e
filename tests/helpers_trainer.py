"""Small models, their data, and Trainers on them."""

from __future__ import annotations

import json

import torch
from helpers_search import VOCAB, llama_batch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, default_data_collator

import heterolora_kernels as hlk

LENGTH = 5


def make_bert(dropout: float = 0.1, **config):
    """A patched classifier with dropout in base and adapters, so that the order of random draws matters."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, num_labels=3,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))
    return hlk.apply_heterolora(model, hlk.HeteroLoraConfig(
        **{"r": 4, "interval": 3, "budget": 0.5, "lora_dropout": dropout, "shortcuts": "all", **config}))


def sentences(count: int, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCAB, (LENGTH,), generator=generator),
             "labels": torch.randint(3, (1,), generator=generator)[0]} for _ in range(count)]


def texts(count: int, seed: int = 0) -> list[dict]:
    return [{name: value[0] for name, value in llama_batch(seed + i, size=1).items()} for i in range(count)]


def make_trainer(folder, model, data, callback=None, cls=Trainer, eval_data=None, callbacks=(), **arguments):
    values = {"per_device_train_batch_size": 4, "max_steps": 10, "learning_rate": 0.02, "report_to": "none", "max_grad_norm": 0.0,
              "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
              "seed": 3, "weight_decay": 0.1, **arguments}
    return cls(model=model, args=TrainingArguments(str(folder), **values), train_dataset=data, eval_dataset=eval_data,
               data_collator=default_data_collator, callbacks=[*([] if callback is None else [callback]), *callbacks])


def same_history(first: list[dict], second: list[dict]) -> bool:
    return json.dumps(first) == json.dumps(second)
