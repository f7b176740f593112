"""The martingale characterisation of Q, and estimators made from it.

State and action follow SDEs, z = (x, a), da = Psi dt + sigma_a dB. A function Q is the value of the
score Psi if and only if

    M_s = e^{-beta s} Q(s, Z_s) + int_0^s e^{-beta u} (r - lambda/2 |Psi|^2) du

is a martingale (CQSM, arXiv:2510.17122; Jia & Zhou 2022 for values). Its increment over a step of
length dt, `increment` below, has mean zero given the past exactly for the right Q, so

* *orthogonality*: E[xi dM] = 0 for every test function xi known at the step's start. With a Q that
  is linear in features, those are linear equations, `LeastSquares`.
* *martingale loss*: Q(t, Z_t) is the conditional mean of what the path earns from t on,
  `to_go`; regressing on that is the projection of the true Q. With features, `PathSums`.

dM is noise of order sqrt(dt) around a signal of order dt. Averages of xi dM therefore enter
without any further dt: step sizes are then per second and one choice serves every dt. Minimising
E[dM^2] does *not* find Q: as dt -> 0 that is the quadratic variation, least for a flat Q.
Nothing here knows about reinforcement learning.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Int

from qscore.types import AnyArray

FLOOR = 0.1
"""Least conditional variance that a weighted test function divides by, as a share of the mean."""

LEVERAGE_FLOOR = 0.03
"""The same for linear features, as a share of the variance that is usual at a row's `leverage`: it
grows with the fourth power of the state, so that a plain mean is that of the tails."""


def span(
    discount_rate: Float[Array, ""] | float, dt: Float[AnyArray, "*shape"]
) -> Float[AnyArray, "*shape"]:
    """int_0^dt e^{-beta u} du in seconds: (1 - e^{-beta dt}) / beta, and dt for beta = 0."""
    scaled = discount_rate * dt
    small = jnp.abs(scaled) < 1e-6
    ratio = -jnp.expm1(-scaled) / jnp.where(small, 1.0, scaled)
    return dt * jnp.where(small, 1.0 - 0.5 * scaled, ratio)


def increment(
    q: Float[AnyArray, "*shape"],
    q_next: Float[AnyArray, "*shape"],
    reward_rate: Float[AnyArray, "*shape"],
    penalty_rate: Float[AnyArray, "*shape"],
    dt: Float[AnyArray, "*shape"],
    *,
    discount_rate: Float[Array, ""] | float,
) -> Float[AnyArray, "*shape"]:
    """dM = e^{-beta dt} Q' - Q + (r - penalty) (1 - e^{-beta dt}) / beta, exact for constant rates.

    `penalty_rate` is lambda/2 |Psi|^2; both rates are averages over the step, per second.
    """
    earned = (reward_rate - penalty_rate) * span(discount_rate, dt)
    return jnp.exp(-discount_rate * dt) * q_next - q + earned


def to_go(
    reward_rate: Float[AnyArray, " steps"],
    penalty_rate: Float[AnyArray, " steps"],
    terminal: Float[Array, ""],
    dt: Float[AnyArray, " steps"],
    *,
    discount_rate: Float[Array, ""] | float,
) -> Float[AnyArray, " steps"]:
    """What a path earns from each of its steps on, discounted to that step: the regressand of the
    martingale loss sum_k (to_go_k - Q(t_k, Z_k))^2 dt_k."""
    earned = (reward_rate - penalty_rate) * span(discount_rate, dt)

    def back(value, inputs):
        now, length = inputs
        value = now + jnp.exp(-discount_rate * length) * value
        return value, value

    return jax.lax.scan(back, terminal, (earned, dt), reverse=True)[1]


def traces(
    gradients: Float[AnyArray, "steps params"],
    dt: Float[AnyArray, " steps"],
    *,
    decay_rate: float,
    discount_rate: float,
) -> Float[AnyArray, "steps params"]:
    """xi_k = sum_{j <= k} e^{-(kappa + beta) (t_k - t_j)} dQ/dtheta_j along one path.

    The decay is per second. A constant factor per step would fade to the plain gradient as
    dt -> 0. kappa -> inf is that gradient, kappa = 0 leads to the martingale loss's solution.
    """
    decay = jnp.exp(-(decay_rate + discount_rate) * dt)

    def step(trace, inputs):
        gradient, fade = inputs
        trace = trace + gradient
        return fade * trace, trace

    return jax.lax.scan(step, jnp.zeros_like(gradients[0]), (gradients, decay))[1]


def variance_weight(variance: Float[AnyArray, " batch"]) -> Float[AnyArray, " batch"]:
    """1 / v, with v floored at a tenth of its mean: the efficient weight of an orthogonality
    condition whose increment has the conditional variance v dt (Chamberlain 1987)."""
    positive = jnp.maximum(variance, 0.0)  # an estimate can be anything
    return 1.0 / jnp.maximum(positive, FLOOR * jnp.mean(positive) + 1e-12)


def leverage(phi: Float[AnyArray, "batch params"]) -> Float[AnyArray, " batch"]:
    """Mean square of each row's features, in units of the batch's typical ones.

    Typical is the geometric mean, which outliers do not move. Gaussian states have values about
    15 for quadratic features.
    """
    square = phi**2
    # of the values that are not zero: a feature that often is has no geometric mean otherwise
    there = (square > 1e-12).astype(square.dtype)
    logs = jnp.sum(there * jnp.log(jnp.maximum(square, 1e-12)), axis=0, keepdims=True)
    typical = jnp.exp(logs / jnp.maximum(jnp.sum(there, axis=0, keepdims=True), 1.0))
    return jnp.mean(square / typical, axis=1)


def unit_diagonal(
    gram: Float[Array, "params params"], *, ridge: float
) -> tuple[Float[Array, " params"], Float[Array, "params params"]]:
    """(unit, U gram U + ridge I) with U = diag(unit), of diagonal 1 but for the ridge.

    The ridge then means the same for every feature, whatever its size.
    """
    unit = jax.lax.rsqrt(jnp.maximum(jnp.abs(jnp.diagonal(gram)), 1e-30))
    return unit, unit[:, None] * gram * unit[None] + ridge * jnp.eye(len(unit))


def regress(
    gram: Float[Array, "features features"],
    gain: Float[Array, "features ..."],
    phi: Float[Array, "batch features"],
    target: Float[AnyArray, "batch ..."],
    weight: Float[Array, " batch"],
    *,
    keep: Float[Array, ""],
) -> tuple[
    Float[Array, "batch ..."],
    Float[Array, "features features"],
    Float[Array, "features ..."],
]:
    """A batch added to the sums of a weighted regression on phi: its fitted values, and the sums.

    What was in the sums counts `keep` times as much.
    """
    weighted = weight[:, None] * phi
    gram = keep * gram + weighted.T @ phi
    gain = keep * gain + jnp.tensordot(weighted.T, target, axes=1)
    unit, scaled = unit_diagonal(gram, ridge=1e-4)
    flat = unit[:, None] * gain.reshape(len(unit), -1)
    theta = unit[:, None] * jnp.linalg.solve(scaled, flat)
    return (phi @ theta).reshape(target.shape), gram, gain


class VarianceFit(eqx.Module):
    """Running sums of a regression of dM^2 / dt on quadratic features."""

    gram: Float[Array, "features features"]
    gain: Float[Array, " features"]

    @staticmethod
    def zeros(size: int) -> "VarianceFit":
        """Nothing seen yet."""
        return VarianceFit(1e-6 * jnp.eye(size), jnp.zeros(size))

    def weights(
        self,
        phi: Float[Array, "batch features"],
        increment: Float[Array, " batch"],
        dt: Float[Array, " batch"],
        *,
        keep: Float[Array, ""],
        shift: float,
    ) -> tuple[Float[Array, " batch"], "VarianceFit"]:
        """1 / (v + shift mean(v)), scaled to mean 1, and the sums after this batch.

        Without the shift, networks learn too little where v is large, and can run away there.
        """
        even = jnp.full(phi.shape[0], 1.0 / phi.shape[0])
        fitted, gram, gain = regress(self.gram, self.gain, phi, increment**2 / dt, even, keep=keep)
        variance = jnp.maximum(fitted, 0.0)
        weight = variance_weight(variance + shift * jnp.mean(variance))
        return jnp.asarray(weight / jnp.mean(weight)), VarianceFit(gram, gain)


class DiffusionFit(eqx.Module):
    """Running sums of a regression of dx dx' / dt on quadratic features: the diffusion S S'.

    With a gradient of Q it gives the variance of dM, (grad_x Q)' S S' grad_x Q per second. For a
    quadratic Q that is of the fourth degree in the state, out of reach of a regression of dM^2 on
    quadratic features.
    """

    gram: Float[Array, "features features"]
    gain: Float[Array, "features obs obs"]

    @staticmethod
    def zeros(size: int, obs_size: int) -> "DiffusionFit":
        """Nothing seen yet."""
        return DiffusionFit(1e-6 * jnp.eye(size), jnp.zeros((size, obs_size, obs_size)))

    def weights(
        self,
        phi: Float[Array, "batch features"],
        gradient: Float[Array, "batch obs"],
        change: Float[Array, "batch obs"],
        dt: Float[Array, " batch"],
        *,
        keep: Float[Array, ""],
    ) -> tuple[Float[Array, " batch"], "DiffusionFit"]:
        """1 / v for v = (grad_x Q)' S S' grad_x Q, scaled to mean 1, and the sums after this batch.

        `gradient` is grad_x Q where a step began, and `change` what it added to the observation.
        """
        size = leverage(phi)
        # dx dx' scatters with the square of its own mean, which grows as the features do
        light = jnp.asarray(1.0 / size / jnp.sum(1.0 / size))
        squares = change[:, :, None] * change[:, None] / dt[:, None, None]
        diffusion, gram, gain = regress(self.gram, self.gain, phi, squares, light, keep=keep)
        v = jnp.maximum(jnp.einsum("bi,bij,bj->b", gradient, diffusion, gradient), 0.0)
        usual = jnp.mean(v / size) + 1e-12
        weight = 1.0 / jnp.maximum(v, LEVERAGE_FLOOR * usual * size)
        return weight / jnp.mean(weight), DiffusionFit(gram, gain)


def mean_over_noise(
    function: Callable[[Float[Array, " act"]], Float[Array, " out"]],
    action: Float[Array, " act"],
    noise: Float[Array, "act act"],
) -> Float[Array, " out"]:
    """E f(a + noise xi) for xi ~ N(0, I), to second order in the noise: exact for a quadratic f."""
    second = jax.hessian(function)(action)
    return function(action) + 0.5 * jnp.einsum("fab,ac,bc->f", second, noise, noise)


def mean_in_box(
    action: Float[Array, " act"], noise: Float[Array, "act act"]
) -> Float[Array, " act"]:
    """E clip(action + noise xi, -1, 1) for xi ~ N(0, I)."""
    spread = jnp.maximum(jnp.linalg.norm(noise, axis=1), 1e-12)
    low, high = (-1.0 - action) / spread, (1.0 - action) / spread
    below, above = ndtr(low), ndtr(-high)
    shift = jnp.exp(-0.5 * low**2) - jnp.exp(-0.5 * high**2)
    inside = action * (1.0 - below - above) + spread * shift / math.sqrt(2.0 * math.pi)
    return inside + above - below


class PathSums(eqx.Module):
    """The martingale loss of Q = theta . phi as normal equations, gram theta = gain + shift theta.

    Regressing on what a path earns needs paths of the score itself. Where the actions followed
    another diffusion, with the score Psi_b, a path must also earn (Psi - Psi_b) . grad_a Q by Ito's
    formula, which is linear in theta: `shift`.

    With weights w dt in the regression:

    - `gram`: sum of w phi phi' dt.
    - `gain`: sum of w phi dt times the net reward to go.
    - `shift`: sum of w phi dt times (Psi - Psi_b) . grad_a phi' to go.
    """

    gram: Float[Array, "params params"]
    gain: Float[Array, " params"]
    shift: Float[Array, "params params"]


def path_sums(
    phi: Float[AnyArray, "steps params"],
    shift_rate: Float[AnyArray, "steps params"],
    net_rate: Float[AnyArray, " steps"],
    terminal: Float[Array, ""],
    weight: Float[AnyArray, " steps"],
    dt: Float[AnyArray, " steps"],
    *,
    discount_rate: Float[Array, ""] | float,
) -> PathSums:
    """The sums of one path that runs to the end of its horizon.

    `net_rate` is the reward rate less the penalty rate of the score that is evaluated, and
    `shift_rate` is (Psi - Psi_b) . grad_a phi, zero for the behaviour's own value. Any positive
    `weight` is right; the best is 1 over the variance of the reward to go.
    """

    free = jnp.zeros_like(dt)
    total = to_go(net_rate, free, terminal, dt, discount_rate=discount_rate)
    shift = jax.vmap(
        lambda rate: to_go(rate, free, jnp.zeros_like(terminal), dt, discount_rate=discount_rate),
        in_axes=1,
        out_axes=1,
    )(shift_rate)
    weighted = jnp.asarray(phi * (weight * dt)[:, None])
    return PathSums(weighted.T @ phi, weighted.T @ total, weighted.T @ shift)


def add_up(one: Callable[[Any], Any], paths: Any, *, chunk: int = 256) -> Any:
    """sum_i one(paths[i]) over the leading axis of a pytree, with `chunk` paths at a time in
    memory; the rest of an uneven division is a smaller chunk."""
    whole = jax.tree.leaves(paths)[0].shape[0] // chunk * chunk

    def block(paths: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jax.vmap(one)(paths))

    total = block(jax.tree.map(lambda leaf: leaf[whole:], paths))  # of no path at all: zeros
    blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk, *leaf.shape[1:]), paths)

    def step(total: Any, paths: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, block(paths)), None

    return jax.lax.scan(step, total, blocks)[0]


class FixedPoint(NamedTuple):
    """theta after the last round, and by how much every round changed Q.

    `changes` are relative to the new Q, both in L2 over the paths; the first is 1.
    """

    theta: Float[Array, " params"]
    changes: Float[Array, " rounds"]


def relative_change(apart: Float[Array, ""], new: Float[Array, ""]) -> Float[Array, ""]:
    """(apart / new)^(1/2) of two squared sizes; 0 for no change at all, 1 for one to zero."""
    ratio = jnp.where(new == 0.0, 1.0, apart / jnp.where(new == 0.0, 1.0, new))
    return jnp.where(apart == 0.0, 0.0, jnp.sqrt(ratio))


def off_policy_fixed_point(sums: PathSums, *, rounds: int, ridge: float = 1e-6) -> FixedPoint:
    """Regress, correct the regressand with the Q found, regress again: `rounds` regressions.

    The first one is without correction, which is right on the score's own paths. A correction only
    acts on earlier times of a path, so the rounds converge over every finite horizon (Picard's
    iteration), fast where (Psi - Psi_b) . grad_a Q over the horizon is small against Q. `ridge` is
    relative to each feature's own size.
    """
    unit, gram = unit_diagonal(sums.gram, ridge=ridge)
    factor = jax.scipy.linalg.cho_factor(gram)

    def regress(theta: Float[Array, " params"], _: None):
        target = unit * (sums.gain + sums.shift @ theta)
        new = unit * jax.scipy.linalg.cho_solve(factor, target)
        apart, size = ((v @ sums.gram @ v) for v in (new - theta, new))
        return new, relative_change(apart, size)

    theta, changes = jax.lax.scan(regress, jnp.zeros_like(unit), None, length=rounds)
    return FixedPoint(theta, changes)


DOUBLINGS = 20
"""Of the time over which growth is measured: until its unit is a millionth of a matrix's norm."""

