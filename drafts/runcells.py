"""Run the code cells of a notebook in one process, print errors and time by cell."""
import sys, nbformat, time, traceback, io, contextlib
import matplotlib; matplotlib.use("Agg")
import os; os.chdir("/tmp/p/w10/notebooks")
nb=nbformat.read("/tmp/p/w10/"+sys.argv[1],4); ns={}; only=sys.argv[2:] 
from IPython.core.interactiveshell import InteractiveShell
total=0
for c in nb.cells:
    if c.cell_type!="code" or c.id.startswith(("check","receipt")): continue
    t=time.time()
    try:
        exec(compile(c.source,c.id,"exec"),ns)
    except BaseException as e:
        print("!!",c.id,type(e).__name__,str(e)[:300])
    total+=time.time()-t
    print("--",c.id,"%.1f s"%(time.time()-t),flush=True)
print(total)
