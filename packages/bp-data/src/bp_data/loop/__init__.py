"""The training loop, written once for every rail, method and framework. Reading starts in `bp_data.loop.loop`.

    loop.py        one function: step → micro-batch → backward → clip → update → events → validation → guards → save
    protocols.py   what a rail brings: `Framework`, and the guards and savers around it
    sampler.py     which examples each micro-batch holds: a function of seed and epoch
    schedule.py    the learning rate of each step
    plan.py        steps, epochs and held-out examples
    memory.py      out of memory: the same step again in smaller chunks
    validation.py  validation loss, best weights, early stop

It lives in bp-data because both rails depend on that package and nothing here needs a framework: examples, their order
and their counts are data, and a rail adds `bp_data.loop.protocols.Framework`. See docs/explain/decisions/the-loop.md.
"""
