import json,base64,re,sys
from PIL import Image
import io
nb=json.load(open(sys.argv[1])); ims=[]
for n,c in enumerate(nb["cells"]):
    if c["cell_type"]=="code":
        for o in c["outputs"]:
            h="".join(o.get("data",{}).get("text/html",""))
            for k,d in re.findall(r'data:image/(png|gif);base64,([^"]+)"',h):
                print(n,k,len(d))
                if k=="png": ims.append(Image.open(io.BytesIO(base64.b64decode(d))).convert("RGB"))
W=max(i.width for i in ims); cols=2
rows=[ims[k:k+cols] for k in range(0,len(ims),cols)]
out=Image.new("RGB",(W*cols,sum(max(i.height for i in r) for r in rows)),"white"); y=0
for r in rows:
    for k,i in enumerate(r): out.paste(i,(k*W,y))
    y+=max(i.height for i in r)
out.save(sys.argv[2]); print(out.size)
