"""Learning from recorded episodes: behaviour cloning, Diffusion-QL, QSM and TD3 on the same data.

    python benchmarks/offline_control.py HalfCheetah-v5 data/halfcheetah-medium.npz \\
        --out benchmarks/results/offline-halfcheetah.json

Each variant and seed is `--steps` gradient steps on the data set, then and at every `--eval-every`
steps `--episodes` episodes without exploration. "cloning" is Diffusion-QL's actor without its value
term; "gaussian cloning" is TD3's actor at a weight of 1000 on the recorded action. The behaviour's
own returns are those of the data set's episodes. Curves go into the JSON file as soon as they are
known and runs in it are not repeated. `--table` prints what the file holds, with interquartile
means over seeds and their 95% bootstrap intervals. `--cost` trains nothing: it counts what an
update costs in floating-point operations, from the traced programs.

A medium data set is recorded from a policy at about a third of its final return:

    qscore train sac HalfCheetah-v5 --steps 23000 --eval-every 1000 --out runs/medium
    qscore eval runs/medium --episodes 100 --explore --record data/halfcheetah-medium.npz
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from baselines import table
from curves import learning_curve, read, record

from qscore import QSM, TD3, DiffusionQL, Host, datasets, replay
from qscore.bench import matmul_flops
from qscore.critics import critic_loss, q_values
from qscore.train_host import Session

VARIANTS: dict[str, Any] = {
    "cloning": DiffusionQL(preset="offline", hidden=(256, 256), q_weight=0.0),
    "diffusion_ql": DiffusionQL(preset="offline", hidden=(256, 256)),
    "qsm": QSM(preset="offline"),
    "td3": TD3(preset="offline"),
    "gaussian cloning": TD3(preset="offline", bc_weight=1000.0),
}


def measure(
    algorithm: Any,
    environment: str,
    data: datasets.Dataset,
    steps: int,
    seed: int,
    every: int,
    episodes: int,
) -> dict[str, float]:
    """Mean evaluation return by gradient step of one training run."""
    session = Session(
        algorithm,
        Host(environment),
        seed,
        steps=steps,
        eval_episodes=episodes,
        data=data.rows,
        offline_steps=steps,
    )
    return learning_curve(session, steps, every)


def cost(environment: str) -> dict[str, dict[str, float]]:
    """Millions of floating-point operations, in matrix products, of an update per row of its batch.

    Of the diffusion actors also the actor's share: what is not the critics' step, which samples one
    next action and differentiates the critics once.
    """
    task = Host(environment).open()
    spec = task.spec
    task.close()
    costs = {}
    for name, algorithm in VARIANTS.items():
        rows, key = algorithm.batch_size, jr.key(0)
        state = jax.eval_shape(lambda a=algorithm: a.init(spec, key=jr.key(0)))
        batch = replay.empty_rows(spec, rows)

        def critics_step(state: Any, batch: Any, key: Any, algorithm: Any = algorithm) -> Any:
            actions = algorithm.chain.sample_batch(state.average_actor, batch.next_obs, key=key)
            next_q = q_values(state.target_critics, batch.next_obs, actions)
            loss = jax.grad(critic_loss, has_aux=True)
            return loss(state.critics, batch, jnp.min(next_q, axis=0))

        update = matmul_flops(lambda s, b, k, a=algorithm: a.update(s, b, key=k), state, batch, key)
        costs[name] = {"update": round(update / rows / 1e6, 3)}
        if hasattr(algorithm, "chain"):
            actor = update - matmul_flops(critics_step, state, batch, key)
            costs[name]["actor"] = round(actor / rows / 1e6, 3)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("environment")
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--eval-every", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=10, help="per evaluation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()

    if args.cost:
        print(json.dumps(cost(args.environment), indent=1))
        return
    if args.out is None:
        parser.error("--out names the file of results")
    if args.table:
        print(table(read(args.out)))
        return
    if args.dataset is None:
        parser.error("name the data set after the environment")
    if args.steps % args.eval_every:
        parser.error(f"--steps must be a multiple of --eval-every; {args.steps} is not")
    task = Host(args.environment).open()
    data = datasets.load(args.dataset, task)
    task.close()
    about = {
        "environment": args.environment,
        "data": {
            "sha256": data.sha256,
            "steps": len(data),
            "episodes": len(data.episodes),
            "mean_return": round(float(np.mean(data.returns)), 1),
        },
        "steps": args.steps,
        "episodes": args.episodes,
        "machine": f"{platform.machine()}, one core per run",
    }
    results = record(args.out, about, {})
    for seed in args.seeds:
        for name in args.only:
            if str(seed) in results["variants"].get(name, {}):
                continue
            request = (args.environment, data, args.steps, seed, args.eval_every, args.episodes)
            curve = measure(VARIANTS[name], *request)
            results = record(args.out, about, {name: {str(seed): curve}})
            print(f"{name}, seed {seed}: {curve}", flush=True)
    print(f"behaviour: {about['data']['mean_return']}")
    print(table(results))


if __name__ == "__main__":
    main()
