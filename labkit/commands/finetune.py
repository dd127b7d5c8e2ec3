"""`finetune`: adapt a policy to demonstrations and save it. The training itself is in labkit/sft.py."""

HELP = "fine-tune a policy on a folder of demonstrations, fully or with LoRA, and save it"


def add_arguments(parser):
    parser.add_argument("--policy", default="tiny", help="tiny, a folder, or a hub id (default: tiny)")
    parser.add_argument("--demonstrations", required=True, help="folder in the lab sheet's layout")
    parser.add_argument("--limit", type=int, help="use only so many demonstrations")
    parser.add_argument("--out", required=True, help="folder for the model, or for the adapter with --lora-rank")
    parser.add_argument("--lora-rank", type=int, help="train a LoRA adapter of this rank instead of all parameters")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="default: 5e-4, with LoRA 1e-3")
    parser.add_argument("--seed", type=int, default=0)


def main(args):
    from labkit.demonstrations import read, samples
    from labkit.policy import load_policy
    from labkit.quiet import quiet_libraries
    from labkit.sft import fine_tune, lora

    quiet_libraries()
    data = samples(read(args.demonstrations, split="train", limit=args.limit))
    policy = load_policy(args.policy)
    config = lora(args.lora_rank) if args.lora_rank else None
    rate = args.learning_rate or (1e-3 if config else 5e-4)
    history = fine_tune(policy, data, args.steps, args.batch_size, rate, peft_config=config, seed=args.seed)
    policy.save(args.out)
    print(f"{history}\nsaved in {args.out}")
    return 0