STEEP = 0.05
"""1/s; how far above the growth rate of an inadmissible score the discount rate is put."""


class LeastSquares(eqx.Module):
    """Running sums of E[xi dM] = 0 for Q = theta . phi, per second, with forgetting.

    - `loss`: E xi (phi - e^{-beta dt} phi')' / dt.
    - `gram`: E xi phi'.
    - `gain`: E xi (r - penalty) span / dt.
    - `coupling`: E xi_k (grad_a phi_i . grad_a phi_j) at the next observation, over the features i
      and j that depend on the action: what `under` needs. None where the score is part of the sums.
    """

    loss: Float[Array, "params params"]
    gram: Float[Array, "params params"]
    gain: Float[Array, " params"]
    coupling: Float[Array, "params moved moved"] | None = None

    @staticmethod
    def zeros(size: int, moved: int | None = None) -> "LeastSquares":
        """Nothing seen yet; coupled if `moved` features depend on the action."""
        square = (size, size)
        coupling = None if moved is None else jnp.zeros((size, moved, moved))
        return LeastSquares(jnp.zeros(square), jnp.zeros(square), jnp.zeros(size), coupling)

    def under(
        self,
        potential: Float[Array, " moved"],
        moved: Int[np.ndarray, " moved"],
        *,
        score_cost: Float[Array, ""],
        penalty: float,
        discount_rate: Float[Array, ""] | float,
        dt: Float[Array, ""],
    ) -> "LeastSquares":
        """The equations for the score grad_a (potential . phi) / lambda, from coupled sums.

        A score adds dt Psi . grad_a phi' to phi', to first order in the step, and it costs
        lambda/2 |Psi|^2. Both are sums over the data times coefficients of the score: rows that
        were added under another score say as much about this one. `moved` are the features that
        depend on the action, `penalty` is the share of the cost that is charged, and `dt` stands
        for every row's step in the discount within it.
        """
        assert self.coupling is not None
        drift = self.coupling @ (potential / score_cost)
        cost = 0.5 * penalty * drift @ potential
        return LeastSquares(
            loss=self.loss.at[:, moved].add(-jnp.exp(-discount_rate * dt) * drift),
            gram=self.gram,
            gain=self.gain - cost * span(discount_rate, dt) / dt,
        )


