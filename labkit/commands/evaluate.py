"""`evaluate`: how often a policy succeeds in closed loop. The rollouts themselves are in labkit/rollouts.py."""

import json

HELP = "run a policy in the simulator and report its success with a 95 % interval"


def add_arguments(parser):
    parser.add_argument("--policy", default="tiny", help="tiny, tiny-early, tiny-middle, a folder, or a hub id (default: tiny)")
    parser.add_argument("--adapter", help="folder of a peft adapter to attach")
    parser.add_argument("--quantization", choices=("nf4",), help="load the weights in 4 bits")
    parser.add_argument("--task", default="pick", help="pick, put, put_held_out, move, beside, stack, forward, spatial, align, navigate or assemble")
    parser.add_argument("--episodes", type=int, default=100, help="number of episodes (default: 100)")
    parser.add_argument("--seed", type=int, default=1_000_000, help="seed of the first episode (default: 1000000)")
    parser.add_argument("--camera-shift", type=float, nargs=3, default=(0.0, 0.0, 0.0), metavar=("X", "Y", "Z"), help="metres")
    parser.add_argument("--light", type=float, default=1.0, help="brightness, 1 is normal")
    parser.add_argument("--held-out-phrasing", action="store_true", help="phrasings that pretraining never used")
    parser.add_argument("--instruction", choices=("own", "another"), default="own",
                        help="another: give the policy another valid instruction of the same scene (control)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")


def main(args):
    import numpy as np

    from labkit.policy import load_policy
    from labkit.quiet import quiet_libraries
    from labkit.rollouts import rollout
    from labkit.tabletop import Variation
    from labkit.tabletop.tasks import task_named

    if args.episodes < 1:
        raise ValueError(f"--episodes is {args.episodes}; at least one is needed")
    task_named(args.task)
    quiet_libraries()
    policy = load_policy(args.policy, quantization=args.quantization, adapter=args.adapter)
    result = rollout(
        policy, args.task, args.episodes, args.seed, Variation(camera_shift=tuple(args.camera_shift), light=args.light),
        args.held_out_phrasing, args.instruction, progress=not args.json,
    )
    low, high = result.interval
    p50, p95 = np.percentile(result.milliseconds, [50, 95])
    row = {
        "policy": args.policy, "task": args.task, "success": round(result.rate, 4), "low": round(low, 4), "high": round(high, 4),
        "episodes": args.episodes, "decisions": int(result.decisions.sum()), "ms_p50": round(float(p50), 2), "ms_p95": round(float(p95), 2),
    }
    if args.json:
        print(json.dumps(row))
        return 0
    print(result)
    print(f"{row['decisions']} decisions in {result.seconds:.1f} s; one decision alone takes {p50:.1f} ms (median), {p95:.1f} ms (95th percentile)")
    print(f"first waypoint {100 * np.median(result.position_error):.1f} cm from the expert's (median)")
    return 0
