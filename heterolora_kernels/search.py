"""RankSearch: when to score, what to score with, and what becomes of it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from heterolora_kernels import alpha_test, distributed, synflow  # noqa: F401  (the two proxies register themselves)
from heterolora_kernels.allocation import averaged, by_turns, get_allocator, steadied
from heterolora_kernels.freezing import check_elementwise
from heterolora_kernels.history import describe_ranks
from heterolora_kernels.names import split_path
from heterolora_kernels.ops.ledger import NUM_COLUMNS, Collector
from heterolora_kernels.proxies import PathSize, Proxy, get_proxy, normalized, scores_of
from heterolora_kernels.reach import allocated, without
from heterolora_kernels.scoring import (
    LossFunction,
    Measures,
    Metric,
    ScoringPass,
    check_rereadable,
    default_loss,
    probe_loader,
    probe_rows,
)
from heterolora_kernels.search_state import check_search_state
from heterolora_kernels.state import inside_wrappers, state_of
from heterolora_kernels.undo import Undo, keeps_modes, undone_on_failure

#: Batches of a probe: T of the published runs (arXiv 2406.14956).
PROBE_BATCHES = 32
_WINDOW_STEPS = 8


class RankSearch:
    """Chooses the ranks of a patched model, once or again and again.

    A plain loop calls :meth:`start` before training and :meth:`step` after each ``optimizer.step()``. Building a search
    puts every path on at full rank.

    Args:
        model: a patched model, alone, in DistributedDataParallel or sharded by FSDP2 (``fully_shard``).
        optimizer: checked to hold the adapters; the search works without it.
        dataloader: batches for ``score="probe"``. A shuffling DataLoader is read through an own unshuffled twin, so that
            the head of the training set is scored.
        steps_per_epoch: optimizer steps of one epoch, for a float ``interval``.
        scaler: a GradScaler whose scale is divided out of the statistics of training steps; default: the one of an optimizer
            that accelerate prepared. Such an optimizer also tells when gradients are being accumulated: :meth:`step` may be
            called wherever its step is.
        loss_fn: ``loss_fn(model, batch) -> scalar``; default ``model(**batch).loss``.
        metric, eval_batches, greater_is_better, tolerance: what the proxy ``alpha_test`` measures, see
            :class:`heterolora_kernels.scoring.Measures`.

    Attributes:
        paths: names of all paths.
        history: one dictionary per reallocation.

    Raises:
        ValueError, TypeError: name the argument.

    Source: HeteroLoRA, arXiv 2406.14956, dynamic and static search.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, dataloader: Iterable | None = None,
                 steps_per_epoch: int | None = None, scaler=None, loss_fn: LossFunction | None = None,
                 metric: Metric | str | None = None, eval_batches: Iterable | None = None,
                 greater_is_better: bool | None = None, tolerance: float = 0.01):
        self._model = model
        self._state = state_of(model)
        if distributed.check_wrapped(model, list(self._state.paths.values())):
            distributed.reshard(model)
            # A pack would be a copy of the whole weight on every process, and the gathered weight is another one each time.
            self._state.switches.packing.mode = "off"
        self._state.check_structure(alone=True, searched=True)
        self.config = self._state.config
        self._proxy = get_proxy(self.config.proxy)
        self._per_rank = get_allocator(self.config.ranks).per_rank
        if self._proxy.own_pass and self.config.score == "in_step":
            raise ValueError(f"score='in_step' cannot be used with proxy {self.config.proxy!r}, which makes passes of its own; "
                             "use score='probe'")
        if optimizer is not None:
            if not hasattr(optimizer, "param_groups"):
                raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not any(id(path.lora_A) in held for path in self._state.paths.values()):
                raise ValueError("optimizer holds none of the model's adapters: build it from the parameters that require grad "
                                 "after apply_heterolora")
            if self._per_rank and self.config.search != "off":
                check_elementwise(optimizer, f"ranks={self.config.ranks!r}")
        if steps_per_epoch is not None and (not isinstance(steps_per_epoch, int) or steps_per_epoch < 1):
            raise ValueError(f"steps_per_epoch must be an int >= 1, got {steps_per_epoch!r}")
        if dataloader is not None:
            check_rereadable("dataloader", dataloader)
        self._measures = Measures(default_loss if loss_fn is None else loss_fn, metric, greater_is_better, tolerance,
                                  eval_batches)
        self._dataloader = dataloader
        self._steps_per_epoch = steps_per_epoch
        self._scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        self._accumulation = getattr(optimizer, "gradient_state", None)
        self.paths: list[str] = list(self._state.paths)
        self.history: list[dict] = []
        self._generator = torch.Generator().manual_seed(self.config.seed)
        # Of a path, or of each of its rows where rows are ranked.
        self._times_on = {name: [0] * (self._state.paths[name].r if self._per_rank else 1) for name in self._eligible()}
        self._average: dict[str, float | list[float]] = {}
        self._unreached: set[str] = set()
        self._covered = self._started = False
        self._steps = self._last = self._reallocations = 0
        self._window: Collector | None = None
        self._forget_window: weakref.finalize | None = None
        self._warned: set[str] = set()
        self.apply({path.name: path.r for path in self._state.paths.values()})
        self._state.step_hooks.observers.add(self)

    # ---- what a loop calls ----

    @property
    def ranks(self) -> dict[str, int]:
        """``{path: active rows}``."""
        return {name: sum(rows) for name, rows in self._state.rows().items()}

    @property
    def runs_losses(self) -> bool:
        """Whether reallocations differentiate ``loss_fn`` on batches of the dataloader."""
        return (self.config.search != "off" and self._score_of(self._proxy) == "probe" and self._proxy.needs_data
                and not self._proxy.own_pass)

    @keeps_modes
    def start(self) -> None:
        """Make the first allocation; a second call does nothing.

        static: score by a probe and allocate. dynamic: the first warm-up allocation; without warm-up a scored one, or
        nothing where the scores come from training steps.
        """
        if self._started:
            return
        if self.config.search == "dynamic":  # Complain now, not at the first due step.
            self._interval_steps()
        if self.config.search != "off" and self._score_of(self._proxy) == "probe" and self._proxy.needs_data:
            self._probe_loader()
        with undone_on_failure(self.undo_point()):
            if self.config.search != "off" and (self._warming() or self._score_of(self._proxy) == "probe"):
                self._reallocate()
            self._started = True
            # A static search is done; a dynamic one is driven by step().
            self._state.step_hooks.driven = self._state.step_hooks.driven or self.config.search == "static"
            self._update_window()

    @keeps_modes
    def step(self) -> bool:
        """Count one optimizer step, and reallocate if it is due.

        If it fails, nothing has been counted and no rank has changed: it may be called again.

        Returns:
            Whether ranks were chosen in this call.
        """
        if self._accumulation is not None and not self._accumulation.sync_gradients:
            # accelerate's optimizer did nothing either: the statistics so far belong to a step that is still to come.
            self._state.step_hooks.driven = True
            return False
        only_counts = self._started and self._window is None and self._steps_left() - 1 > self._window_length()
        with undone_on_failure(self.undo_point(not only_counts)):
            self._state.step_hooks.driven = True
            if self._window is not None:
                # What no optimizer hook has committed belongs to a step that was skipped.
                self._window.discard()
                distributed.sum_to_first_(self._window.committed)
            fresh = not self._started
            self.start()
            self._steps += 1
            done = self._steps_left() <= 0 and (self._warming() or not self._needs_window() or self._window_steps() > 0)
            if done:
                self._reallocate()
            elif self._steps_left() <= 0 and not fresh:
                self._warn("empty_window",
                           "a reallocation is due, but the statistics of all optimizer steps in its window were not finite "
                           "or the steps were skipped: it is put off until there are some")
            self._update_window()
            return done

    # ---- the three steps of a reallocation ----

    @keeps_modes
    @torch.no_grad()
    def score(self, batches: Iterable | None = None, *, proxy: str | None = None, score: str | None = None,
              per_rank: bool = False, **measures) -> dict[str, float] | dict[str, list[float]]:
        """Score every path.

        Args:
            batches: for a probe: all of them are used; default: the first ``num_batches`` (32) of the dataloader.
            proxy, score: default: the config's.
            per_rank: a list with one score per row instead of one number.
            measures: ``loss_fn``, ``metric``, ``eval_batches``, ``greater_is_better``, ``tolerance``: default: the search's.

        Returns:
            ``{path: score}``, equal on all processes.

        Raises:
            ValueError: no data, an empty window, an unknown name.
            FloatingPointError: a loss is not finite.
        """
        chosen = get_proxy(proxy) if proxy else self._proxy
        return self._score(chosen, score or self._score_of(chosen), batches, per_rank,
                           dataclasses.replace(self._measures, **measures))[0]

    def allocate(self, scores: Mapping[str, float | list[float]]) -> dict[str, int | list[bool]]:
        """Share the config's budget out by these scores; one draw from the search's generator.

        Paths that training has not reached take no part: a share is one of the others.

        Args:
            scores: ``{path: score}`` of every path; for graded ranks ``{path: [score of each row]}``, as
                ``score(per_rank=True)`` gives them.

        Returns:
            ``{path: rank}``, for graded ranks ``{path: [whether each row is on]}``: what :meth:`apply` takes.

        Raises:
            ValueError: a path has no score, a score is not finite, or the budget selects nothing.
        """
        paths = self._state.paths
        missing = [name for name in paths if name not in scores]
        if missing:
            raise ValueError(f"scores has no entry for {missing[0]!r} and {len(missing) - 1} other paths")
        return allocated(paths, scores, self.config, self._generator, self._unreached)

    @keeps_modes
    def apply(self, ranks: Mapping[str, int | Tensor | Iterable[bool]]) -> None:
        """Set ranks, in place: no parameter changes identity and nothing recompiles.

        Not between a forward and its backward: torch refuses that backward, and under activation checkpointing the recompute
        would be that of other ranks.

        Args:
            ranks: ``{path: k}``, the first k rows, or ``{path: bool mask [r]}``. Paths that are not named stay as they are.

        Raises:
            ValueError: an unknown path, or a rank outside 0 ... r. Nothing is changed then.
        """
        with undone_on_failure(self.undo_point()):
            self._write(self._state.masks_of(ranks))

    # ---- state ----

    def state_dict(self) -> dict:
        """Everything a resumed run needs to allocate as the unbroken one.

        Returns:
            Counters, generator, history, window and ranks: numbers, strings, lists and CPU tensors. Of several processes the
            first one's is to be saved, and loaded by all.
        """
        window = None if self._window is None else {"committed": self._window.committed.cpu().clone(),
                                                    "steps": self._window.steps}
        return {
            "version": 2, "ranks": self.config.ranks, "started": self._started, "steps": self._steps, "last": self._last,
            "reallocations": self._reallocations, "times_on": copy.deepcopy(self._times_on), "covered": self._covered,
            "average": copy.deepcopy(self._average), "unreached": sorted(self._state.reach.unreached),
            "reset": self._state.step_hooks.pending_resets(),
            "generator": self._generator.get_state(),
            "history": copy.deepcopy(self.history), "window": window, "warned": sorted(self._warned),
            "masks": {name: list(rows) for name, rows in self._state.rows().items()},
        }

    @keeps_modes
    def load_state_dict(self, state: Mapping) -> None:
        """Go on where :meth:`state_dict` was taken; the ranks come along.

        Args:
            state: from there.

        Raises:
            ValueError: the state belongs to other paths or to another version.
        """
        check_search_state(state)
        if state["ranks"] != self.config.ranks:
            raise ValueError(f"state is that of a search with ranks={state['ranks']!r}, and this one has {self.config.ranks!r}")
        if set(state["masks"]) != set(self.paths):
            odd = sorted(set(state["masks"]) ^ set(self.paths))
            raise ValueError(f"state belongs to a model with other paths: {odd[0]!r} and {len(odd) - 1} others differ")
        check_search_state(state, sizes={name: path.r for name, path in self._state.paths.items()})
        with undone_on_failure(self.undo_point()):
            self._load(state)

    def _load(self, state: Mapping) -> None:
        self.apply({name: torch.tensor(mask, dtype=torch.bool, device="cpu") for name, mask in state["masks"].items()})
        self._started, self._steps, self._last = state["started"], state["steps"], state["last"]
        self._reallocations, self._times_on = state["reallocations"], copy.deepcopy(dict(state["times_on"]))
        self._average = copy.deepcopy(dict(state["average"]))
        self._state.step_hooks.set_pending_resets(state["reset"])
        self._covered = state["covered"]
        self._state.reach.unreached = self._unreached = set(state.get("unreached", ()))
        self._generator.set_state(state["generator"])
        self.history = copy.deepcopy(list(state["history"]))
        self._warned = set(state["warned"])
        self._close_window()
        self._update_window()
        if self._window is not None and state["window"] is not None:
            if distributed.is_first():
                self._window.committed.copy_(state["window"]["committed"])
            self._window.steps = state["window"]["steps"]

    # ---- called by the optimizer's hooks ----

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Commit the statistics of the step that is being taken, unscaled.

        Args:
            optimizer: whose step it is.
        """
        if self._window is None:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            # A fused optimizer skips inside its kernel: its hooks run all the same.
            self._window.discard()
        else:
            self._window.commit(self._scaler.get_scale() if self._scaler is not None else 1.0)

    # ---- inside ----

    def undo_point(self, with_rows: bool = True) -> Undo:
        """A way back to now.

        Args:
            with_rows: False where no rank can change: to read the rows of every path takes long.

        Returns:
            A function that undoes whatever :meth:`apply`, :meth:`start` and :meth:`step` have changed since.
        """
        self._check_patched()
        state, hooks = self._state, self._state.step_hooks
        kept, reported, driven, resets = dict(self.__dict__), len(self.history), hooks.driven, hooks.pending_resets()
        rows, drawn, ledger = state.rows() if with_rows else {}, self._generator.get_state(), state.switches.ledger.undo_point()

        @torch.no_grad()
        def undo() -> None:
            ledger()
            self._hold(kept["_window"])
            self.__dict__.update({**kept, "_forget_window": self._forget_window})
            del self.history[reported:]
            self._generator.set_state(drawn)
            hooks.driven = driven
            hooks.set_pending_resets(resets)
            for name, before in rows.items():
                if state.paths[name].active_rows() != before:
                    state.paths[name].mask.copy_(torch.tensor(before, device="cpu"))
            state.write_masks()
        return undo

    @torch.no_grad()
    def _write(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            path = self._state.paths[name]
            before = path.active_rows()
            path.mask.copy_(mask)
            if self.config.on_reactivate == "reset":
                self._state.step_hooks.reset_rows(path, [on and not was for on, was in zip(path.active_rows(), before)])
        self._state.write_masks()

    def _check_patched(self) -> None:
        if state_of(self._model) is not self._state:
            raise ValueError("model was patched anew after this search was built: build another RankSearch")
        self._state.check_structure(searched=True)

    def _eligible(self) -> list[str]:
        return [name for name, path in self._state.paths.items() if self.config.mode != "lora_only" or path.kind == "lora"]

    def _interval_steps(self) -> int:
        if isinstance(self.config.interval, int):
            return self.config.interval
        if self._steps_per_epoch is None:
            raise ValueError(f"steps_per_epoch is needed, because interval={self.config.interval} is part of an epoch; pass it, "
                             "or set interval to a number of optimizer steps")
        return max(1, round(self.config.interval * self._steps_per_epoch))

    def _warming(self) -> bool:
        """Whether the next reallocation belongs to the warm-up."""
        if self.config.search != "dynamic":
            return False
        if self.config.warmup is not None:
            return self._reallocations < self.config.warmup
        return not self._covered

    def _score_of(self, proxy: Proxy) -> str:
        """``"probe"`` or ``"in_step"``: the config's, but a proxy with passes of its own needs a probe."""
        return "probe" if proxy.own_pass else self.config.resolved_score

    def _needs_window(self) -> bool:
        return self.config.search == "dynamic" and self._score_of(self._proxy) == "in_step" and self._proxy.needs_data

    def _window_steps(self) -> int:
        """Steps in the window; 0 on every process where one has none, so that all decide alike."""
        steps = 0 if self._window is None else self._window.steps
        return 0 if distributed.any_process(steps == 0, self._state.device) else steps

    def _steps_left(self) -> float:
        """Optimizer steps before a reallocation is due."""
        return self._last + self._interval_steps() - self._steps if self.config.search == "dynamic" else float("inf")

    def _window_length(self) -> int:
        """Optimizer steps before the next reallocation that collect; 0 where it is not scored, or by a probe."""
        collects = self._needs_window() and not self._warming()
        return min(self.config.num_batches or _WINDOW_STEPS, self._interval_steps()) if collects else 0

    def _update_window(self) -> None:
        """Collect exactly in the last optimizer steps before a due, scored reallocation."""
        wanted = self._started and 0 < self._window_length() and self._steps_left() <= self._window_length()
        if wanted and self._window is None:
            self._hold(self._state.switches.ledger.open())
        elif not wanted:
            self._close_window()

    def _hold(self, window: Collector | None) -> None:
        """Read this window, or none. A search that is dropped no longer reads."""
        if self._forget_window is not None:
            self._forget_window.detach()
        self._window, self._forget_window = window, None
        if window is not None:
            self._forget_window = weakref.finalize(self, self._state.switches.ledger.drop, window)
            self._forget_window.atexit = False

    def _close_window(self) -> None:
        if self._window is not None:
            self._state.switches.ledger.close(self._window)
            self._hold(None)

    def _score(self, proxy: Proxy, score: str, batches: Iterable | None, per_rank: bool,
               measures: Measures) -> tuple[dict, dict]:
        """``(scores, what they were made from)``."""
        if score not in ("probe", "in_step"):
            raise ValueError(f"score must be 'probe' or 'in_step', got {score!r}")
        if score == "in_step" and (batches is not None or proxy.own_pass):
            what = "batches cannot be given" if batches is not None else f"proxy {proxy.name!r} cannot be scored"
            raise ValueError(f"{what} with score='in_step': it reads the statistics of the training steps")
        self._check_patched()
        self._warn_about_zero_B(proxy)
        paths = self._state.paths
        made = {"score": score, "statistics": "exact"}
        if not proxy.needs_data:
            rows = {name: torch.zeros(path.r, NUM_COLUMNS, device="cpu") for name, path in paths.items()}
            made = {"score": None, "statistics": None, "batches": 0}
        elif score == "in_step":
            if self._window_steps() == 0:
                raise ValueError("score='in_step' has no statistics: no optimizer step was taken in the window before a "
                                 "reallocation; use score='probe'")
            rows = self._state.switches.ledger.rows_by_path(distributed.sum_(self._window.committed.clone()))
            made.update(statistics="streaming", batches=self._window.steps)
        else:
            loader, limit = (batches, None) if batches is not None else (self._probe_loader(),
                                                                         self.config.num_batches or PROBE_BATCHES)
            name = "dataloader" if batches is None else "batches"
            if proxy.own_pass:
                request = ScoringPass(inside_wrappers(self._model), self._state, loader, limit, measures, per_rank, name)
                scores = proxy.formula(request)
                made.update(statistics=None, batches=limit)
            else:
                rows, used = probe_rows(self._model, loader, limit, measures.loss_fn, streaming=proxy.streaming_only, name=name)
                made.update(statistics="streaming" if proxy.streaming_only else "exact", batches=used)
        if not proxy.own_pass:
            scores = {name: scores_of(proxy, rows[name], per_rank) for name in paths}
        scores = normalized(scores, proxy, self.config.normalize, {
            name: PathSize(path.scaling, path.num_parameters, split_path(name)[2]) for name, path in paths.items()})
        return {name: scores[name].tolist() if per_rank else float(scores[name]) for name in paths}, made

    def _probe_loader(self) -> Iterable:
        if self._dataloader is None:
            raise ValueError("dataloader is needed for score='probe': pass it to RankSearch, or batches to score()")
        return probe_loader(self._dataloader)

    def _reallocate(self) -> None:
        warming, self._unreached = self._warming(), self._state.reach.unreached_everywhere(self.paths, self._state.device)
        if warming:
            scores = by_turns(self._times_on, {name: path.r for name, path in self._state.paths.items()}, self._per_rank)
            made = {"score": None, "statistics": None, "batches": 0}
        else:
            scores, made = self._score(self._proxy, self._score_of(self._proxy), None, self._per_rank, self._measures)
            self._warn_about_ties(scores)
            if self.config.score_decay > 0:
                scores = self._average = averaged(self._average, scores, self.config.score_decay)
        before = self._state.rows()
        self._write(self._agree(self._decision(scores if warming else self._steadied(scores))))
        self._count_coverage()
        self._reallocations += 1
        self._last = self._steps
        sizes = {name: path.num_parameters // path.r for name, path in self._state.paths.items()}
        self.history.append({
            "step": self._steps, "warmup": warming, "proxy": "constant" if warming else self._proxy.name, **made,
            **describe_ranks(self._state.rows(), before, sizes, None if warming else scores, self._per_rank)})
        if self._window is not None:
            self._window.zero_()

    def _steadied(self, scores: dict) -> dict:
        """The scores with the advantage of what is on, once the proxy and not the warm-up has put it there."""
        if not self.history or self.history[-1]["warmup"]:
            return scores
        return steadied(scores, self._state.rows(), self.config.hysteresis)

    def _count_coverage(self) -> None:
        """Count what is on, and see whether the warm-up has covered everything."""
        rows = self._state.rows()
        on = {name: rows[name] if self._per_rank else (any(rows[name]),) for name in self._times_on}
        reached = without(self._times_on, self._unreached)
        news = any(now and times == 0 for name in reached for now, times in zip(on[name], self._times_on[name]))
        self._times_on = {name: [times + now for now, times in zip(on[name], counts)] for name, counts in self._times_on.items()}
        # A pool whose budget rounds to nothing is never covered: a round that brings nothing new is the last one.
        self._covered = self._covered or not news or min(min(self._times_on[name]) for name in reached) > 0

    def _decision(self, scores: Mapping[str, float]) -> dict[str, Tensor]:
        """The allocator's answer as masks, checked before anything is switched."""
        masks = self._state.masks_of(self.allocate(scores))
        missing = [name for name in self.paths if name not in masks]
        if missing:
            raise ValueError(f"allocator {self.config.ranks!r} gave no rank for {missing[0]!r} and {len(missing) - 1} others")
        if not any(bool(mask.any()) for mask in masks.values()):
            raise ValueError(f"allocator {self.config.ranks!r} switched every path off (budget {self.config.budget})")
        return masks

    def _agree(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's decision everywhere."""
        flat = torch.cat([masks[name].to(self._state.device, torch.int64) for name in self.paths])
        parts = distributed.broadcast_(flat).bool().split([self._state.paths[name].r for name in self.paths])
        return dict(zip(self.paths, parts))

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned = self._warned | {key}
            warnings.warn(message, stacklevel=4)

    def _warn_about_zero_B(self, proxy: Proxy) -> None:
        if not proxy.zero_at_zero_B or f"zero_B:{proxy.name}" in self._warned:
            return
        zero = self._state.paths_of_zero_B()
        if zero:
            self._warn(f"zero_B:{proxy.name}",
                       f"proxy {proxy.name!r} is 0 for every path whose lora_B is 0, and {len(zero)} of {len(self.paths)} are: "
                       "they are ranked at random among themselves and last. Train them first (warmup), or use grad_norm")

    def _warn_about_ties(self, scores: Mapping[str, float]) -> None:
        names = without(self._eligible(), self._unreached)
        values = {value for name in names for value in (scores[name] if self._per_rank else [scores[name]])}
        if len(values) == 1 and self._proxy.needs_data and len(names) > 1:
            self._warn("ties", f"all {len(names)} scores of proxy {self._proxy.name!r} are equal ({values.pop()}): "
                               "the ranks were drawn at random")
