"""The matrix equation of linear-quadratic problems with multiplicative noise, and its flow.

    R(P) = F'P + PF + sum_j S_j'PS_j + M - PGG'P

For a fixed gain K it is linear in P, and R(P) is its minimum over gains, reached at K = -G'P:

    R_K(P) = (F+GK)'P + P(F+GK) + sum_j S_j'PS_j + M + K'K

So Newton's method for R(P) = 0 is policy iteration: solve R_K(P) = 0, set K = -G'P (Kleinman 1968;
with multiplicative noise Damm and Hinrichsen 2001). A gain is *admissible* where the linear part of
R_K has its spectrum in the open left half plane: the closed loop is stable in mean square.

`F`, `G`, `S` and `M` are here in any units. Discounting at rate beta shifts F by -beta/2, and a
weight lambda on K'K divides G by its square root. An *affine* equation has the constant 1 as its
last coordinate, so that P holds a quadratic, a linear and a constant part.

Everything is float64 in NumPy.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Matrix = Float[np.ndarray, "z z"]
Gain = Float[np.ndarray, "a z"]

STAGES = 7
STEP_TOLERANCE = 1e-11


class NotStabilizable(ValueError):
    """No admissible gain exists. `abscissa` is the smallest that was found, at least 0."""

    def __init__(self, abscissa: float) -> None:
        super().__init__(f"no gain is admissible; the smallest spectral abscissa is {abscissa:.6g}")
        self.abscissa = abscissa


class NoStabilizingSolution(ValueError):
    """Policy iteration leaves the admissible gains: R(P) = 0 has no stabilising solution."""


class FiniteEscape(ValueError):
    """The flow ceases to exist. `duration` is when."""

    def __init__(self, duration: float) -> None:
        super().__init__(f"the solution escapes to infinity after {duration:.6g}")
        self.duration = duration


class Equation(NamedTuple):
    """The data of R(P), `S` with all noise terms. If `affine`, the last coordinate is the 1."""

    F: Float[np.ndarray, "z z"]
    G: Float[np.ndarray, "z a"]
    S: Float[np.ndarray, "j z z"]
    M: Float[np.ndarray, "z z"]
    affine: bool = False

    @property
    def quadratic(self) -> "Equation":
        """The equation of the quadratic part of P alone."""
        if not self.affine:
            return self
        return Equation(self.F[:-1, :-1], self.G[:-1], self.S[:, :-1, :-1], self.M[:-1, :-1])

    def gain(self, P: np.ndarray) -> np.ndarray:
        """The greedy gain -G'P."""
        return -self.G.T @ P

    def terms(self, P: np.ndarray, K: np.ndarray) -> list[np.ndarray]:
        """R_K(P), term by term."""
        drift = P @ (self.F + self.G @ K)
        noise = np.sum(self.S.transpose(0, 2, 1) @ P @ self.S, axis=0)
        return [drift, drift.T, noise, self.M, K.T @ K]

    def rate(self, P: np.ndarray, K: np.ndarray) -> np.ndarray:
        """R_K(P), summed in extended precision where the machine has it.

        What is left of cancelling terms is then right to nearly all digits, and a Newton step from
        it also repairs the rounding errors of the steps before.
        """
        F, G, S, M = (part.astype(np.longdouble) for part in self[:4])
        long = Equation(F, G, S, M)
        terms = long.terms(P.astype(np.longdouble), K.astype(np.longdouble))
        return np.sum(terms, axis=0).astype(np.float64)

    def residual(self, P: np.ndarray, K: np.ndarray) -> float:
        """|R_K(P)| over the sum of its terms' norms, the worst of the parts of P."""
        terms = self.terms(P, K)
        rate = _parts(self, self.rate(P, K))
        size = [sum(norms) for norms in zip(*(_parts(self, term) for term in terms), strict=True)]
        return max(r / s if s > 0.0 else 0.0 for r, s in zip(rate, size, strict=True))

    def operator(self, K: np.ndarray) -> np.ndarray:
        """The linear part of R_K as a matrix on `pack`ed P; it maps no part to an earlier one."""
        basis, identity = _basis(len(self.F), self.affine)[0], np.eye(len(self.F))
        loop = (self.F + self.G @ K).T
        matrix = loop[:, None, :, None] * identity[None, :, None, :]
        matrix = matrix + identity[:, None, :, None] * loop[None, :, None, :]
        matrix = matrix + np.einsum("jki,jlm->imkl", self.S, self.S)
        return basis.T @ matrix.reshape(len(basis), -1) @ basis

    def abscissa(self, K: np.ndarray) -> float:
        """The spectral abscissa of the quadratic part under gain K; admissible if below 0.

        Its dominant eigenvector is positive semidefinite, so symmetric matrices are enough.
        """
        plain = self.quadratic
        gain = K[:, : len(plain.F)]
        if not plain.S.any():  # the spectrum is that of sums of two eigenvalues of the closed loop
            return 2.0 * float(np.linalg.eigvals(plain.F + plain.G @ gain).real.max())
        return float(np.linalg.eigvals(plain.operator(gain)).real.max())


