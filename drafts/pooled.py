import torch, json, sys
from pathlib import Path
from labkit.clip_policy_pretraining import *
from labkit.clip_policy_pretraining import Recipe
from labkit.rollouts import rollout
import labkit.clip_policy_pretraining as g
readout, pointing, steps = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
out=Path(f"/tmp/p/lab9/trial_{readout}_{pointing}"); 
log=pretrain(Recipe(steps=steps,readout=readout,pointing=pointing), out=out, cache=Path("/tmp/p/lab9/trial_cache"), progress=False, stop_after_seconds=400)
for l in log[::3]+log[-1:]: print(l)
if log[-1]["step"]==steps:
    p=load_waypoint_policy(out)
    for t in ("pick","put"): 
        r=rollout(p,t,100,progress=False); print(readout,pointing,steps,r, "first cm", 100*r.position_error.mean(), flush=True)
