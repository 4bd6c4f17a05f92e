"""Rank allocation for LoRA: fused low-rank linears, zero-cost proxies from their statistics, ranks chosen while training.

The method is HeteroLoRA (arXiv 2406.14956), which shares a budget of trainable parameters out among LoRA modules and
LoRA-adapted shortcuts. It has nothing to do with the federated-learning method of that name.
"""

from heterolora_kernels._version import __version__
from heterolora_kernels.allocation import allocate, register_allocator
from heterolora_kernels.backends import available_backends, unavailable_backends, use_backend
from heterolora_kernels.config import HeteroLoraConfig, Site
from heterolora_kernels.functional import lora_linear
from heterolora_kernels.merging import merge_heterolora
from heterolora_kernels.patching import (
    apply_heterolora,
    collect_statistics,
    disable_adapter,
    invalidate,
    print_trainable_parameters,
    reference_model,
    remove_heterolora,
    reset_adapters,
)
from heterolora_kernels.peft_layers import accelerate_peft, restore_peft
from heterolora_kernels.proxies import available_proxies, register_proxy
from heterolora_kernels.save_and_load import load_adapter, load_search_state, save_adapter
from heterolora_kernels.search import RankSearch

__all__ = [
    "HeteroLoraConfig",
    "RankSearch",
    "Site",
    "__version__",
    "accelerate_peft",
    "allocate",
    "apply_heterolora",
    "available_backends",
    "available_proxies",
    "collect_statistics",
    "disable_adapter",
    "invalidate",
    "load_adapter",
    "load_search_state",
    "lora_linear",
    "merge_heterolora",
    "print_trainable_parameters",
    "reference_model",
    "register_allocator",
    "register_proxy",
    "remove_heterolora",
    "reset_adapters",
    "restore_peft",
    "save_adapter",
    "unavailable_backends",
    "use_backend",
]
