import sys, time, json, torch, numpy as np
torch.set_num_threads(1)
from labkit.recording import record
from labkit.demonstrations import read
from labkit.paths import DATA
from labkit.tabletop import Variation
from labkit.rollouts import rollout
from labkit.task_specific_vla import *
from labkit.waypoint_regression import *
V={"align":Variation(bin_yaw=0.5)}
for spec in sys.argv[1:]:
    task,n,epochs,frames=spec.split(":"); n,epochs,frames=int(n),int(epochs),int(frames)
    t=time.time(); demos=list(record(task, episodes=n, seed=5_000_000, variation=V.get(task,Variation()), shares=(9,1,0))); rec=time.time()-t
    p=load_waypoint_policy()
    if frames==2: p=with_two_frames(p)
    set_trainable(p.model,"full")
    tr=waypoint_samples([d for d in demos if d.split=="train"],frames); va=waypoint_samples([d for d in demos if d.split=="validation"],frames)
    c=fit(p,tr,va,epochs=epochs,head_rate=1e-3,tower_rate=3e-4,step_size=max(1,epochs//2),gamma=.3,loss="l1",pointing=0.1,progress=False)
    r=rollout(p,task,100,variation=V.get(task,Variation()),progress=False)
    te=waypoint_samples(read(DATA/"demonstrations"/task,"test"),frames)
    acc={k:round(v["error"],3) for k,v in action_accuracy(p,te).items()}
    print(spec,"record %.1f s"%rec,str(c),r,acc,flush=True)
