"""One file for each verb of `python3 -m labkit`.

A file is read before the packages are there: at its top it imports the standard library only, the rest inside main().
"""
