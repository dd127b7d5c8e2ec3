"""Take over finished points into the log of the present identity: seedlog.py EXCLUDED_PART..."""
import sys,json,glob,os
from labkit import sweeps
from labkit.experiments import lab_task_specific_vla as L
pts=L.points(); keys={sweeps._key(p) for p in pts}
new=sweeps.UNFINISHED/f"lab_task_specific_vla-{sweeps._identity(L,pts)}.jsonl"
seen={}
for f in glob.glob(str(sweeps.UNFINISHED/"lab_task_specific_vla-*.jsonl"))+["/tmp/p/kept9.jsonl"]:
    if os.path.exists(f):
        for line in open(f):
            if line.strip():
                e=json.loads(line)
                if e["point"]["part"] not in sys.argv[1:] and sweeps._key(e["point"]) in keys: seen[sweeps._key(e["point"])]=e
for f in glob.glob(str(sweeps.UNFINISHED/"lab_task_specific_vla-*.jsonl")): os.remove(f)
for path in (new,"/tmp/p/kept9.jsonl"):
    open(path,"w").write("".join("\n"+json.dumps(e)+"\n" for e in seen.values()))
print(len(seen),new)
