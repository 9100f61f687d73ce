"""SLR, ADMM and magnitude against references written without the package's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from slrc.errors import PlanError, TrainingError
from slrc.methods.ac_dc import ACDC
from slrc.methods.admm import ADMM
from slrc.methods.base import Method, MethodState
from slrc.methods.gradual import Gradual
from slrc.methods.group_lasso import GroupLasso
from slrc.methods.magnitude import Magnitude
from slrc.methods.registry import make_method
from slrc.methods.settings import (
    ACDCSettings,
    ADMMSettings,
    GradualSettings,
    GroupLassoSettings,
    MethodName,
    MethodSettings,
    SLRSettings,
    TighteningSettings,
)
from slrc.methods.slr import SLR
from slrc.sparsity.constraints import Constraint
from slrc.sparsity.masks import Masks
from slrc.sparsity.patterns import parse_pattern
from slrc.sparsity.plans import Plan
from slrc.sparsity.slices import Slice


def plan_of(*constraints: Constraint) -> Plan:
    return Plan(sparsity_asked=0.5, sparsity=0.5, constraints=constraints)


def on_weight(pattern: str, tensor: str, groups: int, keep: int) -> Constraint:
    return Constraint(
        name=tensor, pattern=parse_pattern(pattern), groups=groups, keep=keep, members=(Slice(tensor=tensor),)
    )


TRAINED = [name for name in MethodName if name is not MethodName.RECONSTRUCT]
PAPER = SLRSettings()
"""The paper's equations as they stand there."""
FOLLOWING = SLRSettings(rho=1.0, rho_growth=10.0, follow=True)

PLANS = {
    "unstructured": plan_of(on_weight("unstructured", "a", 64, 16)),
    "block": plan_of(on_weight("block:4x1", "a", 16, 4)),
    "block, in an order": plan_of(
        on_weight("block:4x1", "a", 16, 4).model_copy(update={"order": (5, 0, 3, 6, 1, 7, 2, 4)})
    ),
    "columns": plan_of(on_weight("columns:2", "a", 8, 2)),
    "n:m": plan_of(on_weight("2:4", "a", 4, 2)),
    "two weights": plan_of(on_weight("unstructured", "a", 64, 16), on_weight("block:2x2", "b", 16, 4)),
    "channel": plan_of(
        Constraint(
            name="a",
            pattern=parse_pattern("channel"),
            groups=8,
            keep=3,
            members=(Slice(tensor="a"), Slice(tensor="bias")),
            followers=(Slice(tensor="b", dim=1),),
        )
    ),
    "channel, in part": plan_of(
        Constraint(
            name="a",
            pattern=parse_pattern("channel"),
            groups=4,
            keep=1,
            members=(Slice(tensor="a", index=(2, 3, 6, 7)), Slice(tensor="bias", index=(2, 3, 6, 7))),
            followers=(Slice(tensor="b", dim=1, index=(2, 3, 6, 7)),),
        )
    ),
}


