"""HeteroLoraCallback: a rank search under the Trainer of transformers.

The logic is the model's and :class:`~heterolora_kernels.search.RankSearch`'s. What is here: when the Trainer starts, steps, logs
and resumes, and what its checkpoints hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_pt_utils import LabelSmoother

from heterolora_kernels.files import decode, encode
from heterolora_kernels.patching import count_parameters
from heterolora_kernels.save_and_load import write_native
from heterolora_kernels.scoring import LossFunction, Metric, default_loss, inputs_of, loss_in
from heterolora_kernels.search import RankSearch
from heterolora_kernels.state import ADAPTER_NAMES, HeteroLoraState, inside_wrappers, is_patched, state_of, unwrap

#: What the Trainer looks for in a checkpoint.
_WEIGHTS_NAME = "model.safetensors"
_SIDE = "_heterolora_trainer"


class HeteroLoraCallback(TrainerCallback, ExportableState):
    """Chooses the ranks of a patched model while the Trainer trains it.

    ``Trainer(model=apply_heterolora(model, config), callbacks=[HeteroLoraCallback()], ...)`` does what a plain loop does that
    calls ``search.start()`` before training and ``search.step()`` after every optimizer step, bit for bit. The search's state
    is in the Trainer's checkpoints, and a resumed run chooses as the unbroken one would.

    Active parameters, paths that are on, reallocations, churn and threshold join the Trainer's training logs as
    ``heterolora/...``. The Trainer calls its reporting callbacks (TensorBoard, W&B, ...) before those of users: for them to see
    these numbers, call ``callback.attach(trainer)``.

    With ``load_best_model_at_end`` the search is at the end what it was at the best checkpoint, ranks and history, as the
    weights are.

    Args:
        loss_fn, metric, eval_batches, greater_is_better, tolerance: as in :class:`~heterolora_kernels.search.RankSearch`. For
            ``score="probe"`` the default is the model's own loss, with the Trainer's label smoothing. A Trainer with another
            one (``compute_loss_func``, a ``compute_loss`` of its own) is not known here: pass the loss, or call
            :meth:`attach`; one that keeps the labels from the model is refused at the first step otherwise. Where batches are
            no inputs of the model (DPO, GRPO), use ``score="in_step"``.
        dataloader: batches for ``score="probe"``; default: the head of the Trainer's training set, unshuffled, in its batches.
        adapter_only: checkpoints, ``trainer.save_model()`` and ``model.save_pretrained()`` write the adapter in the native
            format, which :func:`~heterolora_kernels.load_adapter` reads too, and not the base. False leaves the Trainer alone.
            Under FSDP and DeepSpeed, which write checkpoints of their own kind, it is without effect.
        at_last_step: whether a reallocation that is due at the last step of the run is made, as a plain loop would. What it
            switches on is not trained together any more: False keeps the ranks that were.

    Attributes:
        search: the :class:`~heterolora_kernels.search.RankSearch`; None before training.

    Raises:
        ValueError: when the Trainer is built, of a model that is not patched, and of what TRL would do wrong with one; when
            training begins, of a checkpoint without the state of a search.
    """

    def __init__(self, loss_fn: LossFunction | None = None, metric: Metric | str | None = None,
                 eval_batches: Iterable | None = None, greater_is_better: bool | None = None, tolerance: float = 0.01,
                 dataloader: Iterable | None = None, adapter_only: bool = True, at_last_step: bool = True):
        self.search: RankSearch | None = None
        self.adapter_only = adapter_only
        self.at_last_step = at_last_step
        self._measures = {"loss_fn": loss_fn, "metric": metric, "eval_batches": eval_batches,
                          "greater_is_better": greater_is_better, "tolerance": tolerance}
        self._dataloader = dataloader
        self._trainer: Trainer | None = None
        self._first_forward: RemovableHandle | None = None
        self._is_restored = False

    def attach(self, trainer: Trainer) -> HeteroLoraCallback:
        """Become the first callback of a Trainer, before those that report logs; returns the callback.

        A probe then uses the Trainer's own ``compute_loss`` where it is not the model's loss. What that notes down about a
        batch, it also notes down about those of a probe.
        """
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self._enter(trainer.model, trainer.args)
        return self

    def state(self) -> dict:
        """What the Trainer writes into ``trainer_state.json``."""
        # One string: the Trainer sorts keys and gives every number a line of its own.
        search = None if self.search is None else json.dumps(encode(self.search.state_dict()))
        return {"args": {}, "attributes": {"_is_restored": True}, "search": search}

    # ---- events ----

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs) -> None:
        self._enter(model, args)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, optimizer=None,
                       train_dataloader=None, **kwargs) -> None:
        if self._is_restored:
            self._become_original(model)
        self._enter(model, args)
        data = train_dataloader if self._dataloader is None else self._dataloader
        self.search = RankSearch(model, optimizer, data, _steps_per_epoch(train_dataloader, args, state),
                                 **{**self._measures, "loss_fn": self._measures["loss_fn"] or self._trainers_loss(args)})
        # A run of one step may end without a step of the search (at_last_step=False): nobody has forgotten anything.
        state_of(model).step_hooks.driven = True
        if state.global_step > 0:
            self.search.load_state_dict(self._state_in(state))
        else:
            self.search.start()
        if self.search._measures.loss_fn is default_loss and self.search.runs_losses and not args.torch_compile:
            self._first_forward = _refuse_other_losses(inside_wrappers(model))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.at_last_step or state.global_step < state.max_steps:
            self.search.step()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._first_forward is not None:
            # A run that was at its end already had none.
            self._first_forward.remove()
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        file = Path(state.best_model_checkpoint, TRAINER_STATE_NAME)
        best = self._state_in(TrainerState.load_from_json(str(file))) if file.is_file() else None
        # The Trainer goes on, with a warning, where it finds no weights.
        if best is not None and best["masks"] == self.search.state_dict()["masks"]:
            self.search.load_state_dict(best)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs) -> None:
        # The logs of an evaluation and of the whole run stay what they are.
        if self.search is None or not logs or "loss" not in logs:
            return
        scalars = self._scalars()
        logs.update(scalars)
        # The Trainer entered a copy of the logs before it called.
        if state.log_history:
            state.log_history[-1].update(scalars)

    # ---- inside ----

    def _enter(self, model: nn.Module, args: TrainingArguments) -> None:
        """Check the model and put the overrides in place; a second call finds them there."""
        try:
            patched, state = unwrap(model), state_of(model)
        except ValueError as error:
            raise ValueError(f"{error}; do so before building the Trainer") from error
        state.check_structure(alone=True)
        if args.deepspeed and state.config.search != "off":
            raise ValueError("search: under DeepSpeed parameters are stepped in flat partitions (ZeRO) or copies, in which "
                             "what has rank 0 cannot be frozen: set search='off', or launch with DistributedDataParallel or "
                             "FSDP2")
        if args.n_gpu > 1:
            raise ValueError(f"the Trainer would use nn.DataParallel on {args.n_gpu} GPUs, which shares what a forward captures "
                             "among threads: launch with torchrun or accelerate, or show it one GPU (CUDA_VISIBLE_DEVICES=0)")
        _check_trl(patched, state, args)
        if getattr(args, "disable_dropout", False):
            # TRL turns off nn.Dropout alone.
            for linear in state.linears:
                linear._heterolora.dropout_p = 0.0
        side = _TrainerSide(patched, self)
        overrides: dict[str, object] = {_SIDE: side}
        # A checkpoint of a model of which a part is patched holds all of it.
        if self.adapter_only and is_patched(model) and hasattr(type(patched),
                                                               "save_pretrained") and not args.fsdp and not args.deepspeed:
            overrides.update(save_pretrained=side.save_pretrained, load_state_dict=side.load_state_dict)
        patched.__dict__.update(overrides)
        state.overrides.extend(name for name in overrides if name not in state.overrides)

    def _trainers_loss(self, args: TrainingArguments) -> LossFunction | None:
        """The loss of training; None where it is the model's own."""
        trainer = self._trainer
        if trainer is not None and (trainer.compute_loss_func is not None or trainer.label_smoother is not None
                                    or type(trainer).compute_loss is not Trainer.compute_loss):
            return lambda model, batch: trainer.compute_loss(model, inputs_of(model, batch))
        return _smoothed_loss(LabelSmoother(args.label_smoothing_factor)) if args.label_smoothing_factor else None

    def _become_original(self, model: nn.Module) -> None:
        """``restore_callback_states_from_checkpoint`` puts a new object in the place of the user's: the two become one."""
        side = unwrap(model).__dict__.get(_SIDE)
        if side is None or side.callback is None:
            raise ValueError("restore_callback_states_from_checkpoint needs a HeteroLoraCallback in Trainer(callbacks=[...]), or "
                             "an attached one; the search is resumed without it too")
        self.__dict__ = side.callback.__dict__

    def _state_in(self, state: TrainerState) -> dict:
        """The search's state that a checkpoint holds."""
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        saved = saved[-1] if isinstance(saved, list) else saved
        if not isinstance(saved, Mapping) or not isinstance(saved.get("search"), str):
            raise ValueError(f"resume_from_checkpoint: trainer_state.json has no state of a search under {name!r}: the "
                             "checkpoint was written without this callback")
        where = f"trainer_state.json: the search of {name}"
        try:
            content = json.loads(saved["search"])
        except ValueError as error:
            raise ValueError(f"{where} is no valid JSON: {error}") from error
        return decode(content, where)

    def _scalars(self) -> dict[str, float]:
        search = self.search
        values = {"active_parameters": count_parameters(search._model)["active"], "reallocations": len(search.history),
                  "paths_on": sum(rank > 0 for rank in search.ranks.values())}
        if search.history:
            values.update({name: search.history[-1][name] for name in ("churn", "threshold")})
        # A warm-up has no threshold.
        return {f"heterolora/{name}": value for name, value in values.items() if value is not None}