def _parts(equation: Equation, P: np.ndarray) -> list[float]:
    """The norms of the quadratic, linear and constant part."""
    if not equation.affine:
        return [float(np.linalg.norm(P))]
    return [float(np.linalg.norm(part)) for part in (P[:-1, :-1], P[:-1, -1], P[-1, -1])]


@functools.cache
def _basis(size: int, affine: bool) -> tuple[np.ndarray, list[int]]:
    """An orthonormal basis of the symmetric matrices, as columns, part by part; where parts end."""
    pairs = [(i, j) for j in range(size) for i in range(j + 1)]  # the last coordinate comes last
    basis = np.zeros((size, size, len(pairs)))
    for column, (i, j) in enumerate(pairs):
        basis[i, j, column] = basis[j, i, column] = 1.0 if i == j else np.sqrt(0.5)
    ends = [len(pairs) - size, len(pairs) - 1, len(pairs)] if affine else [len(pairs)]
    return basis.reshape(size * size, -1), ends


def _pack(equation: Equation, P: np.ndarray) -> np.ndarray:
    return _basis(len(P), equation.affine)[0].T @ P.ravel()


def _unpack(equation: Equation, packed: np.ndarray) -> np.ndarray:
    size = len(equation.F)
    return (_basis(size, equation.affine)[0] @ packed).reshape(size, size)


def _solve_parts(matrix: np.ndarray, right: np.ndarray, ends: list[int]) -> np.ndarray:
    """Solve matrix[i, a, j, b] x[j, b] = right[i, a], part after part of the last axis.

    The matrix is block triangular in the parts. Taken one by one, a large constant leaves no
    rounding errors in the quadratic part, and a linear part that is zero stays so exactly.
    """
    x = np.zeros_like(right)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        part = slice(start, end)
        known = np.einsum("iajb,jb->ia", matrix[:, part, :, :start], x[:, :start])
        block = matrix[:, part, :, part].reshape((right[:, part].size,) * 2)
        x[:, part] = np.linalg.solve(block, (right[:, part] - known).ravel()).reshape(
            -1, end - start
        )
    return x


def _newton_step(equation: Equation, P: np.ndarray, K: np.ndarray) -> np.ndarray:
    """The P at which R_K vanishes."""
    ends = _basis(len(P), equation.affine)[1]
    right = -_pack(equation, equation.rate(P, K))[None]
    step = _solve_parts(equation.operator(K)[None, :, None], right, ends)[0]
    return P + _unpack(equation, step)


def evaluate(equation: Equation, K: Gain) -> Matrix:
    """The solution of R_K(P) = 0 for an admissible K."""
    P = np.zeros_like(equation.M)
    for _ in range(4):  # the first step solves, the others refine
        P = _newton_step(equation, P, K)
    return P


def optimize(equation: Equation, K: Gain) -> Matrix:
    """The stabilising solution of R(P) = 0 by policy iteration from an admissible K.

    Raises `NoStabilizingSolution` where there is none, which needs an indefinite M or a mode that
    M does not see.
    """
    P = evaluate(equation, K)
    for _ in range(200):
        K = equation.gain(P)
        if equation.abscissa(K) >= 0.0:
            break
        last, P = P, _newton_step(equation, P, K)
        # of the quadratic part, which the others follow: a large constant would hide it
        change, size = (_parts(equation, part)[0] for part in (P - last, P))
        if change <= 1e-8 * size:
            for _ in range(3):  # quadratic from here on: down to rounding
                P = _newton_step(equation, P, equation.gain(P))
            if equation.abscissa(equation.gain(P)) < 0.0:
                return P
            break
    raise NoStabilizingSolution("policy iteration leaves the admissible gains")


