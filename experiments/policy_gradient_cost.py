"""What an actor's step costs as the denoising chain gets longer, for QSM and Diffusion-QL.

    taskset -c 0 python experiments/policy_gradient_cost.py       # about five minutes
    python experiments/policy_gradient_cost.py --quick

QSM regresses its denoiser at one noise level, whatever their number T; Diffusion-QL differentiates
the critic through all T steps of the chain. Both have networks (256, 256) and batches of 256 at
HalfCheetah-v5's shapes. The actor's step is an update less its critics' step, which samples one
next action (T steps of the chain, undifferentiated, in both) and differentiates the critics once:
operations are those of matrix products in the traced programs, two per multiplication and addition;
milliseconds are medians of rounds in which all programs take turns.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from common import arguments, save
from matplotlib.figure import Figure

import qscore as qs
from qscore import replay
from qscore.bench import matmul_flops
from qscore.critics import critic_loss, q_values

ALGORITHMS = {"qsm": qs.QSM, "diffusion_ql": qs.DiffusionQL}
SPEC = qs.Spec(obs_size=17, action_size=6, dt=0.05)


def critics_step(algorithm: Any, state: Any, batch: qs.Transition, key: Any) -> Any:
    """A next action, its value, and the gradient of the critics' loss."""
    actions = algorithm.chain.sample_batch(state.average_actor, batch.next_obs, key=key)
    least = jnp.min(q_values(state.target_critics, batch.next_obs, actions), axis=0)
    return jax.grad(critic_loss, has_aux=True)(state.critics, batch, least)


def programs(name: str, levels: int) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Compiled calls of an update and of its critics' step, and their operations per row."""
    algorithm = ALGORITHMS[name](noise_levels=levels)
    rows = algorithm.batch_size
    state, key = algorithm.init(SPEC, key=jr.key(0)), jr.key(1)
    batch = jax.tree.map(
        lambda leaf: jr.uniform(key, leaf.shape, minval=-1.0) if leaf.ndim == 2 else leaf,
        replay.empty_rows(SPEC, rows),
    )
    parts = {
        "update": lambda state, batch, key: algorithm.update(state, batch, key=key),
        "critics": lambda state, batch, key: critics_step(algorithm, state, batch, key),
    }
    calls, operations = {}, {}
    for part, function in parts.items():
        compiled = jax.jit(function).lower(state, batch, key).compile()
        calls[part] = lambda compiled=compiled: jax.block_until_ready(compiled(state, batch, key))
        operations[part] = matmul_flops(function, state, batch, key) / rows / 1e6
    return calls, operations


def measure(levels: list[int], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Per algorithm, for each number of levels: operations and milliseconds."""
    made = {(name, T): programs(name, T) for name in ALGORITHMS for T in levels}
    times: dict[tuple[str, int, str], list[float]] = {}
    for turn in range(rounds + 1):
        for (name, T), (calls, _) in made.items():
            for part, call in calls.items():
                start = time.perf_counter()
                for _ in range(5):
                    call()
                if turn > 0:  # the first one is slow
                    spent = 1e3 * (time.perf_counter() - start) / 5
                    times.setdefault((name, T, part), []).append(spent)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ALGORITHMS}
    for (name, T), (_, operations) in made.items():
        update, critics = times[name, T, "update"], times[name, T, "critics"]
        actor = [one - other for one, other in zip(update, critics, strict=True)]
        results[name].append(
            {
                "noise_levels": T,
                "actor_million_operations": round(operations["update"] - operations["critics"], 3),
                "update_million_operations": round(operations["update"], 3),
                "actor_milliseconds": round(statistics.median(actor), 3),
                "update_milliseconds": round(statistics.median(update), 3),
            }
        )
    return results


def picture(results: dict[str, list[dict[str, float]]]) -> Figure:
    """Operations and time of the actor's step against the number of noise levels."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    titles = {
        "actor_million_operations": "million operations per row",
        "actor_milliseconds": "milliseconds",
    }
    for axes, (key, label) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, rows in results.items():
            axes.plot([r["noise_levels"] for r in rows], [r[key] for r in rows], "o-", label=name)
        axes.set(xlabel="noise levels T", ylabel=f"actor's step, {label}", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The results as Markdown."""
    lines = [
        "| T | qsm, million operations | diffusion_ql | qsm, ms | diffusion_ql |",
        "|---|---|---|---|---|",
    ]
    for one, other in zip(results["qsm"], results["diffusion_ql"], strict=True):
        cells = [
            f"{row[key]:.2f}"
            for key in ("actor_million_operations", "actor_milliseconds")
            for row in (one, other)
        ]
        lines.append(f"| {one['noise_levels']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "policy_gradient_cost").parse_args(argv)
    levels = [2, 5] if args.quick else [2, 5, 10, 20, 40]
    results = measure(levels, rounds=2 if args.quick else 9)
    print(table(results))
    save(args, {"algorithms": results}, picture(results))


if __name__ == "__main__":
    main()
