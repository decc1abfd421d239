# SPDX-License-Identifier: Apache-2.0
"""What all optimizers of this package are: parameter groups, state and the step, exact under sharding."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from merit_ds.binding import bind, is_dry_run, stepped_tensors
from merit_ds.errors import UnsupportedError
from merit_ds.inspection import Inspector
from merit_ds.loading import SavedStates, between_hooks, restore_moments, saved_states
from merit_ds.ops.rule import Rule
from merit_ds.origin import Origin, origin_of
from merit_ds.registration import allow_under_zero
from merit_ds.shard import MARKS, Shard, is_trained, layout_settings
from merit_ds.step import HalfwayError, Stepper
from merit_ds.summary import log_summary
from merit_ds.validation import (
    LATER_SETTINGS,
    check_for_all,
    check_known,
    check_laid_out,
    check_parameters,
    check_saved_group,
    check_settings,
    check_state,
)
from merit_ds.work import Work


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose formula is a `Rule`, over whole parameters and over whatever shards hold of them.

    It finds out what the tensors that it is handed hold (`merit_ds.binding`), keeps the rule's moments in float32 and
    an int `step`, and takes the rule's two passes with an exchange of norms between them. DeepSpeed ZeRO-1, 2 and 3,
    Megatron-core's tensor parallelism and `fully_shard` are supported.

    Args:
        params: parameters or groups, float32, bfloat16 or float16, contiguous. A frozen
            parameter may be anything; what is trained later is looked at in its first step. Groups may override every
            setting that is in `defaults`.
        defaults: the groups' settings; each is checked by `merit_ds.validation`.
        rule: the formula.
        fused: which kernel, as for `merit_ds.ops.select_kernel`.

    Attributes:
        found_inf: None, or one number, the same on all ranks: where it is not 0 a step changes no weight and no
            moment, without the host having to know, as in a CUDA graph. A call of `step` counts all the same, unless
            the rule's scalars depend on the count; a graph's replays do not. Set it to what `torch.amp` found, say.
        inspect: None, or what the next step is to show its pieces to (see `merit_ds.inspection`), once for each call
            of `step` and device; set it on all ranks. It stays until it is set to None.

    Raises:
        ValueError: a setting out of its range, a group's that is another optimizer's or misspelt, or a parameter whose
            dtype or shape has no defined step, or that is in its group twice.
    """

    stepper: ClassVar[type[Stepper]] = Stepper
    marks: ClassVar[tuple[str, ...]] = MARKS
    """What a group may say beside the settings in `defaults`."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, rule: Rule, fused: bool | None = None) -> None:
        if fused is not None and not isinstance(fused, bool):  # 0 equals False, but is not it
            raise ValueError(f"{type(self).__name__}: fused={fused!r}, but it must be True, False or None")
        self.fused = fused
        self.rule = rule
        self.found_inf: Tensor | float | None = None
        self.inspect: Inspector | None = None
        self._origins: list[Origin] = []
        self._bound: dict[Tensor, Shard] = {}
        self._laid_out: dict[int, dict[str, Any]] = {}
        """Of each group, by its id, the `layout_settings` that its tensors were bound with."""
        self._agreed: set[Tensor] = set()
        self._works: dict[tuple[Any, ...], Work] = {}
        self._refusal: str | None = None
        if isinstance(defaults.get("betas"), list):
            defaults["betas"] = tuple(defaults["betas"])
        if rule.norm is not None:
            defaults["norm"] = rule.norm.name  # a saved state says by it what it is of
        defaults["step"] = 0  # DeepSpeed's elastic checkpoints look for it in the group
        check_settings(defaults, name=type(self).__name__)
        super().__init__(params, defaults)
        allow_under_zero(type(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings and shapes are checked now rather than in the first step."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        unmeasured = set() if self.rule.norm else {"no_trust_ratio"}
        try:
            check_for_all(added, self.defaults, name=type(self).__name__)
            check_settings(added, name=type(self).__name__)
            check_known(added, {"params", *self.defaults, *self.marks} - unmeasured, name=type(self).__name__)
            check_parameters(added, name=type(self).__name__)
        except Exception:
            self.param_groups.pop()
            raise
        self._origins.append(Origin.of(added))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # as torch's own: it would trace the weak references to gradients, and cannot
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every weight that has a gradient.

        Under ZeRO and fully_shard all ranks of the data-parallel group must call it: it holds a collective.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            UnsupportedError: in the first step, when the wrapper around the optimizer is not one under which the
                result is exact. No weight has been changed then; where the moments of cut weights may have been, every
                further step is refused as well, until a state is loaded. In a later one, when a group says otherwise
                than before how its weights are laid out (`merit_ds.shard.layout_settings`), or settings change during
                the capture of a CUDA graph, or a tensor has no memory of its own for the fused kernel to take.
            ValueError: a parameter that was frozen before is trained, and has no defined step. Nothing was changed.
        """
        if self._refusal is not None:  # the moments have been touched: another try would not be exact
            raise UnsupportedError(self._refusal)
        self._check_laid_out()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._work()
        if work is None:
            return loss
        self._check_ready(work)
        grads = [tensor.grad for tensor in work.tensors]
        states = work.states(grads, self.state, self._moments)
        operands = work.gather(grads, states)
        try:
            work.step(
                operands,
                self.param_groups,
                noop=self.found_inf,
                check_agreement=not work.agreed,
                inspect=self.inspect,
            )
        except HalfwayError as refusal:
            self._refusal = str(refusal)
            raise
        if not work.agreed:
            work.agreed = True
            self._agreed.update(work.tensors)
        # What was left out must not count where the scalars depend on the count; asking makes the host wait.
        if not (self.rule.counts_steps and self.found_inf is not None and bool(self.found_inf)):
            work.count(grads, self.param_groups)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, the moments as float32 (torch would cast them to the parameter's dtype).

        What counts is the state as the registered pre-hooks leave it; the post-hooks see it restored.

        Raises:
            ValueError: the state is not this optimizer's, has settings out of range, or belongs to parameters of
                other shapes; nothing has been changed.
        """
        origins: list[Origin] = []
        saved: SavedStates = []

        def check(_: torch.optim.Optimizer, adapted: dict[str, Any]) -> None:
            saved.extend(saved_states(self.param_groups, adapted))
            for group in adapted["param_groups"]:
                self._check_saved_group(group)
            for tensor, state in saved:
                check_state(tensor, state, moments=self.rule.moments, name=type(self).__name__)
            origins.extend(self._origin(group) for group in self.param_groups)

        def restore(_: torch.optim.Optimizer) -> None:
            self._take_groups(origins)
            restore_moments(self.state, saved, moments=self.rule.moments)

        with between_hooks(self, check=check, restore=restore):
            super().load_state_dict(state_dict)

    def _check_saved_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a saved group is not one of this optimizer's."""
        check_saved_group(group, self.defaults, name=type(self).__name__)

    def _take_groups(self, origins: Sequence[Origin]) -> None:
        """Go on with groups that a state has brought: what was found out with those before may not hold of them."""
        for group in self.param_groups:
            for key in LATER_SETTINGS:
                if key in self.defaults:
                    group.setdefault(key, self.defaults[key])
        self._origins = [replace(origin, group=group) for origin, group in zip(origins, self.param_groups, strict=True)]
        self._bound.clear()
        self._laid_out.clear()
        self._agreed.clear()
        self._works.clear()
        self._refusal = None

    def _check_laid_out(self) -> None:
        for number, group in enumerate(self.param_groups):
            if id(group) not in self._laid_out:
                self._origin(group)  # not bound yet, or put in the place of one that was
            else:
                before = self._laid_out[id(group)]
                now = layout_settings(self.settings_for_layout(group))
                check_laid_out(before, now, name=type(self).__name__, number=number)

    def _check_ready(self, work: Work) -> None:
        """Raise UnsupportedError where a step would lack something that the caller must have done before."""

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps the groups only, and a copy under ZeRO would take a flat partition for a vector.
        return {
            **super().__getstate__(),
            "_origins": self._origins,
            "_bound": {},
            "_laid_out": {},
            "_agreed": set(),
            "_works": {},
            "_refusal": self._refusal,
            "fused": self.fused,
            "rule": self.rule,
            "found_inf": None,
            "inspect": None,
        }

    def _origin(self, group: dict[str, Any]) -> Origin:
        return origin_of(group, self._origins, name=type(self).__name__)

    def _bind(self, group: dict[str, Any]) -> None:
        """Find out what the group's tensors hold, if that is not known."""
        if all(map(self._is_laid_out, group["params"])):
            return
        origin = self._origin(group)
        # A universal checkpoint is loaded into the groups.
        check_for_all(group, self.defaults, name=type(self).__name__)
        settings = self.settings_for_layout(group)
        shards = bind(settings, origin.parameters, shapes=origin.shapes)
        self._bound.update({shard.tensor: shard for shard in shards})
        self._laid_out.setdefault(id(group), layout_settings(settings))
        tensors = [stepped_tensors(origin.group, origin.parameters) for origin in self._origins]
        if all(tensor in self._bound for tensor in chain.from_iterable(tensors)):
            log_summary(
                [
                    (origin.group | {"lr": origin.lr}, [self._bound[tensor] for tensor in found])
                    for origin, found in zip(self._origins, tensors, strict=True)
                ],
                name=type(self).__name__,
                rule=self.rule,
                fused=self.fused,
            )

    def _is_laid_out(self, tensor: Tensor) -> bool:
        shard = self._bound.get(tensor)
        return shard is not None and not (shard.idle and is_trained(tensor))

    def settings_for_layout(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group, with what the rule says of norms where the group does not: which of them a layout must have."""
        unmeasured = {"no_trust_ratio": True} if self.rule.norm is None else {}
        return {"elementwise": self.rule.elementwise} | group | unmeasured

    def _work(self) -> Work | None:
        """What this call has to do; None for DeepSpeed's dry run.

        Under ZeRO the groups hold other tensors in each call, so there is one for each set of them.
        """
        tensors = list(chain.from_iterable(group["params"] for group in self.param_groups))
        sizes = [len(group["params"]) for group in self.param_groups]
        identity = (*map(id, tensors), *sizes, *(tensor.device for tensor in tensors[:1]))
        known = self._works.get(identity)
        if known is not None and not any(map(is_trained, known.idle)):
            return known
        for group in self.param_groups:
            self._bind(group)
        shards = [self._bound[tensor] for tensor in tensors]
        if is_dry_run(shards, self.state):
            for tensor in tensors:
                self._moments(tensor)
            return None
        groups = [number for number, size in enumerate(sizes) for _ in range(size)]
        work = Work(shards, groups=groups, rule=self.rule, fused=self.fused, stepper=self.stepper)
        work.agreed = self._agreed.issuperset(tensors)
        self._works[identity] = work
        return work

    def _moments(self, tensor: Tensor) -> dict[str, Any]:
        """A tensor's state, made if it has none."""
        state: dict[str, Any] = self.state[tensor]
        if not state:
            state["step"] = 0
            for name in self.rule.moments:
                state[name] = torch.zeros_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)
        return state
