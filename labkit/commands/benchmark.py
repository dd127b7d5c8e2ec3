"""`benchmark`: speed as ratios against a peer in the same run. What is measured, and how, is in labkit/benchmarks.py."""

import json

HELP = "measure speed on this machine, as ratios: camera, fine_tune, evaluation, matrix_peak"


def add_arguments(parser):
    parser.add_argument("--only", action="append", metavar="NAME", help="only this one; may be given several times")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1, as in the lessons)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON a measurement")


def main(args):
    import torch

    from labkit.benchmarks import BENCHMARKS
    from labkit.quiet import quiet_libraries

    unknown = set(args.only or ()) - set(BENCHMARKS)
    if unknown:
        raise ValueError(f"unknown benchmark {sorted(unknown)[0]!r}; there are {', '.join(BENCHMARKS)}")
    quiet_libraries()
    torch.set_num_threads(args.threads)
    for name in args.only or BENCHMARKS:
        m = BENCHMARKS[name]()
        if args.json:
            print(json.dumps({"name": m.name, "ours": m.ours, "peer": m.peer, "unit": m.unit, "ratio": m.ratio, "note": m.note}), flush=True)
        else:
            print(f"{m.name:<12} {m.ours:10.1f} {m.unit:<15} peer {m.peer:10.1f}   ratio {m.ratio:6.2f}   {m.note}", flush=True)
    return 0
