"""A Hugging Face model as a folder on disk and as decoder blocks, dense or packed.

A folder on disk:
    shards          safetensors and JSON files, read with checks and written atomically
    side_files      what lies beside them: tokenizers, templates, licences, code
    ties            tensors that are one under two names
    model_config    what config.json and generation_config.json say
    folder          a checkpoint folder, by path or from the hub, read tensor by tensor
    tables          embeddings of int8 rows: their entry of config.json, their modules
    packed_config   the entry of config.json that describes packed modules
    totals          what a whole folder stores, part by part
    output          a folder under writing: its lock, and the state that a killed run leaves

Opening one:
    stored_names    what a checkpoint's tensors are called in the model, and how it is rebuilt
    skeleton        the model of a config.json, built on meta
    packed          packed layers put into the skeleton, and checks of their tensors
    load            `slab_kernels.load`
    save            `slab_kernels.save`
    decompress      `slab_kernels.decompress`

Compressing one, with `compression` on top:
    source          the dense model, from a folder or in memory
    blocks          its decoder blocks, the linears in them, and their weights
    streams         the calibration text on its way through the blocks
    weight_reads    code of a model that reads the weight of a linear
    vocabulary      the input embedding and the output head, and who reads their weights
    groups          what the linears of a block read, and which of them read the same
    passes          a block run for its groups, without computing anything twice

Comparing two, with `evaluate` on top, and compressing an output head:
    endings         what lies behind the blocks, and a text led there, of a model in memory or not
"""
