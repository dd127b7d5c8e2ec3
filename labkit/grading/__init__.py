"""What instructors have and students do not: release, collection, isolation, grading, results and their exports.

Nothing in this folder goes into the students' bundle. Data flows release -> submissions -> grade -> results -> feedback, report, exports.
"""
