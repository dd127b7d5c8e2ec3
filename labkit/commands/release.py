"""`release`: the students' bundle. What is in it, and what is not, is in labkit/grading/release.py."""

from pathlib import Path

HELP = "make the students' bundle: lessons without solutions, the package without the grader, the data, a README"


def add_arguments(parser):
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; it must not be there, or be empty")
    parser.add_argument("--assignment", type=Path, metavar="FILE", help="the assignment (data/assignments/ has an example); without one, all lessons")
    parser.add_argument("--also", action="append", default=[], metavar="NOTEBOOK", help="a lesson (06, say) to put in as well, not graded")
    parser.add_argument("--zip", action="store_true", help="also make OUT.zip, to hand out")
    parser.add_argument("--force", action="store_true", help="replace an earlier bundle")


def main(args):
    from labkit.grading.assignment import default_assignment, read_assignment
    from labkit.grading.release import bundle, lessons, write
    from labkit.notebooks import find_notebook, list_notebooks

    assignment = read_assignment(args.assignment) if args.assignment else default_assignment()
    also = [find_notebook(name, assignment.source).stem for name in args.also]
    if not args.assignment:
        also = [path.stem for path in list_notebooks(assignment.source)]
    files = bundle(assignment, also)
    written = write(files, args.out, replace=args.force, also_zip=args.zip)
    print(f"{assignment.title} ({assignment.name}), release {assignment.release}\n")
    print(table(lessons(assignment, also)))
    print(f"\n{len(files)} files, {sum(map(len, files.values())) / 2**20:.1f} MiB, without solutions, hidden tests and the grader, in")
    print(*written, sep="\n")
    print("Try it as a student would: python3 -m labkit lab, in that folder.")
    return 0


def table(found):
    """What is in the bundle, a line for each lesson; one without points is not graded."""
    width = max(len(lesson.notebook) for lesson in found)
    lines = [f"{'notebook':<{width}}  exercises  questions  points"]
    for lesson in found:
        counts = (len(lesson.exercises), len(lesson.questions), f"{lesson.points:g}") if lesson.points else ("-", "-", "-")
        lines.append(f"{lesson.notebook:<{width}}  {counts[0]:>9}  {counts[1]:>9}  {counts[2]:>6}")
    total = sum(lesson.points for lesson in found)
    lines.append(f"{'all':<{width}}  {sum(len(x.exercises) for x in found):>9}  {sum(len(x.questions) for x in found):>9}  {total:>6g}")
    return "\n".join(lines)