def make_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 8), "b": (8, 8), "bias": (8,)}
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def owned_elements(plan: Plan, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Where the plan's members lie, by index arithmetic of the test's own."""
    owned = {s.tensor: torch.zeros(parameters[s.tensor].shape, dtype=torch.bool) for c in plan for s in c.members}
    for c in plan:
        for s in c.members:
            owned[s.tensor][list(s.index) if s.index is not None else slice(None)] = True
    return owned


def keep_largest(x: Tensor, keep: int) -> Tensor:
    """Project on the vectors with `keep` entries."""
    z = torch.zeros_like(x)
    kept = sorted(range(x.numel()), key=lambda i: -abs(float(x.flatten()[i])))[:keep]
    for i in kept:
        z.view(-1)[i] = x.flatten()[i]
    return z


class Quadratic:
    """f(w) = ½ ‖w − target‖², whose gradient is w − target."""

    def __init__(self, size: int, seed: int = 1) -> None:
        self.target = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def __call__(self, w: Tensor) -> float:
        return 0.5 * float((w.detach().reshape(-1) - self.target).square().sum())

    def gradient(self, w: Tensor) -> Tensor:
        return (w.detach().reshape(-1) - self.target).reshape(w.shape)


class ReferenceSLR:
    """The equations of docs/method.md, line by line, with every iterate kept as a value of its own."""

    def __init__(self, w: Tensor, f: Callable[[Tensor], float], keep: int, settings: SLRSettings, updates: int) -> None:
        self.f, self.keep, self.settings, self.updates = f, keep, settings, updates
        self.w_old = w.clone()
        self.z = keep_largest(w, self.keep_at(0))
        self.multiplier = torch.zeros_like(w)
        self.s, self.k, self.rho = settings.s0, 0, settings.rho
        self.previous = self.distance(w, self.z, self.multiplier)

    def keep_at(self, k: int) -> int:
        """l^k: the sets tighten, cubic in time, from all that there is."""
        until, size = self.updates * self.settings.tighten, self.w_old.numel()
        return size - round((size - self.keep) * (1 - (1 - k / until) ** 3)) if k < until else self.keep

    def stepped(self, factor: float) -> float:
        """The next step: with sets that tighten, of at most ρ."""
        return min(self.s * factor, self.rho) if self.settings.tighten else self.s * factor

    def copy(self, w: Tensor, z: Tensor, multiplier: Tensor) -> Tensor:
        """Z for the weights w: as it was projected, or its minimiser with the same support."""
        return torch.where(z != 0, w + multiplier / self.rho, 0.0) if self.settings.follow else z

    def lagrangian(self, w: Tensor, z: Tensor, multiplier: Tensor) -> float:
        d = w - self.copy(w, z, multiplier)
        return self.f(w) + float((multiplier * d).sum()) + self.rho / 2 * float((d * d).sum())

    def gradient(self, w: Tensor) -> Tensor:
        return self.multiplier + self.rho * (w - self.copy(w, self.z, self.multiplier))

    def moved(self, w: Tensor, z: Tensor) -> Tensor:
        """The multipliers after a step of s, of at most ρ where a following copy is not zero."""
        step = torch.full_like(w, self.s)
        if self.settings.follow:
            step = torch.where(z != 0, min(self.s, self.rho), step)
        return self.multiplier + step * (w - self.copy(w, z, self.multiplier))

    def distance(self, w: Tensor, z: Tensor, multiplier: Tensor) -> float:
        return float((w - self.copy(w, z, multiplier)).norm())

    def update(self, w: Tensor) -> tuple[bool, bool, float]:
        self.k += 1
        p = 1 - 1 / self.k**self.settings.r
        alpha = 1 - 1 / (self.settings.M * self.k**p)
        z_old, w_old = self.z, self.w_old
        was, now = self.previous, self.distance(w, z_old, self.multiplier)
        first = self.lagrangian(w, z_old, self.multiplier) < self.lagrangian(w_old, z_old, self.multiplier)
        if first:
            self.s = self.stepped(alpha * (was / now if was > 0 and now > 0 else 1.0))
            self.multiplier = self.moved(w, z_old)
        keep, before = self.keep_at(self.k), self.keep_at(self.k - 1)
        if keep < before:  # Z of before, in the new set
            z_old = keep_largest(self.copy(w, z_old, self.multiplier), keep)
        z = keep_largest(w + self.multiplier / self.rho, keep)
        new, old = self.lagrangian(w, z, self.multiplier), self.lagrangian(w, z_old, self.multiplier)
        second = new < old or (self.settings.follow and torch.equal(z != 0, z_old != 0))
        residual = self.distance(w, z, self.multiplier)
        if second:
            self.s = self.stepped(alpha * (now / residual if now > 0 and residual > 0 else 1.0))
            self.multiplier = self.moved(w, z)
        self.z, self.w_old, self.previous = z, w.clone(), residual
        self.rho = self.settings.rho * self.settings.rho_growth ** min(1.0, self.k / self.updates)
        return first, second, residual


@pytest.mark.parametrize(
    "settings",
    [
        PAPER,
        PAPER.model_copy(update={"rho": 1.5, "s0": 0.2, "M": 5.0, "r": 0.6}),
        FOLLOWING,
        SLRSettings(rho=0.2, rho_growth=40.0, s0=0.3, M=5.0, r=0.6, follow=True),
        SLRSettings(s0=0.0),
        TighteningSettings(hold=1.0),
        TighteningSettings(rho=0.3, s0=0.2, M=5.0, r=0.6, tighten=0.7, hold=1.0),
        SLRSettings(rho=0.5, s0=0.2, tighten=0.9),
    ],
)
@pytest.mark.parametrize("rate", [0.02, 0.3, 2.3])
def test_slr_follows_its_equations_step_by_step(settings: SLRSettings, rate: float) -> None:
    f = Quadratic(12)
    start = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    live = {"w": nn.Parameter(start.reshape(3, 4).clone())}
    slr = SLR(live, plan_of(on_weight("unstructured", "w", 12, 4)), 10, settings)
    slr.start(lambda: f(live["w"]))
    reference = ReferenceSLR(start, f, 4, settings, updates=10)
    w = start.clone()
    for _ in range(12):
        for _ in range(3):
            live["w"].grad = f.gradient(live["w"])
            slr.add_penalty_gradient()
            with torch.no_grad():
                live["w"] -= rate * live["w"].grad
            w = w - rate * (f.gradient(w) + reference.gradient(w))
        record = slr.update(lambda: f(live["w"]))
        first, second, residual = reference.update(w)
        assert (record.accepted_loss, record.accepted_projection) == (first, second)
        assert record.step_size == pytest.approx(reference.s, rel=1e-9)
        assert record.k == reference.k
        assert record.loss == pytest.approx(f(w), rel=1e-9)
        assert record.residual == pytest.approx(residual, rel=1e-9)
        torch.testing.assert_close(live["w"].detach().flatten(), w)
        torch.testing.assert_close(slr.splitting.copies.values[0].flatten(), reference.z)
        rounding = 1e-8 * max(1.0, float(w.abs().max()))
        torch.testing.assert_close(
            slr.splitting.multipliers[0].flatten(), reference.multiplier, rtol=1e-7, atol=rounding
        )
    taken = [(r.accepted_loss, r.accepted_projection) for r in slr.history]
    assert any(first for first, _ in taken) is (rate < 1)  # the largest rate diverges: no first acceptance


def test_step_factor_is_that_of_the_paper() -> None:
    slr = SLR(make_parameters(), PLANS["unstructured"], 10, PAPER)
    assert slr.step_factor(1) == 1 - 1 / 300
    assert slr.step_factor(50) == pytest.approx(1 - 1 / (300 * 50 ** (1 - 1 / 50**0.1)), rel=1e-12)
    assert all(0 < slr.step_factor(k) < slr.step_factor(k + 1) < 1 for k in range(1, 100))


def test_multipliers_move_only_on_acceptance() -> None:
    parameters = make_parameters()
    slr = SLR(parameters, PLANS["unstructured"], 10, PAPER)
    slr.start(lambda: 1.0)
    with torch.no_grad():
        parameters["a"] *= 1.01  # the projection keeps the same places, so that only f decides the first condition
    record = slr.update(lambda: 100.0)
    assert not record.accepted_loss
    assert record.accepted_projection
    first = slr.splitting.multipliers[0].clone()
    torch.testing.assert_close(first, record.step_size * (parameters["a"].detach() - slr.splitting.copies.values[0]))

    before = slr.step_size
    with torch.no_grad():  # at W = Z − Λ/ρ the copy is already the best one, and W itself lies where L is no lower
        parameters["a"].copy_(slr.splitting.copies.values[0] - first / slr.settings.rho)
    record = slr.update(lambda: 1e9)
    assert (record.accepted_loss, record.accepted_projection) == (False, False)
    assert slr.step_size == before == record.step_size
    assert torch.equal(slr.splitting.multipliers[0], first)


def test_update_without_start_accepts_nothing_at_first() -> None:
    slr = SLR(make_parameters(), PLANS["unstructured"], 10, PAPER)
    assert not slr.update(lambda: -1e9).accepted_loss


def test_acceptance_sees_the_previous_weights_not_the_live_ones() -> None:
    """L at W^{k-1} is fixed when W^{k-1} was live: moving far away must not be compared with itself."""
    parameters = make_parameters()
    slr = SLR(parameters, PLANS["unstructured"], 10, PAPER)
    slr.start(lambda: 0.0)
    with torch.no_grad():
        parameters["a"] += 100.0
    assert not slr.update(lambda: 0.0).accepted_loss  # f is the same, the penalty is far greater


def test_copies_do_not_alias_the_live_weights() -> None:
    parameters = make_parameters()
    slr = SLR(parameters, plan_of(on_weight("unstructured", "a", 64, 64)), 10, PAPER)
    slr.start(lambda: 0.0)
    before = slr.splitting.copies.values[0].clone()
    with torch.no_grad():
        parameters["a"].fill_(7.0)
    assert torch.equal(slr.splitting.copies.values[0], before)
    slr.update(lambda: -1.0)
    copies, multipliers = slr.splitting.copies.values[0].clone(), slr.splitting.multipliers[0].clone()
    with torch.no_grad():
        parameters["a"].fill_(9.0)
    assert torch.equal(slr.splitting.copies.values[0], copies)
    assert torch.equal(slr.splitting.multipliers[0], multipliers)


def test_training_does_not_touch_the_live_weights() -> None:
    parameters = make_parameters()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    slr = SLR(parameters, PLANS["channel"], 10, PAPER)
    slr.start(lambda: 1.0)
    slr.add_penalty_gradient()
    slr.update(lambda: 0.5)
    slr.masks()
    assert all(torch.equal(before[n], p) for n, p in parameters.items())


def test_a_start_that_is_feasible_does_not_stop_the_multipliers_for_good() -> None:
    parameters = make_parameters()
    slr = SLR(parameters, PLANS["unstructured"], 10, PAPER)
    slr.masks().apply_(parameters)
    slr = SLR(parameters, PLANS["unstructured"], 10, PAPER)
    slr.start(lambda: 10.0)
    assert slr.splitting.difference()[0].abs().max() == 0
    with torch.no_grad():
        parameters["a"] += 0.1
    slr.update(lambda: 1.0)
    assert slr.step_size > 0
    assert slr.history[-1].multiplier_norm > 0


@pytest.mark.parametrize("make", [SLR, ADMM])
@pytest.mark.parametrize("name", PLANS)
def test_penalty_gradient_is_that_of_autograd(name: str, make: type[SLR] | type[ADMM]) -> None:
    plan, parameters = PLANS[name], make_parameters()
    method = make(parameters, plan, 10)
    method.start(lambda: 1.0)
    with torch.no_grad():
        for p in parameters.values():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
    method.update(lambda: 0.1)
    multipliers = dict(zip(method.names, method.splitting.multipliers, strict=True))
    assert any(m.abs().max() > 0 for m in multipliers.values())
    copies = dict(zip(method.names, method.splitting.copies.values, strict=True))
    owned, rho = owned_elements(plan, parameters), method.splitting.rho
    own = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(4)) for n, p in parameters.items()}

    leaves = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    penalty = torch.zeros(())
    for n, elements in owned.items():
        d = (leaves[n] - copies[n])[elements]
        penalty = penalty + (multipliers[n][elements] * d).sum() + rho / 2 * (d * d).sum()
    expected = dict(zip(owned, torch.autograd.grad(penalty, [leaves[n] for n in owned]), strict=True))

    for n, p in parameters.items():
        p.grad = own[n].clone()
    method.add_penalty_gradient()
    for n, p in parameters.items():
        torch.testing.assert_close(p.grad, own[n] + expected.get(n, 0.0), msg=f"gradient of {n}")
    for n, elements in owned.items():  # what nobody owns gets exactly nothing
        assert torch.equal(parameters[n].grad[~elements], own[n][~elements])
        assert not copies[n][~elements].any()
        assert not multipliers[n][~elements].any()
    assert method.splitting.penalty(method.splitting.difference()).value == pytest.approx(float(penalty), rel=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_penalty_gradient_makes_a_gradient_where_there_is_none(name: str) -> None:
    parameters = make_parameters()
    SLR(parameters, PLANS[name], 10, PAPER).add_penalty_gradient()
    for n, elements in owned_elements(PLANS[name], parameters).items():
        assert parameters[n].grad is not None
        assert parameters[n].grad[elements].abs().max() > 0


def test_nothing_enters_the_autograd_graph() -> None:
    parameters = make_parameters()
    for method in (SLR(parameters, PLANS["channel, in part"], 10, PAPER), ADMM(parameters, PLANS["block"], 10)):
        for k in range(4):
            (parameters["a"].square().sum() + parameters["bias"].sum()).backward()
            method.add_penalty_gradient()
            method.update(lambda k=k: -float(k))
        split = method.splitting
        for t in [*split.multipliers, *split.copies.values, *split._offsets, *(w.grad for w in method.weights)]:
            assert not t.requires_grad
            assert t.grad_fn is None


@pytest.mark.parametrize("name", PLANS)
def test_copies_obey_the_plan_and_masks_are_the_projection_of_the_weights(name: str) -> None:
    plan, parameters = PLANS[name], make_parameters()
    slr = SLR(parameters, plan, 10, PAPER)
    slr.update(lambda: 1.0)
    masks = slr.masks()
    masks.check(plan)
    assert masks.sparsity(plan) > 0
    live = {n: p.detach() for n, p in parameters.items()}
    for c in plan:
        seen = c.gather(masks.apply(live))
        best = c.energies(live).sort(dim=1, descending=True).values[:, : c.keep].sum()
        torch.testing.assert_close(seen.square().sum(), best)  # no feasible mask keeps more energy
        copy = c.gather(dict(zip(slr.names, slr.splitting.copies.values, strict=True)))
        assert (c.pattern.group_view(copy).any(dim=-1).sum(dim=1) <= c.keep).all()


def test_masks_take_the_followers_with_them() -> None:
    slr = SLR(make_parameters(), PLANS["channel"], 10, PAPER)
    masks = slr.masks().tensors
    assert set(masks) == {"a", "b", "bias"}
    kept = masks["bias"]
    assert kept.sum() == 3
    assert torch.equal(masks["a"], kept[:, None].expand(8, 8))
    assert torch.equal(masks["b"], kept[None].expand(8, 8))


def test_admm_follows_its_update() -> None:
    f, rho = Quadratic(12), 0.4
    start = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    live = {"w": nn.Parameter(start.reshape(3, 4).clone())}
    admm = ADMM(live, plan_of(on_weight("unstructured", "w", 12, 4)), 10, ADMMSettings(rho=rho))
    admm.start(lambda: f(live["w"]))
    w, z, u = start.clone(), keep_largest(start, 4), torch.zeros_like(start)
    for k in range(1, 8):
        live["w"].grad = f.gradient(live["w"])
        admm.add_penalty_gradient()
        with torch.no_grad():
            live["w"] -= 0.2 * live["w"].grad
        w = w - 0.2 * (f.gradient(w) + u + rho * (w - z))
        record = admm.update(lambda: f(live["w"]))
        d = w - z
        lagrangian = f(w) + float((u * d).sum()) + rho / 2 * float((d * d).sum())
        z = keep_largest(w + u / rho, 4)
        u = u + rho * (w - z)
        assert (record.k, record.step_size) == (k, rho)
        assert record.lagrangian == pytest.approx(lagrangian, rel=1e-9)
        assert record.residual == pytest.approx(float((w - z).norm()), rel=1e-9)
        torch.testing.assert_close(admm.splitting.copies.values[0].flatten(), z)
        torch.testing.assert_close(admm.splitting.multipliers[0].flatten(), u)


def test_magnitude_does_nothing_but_masks() -> None:
    parameters = make_parameters()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    magnitude = Magnitude(parameters, PLANS["unstructured"])
    magnitude.start(lambda: pytest.fail("magnitude has no use for the loss"))
    magnitude.add_penalty_gradient()
    assert magnitude.update(lambda: pytest.fail("magnitude has no use for the loss")) is None
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in parameters.items())
    kept = magnitude.masks().tensors["a"]
    assert kept.sum() == 16
    assert before["a"][kept].abs().min() >= before["a"][~kept].abs().max()


def drive(method: Method, parameters: dict[str, nn.Parameter], first: int, last: int) -> None:
    """Some deterministic training steps and updates."""
    for k in range(first, last):
        for n, p in parameters.items():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k + len(n)))
        method.add_penalty_gradient()
        with torch.no_grad():
            for p in parameters.values():
                p -= 0.05 * p.grad
        method.after_step()
        method.update(lambda k=k: 10.0 - k)


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("name", ["two weights", "channel, in part"])
def test_a_saved_state_goes_on_identically(method: MethodName, name: str) -> None:
    plan, whole = PLANS[name], make_parameters()
    settings = MethodSettings(slr=SLRSettings(rho_growth=10), admm=ADMMSettings(rho_growth=10))
    make = partial(make_method, method, updates=8, settings=settings)
    uninterrupted = make(whole, plan)
    uninterrupted.start(lambda: 100.0)
    drive(uninterrupted, whole, 0, 8)

    parameters = make_parameters()
    first = make(parameters, plan)
    first.start(lambda: 100.0)
    drive(first, parameters, 0, 4)
    state = first.state()
    saved = MethodState({n: t.clone() for n, t in state.tensors.items()}, dict(state.numbers), state.history)
    second = make(parameters, plan)
    second.load_state(saved)
    drive(second, parameters, 4, 8)

    assert second.history == uninterrupted.history
    for n, p in parameters.items():
        assert torch.equal(p, whole[n])
    ours, theirs = second.state(), uninterrupted.state()
    assert ours.numbers == theirs.numbers
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(t, theirs.tensors[n]) for n, t in ours.tensors.items())


def test_a_state_before_the_first_loss_can_be_saved() -> None:
    slr = SLR(make_parameters(), PLANS["block"], 10, PAPER)
    twin = SLR(make_parameters(), PLANS["block"], 10, PAPER)
    twin.load_state(slr.state())
    assert twin.update(lambda: 1.0) == slr.update(lambda: 1.0)


@pytest.mark.parametrize("name", TRAINED)
def test_a_missing_parameter_is_named(name: MethodName) -> None:
    parameters = make_parameters()
    del parameters["b"]
    with pytest.raises(PlanError, match="constrains `b`, which the model does not have"):
        make_method(name, parameters, PLANS["two weights"], 10)


def test_make_method_hands_on_the_settings() -> None:
    parameters, plan = make_parameters(), PLANS["block"]
    settings = MethodSettings(slr=SLRSettings(rho=3.0), admm=ADMMSettings(rho=2.0))
    slr = make_method(MethodName.SLR, parameters, plan, 10, settings)
    admm = make_method(MethodName.ADMM, parameters, plan, 10, settings)
    assert isinstance(slr, SLR)
    assert isinstance(admm, ADMM)
    assert (slr.splitting.rho, admm.splitting.rho) == (3.0, 2.0)
    assert isinstance(make_method(MethodName.MAGNITUDE, parameters, plan, 10), Magnitude)


def test_slr_converges_on_a_convex_problem() -> None:
    """f = ½ Σ cᵢ (wᵢ − tᵢ)²: the two entries whose loss costs most survive, W meets Z, and pruning is free."""
    curvature = torch.tensor([1.0, 4.0, 1.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    target = torch.tensor([0.1, 2.0, -0.2, 0.3, 0.2, -3.0], dtype=torch.float64)
    w = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64) + 0.5)

    def f(x: Tensor) -> Tensor:
        return 0.5 * (curvature * (x.flatten() - target).square()).sum()

    slr = SLR(
        {"w": w}, plan_of(on_weight("unstructured", "w", 6, 2)), 10, SLRSettings(rho=2.0, rho_growth=1.0, follow=False)
    )
    slr.start(lambda: float(f(w.detach())))
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(100):
        for _ in range(20):
            optimizer.zero_grad()
            f(w).backward()
            slr.add_penalty_gradient()
            optimizer.step()
        slr.update(lambda: float(f(w.detach())))
    kept = slr.masks().tensors["w"].flatten()
    assert kept.nonzero().flatten().tolist() == [1, 5]
    assert slr.history[-1].residual < 0.02 * slr.history[0].residual
    pruned = w.detach().flatten() * kept
    assert math.isclose(float(f(pruned)), float(f(target * kept)), rel_tol=1e-3)


def test_a_following_copy_is_the_minimiser_over_its_support() -> None:
    """The gradient is that of min over Z with Z's support: ‖Λ + ρW‖²/2ρ on the rest, none on the support."""
    parameters, plan = make_parameters(), PLANS["block"]
    slr = SLR(parameters, plan, 10, SLRSettings(rho=0.7, follow=True))
    split = slr.splitting
    split.multipliers[0].copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))
    split.refresh()
    with torch.no_grad():
        parameters["a"].mul_(1.5)
    slr.add_penalty_gradient()
    leaf = parameters["a"].detach().clone().requires_grad_()
    kept, multiplier = split.copies.support[0], split.multipliers[0]
    z = torch.where(kept, leaf + multiplier / 0.7, 0.0)
    penalty = (multiplier * (leaf - z)).sum() + 0.35 * (leaf - z).square().sum()
    (expected,) = torch.autograd.grad(penalty, leaf)
    torch.testing.assert_close(parameters["a"].grad, expected)
    assert not parameters["a"].grad[kept].any()
    torch.testing.assert_close(split.difference()[0], (leaf - z).detach())
    assert split.penalty(split.difference()).value == pytest.approx(float(penalty), rel=1e-5)


