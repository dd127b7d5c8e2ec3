"""Another right answer to every exercise, one module a lesson, named like the lesson's and written by other means than the notebook's."""
