"""Fences (PTX ISA 9.7.13.4 "fence", 8.4 "Proxies").

wgmma and bulk copies reach shared memory through the async proxy. What a thread has stored there in
the ordinary way is visible to them only if a fence.proxy.async lies on the way from the store: by
the thread that stored, after it, or by one that has met it since. The race detector keeps, beside
what a warp has seen, what of it was fenced. An mbarrier has to be made known to the async proxy by
fence.mbarrier_init or fence.proxy.async after its initialisation."""

from .decode import PtxError, lanes_of, opcode


@opcode("fence")
def fence(i):
    """fence.proxy.async{.shared::{cta, cluster}, .global}, fence.mbarrier_init.release.cluster;
    the others order what the interpreter executes in order anyway.
    """
    proxy = i.parts[1] == "proxy"
    if proxy and not i.parts[2].startswith(("async", "alias", "tensormap")):
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    to_async = proxy and i.parts[2] == "async" and "global" not in i.parts
    if not to_async and i.parts[1] != "mbarrier_init":
        return lambda m, act: None

    def run(m, act):
        lanes = lanes_of(m, act)
        if m.mbarriers.known:
            m.mbarriers.fence(set(lanes.tolist()))
        if to_async and m.races is not None:
            m.races.fence(lanes)

    return run
