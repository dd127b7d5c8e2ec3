"""`pretrain`: make the tiny VLA from nothing, measure it, write its model card. The recipe is in labkit/pretrain.py."""

HELP = "make the tiny VLA from nothing (about 80 minutes on two cores); run it again to go on after a stop"


def add_arguments(parser):
    parser.add_argument("--out", default="data/tiny_vla", help="folder of the checkpoint (default: data/tiny_vla)")
    parser.add_argument("--cache", default="data/.cache/pretrain", help="scenes and the resumable state (default: data/.cache/pretrain)")
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--scenes", type=int, help="labelled scenes (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="1 is as good as 2 for a model this small, and repeatable (default: 1)")
    parser.add_argument("--episodes", type=int, default=200, help="episodes for each row of the model card (default: 200)")
    parser.add_argument("--card-only", action="store_true", help="only measure the checkpoint again and write its card")


def main(args):
    from dataclasses import replace

    import torch

    from labkit.model_card import measure, write_card
    from labkit.paths import ROOT
    from labkit.pretrain import Recipe, pretrain
    from labkit.quiet import quiet_libraries

    quiet_libraries()
    out = ROOT / args.out
    chosen = {name: value for name in ("steps", "scenes") if (value := getattr(args, name)) is not None}
    if not args.card_only:
        pretrain(replace(Recipe(seed=args.seed), **chosen), out, ROOT / args.cache, args.threads)
    torch.set_num_threads(args.threads)
    evaluation = measure(out, args.episodes)
    for row in evaluation["rows"]:
        print(f"{row['suite']:<40} {row['task']:<14} {100 * row['success']:5.1f} %  ({100 * row['low']:.1f} to {100 * row['high']:.1f})")
    options = "".join(f" --{name} {value}" for name, value in chosen.items()) + (f" --seed {args.seed}" if args.seed else "")
    print(f"wrote {write_card(out, 'python -m labkit pretrain' + options)}")
    return 0
