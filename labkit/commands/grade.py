"""`grade`: from a folder of submissions to records, feedback and reports. The work is in labkit/grading/grade.py and the modules beside it."""

import os
from pathlib import Path

HELP = "grade submissions: a folder, a zip from a learning platform, or notebooks; stopped at any moment, it goes on where it was"
MARKS, OVERRIDES = "marks.csv", "overrides.csv"
DRY_RUN = "dry-run"


def add_arguments(parser):
    parser.add_argument("submissions", type=Path, nargs="*", metavar="SUBMISSIONS", help="folders, zips or notebooks")
    parser.add_argument("--out", type=Path, metavar="RESULTS", help="where records, feedback and reports go; may be there already")
    parser.add_argument("--assignment", type=Path, metavar="FILE", help="what is graded (data/assignments/ has an example); without one, all lessons")
    parser.add_argument("--secret", type=Path, metavar="FILE", help="the course's secret; without one, yours, made on first use")
    parser.add_argument("--student", action="append", metavar="NAME", help="grade this student alone, again if need be; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="grade again what has a record")
    parser.add_argument("--lanes", type=int, default=max(1, os.cpu_count() or 1), metavar="N", help="submissions at a time (one a core)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="grade on a Dask cluster, tcp://host:port")
    parser.add_argument("--isolation", metavar="TIER", help="full, no-namespaces, container or none; without it, the strongest that works here")
    parser.add_argument("--dry-run", action="store_true", help="grade the instructor's own solutions, into RESULTS/dry-run: all must get full points")
    parser.add_argument("--benchmark", action="store_true", help="instead: how fast grading is here, against nbclient on the same cells")
    parser.add_argument("--no-feedback", action="store_true", help="records and grades.csv only")
    parser.add_argument("--names", choices=("hidden", "shown"), default="hidden", help="on the leaderboard and on the pages for marking (hidden)")
    for name, what in (("gradescope", "results.json files"), ("canvas", "a CSV for Canvas"), ("gradebook", "an nbgrader gradebook")):
        parser.add_argument(f"--{name}", action="store_true", help=f"also write {what}")


def main(args):
    from filelock import FileLock, Timeout

    from labkit.errors import UserError
    from labkit.grading.assignment import default_assignment, read_assignment
    from labkit.grading.grade import clear_unfinished
    from labkit.grading.sandbox import chosen_isolation
    from labkit.grading.secret import read_secret

    if args.benchmark:
        from labkit.grading.benchmark import run_benchmark

        for line in run_benchmark(chosen_isolation(args.isolation), args.lanes):
            print(line, flush=True)
        return 0
    _check(args)
    assignment = read_assignment(args.assignment) if args.assignment else default_assignment()
    if args.dry_run:
        args.out /= DRY_RUN  # where no student's record is
    secret, made = read_secret(args.secret)
    if made:
        from labkit.grading.secret import secret_path

        print(f"Made the course's secret: {secret_path()}. Keep it, and keep it from students: with it hidden cases can be drawn again.")
    isolation = chosen_isolation(args.isolation)
    print(f"Isolation {isolation}.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with FileLock(args.out / ".lock", timeout=0):
            clear_unfinished(args.out)
            return _grade(args, assignment, secret, isolation)
    except Timeout:
        raise UserError(f"{args.out} is being written by another `grade`: wait until it is done, or name another folder.") from None
    except OSError as error:
        raise UserError(f"{error.filename or args.out} cannot be written ({error.strerror}): make room or change who may write there, and run the "
                        "same command again.") from None


def _check(args):
    """Raises UserError for arguments that cannot be meant."""
    from labkit.errors import UserError

    if args.lanes < 1:
        raise UserError(f"--lanes is {args.lanes}; at least 1 is needed.")
    if args.out is None:
        raise UserError("name a folder for the results: --out RESULTS.")
    if bool(args.submissions) == args.dry_run:
        raise UserError("name the submissions, or --dry-run without any: it grades the solutions of the source notebooks.")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file: name a folder, which --out makes where there is none.")
    for path in args.submissions:
        if args.out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{args.out} lies in {path}, where it would be taken for a student's folder: name a folder outside.")


def _grade(args, assignment, secret, isolation):
    from tqdm import tqdm

    from labkit.exercises.judging import printable
    from labkit.grading.cluster import grade_on_cluster
    from labkit.grading.grade import course_of, grade_all, job_of, ungraded
    from labkit.grading.results import read_records
    from labkit.quiet import quiet_libraries

    quiet_libraries()
    course = course_of(assignment, secret, isolation)
    submissions = _submissions(args, assignment)
    jobs = [job_of(submission, course) for submission in tqdm(submissions, desc="reading", unit="submission", leave=False)]
    again = args.fresh or args.student or args.dry_run
    todo = jobs if again else ungraded(jobs, args.out)
    print(f"{assignment.title}, release {assignment.release}: {len(jobs)} submissions, {len(jobs) - len(todo)} graded already.")
    with tqdm(total=len(todo), desc="grading", unit="submission") as bar:
        if not todo:
            failed = []
        elif args.scheduler:
            failed = grade_on_cluster(todo, course, args.out, args.scheduler, lambda graded: bar.update())
        else:
            failed = grade_all(todo, course, args.out, min(args.lanes, len(todo)), lambda graded: bar.update())
    for sentence in failed:
        print(printable(sentence))
    records = [graded for graded in read_records(args.out) if graded.assignment == assignment.name]
    records = _merged(args, records)
    write_results(args, assignment, secret, records)
    print(_summary(args.out, records))
    if args.dry_run:
        return _check_dry_run(records)
    return 1 if failed else 0


def _submissions(args, assignment):
    from labkit.errors import UserError
    from labkit.exercises.judging import printable
    from labkit.grading.archives import list_files
    from labkit.grading.submissions import Submission, find_submissions

    if args.dry_run:
        return [Submission(DRY_RUN, None, {stem: list_files(assignment.source / f"{stem}.ipynb").files[0] for stem in assignment.notebooks})]
    found = find_submissions(args.submissions, assignment)
    if args.student:
        missing = sorted(set(args.student) - {submission.student for submission in found})
        if missing:
            raise UserError(f"{missing[0]!r} handed in nothing here: the students are {', '.join(printable(s.student) for s in found[:20])}.")
        found = [submission for submission in found if submission.student in args.student]
    return found


def _merged(args, records):
    """The records with the marks and overrides that lie in the results folder; changed ones are written."""
    from labkit.grading.questions import merge_marks, merge_overrides
    from labkit.grading.results import write_record

    for name, merge in ((MARKS, merge_marks), (OVERRIDES, merge_overrides)):
        if (args.out / name).exists():
            changed = {graded.student: graded for graded in merge(records, args.out / name)}
            for graded in changed.values():
                write_record(args.out, graded)
            records = [changed.get(graded.student, graded) for graded in records]
    return records


def write_results(args, assignment, secret, records):
    """Everything that is made of records."""
    from labkit.grading import class_report, exports, feedback, leaderboard, questions

    roster = assignment.roster
    exports.write_grades(args.out, records)
    if not args.no_feedback:
        hidden = assignment.performance and args.names == "hidden"
        boards = {graded.student: leaderboard.pseudonym(secret, assignment.name, graded.student) for graded in records} if hidden else {}
        feedback.write_feedback(args.out, records, assignment.title, assignment.deadline, boards)
        class_report.write_report(args.out, records, assignment.title, roster)
        if assignment.questions:
            questions.write_questions(args.out, records, assignment.source, args.names == "shown")
        if assignment.performance:
            leaderboard.write_leaderboard(args.out, records, args.names, secret)
    if args.gradescope:
        exports.write_gradescope(args.out, records)
    if args.canvas:
        exports.write_canvas(args.out, records, assignment.title, roster)
    if args.gradebook:
        exports.write_gradebook(args.out, records, assignment.deadline, roster)


def _summary(out, records):
    import numpy as np

    if not records:
        return f"No record in {out}."
    totals = np.array([graded.total for graded in records])
    unmarked = sum(len(graded.unmarked) for graded in records)
    most = max(graded.out_of for graded in records)
    return (f"{len(records)} records in {out}: median {np.median(totals):g} of {most:g} points, from {totals.min():g} to {totals.max():g}"
            + (f"; {unmarked} written answers wait for a mark ({out / MARKS})." if unmarked else "."))


def _check_dry_run(records):
    """0 if every exercise of the instructor's own solutions got all its points."""
    short = [f"{verdict.exercise}: {verdict.sentence}" for graded in records for verdict in graded.verdicts if verdict.earned < verdict.points]
    print("\n".join(short) if short else "Dry run: every exercise got all its points.")
    return 1 if short else 0