def test_multipliers_of_a_following_copy_never_pass_zero_on_its_support() -> None:
    split = SLR(make_parameters(), PLANS["block"], 10, SLRSettings(rho=0.5, follow=True)).splitting
    split.multipliers[0].fill_(1.0)
    kept = split.copies.support[0]
    split.move_multipliers(0.25, split.difference())
    assert (split.multipliers[0][kept] == 0.5).all()
    split.move_multipliers(100.0, split.difference())
    assert split.multipliers[0][kept].abs().max() < 1e-6


def test_slr_with_a_following_copy_converges_too() -> None:
    """The problem of the test above: survivors reach the minimum of their own loss, the others meet zero."""
    curvature = torch.tensor([1.0, 4.0, 1.0, 2.0, 1.0, 3.0])
    target = torch.tensor([0.1, 2.0, -0.2, 0.3, 0.2, -3.0])
    w = nn.Parameter(torch.full((6,), 0.5))
    plan = plan_of(on_weight("unstructured", "w", 6, 2))
    slr = SLR({"w": w}, plan, 60, SLRSettings(rho=1.0, rho_growth=10.0, follow=True))

    def f() -> float:
        return 0.5 * float((curvature * (w.detach() - target).square()).sum())

    slr.start(f)
    for _ in range(60):
        for _ in range(20):
            w.grad = curvature * (w.detach() - target)
            slr.add_penalty_gradient()
            with torch.no_grad():
                w -= 0.05 * w.grad
        slr.update(f)
    assert slr.masks().tensors["w"].tolist() == [False, True, False, False, False, True]
    torch.testing.assert_close(w.detach()[[1, 5]], target[[1, 5]], atol=1e-3, rtol=0)
    assert slr.history[-1].residual < 0.02