class _TrainerSide:
    """What a model has in its ``__dict__`` under the Trainer: two methods in the places of its own.

    Copies of the model, pickled ones too, have them for themselves, without the callback.
    """

    def __init__(self, model: nn.Module, callback: HeteroLoraCallback):
        self._model = model
        self.callback: HeteroLoraCallback | None = callback

    def __getstate__(self) -> dict:
        return {"_model": self._model}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, callback=None)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, state_dict: Mapping | None = None,
                        **kwargs) -> None:
        """Write the adapter in the native format, its weights as ``model.safetensors``, into a folder; other files stay.

        No ``config.json`` is written: with one, ``from_pretrained`` would take the folder for a whole model and draw the base's
        weights at random.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: the folder holds an adapter; push it with trainer.push_to_hub(), or upload it")
        if state_dict is not None and not any(name.rpartition(".")[2] in ADAPTER_NAMES for name in state_dict):
            # Somebody saves other weights than the patched model's, merged ones say.
            type(self._model).save_pretrained(self._model, save_directory, is_main_process=is_main_process,
                                              state_dict=state_dict, **kwargs)
            return
        if not is_main_process:
            return
        search = None if self.callback is None else self.callback.search
        # Not the folder as a whole: it may be the working directory, or hold all checkpoints.
        write_native(self._model, save_directory, search=search, weights_name=_WEIGHTS_NAME, keep_folder=True)

    def load_state_dict(self, state_dict: Mapping, *args, **kwargs):
        """The model's own; weights of the base that an adapter leaves out are not reported as missing."""
        result = type(self._model).load_state_dict(self._model, state_dict, *args, **kwargs)
        if all(self._is_own(name) for name in state_dict):
            # The Trainer would list every weight of the base in a warning.
            result.missing_keys[:] = [name for name in result.missing_keys if self._is_own(name)]
        return result

    def _is_own(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return leaf in ADAPTER_NAMES or state_of(self._model).heads.holds(owner)


def _check_trl(model: nn.Module, state: HeteroLoraState, args: TrainingArguments) -> None:
    """Refuse what TRL would do wrong without a word."""
    if getattr(args, "sync_ref_model", False):
        raise ValueError("sync_ref_model=True: TRL copies parameters by position into a reference model, which has none of these "
                         "adapters, or other ranks; set it to False")
    if getattr(args, "use_vllm", False):
        raise ValueError("use_vllm=True: TRL would send vLLM the base's weights without the adapters, and tensors called "
                         "lora_A that it does not know; generate with the model itself (use_vllm=False), or train an adapter "
                         "of PEFT on the fused op (accelerate_peft), which TRL merges before it sends it")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if any(cls.__module__.startswith("trl.") for cls in type(args).__mro__) and any(head is linear for linear in state.linears):
        raise ValueError("target_modules: TRL multiplies by the weight of the output embeddings itself and would never train "
                         "their adapter; leave them out ('lm_head')")


def _refuse_other_losses(model: nn.Module) -> RemovableHandle:
    """Raise in the first forward of training if it gives no loss: then the Trainer computes one that no probe uses."""
    def hook(module: nn.Module, args: tuple, outputs) -> None:
        if module.training:
            handle.remove()
            if loss_in(outputs) is None:
                raise ValueError("loss_fn: the Trainer computes another loss than the model's own (compute_loss_func, or a "
                                 "compute_loss of its own), which score='probe' would not use: pass it to HeteroLoraCallback, "
                                 "call callback.attach(trainer), or use score='in_step'")
    handle = model.register_forward_hook(hook)
    return handle


def _smoothed_loss(smoother: LabelSmoother) -> LossFunction:
    """What the Trainer makes of ``label_smoothing_factor``."""
    def loss(model: nn.Module, batch) -> torch.Tensor:
        inputs = inputs_of(model, batch)
        if "labels" not in inputs:
            return default_loss(model, inputs)
        labels = inputs.pop("labels")
        is_shifted = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return smoother(model(**inputs), labels, shift_labels=is_shifted)
    return loss


def _steps_per_epoch(dataloader: Iterable, args: TrainingArguments, state: TrainerState) -> int:
    """Optimizer steps of an epoch, as the Trainer counts them."""
    try:
        batches = len(dataloader)
    except TypeError:
        # A stream: to the Trainer all its steps are one epoch.
        return state.max_steps
    return max(-(-batches // args.gradient_accumulation_steps), 1)
