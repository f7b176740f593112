"""Linear-quadratic problems: the optimal score and its value in closed form.

State x, action a, z = (x, a). The score Psi drives the action, which lives in the state's time:

    dX = (A X + B a + f) dt + sum_j (C_j X + D_j a + e_j) dW_j,     da = Psi dt + sigma_a dB
    maximise  E int e^{-beta t} (r - lambda/2 |Psi|^2) dt,          r = -1/2 z'Mz + m'z + r0

over an infinite horizon, or up to a time T with the terminal reward -1/2 z'Hz + h1'z + h0. Then
Q = -1/2 z'Pz + p'z + c, and the best score is linear: Psi = grad_a Q / lambda = K z + k. With

    F = [A B; 0 0],  G = [0; I],  g = [f; 0],  S_j = [C_j D_j; 0 0],  s_j = [e_j; 0],

and the columns of [0; sigma_a] as further s_j, the Hamilton-Jacobi-Bellman equation reads

    -dP/dt = F'P + PF + sum S_j'P S_j + M - P GG' P/lambda - beta P
    -dp/dt = (F - GG'P/lambda)'p - P g - sum S_j'P s_j + m - beta p
    -dc/dt = p'g + |G'p|^2/(2 lambda) - 1/2 sum s_j'P s_j + r0 - beta c

with left sides zero in the infinite horizon. The action's own noise D_j enters the weight on the
state, since the score only moves the drift of a: the weight on the control stays lambda.

All three are one equation for [P -p; -p' -2c] in the coordinates (z, 1), which `qscore.riccati`
solves. Everything is float64 in NumPy, whatever JAX is set to.
"""

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qscore import riccati


class Unsolvable(ValueError):
    """A problem, or the evaluation of a score, without an answer; says which condition fails."""


LARGEST_RESIDUAL = 1e-6
"""Of an optimum that is given out."""

TOO_LARGE = "the solution is too large for double precision."


class Noise(NamedTuple):
    """One scalar Brownian motion's (C x + D a + e); what is None is zero."""

    C: Any = None
    """`float64[x, x]`, 1/sqrt(s)."""
    D: Any = None
    """`float64[x, a]`."""
    e: Any = None
    """`float64[x]`."""


class Terminal(NamedTuple):
    """The end of a finite horizon and its reward -1/2 z'Hz + h1'z + h0; what is None is zero."""

    T: float
    """Seconds, in (0, inf)."""
    H: Any = None
    """`float64[z, z]`; its symmetric part counts."""
    h1: Any = None
    """`float64[z]`."""
    h0: Any = None
    """A number."""