@pytest.mark.parametrize("name", PLANS)
def test_gradual_pruning_follows_the_cubic_schedule(name: str) -> None:
    parameters, plan = make_parameters(), PLANS[name]
    method = Gradual(parameters, plan, 8, GradualSettings(until=0.5))
    for k in range(1, 9):
        drive(method, parameters, k - 1, k)
        share = 1 - (1 - min(1.0, k / 4)) ** 3
        expected = plan_of(
            *(c.model_copy(update={"keep": c.groups - round((c.groups - c.keep) * share)}) for c in plan)
        )
        Masks({n: p != 0 for n, p in parameters.items()}).check(expected)
        for c, wider in zip(plan, expected, strict=True):
            if not c.pattern.coupled:
                assert int((c.energies(parameters) > 0).sum(dim=1).max()) == wider.keep


def test_ac_dc_is_dense_and_sparse_in_turns_and_ends_sparse() -> None:
    parameters, plan = make_parameters(), PLANS["unstructured"]
    method = ACDC(parameters, plan, 10, ACDCSettings(phase=2, final=0.3))
    sparse = []
    for k in range(10):
        drive(method, parameters, k, k + 1)
        sparse.append(bool(method.kept))
        assert not sparse[-1] or int((parameters["a"] != 0).sum()) == 16
    assert sparse == [False, True, True, False, False, True, True, True, True, True]
    assert not method.masks().tensors["a"][parameters["a"] == 0].any()


