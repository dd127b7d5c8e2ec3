"""A student's saved notebook, run apart from whatever judges it: the wire, the cells, the worker process and the receipt.

The worker of this version is a plain process with limits on time, memory and size: it keeps a mistake from doing harm, not an attack.
"""
