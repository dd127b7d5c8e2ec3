"""The parts of a lab report: what each asks the student to write, what records its numbers, and by which rubric a person marks it."""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "Lab report: fine-tuning a VLA for a task"


@dataclass(frozen=True)
class Part:
    """A piece of the report.   prompt: what the student writes about, in at least so many `words`.

    rubric: (points, criterion), for the person who marks it.   call: what records its numbers, or "".
    """

    title: str
    prompt: str
    words: int
    rubric: tuple[tuple[int, str], ...]
    call: str = ""


PARTS = {
    "dataset": Part(
        "1. Dataset description",
        "Which task is this, who or what demonstrated it, and how? What does the split keep apart? What is not in the data?", 40,
        ((1, "says who or what demonstrated the task, under which instructions, and what one decision holds, with units"),
         (1, "says what training, validation and test do not share, and why that matters for this task"),
         (1, "names something that the data do not show and that the robot will meet")),
        "dataset(folder)"),
    "training": Part(
        "2. Fine-tuning process",
        "Why these settings: what trains and what is frozen, at which rates, and how was the epoch chosen whose weights you keep?", 40,
        ((1, "says what trains and what is frozen, and why, with the number of parameters"),
         (1, "reads the curves: where training and validation part, and which epoch is kept"),
         (1, "says which settings were tried and left, or why none was")),
        "training(folder)"),
    "challenges": Part(
        "2a. Challenges",
        "What went wrong, or nearly? For each: what you saw, what you suspected, which measurement decided it, and what you changed.", 60,
        ((2, "two challenges, each with what was seen and the measurement that found its cause"),
         (1, "what was changed, and the number that shows whether it helped"),
         (1, "one that was not solved, or a cure that did not help, said openly"))),
    "comparison": Part(
        "3. Performance comparison",
        "What did fine-tuning gain and what did it cost? Use the intervals. Where do action error and success disagree, and why?", 60,
        ((1, "reads the paired differences with their intervals, and claims no difference where the interval holds zero"),
         (1, "relates the error by axis to success, in units, and says which axis or which decision matters"),
         (1, "says under which condition the policy is worst, and a reason that the data support"),
         (1, "says what the comparison cannot show: tasks, seeds, and conditions that were not run")),
        "comparison(generic, fine_tuned, accuracy, decisions)"),
    "integration": Part(
        "4. Integration results",
        "How does the robot do with the fine-tuned policy behind the server? Does it meet its deadline, and what happens when it does not?", 40,
        ((1, "compares success and response time through the server with the policy asked directly"),
         (1, "judges p95 and missed deadlines against what the robot's motion allows, not against a round number"),
         (1, "says what the robot does when an answer is late, refused or wrong")),
        "integration(server, served, alone)"),
    "improvements": Part(
        "5. Future improvements",
        "Propose two improvements, for data, training or deployment. For each: which number above it should change, by how much, and how you "
        "would measure it.", 60,
        ((2, "two proposals, each tied to a number of this report"),
         (1, "an experiment for each that could fail: what is measured, on how many episodes"))),
}
RECORDED = tuple(name for name, part in PARTS.items() if part.call)
POINTS = sum(points for part in PARTS.values() for points, _ in part.rubric)