def test_masked_methods_clear_the_gradients_of_what_is_pruned() -> None:
    parameters = make_parameters()
    method = Gradual(parameters, PLANS["channel"], 1)
    method.update(lambda: 1.0)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    method.add_penalty_gradient()
    for name in ("a", "bias", "b"):  # the follower too
        assert torch.equal(parameters[name].grad != 0, parameters[name] != 0)


@pytest.mark.parametrize("name", PLANS)
def test_group_lasso_shrinks_every_group_by_the_same_norm(name: str) -> None:
    parameters, plan = make_parameters(), PLANS[name]
    method = GroupLasso(parameters, plan, 1, GroupLassoSettings(until=1.0))
    for _ in range(4):
        method.after_step()  # no shrinking before the first update
    assert all(torch.equal(p, make_parameters()[n]) for n, p in parameters.items())
    method.update(lambda: 1.0)
    before = [c.energies(parameters).sqrt() for c in plan]
    method.after_step()
    for c, norms in zip(plan, before, strict=True):
        largest_dropped = norms.sort(dim=1, descending=True).values[:, c.keep : c.keep + 1]
        expected = (norms - largest_dropped / 4).clamp(min=0)
        torch.testing.assert_close(c.energies(parameters).sqrt(), expected, atol=1e-5, rtol=1e-4)
    for _ in range(3):
        method.after_step()
    Masks({n: p.abs() > 1e-5 for n, p in parameters.items()}).check(plan)