def accumulate(
    sums: LeastSquares,
    test: Float[AnyArray, "batch params"],
    phi: Float[AnyArray, "batch params"],
    phi_next: Float[AnyArray, "batch params"],
    net_rate: Float[AnyArray, " batch"],
    dt: Float[AnyArray, " batch"],
    *,
    keep: Float[Array, ""],
    discount_rate: Float[Array, ""] | float,
    slope: Float[AnyArray, "batch moved act"] | None = None,
) -> LeastSquares:
    """Add a batch of steps; what was there counts `keep` times as much.

    `net_rate` is the reward rate less the penalty rate. Coupled sums take the reward rate alone,
    phi' without the first order of what the score adds to it, and `slope`, grad_a of those phi'
    that depend on the action.
    """
    rows = dt.shape[0]
    # in the form of a difference: phi and phi' agree to O(sqrt(dt)), and float32 must see the rest
    change = phi - phi_next - jnp.expm1(-discount_rate * dt)[:, None] * phi_next
    gain = net_rate * span(discount_rate, dt) / dt
    coupling = sums.coupling
    if coupling is not None:
        assert slope is not None
        pairs = jnp.sum(slope[:, :, None] * slope[:, None], axis=-1).reshape(rows, -1)
        coupling = keep * coupling + (test.T @ pairs / rows).reshape(coupling.shape)
    return LeastSquares(
        loss=keep * sums.loss + test.T @ (change / dt[:, None]) / rows,
        gram=keep * sums.gram + test.T @ phi / rows,
        gain=keep * sums.gain + test.T @ gain / rows,
        coupling=coupling,
    )