def stabilize(equation: Equation) -> Gain:
    """An admissible gain, by lowering an additional discount rate until none is left.

    At a discount rate above the abscissa of K = 0, that gain is admissible. The optimal gain for
    M = 1 there is admissible for lower rates as well, and so on down: the rates converge to the
    least abscissa that any gain has, because M = 1 keeps each gain off the boundary of its own.

    Raises `NotStabilizable` where that limit is not negative.
    """
    plain = equation.quadratic
    size, identity = len(plain.F), np.eye(len(plain.F))
    K = np.zeros(plain.G.T.shape)
    abscissa = plain.abscissa(K)
    scale = np.linalg.norm(plain.F) + np.linalg.norm(plain.S) ** 2
    gap = abs(abscissa) + scale
    while abscissa >= 0.0:
        if gap <= 1e-11 * scale:
            raise NotStabilizable(abscissa)
        shift = abscissa + 0.1 * gap
        shifted = plain._replace(F=plain.F - 0.5 * shift * identity, M=identity * 1.0)
        P = evaluate(shifted, K)
        for _ in range(50):
            last, P = P, _newton_step(shifted, P, shifted.gain(P))
            if np.linalg.norm(P - last) <= 0.1 * np.linalg.norm(P):
                break
        best = plain.abscissa(plain.gain(P))
        if best < abscissa:
            K, abscissa = plain.gain(P), best
        gap = shift - abscissa
    return np.hstack([K, np.zeros((len(K), len(equation.F) - size))])


def unobserved(
    sensor: Float[np.ndarray, "y z"], maps: Float[np.ndarray, "j z z"]
) -> Float[np.ndarray, "z u"]:
    """An orthonormal basis of what a sensor never sees: its kernel, as far as the maps keep it."""
    basis = np.eye(sensor.shape[1])
    while basis.shape[1]:
        outside = np.eye(len(basis)) - basis @ basis.T
        seen = [sensor @ basis / max(np.linalg.norm(sensor), 1e-300)]
        seen += [outside @ map @ basis / max(np.linalg.norm(map), 1e-300) for map in maps]
        _, values, rows = np.linalg.svd(np.vstack(seen))
        kept = rows[: basis.shape[1]][values <= 1e-13]
        if len(kept) == basis.shape[1]:
            break
        basis = basis @ kept.T
    return basis


def unseen(equation: Equation) -> Equation:
    """The quadratic equation, without control, on the states that M never sees.

    For M >= 0, and where a gain is admissible, R(P) = 0 has no solution P >= 0 but the stabilising
    one iff the abscissa of this is negative. Otherwise some covariance X >= 0 with MX = 0 does not
    decay without control; P = 0 on it costs nothing, and is the optimum (Damm 2004, *Rational
    Matrix Equations in Stochastic Control*).
    """
    F, _, S, M, _ = equation.quadratic
    basis = unobserved(M, np.array([F, *S]))
    maps = np.array([basis.T @ map @ basis for map in (F, *S)])
    return Equation(maps[0], np.zeros((len(maps[0]), 1)), maps[1:], np.zeros_like(maps[0]))


