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
}


def claims_table(measured: dict[str, str]):
    """A table "the lecture says / you measured" to display.   measured: claim id -> what this notebook found, in words and numbers.

    Raises KeyError for an id that is not in CLAIMS.
    """
    from IPython.display import Markdown

    rows = [f"| {CLAIMS[key].says} ({CLAIMS[key].source}) | {found} |" for key, found in measured.items()]
    return Markdown("\n".join(["| the lecture says | you measured |", "| --- | --- |", *rows]))