class Fit(NamedTuple):
    """A solution of the orthogonality equations.

    - `growth_rate`: spectral abscissa, per second, of the estimated generator on the features; NaN
      with a finite horizon.
    - `discount_rate`: the rate the equations were solved at, see `solve`.
    """

    theta: Float[Array, " params"]
    growth_rate: Float[Array, ""]
    discount_rate: Float[Array, ""]


def solve(
    sums: LeastSquares,
    *,
    discount_rate: Float[Array, ""] | float,
    finite_horizon: bool = False,
    margin: Float[Array, ""] | float = 0.0,
    ridge: float = 1e-6,
) -> Fit:
    """theta with E[xi dM] = 0, at the least discount rate at which the value is finite.

    On features that the generator maps into their span (quadratic ones, for a linear process) the
    estimated generator `beta - gram^-1 loss` says whether the present score is admissible: the
    value is finite if and only if its growth rate is below beta. Where it is not, the equations
    still have a solution, which means nothing. They are then solved at a discount rate `STEEP`
    (or `margin`, where that is more) above the growth rate: the value of a more short-sighted
    problem, whose greedy score is a better start for beta itself. Where the growth rate is within
    `margin` of beta, the value is finite but not yet to be estimated, and the rate is raised to
    their sum. With a finite horizon every score has a value, and the rate is raised by `margin`:
    little data determine a short-sighted value better. The first feature must be the constant.
    """
    size = sums.gram.shape[0]
    unit, gram = unit_diagonal(sums.gram, ridge=ridge)
    loss = unit[:, None] * sums.loss * unit[None]
    if finite_horizon:
        growth, rate = jnp.full((), jnp.nan), discount_rate + margin
    else:
        generator = discount_rate * jnp.eye(size) - jnp.linalg.solve(gram, loss)
        # the constant neither grows nor falls; what matters is growth modulo constants
        growth = spectral_abscissa(generator[1:, 1:])
        room = jnp.where(growth < discount_rate, margin, jnp.maximum(margin, STEEP))
        rate = jnp.maximum(discount_rate, growth + room)
    raised = loss + (rate - discount_rate) * gram
    theta = unit * jnp.linalg.solve(raised + ridge * jnp.eye(size), unit * sums.gain)
    return Fit(theta, growth, jnp.asarray(rate))


def spectral_abscissa(matrix: Float[Array, "size size"]) -> Float[Array, ""]:
    """The largest real part of an eigenvalue, from the growth of e^{s matrix} under squaring.

    Needs no eigenvalue routine, which accelerators lack.
    """
    step = 1.0 / jnp.maximum(jnp.linalg.norm(matrix), 1e-12)

    def square(_, carry):
        power, log, _ = carry
        power = power @ power
        scale = jnp.maximum(jnp.linalg.norm(power), 1e-30)
        return power / scale, 2.0 * log + jnp.log(scale), log

    power = jax.scipy.linalg.expm(matrix * step)
    size = jnp.linalg.norm(power)
    start = (power / size, jnp.log(size), jnp.zeros(()))
    _, log, before = jax.lax.fori_loop(0, DOUBLINGS, square, start)
    # the growth in the last half of the time: what a norm has on top of it is in both logarithms
    return (log - before) / (step * 2.0 ** (DOUBLINGS - 1))