@functools.cache
def _radau() -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (0, 1] and matrix of the Radau IIA method, order 2 STAGES - 1, L-stable."""
    legendre = np.polynomial.legendre
    nodes = np.sort(legendre.legroots([0.0] * (STAGES - 1) + [-1.0, 1.0]))
    nodes[-1] = 1.0
    unit = np.eye(STAGES)
    values = np.stack([legendre.legval(nodes, row) for row in unit], axis=1)
    integrals = np.stack(
        [legendre.legval(nodes, legendre.legint(row, lbnd=-1)) for row in unit], axis=1
    )
    return (1.0 + nodes) / 2.0, 0.5 * integrals @ np.linalg.inv(values)


def _step(equation: Equation, P: np.ndarray, h: float, K: np.ndarray | None) -> np.ndarray | None:
    """One step of the flow by collocation, its equations solved by Newton's method; None if not."""
    _, weights = _radau()
    ends = _basis(len(P), equation.affine)[1]
    start = _pack(equation, P)
    stages = np.repeat(start[None], STAGES, axis=0)
    identity = np.einsum("ij,ab->iajb", np.eye(STAGES), np.eye(len(start)))
    smallest = np.inf
    for _ in range(15):
        rates, operators = [], []
        for packed in stages:
            value = _unpack(equation, packed)
            gain = equation.gain(value) if K is None else K
            rates.append(_pack(equation, np.sum(equation.terms(value, gain), axis=0)))
            operators.append(equation.operator(gain))
        defect = start + h * weights @ np.array(rates) - stages
        jacobian = identity - h * np.einsum("ij,jab->iajb", weights, np.array(operators))
        change = _solve_parts(jacobian, defect, ends)
        stages = stages + change
        # each part against those that act on it, as in `_difference`
        apart, norms = (
            np.sqrt(np.add.reduceat(np.sum(values**2, axis=0), [0, *ends[:-1]]))
            for values in (change, stages)
        )
        size = np.max(apart / (np.maximum.accumulate(norms) + 1e-300))
        if not np.isfinite(size):
            return None
        if size <= 1e-13 or (size <= 1e-9 and size >= 0.1 * smallest):  # rounding
            return _unpack(equation, stages[-1])
        smallest = min(size, smallest)
    return None


def _difference(
    equation: Equation, fine: np.ndarray, coarse: np.ndarray, seen: np.ndarray
) -> float:
    """The largest relative difference among the parts of P and of the gain, of sizes `seen`.

    A part that is small beside those that act on it need not be that precise. How large those are
    that it acts on says nothing: a large constant excuses no error of the gain.
    """
    seen = np.maximum(seen, _sizes(equation, fine))
    floor = 1e-4 * np.maximum.accumulate(seen) + 1e-300
    return float(np.max(_sizes(equation, fine - coarse) / np.maximum(seen, floor)))


def _sizes(equation: Equation, P: np.ndarray) -> np.ndarray:
    """The norms of the parts of P and of the gain, a part after those that act on it."""
    quadratic, *rest = _parts(equation, P)
    gain = equation.G.T @ P
    if not rest:
        return np.array([quadratic, np.linalg.norm(gain)])
    linear, constant = rest
    gains = np.linalg.norm(gain[:, :-1]), np.linalg.norm(gain[:, -1])
    return np.array([quadratic, gains[0], linear, gains[1], constant])


def flow(
    equation: Equation, P: Matrix, duration: float, K: Gain | None = None
) -> Iterator[tuple[float, Matrix, float]]:
    """dP/dt = R(P), or R_K(P) for a fixed K, from P at time 0: (time, P, error) after every step.

    Each step is taken once whole and once in halves; the halves are kept. `error` sums the relative
    differences, which are larger than the errors of what is kept.

    Raises `FiniteEscape` where the steps shrink to nothing, and `OverflowError` above 1e150.
    """
    time, error, seen = 0.0, 0.0, _sizes(equation, P)
    gain = equation.gain(P) if K is None else K
    h = min(duration, 1.0 / (float(np.linalg.norm(equation.operator(gain))) + 1e-300))
    while time < duration:
        if h <= 1e-9 * time:
            raise FiniteEscape(time)
        h = min(h, duration - time)  # which may be a rest by rounding
        whole = _step(equation, P, h, K)
        half = None if whole is None else _step(equation, P, 0.5 * h, K)
        halves = None if half is None else _step(equation, half, 0.5 * h, K)
        if whole is None or halves is None:
            difference = np.inf
        else:
            difference = _difference(equation, halves, whole, seen)
        if halves is not None and difference <= STEP_TOLERANCE:
            seen = np.maximum(seen, _sizes(equation, halves))
            last = duration - time <= h
            time, P, error = (duration if last else time + h), halves, error + difference
            if not np.linalg.norm(P) < 1e150:
                raise OverflowError
            yield time, P, error
        growth = 0.9 * (STEP_TOLERANCE / max(difference, 1e-300)) ** (1.0 / (STAGES + 1))
        h *= min(max(growth, 0.2), 4.0)
