"""Under which task PEFT can run a model: its class for the task passes arguments by name, which the model's forward has to
take."""

from __future__ import annotations

import inspect

from torch import nn

_COMMON = ("attention_mask", "output_attentions", "output_hidden_states", "return_dict")
_TEXT = ("input_ids", "inputs_embeds")
#: ``{task: (arguments that PEFT passes and a forward has to name, arguments that it may also take as keywords, methods)}``.
_PASSED: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "CAUSAL_LM": (_TEXT, (*_COMMON, "labels"), ("prepare_inputs_for_generation",)),
    "SEQ_2_SEQ_LM": ((*_TEXT, "decoder_input_ids", "decoder_inputs_embeds"), (*_COMMON, "decoder_attention_mask", "labels"),
                     ("prepare_inputs_for_generation",)),
    "SEQ_CLS": (_TEXT, (*_COMMON, "labels"), ()),
    "TOKEN_CLS": (_TEXT, (*_COMMON, "labels"), ()),
    "QUESTION_ANS": (_TEXT, (*_COMMON, "start_positions", "end_positions"), ()),
    "FEATURE_EXTRACTION": (_TEXT, _COMMON, ()),
}
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
          "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what a transformers model is for, where PEFT's class for that task can run it.

    None otherwise: PEFT's general class hands everything on as it comes, to models of speech and vision too.

    Source: the forwards of ``peft.peft_model``, PEFT 0.21.
    """
    task = _meant(model)
    return task if task is not None and _runs_as(model, task) else None


def _meant(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return None
    if type(model).__name__.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else None
    task = next((task for suffix, task in _TASKS.items() if type(model).__name__.endswith(suffix)), None)
    return task or ("FEATURE_EXTRACTION" if getattr(model, "base_model", None) is model else None)


def _runs_as(model: nn.Module, task: str) -> bool:
    named, others, methods = _PASSED[task]
    # The class's: a trainer may have put another one into the instance.
    taken = inspect.signature(type(model).forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    if task == "CAUSAL_LM" and model.config.model_type == "mpt":
        # The one model to which PEFT passes no embeddings.
        named = ("input_ids",)
    return (getattr(model, "main_input_name", "input_ids") == "input_ids" and all(name in taken for name in named)
            and (takes_any or all(name in taken for name in others)) and all(hasattr(model, name) for name in methods))
