"""A whole model compressed block after block, and its adapters trained afterwards.

One run, from the call to the finished folder:
    model           `slab_kernels.compress`
    arguments       its arguments, checked and brought to one plain form
    plan            the settings of every linear; numbers as they will be stored
    calibration     the texts of the run as token ids
    job             the model, and which of its linears are to become what
    run             all of these put together
    blockwise       block after block
    block           one block: decompositions, records
    statistics      the texts on their way through the blocks, and what linears read of them
    head            the output head, after the last block
    vocabulary      what becomes of embedding and head; outside: the model outside its blocks
    sinks           where finished blocks go: memory, or shards of a folder
    finish, card    what comes after the last block: the index, config.json, the model card
    record          slab_run.json
    events          progress, as the caller sees it
    team            several processes that share the work
    memory          the most memory that a layer took

What a run may do beside the method:
    budget          settings chosen layer by layer under one count of bits (`bits=`)
    sensitivity     what a layer's error costs the whole model, from one backward pass
    matching        a block trained towards the dense one (`matching=`)
    trainable       a decomposition as a module, which matching trains

After a run:
    training        adapters trained on a text (`slab-kernels train`)
    training_state  the state by which an interrupted training goes on
"""