def test_group_lasso_updates_only_after_steps() -> None:
    parameters = make_parameters()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    method = GroupLasso(parameters, PLANS["block"], updates=2)
    with pytest.raises(TrainingError, match="update 1 came before any step"):
        method.update(lambda: 0.0)
    method.after_step()
    method.update(lambda: 0.0)
    with pytest.raises(TrainingError, match="update 2 came before any step"):
        method.update(lambda: 0.0)
    assert all(torch.equal(parameters[n], before[n]) for n in before)


def test_sets_that_tighten_hold_one_another_and_end_with_masks_in_force() -> None:
    plan, parameters = PLANS["two weights"], make_parameters()
    slr = SLR(parameters, plan, 8, TighteningSettings(rho=0.5, s0=0.1))
    slr.start(lambda: 1.0)
    kept: list[int] = []
    for k in range(1, 9):
        for name in ("a", "b"):
            parameters[name].grad = torch.ones(8, 8)
        slr.add_penalty_gradient()
        if k > 4:  # in force: gradients of what is pruned are cleared, no penalty is added
            assert all(torch.equal(parameters[n].grad, m.to(torch.float32)) for n, m in slr.masks().tensors.items())
        slr.after_step()
        slr.update(lambda k=k: 1.0 / k)
        kept.append(slr.splitting.plan.constraints[0].keep)
        assert all(
            int(z.count_nonzero()) <= c.keep * 64 // c.groups
            for z, c in zip(slr.splitting.copies.values, slr.splitting.plan, strict=True)
        )
    assert kept == [36, 22, 17, 16, 16, 16, 16, 16]
    assert not any(r.residual for r in slr.history[4:])
    assert slr.rho_at(0.4) == 0.5
    assert slr.rho_at(0.6) == 0.0
    with torch.no_grad():
        parameters["a"] += 1.0
    slr.after_step()
    masks = slr.masks().tensors
    assert all(not parameters[n].detach()[~m].any() for n, m in masks.items())
    assert int(masks["a"].sum()) == 16


def test_without_a_step_size_the_multipliers_stay_zero() -> None:
    parameters = make_parameters()
    slr = SLR(parameters, PLANS["block"], 4, TighteningSettings(s0=0.0, hold=1.0))
    slr.start(lambda: 1.0)
    for k in range(4):
        slr.update(lambda k=k: -float(k))
    assert not any(m.any() for m in slr.splitting.multipliers)
    assert {r.step_size for r in slr.history} == {0.0}


def test_admm_whose_copy_follows_pulls_only_what_is_pruned() -> None:
    parameters = make_parameters()
    admm = ADMM(parameters, PLANS["unstructured"], 4, ADMMSettings(rho=2.0, follow=True))
    parameters["a"].grad = torch.zeros(8, 8)
    admm.add_penalty_gradient()
    kept = keep_largest(parameters["a"].detach(), 16) != 0
    torch.testing.assert_close(parameters["a"].grad, torch.where(kept, 0.0, 2.0 * parameters["a"].detach()))
