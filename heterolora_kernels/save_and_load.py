"""Adapters on disk: everything in the own format, or what other libraries read, as a PEFT adapter or merged into the weights.

The own format is a folder with ``heterolora.json`` and a safetensors file: every path, inactive ones too, the heads, the config,
what the base was, and the state of a search. Folders are replaced as a whole (:mod:`heterolora_kernels.files`), and nothing is
loaded before everything about it has been checked.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from heterolora_kernels import beside, distributed, files, fingerprint, folders, peft_format
from heterolora_kernels._version import __version__
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.fingerprint import base_weights, sample
from heterolora_kernels.layers import Path
from heterolora_kernels.merging import check_mergeable, merged_weight
from heterolora_kernels.native_format import FORMAT, VERSION, Saved, read_native, read_record, search_of
from heterolora_kernels.patching import apply_heterolora, plan_paths
from heterolora_kernels.peft_format import PeftAdapter, heads_to_save, open_paths, own_tensors
from heterolora_kernels.peft_names import check_names_stay, check_not_of_experts
from heterolora_kernels.planning import PlannedPath
from heterolora_kernels.saved_files import NATIVE_NAME, replaced_by
from heterolora_kernels.search import RankSearch
from heterolora_kernels.shortcut_effect import effect_of_shortcuts
from heterolora_kernels.state import ADAPTER_NAMES, HeteroLoraState, is_patched, state_of, unwrap, whole
from heterolora_kernels.undo import keeps_modes, structure_of, undone_on_failure, values_of

#: Writes the files of one save into a folder.
Writer = Callable[[FilePath], None]


@keeps_modes
def save_adapter(model: nn.Module, directory: str | os.PathLike, format: str = "native", *, search: RankSearch | None = None,
                 drop_shortcuts: bool = False, drop_heads: bool = False, batches: Iterable[Mapping] | None = None) -> None:
    """Write the adapters of a patched model into a folder, which is replaced as a whole; other files in it stay.

    Of a distributed job only the first process writes; where the model is sharded (FSDP2) every process must call.

    Args:
        model: a patched model, wrapped or not; unchanged.
        directory: the folder; made if it does not exist.
        format: ``"native"`` (everything, for :func:`load_adapter`), ``"peft"`` (active rows as a LoRA adapter of mixed ranks),
            ``"vllm"`` (the same at one rank, filled up with zeros) or ``"merged"`` (the whole model, W + s B A).
        search: whose state is saved along (native).
        drop_shortcuts: leave active shortcuts out, which only the native format can hold; what this does to the outputs is
            measured and said by a warning.
        drop_heads: leave out the heads of ``modules_to_save`` (peft, vllm): the base's own are used then.
        batches: what to measure on: dictionaries for ``model(**batch)``, with or without labels; default: a few random token
            ids, where the model takes any.

    Raises:
        ValueError: names the argument, or the path or head that cannot be saved. Nothing is written then.
    """
    model = whole(model)
    state = state_of(model)
    state.check_structure()
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {list(_FORMATS)}, got {format!r}")
    if search is not None and format != "native":
        raise ValueError(f"search: format {format!r} has no place for its state; use 'native'")
    if drop_heads and format not in ("peft", "vllm"):
        raise ValueError(f"drop_heads: format {format!r} holds the heads")
    if drop_shortcuts and format == "native":
        raise ValueError("drop_shortcuts: format 'native' holds the shortcuts")
    shortcuts = [path.name for path in state.paths.values() if path.site is not None and any(path.active_rows())]
    if shortcuts and format != "native" and not drop_shortcuts:
        raise ValueError(f"format {format!r} cannot hold the {len(shortcuts)} active shortcuts ({shortcuts[0]}, ...): a shortcut "
                         "reads another tensor than the linear whose output it joins; use format='native', or "
                         "drop_shortcuts=True to leave them out")
    if not open_paths(state.paths.values()) and (format != "native" or not shortcuts):
        raise ValueError(f"no {'LoRA ' if shortcuts else ''}path is active: there is no adapter to save")
    if not distributed.is_first() and distributed.wrapper_of(model) is None:
        return
    # Before anything is computed, and again when everything is written.
    replaced_by(format, FilePath(directory))
    state.step_hooks.warn_if_undriven(state.config.search)
    state.reshard()
    write = _FORMATS[format](model, state, search=search, drop_heads=drop_heads)
    if shortcuts and format != "native":
        warnings.warn(f"left out {len(shortcuts)} shortcuts: {effect_of_shortcuts(model, state, batches)}", stacklevel=3)
    if not distributed.is_first():
        return
    with folders.replaced_folder(directory, lambda folder: replaced_by(format, folder)) as folder:
        write(folder)


@keeps_modes
def write_native(model: nn.Module, directory: str | os.PathLike, *, search: RankSearch | None = None,
                 weights_name: str = "adapter.safetensors", keep_folder: bool = False) -> None:
    """Write the native format, whatever is active, from every process that calls.

    Args:
        weights_name: of the file of tensors.
        keep_folder: write into the folder instead of replacing it as a whole.
    """
    state_of(model).check_structure()
    write = _native(unwrap(model), state_of(model), search=search, weights_name=weights_name)
    with (folders.updated_folder if keep_folder else folders.replaced_folder)(directory) as folder:
        write(folder)


def peft_config(model: nn.Module) -> dict:
    """PEFT's ``adapter_config.json`` of the present allocation, as ``LoraConfig.from_pretrained`` reads it.

    Ranks are the numbers of active rows, scalings what they are here. Shortcuts have no place in it.

    Raises:
        ValueError: no LoRA path is active.
    """
    model = whole(model)
    state = state_of(model)
    state.check_structure()
    paths = open_paths(state.paths.values())
    if not paths:
        raise ValueError("no LoRA path is active: there is nothing to describe")
    return peft_format.describe(model, paths, state.config.lora_dropout, heads_to_save(model, state, paths))


def _native(model: nn.Module, state: HeteroLoraState, *, search: RankSearch | None = None,
            weights_name: str = "adapter.safetensors", drop_heads: bool = False) -> Writer:
    if search is not None:
        _check_search(state, search)
    heads = {name: distributed.full(value) for name, value in _head_tensors(model, state).items()}
    tensors = {f"{path.name}.{leaf}": distributed.full(getattr(path.holder, leaf))
               for path in state.paths.values() for leaf in ADAPTER_NAMES}
    others = {name: distributed.full(value) for name, value in state.beside.tensors(model, state.is_own).items()}
    content = {
        "format": FORMAT, "format_version": VERSION, "package_version": __version__,
        "config": {**state.config.to_dict(), "init_from": None, "modules_to_save": _entries(state)},
        "base": {"class": type(model).__name__, "name_or_path": peft_format.name_of(model),
                 "labels": peft_format.class_names(model),
                 "pad_token_id": getattr(getattr(model, "config", None), "pad_token_id", None),
                 "weights": {name: sample(weight) for name, weight in base_weights(model, state).items()}},
        "paths": {name: {"kind": path.kind, **_properties(path), "rank": sum(path.active_rows()),
                         "active": "".join("01"[on] for on in path.active_rows())} for name, path in state.paths.items()},
        "heads": _described(heads), "others": _described(others), "tied": state.heads.other_ends(model),
        "search": None if search is None else files.encode(search.state_dict()),
    }

    def write(folder: FilePath) -> None:
        files.write_tensors(folder / weights_name, {**tensors, **heads, **others})
        weights = {"file": weights_name, "sha256": files.sha256_of(folder / weights_name)}
        files.write_json(folder / NATIVE_NAME, {**content, "weights": weights})
    return write


def _entries(state: HeteroLoraState) -> list[str] | None:
    """``modules_to_save`` that select these heads in any copy of the base, whether its checkpoint can be found or not."""
    given = state.config.modules_to_save
    is_known = given is None and all(entry in state.config.heads for entry in state.heads.entries)
    return None if is_known else list(state.heads.entries if given is None else given)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    return {name: {"dtype": _name_of(value.dtype), "shape": list(value.shape)} for name, value in tensors.items()}


def _check_search(state: HeteroLoraState, search: RankSearch) -> None:
    if not isinstance(search, RankSearch):
        raise TypeError(f"search must be a RankSearch, got {type(search).__name__}")
    if search._state is not state:
        raise ValueError("search belongs to another model, or to this one before it was patched anew")


def _head_tensors(model: nn.Module, state: HeteroLoraState) -> dict[str, Tensor]:
    return {name: value for name, value in own_tensors(model).items() if state.heads.has(name)}


def _properties(path: Path) -> dict:
    """What a saved path and the model's path of that name must have in common."""
    return {"site": path.site, "r": path.r, "scaling": path.scaling, "in_features": distributed.shape_of(path.lora_A)[1],
            "out_features": distributed.shape_of(path.lora_B)[0]}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _peft(model: nn.Module, state: HeteroLoraState, *, drop_heads: bool, **_) -> Writer:
    paths = open_paths(state.paths.values())
    check_not_of_experts(model, [path.name for path in paths])
    check_names_stay(model, [path.name for path in paths])
    heads = [] if drop_heads else heads_to_save(model, state, paths)
    return _peft_writer(peft_format.describe(model, paths, state.config.lora_dropout, heads),
                        peft_format.peft_tensors(model, paths, heads))


