"""What the lecture says in numbers, with where it says so, and the table that sets it beside what a notebook measured.

Quoted numbers live here and nowhere else; measured ones never do: a lesson computes them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One statement of the lecture or of a paper.   says: in our words.   source: where."""

    says: str
    source: str


CLAIMS = {
    "deployment-gap": Claim("75 % success on the benchmark can be 30 % on the robot where it is deployed", "lecture, purpose"),
    "semantic-invariance": Claim("many phrasings of one behaviour teach the policy to ignore the phrasing", "lecture, instruction tuning"),
    "composition": Claim("objects and goals learned apart combine without being trained together", "lecture, instruction tuning"),
    "sft-sum": Claim("the loss is the sum of -log p over the action tokens; instruction and observation are given", "lecture, instruction tuning"),
    "sft-mask": Claim("the mask zeroes every prefix position, so that gradients come from predicting actions alone", "lecture, instruction tuning"),
    "sft-same": Claim("SFT of language models uses the same formulation; only the predicted tokens differ", "lecture, instruction tuning"),
    "grounding": Claim("words like 'the leftmost' may not be resolved reliably; fine-tuning reinforces grounding", "lecture, instruction tuning"),
    "bins": Claim("256 bins a number; on [-1, 1] OpenVLA's are at worst 1/255 off", "OpenVLA, arXiv 2406.09246, code"),
    "adapter-share": Claim("bottleneck adapters with d = 4096 and m = 64 add about 0.3 % to a 7B model", "lecture, adapter modules"),
    "zero-init": Claim("with W_up = 0 (B = 0 in LoRA) the adapted model is the pretrained one at the start", "lecture, adapter modules and LoRA"),
    "warm-start": Claim("a start as the identity prevents the catastrophic early training of random adapters", "lecture, adapter modules"),
    "peft-forgetting": Claim("PEFT limits catastrophic forgetting by preserving most pretrained weights unchanged", "lecture, PEFT: the landscape"),
    "adapters-exact": Claim("the backbone is frozen, so what it could do before is preserved exactly", "lecture, avoiding catastrophic forgetting"),
    "lora-matrix": Claim("a 4096 x 4096 projection has 16.8M parameters; LoRA of rank 16 needs 131,072", "lecture, LoRA"),
    "lora-total": Claim("rank 16 on q, k, v, o in 32 layers adds about 16.8M parameters, 0.24 % of 7B", "lecture, LoRA"),
    "q1-10M": Claim("LoRA of rank 16 on all attention matrices has approximately 10M trainable parameters", "lecture, question 1"),
    "lora-range": Claim("LoRA of rank 4 to 32 modifies 0.1 to 1 % of the parameters", "lecture, LoRA"),
    "lora-vs-full": Claim("LoRA of rank 4 to 32 recovers most of the performance of full fine-tuning", "lecture, LoRA"),
    "lora-removed": Claim("the pretrained weights can be restored by removing the adapters", "lecture, LoRA"),
    "intrinsic-rank": Claim("the update that adapts a pretrained model to a new task has a low intrinsic rank", "lecture, LoRA"),
    "openvla-table-1": Claim("parameters trained by six strategies, in millions, 7188.1 to 97.6", "OpenVLA, arXiv 2406.09246, Table 1"),
    "qlora-4x": Claim("4-bit quantisation of the frozen backbone cuts memory by about 4", "lecture, LoRA"),
    "qlora-quality": Claim("QLoRA maintains the quality of fine-tuning", "lecture, LoRA"),
    "qlora-memory": Claim("QLoRA fine-tunes a 7B VLA in 20 to 30 GB", "lecture, LoRA"),
    "full-ft-memory": Claim("full fine-tuning of 7B in bf16 needs 80 to 120 GB", "lecture, LoRA"),
    "nf4-optimal": Claim("NormalFloat is information-theoretically optimal for normally distributed weights", "QLoRA, arXiv 2305.14314, section 3"),
    "openvla-memory": Claim("LoRA of OpenVLA-7B in bf16 takes at least about 27 GB, and 72 GB at batch 16", "OpenVLA, its README on GitHub"),
    "forgetting": Claim("fine-tuning on a new task alone loses the manipulation priors of pretraining", "lecture, the fine-tuning problem"),
    "ewc": Claim("EWC keeps old tasks by a penalty on changing parameters of high Fisher information", "lecture, avoiding catastrophic forgetting"),
    "mixing-simpler": Claim("data mixing is simpler than EWC and often more effective", "lecture, avoiding catastrophic forgetting"),
    "mixing-alpha": Claim("alpha = 0 forgets, alpha = 1 adapts slowly; typical values are 0.1 to 0.3", "lecture, avoiding catastrophic forgetting"),
    "mixing-kl": Claim("mixing is the principle of the KL-from-reference penalty, at the data level", "lecture, avoiding catastrophic forgetting"),
    "replay-2-percent": Claim("large pretrained VLAs need 2 % of replayed data", "arXiv 2603.03818"),
    "q1-tradeoff": Claim("30 demonstrations, 500 steps: full 90 % new and 40 % old, LoRA r=16 80 % and 65 %", "lecture, question 1"),
    "q4-below": Claim("mixing 80/20 for 200 steps: the loss on pretraining data falls below the original's", "lecture, question 4"),
    "few-shot-steps": Claim("10 to 50 demonstrations, LoRA of rank 8 to 32, 100 to 500 steps, under an hour", "lecture, few-shot adaptation"),
    "few-shot-matches": Claim("LoRA r=8 to 16 with 20 to 50 demonstrations can match full fine-tuning with more", "lecture, few-shot adaptation"),
    "preprocessing": Claim("recordings are preprocessed for synchronised observations and clean actions", "lecture, few-shot adaptation"),
    "memorising": Claim("a few demonstrations can be memorised; small variations in placement then fail", "lecture, the fine-tuning problem"),
    "camera-shift": Claim("a policy fine-tuned at one camera pose fails when the camera moves a few centimetres", "lecture, the fine-tuning problem"),
    "operator-habits": Claim("demonstrations of 2 to 3 operators generalise substantially better than those of one", "lecture, few-shot adaptation"),
    "representation": Claim("representation quality determines few-shot performance more than the adaptation algorithm", "lecture, GenAI context"),
    "adapter-files": Claim("a task's adapter stores only the compact A and B; the backbone is shared", "lecture, LoRA"),
    "adapter-swap": Claim("task-specific adapters are swapped at deployment without reloading the backbone", "lecture, LoRA"),
    "one-backbone": Claim("a single backbone serves several task contexts without forgetting any", "lecture, avoiding catastrophic forgetting"),
    "language-routing": Claim("the VLM's language features can route an instruction to the right adapter", "lecture, question 5"),
    "wrong-adapter": Claim("routing that selects the wrong adapter is a failure mode of its own", "lecture, question 5"),
    "same-instruction": Claim("instruction tuning on demonstrations is SFT on (prompt, response) pairs", "lecture, GenAI context"),
    "same-style": Claim("LoRA for a robot's task is LoRA for a language model's domain or style", "lecture, GenAI context"),
    "same-few-shot": Claim("few-shot robot adaptation is few-shot fine-tuning of a language model", "lecture, GenAI context"),
    "same-forgetting": Claim("catastrophic forgetting of tasks is that of a language model's abilities", "lecture, GenAI context"),
    "same-anchors": Claim("EWC and data mixing play the part of the KL from the reference in RLHF", "lecture, GenAI context"),
    "same-adapters": Claim("one backbone with an adapter for each task, robot and language model alike", "lecture, GenAI context"),
    "sheet-specialise": Claim("fine-tuning makes a general model do a special task with higher accuracy", "lab sheet 2, objective"),
    "sheet-readout": Claim("the towers' pooled outputs, side by side, are what the head acts on", "lab sheet 2, step 2"),
    "sheet-memory": Claim("tasks of many steps need a model with memory", "lab sheet 2, step 2"),
    "sheet-rates": Claim("learning rates: 1e-4 for the head, 5e-6 for the last two layers of the towers", "lab sheet 2, step 3"),
    "sheet-loss": Claim("one mean of squares over position and orientation", "lab sheet 2, step 3"),
    "sheet-evaluation": Claim("the model is evaluated by its loss on test data", "lab sheet 2, step 5"),
    "sheet-integration": Claim("the task-specific model replaces the generic one in the robot's node", "lab sheet 2, step 5"),
    "sheet-quantise": Claim("quantisation reduces size and improves inference speed", "lab sheet 2, step 6"),
    "sheet-static": Claim("a configuration, prepare and convert quantise the model", "lab sheet 2, step 6"),
    "sheet-cache": Claim("a cache for similar scenes or commands saves computing", "lab sheet 2, step 6"),
    "openvla-int8": Claim("8 bits succeed in 58.1 %, 16 in 71.3 and 4 in 71.9: the slow ones act late", "OpenVLA, arXiv 2406.09246, Table 2"),
    "sheet-overfitting": Claim("against overfitting: regularisation, less capacity, more diverse data", "lab sheet 2, troubleshooting"),
    "sheet-slow": Claim("against slow inference: quantisation, a simpler model, an edge runtime", "lab sheet 2, troubleshooting"),
    "sheet-forgetting": Claim("against forgetting: annealing, regularisation, progressive networks", "lab sheet 2, troubleshooting"),
    "sheet-transfer": Claim("against too little data: augmentation, synthetic data, transfer learning", "lab sheet 2, troubleshooting"),
    "sheet-little-data": Claim("against too little data: augmentation, synthetic data", "lab sheet 2, troubleshooting"),
}


def claims_table(measured: dict[str, str]):
    """A table "the lecture says / you measured" to display.   measured: claim id -> what this notebook found, in words and numbers.

    Raises KeyError for an id that is not in CLAIMS.
    """
    from IPython.display import Markdown

    rows = [f"| {CLAIMS[key].says} ({CLAIMS[key].source}) | {found} |" for key, found in measured.items()]
    return Markdown("\n".join(["| the lecture says | you measured |", "| --- | --- |", *rows]))
