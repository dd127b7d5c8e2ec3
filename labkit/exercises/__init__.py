"""Exercises that check themselves: the exercise object, how an answer is asked for and judged, and one file a lesson.

Nothing here reads a notebook or starts a process; that is labkit/submission/.
"""