def _vllm(model: nn.Module, state: HeteroLoraState, *, drop_heads: bool, **_) -> Writer:
    heads = [*_head_tensors(model, state), *state.beside.tensors(model, state.is_own)]
    if heads and not drop_heads:
        raise ValueError(f"format 'vllm' cannot hold what was trained beside adapters ({heads[0]}, ...): vLLM refuses "
                         "adapters with modules_to_save; use format='merged', or drop_heads=True for the base's own")
    paths = open_paths(state.paths.values())
    return _peft_writer(*peft_format.as_uniform(peft_format.describe(model, paths, state.config.lora_dropout, ()),
                                                peft_format.peft_tensors(model, paths, ()), paths))


def _peft_writer(config: dict, tensors: Mapping[str, Tensor]) -> Writer:
    def write(folder: FilePath) -> None:
        files.write_tensors(folder / peft_format.WEIGHTS_NAME, tensors)
        files.write_json(folder / peft_format.CONFIG_NAME, config)
    return write


def _merged(model: nn.Module, state: HeteroLoraState, **_) -> Writer:
    merged = {f"{path.name}.weight": merged_weight(path) for path in check_mergeable(model, drop_shortcuts=True)}
    weights = {name: merged[name] if name in merged else distributed.full(value) for name, value in own_tensors(model).items()}

    def write(folder: FilePath) -> None:
        save = getattr(model, "save_pretrained", None)
        if save is None or "state_dict" not in inspect.signature(save).parameters:
            files.write_tensors(folder / "model.safetensors", weights)
            return
        # transformers notes dtype and class in the config on its way.
        config = dict(model.config.__dict__)
        try:
            save(folder, state_dict=weights)
        finally:
            model.config.__dict__.clear()
            model.config.__dict__.update(config)
    return write


