import sys, time, torch, numpy as np, copy
torch.set_num_threads(1)
from dataclasses import replace
from labkit.recording import record
from labkit.tabletop import Variation
from labkit.rollouts import rollout
from labkit.policy import Decision
from labkit.actions import action_to_bins, small_action
from labkit.task_specific_vla import *
from labkit.task_specific_vla import _TABLETOP_LOW,_TABLETOP_HIGH
from labkit.waypoint_regression import *
V=Variation(bin_yaw=0.5)
def enc(a): return np.concatenate([a[:,:5],np.cos(4*a[:,5:6]),np.sin(4*a[:,5:6]),a[:,6:]],1)
def dec(a): return np.concatenate([a[:,:5],np.arctan2(a[:,6:7],a[:,5:6])/4,a[:,7:]],1)
class P(WaypointPolicy):
    def decide(self, obs, instructions=None):
        t=time.perf_counter()
        im=np.stack([frames_of(o["rgb"], o.get("previous_rgb"), self.model.frames) for o in obs])
        w=dec(self.predict([o["instruction"] for o in obs], im, [bool(o["holding"]) for o in obs]))
        a=small_action(w); return Decision(action_to_bins(a),a,w,np.full(a.shape,np.nan),time.perf_counter()-t)
n,epochs=int(sys.argv[1]),int(sys.argv[2])
demos=list(record("align", episodes=n, seed=5_000_000, variation=V, shares=(9,1,0)))
g=load_waypoint_policy(); m=g.model
low=np.array([*_TABLETOP_LOW[:5],-1,-1,0]); high=np.array([*_TABLETOP_HIGH[:5],1,1,1])
new=TaskSpecificVLA(m.vision_encoder,m.text_encoder,m.readout,1,256,0.1,ActionNormaliser(low,high))
st=m.state_dict(); st.pop("normaliser.low"); st.pop("normaliser.high")
w=torch.zeros(8,256); b=torch.zeros(8); idx=[0,1,2,3,4,7]; src=[0,1,2,3,4,6]
w[idx]=st["action_head.3.weight"][src]; b[idx]=st["action_head.3.bias"][src]; st["action_head.3.weight"]=w; st["action_head.3.bias"]=b
print(new.load_state_dict(st,strict=False))
p=P(new,g.processor)
set_trainable(p.model,"full")
def S(split):
    s=waypoint_samples([d for d in demos if d.split==split],1); return replace(s,actions=enc(s.actions))
tr,va=S("train"),S("validation")
c=fit(p,tr,va,epochs=epochs,head_rate=1e-3,tower_rate=5e-4,step_size=max(1,epochs//2),gamma=.3,loss="l1",pointing=0.1,progress=False)
print(c,flush=True)
pr=dec(predict(p,va)); true=dec(va.actions); e=np.abs((pr[:,5]-true[:,5]+np.pi/4)%(np.pi/2)-np.pi/4)
held=va.holding; print("yaw error grasp %.3f place %.3f"%(e[~held].mean(),e[held].mean()))
print(rollout(p,"align",100,variation=V,progress=False),flush=True)
