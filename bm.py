import torch,time,statistics as S
torch.set_num_threads(2)
def t(f,n=300):
    for _ in range(20): f()
    r=[]
    for _ in range(n):
        a=time.perf_counter(); f(); r.append(time.perf_counter()-a)
    return S.median(r)*1e6
for dt in (torch.bfloat16,torch.float32):
  for (n,i,o) in ((96,576,576),(96,576,1536),(96,1536,576),(48,576,1536)):
    G=4
    x=torch.randn(G*n,i).to(dt); y=torch.randn(G*n,o).to(dt)
    us=[torch.randn(o).sign().to(dt) for _ in range(G)]; vs=[torch.randn(i).sign().to(dt) for _ in range(G)]
    xs=x.chunk(G); ys=y.chunk(G); sc=1e-3; st=torch.full((G,1,1),1e-3,dtype=dt)
    def a():
        for g in range(G): ys[g].addcmul_(torch.mv(xs[g],vs[g]).unsqueeze(1).mul_(sc),us[g])
    def b():
        p=torch.bmm(x.view(G,n,i),torch.stack(vs).unsqueeze(2)); y.view(G,n,o).addcmul_(p.mul_(st),torch.stack(us).unsqueeze(1))
    def b2():
        p=torch.bmm(x.view(G,n,i),torch.stack(vs).unsqueeze(2)); y.view(G,n,o).baddbmm_(p.mul_(st),torch.stack(us).unsqueeze(1))
    def c():
        p=torch.bmm(x.view(G,n,i),torch.stack(vs).unsqueeze(2)).mul_(st)
        for g in range(G): ys[g].addcmul_(p[g],us[g])
    w=torch.randn(o,i).to(dt)
    print(dt,n,i,o,'loop %.0f bmm %.0f baddbmm %.0f mix %.0f linear %.0f'%(t(a),t(b),t(b2),t(c),t(lambda:torch.nn.functional.linear(x,w))))