#: ``{format: function of a model and its state that checks, and returns what writes}``.
_FORMATS: dict[str, Callable[..., Writer]] = {"native": _native, "peft": _peft, "vllm": _vllm, "merged": _merged}


@keeps_modes
def load_adapter(model: nn.Module, directory: str | os.PathLike, *, search: RankSearch | None = None,
                 check_base: bool = True) -> nn.Module:
    """Load what :func:`save_adapter` wrote, or a LoRA adapter of PEFT.

    A model that is not patched is patched first: with the saved config, or with the PEFT adapter's modules, ranks, scalings,
    heads and dropout, and ``search="off"``. The paths of a patched one must be those of the folder; they are overwritten.

    Args:
        model: the base model, or a patched one.
        directory: a folder with ``heterolora.json``, or else with ``adapter_config.json``.
        search: goes on where the saved one was; needs a patched model.
        check_base: hold the base's weights to be those that the adapter was saved with (native).

    Returns:
        The model.

    Raises:
        FileNotFoundError, ValueError: name the file and the field, or what does not fit. The model is then as it was.
    """
    patched = is_patched(model)
    if search is not None and not patched:
        raise ValueError("search belongs to another model, for this one is not patched: load first, then build it")
    if patched:
        state_of(model).check_structure()
        if distributed.wrapper_of(model) == "ZeRO-3":
            raise ValueError("model is sharded by DeepSpeed ZeRO-3: load the adapter before deepspeed.initialize, or resume "
                             "from a checkpoint of DeepSpeed")
    if search is not None:
        _check_search(state_of(model), search)
    # Loading into shards is a collective: all processes have read the files, or none begins.
    together = patched and distributed.wrapper_of(model) is not None
    saved = _read(directory, model if patched else None) if not together else distributed.on_every_process(
        lambda: _read(directory, model), state_of(model).device, "the adapter was not read on another process; none was loaded")
    if isinstance(saved, PeftAdapter):
        return apply_heterolora(model, HeteroLoraConfig(
            r=saved.config["r"], lora_alpha=saved.config["lora_alpha"], use_rslora=saved.is_rslora, lora_dropout=saved.dropout,
            modules_to_save=(), search="off", init_from=folders.find_folder(directory)))
    if search is not None and saved.search is None:
        raise ValueError(f"search: {saved.file} holds no state of a search")
    if patched:
        _load(model, saved, search, check_base)
        return model
    with undone_on_failure(structure_of(model)):
        try:
            # Sizes are compared before any memory is taken for them.
            _check_planned(plan_paths(model, saved.config), saved)
            apply_heterolora(model, saved.config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{saved.file}: field 'config' does not fit the model: {error}") from error
        with undone_on_failure(state_of(model).step_hooks.remove):
            _load(model, saved, None, check_base)
            # What was trained beside the adapters is trained on.
            for name in state_of(model).beside.trained:
                model.get_parameter(name).requires_grad_(True)
            return model


def _read(directory: str | os.PathLike, model: nn.Module | None) -> Saved | PeftAdapter:
    """What a folder holds; a PEFT adapter in the native format's terms where there is a patched ``model``."""
    def read(folder: FilePath) -> Saved | PeftAdapter:
        if (folder / NATIVE_NAME).exists():
            return read_native(folder)
        if not (folder / peft_format.CONFIG_NAME).exists():
            raise FileNotFoundError(f"directory: {folder} has neither {NATIVE_NAME} nor {peft_format.CONFIG_NAME}")
        return peft_format.read_peft_files(folder)

    found = folders.settled(directory, read)
    return found if model is None or isinstance(found, Saved) else _from_peft(found, unwrap(model))


def load_search_state(directory: str | os.PathLike) -> dict:
    """The state of the search that :func:`save_adapter` was given.

    Args:
        directory: a folder in the native format.

    Returns:
        What :meth:`RankSearch.load_state_dict <heterolora_kernels.RankSearch.load_state_dict>` takes.

    Raises:
        FileNotFoundError, ValueError: name the file and the field.
    """
    file = folders.find_folder(directory) / NATIVE_NAME
    state = search_of(read_record(file), file)
    if state is None:
        raise ValueError(f"{file}: field 'search' is null: the adapter was saved without a search")
    return state


def _from_peft(adapter: PeftAdapter, model: nn.Module) -> Saved:
    adapter = adapter.named_as(model)
    adapter.check_others(model)
    adapter.check_ties(model)
    paths, tensors = {}, dict(adapter.heads)
    for name, module in adapter.modules.items():
        paths[name] = {"site": None, "r": module.r, "scaling": module.scaling, "in_features": module.lora_A.shape[1],
                       "out_features": module.lora_B.shape[0]}
        rows = torch.ones(module.r, dtype=torch.bool, device="cpu")
        tensors.update(zip((f"{name}.{leaf}" for leaf in ADAPTER_NAMES), (module.lora_A, module.lora_B, rows)))
    return Saved(adapter.weights, paths, tensors, set(adapter.heads))


def _misfits(state: HeteroLoraState, saved: Saved, own: Mapping[str, Tensor]) -> list[str]:
    """How the model's paths and heads differ from the saved ones, one line each."""
    found = [f"path {name!r} is {'only in the model' if name in state.paths else 'not in the model'}"
             for name in sorted(state.paths.keys() ^ saved.paths.keys())]
    for name in sorted(state.paths.keys() & saved.paths.keys()):
        for key, value in _properties(state.paths[name]).items():
            other = saved.paths[name][key]
            # PEFT's alpha is the scaling times the rank: one rounding more.
            if other != value and not (key == "scaling" and math.isclose(other, value, rel_tol=1e-12)):
                found.append(f"{key} of path {name!r} is {value} in the model and {other} in the file")
    found += [f"head {name!r} is {'only in the model' if name in own else 'not in the model'}"
              for name in sorted(own.keys() ^ saved.heads)]
    return found + [
        f"head {name!r} has shape {list(own[name].shape)} in the model and {list(saved.tensors[name].shape)} in the file"
        for name in sorted(own.keys() & saved.heads) if own[name].shape != saved.tensors[name].shape]


def _check_planned(planned: Mapping[str, PlannedPath], saved: Saved) -> None:
    """Hold the paths that a config means to be those that the file has tensors of."""
    points = [f"path {name!r} is {'only in the model' if name in planned else 'not in the model'}"
              for name in sorted(planned.keys() ^ saved.paths.keys())]
    points += [f"{key} of path {name!r} is {getattr(planned[name], key)} in the model and {saved.paths[name][key]} in the file"
               for name in sorted(planned.keys() & saved.paths.keys()) for key in ("r", "in_features", "out_features")
               if getattr(planned[name], key) != saved.paths[name][key]]
    if points:
        raise ValueError(f"it differs in {len(points)} points: {'; '.join(points[:3])}{'; ...' if len(points) > 3 else ''}")


def _check_ties(model: nn.Module, state: HeteroLoraState, saved: Saved) -> None:
    """Hold the heads to be tied to the modules that they were tied to, which the file does not hold a second time."""
    ties = state.heads.other_ends(model)
    if saved.tied is None or ties == saved.tied:
        return
    name = sorted(set(ties.items()) ^ set(saved.tied.items()))[0][0]
    raise ValueError(f"{saved.file}: field 'tied': {name!r} is {'' if name in saved.tied else 'not '}one parameter with "
                     f"{saved.tied.get(name) or ties[name]!r} in the file, and {'not ' if name in saved.tied else ''}in this "
                     "model (tie_word_embeddings)")


def _load(model: nn.Module, saved: Saved, search: RankSearch | None, check_base: bool) -> None:
    """Check everything, then write into a patched model; as before if anything fails."""
    state, model = state_of(model), unwrap(model)
    state.reshard()
    targets = _head_tensors(model, state)
    misfits = _misfits(state, saved, targets)
    if misfits:
        raise ValueError(f"{saved.file} does not fit the model in {len(misfits)} points: {'; '.join(misfits[:3])}"
                         f"{'; ...' if len(misfits) > 3 else ''}")
    others = beside.check_fits(saved.others, model, state.is_own, saved.file)
    _check_ties(model, state, saved)
    if check_base and saved.base is not None:
        fingerprint.check_base(model, state, saved.base, saved.others, saved.file)
    left = sorted(state.beside.tensors(model, state.is_own).keys() - saved.others.keys())
    if left and saved.config is not None:
        warnings.warn(f"{saved.file} does not hold what this model trained beside its adapters ({left[0]}, {len(left)} in "
                      "all): it stays as it is", stacklevel=4)
    targets.update(others)
    for name, path in state.paths.items():
        targets.update((f"{name}.{leaf}", getattr(path.holder, leaf)) for leaf in ADAPTER_NAMES)
    with ExitStack() as stack:
        if search is not None:
            stack.enter_context(undone_on_failure(search.undo_point()))
        stack.enter_context(undone_on_failure(state.write_masks))
        stack.enter_context(undone_on_failure(values_of(targets.values())))
        with torch.no_grad():
            for name, target in targets.items():
                distributed.copy_(target, saved.tensors[name])
        state.write_masks()
        if search is not None:
            _resume(search, saved)
        parameters = {name for name, _ in model.named_parameters()}
        state.beside.trained |= saved.others.keys() & parameters


def _resume(search: RankSearch, saved: Saved) -> None:
    try:
        search.load_state_dict(saved.search)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{saved.file}: field 'search': {error}") from error