@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """A linear-quadratic problem; the equations are in the module's docstring.

    Anything that NumPy reads as numbers of the right shape is accepted, and kept as read-only
    float64. Raises `ValueError` that names the field, shows what it is and says what is right.
    """

    A: Float[np.ndarray, "x x"]
    """Drift of the state by the state, 1/s."""
    B: Float[np.ndarray, "x a"]
    """Drift of the state by the action."""
    f: Float[np.ndarray, " x"]
    """Constant drift of the state."""
    noise: tuple[Noise, ...]
    """The Brownian motions of the state, as (C, D, e) each."""
    sigma_a: Float[np.ndarray, "a a"]
    """Noise of the action; a number stands for that multiple of the identity."""
    M: Float[np.ndarray, "z z"]
    """Reward rate -1/2 z'Mz, reward/s; only the symmetric part counts, and is what is kept."""
    m: Float[np.ndarray, " z"]
    """Linear part of the reward rate."""
    r0: float
    """Constant part of the reward rate."""
    score_cost: float
    """lambda, in (0, inf)."""
    discount_rate: float
    """beta, 1/s, in [0, inf); above 0 where the horizon is infinite."""
    terminal: Terminal | None
    """End and terminal reward; None is an infinite horizon."""

    def __init__(
        self,
        *,
        A: Any,
        B: Any,
        f: Any = None,
        noise: Any = (),
        sigma_a: Any,
        M: Any,
        m: Any = None,
        r0: Any = 0.0,
        score_cost: Any,
        discount_rate: Any,
        terminal: Any = None,
    ) -> None:
        A = _array("A", A, None)
        n = len(A)
        B = _array("B", B, (n, None))
        d = B.shape[1]
        z = n + d
        if not isinstance(sigma_a, list | tuple | None) and np.ndim(sigma_a) == 0:
            sigma_a = np.eye(d) * _number("sigma_a", sigma_a)
        fields = {
            "A": A,
            "B": B,
            "f": _optional("f", f, (n,)),
            "noise": _noise(noise, n, d),
            "sigma_a": _array("sigma_a", sigma_a, (d, d), "or a number"),
            "M": _symmetric(_array("M", M, (z, z))),
            "m": _optional("m", m, (z,)),
            "r0": _number("r0", r0),
            "score_cost": _number("score_cost", score_cost, above=0.0),
            "discount_rate": _number("discount_rate", discount_rate, least=0.0),
            "terminal": None if terminal is None else _terminal(terminal, z),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen; this is its birth

    @property
    def state_size(self) -> int:
        return self.B.shape[0]

    @property
    def action_size(self) -> int:
        return self.B.shape[1]

    @property
    def F(self) -> Float[np.ndarray, "z z"]:
        """Drift of z by z: dz = (F z + G Psi + g) dt + sum_j (S_j z + s_j) dW_j."""
        return np.vstack([np.hstack([self.A, self.B]), np.zeros((self.action_size, len(self.M)))])

    @property
    def G(self) -> Float[np.ndarray, "z a"]:
        """Drift of z by the score."""
        return np.eye(len(self.M))[:, self.state_size :]

    @property
    def g(self) -> Float[np.ndarray, " z"]:
        """Constant drift of z."""
        return np.concatenate([self.f, np.zeros(self.action_size)])

    @property
    def S(self) -> Float[np.ndarray, "j z z"]:
        """Multiplicative noise of z: one term per `noise`, then a zero one per action component."""
        S = np.zeros((len(self.noise) + self.action_size, len(self.M), len(self.M)))
        for j, (C, D, _) in enumerate(self.noise):
            S[j, : self.state_size] = np.hstack([C, D])
        return S

    @property
    def s(self) -> Float[np.ndarray, "j z"]:
        """Additive noise of z: one term per `noise`, then one per column of `sigma_a`."""
        s = np.zeros((len(self.noise) + self.action_size, len(self.M)))
        for j, term in enumerate(self.noise):
            s[j, : self.state_size] = term.e
        s[len(self.noise) :, self.state_size :] = self.sigma_a.T
        return s

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> "Problem":
        """The problem in a JSON text, or in what such a text was read into.

        Raises `ValueError` (with the line, where the text is not JSON).
        """
        data = json.loads(source) if isinstance(source, str) else source
        known = [field.name for field in dataclasses.fields(cls)]
        required = [name for name in known if name not in ("f", "noise", "m", "r0", "terminal")]
        data = dict(_keys("the problem", data, known, required))
        noise = data.get("noise", [])
        if not isinstance(noise, list):
            raise ValueError(f"`noise` must be a list of objects with C, D and e, got {noise!r}.")
        data["noise"] = tuple(
            Noise(**_keys(f"`noise[{j}]`", term, Noise._fields)) for j, term in enumerate(noise)
        )
        if data.get("terminal") is not None:
            data["terminal"] = Terminal(
                **_keys("`terminal`", data["terminal"], Terminal._fields, ["T"])
            )
        return cls(**data)

    def read_score(self, source: str | Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """K and k of a score for this problem, from `{"K", "k"}` or from a solution's JSON.

        A `k` that is left out is zero. Raises `ValueError`.
        """
        data = json.loads(source) if isinstance(source, str) else source
        known = ["K", "k", *(f.name for f in dataclasses.fields(Solution) if f.name not in "Kk")]
        data = _keys("the score", data, known, ["K"])
        size = (self.action_size, len(self.M))
        return _array("K", data["K"], size), _optional("k", data.get("k"), size[:1])

    def to_json(self) -> str:
        """The problem as JSON; `from_json` gives back the same numbers."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if self.terminal is None:
            del fields["terminal"]
        return json.dumps(fields, allow_nan=False)


@dataclass(frozen=True, eq=False)
class Solution:
    """Q = -1/2 z'Pz + p'z + c at one time, and the score that is greedy for it, grad_a Q / lambda.

    - `residual`: infinite horizon: the norm of what is left of the equation over the sum of its
      terms' norms, the worst of P, p and c. Finite horizon: the sum, over the steps of the
      integration, of the relative difference that halving the step makes (the halves are kept).
    - `abscissa`: spectral abscissa, 1/s, of I(x)Fc' + Fc'(x)I + sum S_j'(x)S_j' - beta under the
      optimal or the evaluated score: the growth rate of e^{-beta t} E|z|^2.
    """

    P: Float[np.ndarray, "z z"]
    p: Float[np.ndarray, " z"]
    c: float
    K: Float[np.ndarray, "a z"]
    k: Float[np.ndarray, " a"]
    residual: float
    abscissa: float

    def q(self, z: Float[np.ndarray, "*batch z"]) -> Float[np.ndarray, "*batch"]:
        """Q(z)."""
        return np.asarray(z @ self.p - 0.5 * np.sum(z * (z @ self.P), axis=-1) + self.c)

    def gradient(self, z: Float[np.ndarray, "*batch z"]) -> Float[np.ndarray, "*batch a"]:
        """grad_a Q(z) = G'(p - P z)."""
        return (self.p - z @ self.P)[..., -len(self.k) :]

    def score(self, z: Float[np.ndarray, "*batch z"]) -> Float[np.ndarray, "*batch a"]:
        """The greedy score K z + k."""
        return z @ self.K.T + self.k

    def expected_q(self, mean: Float[np.ndarray, " z"], cov: Float[np.ndarray, "z z"]) -> float:
        """E Q(z) for z of this mean and covariance."""
        return float(self.q(mean) - 0.5 * np.sum(self.P * cov))

    def to_json(self) -> str:
        """`{"P", "p", "c", "K", "k", "residual", "abscissa"}`."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return json.dumps(fields, allow_nan=False)


def solve(problem: Problem, at: float = 0.0) -> Solution:
    """The optimal score and its Q; in a finite horizon those at time `at`, in [0, T] seconds.

    Raises `Unsolvable` and names the condition that fails.
    """
    equation = _equation(problem)
    with _named_failures(problem):
        if problem.terminal is not None:
            return _integrate(problem, equation, at, None)
        _check_infinite(problem, at)
        start = _stabilize(problem, equation)
        _check_detectable(problem, equation)
        P = riccati.optimize(equation, start)
        if _indefinite(problem):
            _check_attained(equation.quadratic, P[:-1, :-1])
        gain = equation.gain(P)
        solution = _solution(problem, equation, P, gain, equation.residual(P, gain))
        if solution.residual > LARGEST_RESIDUAL:
            raise Unsolvable(
                f"the equation is only solved to {solution.residual:.1e} of its terms: the problem "
                "is too badly scaled for double precision."
            )
        return solution


def evaluate(
    problem: Problem,
    K: Float[np.ndarray, "a z"],
    k: Float[np.ndarray, " a"] | None = None,
    at: float = 0.0,
) -> Solution:
    """Q of the fixed score Psi = K z + k, and in `K`, `k` of the result the score greedy for it.

    Raises `Unsolvable` where the score is not admissible: in an infinite horizon it must keep
    e^{-beta t} E|z|^2 falling.
    """
    equation = _equation(problem)
    gain = _gain(problem, K, k)
    with _named_failures(problem):
        if problem.terminal is not None:
            return _integrate(problem, equation, at, gain)
        _check_infinite(problem, at)
        growth = equation.abscissa(gain)
        if growth >= 0.0:
            raise Unsolvable(
                f"the score is not admissible: under it e^(-beta t) E|z|^2 grows at the rate "
                f"{growth:.6g} (the abscissa), which must be negative."
            )
        P = riccati.evaluate(equation, gain)
        return _solution(problem, equation, P, gain, equation.residual(P, gain))


def kleinman(
    problem: Problem, K: Float[np.ndarray, "a z"], k: Float[np.ndarray, " a"] | None = None
) -> Iterator[Solution]:
    """Policy iteration: `evaluate` a score, then the score greedy for that, and so on for ever.

    For an infinite horizon, and from an admissible score: P falls from step to step, in the end
    quadratically fast (Kleinman 1968).
    """
    if problem.terminal is not None:
        raise ValueError("`kleinman` iterates scores constant in time; remove the `terminal`.")

    def iterates(K: Any, k: Any) -> Iterator[Solution]:
        while True:
            solution = evaluate(problem, K, k)
            yield solution
            K, k = solution.K, solution.k

    return iterates(K, k)


def abscissa(problem: Problem, K: Float[np.ndarray, "a z"]) -> float:
    """The growth rate, 1/s, of e^{-beta t} E|z|^2 under a score with this gain."""
    return _equation(problem).abscissa(_gain(problem, K, None))


def admissible(problem: Problem, K: Float[np.ndarray, "a z"]) -> bool:
    """Whether a score with this gain has a finite value in an infinite horizon."""
    return abscissa(problem, K) < 0.0


def admissible_gain(problem: Problem) -> Float[np.ndarray, "a z"]:
    """Some admissible K. Raises `Unsolvable` where there is none."""
    with _named_failures(problem):
        gain = _stabilize(problem, _equation(problem))
    return gain[:, :-1] / math.sqrt(problem.score_cost)


def average_value(
    problem: Problem,
    K: Float[np.ndarray, "a z"],
    k: Float[np.ndarray, " a"],
    mean: Float[np.ndarray, " z"],
    cov: Float[np.ndarray, "z z"],
) -> float:
    """The expected return of a fixed score from z(0) of this mean and covariance.

    It includes the score's cost -lambda/2 |Psi|^2.
    """
    return evaluate(problem, K, k).expected_q(mean, cov)


def relative_error(
    exact: Solution,
    *,
    P: Float[np.ndarray, "z z"] | None = None,
    p: Float[np.ndarray, " z"] | None = None,
    c: float | None = None,
    K: Float[np.ndarray, "a z"] | None = None,
    k: Float[np.ndarray, " a"] | None = None,
) -> dict[str, float]:
    """Relative L2 errors over z ~ N(0, I) of what is given, in closed form.

    `{"q"}` where P, p and c are given, `{"grad_a_q"}` where P and p are, `{"score"}` where K and k
    are: sqrt(E|approximate - exact|^2 / E|exact|^2). Of P the symmetric part counts, as in z'Pz.
    """
    errors = {}
    if P is not None and p is not None:
        d, P = len(exact.k), 0.5 * (P + P.T)
        if c is not None:
            apart = _q_norm(P - exact.P, p - exact.p, c - exact.c)
            errors["q"] = ratio(apart, _q_norm(exact.P, exact.p, exact.c))
        apart = _linear_norm((P - exact.P)[-d:], (p - exact.p)[-d:])
        errors["grad_a_q"] = ratio(apart, _linear_norm(exact.P[-d:], exact.p[-d:]))
    if K is not None and k is not None:
        apart = _linear_norm(K - exact.K, k - exact.k)
        errors["score"] = ratio(apart, _linear_norm(exact.K, exact.k))
    return errors


def _q_norm(P: np.ndarray, p: np.ndarray, c: float) -> float:
    """sqrt(E q^2): q has the mean c - tr P/2 and the variance |p|^2 + tr P^2/2."""
    return math.sqrt((c - 0.5 * np.trace(P)) ** 2 + p @ p + 0.5 * np.sum(P * P))


def _linear_norm(K: np.ndarray, k: np.ndarray) -> float:
    """sqrt(E|K z + k|^2)."""
    return math.sqrt(np.sum(K * K) + k @ k)


def ratio(apart: float, size: float) -> float:
    """A relative error. Where what is exact is 0 it is infinite, or 0 where nothing is apart."""
    if apart == 0.0:
        return 0.0
    return apart / size if size > 0.0 else math.inf


# The homogeneous equation, and what its parts mean.


def _equation(problem: Problem) -> riccati.Equation:
    """The equation of [P -p; -p' -2c] in the coordinates (z, 1)."""

    def border(matrix: np.ndarray, column: np.ndarray) -> np.ndarray:
        return np.vstack([np.hstack([matrix, column[:, None]]), np.zeros(len(matrix) + 1)])

    size, beta = len(problem.M), problem.discount_rate
    noise = [border(S, s) for S, s in zip(problem.S, problem.s, strict=True)]
    G = np.vstack([problem.G, np.zeros(problem.action_size)])
    return riccati.Equation(
        F=border(problem.F, problem.g) - 0.5 * beta * np.eye(size + 1),
        G=G / math.sqrt(problem.score_cost),
        S=np.array(noise),
        M=_bordered(problem.M, problem.m, problem.r0),
        affine=True,
    )


def _bordered(P: np.ndarray, p: np.ndarray, c: float) -> np.ndarray:
    """The matrix X with -1/2 (z, 1)'X(z, 1) = -1/2 z'Pz + p'z + c."""
    return np.vstack([np.hstack([P, -p[:, None]]), np.append(-p, -2.0 * c)])


def _gain(problem: Problem, K: Any, k: Any) -> np.ndarray:
    """sqrt(lambda) [K k], the gain of a score in the equation's units."""
    d, z = problem.G.shape[1], len(problem.M)
    gain = np.hstack([_array("K", K, (d, z)), _optional("k", k, (d,))[:, None]])
    return math.sqrt(problem.score_cost) * gain


def _solution(
    problem: Problem, equation: riccati.Equation, X: np.ndarray, gain: np.ndarray, residual: float
) -> Solution:
    greedy = equation.gain(X) / math.sqrt(problem.score_cost)
    parts = (X[:-1, :-1], -X[:-1, -1], float(-0.5 * X[-1, -1]), greedy[:, :-1], greedy[:, -1])
    solution = Solution(*parts, residual, equation.abscissa(gain))
    if not all(np.all(np.isfinite(_plain(part))) for part in vars(solution).values()):
        raise Unsolvable(TOO_LARGE)
    return solution


def _integrate(
    problem: Problem, equation: riccati.Equation, at: float, gain: np.ndarray | None
) -> Solution:
    """From T back to `at`."""
    assert problem.terminal is not None
    T, H, h1, h0 = problem.terminal
    if not 0.0 <= at <= T:
        raise ValueError(f"`at` must lie in [0, {T:g}], the problem's horizon; got {at!r}.")
    X, residual = _bordered(H, h1, h0), 0.0
    try:
        for _, X, residual in riccati.flow(equation, X, T - at, gain):  # noqa: B007, B020
            pass
    except riccati.FiniteEscape as escape:
        raise Unsolvable(
            f"finite escape: the value is infinite at t = {T - escape.duration:.6g} and before, "
            f"because `M` or `terminal.H` is indefinite; `at` or `terminal.T` must be such that "
            f"less than {escape.duration:.6g} s are left."
        ) from None
    return _solution(problem, equation, X, equation.gain(X) if gain is None else gain, residual)


# The conditions under which there is a solution.


@contextlib.contextmanager
def _named_failures(problem: Problem) -> Iterator[None]:
    """Failures of the linear algebra as `Unsolvable`; its overflows are found in the result."""
    with np.errstate(all="ignore"):
        try:
            yield
        except riccati.NoStabilizingSolution:
            raise Unsolvable(
                "the Riccati equation has no stabilising solution, because `M` is indefinite: the "
                "reward is not bounded above, or its supremum is not attained."
                if _indefinite(problem)
                else "not mean-square stabilisable to working precision: the problem is too close "
                "to the boundary of what can be stabilised."
            ) from None
        except OverflowError:
            raise Unsolvable(TOO_LARGE) from None
        except np.linalg.LinAlgError as error:
            raise Unsolvable(f"the equations are too ill-conditioned to solve: {error}.") from None


def _check_infinite(problem: Problem, at: float) -> None:
    if at != 0.0:
        raise ValueError(f"`at` needs a problem with a `terminal`; this one has none, got {at!r}.")
    if problem.discount_rate == 0.0:
        raise Unsolvable(
            "`discount_rate` is 0 and the horizon infinite, so that Q is infinite (its constant "
            "c is); discount, or give a `terminal`."
        )


def _indefinite(problem: Problem) -> bool:
    return bool(np.linalg.eigvalsh(problem.M)[0] < -1e-13 * np.linalg.norm(problem.M))


def _stabilize(problem: Problem, equation: riccati.Equation) -> np.ndarray:
    half = 0.5 * problem.discount_rate
    unreached = riccati.unobserved(problem.B.T, problem.A.T[None])
    modes = np.linalg.eigvals(unreached.T @ problem.A.T @ unreached)
    if modes.size and modes.real.max() >= half:
        raise Unsolvable(
            f"not stabilisable: the mode of `A` with eigenvalue {_show(modes)} grows at least like "
            f"e^(beta t/2), beta/2 = {half:g}, and `B` does not reach it."
        )
    try:
        return riccati.stabilize(equation)
    except riccati.NotStabilizable as failure:
        least = failure.abscissa
    if not equation.S[:, :-1, :-1].any():
        raise Unsolvable(
            f"not stabilisable to working precision: `B` hardly reaches a mode of `A` with real "
            f"part {0.5 * least + half:.6g}, which grows at least like e^(beta t/2), beta/2 = "
            f"{half:g}."
        )
    state_noise = equation.S.copy()
    state_noise[:, :, problem.state_size : -1] = 0.0
    try:
        riccati.stabilize(equation._replace(S=state_noise))
        cause = "the noise that the action multiplies (`D`) is beyond the uncertainty threshold"
    except riccati.NotStabilizable:
        cause = "the noise that the state multiplies (`C`) is too strong where `B` hardly reaches"
    raise Unsolvable(
        f"not mean-square stabilisable: {cause}; e^(-beta t) E|z|^2 decays under no linear score "
        f"(smallest growth rate {least:.6g})."
    )


def _check_detectable(problem: Problem, equation: riccati.Equation) -> None:
    unseen, half = riccati.unseen(equation), 0.5 * problem.discount_rate
    if not unseen.F.size:
        return
    growth = unseen.abscissa(unseen.G.T)
    if growth >= -1e-13 * np.linalg.norm(unseen.F):
        raise Unsolvable(
            f"not detectable: the reward (`M`) does not see the mode with eigenvalue "
            f"{_show(np.linalg.eigvals(unseen.F) + half)}, along which e^(-beta t) E|z|^2 does not "
            f"decay without control (growth rate {growth:.6g}, beta/2 = {half:g})."
        )


def _check_attained(equation: riccati.Equation, P: np.ndarray) -> None:
    """With an indefinite M: that the stabilising P is the limit of ever longer finite horizons.

    Where it is not, scores that let z grow earn more than every admissible one.
    """
    try:
        for steps, (_, finite, _) in enumerate(riccati.flow(equation, np.zeros_like(P), math.inf)):
            if np.linalg.norm(finite - P) <= 1e-6 * np.linalg.norm(P):
                return
            if steps > 2000 or equation.residual(finite, equation.gain(finite)) < 1e-12:
                break
    except riccati.FiniteEscape as escape:
        raise Unsolvable(
            f"finite escape: `M` is indefinite, and over {escape.duration:.6g} s without terminal "
            f"reward the value is already infinite."
        ) from None
    raise Unsolvable(
        "`M` is indefinite, and the stabilising solution is not the optimum: scores that let z "
        "grow earn more."
    )


def _show(modes: np.ndarray) -> str:
    """The fastest of some eigenvalues."""
    mode = max(map(complex, modes), key=lambda mode: mode.real)
    return f"{mode.real:.6g}" + (f"{mode.imag:+.6g}i" if abs(mode.imag) > 1e-12 else "")


# Reading numbers.


def _noise(noise: Any, n: int, d: int) -> tuple[Noise, ...]:
    if not isinstance(noise, list | tuple):
        raise ValueError(f"`noise` must be a list of (C, D, e), got {_brief(noise)}.")
    for j, term in enumerate(noise):
        if not isinstance(term, tuple) or len(term) > 3:
            raise ValueError(f"`noise[{j}]` must be a tuple (C, D, e), got {_brief(term)}.")
    return tuple(
        Noise(
            _optional(f"noise[{j}].C", term.C, (n, n)),
            _optional(f"noise[{j}].D", term.D, (n, d)),
            _optional(f"noise[{j}].e", term.e, (n,)),
        )
        for j, term in enumerate(Noise(*term) for term in noise)
    )


def _terminal(terminal: Any, z: int) -> Terminal:
    if not isinstance(terminal, tuple) or not 1 <= len(terminal) <= 4:
        raise ValueError(f"`terminal` must be a Terminal or None, got {_brief(terminal)}.")
    T, H, h1, h0 = Terminal(*terminal)
    return Terminal(
        _number("terminal.T", T, above=0.0),
        _symmetric(_optional("terminal.H", H, (z, z))),
        _optional("terminal.h1", h1, (z,)),
        _number("terminal.h0", 0.0 if h0 is None else h0),
    )


def _array(name: str, value: Any, shape: tuple[int | None, ...] | None, other: str = "") -> Any:
    """`value` as a read-only float64 array of this shape; None is any, or any square matrix."""
    _check_numbers(name, value)
    try:
        array = np.array(value, dtype=np.float64)
    except (ValueError, OverflowError):
        raise ValueError(f"`{name}` has rows of different lengths; got {_brief(value)}.") from None
    if shape is None:
        right = array.ndim == 2 and array.shape[0] == array.shape[1] > 0
        rule = "a square matrix"
    else:
        fits = [want in (None, got) for want, got in zip(shape, array.shape, strict=False)]
        right = array.ndim == len(shape) and all(fits) and array.size > 0
        rule = " x ".join("any" if size is None else str(size) for size in shape)
        rule = f"of shape {rule}" if len(shape) > 1 else f"a list of {rule}"
        rule += f" {other}" if other else ""
    if not right:
        got = " x ".join(map(str, array.shape)) or f"the number {value!r}"
        raise ValueError(f"`{name}` must be {rule}, got {got}.")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{name}` must hold finite numbers, got {_brief(value)}.")
    array.setflags(write=False)
    return array


def _optional(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """The same, and zeros for None."""
    return _array(name, np.zeros(shape) if value is None else value, shape)


def _check_numbers(name: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _check_numbers(name, item)
    elif isinstance(value, bool | str | bytes | Mapping) or value is None:
        raise ValueError(f"`{name}` must hold numbers, got {value!r}.")
    elif np.asarray(value).dtype.kind not in "iuf":
        raise ValueError(f"`{name}` must hold real numbers, got {_brief(value)}.")


def _number(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf) -> float:
    if (
        isinstance(value, bool | str | bytes | list | tuple)
        or np.ndim(value)
        or np.asarray(value).dtype.kind not in "iuf"
    ):
        raise ValueError(f"`{name}` must be a number, got {_brief(value)}.")
    number = float(value)
    if not (math.isfinite(number) and number > above and number >= least):
        low = f"({above:g}" if above > least else f"[{least:g}" if least > above else "(-inf"
        raise ValueError(f"`{name}` must lie in {low}, inf), got {value!r}.")
    return number


def _keys(name: str, value: Any, known: Any, required: Any = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} must be an object with the keys {', '.join(known)}; got {_brief(value)}."
        )
    for key in value:
        if key not in known:
            closest = difflib.get_close_matches(str(key), known, 1, cutoff=0.5)
            hint = f"; the closest is {closest[0]!r}" if closest else ""
            raise ValueError(f"{name} has an unknown key {key!r}{hint}. Known: {', '.join(known)}.")
    for key in required:
        if key not in value:
            raise ValueError(f"{name} lacks the key {key!r}.")
    return value


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    matrix = 0.5 * matrix + 0.5 * matrix.T
    matrix.setflags(write=False)
    return matrix


def _plain(value: Any) -> Any:
    """Arrays as lists and named tuples as objects, for JSON."""
    if isinstance(value, Noise | Terminal):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
