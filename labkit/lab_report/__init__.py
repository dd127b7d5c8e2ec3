"""The lab sheet's report, made from a student's own runs: the numbers come from the record, the words from the student.

Data flows record -> tables -> notebook, page -> checks; parts.py says what a report consists of. How things are measured is elsewhere.
"""

from labkit.lab_report.report import LabReport

__all__ = ["LabReport"]
